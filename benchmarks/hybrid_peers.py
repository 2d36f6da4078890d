"""The peers of hybrid attention: PyTorch's quadratic and linear-cost forms, a step in PyTorch, yardsticks.

A yardstick runs window attention and linear attention one after the other, the latter over all keys and
without a normaliser, and adds their results: another function, of about the cost that one has without a fused
operation.
All take the layout [B, T, H, D]. A peer raises `Unavailable` with a reason where it cannot do a case.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slmkernels import (
    RingCache,
    linear_attention,
    linear_attention_step,
    sliding_window_attention,
    sliding_window_attention_step,
)
from slmkernels.ops.hybrid import reference

from .cases import Candidate, Inputs, Run, Unavailable
from .linear_peers import chunked
from .peers import sdpa_in_blocks

LEAVES = ("q", "k", "v", "phi_q", "phi_k")
LARGEST_WEIGHTS = 2**28  # elements of the dense weights; above, the quadratic form is left out


def hybrid_run(function: Callable[..., Tensor], inputs: Inputs, backward: bool) -> Run:
    """Run `function(q, k, v, phi_q, phi_k)` forward, or forward and backward."""
    leaves = [inputs[name].detach().clone().requires_grad_(backward) for name in LEAVES]

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            o = function(*leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, inputs["do"])) if backward else (o,)

    return Run(call)


def hybrid_peers(window: int, block: bool, backward: bool, compiles: bool = True) -> tuple[Candidate, ...]:
    """The peers of a window and an alignment; the ones that cannot do a case say so when prepared."""
    by_blocks = {"window": window, "block": block}
    table = {"quadratic PyTorch": _quadratic, "our reference, by blocks": _by_blocks}
    table |= {"by blocks, torch.compile": _compiled} if compiles else {}
    peers = [
        Candidate(name, partial(prepare, backward=backward, **by_blocks), prepare is _compiled)
        for name, prepare in table.items()
    ]
    # Block alignment: a window of as many keys as a query has near ones on average.
    width = window + window // 2 if block else window
    ours = f"sliding_window_attention (window {width}) + linear_attention (not normalised) of ours"
    theirs = "SDPA in blocks + chunked linear attention (not normalised), both in PyTorch"
    return (
        *peers,
        Candidate("window + linear, ours", partial(_separate_ours, width, backward), yardstick=ours),
        Candidate(
            "window + linear, PyTorch",
            partial(_separate_pytorch, backward=backward, **by_blocks),
            yardstick=theirs,
        ),
    )


# ---- the same function -------------------------------------------------------------------------------------


def quadratic(q, k, v, phi_q, phi_k, near: Tensor, far: Tensor) -> Tensor:
    """What LoLCATs trains with: all weights, near and far, dense.

    The scores are float32: rounded to bfloat16 they tie, and the gradient through the maximum goes astray.
    """
    group = q.shape[2] // k.shape[2]
    k, v, phi_k = (x.repeat_interleave(group, 2) for x in (k, v, phi_k))
    q, k, v, phi_q, phi_k = (x.transpose(1, 2) for x in (q, k, v, phi_q, phi_k))
    s = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # [B, H, T, T]
    s = s.masked_fill(~near, float("-inf"))
    w = torch.exp(s - s.amax(-1, keepdim=True)) + (phi_q @ phi_k.mT).masked_fill(~far, 0.0)
    w = w / (w.sum(-1, keepdim=True) + reference.EPS)
    return (w.to(v.dtype) @ v).transpose(1, 2)


def _quadratic(inputs: Inputs, window: int, block: bool, backward: bool) -> Run:
    B, T, Hq, _ = inputs["q"].shape
    if B * Hq * T * T > LARGEST_WEIGHTS:
        size = B * Hq * T * T * inputs["q"].element_size() / 2**30
        raise Unavailable(f"left out: its T x T weights take {size:.0f} GiB, several times over")
    j = torch.arange(T, device=inputs["q"].device)
    first, seen = reference.first_near(j[:, None], window, block), j <= j[:, None]
    masks = {"near": (j >= first) & seen, "far": j < first}
    return hybrid_run(partial(quadratic, **masks), inputs, backward)


def by_blocks(
    window: int, block: bool, attend: Callable = reference.hybrid_attention
) -> Callable[..., Tensor]:
    """Our reference in its form of linear cost, as a function of q, k, v, phi_q, phi_k."""

    def function(q, *tensors):
        return attend(q, *tensors, window=window, block=block, scale=q.shape[-1] ** -0.5)[0]

    return function


def _by_blocks(inputs: Inputs, window: int, block: bool, backward: bool) -> Run:
    return hybrid_run(by_blocks(window, block), inputs, backward)


def _compiled(inputs: Inputs, window: int, block: bool, backward: bool) -> Run:
    torch.compiler.reset()  # one compiled shape at a time: past its limit of recompilations it runs eagerly
    compiled = torch.compile(reference.hybrid_attention, fullgraph=True, dynamic=False)
    return hybrid_run(by_blocks(window, block, compiled), inputs, backward)


def decode_pytorch(inputs: Inputs) -> Run:
    """One token in plain PyTorch, all in place; the oldest near key enters the state. Without groups."""
    *tokens, scale = *(inputs[name] for name in LEAVES), inputs["q"].shape[-1] ** -0.5
    rings = [inputs[f"past_{name}"].transpose(1, 2).contiguous() for name in ("k", "v", "phi_k")]
    state, normalizer = inputs["state"].clone(), inputs["normalizer"].clone()
    W, slot = rings[0].shape[2], 0

    def call() -> tuple[Tensor, ...]:
        nonlocal slot
        with torch.no_grad():
            q, k, v, phi_q, phi_k = (x.transpose(1, 2) for x in tokens)  # [B, H, 1, .]
            keys, values, features = rings
            phi, value = features[:, :, slot].to(state.dtype), values[:, :, slot].to(state.dtype)
            state.add_(phi[..., :, None] * value[..., None, :])
            normalizer.add_(phi)
            for ring, new in zip(rings, (k, v, phi_k), strict=True):
                ring[:, :, slot] = new[:, :, 0]
            slot = (slot + 1) % W
            s = (q @ keys.mT).to(state.dtype) * scale  # [B, H, 1, W]
            w, phi = torch.exp(s - s.amax(-1, keepdim=True)), phi_q.to(state.dtype)
            sums = w.sum(-1, keepdim=True) + phi @ normalizer[..., None] + reference.EPS
            o = ((w.to(values.dtype) @ values).to(state.dtype) + phi @ state) / sums
        return (o.to(q.dtype).transpose(1, 2),)

    return Run(call)


# ---- yardsticks --------------------------------------------------------------------------------------------


def _separate(window: Callable[..., Tensor], linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum of both; linear attention has no more query than key heads, so that these are repeated."""

    def function(q, k, v, phi_q, phi_k):
        o, group = window(q, k, v), q.shape[2] // k.shape[2]
        if group > 1:
            v, phi_k = (x.repeat_interleave(group, 2) for x in (v, phi_k))
        return o + linear(phi_q, phi_k, v)

    return function


def _separate_ours(width: int, backward: bool, inputs: Inputs) -> Run:
    window = partial(sliding_window_attention, window=width)
    return hybrid_run(_separate(window, linear_attention), inputs, backward)


def _separate_pytorch(inputs: Inputs, window: int, block: bool, backward: bool) -> Run:
    def near(i: Tensor, j: Tensor) -> Tensor:
        return (j >= reference.first_near(i, window, block)) & (j <= i)

    return hybrid_run(_separate(sdpa_in_blocks(inputs["q"], window, near), chunked), inputs, backward)


def decode_separate(normalize: bool) -> Candidate:
    """Our window step and our linear step of the same token."""

    def prepare(inputs: Inputs) -> Run:
        q, k, v, phi_q, phi_k = (inputs[name] for name in LEAVES)
        past = inputs["past_k"], inputs["past_v"]
        (B, W, H, D), V = past[0].shape, v.shape[-1]
        cache = RingCache(B, W, H, D, V, dtype=k.dtype, device=k.device)
        cache.append(*past)
        state = inputs["state"].clone()
        linear = {"state": (state, inputs["normalizer"].clone()) if normalize else state}

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                o = sliding_window_attention_step(q, k, v, cache)
                return (o + linear_attention_step(phi_q, phi_k, v, **linear, normalize=normalize),)

        return Run(call)

    how = "normalised" if normalize else "not normalised"
    what = f"sliding_window_attention_step + linear_attention_step ({how}) of ours"
    return Candidate("two steps" + ", normalised" * normalize, prepare, yardstick=what)
