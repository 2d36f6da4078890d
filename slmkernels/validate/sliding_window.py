"""Random calls of `sliding_window_attention`, and the formula in PyTorch's own operations.

The backward takes delta = sum(dO O) from o as it was saved, rounded to dtype, as every flash attention
does. Where dP and delta cancel, that rounding is all that is left of dS; `rounding_of_delta` allows for it.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..ops.sliding_window.function import prepare, sliding_window_attention
from ..ops.sliding_window.reference import visible
from ..ops.sliding_window.step import RingCache, sliding_window_attention_step
from .draws import Draws, offsets
from .rule import Results, Tensors
from .subject import Options, Subject, step_by_step


def draw(d: Draws) -> Options:
    """Sizes and options of a random call."""
    sizes = d.heads() | {"D": d.size(), "V": d.size(300)}
    if d.flag(60):
        sizes["V"] = sizes["D"]
    if d.flag(30):
        lengths = d.lengths()
        sizes |= {"B": 1, "T": sum(lengths), "packed": offsets(lengths)}
        if d.flag(40):
            longer = [max(0, n + d.integer(-20, 30)) for n in lengths]
            sizes |= {"S": sum(longer), "packed_k": offsets(longer)}
    else:
        sizes |= {"B": d.integer(1, 2), "T": d.length()}
        if d.flag(30):
            sizes["S"] = max(0, sizes["T"] + d.integer(-70, 130))
    sides = (None, 0, d.integer(1, 20), d.integer(21, 150))
    pair = d.choice(sides), d.choice(sides)
    sizes["window"] = d.choice((None, d.window(), d.window(), pair))
    sizes["causal"] = isinstance(sizes["window"], int) or d.flag(40)
    sizes["softcap"] = d.choice((None, None, 0.7, 5.0, 30.0))
    return sizes | {"scale": d.choice((None, None, None, 0.05, -0.2)), "sinks": d.flag(30)}


def draw_steps(d: Draws) -> Options:
    """The same for decoding."""
    sizes = d.heads() | {"D": d.size(), "V": d.size(300), "B": d.integer(1, 3)}
    options = {
        "softcap": d.choice((None, None, 5.0)),
        "scale": d.choice((None, None, -0.2)),
        "sinks": d.flag(30),
    }
    return (
        sizes
        | options
        | {"split": d.split(), "window": d.choice((1, 2, d.integer(3, 12), d.integer(13, 90)))}
    )


def make(
    *, seed=0, B=1, T=70, S=None, H=2, group=1, D=32, V=32, sinks=False, packed=None, packed_k=None, **options
) -> tuple[Tensors, Options]:
    """Float64 tensors of one call, and its options."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    S, Hq = T if S is None else S, H * group
    tensors = {"q": normal(B, T, Hq, D), "k": normal(B, S, H, D), "v": normal(B, S, H, V)}
    tensors |= {"do": normal(B, T, Hq, V), "dlse": normal(B, Hq, T)}
    if sinks:
        tensors["sinks"] = normal(Hq)
    for name, starts in (("cu_seqlens", packed), ("cu_seqlens_k", packed_k)):
        if starts:
            options[name] = torch.tensor(starts, dtype=torch.int32)
    return tensors, options


def ours(backend: str):
    """`sliding_window_attention` on a backend."""

    def attend(q, k, v, **rest) -> Results:
        o, lse = sliding_window_attention(q, k, v, return_lse=True, backend=backend, **rest)
        return {"o": o, "lse": lse}

    return attend


def steps(backend: str):
    """`sliding_window_attention_step` on a backend."""

    def attend(q, k, v, split, window, causal=True, **rest) -> Results:
        (B, _, H, D), V = k.shape, v.shape[3]
        cache = RingCache(B, window, H, D, V, dtype=q.dtype, device=q.device)

        def step(**tokens):
            return sliding_window_attention_step(**tokens, cache=cache, backend=backend, **rest)

        return {"o": step_by_step(split, step, {"q": q, "k": k, "v": v})}

    return attend


def plain(q, k, v, *, sinks=None, left, right, scale, softcap) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch's own operations, every one of them in the inputs' dtype."""
    group = q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bhts", q * scale, k.repeat_interleave(group, 2))
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible(s.shape[2], s.shape[3], left, right, s.device), -torch.inf)
    sink = s.new_tensor(-torch.inf) if sinks is None else sinks.to(s.dtype)[:, None, None]
    s = torch.cat([s, sink.expand(*s.shape[:3], 1)], dim=-1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)[..., :-1]
    return torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(group, 2)), lse


def torch_same_dtype(
    *qkv, sinks=None, cu_seqlens=None, cu_seqlens_k=None, **options
) -> tuple[Tensor, Tensor]:
    """`plain` for each packed sequence: what PyTorch alone would give in this dtype."""
    call = prepare(*qkv, **options)
    kw = {name: getattr(call, name) for name in ("left", "right", "scale", "softcap")}
    if cu_seqlens is None:
        return plain(*qkv, sinks=sinks, **kw)
    q, k, v = qkv
    a, b = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    parts = [
        plain(q[:, i:j], k[:, m:n], v[:, m:n], sinks=sinks, **kw)
        for (i, j), (m, n) in zip(pairwise(a), pairwise(b), strict=True)
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def yardstick(q, k, v, **rest) -> Results:
    """`torch_same_dtype` by names."""
    return dict(zip(("o", "lse"), torch_same_dtype(q, k, v, **rest), strict=True))


def rounding_of_delta(q, k, do, o, dtype: torch.dtype, scale: float) -> dict[str, float]:
    """How far o's rounding to dtype can move each gradient: u sum|dO O| a row, times what multiplies dS."""
    if not (q.numel() and k.numel() and do.numel()):
        return {}
    rows = torch.finfo(dtype).eps / 2 * (do.double() * o).abs().sum(-1)  # [B, T, Hq]
    largest = rows.max().item() * abs(scale)
    return {
        "dq": largest * k.abs().max().item(),
        "dk": largest * q.abs().max().item(),
        "dsinks": rows.square().sum((0, 1)).sqrt().max().item(),
    }


def slack(tensors: Tensors, dtype: torch.dtype, options: Options) -> dict[str, float]:
    """`rounding_of_delta` of a call."""
    arguments = {name: tensors[name] for name in ("q", "k", "v", "sinks") if name in tensors}
    o, _ = sliding_window_attention(**arguments, return_lse=True, backend="reference", **options)
    q, scale = tensors["q"], options.get("scale")
    return rounding_of_delta(
        q, tensors["k"], tensors["do"], o, dtype, q.shape[3] ** -0.5 if scale is None else scale
    )


SUBJECT = Subject(draw, make, ours, yardstick, ours("reference"), slack, draw_steps=draw_steps, steps=steps)
