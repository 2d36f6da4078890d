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


def test_the_copy_engine_takes_no_rows_that_are_not_of_16_bytes():
    with pytest.raises(RuntimeError, match="does not suit the copy engine"):
        operators().boxes(torch.randn(1, 9, 2, 68).bfloat16()[..., :64], 0, 8)


def test_not_on_sm_80(monkeypatch):
    monkeypatch.setenv("SLM_EXECUTOR_ARCHITECTURE", "80")
    with pytest.raises(RuntimeError, match="an instruction of sm_90a; the architecture is 80"):
        two_products(torch.bfloat16)
