"""Routing and experts, the definitions, in pure PyTorch: differentiable by autograd and exact in float64.

Every kernel is checked against this file. Letters: T tokens, E experts, k experts of a token, d channels,
n hidden channels.
Sources: Shazeer et al. 2017 (sparsely gated experts), Fedus et al. 2021 (Switch: load-balance loss), Zoph et
al. 2022 (ST-MoE: z-loss), DeepSeek-V3 2024 section 2.1.2 (sigmoid scores, selection bias, groups), OpenAI
2025 (gpt-oss: swigluoai).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = ("softmax", "sigmoid", "softmax_after_topk")
EPS = 1e-20  # beside the sum of sigmoid scores, as in DeepSeek-V3

ALPHA, LIMIT = 1.702, 7.0  # of "swigluoai"

# Of a pre-activation h, or of its gate and its up half.
gelu_tanh = partial(F.gelu, approximate="tanh")
GATED = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh}
GATED["swigluoai"] = lambda gate: gate * torch.sigmoid(ALPHA * gate)
PLAIN = {"relu2": lambda x: F.relu(x).square(), "gelu": F.gelu, "gelu_tanh": gelu_tanh}
ACTIVATIONS = (*GATED, *PLAIN)  # operators know an activation by its number here


def ranked(choice: Tensor, allowed: Tensor) -> Tensor:
    """For comparisons: NaN is the greatest of all, -inf what is not allowed."""
    return choice.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(~allowed, -torch.inf)


def in_best_groups(choice: Tensor, groups: int, top: int) -> Tensor:
    """choice [T, E] -> bool [T, E], the experts of the `top` groups whose two best choices sum highest."""
    grouped = choice.unflatten(1, (groups, -1))  # [T, groups, E / groups]
    best = grouped.topk(min(2, grouped.shape[2]), dim=2).values
    second = best[..., 1:]
    value = best[..., 0] + second.masked_fill(second == -torch.inf, 0.0).sum(-1)  # [T, groups]
    chosen = value.argsort(dim=1, descending=True, stable=True)[:, :top]  # ties: the lower index
    kept = torch.zeros_like(value, dtype=torch.bool).scatter(1, chosen, True)
    return kept[..., None].expand_as(grouped).flatten(1)


def route(logits, selection_bias, expert_mask, top_k, score, renormalize, groups, top, route_scale):
    """logits [T, E] -> indices [T, k], weights [T, k], counts [E], mean probability [E], mean squared
    logsumexp, mean entropy of the probabilities."""
    allowed = logits != -torch.inf if expert_mask is None else expert_mask & (logits != -torch.inf)  # NaN is
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~allowed, -torch.inf)
    none = ~allowed.any(1, keepdim=True)  # a token without experts has all -inf: keep NaN out of it
    lse = x.masked_fill(none, 0.0).logsumexp(1, keepdim=True).masked_fill(none, 0.0)  # [T, 1]
    soft, sigmoid = (x - lse).exp(), x.sigmoid()
    s = {"softmax": soft, "sigmoid": sigmoid, "softmax_after_topk": x}[score]
    p = sigmoid / (sigmoid.sum(1, keepdim=True) + EPS) if score == "sigmoid" else soft  # [T, E]
    with torch.no_grad():
        entropy = torch.special.entr(p).sum(1)
        kept, choice = allowed, s if selection_bias is None else s + selection_bias
        if groups > 1:
            kept = allowed & in_best_groups(ranked(choice, allowed), groups, top)
        if selection_bias is None:
            choice = x  # the order of the scores, without the ties that rounding makes
        order = ranked(choice, kept).sort(dim=1, descending=True, stable=True)  # ties: the lower index
        values, indices = (part[:, :top_k] for part in order)
        absent = values == -torch.inf
    if score != "sigmoid" and (renormalize or score == "softmax_after_topk"):
        chosen = x.gather(1, indices).masked_fill(absent, -torch.inf)
        total = chosen.masked_fill(absent.all(1, keepdim=True), 0.0).logsumexp(1, keepdim=True)
        weights = (chosen - total).exp()
    else:
        weights = s.gather(1, indices).masked_fill(absent, 0.0)
        if renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + EPS)
    weights = weights.masked_fill(absent, 0.0) * route_scale  # absent: 0 beside NaN too
    counts = indices.new_zeros(logits.shape[1]).scatter_add(0, indices.flatten(), (~absent).long().flatten())
    indices, counts = indices.masked_fill(absent, -1).to(torch.int32), counts.to(torch.int32)
    probabilities, z, entropy = (x.sum(0) / max(logits.shape[0], 1) for x in (p, lse[:, 0].square(), entropy))
    return indices, weights, counts, probabilities, z, entropy


def activate(h: Tensor, activation: str, interleaved: bool) -> Tensor:
    """Pre-activation [..., 2n], or [..., n] of an activation without a gate -> [..., n]."""
    if activation in PLAIN:
        return PLAIN[activation](h)
    gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    if activation == "swigluoai":  # as clamped by torch.clamp, but the gradient of NaN is not 0
        gate = gate.masked_fill(gate > LIMIT, LIMIT)
        up = up.masked_fill(up > LIMIT, LIMIT).masked_fill(up < -LIMIT, -LIMIT) + 1
    return GATED[activation](gate) * up


def expert_mlp(x, indices, weights, w_gate_up, w_down, b_gate_up, b_down, activation, interleaved):
    """Expert after expert: its tokens' rows, its two matrices, their weighted sum. -> y [T, d]."""
    high = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(x.shape, dtype=high)
    matrices = (w_gate_up, w_down, b_gate_up, b_down)
    parts = ([None] * len(w_down) if m is None else m.unbind() for m in matrices)  # one backward for all
    for e, (w_up, w_out, b_up, b_out) in enumerate(zip(*parts, strict=True)):
        token, slot = torch.nonzero(indices == e, as_tuple=True)
        a = activate(F.linear(x[token], w_up, b_up), activation, interleaved)
        row = F.linear(a, w_out, b_out).to(high)
        y = y.index_add(0, token, row if weights is None else weights[token, slot, None].to(high) * row)
    return y.to(x.dtype)


def segment_mlp(x, cu_seqlens, experts, *matrices):
    """All tokens of a segment to its expert: one expert a token, of weight 1. -> y [T, d]."""
    indices = torch.repeat_interleave(experts, cu_seqlens.diff().long(), output_size=x.shape[0])
    return expert_mlp(x, indices[:, None], None, *matrices)
