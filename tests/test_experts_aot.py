"""The Triton kernels of routing and experts compiled for GPUs that are not there: shared memory, spills.

Each case is what a launch of the public functions would compile, with the default tile. ptxas reports spills.
"""

import re

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels.ops.experts import triton_backward, triton_forward, triton_route
from slmkernels.ops.experts import triton_kernels as tk

KERNELS = {
    "route": triton_route.route_kernel,
    "finish": triton_route.finish_kernel,
    "route-backward": triton_route.route_backward_kernel,
    "count": triton_forward.count_kernel,
    "sort": triton_forward.sort_kernel,
    "up": triton_forward.up_kernel,
    "rows": triton_forward.rows_kernel,
    "combine": triton_forward.combine_kernel,
    "dh": triton_backward.dh_kernel,
    "dweights": triton_backward.dweights_kernel,
    "matrix": triton_backward.matrix_kernel,
}
PRODUCTS = ("up", "rows", "dh", "matrix")
TILES = {"finish": tk.FINISH, "combine": tk.COMBINE, "dweights": tk.DWEIGHTS}
LENGTHS = {"T", "E", "total", "share", "slots", "blocks", "ranges"}  # do_not_specialize: plain int32
INTEGERS = {"indices", "counts", "order", "offsets", "experts", "cu", "part_counts"}
REAL = {
    "weights",
    "dweights",
    "parts",
    "lse",
    "sums",
    "dprobabilities",
    "dz",
    "probabilities",
    "z",
    "entropy",
}
# The strides of 1 of contiguous matrices and of transposed ones; of "rows" those of w_down first, of "matrix"
# those of its gradient.
UNIT = {"up": ("w_c", "w_r"), "rows": ("w_k", "w_c"), "dh": ("w_n", "w_d"), "matrix": ("out_p", "out_q")}


def compile_kernel(
    kind, arch, *, E=64, groups=1, score=0, renormalize=True, masked=False, D=512, N=256, activation=0,
    interleaved=False, bias=True, segments=False, transposed=False, down=True, block_m=64,
    dtype=torch.bfloat16,
):  # fmt: skip
    """Compile one kernel as its launcher would -> dict(shared, registers, spills, asm)."""
    kernel, H = KERNELS[kind], 2 * N if activation < 3 else N
    constants = {"D": D, "N": N, "ACTIVATION": activation, "INTERLEAVED": interleaved}
    constants |= {"TOP_K": 1 if segments else 8, "SCORE": score, "RENORMALIZE": renormalize, "K_PAD": 8}
    constants |= {"GROUPS": groups, "TOP_GROUPS": (groups + 1) // 2}
    if kind == "rows":
        constants |= {"K": N if down else H, "WIDTH": D}
    if kind == "matrix":
        constants |= {"P": N if down else H, "Q": D}
    back = not down  # of "rows" and "matrix": the launch that meets w_gate_up
    missing = {
        "mask": not masked, "bias": not bias or (kind == "rows" and back), "cu": not segments,
        "experts": not segments, "order": segments and kind != "matrix", "parts": segments,
        "weights": segments or (kind == "matrix" and back),
        "left_sum": not bias or down, "right_sum": not bias or back,
    }  # fmt: skip
    if kind in PRODUCTS:
        tile = tk.config(kind, block_m, dtype)
    elif kind.startswith("route"):
        tile = tk.route_config(E, groups)
    else:
        tile = TILES[kind] if kind in TILES else tk.sort_config(E)
    if "E" not in {parameter.name for parameter in kernel.params if parameter.do_not_specialize}:
        constants["E"] = E
    if kind in UNIT:  # w_gate_up is met the other way round
        constants[UNIT[kind][transposed != (kind in ("rows", "matrix") and back)]] = 1
    constants |= tile | {"mask_e": 1} | {name: None for name, absent in missing.items() if absent}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}

    def type_of(name: str) -> str:
        if name in LENGTHS or re.fullmatch("stride|[a-z]+_[a-z]", name):
            return "i32"
        if name in INTEGERS:
            return "*i32"
        if name == "mask":
            return "*u8"
        if name == "scale":
            return "fp32"
        routing = kind.startswith("route") and name == "bias"
        return "*fp32" if name in REAL or routing else f"*{NAMES[dtype]}"

    return compile_source(kernel, arch, constants, type_of, LENGTHS | {"scale"}, options)
