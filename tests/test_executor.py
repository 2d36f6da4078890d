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


# A rule of rules.cu, and what is said where it is broken.
RULES = {
    "lanes_meet": "thread 1|thread 0",
    "shuffles_order_nothing": "no barrier between",
    "the_last_at_a_barrier_waits_too": "no barrier between",
    "a_buffer_is_free_before_it_is_filled": "before the copy of thread|reads: no barrier between",
    "the_newest_copy_is_waited_for": "before the copy of thread",
    "the_source_of_a_copy_stays": "global memory that thread .*: no barrier between",
    "counts_of_a_barrier_agree": "where others expect",
    "a_consumer_waits": "no barrier between|nobody has written",
    "warps_come_as_a_whole": "wait for ever",
    "blocks_return_as_a_whole": "wait for ever",
    "lanes_multiply_together": "where other lanes",
    "rows_end": "outside every tensor",
    "vectors_are_aligned": "misaligned",
    "writes_are_seen_after_a_barrier": "global memory that thread .*: no barrier between",
    "reads_end_before_a_write": "global memory that thread .*: no barrier between",
    "blocks_read_their_own": "block . of the same launch",
    "launches_follow_one_another": "block . of the same launch",
    "atomics_begin_after_a_barrier": "no barrier between|nobody has written",
    "atomics_end_at_a_barrier": "no barrier between",
    "halves_of_words_are_disjoint": "no barrier between",
    "broadcasts_end_before_a_write": "no barrier between",
    "shared_memory_dies_with_its_block": "nobody has written",
}
T = torch.arange(128.0)
X = torch.arange(128.0 * 64).view(128, 64)
KEPT = {  # what the threads of a block find
    "lanes_meet": (T.int() ^ 1).float(),
    "shuffles_order_nothing": T // 32 * 32 + 3 + (T.int() ^ 1),
    "the_last_at_a_barrier_waits_too": torch.ones(128),
    "a_buffer_is_free_before_it_is_filled": X.roll(64, 0)[:, [0, 4, 8]].sum(1),
    "the_newest_copy_is_waited_for": X.roll(64, 0)[:, 4],
    "a_consumer_waits": torch.cat([torch.zeros(64), T[:64]]),
    "rows_end": X[:, 31],
    "vectors_are_aligned": X[:, 5],
    "writes_are_seen_after_a_barrier": (T.int() ^ 1).float(),
    "launches_follow_one_another": torch.stack([T + 128, T]),
    "atomics_begin_after_a_barrier": T.sum().expand(128),
    "atomics_end_at_a_barrier": T.sum().expand(128),
    "halves_of_words_are_disjoint": T // 2 * 2 + (T // 2 * 2 + 1) * 65536,
    "broadcasts_end_before_a_write": torch.full((128,), 3.0),
    "shared_memory_dies_with_its_block": T,
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


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule(rule, order, monkeypatch):
    monkeypatch.setenv("SLM_EXECUTOR_ORDER", order)
    x = X.clone()
    arguments = x[:, :32], x[:64, 32:], list(RULES).index(rule)
    o = operators().rules(*arguments, False)
    torch.testing.assert_close(o, KEPT.get(rule, torch.zeros(128)).expand(2, 128), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=RULES[rule]):
        operators().rules(*arguments, True)
    assert operators().rules(*arguments, False).equal(o)


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
