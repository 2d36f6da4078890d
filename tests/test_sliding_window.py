"""Sliding-window attention: reference against a naive loop, kernels against the reference, properties."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import DTYPES, TIERS, needs_native
from sliding_window_cases import check, inputs, run

import slmkernels
from slmkernels import explain, native, sliding_window_attention, triton_support, use_backend
from slmkernels.ops.sliding_window import function, reference

# name -> sizes (B, T, S, Hq, H, D, Dv) and options
CASES = {
    "plain": ((2, 70, 70, 4, 2, 32, 32), {"window": 16}),
    "window of one": ((1, 33, 33, 2, 1, 16, 16), {"window": 1}),
    "window beyond T": ((1, 65, 65, 2, 2, 64, 64), {"window": 100}),
    "unbounded causal": ((1, 131, 131, 2, 1, 64, 64), {}),
    "bidirectional": ((1, 97, 97, 2, 2, 32, 32), {"window": (20, 9), "causal": False}),
    "left only": ((1, 97, 97, 2, 2, 32, 32), {"window": (20, None), "causal": False}),
    "right only": ((1, 97, 97, 2, 2, 32, 32), {"window": (None, 5), "causal": False}),
    "full": ((1, 40, 70, 2, 2, 32, 32), {"causal": False}),
    "fewer keys, rows see nothing": ((1, 90, 50, 2, 2, 32, 32), {"window": 12}),
    "more keys": ((1, 50, 90, 2, 2, 32, 32), {"window": 33}),
    "odd heads sizes": ((1, 75, 75, 3, 3, 19, 7), {"window": 20}),
    "one channel": ((1, 30, 30, 1, 1, 1, 1), {"window": 20}),
    "wide heads": ((1, 70, 70, 1, 1, 256, 128), {"window": 50}),
    "multi-query": ((2, 80, 80, 6, 1, 16, 16), {"window": 30}),
    "softcap": ((1, 80, 80, 2, 2, 32, 32), {"window": 30, "softcap": 2.5}),
    "negative scale": ((1, 80, 80, 2, 2, 32, 32), {"window": 30, "scale": -0.7}),
    "zero scale": ((1, 40, 40, 2, 2, 32, 32), {"window": 30, "scale": 0.0}),
    "across chunks": ((1, 700, 700, 2, 1, 32, 32), {"window": 40}),
    "long reach": ((1, 1100, 1100, 1, 1, 16, 16), {"window": 600}),
    "one token": ((3, 1, 1, 2, 2, 32, 32), {"window": 4}),
    "no query": ((1, 0, 9, 2, 2, 32, 32), {"window": 4}),
    "no key": ((1, 9, 0, 2, 2, 32, 32), {"window": 4}),
    "no batch": ((0, 9, 9, 2, 2, 32, 32), {"window": 4}),
}


def naive(q, k, v, left, right, scale, softcap, sinks):
    """A loop over single queries and keys, in Python floats: the definition, word by word."""
    B, T, Hq, _ = q.shape
    S, H = k.shape[1], k.shape[2]
    o, lse = (
        torch.zeros(B, T, Hq, v.shape[3], dtype=torch.float64),
        torch.zeros(B, Hq, T, dtype=torch.float64),
    )
    for b in range(B):
        for h in range(Hq):
            for t in range(T):
                i, g = t + S - T, h // (Hq // H)
                weights = {}
                for j in range(S):
                    if (left is None or j >= i - left) and (right is None or j <= i + right):
                        s = scale * float(q[b, t, h] @ k[b, j, g])
                        weights[j] = math.exp(softcap * math.tanh(s / softcap) if softcap else s)
                total = sum(weights.values()) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                lse[b, h, t] = math.log(total) if total > 0 else -math.inf
                for j, w in weights.items():
                    o[b, t, h] += w / total * v[b, j, g]
    return o, lse


@pytest.mark.parametrize("case", ["plain", "bidirectional", "fewer keys, rows see nothing", "softcap"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_reference_is_the_definition(case, with_sinks):
    (_, T, S, Hq, H, D, Dv), options = CASES[case]
    q, k, v, sinks, _, _ = inputs(0, 1, min(T, 24), min(S, 15), Hq, H, D, Dv, sinks=with_sinks)
    call = function.prepare(q, k, v, sinks=sinks, **options)
    expected = naive(q, k, v, call.left, call.right, call.scale, call.softcap, sinks)
    got = sliding_window_attention(q, k, v, sinks=sinks, return_lse=True, backend="reference", **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"window": (2, 1), "causal": False},
        {"window": 4, "softcap": 1.5},
        {"window": 2, "scale": 0.3},
    ],
)
def test_gradcheck(backend, options):
    q, k, v, sinks, _, _ = inputs(1, 1, 7, 5, 4, 2, 3, 2, sinks=True)

    def f(q, k, v, sinks):
        o, lse = sliding_window_attention(q, k, v, sinks=sinks, return_lse=True, backend=backend, **options)
        return o, lse

    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-8)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_native(case, dtype):
    sizes, options = CASES[case]
    check(inputs(2, *sizes), dtype, "native", **options)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", ["plain", "bidirectional", "odd heads sizes", "softcap", "across chunks"])
def test_every_tier(case, tier, dtype):
    sizes, options = CASES[case]
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        check(inputs(3, *sizes, sinks=True), dtype, "native", **options)
    finally:
        native.host.set_isa(best)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [-math.inf, -3.0, 30.0])
def test_sinks(value, dtype):
    tensors = list(inputs(4, 1, 60, 50, 4, 2, 32, 32, sinks=True))
    tensors[3] = torch.full_like(tensors[3], value)
    if value == -math.inf:  # a sink of -inf is no sink
        ours = run(tensors, dtype, "native", window=12)
        tensors[3] = None
        none = run(tensors, dtype, "native", window=12)
        assert not ours.pop("dsinks").any()
        assert all(torch.equal(ours[name], none[name]) for name in none)
    else:
        check(tensors, dtype, "native", window=12, scores=max(8.0, value))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"window": 9}, {"window": (5, 3), "causal": False}, {}])
@pytest.mark.parametrize("separate_keys", [False, True])
def test_packed(separate_keys, options, dtype):
    cu = torch.tensor([0, 0, 31, 32, 32, 100], dtype=torch.int32)
    cu_k = torch.tensor([0, 4, 30, 30, 41, 120], dtype=torch.int32) if separate_keys else None
    tensors = inputs(5, 1, 100, 120 if separate_keys else 100, 4, 2, 16, 16, sinks=True)
    check(tensors, dtype, "native", cu_seqlens=cu, cu_seqlens_k=cu_k, **options)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_separate(dtype):
    q, k, v, _, do, dlse = inputs(6, 1, 100, 100, 4, 2, 16, 16)
    offsets = [0, 17, 17, 60, 100]
    cu = torch.tensor(offsets, dtype=torch.int32)
    packed = run((q, k, v, None, do, dlse), dtype, "native", window=20, cu_seqlens=cu)
    for a, b in itertools.pairwise(offsets):
        part = [x[:, a:b] for x in (q, k, v)]
        alone = run((*part, None, do[:, a:b], dlse[:, :, a:b]), dtype, "native", window=20)
        for name in ("o", "dq", "dk", "dv"):
            assert torch.equal(packed[name][:, a:b], alone[name]), name


@needs_native
@given(
    T=st.integers(0, 150),
    S=st.integers(0, 150),
    H=st.integers(1, 2),
    group=st.integers(1, 3),
    D=st.integers(1, 70),
    Dv=st.integers(1, 70),
    left=st.none() | st.integers(0, 160),
    right=st.none() | st.integers(0, 160),
    causal=st.booleans(),
    softcap=st.none() | st.floats(0.5, 50),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_any_shape(T, S, H, group, D, Dv, left, right, causal, softcap, sinks, dtype, seed):
    tensors = inputs(seed, 1, T, S, H * group, H, D, Dv, sinks=sinks)
    check(tensors, dtype, "native", window=(left, right), causal=causal, softcap=softcap)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 257, 509, 1031])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 256, 2000, (None, 3), (130, 70)])
def test_sweep(window, T, D, dtype):
    causal = not isinstance(window, tuple)
    check(inputs(7, 1, T, T, 2, 1, D, D, sinks=True), dtype, "native", window=window, causal=causal)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [5, 64, 100, None])
def test_causality_is_exact(window, dtype):
    q, k, v, _, do, dlse = inputs(8, 1, 150, 150, 2, 2, 32, 32)
    t = 77
    before = run((q, k, v, None, do, dlse), dtype, "native", window=window)
    for x in (k, v, q):
        x[:, t:] += 1.0
    after = run((q, k, v, None, do, dlse), dtype, "native", window=window)
    assert torch.equal(before["o"][:, :t], after["o"][:, :t])
    assert torch.equal(before["lse"][..., :t], after["lse"][..., :t])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_beyond_t_is_causal_and_one_is_v(dtype):
    q, k, v, _, _, _ = (x if x is None else x.to(dtype) for x in inputs(9, 2, 100, 100, 2, 2, 32, 32))
    wide = sliding_window_attention(q, k, v, window=100, backend="native")
    assert torch.equal(wide, sliding_window_attention(q, k, v, backend="native"))
    assert torch.equal(sliding_window_attention(q, k, v, window=1, backend="native"), v)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_scores(dtype):
    q, k, v, sinks, do, dlse = inputs(10, 1, 90, 90, 2, 2, 32, 32, sinks=True)
    q, k = 6 * q, 6 * k
    scores = (torch.einsum("bthd,bshd->bhts", q, k) / 32**0.5).abs().max().item()
    assert scores > 80
    check((q, k, v, sinks * 10, do, dlse), dtype, "native", window=40, scores=scores)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """Any strides, also along the last dimension, and a gradient that `sum` expands from one number."""
    q, k, v, _, _, _ = inputs(11, 2, 50, 50, 4, 2, 32, 32)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    strange = [
        leaves[0].transpose(1, 2).contiguous().transpose(1, 2),
        leaves[1].transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([leaves[2], leaves[2]], dim=-1)[..., :32],
    ]
    plain = sliding_window_attention(*leaves, window=8, backend="native")
    got = sliding_window_attention(*strange, window=8, backend="native")
    assert torch.equal(plain, got)
    expected = torch.autograd.grad(plain, leaves, torch.ones_like(plain))
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [40, None, (200, 100)])
def test_same_bits_for_any_number_of_threads(window, dtype):
    tensors = inputs(12, 2, 700, 700, 4, 2, 32, 32, sinks=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            results.append(run(tensors, dtype, "native", window=window, causal=window != (200, 100)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_native
def test_backward_twice_and_partial_gradients():
    q, k, v, _, do, _ = inputs(13, 1, 40, 40, 2, 1, 16, 16)
    q.requires_grad_(), v.requires_grad_()  # k without
    o = sliding_window_attention(q, k, v, window=7, backend="native")
    first = torch.autograd.grad(o, (q, v), do, retain_graph=True)
    second = torch.autograd.grad(o, (q, v), do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_native
def test_gradient_of_lse_alone():
    q, k, v, _, _, dlse = inputs(14, 1, 40, 40, 2, 1, 16, 16)
    results = []
    for backend in ("native", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        _, lse = sliding_window_attention(*leaves, window=7, return_lse=True, backend=backend)
        results.append(torch.autograd.grad(lse, leaves[:2], dlse))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_native
def test_autocast_casts():
    q, k, v = (x.float().requires_grad_() for x in inputs(15, 1, 40, 40, 2, 1, 16, 16)[:3])
    with torch.autocast("cpu", torch.bfloat16):
        o = sliding_window_attention(q, k.bfloat16(), v, window=7, backend="native")
    assert o.dtype == torch.bfloat16
    o.sum().backward()
    assert q.grad.dtype == torch.float32


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, v, sinks, do, dlse = inputs(16, 1, 20, 20, 4, 2, 16, 8, sinks=True)
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    sinks, dlse = sinks.float(), dlse.float()
    cu = torch.tensor([0, 5, 20], dtype=torch.int32)
    ops = torch.ops.slmkernels
    for extra in ((None, None, None), (sinks, cu, cu)):
        tail = (*extra, 4, 0, 0.25, 0.0)
        torch.library.opcheck(ops.sliding_window_forward.default, (q, k, v, *tail))
        o, lse = ops.sliding_window_forward(q, k, v, *tail)
        for d in (None, dlse):
            torch.library.opcheck(ops.sliding_window_backward.default, (do, d, q, k, v, o, lse, *tail))


@needs_native
@pytest.mark.parametrize("with_sinks", [False, True])
def test_compile_fullgraph(with_sinks):
    tensors = inputs(17, 1, 60, 60, 4, 2, 16, 16, sinks=with_sinks)
    q, k, v, sinks, do, _ = (x if x is None else x.float() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v, *((sinks,) if with_sinks else ()))]

    def f(q, k, v, sinks=None):
        return sliding_window_attention(q * 1.5, k, v, sinks=sinks, window=9).sin()

    eager = torch.autograd.grad(f(*leaves), leaves, do)
    compiled = torch.compile(f, fullgraph=True)
    for a, b in zip(eager, torch.autograd.grad(compiled(*leaves), leaves, do), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return sliding_window_attention(q, k, v, window=9)

    q, k, v = (x.float() for x in inputs(18, 2, 30, 30, 4, 2, 16, 16)[:3])
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=({0: batch},) * 3)
    assert any("sliding_window_forward" in str(node.target) for node in program.graph.nodes)
    more = [torch.cat([x, x]) for x in (q, k, v)]
    torch.testing.assert_close(program.module()(*more), Model()(*more))


@needs_native
def test_checkpointing_and_func_grad():
    from torch.utils.checkpoint import checkpoint

    q, k, v, _, do, _ = inputs(19, 1, 30, 30, 2, 2, 16, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def f(q, k, v):
        return sliding_window_attention(q, k, v, window=9)

    plain = torch.autograd.grad(f(*leaves), leaves, do)
    saved = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves, do)
    func = torch.func.grad(lambda *x: (f(*x) * do).sum(), argnums=(0, 1, 2))(*[x.detach() for x in leaves])
    for a, b, c in zip(plain, saved, func, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def good(**changes):
    q, k, v = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    return {"q": q, "k": k, "v": v, "window": 4, **changes}


BAD = {
    "q is no tensor": (good(q=[1.0]), TypeError, "q is"),
    "q of ints": (good(q=torch.ones(2, 8, 4, 16, dtype=torch.int64)), TypeError, "q is int64"),
    "q with three dimensions": (good(q=torch.randn(2, 8, 16)), ValueError, r"q is float32\[2, 8, 16\]"),
    "k of another dtype": (good(k=torch.randn(2, 8, 2, 16).double()), TypeError, "k is float64"),
    "k of another batch": (good(k=torch.randn(3, 8, 2, 16)), ValueError, "k is .* batch 2"),
    "k of another size": (good(k=torch.randn(2, 8, 2, 8)), ValueError, "k is .* head dimension 16"),
    "v of another length": (good(v=torch.randn(2, 9, 2, 16)), ValueError, "v is"),
    "heads that do not divide": (good(q=torch.randn(2, 8, 3, 16)), ValueError, "q is .* 2 heads divide"),
    "no head": (good(k=torch.randn(2, 8, 0, 16), v=torch.randn(2, 8, 0, 16)), ValueError, "q is"),
    "meta device k": (good(k=torch.randn(2, 8, 2, 16, device="meta")), ValueError, "k is .* meta"),
    "window 0": (good(window=0), ValueError, "window is 0"),
    "window -1": (good(window=-1), ValueError, "window is -1"),
    "window True": (good(window=True), TypeError, "window is True"),
    "window 2.5": (good(window=2.5), TypeError, "window is 2.5"),
    "window triple": (good(window=(1, 2, 3)), TypeError, "window is"),
    "window of negative side": (good(window=(-1, 2), causal=False), ValueError, "window is"),
    "int window without causal": (good(window=4, causal=False), ValueError, "a pair"),
    "scale inf": (good(scale=math.inf), ValueError, "scale is inf"),
    "scale nan": (good(scale=math.nan), ValueError, "scale is nan"),
    "scale text": (good(scale="1"), TypeError, "scale is '1'"),
    "softcap 0": (good(softcap=0.0), ValueError, "softcap is 0.0"),
    "sinks of another size": (good(sinks=torch.zeros(3)), ValueError, "sinks is"),
    "sinks of ints": (good(sinks=torch.zeros(4, dtype=torch.int32)), TypeError, "sinks is"),
    "cu_seqlens with a batch": (
        good(cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)),
        ValueError,
        "batch 1",
    ),
    "backend unknown": (good(backend="cuda"), ValueError, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        sliding_window_attention(**arguments)


@pytest.mark.parametrize(
    ("cu", "error"),
    [
        ([0, 9], ValueError),
        ([1, 8], ValueError),
        ([0, 5, 3, 8], ValueError),
        ([], ValueError),
        ([0.0, 8.0], TypeError),
        ("text", TypeError),
    ],
)
def test_bad_cu_seqlens(cu, error):
    q, k, v = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16)
    if isinstance(cu, list):
        cu = torch.tensor(cu, dtype=None if any(isinstance(x, float) for x in cu) else torch.int32)
    with pytest.raises(error, match="cu_seqlens"):
        sliding_window_attention(q, k, v, window=4, cu_seqlens=cu)


def test_bad_cu_seqlens_k():
    q, k, v = torch.randn(1, 8, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k is .* cu_seqlens_k"):
        sliding_window_attention(q, k, v, cu_seqlens=cu)
    with pytest.raises(ValueError, match="as many sequences"):
        sliding_window_attention(q, k, v, cu_seqlens=cu, cu_seqlens_k=torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens beside it"):
        sliding_window_attention(q, k, v, cu_seqlens_k=torch.tensor([0, 9], dtype=torch.int32))


@needs_native
@pytest.mark.parametrize("window", [2**62, 2**63 - 1, 2**63, 2**70])
def test_enormous_windows_hide_nothing(window):
    tensors = inputs(22, 1, 40, 30, 2, 1, 16, 16)
    for wide, unbounded in (
        ({"window": window}, {}),
        ({"window": (window, window), "causal": False}, {"causal": False}),
        ({"window": (3, window), "causal": False}, {"window": (3, None), "causal": False}),
    ):
        ours = run(tensors, torch.float64, "native", **wide)
        expected = run(tensors, torch.float64, "native", **unbounded)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_shows_wherever_it_was_seen(dtype):
    """A NaN key spoils exactly the rows that see it, and the gradients that those rows reach."""
    tensors = inputs(23, 1, 40, 40, 2, 2, 16, 16, sinks=True)
    tensors[1][0, 20] = torch.nan
    got = run(tensors, dtype, "native", window=4)
    rows = torch.zeros(40, dtype=torch.bool)
    rows[20:24] = True
    assert torch.equal(got["o"].isnan().all(-1).all(-1)[0], rows)
    assert torch.equal(got["lse"].isnan().all(1)[0], rows)
    keys = torch.zeros(40, dtype=torch.bool)
    keys[17:24] = True  # what those rows see
    assert torch.equal(got["dv"].isnan().any(-1).any(-1)[0], keys)
    assert got["dsinks"].isnan().all()
    tensors = inputs(23, 1, 10, 10, 2, 2, 16, 16, sinks=True)
    tensors[3][0] = torch.nan
    got = run(tensors, dtype, "native", window=4)
    assert got["o"][:, :, 0].isnan().all()
    assert got["o"][:, :, 1].isfinite().all()
    assert got["dsinks"].isnan().tolist() == [True, False]


@needs_native
def test_raw_backward_refuses_what_does_not_fit():
    q, k = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16)
    tail = (None, None, None, 4, 0, 0.25, 0.0)
    o, lse = torch.ops.slmkernels.sliding_window_forward(q, k, k, *tail)
    backward = torch.ops.slmkernels.sliding_window_backward
    for dlse in (torch.ones(1), torch.ones(1, 4, 8).double(), torch.ones(1, 8, 4), torch.ones(0)):
        with pytest.raises(RuntimeError, match="dlse must be"):
            backward(o, dlse, q, k, k, o, lse, *tail)
    with pytest.raises(RuntimeError, match="lse must be"):
        backward(o, None, q, k, k, o, lse.transpose(1, 2), *tail)
    with pytest.raises(RuntimeError, match="dout and o"):
        backward(o[:, :4], None, q, k, k, o, lse, *tail)


def test_meta_tensors_have_shapes():
    q, k = torch.randn(1, 8, 4, 16, device="meta"), torch.randn(1, 8, 2, 16, device="meta")
    with use_backend("reference"):
        assert sliding_window_attention(q, k, k, window=4).shape == q.shape


@needs_native
def test_raw_operator_refuses_what_does_not_fit():
    """The C++ side checks too: whoever calls the operator directly gets an error, not a crash."""
    q, k = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16)
    forward = torch.ops.slmkernels.sliding_window_forward
    tail = (4, 0, 0.25, 0.0)
    with pytest.raises(RuntimeError):
        forward(q, k, k[:, :5], None, None, None, *tail)
    with pytest.raises(RuntimeError):
        forward(q, k, k, torch.zeros(3), None, None, *tail)
    with pytest.raises(RuntimeError):
        forward(q, k, k, None, torch.tensor([0, 9], dtype=torch.int32), None, *tail)
    with pytest.raises(RuntimeError):
        forward(q.int(), k.int(), k.int(), None, None, None, *tail)
    with pytest.raises(RuntimeError, match="cu_seqlens_k needs"):
        forward(q, k, k, None, None, torch.tensor([0, 8], dtype=torch.int32), *tail)
    with pytest.raises(RuntimeError, match="finite"):
        forward(q, k, k, None, None, None, 4, 0, math.nan, 0.0)
    with pytest.raises(RuntimeError, match="left and right"):
        forward(q, k, k, None, None, None, -5, 0, 1.0, 0.0)


def test_backends(monkeypatch):
    q, k, v = (x.float() for x in inputs(20, 1, 12, 12, 2, 2, 16, 16)[:3])
    report = explain(sliding_window_attention, q, k, v, window=4)
    assert report == explain("sliding_window_attention", q, k, v, window=4)
    assert "native" in report
    assert "reference" in report
    with use_backend("reference"):
        assert explain(sliding_window_attention, q, k, v, window=4).startswith(
            "sliding_window_attention: reference"
        )
    if not native.HAS_CUDA and not triton_support.INTERPRETED:
        with pytest.raises(slmkernels.Unsupported, match="backend 'triton' cannot run"):
            sliding_window_attention(q, k, v, window=4, backend="triton")
        with use_backend("triton"), pytest.raises(slmkernels.Unsupported):
            sliding_window_attention(q, k, v, window=4)
    with pytest.raises(ValueError, match="use_backend"), use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="expected one of"):
        explain("fast_attention", q, k, v)


def test_slow_fallback_warns_once(monkeypatch):
    operation = function.OPERATION
    monkeypatch.setattr(operation, "warned", set())
    monkeypatch.setitem(operation.supports, "native", lambda call: "not today")
    monkeypatch.setitem(operation.supports, "triton", lambda call: "nor this")
    q, k, v = (x.float() for x in inputs(21, 1, 12, 12, 2, 2, 16, 16)[:3])
    with pytest.warns(RuntimeWarning, match=r"not today.*nor this"):
        sliding_window_attention(q, k, v, window=4)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliding_window_attention(q, k, v, window=4)


def test_visible_is_the_documented_window():
    mask = reference.visible(3, 5, 1, 0)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
