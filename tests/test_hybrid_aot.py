"""The Triton kernels of hybrid attention compiled for GPUs that are not there: shared memory, spills.

Each case is what a launch of the public function would compile, with the default tile. ptxas reports spills.
"""

import re

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels.ops.hybrid import triton_backward, triton_forward
from slmkernels.ops.hybrid import triton_kernels as tk

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


def spill_limit(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes a thread may store to and load back from local memory, both counted.

    80 where every choice of options is compiled, 128 at head sizes of 256: ptxas prefers a few spilled values
    to one block less on a processor. Known and left: the backward in float32 at 256, where products without
    tensor cores hold whole operands in registers.
    """
    if max(sizes) <= 128:
        return 80
    return 128 if dtype != torch.float32 else {"dq": 1600, "dkv": 500}.get(kind, 128)


def check(kind: str, arch: int, limit: int | None = None, **options) -> dict:
    """Compile and hold the result to the limits: registers that spill, shared memory that there is."""
    result = compile_kernel(kind, arch, **options)
    shown = {name: result[name] for name in ("shared", "registers", "spills")}
    sizes = [options.get(name) or 64 for name in "DFV"]
    most = spill_limit(kind, sizes, options.get("dtype", torch.bfloat16)) if limit is None else limit
    assert result["spills"] <= most, shown
    assert result["shared"] <= SHARED_LIMIT[arch], shown
    return result


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KERNELS)
def test_default_tiles(kind, arch):
    ptx = check(kind, arch, 0)["asm"]["ptx"]
    if kind not in ("scan", "step"):  # the matrix instructions of each generation
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
    if kind in ("forward", "dq", "dkv"):
        assert "cp.async" in ptx
    assert "atom." not in ptx
    assert "red." not in ptx.replace("shared.", "").replace("pred.", "")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("segment", {"dtype": torch.float32}),
        ("forward", {"packed": True, "block": True, "state0": True}),
        ("forward", {"kept": False, "mix": False}),
        ("forward", {"D": 128}),
        ("forward", {"dtype": torch.float16}),
        ("forward", {"dtype": torch.float32}),
        ("dq", {"packed": True, "block": True, "state0": True}),
        ("dq", {"D": 128, "mix": False}),
        ("dq", {"dtype": torch.float16}),
        ("dq", {"dtype": torch.float32}),
        ("segment-backward", {"packed": True, "block": True, "state0": True}),
        ("segment-backward", {"dtype": torch.float32}),
        ("dkv", {"packed": True, "block": True}),
        ("dkv", {"D": 128, "mix": False}),
        ("dkv", {"dtype": torch.float16}),
        ("dkv", {"dtype": torch.float32}),
        ("step", {"block": True, "D": 128, "mix": False}),
        ("step", {"rows": 32}),
        ("step", {"dtype": torch.float32}),
    ],
)
def test_variants(kind, options):
    check(kind, 90, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("D", "F", "V"), [(16, 16, 16), (96, 64, 96), (128, 128, 128), (64, 256, 64), (128, 64, 256), (256,) * 3]
)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("kind", KERNELS)
def test_every_size(kind, dtype, D, F, V, arch):
    check(kind, arch, D=D, F=F, V=V, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("kind", ["forward", "dq", "dkv", "step"])
def test_small_shared_memory(kind, D, arch):
    check(kind, arch, D=D)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("option", ["block", "packed", "state0"])
@pytest.mark.parametrize("kind", ["forward", "dq", "segment-backward", "dkv"])
def test_every_option(kind, option, D, arch):
    check(kind, arch, D=D, **{option: True})


@pytest.mark.parametrize("kind", KERNELS)
def test_lengths_do_not_specialize(kind):
    """One compiled kernel serves every length and window: no value of one may select another."""
    kernel = KERNELS[kind]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert fixed == LENGTHS & set(kernel.arg_names)


def test_candidates():
    """At most 8 tiles to measure for any choice, none twice; the tiles of keys divide the segments."""
    for kind in ("segment", "forward", "dq", "dkv"):
        for size in (1, 64, 96, 128, 256):
            for dtype in NAMES:
                for arch in (80, 90, 100, 120):
                    tiles = tk.candidates(kind, (size, 16, 16), dtype, arch)
                    assert 1 <= len(tiles) == len(set(tiles)) <= 8
                    named = [tk._named(kind, tile) for tile in tiles]
                    assert all(tk.state_spacing(16, 16) % tile["BLOCK_N"] == 0 for tile in named)
