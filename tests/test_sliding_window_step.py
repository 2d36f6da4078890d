"""Decoding over a ring: any split into steps equals the full call, in constant memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmkernels import RingCache, native, sliding_window_attention, sliding_window_attention_step

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.HAS_CPU, reason="native library absent")),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def tensors(seed, B, T, Hq, H, D, Dv, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, Hq, D), (B, T, H, D), (B, T, H, Dv))
    return [torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def decode(q, k, v, window, split, backend, **options):
    cache = RingCache(q.shape[0], window, k.shape[2], k.shape[3], v.shape[3], dtype=q.dtype)
    outputs, start = [], 0
    for n in split:
        parts = [x[:, start : start + n] for x in (q, k, v)]
        outputs.append(sliding_window_attention_step(*parts, cache, backend=backend, **options))
        start += n
        assert cache.length == start
    return torch.cat(outputs, dim=1), cache


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("split", [[1] * 37, [20, 1, 1, 15], [3, 5, 8, 21], [36, 1], [37]], ids=str)
def test_any_split_equals_the_whole(split, window, dtype, backend):
    q, k, v = tensors(0, 2, 37, 4, 2, 20, 12, dtype)
    whole = sliding_window_attention(q.double(), k.double(), v.double(), window=window, backend="reference")
    got, _ = decode(q, k, v, window, split, backend)
    torch.testing.assert_close(got.double(), whole, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_softcap_scale(backend):
    q, k, v = tensors(1, 2, 30, 4, 2, 16, 16, torch.float64)
    options = {"sinks": torch.randn(4, dtype=torch.float64), "softcap": 1.3, "scale": 0.7}
    whole = sliding_window_attention(q, k, v, window=6, backend="reference", **options)
    got, _ = decode(q, k, v, 6, [1, 4, 12, 1, 12], backend, **options)
    torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not native.HAS_CPU, reason="native library absent")
@given(
    split=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    window=st.integers(1, 40),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    D=st.integers(1, 40),
    Dv=st.integers(1, 40),
)
def test_any_shape(split, window, H, group, D, Dv):
    q, k, v = tensors(2, 1, sum(split), H * group, H, D, Dv, torch.float64)
    whole = sliding_window_attention(q, k, v, window=window, backend="reference")
    got, _ = decode(q, k, v, window, split, "native")
    torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not native.HAS_CPU, reason="native library absent")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tier", native.host.isa_supported() if native.host else [])
def test_every_tier(tier, dtype):
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        q, k, v = tensors(3, 2, 40, 4, 2, 33, 70, dtype)
        whole = sliding_window_attention(q.double(), k.double(), v.double(), window=11, backend="reference")
        got, _ = decode(q, k, v, 11, [1] * 40, "native")
        torch.testing.assert_close(got.double(), whole, rtol=0, atol=TOLERANCE[dtype])
    finally:
        native.host.set_isa(best)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_stays_where_it_is(backend):
    q, k, v = tensors(4, 1, 50, 2, 2, 16, 16, torch.float32)
    _, cache = decode(q, k, v, 8, [1] * 50, backend)
    pointers = cache.k.data_ptr(), cache.v.data_ptr(), cache.position.data_ptr()
    sliding_window_attention_step(q[:, :1], k[:, :1], v[:, :1], cache, backend=backend)
    sliding_window_attention_step(q[:, :20], k[:, :20], v[:, :20], cache, backend=backend)
    assert pointers == (cache.k.data_ptr(), cache.v.data_ptr(), cache.position.data_ptr())
    assert cache.k.shape == (1, 2, 8, 16)
    last_k, last_v = cache.last(8)
    assert torch.equal(last_k, k[:, 12:20])
    assert torch.equal(last_v, v[:, 12:20])
    cache.reset()
    assert cache.length == 0


@pytest.mark.skipif(not native.HAS_CPU, reason="native library absent")
def test_opcheck():
    q, k, v = tensors(5, 1, 2, 4, 2, 16, 16, torch.float32)
    cache = RingCache(1, 8, 2, 16)
    op = torch.ops.slmkernels.sliding_window_step.default
    torch.library.opcheck(op, (q, k, v, cache.k, cache.v, cache.position, None, 0.25, 0.0))


@pytest.mark.skipif(not native.HAS_CPU, reason="native library absent")
def test_raw_operator_refuses_what_does_not_fit():
    q, k, _ = tensors(6, 1, 2, 4, 2, 16, 16, torch.float32)
    step = torch.ops.slmkernels.sliding_window_step
    for change in (-5, -(2**40)):
        cache = RingCache(1, 8, 2, 16)
        cache.position += change
        with pytest.raises(RuntimeError, match="position must be >= 0"):
            step(q, k, k, cache.k, cache.v, cache.position, None, 0.25, 0.0)
    cache = RingCache(1, 8, 2, 16)
    with pytest.raises(RuntimeError, match="position"):
        step(q, k, k, cache.k, cache.v, cache.position.T, None, 0.25, 0.0)
    with pytest.raises(RuntimeError):
        step(q, k, k, cache.k, cache.v[:, :, :4], cache.position, None, 0.25, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decodes_in_the_caches_dtype(backend):
    q, k, v = tensors(7, 1, 20, 4, 2, 16, 16, torch.float32)
    plain, _ = decode(q, k, v, 6, [1, 9, 10], backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = decode(q, k, v, 6, [1, 9, 10], backend)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_zero_tokens_and_zero_batch():
    cache = RingCache(0, 4, 2, 16)
    x = torch.randn(0, 1, 2, 16)
    assert sliding_window_attention_step(x, x, x, cache).shape == (0, 1, 2, 16)
    cache = RingCache(1, 4, 2, 16)
    x = torch.randn(1, 0, 2, 16)
    assert sliding_window_attention_step(x, x, x, cache).shape == (1, 0, 2, 16)


BAD = {
    "cache is a dict": ({"cache": {}}, TypeError, "cache is"),
    "q of another batch": ({"q": torch.randn(2, 1, 4, 16)}, ValueError, "q is"),
    "q of another size": ({"q": torch.randn(1, 1, 4, 8)}, ValueError, "q is"),
    "heads that do not divide": ({"q": torch.randn(1, 1, 3, 16)}, ValueError, "q is"),
    "k of another length": ({"k": torch.randn(1, 2, 2, 16)}, ValueError, "k is"),
    "v of another size": ({"v": torch.randn(1, 1, 2, 8)}, ValueError, "v is"),
    "another dtype": ({"q": torch.randn(1, 1, 4, 16).double()}, TypeError, "q is float64"),
    "sinks of another size": ({"sinks": torch.zeros(5)}, ValueError, "sinks is"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "a gradient": ({"q": torch.randn(1, 1, 4, 16, requires_grad=True)}, ValueError, "no_grad"),
    "a gradient of sinks": ({"sinks": torch.zeros(4, requires_grad=True)}, ValueError, "no_grad"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    cache = RingCache(1, 4, 2, 16)
    arguments = {"q": torch.randn(1, 1, 4, 16), "k": torch.randn(1, 1, 2, 16), "v": torch.randn(1, 1, 2, 16)}
    with pytest.raises(error, match=message):
        sliding_window_attention_step(**{"cache": cache, **arguments, **changes})
    assert cache.length == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 0, 2, 16), ValueError, "window is 0"),
        ((1, 4, 2.0, 16), TypeError, "kv_heads is 2.0"),
        ((-1, 4, 2, 16), ValueError, "batch is -1"),
    ],
)
def test_bad_cache(arguments, error, message):
    with pytest.raises(error, match=message):
        RingCache(*arguments)
    with pytest.raises(TypeError, match="dtype"):
        RingCache(1, 4, 2, 16, dtype=torch.int32)
