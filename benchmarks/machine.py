"""What this machine reaches, measured in the same run, beside the other facts that a result depends on."""

import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from slmkernels import facts
from slmkernels.facts import Facts

from .timing import Timer

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
MATMUL_LIMIT = 0.5  # seconds
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # far more than caches hold
ROUNDS = 7
GPU_PEERS = ("flash-linear-attention", "flash-attn-4", "flash-attn", "scattermoe")


class Rates(NamedTuple):
    """What this machine reaches, measured in the same run."""

    matmul: float  # FLOP/s of torch's matmul in the case's dtype
    copy: float  # bytes/s of a large copy, read and written


def environment(device: torch.device) -> Facts:
    """The facts to print above a result and to keep beside it."""
    found = facts.environment(device)
    return found | {name: _installed(name) for name in GPU_PEERS} if device.type == "cuda" else found


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


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
