"""Decoding: any split of a sequence into prefill and steps equals the full call, in constant memory."""

import pytest
import torch
from causal_conv1d_cases import EPS, inputs, same_bits
from hypothesis import given
from hypothesis import strategies as st

from slmkernels import causal_conv1d, causal_conv1d_step, native

needs_native = pytest.mark.skipif(not native.HAS_CPU, reason=str(native.REASONS.get("_C_cpu")))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
TIERS = native.host.isa_supported() if native.host else []


def tensors(seed, dtype, B=2, T=37, C=21, W=4):
    return [tensor.to(dtype) for tensor in inputs(seed, B, T, C, W)[:4]]


def decode(x, weight, bias, state, split, backend, activation="silu"):
    """The first part by the full call, the others by steps -> y and the state."""
    options = {"activation": activation, "backend": backend}
    y, state = causal_conv1d(
        x[:, : split[0]], weight, bias, initial_state=state, return_state=True, **options
    )
    outputs, start = [y], split[0]
    for n in split[1:]:
        outputs.append(causal_conv1d_step(x[:, start : start + n], state, weight, bias, **options))
        start += n
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("split", [[0] + [1] * 37, [20, 1, 1, 15], [2, 3, 5, 27], [36, 0, 1]], ids=str)
def test_any_split_equals_the_whole(split, W, dtype, backend):
    x, weight, bias, state = tensors(0, dtype, W=W)
    options = {"activation": "silu", "initial_state": state, "return_state": True}
    whole, last = causal_conv1d(x, weight, bias, backend=backend, **options)
    y, after = decode(x, weight, bias, state, split, backend)
    same_bits(y, whole, backend)
    assert torch.equal(after, last)


@needs_native
@given(
    split=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    C=st.integers(1, 50),
    W=st.integers(1, 8),
    activation=st.sampled_from([None, "silu"]),
)
def test_any_shape(split, C, W, activation):
    x, weight, bias, state = tensors(1, torch.float64, T=sum(split), C=C, W=W)
    whole = causal_conv1d(x, weight, bias, activation=activation, initial_state=state, backend="reference")
    y, _ = decode(x, weight, bias, state, split, "native", activation)
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)


@needs_native
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, dtype):
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        x, weight, bias, state = tensors(2, dtype, B=3, T=9, C=70)
        whole = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, backend="native")
        assert torch.equal(decode(x, weight, bias, state, [2] + [1] * 7, "native")[0], whole)
    finally:
        native.host.set_isa(best)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_is_updated_in_place(backend):
    """Also where its rows lie apart, and what lies between them is left alone."""
    x, weight, bias, state = tensors(3, torch.float32)
    room = torch.full((2, 5, 30), torch.nan)
    view = room[:, 1:4, 4:25]
    view.copy_(state)
    y = causal_conv1d_step(x[:, :2], view, weight, bias, backend=backend)
    assert torch.equal(y, causal_conv1d_step(x[:, :2], state, weight, bias, backend=backend))
    assert torch.equal(view, state)
    assert torch.equal(state[:, 1:], x[:, :2])
    assert room.isnan().sum() == room.numel() - state.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters(dtype, backend):
    x, weight, bias, state = tensors(4, dtype)
    weight, bias = weight.float() * 1.001, bias.float()
    whole = causal_conv1d(x, weight, bias, initial_state=state, backend=backend)
    same_bits(decode(x, weight, bias, state, [5, 1, 31], backend, None)[0], whole, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decodes_in_the_states_dtype(backend):
    x, weight, bias, state = tensors(5, torch.float32)
    plain = causal_conv1d_step(x[:, :1], state.clone(), weight, bias, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv1d_step(x[:, :1].bfloat16().float(), state.clone(), weight, bias, backend=backend)
    assert y.dtype == plain.dtype == torch.float32


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, state = tensors(6, dtype)
    op = torch.ops.slmkernels.causal_conv1d_step.default
    torch.library.opcheck(op, (x[:, :2], state, weight, bias, True))


@needs_native
def test_compile_fullgraph():
    x, weight, bias, state = tensors(7, torch.float32)
    other = state.clone()

    def f(x, state):
        return causal_conv1d_step(x + 1, state, weight, bias, activation="silu")

    expected = f(x[:, :1], state)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x[:, :1], other), expected)
    torch.testing.assert_close(other, state)


def test_zero_tokens_zero_batch_one_tap():
    x, weight, bias, state = tensors(8, torch.float32)
    before = state.clone()
    assert causal_conv1d_step(x[:, :0], state, weight, bias).shape == (2, 0, 21)
    assert torch.equal(state, before)
    assert causal_conv1d_step(x[:0, :1], state[:0], weight, bias).shape == (0, 1, 21)
    assert causal_conv1d_step(x, state[:, :0], weight[:, :1]).shape == x.shape


BAD = {
    "x with two dimensions": ({"x": torch.zeros(2, 21)}, ValueError, "x is"),
    "x of another dtype": ({"x": torch.zeros(2, 1, 21).half()}, TypeError, "state is float32.*float16"),
    "state no tensor": ({"state": None}, TypeError, "state is None"),
    "state of another length": ({"state": torch.zeros(2, 4, 21)}, ValueError, r"state is .*\[2, 3, 21\]"),
    "state of another batch": ({"state": torch.zeros(1, 3, 21)}, ValueError, "state is"),
    "state with a strange stride": (
        {"state": torch.zeros(2, 21, 3).mT},
        ValueError,
        "state is .* stride of 1",
    ),
    "weight of another size": ({"weight": torch.zeros(20, 4)}, ValueError, "weight is"),
    "bias of another size": ({"bias": torch.zeros(20)}, ValueError, "bias is"),
    "activation unknown": ({"activation": "relu"}, ValueError, "activation is 'relu'"),
    "a gradient": ({"x": torch.zeros(2, 1, 21, requires_grad=True)}, ValueError, "x is .* no gradient"),
    "backend unknown": ({"backend": "fast"}, ValueError, "backend is 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    state = torch.ones(2, 3, 21)
    good = {"x": torch.zeros(2, 1, 21), "state": state, "weight": torch.zeros(21, 4)}
    with pytest.raises(error, match=message):
        causal_conv1d_step(**{**good, **changes})
    assert torch.equal(state, torch.ones(2, 3, 21)), "the state is left as it was"
