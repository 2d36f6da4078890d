"""What sm_90a adds, on a CPU: copy engine, mbarriers, products beside the threads; faults are found out."""

import pytest
import torch
from executor import operators

FAULTS = {
    "no_proxy_fence": "no proxy fence between",
    "no_barrier_after_stores": "no barrier between|nobody has written",
    "no_wait_for_boxes": "before the copy was waited for|nobody has written",
    "wrong_parity": "before the copy was waited for|nobody has written",
    "wrong_stride": None,  # no rule of the machine is broken: the result is wrong
    "wrong_leading": None,
    "wrong_swizzle": None,
    "wrong_major": "nobody has written|out of bounds",
    "released_before_wait": "no barrier between",
    "released_by_one_warp": "no barrier between",
    "too_few_bytes_expected": "more than the mbarrier expects",
    "too_many_bytes_expected": "wait for ever at a mbarrier",
    "sums_read_before_wait": None,
    "sums_written_before_wait": "sums of a product were written before",
    "sums_written_after_fence": "registers of the sums were written after the fence",
    "a_written_before_wait": "registers of a were written before",
    "no_fence_of_products": "without a fence_products",
    "fence_without_a": "no fence_products names a",
    "wait_without_sums": "does not name sums",
    "no_fence_of_mbarriers": "whose initialisation has no fence",
    "no_barrier_after_mbarriers": "is no mbarrier|no barrier between",
    "arrival_too_many": "beyond the 4 of its phase|no barrier between",
    "arrival_missing": "wait for ever at a mbarrier",
    "wrong_row": None,
    "box_over_stores": "no proxy fence between|no barrier between",
    "products_not_awaited": "before its products were waited for",
    "boxes_not_awaited": "before its boxes were waited for",
    "too_many_registers": "a multiprocessor has 65536",
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setenv("SLM_EXECUTOR_ARCHITECTURE", "90")


def two_products(dtype, fault=0):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(64, 128, generator=generator).to(dtype) for _ in range(3))
    s = (a.float() @ b.float().T).to(dtype)
    o = operators().two_products(a, b[None, :, None], c[None, :, None], fault)
    return o, s.float() @ c.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_from_shared_memory_and_registers(dtype):
    o, expected = two_products(dtype)
    assert (o - expected).abs().max() <= 2e-2 * expected.abs().max()  # s rounds where sums differ in order
    assert (o - expected).abs().mean() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("fault", FAULTS)
def test_finds(fault):
    number = list(FAULTS).index(fault) + 1
    if FAULTS[fault] is None:
        o, expected = two_products(torch.bfloat16, number)
        assert not (o - expected).abs().max() < 1
    else:
        with pytest.raises(RuntimeError, match=FAULTS[fault]):
            two_products(torch.bfloat16, number)


@pytest.mark.parametrize("layout", ["BTHD", "BHTD", "packed projection"])
@pytest.mark.parametrize(("row", "rows"), [(0, 64), (3, 8), (60, 16), (70, 8)])
def test_boxes_have_zeros_beyond_the_tensor(layout, row, rows):
    x = torch.randn(1, 65, 2, 64).bfloat16()
    if layout == "BHTD":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed projection":
        x = torch.randn(1, 65, 6, 64).bfloat16()[:, :, 3:5]
    expected = torch.zeros(2, rows, 64, dtype=x.dtype)
    part = x[0, row : row + rows].transpose(0, 1)
    expected[:, : part.shape[1]] = part
    assert torch.equal(operators().boxes(x, row, rows), expected)


def lay_out(x, mn_major, pieces, leading, stride):
    """The place in memory of each of x [64 (n), 16 (k)], in numbers, as section 9.7.15.5.1.2 draws it.

    Matrices are made of atoms, 8 lines of `pieces` pieces of 8 numbers; lines are k if n runs along the
    pieces. Piece p of line r lies at p ^ (r * pieces // 8). Without a swizzle, a line is one piece.
    """
    n, k = torch.meshgrid(torch.arange(64), torch.arange(16), indexing="ij")
    line, along = (k, n) if mn_major else (n, k)
    row, piece = line % 8, along // 8 % pieces
    place = row * pieces * 8 + (piece ^ (row * pieces // 8)) * 8 + along % 8
    if pieces == 1 and mn_major:
        leading, stride = stride, leading  # without a swizzle their roles are exchanged
    return place + line // 8 * stride // 2 + along // (8 * pieces) * leading // 2


SWIZZLES = {1: 0, 8: 1, 4: 2, 2: 3}  # pieces of a line: the descriptor's code


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("pieces", SWIZZLES)
def test_matrices_lie_as_the_manual_draws_them(mn_major, pieces):
    a, b = torch.randn(2, 64, 16).bfloat16()
    image = torch.zeros(32768, dtype=torch.bfloat16)
    leading, stride = (4096, 256) if pieces == 1 else (512, 4096)
    descriptors = []
    for start, x, mn in ((0, a, False), (32768, b, mn_major)):
        place = start // 2 + lay_out(x, mn, pieces, leading, stride)
        assert place.unique().numel() == x.numel()
        image[place] = x
        code = SWIZZLES[pieces] - (4 if SWIZZLES[pieces] > 1 else 0)  # of a signed 64-bit number
        descriptors.append(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62)
    o = operators().matrices(image, *descriptors, mn_major)
    torch.testing.assert_close(o, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_the_copy_engine_takes_no_rows_that_are_not_of_16_bytes():
    with pytest.raises(RuntimeError, match="does not suit the copy engine"):
        operators().boxes(torch.randn(1, 9, 2, 68).bfloat16()[..., :64], 0, 8)


def test_not_on_sm_80(monkeypatch):
    monkeypatch.setenv("SLM_EXECUTOR_ARCHITECTURE", "80")
    with pytest.raises(RuntimeError, match="an instruction of sm_90a; the architecture is 80"):
        two_products(torch.bfloat16)
