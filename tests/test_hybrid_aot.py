"""The Triton kernels of hybrid attention compiled for GPUs that are not there: shared memory, spills.

Each case is what a launch of the public function would compile, with the default tile. ptxas reports spills.
"""

import re

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels.ops.hybrid import triton_backward, triton_forward
from slmkernels.ops.hybrid import triton_kernels as tk
from slmkernels.triton_support import padded

KERNELS = {
    "segment": triton_forward.segment_kernel,
    "scan": triton_forward.scan_kernel,
    "forward": triton_forward.forward_kernel,
    "step": triton_forward.step_kernel,
    "dq": triton_backward.dq_kernel,
    "segment-backward": triton_forward.segment_kernel,
    "dkv": triton_backward.dkv_kernel,
}
TOKENS = {"q", "k", "v", "phi_q", "phi_k", "phi", "x", "o", "do", "k_ring", "v_ring", "phi_ring"}
TOKENS |= {"dq", "dk", "dv", "dphi_q", "dphi_k"}  # in the inputs' dtype
LENGTHS = {"T", "S", "N", "reach", "W", "n"}  # do_not_specialize: plain int32, of unknown divisibility
REAL = {"scale", "unit"}


def compile_kernel(
    kind, arch, *, D=64, F=None, V=None, G=2, dtype=torch.bfloat16, block=False, packed=False, mix=True,
    state0=False, kept=True, rows=16, tile=None,
):  # fmt: skip
    """Compile one kernel as its launcher would -> dict(shared, registers, spills, asm)."""
    kernel, F, V, H = KERNELS[kind], F or D, V or D, 4
    cu = torch.empty(3, device="meta") if packed else None
    q, v = torch.empty(1, 8, H * G, D, dtype=dtype, device="meta"), torch.empty(1, 8, H, V, device="meta")
    phi = torch.empty(1, 8, H * G, F, device="meta")
    call = tk._Sizes(q, v, phi, 0 if state0 else None, cu, 3, block)
    constants = call.constants(kernel)
    backward, kind = kind == "segment-backward", kind.removesuffix("-backward")
    if kind == "scan":
        tile = tk.SCANNED | {"REVERSE": False}
    elif kind == "step":
        tile = tile or tk.step_config(rows, (D, F, V), dtype)
    else:
        tile = tile or tk.config(kind, (D, F, V), dtype, arch)
    if kind == "segment" and not backward:
        constants |= {"G": 1, "den": None, "delta": None}
    constants |= tile
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    given = {"cu": packed, "mix": mix, "total": mix, "state0": state0, "normalizer0": state0}
    given |= dict.fromkeys(("shift", "top", "den") if kind == "forward" else (), kept)
    constants |= {name: None for name, present in given.items() if not present}

    def type_of(name: str) -> str:
        if name in TOKENS:
            return f"*{NAMES[dtype]}"
        if name in ("cu", "top"):
            return "*i32"
        if name == "position":
            return "*i64"
        if name in LENGTHS or re.fullmatch("[a-z]+_[bthw]", name):
            return "i32"
        return "fp32" if name in REAL else "*fp32"

    return compile_source(kernel, arch, constants, type_of, LENGTHS | REAL, options)
