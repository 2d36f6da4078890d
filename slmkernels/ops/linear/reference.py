"""Linear attention, the definition: a loop over tokens; and the same by chunks. Pure PyTorch.

Both are differentiable by autograd and exact in float64; every kernel is checked against `recurrent`.
Letters: B batch, T tokens, H value heads, Hk query and key heads, K key size, V value size, C chunk.
Source: Katharopoulos et al. 2020 (linear attention, section 3.2); Yang et al. 2024 (GLA, section 4; DeltaNet,
section 3.2: the UT transform); Yang et al. 2025 (Gated DeltaNet, section 3.3); Kimi Team 2025 (Kimi Linear).
"""

from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 64  # tokens a chunk; 16 with a decay per channel, whose products take [C, C, K]
EPS = 1e-6  # beside the normaliser, and inside the l2 norm


def recurrent(q, k, v, decay, beta, state, normalizer):
    """Token by token: q, k, decay `[B, T, H, K]` (decay also `[..., 1]`), v `[B, T, H, V]`, beta `[B, T, H]`.

    state `[B, H, K, V]`, normalizer `[B, H, K]` or None -> o before any scale, state, normalizer.
    """
    outputs = []
    for t in range(q.shape[1]):
        gate, key, value = decay[:, t].exp(), k[:, t], v[:, t]  # [B, H, K or 1], [B, H, K], [B, H, V]
        state = gate[..., None] * state
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhkv,bhk->bhv", state, key))
        state = state + key[..., None] * value[..., None, :]
        o = torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        if normalizer is not None:
            normalizer = gate * normalizer + key
            o = o / ((normalizer * q[:, t]).sum(-1, keepdim=True) + EPS)
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state, normalizer


def chunked(q, k, v, decay, beta, state, normalizer):
    """The same, chunk by chunk: inside one, [C, C] products; between them, the state."""
    if q.shape[1] == 0:
        return v, state, normalizer
    outputs = []
    C = CHUNK if decay.shape[-1] == 1 else 16
    for x in zip(*(x.transpose(1, 2).split(C, 2) for x in (q, k, v, decay)), strict=True):
        qc, kc, vc, g = x  # [B, H, C, ...]
        c = qc.shape[2]
        after = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()  # i >= j
        # Sums in float64: differences of two long ones keep the digits of short ones. e^-1000 is 0.
        G = g.double().clamp(min=-1000).cumsum(2)  # from the chunk's start up to i, itself included
        between = (G[:, :, :, None] - G[:, :, None]).masked_fill(~after[..., None], -torch.inf)
        into, out_of, between = (x.to(v.dtype).exp() for x in (G, G[:, :, -1:] - G, between))

        def products(x, kc=kc, between=between):  # [B, H, C, C]
            if between.shape[-1] == 1:
                return (x @ kc.mT) * between[..., 0]
            return torch.einsum("bhic,bhjc,bhijc->bhij", x, kc, between)

        if beta is not None:
            b = beta.transpose(1, 2)[:, :, len(outputs) * C :][:, :, :c, None]  # [B, H, C, 1]
            error = b * (vc - (into * kc) @ state)
            vc = torch.linalg.solve_triangular(
                b * products(kc).tril(-1), error, upper=False, unitriangular=True
            )
        A = products(qc)
        o = A @ vc + (into * qc) @ state
        if normalizer is not None:
            o = o / (A.sum(-1, keepdim=True) + (into * qc) @ normalizer[..., None] + EPS)
            normalizer = into[:, :, -1] * normalizer + (out_of * kc).sum(2)
        state = into[:, :, -1, :, None] * state + (out_of * kc).mT @ vc
        outputs.append(o.transpose(1, 2))
    return torch.cat(outputs, 1), state, normalizer


def linear_attention(
    q, k, v, decay=None, beta=None, initial_state=None, initial_normalizer=None, cu_seqlens=None,
    *, scale, normalize=False, l2norm_qk=False, form=chunked,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The whole operation -> o `[B, T, H, V]` in v's dtype, state `[N, H, K, V]`, normalizer `[N, H, K]`."""
    (B, T, Hk, K), (H, V) = q.shape, v.shape[2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is None:
        spans = [(slice(None), slice(None))]
    else:
        spans = [(slice(None), slice(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    N = B if cu_seqlens is None else len(spans)
    q, k, x = q.to(dtype), k.to(dtype), v.to(dtype)
    if l2norm_qk:
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + EPS) for y in (q, k))
    q, k = (y.repeat_interleave(H // Hk, 2) for y in (q, k))
    if decay is None:
        g = x.new_zeros(B, T, H, 1)
    else:
        g = decay.to(dtype).expand(B, T, H) if decay.ndim == 1 else decay.to(dtype)
        g = g[..., None] if g.ndim == 3 else g
    state = x.new_zeros(N, H, K, V) if initial_state is None else initial_state.to(dtype)
    z = None
    if normalize:
        z = x.new_zeros(N, H, K) if initial_normalizer is None else initial_normalizer.to(dtype)
    results = []
    for n, span in enumerate(spans):
        row = slice(None) if cu_seqlens is None else slice(n, n + 1)
        b = None if beta is None else beta[span].to(dtype)
        states = state[row], None if z is None else z[row]
        results.append(form(q[span], k[span], x[span], g[span], b, *states))
    outputs, states, normalizers = zip(*results, strict=True) if results else ((x,), (state,), (z,))
    o = torch.cat(outputs, 1) if normalize else scale * torch.cat(outputs, 1)
    return o.to(v.dtype), torch.cat(states), torch.cat(normalizers) if normalize else None
