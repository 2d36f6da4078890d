"""What a result depends on besides the code: versions, the processor, its matmul rate and bandwidth."""

import importlib.util
import os
import platform
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL
from typing import NamedTuple

import torch

from slmkernels import native

from .timing import Timer

ROOT = Path(__file__).parent.parent
MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
MATMUL_LIMIT = 0.5  # seconds
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # far more than caches hold
ROUNDS = 7
GPU_PEERS = ("flash-linear-attention", "flash-attn-4", "flash-attn", "scattermoe")

Facts = dict[str, str | int]


class Rates(NamedTuple):
    """What this machine reaches, measured in the same run."""

    matmul: float  # FLOP/s of torch's matmul in the case's dtype
    copy: float  # bytes/s of a large copy, read and written


def environment(device: torch.device) -> Facts:
    """The facts to print above a result and to keep beside it."""
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
        facts |= {name: _installed(name, "missing") for name in GPU_PEERS}
    return facts


def _why_no_library() -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in native.REASONS.items())


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "missing"
    return _installed(package, "not installed (run from a checkout)")


def _installed(distribution: str, otherwise: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return otherwise


def _commit() -> str:
    """The checkout's commit, with `+changes` where tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
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


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of several square torch matmuls in `dtype`, here and now.

    Not the processor's peak: torch's own matmul may be far from it, and our kernels may pass it.
    """
    timer, rates = Timer(device), []
    for n in MATMUL_SIZES[device.type]:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        sampler = timer.sampler([lambda a=a, b=b: a @ b])
        first = sampler.seconds()
        if first > MATMUL_LIMIT:  # an emulated dtype; no size will be fast
            return max([*rates, 2 * n**3 / first])
        rates.append(2 * n**3 / statistics.median(sampler.seconds() for _ in range(ROUNDS)))
    return max(rates)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy, counting what it reads and what it writes."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sampler = Timer(device).sampler([lambda: target.copy_(source)])
    return 2 * source.numel() / statistics.median(sampler.seconds() for _ in range(ROUNDS))
