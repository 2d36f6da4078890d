"""Experts: values of any size, overflow, NaN and inf."""

import itertools
import math

import pytest
import torch
from experts_cases import FORMS, MATRICES, check_limits, every_form, every_tier, make, public
from rule import (
    DTYPES,
    every_backend,
    every_dtype,
    needs_native,
    on_threads,
    on_tier,
    rounded,
    run,
    same_bits,
)

from slmkernels import expert_mlp
from slmkernels.ops.experts.reference import GATED

# --- activations, one value at a time


@every_backend
@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_at_any_size(dtype, activation, layout, backend):
    """y = act(x) of one channel, and its slope, also where exponentials over- and underflow."""
    values = [
        0.0,
        1e-30,
        1e-6,
        1e-3,
        0.1,
        1.0,
        3.0,
        5.0,
        7.0,
        10.0,
        20.0,
        50.0,
        87.0,
        89.0,
        100.0,
        710.0,
        1e4,
    ]
    values = torch.tensor([*values, *(-v for v in values)], dtype=dtype)
    gated = activation in GATED

    def mlp(x, backend):
        w_up = x.new_tensor([[[1.0], [0.0]]] if gated else [[[1.0]]])
        b_up = x.new_tensor([[0.0, 1.0]] if gated else [[0.0]])
        one = x.new_ones(len(x), 1)
        options = {"activation": activation, "layout": layout, "b_gate_up": b_up}
        y = public(backend)(x, w_up, x.new_ones(1, 1, 1), one, torch.zeros_like(one).int(), **options)["y"]
        return y, *torch.autograd.grad(y.sum(), x)

    ours = mlp(values[:, None].requires_grad_(), backend)
    exact = mlp(values.double()[:, None].requires_grad_(), "reference")
    eps = 8 * torch.finfo(dtype).eps
    for got, truth, size in zip(ours, exact, (values.abs(), values.abs().clamp(min=1)), strict=True):
        assert got.isfinite().all()
        allowed = eps * (truth.abs()[:, 0] + size.double() * (1 + size.double().clamp(max=10)))
        error = (got.double() - truth).abs()[:, 0]
        assert (error <= allowed).all(), list(zip(values.tolist(), error.tolist(), strict=True))


@every_dtype
def test_limits_of_the_reference(dtype):
    check_limits(dtype, public("reference"))


@needs_native
@every_dtype
@every_tier
def test_limits(tier, dtype):
    with on_tier(tier):
        check_limits(dtype, public("native"))


@every_backend
def test_float16_overflows_as_in_pytorch(backend):
    """What is too large for float16 becomes inf with its sign, in its own row and nowhere else."""
    x = torch.tensor([[1.0], [300.0], [-300.0], [2.0]], dtype=torch.float16)
    w_up, w_down = torch.ones(1, 1, 1).half(), torch.full((1, 1, 1), -1.0).half()
    indices, weights = torch.zeros(4, 1).int(), torch.ones(4, 1)
    rest = {"weights": weights, "indices": indices, "layout": "concatenated"}
    y = public(backend)(x, w_up, w_down, activation="relu2", **rest)["y"]
    assert y.flatten().tolist() == [-1.0, -math.inf, 0.0, -4.0]
    gate_up = torch.tensor([[[300.0], [1.0]]]).half()  # gates up to 90000
    y = public(backend)(x[:2], gate_up, w_down, activation="swiglu", **rest | {
        "weights": weights[:2], "indices": indices[:2]
    })["y"]  # fmt: skip
    assert y.flatten().tolist() == [-300.0, -math.inf]


# --- NaN and inf stay where they were


def nan_case(**case):
    """Odd numbers of rows, few and many, so that no block of an expert's is full."""
    return make(T=75, d=21, n=13, E=5, k=2, routing="distinct", **case)


def same_but(ours, clean, **exceptions):
    """Bit-equal except in these rows of these results, which must have changed to nothing finite."""
    for name, x in clean.items():
        spoilt = torch.zeros(len(x), dtype=torch.bool)
        if name in exceptions:
            spoilt[exceptions[name]] = True
            assert not ours[name][spoilt].isfinite().flatten(1).all(1).any(), name
        assert torch.equal(ours[name][~spoilt], x[~spoilt]), name


@every_backend
@every_dtype
@every_form
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_of_a_token_that_goes_nowhere(value, activation, layout, dtype, backend):
    """In x, in its weights and in dy: y and dx of that token are 0 and nothing else is touched."""
    tensors, options = nan_case(activation=activation, layout=layout)
    tensors = rounded(tensors, dtype)
    options["indices"][[0, 33, 74]] = -1
    clean = run(tensors, public(backend), **options)
    spoilt = {name: x.clone() for name, x in tensors.items()}
    for name in ("x", "weights", "dy"):
        spoilt[name][[0, 33, 74]] = value
    with on_threads(1):  # one task after another in the same scratch memory
        same_bits(run(spoilt, public(backend), **options), clean)
    assert not clean["y"][33].any()
    assert not clean["dx"][33].any()


@needs_native
@every_dtype
@every_tier
def test_nan_of_a_token_that_goes_nowhere_on_every_tier(tier, dtype):
    with on_tier(tier):
        test_nan_of_a_token_that_goes_nowhere(math.nan, "swiglu", "concatenated", dtype, "native")


@every_backend
@every_dtype
def test_nan_beside_an_absent_slot(dtype, backend):
    """A weight of NaN for an absent expert says nothing, and gets a gradient of 0."""
    tensors, options = nan_case()
    tensors = rounded(tensors, dtype)
    options["indices"][::3, 1] = 5
    spoilt = tensors | {"weights": tensors["weights"].clone()}
    spoilt["weights"][::3, 1] = math.nan
    ours = run(spoilt, public(backend), **options)
    same_bits(ours, run(tensors, public(backend), **options))
    assert not ours["dweights"][::3, 1].any()


def test_nan_of_a_token_stays_with_it_in_the_reference():
    """Not in bfloat16: PyTorch's own product of a Sapphire Rapids lets a NaN reach the row before it."""
    for dtype in set(DTYPES) - {torch.bfloat16}:
        nan_of_a_token(dtype, "reference")


@needs_native
@every_dtype
@every_tier
def test_nan_of_a_token_stays_with_it(tier, dtype):
    with on_tier(tier), on_threads(1):
        nan_of_a_token(dtype, "native")


def nan_of_a_token(dtype, backend):
    """Of x: in y, dx and d(weights) of its token, in its experts' matrices. Of dy: so, too, but not in y."""
    for form, t in itertools.product(FORMS, (0, 40, 74)):
        tensors, options = nan_case(activation=form[0], layout=form[1])
        tensors = rounded(tensors, dtype)
        clean = run(tensors, public(backend), **options)
        experts = options["indices"][t].long()
        rows = {"dx": [t], "dweights": [t], "dw_gate_up": experts, "dw_down": experts, "db_gate_up": experts}
        for name, more in (("x", {"y": [t]}), ("dy", {"db_down": experts})):
            spoilt = tensors | {name: tensors[name].clone()}
            spoilt[name][t] = math.nan
            same_but(run(spoilt, public(backend), **options), clean, **rows, **more)


@every_backend
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_of_an_expert_without_tokens(transposed, value, dtype, backend):
    """It stays out, and the expert's gradients are 0."""
    tensors, options = nan_case(transposed=transposed)
    tensors = rounded(tensors, dtype)
    for e in (0, 2, 4):
        indices = {"indices": options["indices"].where(options["indices"] != e, -1)}
        clean = run(tensors, public(backend), **options | indices)
        spoilt = tensors | {name: tensors[name].clone() for name in MATRICES}
        for name in MATRICES:
            spoilt[name][e] = value
            assert not clean[f"d{name}"][e].any()
        same_bits(run(spoilt, public(backend), **options | indices), clean)


@every_backend
@every_dtype
def test_nan_of_a_segment_stays_there(dtype, backend):
    tensors, options = make(lengths=(7, 12, 0, 9, 5), d=21, n=13, E=5)
    options["expert_of_segment"] = torch.tensor([1, 3, 2, -1, 0])
    tensors = rounded(tensors, dtype)
    clean = run(tensors, public(backend), **options)
    with on_threads(1):
        for span, experts in ((slice(7, 19), [3]), (slice(19, 28), None)):
            spoilt = tensors | {"x": tensors["x"].clone()}
            spoilt["x"][span] = math.nan
            rows = {"y": span, "dx": span, "dw_gate_up": experts, "dw_down": experts, "db_gate_up": experts}
            same_but(run(spoilt, public(backend), **options), clean, **(rows if experts else {}))


@every_backend
def test_terms_may_leave_float16_where_their_sum_does_not(backend):
    x = torch.ones(1, 1, dtype=torch.float16)
    up, down = torch.full((2, 1, 1), 200.0).half(), torch.ones(2, 1, 1).half()
    indices, weights = torch.tensor([[0, 1]]), torch.tensor([[2.0, -1.9]])
    y = expert_mlp(x, indices, weights, up, down, activation="relu2", backend=backend)
    torch.testing.assert_close(y, torch.full((1, 1), 4000.0).half(), rtol=1e-3, atol=0)
