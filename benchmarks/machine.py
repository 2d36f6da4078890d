"""The processor's measured matmul rate, beside the other facts that a result depends on."""

import statistics

import torch

from slmkernels.facts import Facts, environment  # noqa: F401

from .timing import Timer

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
MATMUL_ROUNDS = 7

MATMUL_LIMIT = 0.5  # seconds


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of several square torch matmuls in `dtype`, here and now.

    Not the processor's peak: torch's own matmul may be far from it, and our kernels may pass it.
    """
    timer, rates = Timer(device), []
    for n in MATMUL_SIZES[device.type]:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        repeats = timer.repeats(lambda a=a, b=b: a @ b)
        if timer.sample(lambda a=a, b=b: a @ b, 1) > MATMUL_LIMIT:  # an emulated dtype; no size will be fast
            return max([*rates, 2 * n**3 / timer.sample(lambda a=a, b=b: a @ b, 1)])
        samples = [timer.sample(lambda a=a, b=b: a @ b, repeats) for _ in range(MATMUL_ROUNDS)]
        rates.append(2 * n**3 / statistics.median(samples))
    return max(rates)
