"""Sliding-window attention in Triton: tile choice, launchers, operator registration.

The kernels and their story stand in `triton_forward.py` and `triton_backward.py`; they are imported only
where Triton is, so that this file always imports and `reason_against` can say what is missing.

Tiles follow the window. A tile of BLOCK_M queries computes about W + BLOCK_M columns a row (rounded up to
BLOCK_N) where W count, so that 64 x 64 wastes 11 % at W = 512, and 192 x 128, the tile of kernels made for
full attention, 33 %. Up to W = 512 small tiles win on work; above, larger ones read K and V less often.

One tile for a shape, from `config`: the bits of a result then depend on nothing measured.
SLMKERNELS_AUTOTUNE=1 in the environment measures the `candidates` instead on the first call of each
(kernel, head sizes, dtype, window bucket); bits may then differ between processes. Nothing is keyed by a
length: one compiled kernel serves all.
"""

import torch
from torch import Tensor

from ...triton_support import (
    ABSENT,
    AUTOTUNE,
    INTERPRETED,
    LOG2_E,
    architecture,
    autotuned,
    padded,
    positive,
    readable,
)

if ABSENT is None:
    import triton

    from . import triton_backward, triton_forward


# ---- tiles -------------------------------------------------------------------------------------------------


def bucket(window: int) -> int:
    """Windows that share their tiles: the next power of two, from 128 to 4096."""
    return min(4096, max(128, 1 << (window - 1).bit_length()))


def _named(tile: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))


def candidates(
    kind: str, window: int, D: int, DV: int, dtype: torch.dtype, arch: int
) -> list[tuple[int, int, int, int]]:
    """Tiles (BLOCK_M, BLOCK_N, num_warps, num_stages) for kernel "forward", "dq" or "dkv", the default first.

    The defaults compile without spilled registers, and within 99 KiB of shared memory where `arch` may have
    no more (8.x, 12.x): tests/test_sliding_window_aot.py holds them to it. On 9.x and 10.x the tensor cores
    read their operands from shared memory, which leaves registers for larger tiles.
    """
    size, long = max(64, padded(D), padded(DV)), bucket(window) > 512
    mma = "sync" if arch < 90 or arch >= 120 else "async"
    if dtype == torch.float32:  # products without tensor cores: small tiles, or the registers spill
        first = {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)}
        if kind == "dkv":
            first |= {64: (16, 32, 4, 1), 128: (16, 16, 8, 1)}
        others = [(16, 16, 8, 1), (32, 16, 4, 1), (32, 32, 8, 1)]
        return [first[size], *(row for row in others if row != first[size])]
    table = {
        ("forward", 64): [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3)],
        ("forward", 128): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
        ("forward", 256): [(64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)],
        ("dq", 64, "sync"): [(64, 32, 4, 3), (64, 64, 8, 3), (128, 64, 8, 2)],
        ("dq", 64, "async"): [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3)],
        ("dq", 128): [(64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
        ("dq", 256): [(64, 32, 8, 1), (64, 16, 4, 2), (64, 64, 8, 1)],
        ("dkv", 64, "sync"): [(64, 32, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2)],
        ("dkv", 64, "async"): [(64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2)],
        ("dkv", 128, "sync"): [(32, 64, 8, 2), (64, 64, 8, 2), (32, 64, 4, 1)],
        ("dkv", 128, "async"): [(32, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
        ("dkv", 256): [(16, 64, 8, 1), (32, 64, 8, 1), (16, 32, 4, 1)],
    }
    rows = table.get((kind, size)) or table[kind, size, mma]
    if kind == "dkv" and size == 128 and mma == "sync" and padded(D) != padded(DV):
        rows = [(32, 32, 4, 2), *rows]  # ptxas spills kilobytes for the unequal sizes of any larger tile
    if kind == "forward" and long and size <= 128:
        first = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2 if mma == "sync" else 3)}[size]
        rows = [first, *(row for row in rows if row != first)]
    return rows


def config(kind: str, window: int, D: int, DV: int, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """The default tile: what runs unless SLMKERNELS_AUTOTUNE=1."""
    return _named(candidates(kind, window, D, DV, dtype, arch)[0])


def delta_config(DV_PAD: int) -> dict[str, int]:
    """Tile of the row sums; nothing to choose, it is bound by memory."""
    return {"BLOCK_M": 64 if DV_PAD <= 64 else 32, "num_warps": 4, "num_stages": 1}


def step_config(rows: int, D_PAD: int, DV_PAD: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the decode step for n * G rows: the few rows tl.dot takes until there are many.

    There are only B * Hkv programs, each waiting on memory: 8 warps and deep loads rather than many blocks.
    """
    size, few = max(64, D_PAD, DV_PAD), rows <= 16
    if dtype == torch.float32:
        tile = (16, 32 if size == 64 else 16, 4 if size <= 128 else 8, 1)
    else:
        small = {64: (16, 64, 8, 3), 128: (16, 64, 8, 2), 256: (16, 32, 8, 2)}
        large = {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)}
        tile = (small if few else large)[size]
    return _named(tile)


def _launch(kernel, kind: str, tiles, heads: int, window: int, q: Tensor, args: list, sizes: dict) -> None:
    """Run `kernel` on `tiles(blocks)` x `heads` programs; a 1-D grid, whose limit is 2^31 and not 65535."""
    choice = (kind, bucket(window), sizes["D"], sizes["DV"], q.dtype, architecture(q.device))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if AUTOTUNE and not INTERPRETED:
            measured = tuple(tuple(_named(tile).items()) for tile in candidates(*choice))
            autotuned(kernel, measured, *choice)[lambda meta: (tiles(meta) * heads,)](*args, **sizes)
        else:
            tile = config(*choice)
            kernel[(tiles(tile) * heads,)](*args, **sizes, **tile)


# ---- launchers ---------------------------------------------------------------------------------------------


def _bounds(T: int, S: int, left: int, right: int) -> tuple[int, int]:
    """Unbounded sides as bounds that hide nothing; all cut to the lengths, lest int32 sums overflow."""
    return (S if left < 0 else min(left, S)), (T if right < 0 else min(right, T))


def _units(scale: float, softcap: float) -> tuple[float, float]:
    """(inner, unit): a score in log2 units is x * unit, x = q.k, or x = tanh(q.k * inner) with a softcap."""
    return (scale / softcap, softcap * LOG2_E) if softcap else (0.0, scale * LOG2_E)


def _sizes(q: Tensor, v: Tensor, softcap: float) -> dict[str, int | bool]:
    H, D, DV = v.shape[2], q.shape[3], v.shape[3]
    return {
        "H": H,
        "G": q.shape[2] // H,
        "D": D,
        "DV": DV,
        "D_PAD": padded(D),
        "DV_PAD": padded(DV),
        "SOFTCAP": softcap > 0,
    }


def _tiles(length: int, block: str, cu_seqlens: Tensor | None):
    """Tiles along a length as a function of the block sizes; see "Packed sequences" in triton_forward.py."""
    if cu_seqlens is None:
        return lambda meta: triton.cdiv(length, meta[block])
    return lambda meta: length // meta[block] + cu_seqlens.shape[0] - 1


def _sequences(cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None):
    """(cu_q, cu_k, N), contiguous."""
    if cu_seqlens is None:
        return None, None, 0
    cu_q = cu_seqlens.contiguous()
    return cu_q, (cu_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()), cu_q.shape[0] - 1


def forward(q, k, v, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap) -> tuple[Tensor, Tensor]:
    B, T, Hq, _ = q.shape
    S = k.shape[1]
    o = q.new_empty(B, T, Hq, v.shape[3])
    lse = q.new_empty(B, Hq, T, dtype=torch.float32)
    if o.numel() == 0 and lse.numel() == 0:
        return o, lse
    left, right = _bounds(T, S, left, right)
    cu_q, cu_k, N = _sequences(cu_seqlens, cu_seqlens_k)
    q, scale = (q, scale) if softcap else positive(q, scale)
    q, k, v = readable(q), readable(k), readable(v)
    sinks = None if sinks is None else sinks.contiguous()
    args = [q, k, v, sinks, o, lse, cu_q, cu_k, T, S, N, left, right, *_units(scale, softcap)]
    args += [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    tiles = _tiles(T, "BLOCK_M", cu_q)
    window = left + right + 1
    _launch(triton_forward.forward_kernel, "forward", tiles, B * Hq, window, q, args, _sizes(q, v, softcap))
    return o, lse


def backward(
    do, dlse, q, k, v, o, lse, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, Hq, _ = q.shape
    S, H = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if B * T * Hq == 0:
        return dq, dk.zero_(), dv.zero_(), lse.new_zeros(0 if sinks is None else Hq)
    left, right = _bounds(T, S, left, right)
    cu_q, cu_k, N = _sequences(cu_seqlens, cu_seqlens_k)
    do, q, k, v = readable(do), readable(q), readable(k), readable(v)
    sizes = _sizes(q, v, softcap)
    DV, DV_PAD = sizes["DV"], sizes["DV_PAD"]

    delta = torch.empty_like(lse)
    tile = delta_config(DV_PAD)
    tiles = triton.cdiv(T, tile["BLOCK_M"])
    parts = None if sinks is None else lse.new_empty(Hq, B * tiles)
    dlse = None if dlse is None else dlse.float().contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    with torch.cuda.device_of(q):
        args = [o, do, lse, dlse, sinks, delta, parts, T, *do.stride()[:3]]
        triton_backward.delta_kernel[(tiles * B * Hq,)](*args, HQ=Hq, DV=DV, DV_PAD=DV_PAD, **tile)
    dsinks = lse.new_empty(0) if parts is None else parts.sum(1)

    tail = [cu_q, cu_k, T, S, N, left, right, scale, *_units(scale, softcap)]
    for x in (q, k, v, do):
        tail += x.stride()[:3]
    window = left + right + 1
    shared = [q, k, v, do, lse, delta]
    tiles_q, tiles_k = _tiles(T, "BLOCK_M", cu_q), _tiles(S, "BLOCK_N", cu_k)
    _launch(triton_backward.dq_kernel, "dq", tiles_q, B * Hq, window, q, [*shared, dq, *tail], sizes)
    if S > 0:
        _launch(triton_backward.dkv_kernel, "dkv", tiles_k, B * H, window, q, [*shared, dk, dv, *tail], sizes)
    return dq, dk, dv, dsinks


def step(q, k, v, k_ring, v_ring, position, sinks, scale, softcap) -> Tensor:
    """Append n tokens to the rings and attend, one launch: a program per (batch, key-value head)."""
    B, n, Hq, _ = q.shape
    H, W = k_ring.shape[1], k_ring.shape[2]
    o = q.new_empty(B, n, Hq, v.shape[3])
    if B * n * Hq == 0:
        return o
    for name, ring in (("k_ring", k_ring), ("v_ring", v_ring)):
        if ring.shape[3] > 1 and ring.stride(3) != 1:
            raise ValueError(f"{name} has strides {ring.stride()}; expected 1 in the last dimension")
    q, scale = (q, scale) if softcap else positive(q, scale)
    q, k, v = readable(q), readable(k), readable(v)
    sinks = None if sinks is None else sinks.contiguous()
    sizes = _sizes(q, v, softcap)
    args = [q, k, v, sinks, o, k_ring, v_ring, position, n, W, *_units(scale, softcap)]
    for x in (q, k, v, k_ring, v_ring):
        args += x.stride()[:3]
    tile = step_config(n * sizes["G"], sizes["D_PAD"], sizes["DV_PAD"], q.dtype)
    with torch.cuda.device_of(q):
        triton_forward.step_kernel[(B * H,)](*args, *position.stride(), **sizes, **tile)
    return o


# ---- operators ---------------------------------------------------------------------------------------------

_OPERATORS = {
    "forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
        "int left, int right, float scale, float softcap) -> (Tensor, Tensor)",
        forward,
    ),
    "backward": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? sinks, "
        "Tensor? cu_seqlens, Tensor? cu_seqlens_k, int left, int right, float scale, float softcap) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        backward,
    ),
    "step": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_ring, Tensor(b!) v_ring, Tensor(c!) position, "
        "Tensor? sinks, float scale, float softcap) -> Tensor",
        step,
    ),
}

# Defined even where Triton is absent, so that `function.py` registers its fakes without asking.
for _name, (_schema, _function) in _OPERATORS.items():
    torch.library.define(f"slmkernels::triton_sliding_window_{_name}", _schema)
    if ABSENT is None:
        torch.library.impl(f"slmkernels::triton_sliding_window_{_name}", ("cpu", "cuda"), _function)


@torch.library.register_fake("slmkernels::triton_sliding_window_step")
def _fake_step(q, k, v, k_ring, v_ring, position, sinks, scale, softcap) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])
