"""What this installation has: versions, libraries, CPU tier, GPU, Triton, and why something is missing."""

import importlib.util
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from subprocess import DEVNULL

import torch

from . import native
from .dispatch import OPERATIONS

Facts = dict[str, str | int]
NOT_YET_RUN = "not yet run on hardware"  # the kernels for GPUs; to go, with its uses, when they have been


def info() -> str:
    """A report of what is installed and, for what is missing, why. One fact a line, ready to print."""
    rows = {
        "slmkernels": _version("slmkernels"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cpu library": _cpu_library(),
        "cuda library": _cuda_library(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": _triton(),
        "operations": ", ".join(OPERATIONS),
    }
    if native.HAS_CPU and native.host is None:
        rows["host module"] = f"missing: {native.REASONS['_host']}"
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def environment(device: torch.device) -> Facts:
    """What a measured result depends on: to print above it, and to keep beside it."""
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "slmkernels": _version("slmkernels"),
        "cpu": _cpu_model(),
        "isa": native.host.get_isa() if native.host else f"no native library: {_why_no_library()}",
        "threads": torch.get_num_threads(),
        "device": device.type,
        "backend": os.environ.get("SLMKERNELS_BACKEND") or "automatic",
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _why_no_library() -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in native.REASONS.items())


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


def _cuda_library() -> str:
    reason = native.REASONS.get("_C_cuda")  # it was asked for, and is not there or does not load
    if reason is None and native.library("_C_cuda") is None:
        reason = native.build_report("_C_cuda")
    if reason is not None:
        return f"missing: {reason}"
    return f"{'loaded, ' * native.HAS_CUDA}{native.build_report('_C_cuda')}, {NOT_YET_RUN}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "missing: pip install triton"
    return f"{version('triton')}, {NOT_YET_RUN}"


def _commit() -> str:
    """The checkout's commit, with `+changes` where tracked files differ from it."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed, perhaps below a repository of somebody else's
        return "unknown (not a git checkout)"
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True, stderr=DEVNULL)
        changed = subprocess.call([*git, "diff", "--quiet", "HEAD"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return commit.strip() + "+changes" * bool(changed)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
