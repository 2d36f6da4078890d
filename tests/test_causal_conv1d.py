"""The causal convolution: reference against a naive loop, kernels against the reference, properties."""

import itertools

import pytest
import torch
from causal_conv1d_cases import NAMES, check, inputs, plain, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import slmkernels
from slmkernels import causal_conv1d, causal_conv1d_step, explain, native, triton_support
from slmkernels.ops.causal_conv1d import function

needs_native = pytest.mark.skipif(not native.HAS_CPU, reason=str(native.REASONS.get("_C_cpu")))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TIERS = native.host.isa_supported() if native.host else []
ACTIVATIONS = [None, "silu"]

# name -> sizes (B, T, C, W)
CASES = {
    "plain": (2, 37, 32, 4),
    "one tap": (2, 9, 20, 1),
    "two taps": (1, 30, 48, 2),
    "widest": (1, 50, 40, 8),
    "five taps, odd channels": (3, 23, 19, 5),
    "one channel": (2, 31, 1, 4),
    "one token": (3, 1, 33, 4),
    "two tokens": (1, 2, 17, 4),
    "as many tokens as the state": (2, 3, 16, 4),
    "no token": (2, 0, 16, 4),
    "no batch": (0, 5, 16, 4),
    "no channel": (2, 5, 0, 4),
    "across blocks": (1, 389, 65, 4),
    "across chunks": (2, 67, 1031, 3),
}


def naive(x, weight, bias, initial, silu):
    """A loop over single tokens and taps: the definition, word by word."""
    B, T, C = x.shape
    W = weight.shape[1]
    y = torch.zeros(B, T, C, dtype=torch.float64)
    for b, t, c in itertools.product(range(B), range(T), range(C)):
        z = 0.0 if bias is None else bias[c].item()
        for w in range(W):
            at = t - (W - 1) + w
            if at >= 0:
                z += (weight[c, w] * x[b, at, c]).item()
            elif initial is not None:
                z += (weight[c, w] * initial[b, at + W - 1, c]).item()
        y[b, t, c] = z / (1 + torch.exp(torch.tensor(-z, dtype=torch.float64))) if silu else z
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 7])
@pytest.mark.parametrize(("bias", "initial"), [(True, True), (False, False)])
def test_reference_is_the_definition(bias, initial, T, activation):
    x, weight, b, state, _, _ = inputs(0, 2, T, 3, 4, bias=bias, initial=initial)
    options = {"activation": activation, "initial_state": state, "return_state": True}
    y, last = causal_conv1d(x, weight, b, backend="reference", **options)
    torch.testing.assert_close(y, naive(x, weight, b, state, activation), rtol=1e-13, atol=1e-13)
    e = torch.cat([x.new_zeros(2, 3, 3) if state is None else state, x], 1)
    assert torch.equal(last, e[:, -3:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("W", [1, 2, 4, 9])
def test_reference_is_torch_conv1d(W, activation):
    """The usual module: padding on both sides, the end cut off."""
    x, weight, bias, _, _, _ = inputs(1, 2, 21, 5, W, initial=False)
    conv = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=W - 1, groups=5)
    conv = conv[..., :21].transpose(1, 2)
    expected = torch.nn.functional.silu(conv) if activation else conv
    y = causal_conv1d(x, weight, bias, activation=activation, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, plain(x, weight, bias, activation=activation)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("T", "W"), [(6, 4), (2, 4), (3, 1), (5, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed, T, W, activation, backend):
    cu = torch.tensor([0, 0, 2, T], dtype=torch.int32) if packed else None
    tensors = inputs(2, 1 if packed else 2, T, 3, W, N=3 if packed else 2)
    leaves = [x.requires_grad_() for x in tensors[:4]]

    def f(x, weight, bias, state):
        options = {"activation": activation, "initial_state": state, "cu_seqlens": cu}
        y, last = causal_conv1d(x, weight, bias, return_state=True, backend=backend, **options)
        return (y, last) if W > 1 else y

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-8)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES)
def test_native(case, activation, dtype):
    check(inputs(3, *CASES[case]), dtype, "native", activation=activation)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("W", range(1, 9))
def test_every_tier_and_width(W, tier, dtype):
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        check(inputs(4, 2, 45, 37, W), dtype, "native", activation="silu")
        check(inputs(4, 1, 140, 16, W, bias=False), dtype, "native")
    finally:
        native.host.set_isa(best)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "initial"), [(True, False), (False, True), (False, False)])
def test_absent_tensors(bias, initial, dtype):
    check(inputs(5, 2, 30, 24, 4, bias=bias, initial=initial), dtype, "native", activation="silu")


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters(backend, dtype):
    tensors = inputs(6, 2, 50, 33, 4)
    ours = check(tensors, dtype, backend, parameters=torch.float32, activation="silu")
    mixed = {"bias": tensors[2].to(dtype), "activation": "silu", "backend": backend}
    y = causal_conv1d(tensors[0].to(dtype), tensors[1].float(), **mixed)
    assert y.dtype == ours["y"].dtype


OFFSETS = [0, 0, 31, 32, 32, 34, 300, 300]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("initial", [False, True])
def test_packed(initial, activation, dtype):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    tensors = inputs(7, 1, 300, 20, 4, N=7, initial=initial)
    ours = check(tensors, dtype, "native", activation=activation, cu_seqlens=cu)
    if initial:  # empty sequences keep their state, and hand its gradient through
        for n in (0, 3, 6):
            assert torch.equal(ours["state"][n], tensors[3][n].to(dtype))
            assert torch.equal(ours["dinitial"][n], tensors[5][n].to(dtype))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend, dtype):
    x, weight, bias, initial, dy, dstate = inputs(8, 1, 300, 37, 4, N=7)
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    options = {"activation": "silu"}
    packed = run((x, weight, bias, initial, dy, dstate), dtype, backend, cu_seqlens=cu, **options)
    for n, (a, b) in enumerate(itertools.pairwise(OFFSETS)):
        part = (x[:, a:b], weight, bias, initial[n : n + 1], dy[:, a:b], dstate[n : n + 1])
        alone = run(part, dtype, backend, **options)
        for name in ("y", "dx"):
            same_bits(packed[name][:, a:b], alone[name], backend)
        for name in ("state", "dinitial"):
            same_bits(packed[name][n : n + 1], alone[name], backend)


def test_no_sequence_at_all():
    cu = torch.zeros(1, dtype=torch.int32)
    for backend in ["reference"] + ["native"] * native.HAS_CPU:
        x = torch.randn(1, 0, 5, requires_grad=True)
        y, state = causal_conv1d(x, torch.randn(5, 4), return_state=True, cu_seqlens=cu, backend=backend)
        assert y.shape == (1, 0, 5)
        assert state.shape == (0, 3, 5)


@needs_native
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5),
    C=st.integers(1, 70),
    W=st.integers(1, 8),
    bias=st.booleans(),
    initial=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_any_shape(lengths, C, W, bias, initial, activation, dtype):
    T = sum(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tensors = inputs(9, 1, T, C, W, N=len(lengths), bias=bias, initial=initial)
    check(tensors, dtype, "native", activation=activation, cu_seqlens=cu)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causality(dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in inputs(10, 2, 200, 33, 4)[:3])
    before = causal_conv1d(x, weight, bias, activation="silu", backend="native")
    x[:, 150:] = torch.nan
    after = causal_conv1d(x, weight, bias, activation="silu", backend="native")
    assert torch.equal(before[:, :150], after[:, :150])
    assert after[:, 150:].isnan().all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_equal_one(backend, dtype):
    x, weight, bias, state = (tensor.to(dtype) for tensor in inputs(11, 2, 90, 21, 4)[:4])
    options = {"activation": "silu", "return_state": True, "backend": backend}
    whole, last = causal_conv1d(x, weight, bias, initial_state=state, **options)
    for cut in (0, 1, 2, 3, 41, 90):
        first, state_at = causal_conv1d(x[:, :cut], weight, bias, initial_state=state, **options)
        second, state_end = causal_conv1d(x[:, cut:], weight, bias, initial_state=state_at, **options)
        same_bits(torch.cat([first, second], 1), whole, backend)
        assert torch.equal(state_end, last)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """A slice of a wider projection, any other strides, and a gradient that `sum` expands from one number."""
    x, weight, bias, state = (tensor.to(dtype) for tensor in inputs(12, 2, 50, 20, 4)[:4])
    options = {"activation": "silu", "backend": "native"}
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, state)]
    y = causal_conv1d(*leaves[:3], initial_state=leaves[3], **options)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for strange in (
        lambda t: torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]],
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        views = [strange(leaf) for leaf in leaves]
        got = causal_conv1d(*views[:3], initial_state=views[3], **options)
        assert got.is_contiguous()
        assert torch.equal(got, y)
        grads = torch.autograd.grad(got.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@needs_native
def test_a_slice_is_not_copied():
    """Half of a projection, whose other half is NaN: the operator reads the rows where they lie."""
    wide = torch.full((2, 40, 64), torch.nan)
    wide[..., 16:48] = torch.randn(2, 40, 32)
    weight = torch.randn(32, 4)
    y = causal_conv1d(wide[..., 16:48], weight, backend="native")
    assert torch.equal(y, causal_conv1d(wide[..., 16:48].contiguous(), weight, backend="native"))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    tensors = inputs(13, 3, 400, 600, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            results.append(run(tensors, dtype, "native", activation="silu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in NAMES)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_large_values(tier, dtype):
    """silu of large numbers: z, or 0, no overflow on the way; NaN stays NaN."""
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        x = torch.tensor(
            [-1e4, -800.0, -100.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 800.0, 1e30, torch.inf, torch.nan]
        )
        x = x.to(dtype)[None, :, None].repeat(1, 1, 17).requires_grad_()
        weight = torch.ones(17, 1, dtype=dtype)
        y = causal_conv1d(x, weight, activation="silu", backend="native")
        expected = torch.nn.functional.silu(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
        finite = x.isfinite()
        slope = torch.autograd.grad(y.sum(), x)[0][finite]
        torch.testing.assert_close(
            slope, torch.autograd.grad(expected.sum(), x)[0][finite], rtol=1e-5, atol=1e-30
        )
    finally:
        native.host.set_isa(best)


@needs_native
def test_backward_twice_and_partial_gradients():
    x, weight, bias, state, dy, _ = inputs(14, 1, 40, 6, 4)
    x.requires_grad_(), bias.requires_grad_()  # weight and the state without
    y = causal_conv1d(x, weight, bias, initial_state=state, backend="native")
    first = torch.autograd.grad(y, (x, bias), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, bias), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_native
def test_gradient_of_the_state_alone():
    results = []
    for backend in ("native", "reference"):
        x, weight, bias, state, _, dstate = inputs(15, 2, 2, 6, 4)
        x.requires_grad_(), state.requires_grad_()
        _, last = causal_conv1d(x, weight, bias, initial_state=state, return_state=True, backend=backend)
        results.append(torch.autograd.grad(last, (x, state), dstate))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_x(backend):
    x, weight, bias, state = (tensor.float().requires_grad_() for tensor in inputs(16, 1, 40, 16, 4)[:4])
    with torch.autocast("cpu", torch.bfloat16):
        options = {"initial_state": state, "return_state": True, "backend": backend}
        y, last = causal_conv1d(x, weight, bias, **options)
    assert y.dtype == last.dtype == torch.bfloat16
    y.sum().backward()
    assert {x.grad.dtype, weight.grad.dtype, bias.grad.dtype, state.grad.dtype} == {torch.float32}
    expected = causal_conv1d(x.bfloat16(), weight, bias, initial_state=state.bfloat16(), backend=backend)
    assert torch.equal(y, expected)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, state, dy, dstate = (tensor.to(dtype) for tensor in inputs(17, 1, 20, 8, 4, N=2))
    cu = torch.tensor([0, 5, 20], dtype=torch.int32)
    ops = torch.ops.slmkernels
    for extra, d in (((None, None, None), None), ((bias.float(), state, cu), dstate)):
        for flags in ((True, True), (False, False)):
            arguments = (x, weight.float(), *extra, *flags)
            torch.library.opcheck(ops.causal_conv1d_forward.default, arguments)
        torch.library.opcheck(ops.causal_conv1d_backward.default, (dy, d, x, weight, *extra, True))


@needs_native
def test_compile_fullgraph():
    x, weight, bias, state, dy, _ = (tensor.float() for tensor in inputs(18, 2, 30, 8, 4))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, state)]

    def f(x, weight, bias, state):
        options = {"activation": "silu", "initial_state": state, "return_state": True}
        y, last = causal_conv1d(x * 1.5, weight, bias, **options)
        return y.sin() + last.sum()

    eager = torch.autograd.grad(f(*leaves), leaves, dy)
    compiled = torch.compile(f, fullgraph=True)
    for a, b in zip(eager, torch.autograd.grad(compiled(*leaves), leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return causal_conv1d(x, self.weight, activation="silu")

    model, x = Model(), torch.randn(2, 30, 8)
    shapes = ({0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("length", min=2, max=99)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert any("causal_conv1d_forward" in str(node.target) for node in program.graph.nodes)
    more = torch.randn(3, 41, 8)
    torch.testing.assert_close(program.module()(more), model(more))


@needs_native
def test_checkpointing_and_func_grad():
    from torch.utils.checkpoint import checkpoint

    x, weight, bias, _, dy, _ = inputs(19, 1, 30, 6, 4)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def f(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu")

    first = torch.autograd.grad(f(*leaves), leaves, dy)
    saved = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves, dy)
    func = torch.func.grad(lambda *t: (f(*t) * dy).sum(), argnums=(0, 1, 2))(*[t.detach() for t in leaves])
    for a, b, c in zip(first, saved, func, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


# ---- bad input ---------------------------------------------------------------------------------------------


def good(**changes):
    return {"x": torch.randn(2, 8, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6), **changes}


PACKED = {"x": torch.randn(1, 8, 6)}


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "x is no tensor": (good(x=[1.0]), TypeError, "x is"),
    "x of ints": (good(x=torch.ones(2, 8, 6, dtype=torch.int64)), TypeError, "x is int64"),
    "x with two dimensions": (good(x=torch.randn(8, 6)), ValueError, r"x is float32\[8, 6\]"),
    "weight of another dtype": (good(weight=torch.randn(6, 4).half()), TypeError, "weight is float16"),
    "weight of another size": (good(weight=torch.randn(5, 4)), ValueError, "weight is .* 6 channels"),
    "weight of nn.Conv1d": (good(weight=torch.randn(6, 1, 4)), ValueError, r"weight is .*\[C, W\]"),
    "weight without taps": (good(weight=torch.randn(6, 0)), ValueError, "weight is .* one tap"),
    "weight on another device": (
        good(weight=torch.randn(6, 4, device="meta")),
        ValueError,
        "weight is .* cpu",
    ),
    "float32 weight of float64 x": (good(x=torch.randn(2, 8, 6).double()), TypeError, "weight is float32"),
    "bias of another size": (good(bias=torch.randn(7)), ValueError, "bias is .* 6 channels"),
    "bias of ints": (good(bias=torch.ones(6, dtype=torch.int32)), TypeError, "bias is int32"),
    "activation unknown": (good(activation="gelu"), ValueError, "activation is 'gelu'.*silu"),
    "activation True": (good(activation=True), ValueError, "activation is True"),
    "state of another length": (
        good(initial_state=torch.randn(2, 4, 6)),
        ValueError,
        r"initial_state is .*\[2, 3, 6\]",
    ),
    "state of another batch": (good(initial_state=torch.randn(3, 3, 6)), ValueError, "initial_state is"),
    "state of another dtype": (
        good(initial_state=torch.randn(2, 3, 6).half()),
        TypeError,
        "initial_state is float16",
    ),
    "state no tensor": (good(initial_state=0), TypeError, "initial_state is 0"),
    "return_state 1": (good(return_state=1), TypeError, "return_state is 1"),
    "cu_seqlens with a batch": (good(cu_seqlens=offsets(0, 8)), ValueError, "batch 1"),
    "cu_seqlens of floats": (good(**PACKED, cu_seqlens=torch.tensor([0.0, 8.0])), TypeError, "cu_seqlens is"),
    "cu_seqlens that end early": (good(**PACKED, cu_seqlens=offsets(0, 7)), ValueError, "end at 8"),
    "cu_seqlens that fall": (
        good(**PACKED, cu_seqlens=offsets(0, 5, 3, 8)),
        ValueError,
        "never fall",
    ),
    "backend unknown": (good(backend="cuda"), ValueError, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments)


@needs_native
def test_raw_operators_refuse_what_does_not_fit():
    """The C++ side checks too: whoever calls the operator directly gets an error, not a crash."""
    x, weight, state = torch.randn(1, 8, 6), torch.randn(6, 4), torch.randn(1, 3, 6)
    forward = torch.ops.slmkernels.causal_conv1d_forward
    backward = torch.ops.slmkernels.causal_conv1d_backward
    step = torch.ops.slmkernels.causal_conv1d_step
    cu = torch.tensor([0, 9], dtype=torch.int32)
    for message, arguments in {
        "x must be": (x[0], weight, None, None, None, False, False),
        "x must be float": (x.int(), weight, None, None, None, False, False),
        "weight must be": (x, weight[:5], None, None, None, False, False),
        "W from 1 to 8": (x, torch.randn(6, 9), None, None, None, False, False),
        "weight must have": (x, weight.half(), None, None, None, False, False),
        "bias must be": (x, weight, torch.randn(5), None, None, False, False),
        "initial_state must be": (x, weight, None, state[:, :2], None, False, False),
        "cu_seqlens must": (x, weight, None, None, cu, False, False),
        "batch 1": (x.repeat(2, 1, 1), weight, None, None, cu, False, False),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    with pytest.raises(RuntimeError, match="dout must be"):
        backward(x[:, :4], None, x, weight, None, None, None, False)
    with pytest.raises(RuntimeError, match="dstate must be"):
        backward(x, state.double(), x, weight, None, None, None, False)
    with pytest.raises(RuntimeError, match="stride of 1"):
        step(x, state.transpose(1, 2).contiguous().transpose(1, 2), weight, None, False)
    with pytest.raises(RuntimeError, match="initial_state must be"):
        step(x, state[:, :2], weight, None, False)


def test_backends():
    x, weight = torch.randn(1, 12, 6), torch.randn(6, 4)
    report = explain(causal_conv1d, x, weight, activation="silu")
    assert "native" in report
    assert "reference" in report
    assert explain(causal_conv1d_step, x, torch.zeros(1, 3, 6), weight)
    wide = torch.randn(6, 9)
    with pytest.raises(slmkernels.Unsupported, match="weight has 9 taps; up to 8"):
        causal_conv1d(x, wide, backend="native")
    function.OPERATION.warned.clear()
    if native.HAS_CPU and not triton_support.INTERPRETED:
        with pytest.warns(RuntimeWarning, match="9 taps"):
            y = causal_conv1d(x, wide)
        torch.testing.assert_close(y, causal_conv1d(x, wide, backend="reference"))
    if not native.HAS_CUDA and not triton_support.INTERPRETED:
        with pytest.raises(slmkernels.Unsupported, match="backend 'triton' cannot run"):
            causal_conv1d(x, weight, backend="triton")


def test_meta_tensors_have_shapes():
    x, weight = torch.randn(1, 8, 6, device="meta"), torch.randn(6, 4, device="meta")
    with slmkernels.use_backend("reference"):
        assert causal_conv1d(x, weight).shape == x.shape
