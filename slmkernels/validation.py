"""Argument checks the operations share. Every error names the argument, what it was and what it must be."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value) -> str:
    """A value as error messages show it: tensors by shape, dtype and device."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def expect(condition: bool, name: str, value, expected: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` saying that argument `name` was `value` where `expected` was needed."""
    if not condition:
        raise error(f"{name} is {describe(value)}; expected {expected}")


def check_float_tensor(name: str, value, ndim: int, letters: str) -> None:
    """A dense floating-point tensor of `ndim` dimensions, named by `letters` in the message."""
    expected = f"a floating-point tensor {letters}"
    expect(isinstance(value, Tensor), name, value, expected, TypeError)
    expect(value.dtype in FLOATS, name, value, f"{expected}, float32, bfloat16, float16 or float64", TypeError)
    expect(value.layout == torch.strided, name, value, f"{expected}, dense", TypeError)
    expect(value.ndim == ndim, name, value, expected)


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    same = f"{other_name}'s"
    expect(value.dtype == other.dtype, name, value, f"{same} dtype {other.dtype}", TypeError)
    expect(value.device == other.device, name, value, f"{same} device {other.device}")


def check_cu_seqlens(name: str, value, total: int, device: torch.device) -> None:
    """Offsets of packed sequences: int32 [N+1], from 0 to `total`, never falling.

    The values of a CUDA tensor are checked on the device, without waiting for it.
    """
    expect(isinstance(value, Tensor), name, value, "an int32 tensor [N+1]", TypeError)
    expect(value.dtype == torch.int32, name, value, "an int32 tensor [N+1]", TypeError)
    expect(value.ndim == 1 and value.shape[0] >= 1, name, value, "shape [N+1]")
    expect(value.device == device, name, value, f"device {device}")
    expect(value.shape[0] > 1 or total == 0, name, value, f"offsets from 0 to {total}")
    if torch.compiler.is_compiling() or isinstance(value, torch._subclasses.FakeTensor):
        return  # values are not there to look at; native kernels check them again
    if value.device.type == "cpu":
        offsets = value.tolist()
        rising = all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
        good = rising and offsets[0] == 0 and offsets[-1] == total
        expect(good, name, offsets, f"offsets that start at 0, never fall and end at {total}")
    else:
        good = (value[0] == 0) & (value[-1] == total) & (value[1:] >= value[:-1]).all()
        message = f"{name} must start at 0, never fall and end at {total}"
        torch._assert_async(good, message)
