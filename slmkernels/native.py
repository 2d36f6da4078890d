"""Loads the native libraries. What is absent leaves a reason in `REASONS`, never a crash.

`_C_cpu` holds operators behind torch's stable ABI; `_host` is a pybind11 module that looks into it
(build facts, CPU features, instruction-set tier, window geometry).
"""

import functools
import importlib
import json
import os
import re
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
NEEDED = {"_C_cpu": "a C++ compiler", "_C_cuda": "nvcc"}  # to build a library
REASONS: dict[str, str] = {}  # library -> why it is absent


def build_report(name: str) -> str:
    """What setup.py wrote about a library of this installation: how it was built, or why it was left out."""
    path = PACKAGE / "_build_report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return report.get(name, f"not built; run `pip install .` where {NEEDED[name]} is")


def library(name: str) -> Path | None:
    """The file of a library, where it was built."""
    matches = sorted(PACKAGE.glob(f"{name}.*so")) + sorted(PACKAGE.glob(f"{name}.*pyd"))
    return matches[0] if matches else None


def _load(name: str) -> bool:
    path = library(name)
    if path is None:
        REASONS[name] = build_report(name)
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        REASONS[name] = f"{path.name} does not load: {error.__cause__ or error}"
        return False
    return True


def _load_host():
    """The `_host` module; it links against `_C_cpu`, so only where that one is loaded."""
    try:
        return importlib.import_module("slmkernels._host") if HAS_CPU else None
    except ImportError as error:
        REASONS["_host"] = str(error)
        return None


HAS_CPU = _load("_C_cpu")
HAS_CUDA = torch.cuda.is_available() and _load("_C_cuda")
host = _load_host()


def reason_against(x: torch.Tensor) -> str | None:
    """None where native kernels can run on x's device, else why not."""
    if x.is_cpu:
        return None if HAS_CPU else REASONS["_C_cpu"]
    if x.is_cuda:
        return None if HAS_CUDA else REASONS.get("_C_cuda", "torch sees no CUDA device")
    return f"device {x.device} has no native kernels (cpu and cuda have)"


def reason_against_kernel(x: torch.Tensor) -> str | None:
    """The same for an operation without CUDA C++ kernels."""
    return reason_against(x) or (
        "device cuda has no native kernel of this operation yet" if x.is_cuda else None
    )


@torch.compiler.assume_constant_result  # it may not ask for a GPU's capability itself, nor read files
def reason_against_gpu(device: torch.device) -> str | None:
    """None where the CUDA C++ kernels were built for the GPU at `device`, or it is none, else why not."""
    return _reason_against_gpu(device) if device.type == "cuda" else None


@functools.cache  # a decode step takes microseconds
def _reason_against_gpu(device: torch.device) -> str | None:
    capability, report = torch.cuda.get_device_capability(device), build_report("_C_cuda")
    if runs_on(report, capability):
        return None
    major, minor = capability
    return f"the CUDA library is {report}, this GPU is {major}.{minor}: see TORCH_CUDA_ARCH_LIST"


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of the GPU at `device`."""
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def shared_kib(device: torch.device) -> int:
    """What a block may take of the shared memory of the GPU at `device`."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def runs_on(report: str, capability: tuple[int, int]) -> bool:
    """Is there code for a GPU in a library that setup.py reports as 'built for 8.0;9.0a+PTX ...'?"""
    for major, minor, kind, ptx in re.findall(r"(?<![\d.])(\d+)\.(\d)([af]?)(\+PTX)?(?=[;, ])", report):
        built = int(major), int(minor)
        same = capability == built if kind else capability[0] == built[0] and capability >= built
        if same or (ptx and capability >= built):
            return True
    return False


def reason_against_16bit(x: torch.Tensor) -> str | None:
    """None where the CUDA C++ kernels take x by its dtype and GPU, else why not."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA kernels take bfloat16 and float16, not {x.dtype}"
    return reason_against_gpu(x.device)


def reason_against_float64(x: torch.Tensor) -> str | None:
    """The same for kernels that work in float32 and take it too."""
    if x.dtype == torch.float64:
        return "CUDA kernels take bfloat16, float16 and float32, not torch.float64"
    return reason_against_gpu(x.device)


def reason_against_call(call) -> str | None:
    """None where native kernels can run `call` (any object with its q), else why not."""
    return reason_against_kernel(call.q)


if host is not None and host.isa_complaint():
    raise ValueError(f"SLMKERNELS_CPU_ISA is {os.environ['SLMKERNELS_CPU_ISA']!r}: {host.isa_complaint()}")
