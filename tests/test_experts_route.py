"""`route`: reference against a naive loop, kernels against the reference, properties, errors."""

import functools
import itertools
import math

import pytest
import torch
from experts_route_cases import OPTIONS, arguments, check, cotangents, naive, name, results, run
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import DTYPES, TIERS, every_backend, every_dtype, needs_native, on_threads, on_tier, same_bits

from slmkernels import route, update_selection_bias
from slmkernels.ops.experts.reference import SCORES

every_option = pytest.mark.parametrize("options", OPTIONS, ids=name)
every_score = pytest.mark.parametrize("score", SCORES)
PLAIN = {"score": "softmax", "renormalize": True, "bias": False, "groups": None, "mask": None}
ALL = {"score": "sigmoid", "renormalize": True, "bias": True, "groups": (4, 2), "mask": "TE"}
# name -> T, E, k: registers whole and partial, tiles and blocks of tokens whole and partial
SHAPES = {
    "small": (7, 8, 2),
    "one expert": (5, 1, 1),
    "one token": (1, 16, 4),
    "no token": (0, 8, 2),
    "all experts": (9, 7, 7),
    "many of many": (21, 60, 13),
    "tiles": (48, 32, 8),
    "blocks": (530, 36, 3),
}


def uniform(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
@every_option
def test_reference_is_the_definition(options, k):
    logits, keywords = arguments(19, 12, options)
    logits[3, 4] = logits[5] = -math.inf  # forbids too
    got = results(route(logits, k, backend="reference", **keywords))
    for key, expected in naive(logits, k, **keywords).items():
        torch.testing.assert_close(got[key], expected, rtol=1e-12, atol=1e-12, msg=key)


@every_backend
@every_option
def test_gradcheck(options, backend):
    logits, keywords = arguments(5, 8, options)

    def f(logits):
        routing = route(logits, 3, backend=backend, **keywords)
        losses = routing.load_balance_loss(), routing.z_loss()
        return routing.weights, routing.probabilities, routing.z, *losses

    assert torch.autograd.gradcheck(f, logits.requires_grad_())


@pytest.mark.parametrize("bias", [torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)], ids=str)
def test_update_selection_bias_is_the_rule(bias):
    counts = torch.tensor([5, 3, 0, 4], dtype=torch.int32)  # mean 3
    update_selection_bias(bias, counts, rate=0.25)
    assert bias.tolist() == [-0.25, 0.0, 0.25, -0.25]


@every_backend
def test_the_bias_balances_the_load(backend):
    logits, _ = arguments(512, 8, PLAIN, dtype=torch.float32)
    logits += torch.linspace(-2, 2, 8)
    bias, spread = torch.zeros(8), []
    for _ in range(200):
        counts = route(logits, 2, score="sigmoid", selection_bias=bias, backend=backend).counts
        spread.append(int(counts.max() - counts.min()))
        update_selection_bias(bias, counts, rate=0.005)
    assert spread[0] > 200
    assert spread[-1] < 20


def test_losses_of_uniform_and_of_collapsed_routing():
    logits = torch.eye(6).repeat(10, 1) * 1e-3
    assert abs(route(logits, 1, backend="reference").load_balance_loss().item() - 1) < 1e-5
    logits = torch.tensor([100.0, 0, 0, 0]).repeat(10, 1)
    routing = route(logits, 1, backend="reference")
    assert routing.load_balance_loss().item() == 4
    assert routing.z_loss().item() == 100**2
    assert routing.entropy.item() < 1e-30


# ---- kernels against the reference -------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("tier", TIERS)
@every_dtype
@every_option
def test_every_tier_is_the_definition(options, dtype, tier):
    logits, keywords = arguments(37, 24, options, dtype=dtype)
    with on_tier(tier):
        check(logits, 3, "native", **keywords)


@needs_native
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", SHAPES)
@every_score
def test_shapes(score, shape, tier):
    T, E, k = SHAPES[shape]
    for dtype, mask in itertools.product(DTYPES, (None, "TE")):
        logits, keywords = arguments(T, E, PLAIN | {"score": score, "mask": mask}, dtype=dtype)
        with on_tier(tier):
            check(logits, k, "native", **keywords)


@needs_native
@pytest.mark.parametrize("k", range(1, 12))
def test_every_number_of_experts(k):
    """Up to 8 have kernels of their own."""
    for options in (PLAIN, ALL | {"groups": (2, 1)}):
        logits, keywords = arguments(40, 24, options, dtype=torch.float32)
        check(logits, k, "native", **keywords)


@needs_native
@settings(max_examples=80)
@given(
    T=st.integers(0, 300),
    size=st.integers(1, 20),
    groups=st.integers(1, 5),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_call(T, size, groups, options, dtype, data):
    top = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, top * size))
    logits, keywords = arguments(T, groups * size, options | {"groups": (groups, top)}, dtype=dtype)
    check(logits, k, "native", **keywords)


@needs_native
@every_score
@pytest.mark.parametrize("given_", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
def test_absent_gradients(given_, score):
    """Of weights, of probabilities, of z, alone and together."""
    for renormalize in (True, False):
        options = PLAIN | {"score": score, "renormalize": renormalize, "mask": "E"}
        logits, keywords = arguments(30, 20, options, dtype=torch.float32)
        gradients = [
            g if is_there else None for g, is_there in zip(cotangents(30, 20, 3), given_, strict=True)
        ]
        check(logits, 3, "native", gradients, **keywords)


@every_backend
def test_logits_that_need_no_gradient(backend):
    logits = torch.randn(4, 8)
    assert not route(logits, 2, backend=backend).weights.requires_grad
    routing = route(logits.requires_grad_(), 2, backend=backend)
    linked = [key for key, value in zip(routing._fields[:6], routing[:6], strict=True) if value.requires_grad]
    assert linked == ["weights", "probabilities", "z"]


# ---- choice: ties, masks, what is not finite ---------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_score
def test_ties_go_to_the_lower_index(score, dtype, backend):
    logits = torch.tensor([[1, 2, 2, 1, 2, 1, 0, 0], [0] * 8, [-0.0, 0.0] * 4], dtype=dtype)
    routing = route(logits, 5, score=score, backend=backend)
    assert routing.indices.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    routing = route(logits, 2, score=score, backend=backend, num_groups=4, top_groups=1)
    assert routing.indices.tolist()[1:] == [[0, 1], [0, 1]]  # of groups too
    many = uniform(200, 40).mul(6).round().to(dtype)  # seven values
    for k in (1, 4, 11):
        got = route(many, k, score=score, backend=backend).indices
        expected = many.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert torch.equal(got.long(), expected)


@every_backend
@every_score
def test_rounding_makes_no_ties(score, backend):
    """Sigmoids are 1 and probabilities 0 in float32 long before the logits are equal."""
    logits = torch.tensor([[18.0, 19, 20, 21], [-300, -250, -200, 0]])
    assert route(logits, 3, score=score, backend=backend).indices.tolist() == [[3, 2, 1], [3, 2, 1]]


@every_backend
@every_option
def test_masked_equals_removed(options, backend):
    """The results of a model without the experts; sums of float64 in another order."""
    if options["groups"]:
        options = options | {"groups": (3, 2)}
    logits, keywords = arguments(40, 12, options | {"mask": None})
    mask = torch.ones(12, dtype=torch.bool)
    mask[[1, 6, 11]] = False  # one of each group, so that groups stay of one size
    kept = mask.nonzero()[:, 0]
    logits[:, ~mask] = 50.0  # what is forbidden must not show
    masked = run(
        logits, 3, backend, (*cotangents(40, 9, 3)[:1], None, torch.ones(())), expert_mask=mask, **keywords
    )
    if "selection_bias" in keywords:
        keywords["selection_bias"] = keywords["selection_bias"][kept]
    removed = run(logits[:, kept], 3, backend, (*cotangents(40, 9, 3)[:1], None, torch.ones(())), **keywords)
    assert torch.equal(masked["indices"].long(), kept[removed["indices"].long()])
    assert torch.equal(masked["counts"][kept], removed["counts"])
    for key in ("weights", "z", "entropy"):
        torch.testing.assert_close(masked[key], removed[key], rtol=1e-12, atol=1e-12)
    for key in ("counts", "probabilities", "dlogits"):
        assert (masked[key][..., ~mask] == 0).all(), key
        torch.testing.assert_close(masked[key][..., kept], removed[key], rtol=1e-12, atol=1e-12)
    routings = route(logits, 3, expert_mask=mask, backend=backend), route(logits[:, kept], 3, backend=backend)
    losses = [routing.load_balance_loss() for routing in routings]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@every_backend
@every_dtype
def test_masks_of_every_kind_agree(dtype, backend):
    """[E], [T, E], an expanded row and -inf logits forbid alike, bit for bit."""
    logits, keywords = arguments(50, 20, PLAIN, dtype=dtype)
    mask = uniform(20) < 0.6
    expected = run(logits, 4, backend, expert_mask=mask, **keywords)
    strange = torch.stack([mask.repeat(50, 1)] * 2, -1)[..., 0]
    for other in (mask.expand(50, 20), mask.repeat(50, 1), strange):
        same_bits(run(logits, 4, backend, expert_mask=other, **keywords), expected)
    same_bits(run(logits.masked_fill(~mask, -math.inf), 4, backend, **keywords), expected)


@every_backend
@every_score
@pytest.mark.parametrize("renormalize", [True, False])
def test_fewer_allowed_than_k(renormalize, score, backend):
    logits = torch.randn(6, 8, dtype=torch.float64)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    for t in range(6):
        mask[t, :t] = True  # the first token has no expert at all
    keywords = {"score": score, "renormalize": renormalize, "expert_mask": mask}
    got = run(logits, 4, backend, **keywords)
    present = torch.arange(4) < torch.arange(6)[:, None]
    assert torch.equal(got["indices"] >= 0, present)
    assert (got["indices"] >= -1).all()
    assert (got["weights"][~present] == 0).all()
    assert (got["weights"][present] > 0).all()
    assert (got["dlogits"][~mask] == 0).all()
    assert got["counts"].sum() == present.sum()
    assert all(value.isfinite().all() for value in got.values())
    if renormalize or score == "softmax_after_topk":
        torch.testing.assert_close(got["weights"][1:].sum(1), torch.ones(5, dtype=torch.float64))


@every_backend
@every_score
@pytest.mark.parametrize("how", ["mask", "logits"])
def test_no_expert_at_all(how, score, backend):
    logits = torch.randn(5, 8)
    mask = None
    if how == "mask":
        mask = torch.zeros(8, dtype=torch.bool)
    else:
        logits.fill_(-math.inf)
    got = run(logits, 3, backend, score=score, expert_mask=mask)
    assert (got.pop("indices") == -1).all()
    assert all((value == 0).all() for value in got.values())
    assert route(logits, 3, score=score, expert_mask=mask, backend=backend).load_balance_loss() == 0


@every_backend
@every_dtype
@every_score
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token(value, score, dtype, backend):
    T, E, k = 40, 24, 5
    logits, keywords = arguments(T, E, PLAIN | {"score": score, "mask": "TE"}, dtype=dtype)
    mask = keywords["expert_mask"]
    bad = torch.tensor([0, 17, 33])
    mask[bad, 7] = mask[bad, 9] = True
    mask[33] = torch.arange(E) % 12 == 7  # 7 and 19: fewer than k
    dirty = logits.clone()
    dirty[bad, 7] = value
    dirty[~mask] = math.nan  # forbidden: nobody looks
    clean = torch.ones(T, dtype=torch.bool)
    clean[bad] = False
    expected, got = (run(x, k, backend, **keywords) for x in (logits, dirty))
    for key in ("indices", "weights", "dlogits"):
        assert torch.equal(got[key][clean], expected[key][clean]), key
        assert expected[key].isfinite().all()
    assert (got["indices"][bad, 0] == 7).all()  # the greatest of all
    for row in got["indices"].tolist():
        row = [e for e in row if e >= 0]
        assert len(set(row)) == len(row)
    assert got["indices"][33].tolist() == [7, 19, -1, -1, -1]
    assert (got["weights"][33, 2:] == 0).all()
    assert (got["dlogits"][~mask] == 0).all()
    assert got["counts"].sum() == (got["indices"] >= 0).sum()
    if math.isnan(value):
        assert got["weights"][bad, 0].isnan().all()
        assert got["z"].isnan()
        assert got["entropy"].isnan()
        # (a sigmoid is of its own logit alone, but the sum that divides it is of all)
        assert got["probabilities"].isnan().any()


@every_backend
@every_option
def test_permuting_experts_permutes_the_results(options, backend):
    """Without groups, which go by position."""
    logits, keywords = arguments(30, 16, options | {"groups": None})
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    expected = run(logits, 4, backend, (cotangents(30, 16, 4)[0], None, None), **keywords)
    for key in ("selection_bias", "expert_mask"):
        if key in keywords:
            keywords[key] = keywords[key][..., order]
    got = run(logits[:, order], 4, backend, (cotangents(30, 16, 4)[0], None, None), **keywords)
    present = got["indices"] >= 0
    assert torch.equal(order[got["indices"][present].long()], expected["indices"][present].long())
    assert torch.equal(got["counts"], expected["counts"][order])
    torch.testing.assert_close(got["weights"], expected["weights"], rtol=1e-12, atol=1e-12)
    for key in ("probabilities", "dlogits"):
        torch.testing.assert_close(got[key], expected[key][..., order], rtol=1e-12, atol=1e-12)


@every_backend
def test_the_bias_only_selects(backend):
    logits, keywords = arguments(64, 16, PLAIN | {"bias": True, "renormalize": False}, dtype=torch.float32)
    biased = route(logits, 4, backend=backend, **keywords)
    keywords.pop("selection_bias")
    plain = route(logits, 16, backend=backend, **keywords)
    assert not torch.equal(biased.indices, plain.indices[:, :4])
    by_expert = torch.zeros(64, 16).scatter(1, plain.indices.long(), plain.weights)
    torch.testing.assert_close(biased.weights, by_expert.gather(1, biased.indices.long()), rtol=1e-6, atol=0)
    for key in ("probabilities", "z", "entropy"):
        assert torch.equal(getattr(biased, key), getattr(plain, key))


# ---- bits, strides, surroundings ---------------------------------------------------------------------------


@needs_native
@every_dtype
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=name)
def test_same_bits_for_any_number_of_threads(options, dtype):
    logits, keywords = arguments(2100, 64, options, dtype=dtype)
    with on_threads(1):
        expected = run(logits, 6, "native", **keywords)
    for threads in (1, 2, 3):
        with on_threads(threads):
            same_bits(run(logits, 6, "native", **keywords), expected)


@needs_native
@every_dtype
def test_a_token_alone_is_the_token_among_others(dtype):
    logits, keywords = arguments(300, 24, PLAIN, dtype=dtype)
    whole = route(logits, 3, backend="native", **keywords)
    for t in (0, 5, 16, 255, 256, 299):
        alone = route(logits[t : t + 1], 3, backend="native", **keywords)
        assert torch.equal(alone.indices[0], whole.indices[t])
        assert torch.equal(alone.weights[0], whole.weights[t])


@needs_native
@every_dtype
@pytest.mark.parametrize("E", [16, 21])
def test_strides(E, dtype):
    """Slices of a wider tensor whose rest is NaN, columns, expanded rows, and expanded gradients."""
    logits, keywords = arguments(70, E, PLAIN | {"mask": "E"}, dtype=dtype)
    expected = run(logits, 3, "native", **keywords)
    wide = torch.full((70, E + 40), math.nan, dtype=dtype)
    wide[:, 7 : 7 + E] = logits
    for view in (wide[:, 7 : 7 + E], logits.t().contiguous().t(), torch.stack([logits] * 2, -1)[..., 0]):
        got = run(view, 3, "native", **keywords)
        assert got["dlogits"].is_contiguous()
        same_bits(got, expected)
    row = logits[:1].expand(70, E)
    same_bits(run(row, 3, "native", **keywords), run(row.contiguous(), 3, "native", **keywords))
    ones = [torch.ones(70, 3), torch.ones(E), torch.ones(())]
    few = [torch.ones(1, 1).expand(70, 3), torch.ones(1).expand(E), torch.ones(())]
    same_bits(run(logits, 3, "native", few, **keywords), run(logits, 3, "native", ones, **keywords))
    turned = torch.randn(3, 70).t()
    got = run(logits, 3, "native", (turned, None, None), **keywords)
    same_bits(got, run(logits, 3, "native", (turned.contiguous(), None, None), **keywords))


@every_backend
def test_backward_twice(backend):
    logits = torch.randn(20, 8, requires_grad=True)
    routing = route(logits, 2, backend=backend)
    loss = routing.weights.square().sum() + routing.load_balance_loss() + routing.z_loss()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert first.abs().max() > 0
    assert torch.equal(first, second)


@every_backend
def test_autocast_leaves_float32(backend):
    logits = torch.randn(20, 8)
    expected = run(logits, 2, backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(logits, 2, backend)
    same_bits(got, expected)
    assert got["weights"].dtype == got["z"].dtype == torch.float32


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("T", [0, 20])
def test_opcheck(T, dtype):
    logits, keywords = arguments(T, 8, ALL, dtype=dtype)
    high = torch.promote_types(dtype, torch.float32)
    bias, mask = keywords["selection_bias"].to(high), keywords["expert_mask"]
    ops = torch.ops.slmkernels
    for extra in ((bias, mask), (None, None)):
        call = (logits, *extra, 3, 1, True, 4, 2, 2.5)
        torch.library.opcheck(ops.route_forward.default, call)
    indices, *_, lse = ops.route_forward(*call)
    gradients = [g.to(high) for g in cotangents(T, 8, 3)]
    for given_, forbidden in (
        (gradients, mask),
        ([None, *gradients[1:]], None),
        ([gradients[0], None, None], mask),
    ):
        call = (*given_, logits, forbidden, indices, lse, 1, True, 2.5)
        torch.library.opcheck(ops.route_backward.default, call)


@needs_native
def test_compile_fullgraph():
    def f(logits, bias, mask):
        routing = route(logits * 1.5, 3, score="sigmoid", selection_bias=bias, expert_mask=mask)
        return routing.weights.sin().sum() + routing.load_balance_loss() + routing.z_loss(), routing.indices

    logits, bias, mask = torch.randn(30, 8, requires_grad=True), torch.randn(8), uniform(8) < 0.8
    compiled = torch.compile(f, fullgraph=True)
    for got, expected in zip(compiled(logits, bias, mask), f(logits, bias, mask), strict=True):
        torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(g(logits, bias, mask)[0], logits)[0] for g in (compiled, f)]
    torch.testing.assert_close(*grads)


@needs_native
def test_export():
    class Model(torch.nn.Module):
        def forward(self, logits):
            routing = route(logits, 2)
            return routing.indices, routing.weights

    shapes = ({0: torch.export.Dim("tokens", min=2, max=99)},)
    program = torch.export.export(Model(), (torch.randn(20, 8),), dynamic_shapes=shapes)
    assert any("route_forward" in str(node.target) for node in program.graph.nodes)
    more = torch.randn(41, 8)
    assert all(map(torch.equal, program.module()(more), Model()(more)))


@needs_native
def test_func_grad():
    logits = torch.randn(12, 8, dtype=torch.float64)

    def f(logits, backend):
        routing = route(logits, 2, backend=backend)
        return routing.weights.square().sum() + routing.z_loss()

    ours, exact = (torch.func.grad(functools.partial(f, backend=b))(logits) for b in ("native", "reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
