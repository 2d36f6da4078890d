"""The peers of attention: what people run today instead. Each gets its inputs in its own best layout.

A peer raises `Unavailable` with a reason where it cannot do a case, and is imported only where it can.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Candidate, Inputs, Run, Unavailable, first_line

LARGEST_MASK = 2**25  # elements of a dense T x S mask; above, a peer that needs one is left out
FLEX_BLOCK = 128


def _swap(x: Tensor) -> Tensor:
    """[B, T, H, D] <-> [B, H, T, D], packed in memory."""
    return x.transpose(1, 2).contiguous()


def attention_run(function: Callable[..., Tensor], inputs: Inputs, backward: bool, swap: bool = False) -> Run:
    """Run `function(q, k, v)` forward, or forward and backward; with `swap` in the layout [B, H, T, D]."""
    to = _swap if swap else Tensor.contiguous
    leaves = [to(inputs[name]).detach().requires_grad_(backward) for name in "qkv"]
    do = to(inputs["do"])

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            o = function(*leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, do)) if backward else (o,)

    return Run(call, _swap) if swap else Run(call)


def attention_peers(left: int | None, right: int | None, backward: bool) -> tuple[Candidate, ...]:
    """Every peer for a window (left, right); the ones that cannot do it say so when prepared."""
    table = {
        "SDPA band mask": _sdpa_band,
        "SDPA causal": _sdpa_causal,
        "SDPA blocked": _sdpa_blocked,
        "FlexAttention": _flex,
        "FlashAttention-4": _flash_attn_4,
        "flash-attn": _flash_attn,
        "fla parallel_attn": _fla,
    }
    peers = {name: partial(prepare, left, right, backward) for name, prepare in table.items()}
    peers = [Candidate(name, prepare, name == "FlexAttention") for name, prepare in peers.items()]
    if left is not None and right == 0:
        what = "flash attention of SDPA over all keys, without the window"
        peers.append(Candidate("SDPA full causal", partial(_sdpa_flash, backward), yardstick=what))
    return tuple(peers)


def _visible(i: Tensor, j: Tensor, left: int | None, right: int | None) -> Tensor:
    """Whether query i sees key j."""
    mask = torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=i.device)
    if left is not None:
        mask = mask & (j >= i - left)
    return mask if right is None else mask & (j <= i + right)


def _sdpa_band(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    if (left, right) == (None, 0):
        raise Unavailable("full causal attention needs no band mask")
    T, device = inputs["q"].shape[1], inputs["q"].device
    if T * T > LARGEST_MASK:
        raise Unavailable(f"left out: its {T} x {T} mask and scores take minutes or all of the memory")
    at = torch.arange(T, device=device)
    mask = _visible(at[:, None], at[None, :], left, right)
    sdpa = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    return attention_run(sdpa, inputs, backward, swap=True)


def _sdpa_causal(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    if (left, right) != (None, 0):
        raise Unavailable("it has no window")
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return attention_run(sdpa, inputs, backward, swap=True)


def _sdpa_flash(backward: bool, inputs: Inputs) -> Run:
    if inputs["q"].device.type != "cuda":
        raise Unavailable("timed on a CUDA device only")
    return attention_run(flash_causal, inputs, backward, swap=True)


def flash_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by SDPA's flash kernel or not at all, [B, H, T, D]."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa_in_blocks(
    q: Tensor, C: int, visible: Callable[[Tensor, Tensor], Tensor], ahead: bool = False
) -> Callable[..., Tensor]:
    """Blocks of C queries against their own keys and the neighbouring blocks', through one batched SDPA.

    The best that PyTorch alone does for a window. In [B, T, H, D] the blocks are views, so that only the
    keys' neighbours are copied.

    Args:
        q: the queries' shape and device.
        C: tokens of a block.
        visible: whether the query at position i sees the key at position j; it does not past the neighbours.
        ahead: also the block after.
    """
    (B, T), device = q.shape[:2], q.device
    if T % C:
        raise Unavailable(f"T={T} is no multiple of its blocks of {C}")
    n, span = T // C, (2 + ahead) * C
    first = torch.arange(n, device=device)[:, None, None] * C
    i = first + torch.arange(C, device=device)[:, None]  # [n, C, 1]
    j = first + torch.arange(span, device=device) - C  # [n, 1, span]
    mask = visible(i, j) & (j >= 0) & (j < T)  # [n, C, span]
    mask = mask[:, None].repeat(B, 1, 1, 1)  # [B * n, 1, C, span]

    def with_neighbours(x: Tensor) -> Tensor:
        blocks = x.view(B, n, C, *x.shape[2:])
        padded = F.pad(blocks, (0, 0, 0, 0, 0, 0, 1, int(ahead)))
        parts = [padded[:, shift : shift + n] for shift in range(2 + ahead)]
        return torch.cat(parts, dim=2).view(B * n, span, *x.shape[2:]).transpose(1, 2)

    def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = q.view(B * n, C, *q.shape[2:]).transpose(1, 2)
        keys, values = with_neighbours(k), with_neighbours(v)
        o = F.scaled_dot_product_attention(blocks, keys, values, attn_mask=mask, enable_gqa=True)
        return o.transpose(1, 2).reshape(q.shape)

    return blocked


def _sdpa_blocked(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    if left is None or right is None:
        raise Unavailable("it needs a window that is bounded on both sides")
    C = max(left + (right == 0), right, 1)  # a block; its window reaches no further than the blocks beside it
    blocked = sdpa_in_blocks(inputs["q"], C, partial(_visible, left=left, right=right), right > 0)
    return attention_run(blocked, inputs, backward)


def flex_block_mask(T: int, left: int | None, right: int | None, device: torch.device):
    """The window as a FlexAttention BlockMask, from block arithmetic: nothing of size T x T is made."""
    from torch.nn.attention.flex_attention import BlockMask

    n = -(-T // FLEX_BLOCK)
    first = torch.arange(n, device=device) * FLEX_BLOCK
    last = first + FLEX_BLOCK - 1
    partly = torch.ones(n, n, dtype=torch.bool, device=device)
    wholly = (last[:, None] < T) & (last[None, :] < T)
    if left is not None:
        partly &= last[None, :] >= first[:, None] - left
        wholly &= first[None, :] >= last[:, None] - left
    if right is not None:
        partly &= first[None, :] <= last[:, None] + right
        wholly &= last[None, :] <= first[:, None] + right

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(dim=1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    def mask_mod(b, h, i, j):
        seen = j >= 0
        seen = seen if left is None else seen & (j >= i - left)
        return seen if right is None else seen & (j <= i + right)

    return BlockMask.from_kv_blocks(
        *listed(partly & ~wholly), *listed(wholly), FLEX_BLOCK, mask_mod, seq_lengths=(T, T)
    )


def _flex(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    q = inputs["q"]
    if backward and q.device.type == "cpu":
        raise Unavailable("FlexAttention has no backward on CPU")
    torch.compiler.reset()  # one compiled shape at a time: past its limit of recompilations it runs eagerly
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    block_mask = flex_block_mask(q.shape[1], left, right, q.device)
    flex = partial(compiled, block_mask=block_mask, enable_gqa=q.shape[2] != inputs["k"].shape[2])
    return attention_run(flex, inputs, backward, swap=True)


def gpu_library(module: str, function: str, device: torch.device) -> Callable:
    """A function of a library that is for CUDA only."""
    if device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    except Exception as error:  # they compile, look for drivers and more while they are imported
        raise Unavailable(f"does not import: {first_line(error)}") from error


def _flash_attn(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    function = gpu_library("flash_attn", "flash_attn_func", inputs["q"].device)
    if inputs["q"].dtype == torch.float32:
        raise Unavailable("has no float32 kernels")
    window = tuple(-1 if side is None else side for side in (left, right))
    return attention_run(partial(function, causal=right == 0, window_size=window), inputs, backward)


def _flash_attn_4(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    """Its CuTe DSL kernels, compiled at the first call."""
    function = gpu_library("flash_attn.cute", "flash_attn_func", inputs["q"].device)
    if inputs["q"].dtype == torch.float32:
        raise Unavailable("has no float32 kernels")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, causal=right == 0, window_size=(left, right))[0]

    return attention_run(attend, inputs, backward)


def _fla(left: int | None, right: int | None, backward: bool, inputs: Inputs) -> Run:
    function = gpu_library("fla.ops.attn.parallel", "parallel_attn", inputs["q"].device)
    if right != 0:
        raise Unavailable("causal only")
    window = None if left is None else left + 1
    return attention_run(partial(function, window_size=window), inputs, backward)


def decode_sdpa(inputs: Inputs) -> Run:
    """One token by plain PyTorch: write its key and value into a ring slot, then SDPA over the whole ring."""
    q, k, v = (_swap(inputs[name]) for name in "qkv")
    k_ring, v_ring = _swap(inputs["past_k"]), _swap(inputs["past_v"])
    W, slot = k_ring.shape[2], 0

    def call() -> tuple[Tensor, ...]:
        nonlocal slot
        with torch.no_grad():
            k_ring[:, :, slot : slot + 1] = k
            v_ring[:, :, slot : slot + 1] = v
            slot = (slot + 1) % W
            return (F.scaled_dot_product_attention(q, k_ring, v_ring, enable_gqa=True),)

    return Run(call, _swap)
