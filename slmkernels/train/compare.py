"""The same model on PyTorch's own attention, and the time of a training step beside ours."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..models import SmallLM
from ..nn import SlidingWindowAttention
from ..ops.sliding_window.function import sliding_window_attention, window_bounds
from ..ops.sliding_window.reference import visible


@contextlib.contextmanager
def use_attention(model: torch.nn.Module, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Run every `SlidingWindowAttention` of a model on another attention function, of the same signature."""
    layers = [module for module in model.modules() if isinstance(module, SlidingWindowAttention)]
    before = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = attend
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer.attend = function


# bool [T, T], true where a key is visible; made once a shape
band_mask = functools.lru_cache(maxsize=16)(visible)


def sdpa_band(q: Tensor, k: Tensor, v: Tensor, *, window=None, causal=True, backend=None, **others) -> Tensor:
    """`F.scaled_dot_product_attention` with the window as a mask, made once; no mask where causal is enough.

    q `[B, T, Hq, D]`, k and v `[B, T, Hkv, D]` -> `[B, T, Hq, D]`. `backend` is ours and says nothing here.

    Raises:
        NotImplementedError: softcap, sinks or packed sequences.
    """
    _only_plain("SDPA", others)
    T = q.shape[1]
    left, right = window_bounds(window, causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    wide = left is None or left >= T - 1
    if wide and right == 0:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        mask = band_mask(T, T, left, right, q.device)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return o.transpose(1, 2)  # [B, T, Hq, D]


def flex(q: Tensor, k: Tensor, v: Tensor, *, window=None, causal=True, backend=None, **others) -> Tensor:
    """FlexAttention with the window as a block mask, compiled; shapes as `sdpa_band`.

    Raises:
        NotImplementedError: what it cannot do, such as a backward on the CPU.
    """
    _only_plain("FlexAttention", others)
    left, right = window_bounds(window, causal)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, H, T, D]
    block_mask = _block_mask(q.shape[2], left, right, q.device)
    refuses = q.device.type == "cpu" and q.requires_grad  # and says why, unless the compiler wraps its words
    run = flex_attention if refuses else _compiled_flex()
    return run(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _block_mask(T: int, left: int | None, right: int | None, device: torch.device):
    def inside(b, h, i, j):
        mask = j >= (i - left if left is not None else 0)
        return mask & (j <= i + right) if right is not None else mask

    return create_block_mask(inside, None, None, T, T, device=device)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)


def _only_plain(name: str, others: dict) -> None:
    for argument, value in others.items():
        if value is not None:
            raise NotImplementedError(f"{name} is compared without {argument}")


ATTENTIONS = {
    "slmkernels": sliding_window_attention,
    "SDPA with a band mask": sdpa_band,
    "FlexAttention": flex,
}


def training_step_times(
    model: SmallLM, tokens: Tensor, targets: Tensor, runs: int = 7
) -> dict[str, float | str]:
    """Median seconds of a forward and backward on each of `ATTENTIONS`, or why it cannot run.

    The runs are interleaved, so that other work on the machine falls on all alike.
    """

    def step() -> float:
        start = time.perf_counter()
        model(tokens, targets)[1].backward()
        model.zero_grad()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name, attend in ATTENTIONS.items():
        try:
            with use_attention(model, attend):
                step()  # warm up
            seconds[name] = []
        except NotImplementedError as error:
            reasons[name] = str(error).split(". ")[0]
            model.zero_grad()
    for _ in range(runs):
        for name, times in seconds.items():
            with use_attention(model, ATTENTIONS[name]):
                times.append(step())
    return {**{name: statistics.median(times) for name, times in seconds.items()}, **reasons}


def report(times: dict[str, float | str]) -> str:
    """The times as lines to print, with the ratio to ours."""
    ours = times["slmkernels"]
    lines = []
    for name, time_or_reason in times.items():
        if isinstance(time_or_reason, str):
            lines.append(f"  {name:<24} cannot run: {time_or_reason}")
        else:
            lines.append(f"  {name:<24} {time_or_reason * 1e3:8.1f} ms   {time_or_reason / ours:5.2f} x ours")
    return "\n".join(lines)
