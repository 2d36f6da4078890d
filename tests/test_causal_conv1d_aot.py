"""The Triton kernels of the causal convolution compiled ahead of time for GPUs that are not there."""

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels.ops.causal_conv1d import triton_backward, triton_forward, triton_kernels

KERNELS = {
    "forward": triton_forward.forward_kernel,
    "backward": triton_backward.backward_kernel,
    "step": triton_forward.step_kernel,
}
LENGTHS = {"T", "N", "n"}  # do_not_specialize
OPTIONAL = {"bias", "initial", "state", "dstate", "dinitial"}  # of the full call
NUMBERS = LENGTHS | {"x_b", "x_t", "dy_b", "dy_t", "s_b", "s_t", "C"}


def compile_kernel(kind, arch, dtype, *, C=1024, W=4, packed=False, full=True) -> dict:
    """Compile one kernel as its launcher would -> dict(shared, registers, spills, asm)."""
    kernel = KERNELS[kind]
    tile = triton_kernels.step_config(C, W) if kind == "step" else triton_kernels.config(kind, C, W)
    options = {name: value for name, value in tile.items() if name.startswith("num_")}
    constants = {"W": W, "SILU": True, **tile}
    if not packed:
        constants["cu"] = None
    if not full:
        constants |= dict.fromkeys(OPTIONAL - ({"state"} if kind == "step" else set()))

    def type_of(name: str) -> str:
        if name in NUMBERS:
            return "i32"
        if name in ("cu", "sums"):
            return "*i32" if name == "cu" else "*fp32"
        return f"*{NAMES[dtype]}"

    result = compile_source(kernel, arch, constants, type_of, LENGTHS, options)
    assert result["shared"] <= min(SHARED_LIMIT.values())
    return result


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
