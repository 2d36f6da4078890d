"""ExpertLoRA against effective weights written out, and what it leaves alone."""

import copy

import pytest
import torch
from expert_modules import RICH, close, domain, sparse, tokens

from slmkernels.nn import ExpertLoRA, FeedForward, hold_frozen

CALLS = {
    "sparse": (lambda: sparse(**RICH), (tokens(3, 4),), {}),
    "domain": (lambda: domain(bias=True), (tokens(3, 4), torch.tensor([1, 0, 3])), {}),
    "mixture": (domain, (tokens(3, 4),), {"mixture": torch.ones(3, 4), "top_k": 2}),
}
every_call = pytest.mark.parametrize(("build", "args", "options"), CALLS.values(), ids=CALLS)


def stirred(lora):
    with torch.no_grad():
        for b in (lora.gate_up_b, lora.down_b):
            torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(2))
    return lora


@every_call
def test_at_first_nothing_changes(build, args, options):
    base = build()
    y = base(*args, **options)
    assert torch.equal(ExpertLoRA(base, 3)(*args, **options), y)


@every_call
def test_it_is_its_definition(build, args, options):
    lora, other = stirred(ExpertLoRA(build(), 3, scale=0.5)), build()
    with torch.no_grad():
        for e in range(4):
            other.w_gate_up[e] += 0.5 * lora.gate_up_b[e] @ lora.gate_up_a[e]
            other.w_down[e] += 0.5 * lora.down_b[e] @ lora.down_a[e]
    close(lora(*args, **options), other(*args, **options))
    assert not torch.equal(lora(*args, **options), build()(*args, **options))


@every_call
def test_merged_equals_unmerged(build, args, options):
    lora = stirred(ExpertLoRA(build(), 3, scale=2.0))
    y = lora(*args, **options)
    merged = lora.merge()
    assert torch.equal(merged(*args, **options), y)
    assert torch.equal(lora(*args, **options), y)
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("build", [sparse, domain])
def test_merged_equals_unmerged_under_autocast(build):
    args = (tokens(3, 4).float(), *((torch.tensor([1, 0, 3]),) if build is domain else ()))
    lora = stirred(ExpertLoRA(build(dtype=torch.float32), 2))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(*args)
        assert y.dtype == torch.bfloat16
        assert torch.equal(lora.merge()(*args), y)


@every_call
def test_only_a_and_b_learn(build, args, options):
    lora = stirred(ExpertLoRA(build(), 3))
    learned = {"gate_up_a", "gate_up_b", "down_a", "down_b"}
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == learned
    lora(*args, **options).square().sum().backward()
    for name, parameter in lora.named_parameters():
        assert (parameter.grad is not None) == (name in learned)
        assert name not in learned or parameter.grad.any()
    optimizer, before = torch.optim.AdamW(lora.parameters(), lr=0.1), copy.deepcopy(lora.base.state_dict())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.base.state_dict().items())


def test_gradients_are_those_of_the_effective_weights():
    lora, x = stirred(ExpertLoRA(sparse(), 2, scale=0.7)), tokens(10)
    merged = copy.deepcopy(lora).merge()
    lora(x).square().sum().backward()
    merged(x).square().sum().backward()
    close(lora.down_a.grad, 0.7 * lora.down_b.mT @ merged.w_down.grad)
    close(lora.down_b.grad, 0.7 * merged.w_down.grad @ lora.down_a.mT)
    close(lora.gate_up_a.grad, 0.7 * lora.gate_up_b.mT @ merged.w_gate_up.grad)
    close(lora.gate_up_b.grad, 0.7 * merged.w_gate_up.grad @ lora.gate_up_a.mT)


def test_masks_routing_and_freezing_are_the_base_s():
    lora, x = stirred(ExpertLoRA(sparse(), 2)), tokens(20)
    lora.base.mask_expert(0)
    lora.base.freeze(1)
    y, routing = lora(x, return_routing=True)
    assert routing.counts[0] == 0
    assert routing.counts[1] > 0
    y.sum().backward()
    for p in (lora.down_a, lora.down_b, lora.gate_up_a, lora.gate_up_b):
        assert not p.grad[:2].any()
        assert p.grad[2].any()


def test_updates_of_frozen_experts_can_be_held():
    lora, x = stirred(ExpertLoRA(sparse(), 2)), tokens(20)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, weight_decay=0.5)
    hold_frozen(lora, optimizer)
    lora.base.freeze(1)
    before = {name: w.detach().clone() for name, w in lora.effective_weights().items()}
    for _ in range(3):
        lora(x).sum().backward()
        optimizer.step()
    for name, w in lora.effective_weights().items():
        assert torch.equal(w[1], before[name][1])
        assert not torch.equal(w[2], before[name][2])


def test_what_did_not_learn_before_does_not_learn_after():
    base = sparse()
    base.router.requires_grad_(False)
    merged = ExpertLoRA(base, 2).merge()
    assert {name for name, p in merged.named_parameters() if not p.requires_grad} == {"router"}


def test_initial_values_and_states():
    torch.manual_seed(0)
    lora = ExpertLoRA(sparse(dim=64, hidden=100, num_experts=8), 16)
    assert abs(lora.gate_up_a.std() * 8 - 1) < 0.05
    assert abs(lora.down_a.std() * 10 - 1) < 0.05
    assert [tuple(p.shape) for p in (lora.gate_up_a, lora.gate_up_b)] == [(8, 16, 64), (8, 200, 16)]
    assert [tuple(p.shape) for p in (lora.down_a, lora.down_b)] == [(8, 16, 100), (8, 64, 16)]
    other = ExpertLoRA(sparse(dim=64, hidden=100, num_experts=8), 16)
    other.load_state_dict(stirred(lora).state_dict())
    assert torch.equal(other.down_b, lora.down_b)


def test_errors():
    with pytest.raises(TypeError, match=r"base is .*FeedForward.*SparseExperts or DomainExperts"):
        ExpertLoRA(FeedForward(4, 4), 2)
    for rank in (0, 1.5):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            ExpertLoRA(sparse(), rank)
    with pytest.raises(ValueError, match=r"scale is inf"):
        ExpertLoRA(sparse(), 2, scale=float("inf"))
    lora = ExpertLoRA(sparse(), 2)
    lora.base.remove_expert(0)
    with pytest.raises(ValueError, match=r"base has 3 experts, some added.*expected the 4"):
        lora(tokens(3))
    lora.base.add_expert()  # as many as at first, and not the same
    with pytest.raises(ValueError, match=r"base has 4 experts, some added or removed"):
        lora(tokens(3))
