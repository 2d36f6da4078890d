"""The executor that runs CUDA kernels on a CPU: right kernels compute, wrong ones are found out."""

import pytest
import torch
from executor import operators, take_conflicts

FAULTS = {
    "no_barrier_after_copies": "nobody has written|before the copy of thread",
    "no_wait_for_copies": "before the copy of thread",
    "no_barrier_before_reuse": "no barrier between",
    "one_row_too_many": "outside every tensor",
    "one_row_too_few": "nobody has written",
    "swapped_fragment": None,  # no rule of the machine is broken: the result is wrong
    "row_outside_tile": "out of bounds",
    "barrier_in_one_warp": "wait for ever",
    "shuffle_in_half_a_warp": "wait for ever",
    "misaligned_copy": "misaligned",
    "write_outside_result": "outside every tensor",
    "two_blocks_one_result": "block 0 of the same launch",
    "arrival_missing": "wait for ever",
}


def product(dtype, fault=0):
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64).to(dtype)
    return operators().product(a, b, fault), a.float() @ b.float().T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_through_copies_matrices_and_tensor_cores(dtype):
    take_conflicts()
    o, expected = product(dtype)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-4)
    assert take_conflicts() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_finds(fault):
    number = list(FAULTS).index(fault) + 1
    if FAULTS[fault] is None:
        o, expected = product(torch.bfloat16, number)
        assert (o - expected).abs().max() > 1
    else:
        with pytest.raises(RuntimeError, match=FAULTS[fault]):
            product(torch.bfloat16, number)
    product(torch.bfloat16)  # and goes on after an error


def test_warps():
    x = torch.randint(0, 5, (64,), dtype=torch.int32)
    total, prefix, odd, same, everything, moved = operators().warps(x)
    for w, rows in enumerate(x.split(32)):
        part = slice(32 * w, 32 * w + 32)
        assert (total[part] == rows.sum()).all()
        assert (prefix[part] == rows.cumsum(0)).all()
        assert (odd[part] == (rows % 2).sum()).all()
        assert (same[part] == (rows[:, None] == rows).sum(1)).all()
        assert (moved[part] == rows[torch.arange(32) // 8]).all()
    assert (everything == x.sum()).all()


def test_tickets():
    x = torch.arange(5 * 64, dtype=torch.int32).view(5, 64)
    assert operators().tickets(x, 0).tolist() == [x.sum(), 5]
    for fault, message in enumerate(["block 0 of the same launch"] * 3 + ["block 0|no barrier"], start=1):
        with pytest.raises(RuntimeError, match=message):
            operators().tickets(x, fault)


def test_tf32():
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    rounded = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(operators().tf32(a, b), rounded[0] @ rounded[1], rtol=1e-5, atol=1e-6)
