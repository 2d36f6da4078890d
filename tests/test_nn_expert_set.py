"""Experts that come, go and rest: exact in outputs, gradients, losses and optimizer states."""

import copy
import itertools

import pytest
import torch
from expert_modules import KIND, RICH, close, domain, sparse, stirred, tokens

from slmkernels.nn import SparseExperts, hold_frozen

DOCUMENTS = torch.tensor([3, 0, 1, 3, 0, 1])  # domain 2 is the one that goes
BUILDS = {
    "sparse": sparse,
    "rich": lambda: sparse(**RICH),
    "domain": lambda: domain(shared_hidden=3, bias=True),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=0.1),
}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def run(m, x, shift=0):
    """Output, and losses of the router where there is one; labels after the removed one move by `shift`."""
    if isinstance(m, SparseExperts):
        y, routing = m(x, return_routing=True)
        return y, routing.load_balance_loss(), routing.z_loss()
    documents = torch.where(DOCUMENTS > 2, DOCUMENTS - shift, DOCUMENTS)
    mixed = torch.tensor([[0.3, 0.4, 0.5, 0.2]] * 6, **KIND)[:, [0, 1, 3] if shift else [0, 1, 2, 3]]
    return m(x, documents), m(x, mixture=mixed, top_k=2)


def without(m, i):
    """A module that never had expert i, made by its constructor."""
    if isinstance(m, SparseExperts):
        rich = {**RICH} if m.shared is not None else {}
        other = sparse(num_experts=m.num_experts - 1, **rich)
    else:
        other = domain(num_experts=m.num_experts - 1, shared_hidden=3, bias=True)
    with torch.no_grad():
        theirs = dict([*other.named_parameters(), *other.named_buffers()])
        for name, tensor in [*m.named_parameters(), *m.named_buffers()]:
            rows = [r for r in range(len(tensor)) if name.startswith("shared") or r != i]
            theirs[name].copy_(tensor[rows])
    return other


def gradients(m, x, shift=0):
    m.zero_grad()
    sum(part.square().sum() for part in run(m, x, shift)).backward()
    return {name: p.grad for name, p in m.named_parameters()}


def train(m, optimizer, steps, shift=0, seed=0):
    for step in range(steps):
        gradients(m, tokens(6, 5, seed=100 * seed + step), shift)
        optimizer.step()


def state(m, optimizer):
    """All there is, in order: parameters, buffers, what the optimizer keeps of each parameter."""
    kept = [optimizer.state[p][name] for p in m.parameters() for name in sorted(optimizer.state[p])]
    return [*m.state_dict().values(), *kept]


@every_build
def test_a_removed_expert_was_never_there(build):
    m, x = build(), tokens(6, 5)
    never = without(m, 2)
    m.remove_expert(2)
    assert m.num_experts == 3
    for ours, theirs in zip(run(m, x, 1), run(never, x, 1), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = gradients(m, x, 1), gradients(never, x, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@every_build
def test_a_masked_expert_is_as_if_removed(build):
    m, x = build(), tokens(6, 5)
    never = without(m, 2)
    m.mask_expert(2)
    for ours, theirs in zip(run(m, x), run(never, x, 1), strict=True):
        close(ours, theirs, 1e-12)
    ours, theirs = gradients(m, x), gradients(never, x, 1)
    for name, gradient in ours.items():
        kept = [r for r in range(len(gradient)) if name.startswith("shared") or r != 2]
        close(gradient[kept], theirs[name], 1e-12)
        assert name.startswith("shared") or not gradient[2].any()
    if isinstance(m, SparseExperts):
        assert m(x, return_routing=True)[1].counts[2] == 0
    m.mask_expert(2, False)
    assert all(torch.equal(a, b) for a, b in zip(run(m, x), run(build(), x), strict=True))


def test_fewer_experts_than_top_k_are_all_taken():
    m, x = sparse(num_experts=3, top_k=3), tokens(7)
    masked = copy.deepcopy(m)
    masked.mask_expert(1)
    m.remove_expert(1)
    close(m(x), masked(x), 1e-12)
    assert m.route(x).indices.shape == (7, 2)
    assert (masked.route(x).indices[:, 2] == -1).all()


@every_optimizer
@every_build
def test_training_on_after_a_removal(build, make):
    """From the same state, a module that lost an expert and one that never had it stay equal bit for bit."""
    m = build()
    never = without(m, 2)
    m.mask_expert(2)  # it never gets a token, so that both learn the same
    ours, theirs = make(m.parameters()), make(never.parameters())
    train(m, ours, 3)
    train(never, theirs, 3, shift=1)
    m.remove_expert(2, ours)
    for a, b in zip(state(m, ours), state(never, theirs), strict=True):
        close(a, b, 1e-9)
    never.load_state_dict(m.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(m, ours, 4, shift=1, seed=1)
    train(never, theirs, 4, shift=1, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(state(m, ours), state(never, theirs), strict=True))


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"], OPTIMIZERS["momentum"]], ids=["adamw", "momentum"])
def test_domains_learn_apart(make):
    """With labels nothing of expert 2 reaches the others: equal bit for bit without copying a state."""
    m = domain()
    never, x = domain(num_experts=3), tokens(6, 5)
    never.load_state_dict({name: tensor[[0, 1, 3]] for name, tensor in m.state_dict().items()})
    ours, theirs = make(m.parameters()), make(never.parameters())

    def step(module, optimizer):
        optimizer.zero_grad()
        last = module.num_experts - 1
        module(x, torch.tensor([last, 0, 1, last, 0, 1])).square().sum().backward()
        optimizer.step()

    for i in range(6):
        if i == 3:
            m.remove_expert(2, ours)
        step(m, ours)
        step(never, theirs)
    assert all(torch.equal(a, b) for a, b in zip(state(m, ours), state(never, theirs), strict=True))


@every_optimizer
@every_build
def test_optimizer_states_stay_with_their_experts(build, make):
    m = build()
    optimizer = make(m.parameters())
    train(m, optimizer, 2)
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in m.named_parameters()}
    gone = set(m.parameters())
    m.remove_expert(1, optimizer)
    assert m.add_expert(optimizer=optimizer) == 3
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in m.parameters()}
    for name, parameter in m.named_parameters():
        assert name.startswith("shared") or parameter not in gone
        rows = list(range(len(parameter)))
        if not name.startswith("shared"):
            rows = [0, 2, 3, None, *range(4, len(rows))]  # what follows expert 3 is null experts
        for key, kept in optimizer.state[parameter].items():
            if key == "step":
                assert kept == before[name][key]
                continue
            assert before[name][key].any()
            for row, old in zip(kept, rows, strict=True):
                assert torch.equal(row, torch.zeros_like(row) if old is None else before[name][key][old])
    train(m, optimizer, 1)


@every_build
def test_a_new_expert_comes_last_and_leaves_the_others(build):
    m = build()
    m.mask_expert(1)
    m.freeze(1)
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    torch.manual_seed(3)
    assert m.add_expert() == 4
    assert m.add_expert(from_=1) == 5
    other = build()
    with torch.no_grad():
        other.w_down.add_(1)
    assert m.add_expert(from_=other.expert(3)) == 6
    assert m.num_experts == 7
    for name, tensor in m.state_dict().items():
        if name.startswith("shared"):
            continue
        nulls = len(before[name]) - 4
        assert torch.equal(tensor[:4], before[name][:4])
        assert torch.equal(tensor[7:], before[name][4:]), name
        assert len(tensor) == 7 + nulls
        if name in ("expert_mask", "frozen"):
            assert tensor[4:].tolist() == [name == "expert_mask"] * (3 + nulls)
        else:
            assert torch.equal(tensor[5], before[name][1])
            assert torch.equal(tensor[6], other.state_dict()[name][3])
    assert abs(m.w_down[4].std() * 5**0.5 - 1) < 0.5
    assert not any(torch.equal(m.w_down[4], m.w_down[e]) for e in range(4))


def test_a_new_expert_may_come_without_a_router():
    m, other = sparse(selection_bias=True), domain()
    assert m.add_expert(from_=other.expert(2)) == 4
    assert torch.equal(m.w_down[4], other.w_down[2])
    assert m.router[4].any()
    assert m.selection_bias[4] == 0
    x = tokens(40)
    assert m.route(x).counts[4] > 0


@every_build
def test_to_add_and_to_remove_is_to_do_nothing(build):
    m, x = build(), tokens(6, 5)
    before, results = copy.deepcopy(m.state_dict()), run(m, x)
    m.add_expert(from_=2)
    m.remove_expert(4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in m.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(run(m, x), results, strict=True))


def test_removals_in_any_order_agree():
    for gone in itertools.permutations([0, 2, 3]):
        m, left = sparse(selection_bias=True), [0, 1, 2, 3]
        for expert in gone:
            m.remove_expert(left.index(expert))
            left.remove(expert)
        assert torch.equal(m.w_down, sparse().w_down[1:2])
        assert torch.equal(m.router, sparse().router[1:2])


def test_gradients_and_requires_grad_go_along():
    m = sparse()
    m.router.requires_grad_(False)
    m(tokens(20)).sum().backward()
    before = m.w_down.grad.clone()
    m.remove_expert(0)
    assert torch.equal(m.w_down.grad, before[1:])
    m.add_expert()
    assert torch.equal(m.w_down.grad[:3], before[1:])
    assert not m.w_down.grad[3].any()
    assert m.w_down.requires_grad
    assert not m.router.requires_grad
    assert m.router.grad is None


def test_an_optimizer_may_hold_a_part():
    m = sparse()
    optimizer = torch.optim.AdamW([m.router])
    m.remove_expert(0, optimizer)
    assert optimizer.param_groups[0]["params"] == [m.router]


# Freezing


@every_optimizer
@every_build
def test_frozen_experts_do_not_move(build, make):
    m = build()
    optimizer = make(m.parameters())
    train(m, optimizer, 2)  # there is momentum by now
    release = hold_frozen(m, optimizer)
    m.freeze(1)
    m.freeze(3)
    before = copy.deepcopy(m.state_dict())
    train(m, optimizer, 3)
    matrices = ("w_gate_up", "w_down", "b_gate_up", "b_down")
    for name, tensor in m.named_parameters():
        moved = [not torch.equal(a, b) for a, b in zip(tensor, before[name], strict=True)]
        if name in matrices:
            assert moved[1::2] == [False, False], name
            assert moved[0], name
        else:
            assert any(moved), name
    m.freeze(1, False)
    train(m, optimizer, 1)
    assert not torch.equal(m.w_down[1], before["w_down"][1])
    assert torch.equal(m.w_down[3], before["w_down"][3])
    release()
    train(m, optimizer, 1)
    assert not torch.equal(m.w_down[3], before["w_down"][3])  # momentum, decay: what the hooks are for


@every_build
def test_gradients_of_frozen_experts_are_zero_and_others_as_before(build):
    m, x = build(), tokens(6, 5)
    before, results = gradients(m, x), run(m, x)
    m.freeze(1)
    after = gradients(m, x)
    assert all(torch.equal(a, b) for a, b in zip(run(m, x), results, strict=True))
    for name, gradient in after.items():
        if name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
            assert before[name][1].any()
            assert not gradient[1].any()
            assert torch.equal(gradient[[0, 2, 3]], before[name][[0, 2, 3]])
        else:
            assert torch.equal(gradient, before[name]), name
    squares = [g.square().sum() for g in after.values()]
    close(torch.nn.utils.get_total_norm(after.values()), torch.stack(squares).sum().sqrt(), 1e-9)


def test_freezing_follows_the_expert():
    m = sparse()
    m.freeze(2)
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
    hold_frozen(torch.nn.Sequential(m), optimizer)
    held = m.w_down[2].detach().clone()
    m.remove_expert(0, optimizer)
    m.add_expert(from_=1, optimizer=optimizer)
    assert m.frozen.tolist() == [False, True, False, False]
    twin = sparse()
    twin.load_state_dict(m.state_dict())
    assert twin.any_frozen
    assert copy.deepcopy(m).any_frozen
    train(m, optimizer, 2)
    assert torch.equal(m.w_down[1], held)
    assert not torch.equal(m.w_down[3], held)
    m.remove_expert(1, optimizer)
    assert not m.any_frozen
    m.freeze(0)
    m.reset_parameters()
    assert not m.any_frozen
    assert not m.frozen.any()


# States


@every_build
def test_states_round_trip(build, tmp_path):
    m, x = build(), tokens(6, 5)
    m.remove_expert(0)
    m.add_expert()
    m.mask_expert(1)
    m.freeze(3)
    torch.save(m.state_dict(), tmp_path / "m.pt")
    other = build()
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert other.any_frozen
    for ours, theirs in zip(run(m, x), run(other, x), strict=True):
        assert torch.equal(ours, theirs)
    keys = {"w_gate_up", "w_down", "expert_mask", "frozen"}
    assert keys <= set(m.state_dict())


@every_build
def test_a_state_of_another_number_of_experts_is_named(build):
    m, larger = build(), build()
    larger.add_expert()
    with pytest.raises(RuntimeError, match=r"the module has 4 experts and the state 5: add_expert"):
        m.load_state_dict(larger.state_dict())
    with pytest.raises(RuntimeError, match=r"0\. has 4 experts and the state 5"):
        torch.nn.Sequential(m).load_state_dict(torch.nn.Sequential(larger).state_dict())
    m.add_expert()
    m.load_state_dict(larger.state_dict())
    assert torch.equal(m.w_down, larger.w_down)


# Errors


@pytest.mark.parametrize("i", [-1, 4, 1.0, True, None])
def test_wrong_experts_are_named(i):
    m = sparse(num_null=2)
    for act in (m.remove_expert, m.mask_expert, m.freeze, m.expert):
        with pytest.raises(ValueError, match=r"i is .*from 0 to 3"):
            act(i)


@pytest.mark.parametrize(
    ("from_", "message"),
    [
        (7, "from_ is 7"),
        (True, "from_ is True"),
        ("first", "from_ is 'first'"),
        ({"w_down": torch.zeros(6, 5)}, r"from_ is \['w_down'\].*w_down, w_gate_up, and perhaps router"),
        ({"w_down": torch.zeros(6, 5), "w_gate_up": torch.zeros(5, 6)}, r"from_\['w_gate_up'\].*\[10, 6\]"),
        (domain(bias=True).expert(0), "from_ is .*b_down"),
    ],
    ids=["index", "bool", "text", "missing", "shape", "too many"],
)
def test_wrong_sources_are_named(from_, message):
    m = sparse()
    with pytest.raises((TypeError, ValueError), match=message):
        m.add_expert(from_=from_)
    assert m.num_experts == 4


def test_wrong_surgery_is_named():
    m = sparse()
    with pytest.raises(TypeError, match=r"optimizer is 3 .*torch.optim.Optimizer"):
        m.remove_expert(0, optimizer=3)
    with pytest.raises(ValueError, match=r"optimizer is .*SGD.*holds parameters of this module"):
        m.add_expert(optimizer=torch.optim.SGD(sparse().parameters(), lr=1.0))
    for make in (torch.optim.LBFGS, torch.optim.Adafactor):
        optimizer = make(m.parameters(), lr=0.1)
        if make is torch.optim.Adafactor:  # its state is there after a step
            m(tokens(9)).sum().backward()
            optimizer.step()
        with pytest.raises(ValueError, match=rf"optimizer is .*{make.__name__}.*a parameter's shape"):
            m.remove_expert(0, optimizer)
        assert m.num_experts == 4
    with pytest.raises(ValueError, match=r"i is 0.*more than one expert"):
        sparse(num_experts=1, top_k=1).remove_expert(0)
    with pytest.raises(TypeError, match=r"module is 3"):
        hold_frozen(3, optimizer)
    with pytest.raises(TypeError, match=r"optimizer is None"):
        hold_frozen(m, None)
    grouped = sparse(num_groups=2, top_groups=1)
    for act in (lambda: grouped.remove_expert(0), grouped.add_expert):
        with pytest.raises(ValueError, match=r"num_groups is 2.*mask_expert"):
            act()
    grouped.mask_expert(0)
    for act in (m.mask_expert, m.freeze):
        with pytest.raises(TypeError, match=r"is 1 "):
            act(0, 1)
    stirred(m)
