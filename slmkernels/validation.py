"""Argument checks the operations share. Every error names the argument, what it was and what it must be."""

import itertools
import sys
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

State = Tensor | tuple[Tensor, Tensor]
STRIDED = torch.strided
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value) -> str:
    """A value as error messages show it: tensors by shape, dtype and device."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} on {value.device}"
    if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
        return f"({', '.join(map(describe, value))})"
    return f"{value!r} ({type(value).__name__})"


def fail(name: str, value, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` saying that argument `name` was `value` where `expected` was needed."""
    raise error(f"{name} is {describe(value)}; expected {expected}")


def expect(condition: bool, name: str, value, expected: str, error: type[Exception] = ValueError) -> None:
    """`fail` unless the condition holds. Where a call's time counts, test first: the message costs more."""
    if not condition:
        fail(name, value, expected, error)


def alike(ndim: int | None, *tensors) -> bool:
    """Whether these are dense tensors of one float dtype on one device, all of `ndim` dimensions (None: any).

    Nearly all calls have such tensors, and this says so quickly. For others the checks below, one argument at
    a time, find what is wrong and with which one.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or first.dtype not in FLOATS:
        return False
    dtype, on_cpu = first.dtype, first.is_cpu
    for x in tensors:
        if not isinstance(x, Tensor) or x.dtype != dtype or x.layout != STRIDED:
            return False
        if not (x.is_cpu if on_cpu else x.device == first.device) or (ndim is not None and x.ndim != ndim):
            return False
    return True


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, gates and states beside tensors of `dtype`: float32, float64 of float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes a microsecond also where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def check_float_tensor(name: str, value, ndim: int, letters: str) -> None:
    """A dense floating-point tensor of `ndim` dimensions, named by `letters` in the message."""
    if isinstance(value, Tensor) and value.dtype in FLOATS and value.layout == torch.strided:
        if value.ndim == ndim:
            return
        fail(name, value, f"a floating-point tensor {letters}")
    dtypes = "float32, bfloat16, float16 or float64"
    fail(name, value, f"a dense floating-point tensor {letters}, {dtypes}", TypeError)


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    if value.dtype != other.dtype:
        fail(name, value, f"{other_name}'s dtype {other.dtype}", TypeError)
    if value.device != other.device:
        fail(name, value, f"{other_name}'s device {other.device}")


def check_number(name: str, value, positive: bool = False) -> float:
    """A finite number as a float; `positive`: above 0."""
    expected = "a finite number > 0" if positive else "a finite number"
    if not isinstance(value, (int, float)) or type(value) is bool:
        fail(name, value, expected, TypeError)
    if not -sys.float_info.max <= value <= sys.float_info.max or (positive and value <= 0):
        fail(name, value, expected)
    return float(value)


def check_flag(name: str, value) -> bool:
    """True or False and nothing else."""
    if type(value) is not bool:
        fail(name, value, "True or False", TypeError)
    return value


def check_state(name: str, state, normalize: bool, shape: tuple[int, ...], q: Tensor, letters="[N, H, K, V]"):
    """(state, normalizer) from the public form: a tensor of `shape`, or with `normalize` a pair."""
    if normalize and (not isinstance(state, (tuple, list)) or len(state) != 2):
        fail(name, state, "a pair (state, normalizer)", TypeError)
    parts = tuple(state) if normalize else (state,)
    if alike(None, *parts) and parts[0].shape == shape and parts[0].device == q.device:
        if not normalize:
            return state, None
        if parts[1].shape == shape[:-1]:
            return parts
    wanted = (letters, shape), (letters.rpartition(",")[0] + "]", shape[:-1])
    for i, (part, (names, size)) in enumerate(zip(parts, wanted, strict=False)):
        check_float_tensor(name, part, len(size), names)
        if part.shape != size or part.device != q.device:
            which = f"{name}[{i}]" if normalize else name
            fail(which, part, f"shape {list(size)} on {q.device}")
    return parts if normalize else (state, None)


def check_cu_seqlens(name: str, value, total: int, device: torch.device) -> None:
    """Offsets of packed sequences: int32 [N+1], from 0 to `total`, never falling.

    The values of a CUDA tensor are checked on the device, without waiting for it.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        fail(name, value, "an int32 tensor [N+1]", TypeError)
    if value.ndim != 1 or value.shape[0] < 1 or value.device != device:
        fail(name, value, f"an int32 tensor [N+1] on {device}")
    expected = f"offsets that start at 0, never fall and end at {total}"
    if value.shape[0] == 1 and total != 0:
        fail(name, value, expected)
    if torch.compiler.is_compiling() or isinstance(value, FakeTensor):
        return  # values are not there to look at; native CPU kernels check them again, GPU kernels cannot
    if value.device.type == "cpu":
        offsets = value.tolist()
        rising = all(a <= b for a, b in itertools.pairwise(offsets))
        if not rising or offsets[0] != 0 or offsets[-1] != total:
            fail(name, offsets, expected)
    else:
        good = (value[0] == 0) & (value[-1] == total) & (value[1:] >= value[:-1]).all()
        torch._assert_async(good, f"{name} is not {expected}")
