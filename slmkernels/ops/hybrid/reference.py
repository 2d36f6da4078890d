"""Hybrid attention, the definition: dense scores, two masks, one denominator. Pure PyTorch.

Two forms of the same function: `quadratic` is the definition, `linear_cost` keeps a state for the far keys.
Differentiable by autograd and exact in float64; every kernel is checked against this file.
Letters: B batch, T queries, S keys, Hq query heads, H key-value heads, D head size, F features, V values.
Source: Zhang et al., LoLCATs (2024), section 3.2 and appendix; mix is the factor of their softmax terms.
"""

from itertools import pairwise

import torch
from torch import Tensor

EPS = 1e-6


def first_near(i: Tensor | int, window: int, block: bool) -> Tensor | int:
    """The first key that is near to position i; may be negative."""
    return i // window * window - window if block else i - window + 1


def weigh(q, k, phi_q, phi_k, mix, near, far, scale) -> Tensor:
    """Weights [..., H, T, C] of keys [..., C, H, D] by the masks; the shift is the first maximum."""
    s = torch.einsum("...thd,...chd->...htc", q, k) * scale
    s = s.masked_fill(~near, float("-inf"))
    m = s.gather(-1, s.argmax(-1, keepdim=True))
    a = torch.einsum("...thf,...chf->...htc", phi_q, phi_k)
    return mix[:, None, None] * torch.exp(s - m) + a.masked_fill(~far, 0.0)


def quadratic(q, k, v, phi_q, phi_k, mix, state, z, window, block, scale):
    """One sequence per batch row, a KV head per query head -> o, and the state of the last query."""
    T, S = q.shape[1], k.shape[1]
    if T == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), state, z
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)[None, :]
    first = first_near(i, window, block)
    w = weigh(q, k, phi_q, phi_k, mix, (first <= j) & (j <= i), j < first, scale)  # [B, Hq, T, S]
    o = torch.einsum("bhts,bshv->bthv", w, v) + torch.einsum("bthf,bhfv->bthv", phi_q, state)
    sums = w.sum(-1).transpose(1, 2) + torch.einsum("bthf,bhf->bth", phi_q, z)
    n = max(0, first_near(S - 1, window, block))
    state = state + torch.einsum("bshf,bshv->bhfv", phi_k[:, :n], v[:, :n])
    return o / (sums + EPS)[..., None], state, z + phi_k[:, :n].sum(1)


def linear_cost(q, k, v, phi_q, phi_k, mix, state, z, window, block, scale):
    """The same by blocks of C >= window tokens: near keys lie in the query's block and the one before."""
    T, S, C = q.shape[1], k.shape[1], -(-64 // window) * window
    if T <= C:
        return quadratic(q, k, v, phi_q, phi_k, mix, state, z, window, block, scale)
    n = -(-S // C)

    def blocks(x):  # [B, S or T, H, D] -> [B, n, C, H, D]; the last T of S queries are there
        return torch.nn.functional.pad(x, (0, 0, 0, 0, S - x.shape[1], n * C - S)).unflatten(1, (n, C))

    def with_previous(x):  # [B, n, C, H, D] -> [B, n, 2C, H, D]
        return torch.cat([torch.nn.functional.pad(x[:, :-1], (0,) * 6 + (1, 0)), x], dim=2)

    q, k, x, phi_q, phi_k = (blocks(y) for y in (q, k, v, phi_q, phi_k))
    keys, values, features = (with_previous(y) for y in (k, x, phi_k))
    i = torch.arange(n * C, device=q.device).view(n, 1, C, 1)
    j = torch.arange(n, device=q.device).view(n, 1, 1, 1) * C + torch.arange(-C, C, device=q.device)
    first = first_near(i, window, block).clamp(min=0)
    w = weigh(q, keys, phi_q, features, mix, (first <= j) & (j <= i), (j >= 0) & (j < first), scale)
    pad = (0, 0, 0, 0, 0, 0, 2, 0)  # state before block b: the keys of blocks 0 .. b-2
    kv = torch.nn.functional.pad(torch.einsum("bnchf,bnchv->bnhfv", phi_k, x), pad)[:, :n].cumsum(1)
    ksum = torch.nn.functional.pad(phi_k.sum(2), pad[2:])[:, :n].cumsum(1)
    o = torch.einsum("bnhtc,bnchv->bnthv", w, values)
    o = o + torch.einsum("bnthf,bnhfv->bnthv", phi_q, kv + state[:, None])
    sums = w.sum(-1).transpose(2, 3) + torch.einsum("bnthf,bnhf->bnth", phi_q, ksum + z[:, None])
    o = (o / (sums + EPS)[..., None]).flatten(1, 2)[:, S - T : S]
    last = max(0, first_near(S - 1, window, block))
    phi_k = phi_k.flatten(1, 2)[:, :last]
    state = state + torch.einsum("bshf,bshv->bhfv", phi_k, v[:, :last])
    return o, state, z + phi_k.sum(1)


def hybrid_attention(
    q, k, v, phi_q, phi_k, mix=None, initial_state=None, initial_normalizer=None, cu_seqlens=None, *,
    window, block, scale, form=linear_cost,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The whole operation -> o [B, T, Hq, V] in q's dtype, state [N, H, F, V], normalizer [N, H, F].

    `block`: block alignment. S > T keys: query t stands at position t + S - T (without cu_seqlens).
    """
    Hq, (H, V), F = q.shape[2], v.shape[2:], phi_q.shape[3]
    dtype, result = torch.promote_types(q.dtype, torch.float32), q.dtype
    spans = [slice(None)] if cu_seqlens is None else [slice(a, b) for a, b in pairwise(cu_seqlens.tolist())]
    N = q.shape[0] if cu_seqlens is None else len(spans)
    q, k, v, phi_q, phi_k = (x.to(dtype) for x in (q, k, v, phi_q, phi_k))
    k, x, phi_k = (y.repeat_interleave(Hq // H, 2) for y in (k, v, phi_k))
    mix = q.new_ones(Hq) if mix is None else mix.to(dtype)
    state = q.new_zeros(N, H, F, V) if initial_state is None else initial_state.to(dtype)
    z = q.new_zeros(N, H, F) if initial_normalizer is None else initial_normalizer.to(dtype)
    results = []
    for n, span in enumerate(spans):
        row = slice(None) if cu_seqlens is None else slice(n, n + 1)
        states = (y[row].repeat_interleave(Hq // H, 1) for y in (state, z))
        parts = (y[:, span] for y in (q, k, x, phi_q, phi_k))
        results.append(form(*parts, mix, *states, window, block, scale))
    if not results:
        return q.new_zeros(*q.shape[:3], V).to(result), state, z
    o, states, normalizers = zip(*results, strict=True)
    heads = slice(None, None, Hq // H)
    return torch.cat(o, 1).to(result), torch.cat(states)[:, heads], torch.cat(normalizers)[:, heads]


def hybrid_attention_step(
    q, k, v, phi_q, phi_k, k_ring, v_ring, phi_ring, state, z, position, mix, window, block, scale
):  # fmt: skip
    """Decoding by the definition, token by token -> o [B, T, Hq, V]. Rings `[B, H, R, size]`, the states and
    position `[B, H]` (tokens so far) are updated in place; the slot of token p is p % R."""
    R, start = k_ring.shape[2], int(position.flatten()[0]) if position.numel() else 0
    rings, outputs = (k_ring, v_ring, phi_ring), [q.new_empty(q.shape[0], 0, q.shape[2], v.shape[3])]
    for t in range(q.shape[1]):
        i = start + t
        a, b = (max(0, first_near(j, window, block)) for j in (i - 1, i))
        far, near = (torch.arange(*span, device=q.device) % R for span in ((a, b), (b, i + 1)))
        x, features = (ring[:, :, far].to(state.dtype) for ring in (v_ring, phi_ring))
        state += torch.einsum("bhsf,bhsv->bhfv", features, x)  # before token i takes the slot of one of them
        z += features.sum(2)
        for ring, new in zip(rings, (k, v, phi_k), strict=True):
            ring[:, :, i % R] = new[:, t]
        keys, x, features = (ring[:, :, near].transpose(1, 2) for ring in rings)
        tensors = q[:, t : t + 1], keys, x, phi_q[:, t : t + 1], features, mix, state, z
        o, _, _ = hybrid_attention(*tensors, window=len(near), block=False, scale=scale, form=quadratic)
        outputs.append(o)
    position += q.shape[1]
    return torch.cat(outputs, dim=1)
