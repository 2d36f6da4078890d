"""What this installation has: versions, libraries, CPU tier, GPU, Triton, and why something is missing."""

import importlib.util
import platform
from importlib.metadata import version

import torch

from . import native
from .dispatch import OPERATIONS


def info() -> str:
    """A report of what is installed and, for what is missing, why. One fact a line, ready to print."""
    rows = {
        "slmkernels": _version("slmkernels"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cpu library": _cpu_library(),
        "cuda library": "loaded" if native.HAS_CUDA else f"missing: {_cuda_reason()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": _triton(),
        "operations": ", ".join(OPERATIONS),
    }
    if native.HAS_CPU and native.host is None:
        rows["host module"] = f"missing: {native.REASONS['_host']}"
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _version(package: str) -> str:
    found = importlib.util.find_spec(package) is not None
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (run from a checkout)" if found else "missing"


def _cpu_library() -> str:
    if not native.HAS_CPU:
        return f"missing: {native.REASONS['_C_cpu']}"
    if native.host is None:
        return "loaded"
    tiers = ", ".join(native.host.isa_supported())
    return f"loaded, tier {native.host.get_isa()} (this CPU runs {tiers}); {native.host.build_facts()}"


def _cuda_reason() -> str:
    return native.REASONS.get("_C_cuda") or "torch sees no CUDA device"


def _triton() -> str:
    return version("triton") if importlib.util.find_spec("triton") else "missing: pip install triton"
