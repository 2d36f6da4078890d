"""SparseExperts and DomainExperts against a loop over tokens; the options, precision and errors of both."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expert_modules import CU, KIND, RICH, close, domain, sparse, stirred, tokens

from slmkernels import native, use_backend
from slmkernels.nn import ExpertLoRA, FeedForward, SparseExperts

ACTIVATE = {
    "swiglu": lambda h: F.silu(h[:5]) * h[5:],
    "geglu": lambda h: F.gelu(h[:5]) * h[5:],
    "relu2": lambda h: F.relu(h) ** 2,
    "swigluoai": lambda h: (
        (h[5:].clamp(-7, 7) + 1) * h[:5].clamp(max=7) * (1.702 * h[:5].clamp(max=7)).sigmoid()
    ),
}


def one_expert(m, i, x):
    """Expert i on one token."""
    h = m.w_gate_up[i] @ x + (0 if m.b_gate_up is None else m.b_gate_up[i])
    return m.w_down[i] @ ACTIVATE[m.activation](h) + (0 if m.b_down is None else m.b_down[i])


def shared(m, x):
    if m.shared is None:
        return torch.zeros_like(x)
    up, out, n = m.shared.gate_up, m.shared.out, m.shared.out.in_features
    h = F.linear(x, up.weight, up.bias)
    a = F.relu(h) ** 2 if m.activation == "relu2" else F.silu(h[..., :n]) * h[..., n:]
    return F.linear(a, out.weight, out.bias)


@pytest.mark.parametrize(
    "options",
    [
        {},
        RICH,
        {"activation": "geglu"},
        {"activation": "swigluoai"},
        {"activation": "relu2", "shared_hidden": 3, "top_k": 1},
    ],
    ids=["plain", "rich", "geglu", "swigluoai", "relu2"],
)
def test_sparse_experts_are_their_definition(options):
    m, x = sparse(**options), tokens(2, 9)
    y, routing = m(x, return_routing=True)
    rows = []
    for token in x.view(-1, 6):
        scores = m.router @ token
        if m.selection_bias is None:
            p, chosen = scores.softmax(0), scores.softmax(0)
            scale = 1.0
        else:
            p, chosen, scale = scores.sigmoid(), scores.sigmoid() + m.selection_bias, 1.5
        best = sorted(range(len(scores)), key=lambda e: -chosen[e].item())[: m.top_k]
        weights = p[best] / (p[best].sum() if m.top_k > 1 else 1) * scale
        rows.append(shared(m, token))
        for e, weight in zip(best, weights, strict=True):
            rows[-1] = rows[-1] + (weight * one_expert(m, e, token) if e < 4 else 0)
    close(y, torch.stack(rows).view(2, 9, 6))
    close(m(x), y)
    assert routing.counts.sum() == 18 * m.top_k
    assert routing.indices.shape == (18, m.top_k)


@pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "rich"])
def test_every_parameter_of_sparse_experts_has_a_gradient(options):
    m = sparse(**options)
    y, routing = m(tokens(60), return_routing=True)
    (y.square().sum() + routing.load_balance_loss() + routing.z_loss()).backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad.flatten(1 if parameter.ndim > 1 else 0).abs().max() > 0, name
    assert (m.w_down.grad.abs().amax((1, 2)) > 0).all()


def test_initial_values_are_those_of_the_docstring():
    torch.manual_seed(0)
    m = SparseExperts(96, 64, 8, 2, num_null=1, bias=True, shared_hidden=128, selection_bias=True)
    for weight, fan_in in ((m.w_gate_up, 96), (m.w_down, 64), (m.router, 96)):
        assert abs(weight.std() * fan_in**0.5 - 1) < 0.05
    assert abs(m.shared.out.weight.std() * 128**0.5 - 1) < 0.05
    for zero in (m.b_gate_up, m.b_down, m.shared.out.bias, m.selection_bias, m.frozen):
        assert not zero.any()
    assert m.expert_mask.all()
    assert [t.shape[0] for t in (m.router, m.expert_mask, m.selection_bias, m.frozen)] == [9, 9, 9, 8]
    assert "experts=8" in repr(m)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,), (3, 0)])
def test_x_has_any_shape(shape):
    m, x = sparse(), tokens(*shape)
    y = m(x)
    assert y.shape == x.shape
    close(y.reshape(-1, 6), m(x.reshape(-1, 6)))


def test_tokens_of_null_experts_get_the_shared_ones_alone():
    m, x = sparse(num_null=2, shared_hidden=4), tokens(5)
    for i in range(4):
        m.mask_expert(i)
    y, routing = m(x, return_routing=True)
    assert set(routing.indices.flatten().tolist()) == {4, 5}
    close(y, m.shared(x))
    y.sum().backward()
    assert not m.w_down.grad.any()


def test_a_single_weight_is_not_renormalised_unless_asked():
    x = tokens(8)
    assert (sparse(top_k=1).route(x).weights < 0.999).all()
    assert (sparse(top_k=1, renormalize=True).route(x).weights == 1).all()
    close(sparse().route(x).weights.sum(1), torch.ones(8, **KIND))
    assert (sparse(renormalize=False).route(x).weights.sum(1) < 0.999).all()


def test_the_router_computes_in_float32():
    m, x = sparse(dtype=torch.bfloat16), tokens(200).bfloat16()
    routing = m.route(x)
    best = F.linear(x.float(), m.router.float()).topk(2).values
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights, best.softmax(1))
    m, x = sparse(dtype=torch.float32), tokens(200).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.route(x).weights, sparse(dtype=torch.float32).route(x).weights)


@pytest.mark.parametrize("build", [sparse, domain])
def test_autocast(build):
    m, x = build(shared_hidden=8, dtype=torch.float32), tokens(3, 5).float()
    call = (x,) if build is sparse else (x, torch.tensor([0, 3, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        y = m(*call)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), m(*call), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())


def test_jitter_is_for_training_and_repeats_with_its_generator():
    m, x = sparse(jitter=0.3), tokens(20)
    calm = sparse()

    def weights(seed):
        return m.route(x, torch.Generator().manual_seed(seed)).weights

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1), calm.route(x).weights)
    torch.manual_seed(5)
    once = m(x)
    torch.manual_seed(5)
    assert torch.equal(m(x), once)
    assert torch.equal(m(x, generator=torch.Generator().manual_seed(5)), once)
    assert torch.equal(m.eval()(x), calm(x))


def test_jitter_is_uniform_noise_around_one():
    m, seen = sparse(num_experts=6, hidden=5, jitter=0.25, top_k=6, score="softmax_after_topk"), []
    with torch.no_grad():
        m.router.copy_(torch.eye(6))  # logits are what the router sees
    routing = m.route(torch.ones(4000, 6, **KIND), torch.Generator().manual_seed(0))
    seen = routing.weights.log()  # log softmax of six values within 0.75 .. 1.25
    spread = (seen.amax(1) - seen.amin(1)).max()
    assert 0.45 < spread <= 0.5


def test_domain_experts_are_their_definition():
    for options in ({}, {"shared_hidden": 3, "bias": True}, {"activation": "relu2"}):
        m, x, domains = domain(**options), tokens(12), torch.tensor([2, 0, 3, 2])
        expected = shared(m, x) + torch.stack(
            [one_expert(m, e, x[t]) for t, e in enumerate([2] * 4 + [3] * 3 + [2] * 5)]
        )
        close(m(x, domains, cu_seqlens=CU), expected)
        close(m(x[None], domains.int(), cu_seqlens=CU), expected[None])
        close(m(x.view(3, 4, 6), torch.tensor([2, 3, 2]))[[0, 2]], expected.view(3, 4, 6)[[0, 2]])


def test_documents_of_no_expert_get_the_shared_ones_alone():
    m, x = domain(shared_hidden=4), tokens(5, 3)
    m.mask_expert(1)
    y = m(x, torch.tensor([-1, 1, 4, 99, 2]))
    close(y[:4], m.shared(x[:4]))
    assert not torch.equal(y[4], m.shared(x[4]))


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_mixtures_are_their_definition(top_k):
    m, x = domain(shared_hidden=3), tokens(12)
    mixture = torch.tensor([[1, 2, 3, 4], [1, 0, 0, 0], [0, 5, 0, -1], [0, 0, 0, 0]], **KIND)
    kept = {
        None: torch.tensor([[1, 2, 3, 4], [1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]], **KIND),
        1: torch.tensor([[0, 0, 0, 4], [1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]], **KIND),
        2: torch.tensor([[0, 0, 3, 4], [1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]], **KIND),
    }[top_k]
    share = kept / kept.sum(1, keepdim=True).clamp(min=1e-9)
    expected = shared(m, x) + torch.stack(
        [
            sum(share[document, e] * one_expert(m, e, x[t]) for e in range(4))
            for t, document in enumerate([0] * 4 + [2] * 3 + [3] * 5)
        ]
    )
    close(m(x, mixture=mixture, top_k=top_k, cu_seqlens=CU), expected)
    close(m(x, mixture=mixture.float(), top_k=top_k, cu_seqlens=CU), expected, 1e-5)


def test_gradients_of_a_mixture():
    m, x = domain(), tokens(12)
    raw = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), requires_grad=True, **KIND)
    for top_k in (None, 2):
        torch.autograd.gradcheck(
            lambda raw, k=top_k: m(x, mixture=raw.softmax(1), top_k=k, cu_seqlens=CU), raw, fast_mode=True
        )
    mixture = torch.tensor([[1.0, 0, 0, 3]] * 4, requires_grad=True, **KIND)
    m(x, mixture=mixture, cu_seqlens=CU).square().sum().backward()
    assert mixture.grad.isfinite().all()
    assert (mixture.grad[0, [0, 3]] != 0).all()


@pytest.mark.skipif(not native.HAS_CPU, reason="needs the native library")
@pytest.mark.parametrize("build", [sparse, domain, "lora"])
def test_compiles_whole(build):
    m = (sparse if build == "lora" else build)(shared_hidden=4, dtype=torch.float32)
    if build is not domain:
        m.freeze(1)
    call = (tokens(3, 4).float(), *((torch.tensor([0, 3, 1]),) if build is domain else ()))
    m = ExpertLoRA(m, 2) if build == "lora" else m
    twin = copy.deepcopy(m)
    with use_backend("native"):
        y = torch.compile(m, fullgraph=True, backend="aot_eager")(*call)
        expected = twin(*call)
        y.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(m.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_selection_bias_follows_the_load_of_allowed_experts():
    m = sparse(selection_bias=True, num_null=1)
    m.mask_expert(1)
    before = m.selection_bias.clone()
    m.update_selection_bias(torch.tensor([9, 0, 1, 5, 5], dtype=torch.int32), 0.5)  # mean of four: 5
    close(m.selection_bias - before, torch.tensor([-0.5, 0, 0.5, 0, 0]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_selection_bias_stays_float32(dtype):
    m = sparse(selection_bias=True)
    m.selection_bias.fill_(0.5)
    m = m.to(dtype)
    m.update_selection_bias(torch.tensor([9, 1, 1, 1]), 1e-4)
    assert torch.equal(m.selection_bias, torch.tensor([0.5 - 1e-4, 0.5001, 0.5001, 0.5001]))
    assert m(tokens(3).to(dtype)).dtype == dtype
    assert m.double().selection_bias.dtype == torch.float64


def test_the_selection_bias_is_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert SparseExperts(4, 4, 2, selection_bias=True).selection_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_feed_forward_layer_is_its_definition():
    torch.manual_seed(0)
    for activation in ACTIVATE:
        layer, x = FeedForward(6, 5, activation=activation, bias=True, **KIND), tokens(2, 3)
        stirred(layer)
        h = F.linear(x, layer.gate_up.weight, layer.gate_up.bias)
        a = torch.stack([ACTIVATE[activation](row) for row in h.view(6, -1)]).view(2, 3, 5)
        close(layer(x), F.linear(a, layer.out.weight, layer.out.bias))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"hidden": 1.5}, "hidden is 1.5"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_null": -1}, "num_null is -1"),
        ({"shared_hidden": -4}, "shared_hidden is -4"),
        ({"top_k": 5}, "top_k is 5.*from 1 to 4"),
        ({"activation": "tanh"}, "activation is 'tanh'.*swiglu"),
        ({"score": "max"}, "score is 'max'"),
        ({"jitter": 1.0}, "jitter is 1.0.*< 1"),
        ({"num_groups": 3, "top_groups": 1}, "num_groups is 3.*divisor"),
        ({"bias": 1}, "bias is 1"),
        ({"selection_bias": 1}, "selection_bias is 1"),
        ({"renormalize": "yes"}, "renormalize is 'yes'"),
        ({"route_scale": float("nan")}, "route_scale is nan"),
    ],
)
def test_wrong_arguments_of_sparse_experts_are_named(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sparse(**changes)


def test_wrong_calls_of_sparse_experts_are_named():
    m = sparse()
    with pytest.raises(ValueError, match=r"x is .*expected 6 channels"):
        m(torch.zeros(3, 5, **KIND))
    with pytest.raises(TypeError, match=r"x is int64"):
        m(torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x is None"):
        m(None)
    with pytest.raises(ValueError, match=r"selection_bias is False"):
        m.update_selection_bias(torch.zeros(4))
    with pytest.raises(TypeError, match=r"counts is .*shape \[4\]"):
        sparse(selection_bias=True).update_selection_bias(torch.zeros(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": tokens(3, 4)[..., :5]}, "x is .*C = 6"),
        ({"x": tokens(4)}, r"x is .*without cu_seqlens"),
        ({"cu_seqlens": CU}, r"x is .*\[1, T, C\] with cu_seqlens"),
        ({"x": tokens(11), "cu_seqlens": CU}, "cu_seqlens is .*end at 11"),
        ({"domains": None}, "domains is None.*either domains or mixture"),
        ({"mixture": torch.ones(3, 4)}, "domains is .*either domains or mixture"),
        ({"domains": torch.zeros(3)}, "domains is float32"),
        ({"domains": torch.zeros(2, dtype=torch.int64)}, r"domains is .*shape \[3\]"),
        ({"top_k": 2}, "top_k is 2.*None without a mixture"),
        ({"domains": None, "mixture": torch.ones(3, 5)}, r"mixture is .*shape \[3, 4\]"),
        ({"domains": None, "mixture": torch.ones(3, 4, dtype=torch.int64)}, "mixture is int64"),
        ({"domains": None, "mixture": torch.ones(3, 4), "top_k": 5}, "top_k is 5"),
    ],
)
def test_wrong_calls_of_domain_experts_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        domain()(**{"x": tokens(3, 4), "domains": torch.zeros(3, dtype=torch.int64), **call})


def test_wrong_arguments_of_domain_experts_are_named():
    with pytest.raises(ValueError, match=r"num_experts is 0"):
        domain(num_experts=0)
    with pytest.raises(ValueError, match=r"activation is 'tanh'"):
        FeedForward(4, 4, activation="tanh")


@pytest.mark.parametrize("changes", [{"dim": 0}, {"hidden": 1.5}, {"bias": 1}, {"activation": "tanh"}])
def test_wrong_arguments_of_feed_forward_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises((TypeError, ValueError), match=f"{name} is {value!r}"):
        FeedForward(**{"dim": 4, "hidden": 4, **changes})
