"""Compiles a Triton kernel for a GPU that is not there, and asks ptxas what became of it.

Importing this module skips the test module that does where nothing can be compiled.
"""

import os
import re
import subprocess
from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from slmkernels import triton_support  # noqa: E402

if triton_support.ABSENT or triton_support.INTERPRETED:
    reason = triton_support.ABSENT or "TRITON_INTERPRET is set: nothing is compiled"
    pytest.skip(reason, allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_LIMIT = {  # bytes a block may ask for
    arch: kib * 1024 for arch, kib in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_source(
    kernel, arch: int, constants: dict, type_of: Callable[[str], str], odd: set[str], options: dict
) -> dict:
    """Compile `kernel` -> dict(shared, registers, spills, asm).

    `type_of` gives the type of a parameter that is no constant; those not in `odd` are divisible by 16, as
    pointers and strides of aligned tensors are. `options`: num_warps, num_stages.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = type_of(name)
        if name not in odd:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return dict(shared=compiled.metadata.shared, **assemble(compiled.asm["ptx"], arch), asm=compiled.asm)


def assemble(ptx: str, arch: int) -> dict[str, int]:
    """Registers a thread and spilled bytes, by ptxas's own report."""
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [get_ptxas(arch).path, f"-arch={name}", "-v", "-o", os.devnull, "-"]
    result = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    registers = int(re.search(r"Used (\d+) registers", result.stderr)[1])
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)]
    return {"registers": registers, "spills": sum(spills)}
