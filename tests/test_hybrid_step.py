"""Decoding over a ring and a state: any split into steps equals the full call, in constant memory."""

import pytest
import torch
from hybrid_cases import ALIGNMENTS, LEAVES, exact, make, torch_same_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import (
    DTYPES,
    TIERS,
    compare,
    every_backend,
    every_dtype,
    needs_native,
    on_threads,
    on_tier,
    rounded,
    same_bits,
)

from slmkernels import HybridCache, Unsupported, hybrid_attention, hybrid_attention_step
from slmkernels.ops.hybrid.reference import first_near
from slmkernels.ops.hybrid.step import FEW_TOKENS
from slmkernels.ring import Ring

every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)
TOKENS = ("q", "k", "v", "phi_q", "phi_k")
SPLITS = [
    [1] * 41, [3] * 13 + [2], [9, 9, 9, 14], [FEW_TOKENS, FEW_TOKENS + 1, 1, 0, 23], [20, 1, 1, 19], [40, 1],
    [41],
]  # fmt: skip


def cache_for(tensors, window, alignment):
    """An empty cache that fits."""
    (B, _, H, D), F, V = tensors["k"].shape, tensors["phi_k"].shape[3], tensors["v"].shape[3]
    return HybridCache(B, window, H, D, F, V, alignment=alignment, dtype=tensors["k"].dtype)


def held(cache):
    """Every tensor of a cache."""
    return {name: getattr(cache, name) for name in ("k", "v", "phi", "state", "normalizer", "position")}


def decode(tensors, split, backend, *, window, alignment, scale):
    """o and the states after decoding `split` tokens at a time; the cache's tensors stay where they are."""
    cache = cache_for(tensors, window, alignment)
    places, outputs, start = [x.data_ptr() for x in held(cache).values()], [], 0
    for n in split:
        parts = [tensors[name][:, start : start + n] for name in TOKENS]
        options = {"mix": tensors.get("mix"), "scale": scale, "backend": backend}
        outputs.append(hybrid_attention_step(*parts, cache, **options))
        start += n
        assert cache.length == start
    assert places == [x.data_ptr() for x in held(cache).values()]
    near = start - max(0, first_near(start - 1, window, alignment == "block"))
    for x, name in zip(cache.near(), ("k", "v", "phi_k"), strict=True):
        assert torch.equal(x, tensors[name][:, start - near : start])
    return {"o": torch.cat(outputs, dim=1), "state": cache.state, "normalizer": cache.normalizer}


def whole(tensors, attend, **options):
    """The same by one pass over all tokens."""
    arguments = {name: tensors[name] for name in LEAVES if name in tensors}
    return dict(zip(("o", "state", "normalizer"), attend(**arguments, **options), strict=True))


def check(dtype, split, backend, **case):
    tensors, options = make(T=sum(split), **case)
    tensors = rounded(tensors, dtype)
    double = {name: x.double() for name, x in tensors.items()}
    same, truth = whole(tensors, torch_same_dtype, **options), whole(double, exact, **options)
    compare(decode(tensors, split, backend, **options), same, truth, dtype)


@every_backend
@every_dtype
@every_alignment
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 50])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_equals_the_whole(split, window, alignment, dtype, backend):
    sizes = {"B": 2, "group": 2, "D": 20, "V": 12, "F": 6, "mix": window != 8}
    check(dtype, split, backend, window=window, alignment=alignment, **sizes)


@every_backend
@every_dtype
@every_alignment
@pytest.mark.parametrize(
    "case",
    [
        {"H": 1, "D": 1, "V": 1, "F": 1},
        {"H": 1, "group": 6, "D": 64, "V": 100, "F": 33, "scale": -0.3},
        {"D": 33, "V": 16, "F": 256, "zeros": True},
        {"D": 16, "V": 16, "equal_keys": True},
    ],
    ids=["one channel", "one key head", "many features", "equal keys"],
)
def test_sizes_and_extremes(case, alignment, dtype, backend):
    check(dtype, [1, 3, 9, 1, 10], backend, window=4, alignment=alignment, **case)


@needs_native
@given(
    split=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    window=st.integers(1, 40),
    alignment=st.sampled_from(ALIGNMENTS),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    D=st.integers(1, 40),
    V=st.integers(1, 40),
    F=st.integers(1, 40),
    mix=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=80)
def test_any_shape(split, dtype, **case):
    check(dtype, split, "native", **case)


@needs_native
@every_dtype
@every_alignment
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, alignment, dtype):
    with on_tier(tier):
        check(dtype, [1] * 40, "native", window=11, alignment=alignment, group=2, D=33, V=70, F=37)


@every_backend
@every_alignment
def test_a_long_way(alignment, backend):
    """A hundred wraps of the ring; what was rounded on the way does not pile up."""
    split = [1] * 5 + [120, 7, 1, 1, 230, 30, 6]
    check(torch.float32, split, backend, window=4, alignment=alignment, H=1, D=8, V=8, F=8)


@needs_native
@every_alignment
def test_same_bits_for_any_number_of_threads(alignment):
    tensors, options = make(B=2, T=16, H=4, group=2, window=5, alignment=alignment)
    tensors, results = rounded(tensors, torch.float32), []
    for n in (1, 2, 3):
        with on_threads(n):
            results.append(decode(tensors, [1, 1, 10, 1, 3], "native", **options))
    for other in results[1:]:
        same_bits(other, results[0])


@needs_native
@every_dtype
def test_strides(dtype):
    tensors, options = make(T=16, group=2, D=16, V=16, window=3)
    tensors = rounded(tensors, dtype)
    plain = decode(tensors, [1, 5, 10], "native", **options)
    tensors |= {name: tensors[name].mT.contiguous().mT for name in TOKENS}
    same_bits(decode(tensors, [1, 5, 10], "native", **options), plain)


@every_backend
@every_alignment
def test_constant_memory_and_reset(alignment, backend):
    tensors, _ = make(T=50, group=2, window=4, alignment=alignment)
    tensors = rounded(tensors, torch.float32)
    cache = cache_for(tensors, 4, alignment)
    before = {name: (x.shape, x.data_ptr()) for name, x in held(cache).items()}
    outputs = []
    for _ in range(2):
        for span in (slice(0, 1), slice(1, 30), slice(30, 35), slice(35, 50)):
            parts = [tensors[name][:, span] for name in TOKENS]
            o = hybrid_attention_step(*parts, cache, mix=tensors["mix"], backend=backend)
        outputs.append(o)
        cache.reset()
        assert cache.length == 0
    assert before == {name: (x.shape, x.data_ptr()) for name, x in held(cache).items()}
    assert torch.equal(*outputs)


@every_backend
@every_alignment
def test_the_past_that_is_far_is_only_in_the_state(alignment, backend):
    """What stands in a slot that is not near to the query may be anything."""
    tensors, _ = make(T=23, group=2, window=4, alignment=alignment)
    caches = [cache_for(tensors, 4, alignment) for _ in range(2)]
    outputs = []
    for cache, rubbish in zip(caches, (0.0, torch.nan), strict=True):
        for ring in cache.rings:
            ring.fill_(rubbish)
        parts = [[tensors[name][:, t : t + 1] for name in TOKENS] for t in range(23)]
        outputs += [torch.cat([hybrid_attention_step(*x, cache, backend=backend) for x in parts], 1)]
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


@every_backend
@every_alignment
@pytest.mark.parametrize("sizes", [{"B": 0, "T": 1}, {"B": 0, "T": 20}, {"B": 1, "T": 0}], ids=str)
def test_nothing_to_do(sizes, alignment, backend):
    tensors, _ = make(group=2, D=16, V=8, window=4, alignment=alignment, **sizes)
    cache = cache_for(tensors, 4, alignment)
    o = hybrid_attention_step(*(tensors[name] for name in TOKENS), cache, backend=backend)
    assert o.shape == tensors["do"].shape
    assert cache.length == 0
    assert not cache.state.any()


# --- PyTorch around it


@every_backend
def test_autocast_decodes_in_the_caches_dtype(backend):
    tensors, options = make(T=20, group=2, D=16, V=16, window=3)
    tensors = rounded(tensors, torch.float32)
    plain = decode(tensors, [1, 9, 10], backend, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = decode(tensors, [1, 9, 10], backend, **options)
    assert cast["o"].dtype == torch.float32
    same_bits(cast, plain)


@needs_native
@every_alignment
def test_opcheck(alignment):
    tensors, _ = make(T=7, group=2, D=16, V=8, alignment=alignment)
    tensors = rounded(tensors, torch.float32)
    cache = cache_for(tensors, 2, alignment)
    hybrid_attention_step(*(tensors[name][:, :5] for name in TOKENS), cache)
    tokens = [tensors[name][:, 5:] for name in TOKENS]
    op = torch.ops.slmkernels.hybrid_attention_step.default
    for mix in (None, tensors["mix"]):
        tail = (mix, 2, cache.block, 0.25)
        torch.library.opcheck(op, (*tokens, *(x.clone() for x in held(cache).values()), *tail))


@needs_native
@every_alignment
def test_compile_fullgraph(alignment):
    tensors, _ = make(T=6, D=16, V=16, alignment=alignment)
    tensors = rounded(tensors, torch.float32)
    caches = [cache_for(tensors, 2, alignment) for _ in range(2)]
    torch.compiler.reset()
    step = torch.compile(hybrid_attention_step, fullgraph=True)
    with torch.no_grad():
        for t in range(6):
            tokens = [tensors[name][:, t : t + 1] for name in TOKENS]
            eager = hybrid_attention_step(*tokens, caches[0], mix=tensors["mix"], backend="native")
            compiled = step(*tokens, caches[1], mix=tensors["mix"], backend="native")
            torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(held(caches[1]), held(caches[0]))


@needs_native
def test_an_earlier_graph_sees_that_the_state_changed():
    x = torch.rand(1, 3, 2, 16)
    cache = cache_for({"k": x, "v": x, "phi_k": x}, 1, "sliding")
    q, start = x.clone().requires_grad_(), (cache.state, cache.normalizer)
    o = hybrid_attention(q, x, x, x, x, window=2, initial_state=start, backend="native")
    with torch.no_grad():
        hybrid_attention_step(x, x, x, x, x, cache, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@needs_native
def test_raw_operator_refuses_what_does_not_fit():
    fits = {"q": (2, 4, 16), "k": (2, 2, 16), "v": (2, 2, 12), "phi_q": (2, 4, 6), "phi_k": (2, 2, 6)}
    fits = {name: torch.rand(1, *shape) for name, shape in fits.items()}
    fits |= held(HybridCache(1, 3, 2, 16, 6, 12))
    fits |= {"mix": torch.ones(4), "window": 3, "block": False, "scale": 0.25}
    step = torch.ops.slmkernels.hybrid_attention_step
    (q, k, v), position, state = (fits[name] for name in TOKENS[:3]), fits["position"], fits["state"]
    for change in (
        {"k_": k[:, :1]}, {"k_": k.double()}, {"v_": v[:, :, :1]}, {"phi_k_": fits["phi_k"][..., :5]},
        {"q": q[:, :, :3]}, {"phi_q": fits["phi_q"][:, :1]}, {"position": position - 5},
        {"position": position - 2**40}, {"position": position.int()}, {"position": position.T},
        {"state": state.double()}, {"state": state[..., :5]}, {"state": torch.zeros(1, 2, 12, 6).mT},
        {"normalizer": torch.zeros(1, 2, 5)}, {"window": 0}, {"window": 2}, {"window": 4}, {"block": True},
        {"k": fits["k"][:, :, :2]}, {"v": fits["v"].double()}, {"phi": fits["phi"][..., :5]},
        {"mix": torch.ones(2)}, {"mix": torch.ones(4).double()}, {"scale": torch.nan},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            step(*(fits | change).values())


# --- errors


def learned(*shape):
    return torch.zeros(*shape, requires_grad=True)


GRADIENTS = {"q": (4, 16), "k": (2, 16), "v": (2, 12), "phi_q": (4, 6), "phi_k": (2, 6)}
BAD = {
    "cache is a dict": ({"cache": {}}, TypeError, "cache is .* a HybridCache"),
    "q is no tensor": ({"q": 1.0}, TypeError, "q is"),
    "q of another batch": (
        {name: torch.zeros(2, 1, *shape) for name, shape in GRADIENTS.items()}, ValueError, "q is .* cache",
    ),
    "q of another size": (
        {"q": torch.zeros(1, 1, 4, 8), "k": torch.zeros(1, 1, 2, 8)}, ValueError, r"q is .* 16\] .* cache",
    ),
    "another dtype": (
        {name: torch.zeros(1, 1, *shape).double() for name, shape in GRADIENTS.items()},
        TypeError, "q is float64.*cache",
    ),
    "k of another length": ({"k": torch.zeros(1, 2, 2, 16)}, ValueError, "k is"),
    "k of another dtype": ({"k": torch.zeros(1, 1, 2, 16).half()}, TypeError, "k is float16"),
    "other key heads": (
        {"k": torch.zeros(1, 1, 4, 16), "v": torch.zeros(1, 1, 4, 12), "phi_k": torch.zeros(1, 1, 4, 6)},
        ValueError, "k is .* cache",
    ),
    "v of another size": ({"v": torch.zeros(1, 1, 2, 8)}, ValueError, "v is .* cache"),
    "v of another length": ({"v": torch.zeros(1, 2, 2, 12)}, ValueError, "v is"),
    "features of another size": (
        {"phi_q": torch.zeros(1, 1, 4, 8), "phi_k": torch.zeros(1, 1, 2, 8)}, ValueError, "phi_k is .* cache",
    ),
    "phi_q of another size": ({"phi_q": torch.zeros(1, 1, 4, 8)}, ValueError, "phi_k is"),
    "mix of other heads": ({"mix": torch.ones(2)}, ValueError, "mix is"),
    "mix a number": ({"mix": 1.0}, TypeError, "mix is 1.0"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale is nan"),
    **{
        f"a gradient of {name}": ({name: learned(1, 1, *shape)}, ValueError, f"{name} is .*no_grad")
        for name, shape in GRADIENTS.items()
    },
    "a gradient of mix": ({"mix": learned(4)}, ValueError, "mix is .*no_grad"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}  # fmt: skip


@every_alignment
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_leave_the_cache_alone(case, alignment):
    changes, error, message = BAD[case]
    cache = HybridCache(1, 2, 2, 16, 6, 12, alignment=alignment)
    tokens = {name: torch.ones(1, 1, *shape) for name, shape in GRADIENTS.items()}
    with torch.no_grad():
        hybrid_attention_step(**{name: x.expand(1, 9, -1, -1) for name, x in tokens.items()}, cache=cache)
    before = {name: x.clone() for name, x in held(cache).items()}
    with pytest.raises(error, match=message):
        hybrid_attention_step(**{**tokens, "cache": cache, **changes})
    same_bits(held(cache), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": -1}, ValueError, "batch is -1"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": (4, 0)}, TypeError, "window is"),
        ({"kv_heads": 2.0}, TypeError, "kv_heads is 2.0"),
        ({"head_dim": 0}, ValueError, "head_dim is 0"),
        ({"feature_dim": 0}, ValueError, "feature_dim is 0"),
        ({"v_head_dim": True}, TypeError, "v_head_dim is True"),
        ({"alignment": "blocks"}, ValueError, "alignment is 'blocks'"),
        ({"dtype": torch.int32}, TypeError, "dtype is"),
    ],
    ids=str,
)
def test_bad_cache(changes, error, message):
    sizes = {"batch": 1, "window": 4, "kv_heads": 2, "head_dim": 16, "feature_dim": 6}
    with pytest.raises(error, match=message):
        HybridCache(**{**sizes, **changes})


def test_a_backend_that_cannot():
    tokens = {name: torch.zeros(1, 1, *shape, device="meta") for name, shape in GRADIENTS.items()}
    cache = HybridCache(1, 2, 2, 16, 6, 12, device="meta")
    with pytest.raises(Unsupported, match="device meta"):
        hybrid_attention_step(**tokens, cache=cache, backend="native")


@every_alignment
def test_the_cache_says_what_it_is(alignment):
    cache = HybridCache(3, 5, 2, 16, 6, 12, alignment=alignment, dtype=torch.bfloat16)
    assert (cache.window, cache.alignment, cache.length) == (5, alignment, 0)
    assert isinstance(cache, Ring)
    slots = 10 if alignment == "block" else 5
    shapes = [(3, 2, slots, 16), (3, 2, slots, 12), (3, 2, slots, 6), (3, 2, 6, 12), (3, 2, 6), (3, 2)]
    assert [tuple(x.shape) for x in held(cache).values()] == shapes
    assert [x.dtype for x in (cache.k, cache.state, cache.normalizer)] == [torch.bfloat16] + [
        torch.float32
    ] * 2
    assert repr(cache).startswith(f"HybridCache(k=bfloat16[3, 2, {slots}, 16] on cpu")
    assert repr(cache).endswith(f"alignment='{alignment}')")
