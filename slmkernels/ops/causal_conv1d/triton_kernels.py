"""Causal convolution in Triton: tiles, launchers, operator registration.

The kernels and their story stand in `triton_forward.py` and `triton_backward.py`; they are imported only
where Triton is, so that this file always imports and `reason_against` can say what is missing.
"""

import torch
from torch import Tensor

from ...triton_support import ABSENT, readable, reason_against_tensor

if ABSENT is None:
    import triton

    from . import triton_backward, triton_forward


def reason_against(call) -> str | None:
    """None where these kernels can run `call`, else why not."""
    return reason_against_tensor("x", call.x)


def config(kind: str, C: int, W: int) -> dict[str, int]:
    """Tile of "forward" or "backward": whole lines of 128 bytes of a 16-bit row, and few enough elements a
    thread (16, 8, and 4 of many taps) that registers do: 80 and 140 with 4 taps, by
    tests/test_causal_conv1d_aot.py.

    One tile for a shape: the bits of d(weight) then depend on nothing measured.
    """
    block_c = min(128 if kind == "forward" else 64, max(16, triton.next_power_of_2(C)))
    block_t = 16 if kind == "forward" or W <= 4 else 8
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}


def step_config(C: int, W: int) -> dict[str, int]:
    """Tile of the decode step: bound by latency, so few channels a program."""
    block_c = min(256, max(16, triton.next_power_of_2(C)))
    block_w = triton.next_power_of_2(max(1, W - 1))
    return {"BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}


# ---- launchers ---------------------------------------------------------------------------------------------


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _grid(x: Tensor, cu: Tensor | None, extra: int, tile: dict[str, int]) -> tuple[int, int]:
    """Tiles along the rows of all sequences, and N; see "Packed sequences" in triton_forward.py."""
    B, T, _ = x.shape
    if cu is None:
        return B * max(triton.cdiv(T + extra, tile["BLOCK_T"]), 1), B
    N = cu.shape[0] - 1
    return ((T + N * extra) // tile["BLOCK_T"] + N if N else 0), N


def forward(x, weight, bias, initial_state, cu_seqlens, silu, return_state) -> tuple[Tensor, Tensor]:
    T, C = x.shape[1:]
    W, cu = weight.shape[1], _contiguous(cu_seqlens)
    y = x.new_empty(x.shape)
    tile = config("forward", C, W)
    tiles, N = _grid(x, cu, 0, tile)
    state = x.new_empty(N if return_state else 0, W - 1, C)
    if tiles * C == 0 or y.numel() + state.numel() == 0:
        return y, state
    x = readable(x)
    sizes = {"W": W, "SILU": silu, **tile}
    args = [x, weight.contiguous(), _contiguous(bias), _contiguous(initial_state), y]
    args += [state if return_state else None, cu, T, N, *x.stride()[:2], C]
    with torch.cuda.device_of(x):
        triton_forward.forward_kernel[(tiles * triton.cdiv(C, tile["BLOCK_C"]),)](*args, **sizes)
    return y, state


def backward(
    dout, dstate, x, weight, bias, initial_state, cu_seqlens, silu
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, C = x.shape[1:]
    W, cu = weight.shape[1], _contiguous(cu_seqlens)
    dx = x.new_empty(x.shape)
    tile = config("backward", C, W)
    tiles, N = _grid(x, cu, W - 1, tile)
    dinitial = x.new_empty(0 if initial_state is None else N, W - 1, C)
    sums = x.new_empty(tiles, W + 1, C, dtype=torch.float32)
    if sums.numel() > 0:
        x, dout = readable(x), readable(dout)
        sizes = {"W": W, "SILU": silu, **tile}
        args = [dout, _contiguous(dstate), x, weight.contiguous(), _contiguous(bias)]
        args += [_contiguous(initial_state), dx, None if initial_state is None else dinitial, sums, cu]
        args += [T, N, *x.stride()[:2], *dout.stride()[:2], C]
        with torch.cuda.device_of(x):
            triton_backward.backward_kernel[(tiles * triton.cdiv(C, tile["BLOCK_C"]),)](*args, **sizes)
    total = sums.sum(0)  # [W+1, C]
    dweight = weight.new_empty(C, W).copy_(total[:W].t())
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(C).copy_(total[W])
    return dx, dweight, dbias, dinitial


def step(x, state, weight, bias, silu) -> Tensor:
    B, n, C = x.shape
    W = weight.shape[1]
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    if C > 1 and state.shape[1] > 0 and state.stride(2) != 1:
        raise ValueError(f"state has strides {state.stride()}; expected 1 in the last dimension")
    x, tile = readable(x), step_config(C, W)
    args = [x, state, weight.contiguous(), _contiguous(bias), y, n, *x.stride()[:2], *state.stride()[:2], C]
    with torch.cuda.device_of(x):
        grid = (B * triton.cdiv(C, tile["BLOCK_C"]),)
        triton_forward.step_kernel[grid](*args, W=W, SILU=silu, **tile)
    return y


# ---- operators ---------------------------------------------------------------------------------------------

_OPERATORS = {
    "forward": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu, "
        "bool return_state) -> (Tensor, Tensor)",
        forward,
    ),
    "backward": (
        "(Tensor dout, Tensor? dstate, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
        "Tensor? cu_seqlens, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
        backward,
    ),
    "step": (
        "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
        step,
    ),
}

# Defined even where Triton is absent, so that `function.py` registers its fakes without asking.
for _name, (_schema, _function) in _OPERATORS.items():
    torch.library.define(f"slmkernels::triton_causal_conv1d_{_name}", _schema)
    if ABSENT is None:
        torch.library.impl(f"slmkernels::triton_causal_conv1d_{_name}", ("cpu", "cuda"), _function)
