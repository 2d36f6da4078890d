"""The Triton kernels of the causal convolution compiled ahead of time for GPUs that are not there."""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from slmkernels import triton_support  # noqa: E402

if triton_support.ABSENT or triton_support.INTERPRETED:
    pytest.skip(
        triton_support.ABSENT or "TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True
    )

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slmkernels.ops.causal_conv1d import triton_backward, triton_forward, triton_kernels  # noqa: E402

KERNELS = {
    "forward": triton_forward.forward_kernel,
    "backward": triton_backward.backward_kernel,
    "step": triton_forward.step_kernel,
}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
LENGTHS = {"T", "N", "n"}  # do_not_specialize
OPTIONAL = {"bias", "initial", "state", "dstate", "dinitial"}  # of the full call
NUMBERS = LENGTHS | {"x_b", "x_t", "dy_b", "dy_t", "s_b", "s_t", "C"}


def compile_kernel(kind, arch, dtype, *, C=1024, W=4, packed=False, full=True) -> dict[str, int]:
    """Compile one kernel as its launcher would -> registers a thread, spilled bytes."""
    kernel = KERNELS[kind]
    tile = triton_kernels.step_config(C, W) if kind == "step" else triton_kernels.config(kind, C, W)
    options = {name: value for name, value in tile.items() if name.startswith("num_")}
    constants = {"W": W, "SILU": True, **tile}
    if not packed:
        constants["cu"] = None
    if not full:
        constants |= dict.fromkeys(OPTIONAL - ({"state"} if kind == "step" else set()))
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in NUMBERS:
            signature[name] = "i32"
        elif name in ("cu", "sums"):
            signature[name] = "*i32" if name == "cu" else "*fp32"
        else:
            signature[name] = f"*{NAMES[dtype]}"
        if name not in LENGTHS:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.metadata.shared <= 99 * 1024
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [get_ptxas(arch).path, f"-arch={name}", "-v", "-o", os.devnull, "-"]
    result = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)]
    return {"registers": int(re.search(r"Used (\d+) registers", result.stderr)[1]), "spills": sum(spills)}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KERNELS)
def test_default_tiles(kind, arch):
    result = compile_kernel(kind, arch, torch.bfloat16, packed=kind != "step")
    assert result["spills"] == 0, result
    assert result["registers"] <= 168, result  # three programs of 128 threads a processor at least


@pytest.mark.parametrize("kind", KERNELS)
def test_variants(kind):
    for options in ({"dtype": torch.float32}, {"full": False}, {"C": 24}, {"W": 1}, {"W": 8}):
        assert compile_kernel(kind, 90, **{"dtype": torch.bfloat16, **options})["spills"] == 0, options


@pytest.mark.parametrize("kind", KERNELS)
def test_lengths_do_not_specialize(kind):
    """One compiled kernel serves every length: no value of a length may select another."""
    kernel = KERNELS[kind]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert fixed == LENGTHS & set(kernel.arg_names)
