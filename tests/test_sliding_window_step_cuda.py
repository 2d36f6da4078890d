"""The CUDA kernel of the decode step on the CPU executor, against the float64 reference."""

import itertools

import pytest
import torch
from executor import operators
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import EPS

from slmkernels import RingCache
from slmkernels.ops.sliding_window import reference, step

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensors(B, n, H, group, D, Dv, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, n, H * group, D), (B, n, H, D), (B, n, H, Dv))
    return [torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def a_ring(B, W, H, D, Dv, past, dtype):
    """A ring that has seen `past` tokens; nobody may look at the slots that none of them fills."""
    cache = RingCache(B, W, H, D, Dv, dtype=dtype)
    _, k, v = tensors(B, max(past, 1), H, 1, D, Dv, dtype, seed=1)
    for x in cache.rings:
        x.fill_(torch.nan)
    cache.append(k[:, :past], v[:, :past])
    return cache


def advance(op, q, k, v, cache, sinks=None, softcap=0.0, scale=None, dtype=None):
    """o and the ring after a step, computed in `dtype` (None: the tensors' own) from a copy of the ring."""
    parts = [x.to(dtype or x.dtype).clone() for x in (q, k, v, *cache.rings)]
    position = cache.position.clone()
    high = torch.promote_types(parts[0].dtype, torch.float32)
    sinks = None if sinks is None else sinks.to(high)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = op(*parts, position, sinks, scale, softcap)
    return o, parts[3], parts[4], position


def by_the_reference(*arguments):
    *tensors, softcap = arguments
    return reference.sliding_window_attention_step(*tensors, softcap or None)


def in_plain_torch(q, k, v, k_ring, v_ring, position, sinks, scale, softcap):
    """PyTorch's own operations in the tensors' dtype."""
    group, W, outputs = q.shape[2] // k.shape[2], k_ring.shape[2], []
    for t in range(q.shape[1]):
        slot = int(position[0, 0] + t) % W
        k_ring[:, :, slot], v_ring[:, :, slot] = k[:, t], v[:, t]
        n = min(int(position[0, 0]) + t + 1, W)
        keys, values = (x[:, :, :n].repeat_interleave(group, 1) for x in (k_ring, v_ring))  # [B, Hq, n, .]
        s = torch.einsum("bhd,bhnd->bhn", q[:, t] * scale, keys)
        s = softcap * torch.tanh(s / softcap) if softcap else s
        if sinks is not None:
            s = torch.cat([s, sinks.to(s.dtype)[None, :, None].expand(*s.shape[:2], 1)], 2)
        p = torch.softmax(s, 2)[..., :n]
        outputs.append(torch.einsum("bhn,bhnd->bhd", p, values))
    position += q.shape[1]
    return torch.stack(outputs, 1)


def check(B, n, H, group, D, Dv, W, past, dtype, **options):
    q, k, v = tensors(B, n, H, group, D, Dv, dtype)
    cache = a_ring(B, W, H, D, Dv, past, dtype)
    kernel = operators().sliding_window_step
    ours = advance(kernel, q, k, v, cache, **options)
    truth = advance(by_the_reference, q, k, v, cache, dtype=torch.float64, **options)
    plain = advance(in_plain_torch, q, k, v, cache, **options)
    error, allowed = ((x[0].double() - truth[0]).abs().max().item() for x in (ours, plain))
    allowed = 2 * allowed + EPS[dtype] * max(1.0, truth[0].abs().max().item())
    assert ours[0].dtype == dtype
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    for got, expected in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    again = advance(kernel, q, k, v, cache, **options)
    assert torch.equal(ours[0], again[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_every_kernel(group, D, dtype):
    check(1, 1, 1, group, D, D, 70, 100, dtype)
    check(1, 1, 1, group, D, D, 256, 300, dtype)


@pytest.mark.parametrize("past", [0, 1, 39, 40, 127, 128, 255, 256, 257, 600, 2**40], ids=str)
def test_wherever_the_position_is(past):
    """One block a ring, and two splits, on either side of which the new slot lies."""
    for W in (40, 256):
        if past < 2**40:
            check(1, 1, 2, 2, 16, 16, W, past, torch.bfloat16)
            continue
        q, k, v = tensors(1, 1, 2, 2, 16, 16, torch.bfloat16)
        cache = a_ring(1, W, 2, 16, 16, W, torch.bfloat16)
        cache.position += past  # a multiple of neither
        o, *_, position = advance(operators().sliding_window_step, q, k, v, cache)
        truth, *_ = advance(by_the_reference, q, k, v, cache, dtype=torch.float64)
        torch.testing.assert_close(o.double(), truth, rtol=0, atol=2e-2)
        assert (position == past + W + 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_softcap_scale(dtype):
    sinks = torch.tensor([0.5, -1.0, 3.0, -torch.inf, 9.0, 0.0], dtype=torch.float64)
    for W, softcap in itertools.product((20, 257), (0.0, 1.3)):
        check(2, 1, 2, 3, 24, 40, W, 30, dtype, sinks=sinks, softcap=softcap, scale=-0.7)


@given(
    B=st.integers(1, 2),
    n=st.integers(1, 8),
    H=st.integers(1, 2),
    group=st.integers(1, 11),
    D=st.integers(1, 6),
    Dv=st.integers(1, 6),
    W=st.integers(1, 400),
    past=st.integers(0, 600),
    dtype=st.sampled_from(DTYPES),
    sinks=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=20)
def test_any_shape(B, n, H, group, D, Dv, W, past, dtype, sinks, softcap):
    logits = torch.randn(H * group, generator=torch.Generator().manual_seed(2)) if sinks else None
    check(B, n, H, group, 8 * D, 8 * Dv, W, past, dtype, sinks=logits, softcap=softcap)


def test_a_group_beyond_one_block():
    """Heads of one ring in several blocks, with and without splits."""
    for W in (30, 270):
        check(1, 2, 1, 19, 16, 8, W, 40, torch.float16)


def test_long_rings_are_split():
    check(1, 1, 1, 1, 16, 16, 1200, 3000, torch.bfloat16)


def test_strides():
    q, k, v = tensors(2, 2, 2, 2, 16, 16, torch.bfloat16)
    cache = a_ring(2, 20, 2, 16, 16, 33, torch.bfloat16)
    kernel = operators().sliding_window_step
    expected = advance(kernel, q, k, v, cache)[0]
    position = cache.position.clone()

    def other(x, kind):
        if kind == "transposed":
            return x.mT.contiguous().mT
        wide = torch.full((*x.shape[:-1], 40), torch.nan, dtype=x.dtype)
        start = 8 if kind == "aligned" else 3
        wide[..., start : start + 16] = x
        return wide[..., start : start + 16]

    for kind in ("transposed", "aligned", "misaligned"):
        rings = [x.clone() for x in cache.rings]
        o = kernel(*(other(x, kind) for x in (q, k, v)), *rings, position.clone(), None, 0.25, 0.0)
        assert torch.equal(o, expected), kind


def test_what_is_not_finite_stays_in_its_head():
    q, k, v = tensors(1, 1, 2, 2, 16, 16, torch.float32)
    cache = a_ring(1, 300, 2, 16, 16, 400, torch.float32)
    expected = advance(operators().sliding_window_step, q, k, v, cache)[0]
    cache.k[0, 1, 290] = torch.nan
    o = advance(operators().sliding_window_step, q, k, v, cache)[0]
    assert torch.equal(o[:, :, :2], expected[:, :, :2])
    assert o[:, :, 2:].isnan().all()


def test_nothing_to_do():
    for B, n in ((0, 1), (1, 0)):
        q, k, v = tensors(B, n, 2, 2, 16, 8, torch.bfloat16)
        cache = RingCache(B, 20, 2, 16, 8, dtype=torch.bfloat16)
        o, *_, position = advance(operators().sliding_window_step, q, k, v, cache)
        assert o.shape == (B, n, 4, 8)
        assert not position.any()


def test_refuses_what_does_not_fit():
    op = operators().sliding_window_step
    q, k, v = tensors(1, 1, 2, 2, 16, 16, torch.float32)
    cache = RingCache(1, 20, 2, 16)
    good = {"q": q, "k": k, "v": v, "k_ring": cache.k, "v_ring": cache.v, "position": cache.position}
    good |= {"sinks": None, "scale": 0.25, "softcap": 0.0}
    wide = torch.zeros(1, 2, 20, 264), torch.zeros(1, 1, 2, 264)
    for changes, message in (
        ({"k": k[:, :, :1]}, "do not fit"),
        ({"q": q.double()}, "one dtype"),
        ({name: good[name].double() for name in ("q", "k", "v", "k_ring", "v_ring")}, "q must be"),
        ({"position": cache.position.int()}, "position"),
        ({"k_ring": cache.k.mT.contiguous().mT}, "contiguous"),
        ({"k_ring": torch.zeros(1 + cache.k.numel())[1:].view(cache.k.shape)}, "aligned"),
        ({"v": v[..., :12], "v_ring": cache.v[..., :12].contiguous()}, "multiples of 8"),
        ({"v_ring": wide[0], "v": wide[1]}, "up to 256"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"softcap": -1.0}, "softcap"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*(good | changes).values())


def a_call(n=1, dtype=torch.bfloat16, D=64, Dv=64, **options):
    q, k, v = tensors(1, n, 2, 2, D, Dv, dtype)
    return step.prepare(q, k, v, RingCache(1, 16, 2, D, Dv, dtype=dtype), **options)


def test_reasons_against_the_kernel():
    for case in ({}, {"dtype": torch.float32}, {"D": 8, "Dv": 256}, {"n": 8}, {"softcap": 2.0}):
        assert step.reason_against_cuda(a_call(**case)) is None
    for case, message in (
        ({"dtype": torch.float64}, "float64"),
        ({"D": 60}, "head dimension 60"),
        ({"Dv": 264}, "head dimension 264"),
    ):
        assert message in step.reason_against_cuda(a_call(**case))
    assert step.reason_against_native(a_call()) is None  # on the CPU
    wide = a_call(n=9)
    assert step.reason_against_native(wide) == step.SUPPORTS["native"](step.full_call(wide))
