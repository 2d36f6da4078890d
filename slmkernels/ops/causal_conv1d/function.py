"""Stand-in for `causal_conv1d` in plain PyTorch, to be replaced by the operation of the same name."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = sum_w weight[:, w] x_(t - W + 1 + w): x `[B, T, C]`, weight `[C, W]`, state `[N, W-1, C]`."""
    W = weight.shape[1]
    if cu_seqlens is None:
        pieces, N = [x], x.shape[0]
    else:
        pieces, N = [x[:, a:b] for a, b in pairwise(cu_seqlens.tolist())], cu_seqlens.shape[0] - 1
    state = x.new_zeros(N, W - 1, x.shape[2]) if initial_state is None else initial_state
    outputs, states = [], []
    for piece, before in zip(pieces, state.split(N if cu_seqlens is None else 1), strict=True):
        T = piece.shape[1]
        padded = torch.cat([before, piece], dim=1)  # [B, W-1+T, C]
        y = sum(weight[:, w] * padded[:, w : w + T] for w in range(W))
        y = y if bias is None else y + bias
        outputs.append(F.silu(y) if activation == "silu" else y)
        states.append(padded[:, T:])
    y = torch.cat(outputs, dim=1) if outputs else x
    return (y, torch.cat(states)) if return_state else y
