"""Triton as this installation has it, and what the launchers of every operation share.

Kernels are imported only where Triton is, so that this module always imports and `reason_against` can say
what is missing.
"""

import functools
import os

import torch
from torch import Tensor

try:
    import triton

    if not hasattr(triton, "knobs"):
        raise ImportError(f"version {triton.__version__}; 3.4 or newer is needed")

    ABSENT: str | None = None
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError as error:  # no Triton for this platform, or one that does not load
    ABSENT = f"triton cannot be used: {error}"
    INTERPRETED = False

AUTOTUNE = os.environ.get("SLMKERNELS_AUTOTUNE") == "1"
MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634

# What the operands of products with a state are rounded to, by the inputs' dtype. A state, a denominator's
# reciprocal or a gradient leaves float16's range easily; TensorFloat-32 has its digits and float32's range.
OPERANDS = {torch.float32: "ieee", torch.float16: "tf32", torch.bfloat16: "bf16"}


def reason_against_tensor(name: str, x: Tensor) -> str | None:
    """None where Triton's kernels can run on argument `name`'s device and dtype, else why not."""
    if ABSENT is not None:
        return ABSENT
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return (
            f"device {x.device.type} is not cuda (TRITON_INTERPRET=1 runs the kernels on the cpu, for tests)"
        )
    if x.dtype == torch.float64:
        return f"{name} has dtype float64; float32, float16 and bfloat16 are supported"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter computes garbage in bfloat16; float32 and float16 are supported there"
    return None


def reason_against(call) -> str | None:
    """None where these kernels can run `call` (any object with its q, v and maybe phi_q), else why not."""
    reason = reason_against_tensor("q", call.q)
    if reason is not None:
        return reason
    for name in ("q", "v", "phi_q"):
        x = getattr(call, name, None)
        if x is not None and x.shape[-1] > MAX_HEAD_DIM:
            return f"{name} has head dimension {x.shape[-1]}; up to {MAX_HEAD_DIM} is supported"
    return None


def padded(d: int) -> int:
    """The head size inside a tile: a power of two, at least tl.dot's 16."""
    return max(16, 1 << (d - 1).bit_length())


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number, 80, 90, ...; 80 where there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def readable(x: Tensor) -> Tensor:
    """x with a last stride of 1 and row strides small enough for int32 offsets inside a tile; else a copy."""
    if (x.shape[-1] > 1 and x.stride(-1) != 1) or x.stride(1) >= 2**23:
        return x.contiguous()
    return x


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The online softmax takes max(x) * unit for max(x * unit) and -inf * unit for -inf: unit must be > 0."""
    return (q, scale) if scale > 0 else (-q, max(-scale, 1e-30))  # a scale of 0: tiny enough for 2^0


@functools.cache
def autotuned(kernel, tiles: tuple[tuple[tuple[str, int], ...], ...], *choice):
    """`kernel` behind Triton's autotuner, to measure `tiles`; one instance a choice, so that no length enters
    its key."""
    configs = []
    for tile in map(dict, tiles):
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        configs.append(triton.Config(tile, **options))
    return triton.autotune(configs, key=[])(kernel)
