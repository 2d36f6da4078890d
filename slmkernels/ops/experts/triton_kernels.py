"""Routing and experts in Triton: tile choice, launchers, operator registration.

The kernels and their story stand in `triton_route.py`, `triton_forward.py` and `triton_backward.py`; they are
imported only where Triton is, so that this file always imports.

| launches | forward | backward |
|---|---|---|
| `route` | 2 | 1 |
| `expert_mlp` | 3 | 1, and 1 for dweights, 2 for dx, 2 for the matrices and biases |
| `segment_mlp` | 2 | 1, and 1 for dx, 2 for the matrices and biases |
| sort | 1 or 2, of `expert_mlp` | 1 or 2; of `segment_mlp` for the matrices only |

The host reads nothing back, grids and tiles follow from shapes alone, and the bits of a result depend on
nothing measured: CUDA graphs can hold every call. SLMKERNELS_AUTOTUNE=1 in the environment measures the
`candidates` of the products instead on the first call of each (kernel, sizes, dtype); bits may then differ
between processes.
"""

import torch
from torch import Tensor

from ...triton_support import ABSENT, AUTOTUNE, INTERPRETED, architecture, autotuned, dense, readable

if ABSENT is None:
    import triton

    from . import triton_backward, triton_forward, triton_route

SORT_PROGRAMS = 128  # at most, each adding up the counts of all
SORT_BLOCKS = 16  # of one program, before there are several
COMBINE = {"BLOCK_T": 8, "BLOCK_D": 256, "num_warps": 4, "num_stages": 1}
DWEIGHTS = {"BLOCK": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 1}
FINISH = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 1}


# ---- tiles -------------------------------------------------------------------------------------------------


def row_block(rows: int, ranges: int) -> int:
    """BLOCK_M, 16 to 128: the more rows an expert (or a segment) has, the longer the tiles. Half of the mean:
    a range wastes half a tile, a quarter of its products at most."""
    mean = rows // max(ranges, 1)
    return next((block for block in (128, 64, 32) if 2 * block <= mean), 16)


def candidates(kind: str, block_m: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """Tiles (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) of "up", "rows" and "dh", the default first;
    of "matrix" (BLOCK_P, BLOCK_Q, BLOCK_R, num_warps, num_stages).

    tests/test_experts_aot.py holds the defaults to the registers and the shared memory that there are. Those
    of "dh" share BLOCK_N: its parts of dweights are as many as there are blocks.
    """
    exact, warps = dtype == torch.float32, 8 if block_m == 128 else 4
    if kind == "matrix":
        return [(32, 64, 16, 4, 2)] if exact else [(64, 128, 64, 4, 3), (128, 128, 64, 8, 3)]
    if exact:  # products without tensor cores
        block_m = min(block_m, 64)
        warps = 8 if (kind, block_m) == ("dh", 64) else 4
        return [(block_m, 64 if kind == "rows" else 32, 16, warps, 2)]
    if kind == "dh":  # whose activation and its slope take the registers
        return [(min(block_m, 64), 64, 64, 8 if block_m >= 64 else 4, 3)]
    if kind == "up":
        return [(block_m, 64, 64, warps, 3), (block_m, 128, 32, 8, 3)]
    return [(block_m, 128, 64, warps, 3), (block_m, 128, 32, warps, 4)]


def _named(kind: str, tile: tuple[int, ...]) -> dict[str, int]:
    letters = "PQR" if kind == "matrix" else "MNK"
    return dict(zip((*(f"BLOCK_{x}" for x in letters), "num_warps", "num_stages"), tile, strict=True))


def config(kind: str, *choice) -> dict[str, int]:
    """The default tile: what runs unless SLMKERNELS_AUTOTUNE=1."""
    return _named(kind, candidates(kind, *choice)[0])


def sort_config(E: int) -> dict[str, int]:
    """Of the sort: blocks of 2^14 pairs (slot, expert) at most."""
    pad = triton.next_power_of_2(E)
    return {"E_PAD": pad, "BLOCK": min(1024, max(16, 2**14 // pad)), "num_warps": 8, "num_stages": 1}


def route_config(E: int, groups: int) -> dict[str, int]:
    """Of both routing kernels: blocks of 2^11 logits, padded."""
    pads = {"G_PAD": triton.next_power_of_2(groups), "PAD": triton.next_power_of_2(E // groups)}
    return pads | {"ROWS": max(1, 2**11 // (pads["G_PAD"] * pads["PAD"])), "num_warps": 4, "num_stages": 1}


# ---- routing -----------------------------------------------------------------------------------------------


def _masks(mask: Tensor | None, logits: Tensor) -> tuple[Tensor | None, int, int]:
    """The mask as bytes, its strides over tokens and experts."""
    if mask is None:
        return None, 0, 0
    mask = mask.view(torch.uint8).expand(logits.shape)
    return mask, *mask.stride()


def route_forward(
    logits, bias, mask, top_k, score, renormalize, groups, top_groups, scale
) -> tuple[Tensor, ...]:
    """indices, weights, counts, mean probabilities, z, entropy, logsumexp."""
    (T, E), tile = logits.shape, route_config(logits.shape[1], groups)
    blocks = -(-T // tile["ROWS"])
    real = {"dtype": torch.float32, "device": logits.device}
    integer = {"dtype": torch.int32, "device": logits.device}
    indices, weights = torch.empty(T, top_k, **integer), torch.empty(T, top_k, **real)
    counts, probabilities = torch.empty(E, **integer), torch.empty(E, **real)
    z, entropy, lse = torch.empty((), **real), torch.empty((), **real), torch.empty(T, **real)
    sums, part_counts = torch.empty(max(blocks, 1), E + 2, **real), torch.empty(max(blocks, 1), E, **integer)
    logits, (mask, mask_t, mask_e) = readable(logits), _masks(mask, logits)
    args = [logits, *dense(bias), mask, indices, weights, lse, sums, part_counts]
    args += [T, logits.stride(0), mask_t, mask_e, scale]
    flags = {"E": E, "TOP_K": top_k, "SCORE": score, "RENORMALIZE": renormalize, "GROUPS": groups}
    flags |= {"TOP_GROUPS": top_groups, "K_PAD": triton.next_power_of_2(top_k)}
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        if blocks:
            triton_route.route_kernel[(blocks,)](*args, **flags, **tile)
        args = [sums, part_counts, counts, probabilities, z, entropy, T, blocks]
        programs = -(-(E + 2) // FINISH["COLUMNS"])
        triton_route.finish_kernel[(programs,)](*args, E=E, **FINISH)
    return indices, weights, counts, probabilities, z, entropy, lse


def route_backward(
    dweights, dprobabilities, dz, logits, mask, indices, lse, score, renormalize, scale
) -> Tensor:
    """The gradient of the logits."""
    (T, E), tile = logits.shape, route_config(logits.shape[1], 1)
    del tile["G_PAD"]
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits, (mask, mask_t, mask_e) = readable(logits), _masks(mask, logits)
    args = [*dense(dweights, dprobabilities, dz), logits, mask, *dense(indices, lse), dlogits]
    args += [T, logits.stride(0), mask_t, mask_e, scale]
    flags = {"E": E, "TOP_K": indices.shape[1], "SCORE": score, "RENORMALIZE": renormalize}
    with torch.cuda.device_of(logits):
        if T:
            triton_route.route_backward_kernel[(-(-T // tile["ROWS"]),)](*args, **flags, **tile)
    return dlogits


# ---- experts -----------------------------------------------------------------------------------------------


def sort(indices: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Slots by expert -> order [slots], offsets [E+1]; a slot of an absent expert is in no range of them."""
    total, tile = indices.numel(), sort_config(E)
    order, offsets = indices.new_empty(max(total, 1)), indices.new_empty(E + 1)
    blocks = -(-total // tile["BLOCK"])
    share = SORT_BLOCKS if blocks <= SORT_BLOCKS else -(-blocks // SORT_PROGRAMS)  # of blocks
    programs, share = max(1, -(-blocks // share)), share * tile["BLOCK"]
    counts = indices.new_empty(programs, E) if programs > 1 else None
    with torch.cuda.device_of(indices):
        if counts is not None:
            triton_forward.count_kernel[(programs,)](indices, counts, total, E, share, **tile)
        triton_forward.sort_kernel[(programs,)](indices, counts, order, offsets, total, E, share, **tile)
    return order, offsets


class _Call:
    """Sizes, flags and ranges of rows of one call."""

    def __init__(self, x, indices, cu_seqlens, w_gate_up, w_down, activation: int, interleaved: bool):
        self.x, self.T, self.activation = x, x.shape[0], activation
        self.indices, self.cu = dense(indices, cu_seqlens)
        (self.E, self.D, self.N), self.H = w_down.shape, w_gate_up.shape[1]
        self.packed, self.interleaved = self.cu is not None, interleaved
        self.top_k = 1 if self.packed else indices.shape[1]
        self.rows = self.T * self.top_k
        self.ranges = indices.shape[0] if self.packed else self.E
        self.block_m = row_block(self.rows, self.ranges)

    def ranged(self) -> list:
        """What every kernel over tiles of rows gets: order, offsets, experts, ranges, E."""
        if self.packed:
            return [None, self.cu, self.indices, self.ranges, self.E]
        return [*sort(self.indices, self.E), None, self.ranges, self.E]

    def tiles(self, block: int) -> int:
        """Tiles of all ranges, as `triton_tiles.span` numbers them."""
        return self.rows // block + self.ranges if self.rows else 0

    def launch(self, kernel, kind: str, width: int, args: list, **flags) -> None:
        """Run `kernel` on every tile of rows and of `width` columns; "matrix": of every expert's matrix."""
        flags = self.constants(kernel) | flags
        choice = self.block_m, self.x.dtype

        def grid(tile) -> tuple[int]:  # one dimension, whose limit is 2^31 and not 65535
            if kind == "matrix":
                return (self.E * -(-width // tile["BLOCK_P"]) * -(-flags["Q"] // tile["BLOCK_Q"]),)
            return (self.tiles(tile["BLOCK_M"]) * -(-width // tile["BLOCK_N"]),)

        tile = config(kind, *choice)
        if grid(tile) == (0,):
            return
        with torch.cuda.device_of(self.x):
            if AUTOTUNE and not INTERPRETED:
                measured = tuple(tuple(_named(kind, row).items()) for row in candidates(kind, *choice))
                key = kind, *choice, architecture(self.x.device), *sorted(flags.items())
                autotuned(kernel, measured, *key)[grid](*args, **flags)
            else:
                kernel[grid(tile)](*args, **flags, **tile)

    def constants(self, kernel) -> dict:
        """Those of the kernels' compile-time arguments that `kernel` has and all its launches share."""
        flags = {"D": self.D, "N": self.N, "ACTIVATION": self.activation}
        flags |= {"INTERLEAVED": self.interleaved, "TOP_K": self.top_k}
        return {name: value for name, value in flags.items() if name in kernel.arg_names}

    def times(self, left, w, bias, ranged, weights=None, *, back: bool = False) -> Tensor:
        """Rows of left through w_down; or with `back` those of dh back through w_gate_up. -> [T, d]"""
        out = left.new_empty(self.T if self.packed else self.rows, self.D)
        strides = w.stride() if back else (w.stride(0), w.stride(2), w.stride(1))
        flags = {"K": self.H if back else self.N, "WIDTH": self.D}
        args = [left, w, bias, out, *ranged, *strides]
        self.launch(triton_forward.rows_kernel, "rows", self.D, args, **flags)
        if self.packed:
            return out
        y = left.new_empty(self.T, self.D)
        programs = -(-self.T // COMBINE["BLOCK_T"]) * -(-self.D // COMBINE["BLOCK_D"])
        with torch.cuda.device_of(self.x):
            if programs:
                args = [out, self.indices, weights, y, self.T, self.E]
                triton_forward.combine_kernel[(programs,)](*args, D=self.D, TOP_K=self.top_k, **COMBINE)
        return y


def mlp_forward(
    x, indices, weights, cu_seqlens, w_gate_up, w_down, b_gate_up, b_down, activation, interleaved, save
) -> tuple[Tensor, Tensor]:
    """y [T, d], and with `save` the pre-activation of every row."""
    call = _Call(x, indices, cu_seqlens, w_gate_up, w_down, activation, interleaved)
    x, (weights, b_gate_up, b_down) = readable(x), dense(weights, b_gate_up, b_down)
    h, a = x.new_empty(call.rows * call.H if save else 0), x.new_empty(call.rows, call.N)
    ranged = call.ranged()
    args = [x, w_gate_up, b_gate_up, h if save else None, a, *ranged, x.stride(0), *w_gate_up.stride()]
    call.launch(triton_forward.up_kernel, "up", call.N, args)
    return call.times(a, w_down, b_down, ranged, weights), h


def mlp_backward(
    do, x, indices, weights, cu_seqlens, w_gate_up, w_down, b_gate_up, b_down, h, activation, interleaved,
    need_x, need_w,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, w_gate_up, w_down and the biases; empty where absent or not needed."""
    call = _Call(x, indices, cu_seqlens, w_gate_up, w_down, activation, interleaved)
    do, x = readable(do), readable(x)
    weights, b_down, h = dense(weights, b_down, h)
    need_h = need_x or need_w
    dh = x.new_empty(call.rows, call.H) if need_h else None
    a = x.new_empty(call.rows, call.N) if need_w else None
    ranged = call.ranged()
    blocks = -(-call.N // config("dh", call.block_m, x.dtype)["BLOCK_N"])
    dweights, parts = x.new_empty(0), None
    if weights is not None:
        dweights, parts = torch.empty_like(weights), weights.new_empty(blocks, call.rows)
    if need_h or weights is not None:
        args = [do, w_down, h, weights, dh, a, parts, *ranged, call.rows, do.stride(0), *w_down.stride()]
        call.launch(triton_backward.dh_kernel, "dh", call.N, args)
    if call.rows and weights is not None:
        args = [parts, do, b_down, call.indices, dweights, call.rows, blocks, call.E, do.stride(0)]
        programs, flags = -(-call.rows // DWEIGHTS["BLOCK"]), {"D": call.D, "TOP_K": call.top_k}
        with torch.cuda.device_of(x):
            triton_backward.dweights_kernel[(programs,)](*args, **flags, **DWEIGHTS)
    dx = call.times(dh, w_gate_up, None, ranged, back=True) if need_x else x.new_empty(0)
    if not need_w:
        return dx, dweights, *(x.new_empty(0) for _ in range(4))

    up, down = x.new_empty(w_gate_up.shape), x.new_empty(w_down.shape)
    b_up, b_down = (None if b is None else x.new_empty(b.shape) for b in (b_gate_up, b_down))
    ranges = [*(sort(call.indices, call.E) if call.packed else ranged[:2]), call.cu]
    kernel = triton_backward.matrix_kernel
    args = [dh, x, None, up, b_up, None, *ranges, x.stride(0), *up.stride()]
    call.launch(kernel, "matrix", call.H, args, P=call.H, Q=call.D)
    out_e, out_d, out_n = down.stride()
    args = [a, do, weights, down, None, b_down, *ranges, do.stride(0), out_e, out_n, out_d]
    call.launch(kernel, "matrix", call.N, args, P=call.N, Q=call.D)
    return dx, dweights, up, down, *(x.new_empty(0) if b is None else b for b in (b_up, b_down))


# ---- operators ---------------------------------------------------------------------------------------------

_MLP = (
    "Tensor x, Tensor indices, Tensor? weights, Tensor? cu_seqlens, Tensor w_gate_up, Tensor w_down, "
    "Tensor? b_gate_up, Tensor? b_down, "
)
_OPERATORS = {
    "route_forward": (
        "(Tensor logits, Tensor? selection_bias, Tensor? expert_mask, int top_k, int score, "
        "bool renormalize, int num_groups, int top_groups, float route_scale) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        route_forward,
    ),
    "route_backward": (
        "(Tensor? dweights, Tensor? dprobabilities, Tensor? dz, Tensor logits, Tensor? expert_mask, "
        "Tensor indices, Tensor lse, int score, bool renormalize, float route_scale) -> Tensor",
        route_backward,
    ),
    "expert_mlp_forward": (
        f"({_MLP}int activation, bool interleaved, bool save) -> (Tensor, Tensor)",
        mlp_forward,
    ),
    "expert_mlp_backward": (
        f"(Tensor dout, {_MLP}Tensor h, int activation, bool interleaved, bool need_x, bool need_w) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        mlp_backward,
    ),
}

# Defined even where Triton is absent, so that no caller has to ask. Their fakes are the native operators', in
# route.py and function.py.
for _name, (_schema, _function) in _OPERATORS.items():
    torch.library.define(f"slmkernels::triton_{_name}", _schema)
    if ABSENT is None:
        torch.library.impl(f"slmkernels::triton_{_name}", ("cpu", "cuda"), _function)
