"""The Triton kernels compiled ahead of time for GPUs that are not there: shared memory, registers, spills.

Each case is what a launch of the public function would compile, with the default tile. ptxas reports spills.
"""

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels import triton_support
from slmkernels.ops.sliding_window import triton_backward, triton_forward
from slmkernels.ops.sliding_window import triton_kernels as tk

KERNELS = {
    "forward": triton_forward.forward_kernel,
    "dq": triton_backward.dq_kernel,
    "dkv": triton_backward.dkv_kernel,
    "delta": triton_backward.delta_kernel,
    "step": triton_forward.step_kernel,
}
# Bytes a thread may store to and load back from local memory, both counted, where it is not 0. The dk-dv
# kernel is bound by registers: a softcap's slope or the packed offsets cost it a few on 9.0, where the next
# smaller tile would halve the matrix instructions. In the sweep ptxas itself prefers a few spilled values to
# one block less on a processor (float32 and small heads, 64 to 168 registers of 255).
SPILL_LIMIT = 64
FLOAT32 = {"lse", "dlse", "delta", "dsinks"}
TENSORS = {"q", "k", "v", "o", "do", "dq", "dk", "dv", "k_ring", "v_ring", "sinks"} | FLOAT32
LENGTHS = {"T", "S", "N", "left", "right", "n", "W"}  # do_not_specialize: int32, of unknown divisibility
REAL = {"scale", "inner", "unit"}


def compile_kernel(
    kind, arch, *, D=64, DV=None, H=4, G=2, dtype=torch.bfloat16, window=256, varlen=False, sinks=False,
    softcap=False, dlse=True, rows=16, tile=None,
):  # fmt: skip
    """Compile one kernel as its launcher would -> dict(shared, registers, spills, ptx)."""
    kernel, DV = KERNELS[kind], DV or D
    D_PAD, DV_PAD = triton_support.padded(D), triton_support.padded(DV)
    constants = {
        "H": H,
        "G": G,
        "HQ": H * G,
        "D": D,
        "DV": DV,
        "D_PAD": D_PAD,
        "DV_PAD": DV_PAD,
        "SOFTCAP": softcap,
    }
    if kind == "step":
        tile = tile or tk.step_config(rows, D_PAD, DV_PAD, dtype)
    elif kind == "delta":
        tile = tk.delta_config(DV_PAD)
    else:
        tile = tile or tk.config(kind, window, D, DV, dtype, arch)
    options = {name: value for name, value in tile.items() if name.startswith("num_")}
    constants |= tile
    absent = {"cu_q": varlen, "cu_k": varlen, "sinks": sinks, "dsinks": sinks, "dlse": dlse}
    constants |= {name: None for name, present in absent.items() if not present}

    def type_of(name: str) -> str:
        if name in TENSORS:
            return "*fp32" if name in FLOAT32 else f"*{NAMES[dtype]}"
        if name in ("cu_q", "cu_k"):
            return "*i32"
        if name == "position":
            return "*i64"
        return "fp32" if name in REAL else "i32"

    return compile_source(kernel, arch, constants, type_of, LENGTHS | REAL, options)


def check(kind: str, arch: int, spill_limit: int = 0, **options) -> dict:
    """Compile and hold the result to the limits: registers that spill, shared memory that there is."""
    result = compile_kernel(kind, arch, **options)
    shown = {name: result[name] for name in ("shared", "registers", "spills")}
    assert result["spills"] <= spill_limit, shown
    assert result["shared"] <= SHARED_LIMIT[arch], shown
    return result


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("kind", "window"),
    [("forward", 256), ("forward", 1024), ("dq", 256), ("dkv", 256), ("delta", 256), ("step", 256)],
)
def test_default_tiles(kind, window, D, arch):
    ptx = check(kind, arch, D=D, window=window)["asm"]["ptx"]
    if kind in (
        "forward",
        "dq",
        "dkv",
    ):  # the matrix instructions of each generation, fed by asynchronous copies
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
        assert "cp.async" in ptx


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
def test_windows_share_the_backward_tiles(kind):
    """Why 1024 is compiled for the forward kernel only: elsewhere the table gives it the tile of 256."""
    tiles = [tk.config(kind, window, 64, 64, torch.bfloat16, 90) for window in (256, 1024)]
    assert (tiles[0] == tiles[1]) == (kind != "forward")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("forward", {"varlen": True}),
        ("forward", {"sinks": True}),
        ("forward", {"softcap": True}),
        ("forward", {"dtype": torch.float16}),
        ("forward", {"dtype": torch.float32}),
        ("dq", {"varlen": True}),
        ("dq", {"softcap": True}),
        ("dq", {"dtype": torch.float32}),
        ("dkv", {"varlen": True}),
        ("dkv", {"softcap": True}),
        ("dkv", {"dtype": torch.float32}),
        ("dkv", {"G": 1}),
        ("delta", {"sinks": True, "dlse": False}),
        ("step", {"sinks": True}),
        ("step", {"softcap": True}),
        ("step", {"rows": 64}),
        ("step", {"dtype": torch.float32}),
    ],
)
def test_variants(kind, options):
    check(kind, 90, SPILL_LIMIT if kind == "dkv" and "softcap" in options else 0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("D", "DV"), [(16, 16), (32, 32), (96, 96), (128, 64), (64, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["forward", "dq", "dkv", "step"])
def test_every_head_size(kind, dtype, D, DV, arch):
    check(kind, arch, SPILL_LIMIT, D=D, DV=DV, dtype=dtype, window=1024)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("option", ["varlen", "sinks", "softcap"])
@pytest.mark.parametrize("kind", ["forward", "dq", "dkv", "step"])
def test_every_option(kind, option, D, arch):
    check(kind, arch, SPILL_LIMIT if kind == "dkv" or option == "softcap" else 0, D=D, **{option: True})


@pytest.mark.parametrize("kind", KERNELS)
def test_lengths_do_not_specialize(kind):
    """One compiled kernel serves every length: no value of a length may select another."""
    kernel = KERNELS[kind]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert fixed == LENGTHS & set(kernel.arg_names)


def test_candidates():
    """At most 8 tiles to measure for any choice, none twice."""
    for kind in ("forward", "dq", "dkv"):
        for window in (1, 128, 512, 1024, 10**6):
            for size in (1, 16, 64, 96, 128, 256):
                for dtype in NAMES:
                    for arch in SHARED_LIMIT:
                        tiles = tk.candidates(kind, window, size, size, dtype, arch)
                        assert 1 <= len(tiles) == len(set(tiles)) <= 8
