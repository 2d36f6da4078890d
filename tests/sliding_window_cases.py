"""Inputs and the acceptance rule that the tests of sliding-window attention share.

An implementation passes if its error against the float64 reference is at most twice that of the same
computation in PyTorch in the same dtype, plus a rounding of the largest value:

    |ours - ref64| <= 2 |torch_same_dtype - ref64| + eps * max(1, max|ref64|)

The backward takes delta = sum(dO O) from o as it was saved, rounded to dtype, as every flash attention
does. Where dP and delta cancel, that rounding is all that is left of dS; `rounding_of_delta` allows for it.
"""

import torch
from rule import EPS

from slmkernels import sliding_window_attention
from slmkernels.ops.sliding_window.function import prepare
from slmkernels.ops.sliding_window.reference import visible


def inputs(seed, B, T, S, Hq, H, D, Dv, *, sinks=False):
    """Float64 tensors q, k, v, sinks or None, and gradients of o and lse."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = normal(B, T, Hq, D), normal(B, S, H, D), normal(B, S, H, Dv)
    return q, k, v, normal(Hq) if sinks else None, normal(B, T, Hq, Dv), normal(B, Hq, T)


def plain(q, k, v, *, sinks=None, left, right, scale, softcap):
    """The formula in PyTorch's own operations, every one of them in the inputs' dtype."""
    group = q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bhts", q * scale, k.repeat_interleave(group, 2))
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible(s.shape[2], s.shape[3], left, right, s.device), -torch.inf)
    sink = (
        -torch.inf * torch.ones_like(s[..., :1])
        if sinks is None
        else sinks[:, None, None].expand_as(s[..., :1])
    )
    s = torch.cat([s, sink], dim=-1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)[..., :-1]
    return torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(group, 2)), lse


def torch_same_dtype(*qkv, sinks=None, cu_seqlens=None, cu_seqlens_k=None, **options):
    """`plain` for each packed sequence: what PyTorch alone would give in this dtype."""
    call = prepare(*qkv, **options)
    kw = {name: getattr(call, name) for name in ("left", "right", "scale", "softcap")}
    if cu_seqlens is None:
        return plain(*qkv, sinks=sinks, **kw)
    q, k, v = qkv
    a, b = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    parts = [
        plain(q[:, a[n] : a[n + 1]], k[:, b[n] : b[n + 1]], v[:, b[n] : b[n + 1]], sinks=sinks, **kw)
        for n in range(len(a) - 1)
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def run(tensors, dtype, backend, **options):
    """o, lse and all gradients of one implementation, from float64 tensors rounded to dtype."""
    q, k, v, sinks, do, dlse = tensors
    leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        options["sinks"] = sinks.to(dtype).clone().requires_grad_()
    if backend == "torch":
        o, lse = torch_same_dtype(*leaves, **options)
    else:
        o, lse = sliding_window_attention(*leaves, return_lse=True, backend=backend, **options)
    seen = torch.isfinite(lse)
    loss = (o.double() * do.to(dtype).double()).sum()
    loss = loss + (torch.where(seen, lse, 0.0).double() * dlse.to(dtype).double()).sum()
    if sinks is not None:
        leaves.append(options["sinks"])
    grads = torch.autograd.grad(loss, leaves)
    names = ["o", "lse", "dq", "dk", "dv", "dsinks"]
    return dict(zip(names, [o.detach(), lse.detach(), *grads], strict=False))


def rounded(tensors, dtype):
    """The tensors as dtype sees them, in float64 again: the reference then answers for the same inputs."""
    return tuple(None if x is None else x.to(dtype).double() for x in tensors)


def rounding_of_delta(tensors, o, dtype, scale):
    """How far o's rounding to dtype can move each gradient: u sum|dO O| a row, times what multiplies dS."""
    q, k, _, _, do, _ = tensors
    rows = torch.finfo(dtype).eps / 2 * (do.double() * o).abs().sum(-1)  # [B, T, Hq]
    largest = rows.max().item() * abs(scale)
    return {
        "dq": largest * k.abs().max().item(),
        "dk": largest * q.abs().max().item(),
        "dsinks": rows.square().sum((0, 1)).sqrt().max().item(),
    }


def check(tensors, dtype, backend, *, scores=8.0, **options):
    """Assert the acceptance rule for o, lse and every gradient.

    lse of size 8 rounds by 2.4e-7 in float32; where `scores` are larger, so is the rounding.
    """
    ours = run(tensors, dtype, backend, **options)
    same = run(tensors, dtype, "torch", **options)
    exact = run(rounded(tensors, dtype), torch.float64, "reference", **options)
    seen = all(x is None or x.numel() for x in tensors)
    scale = options.get("scale", tensors[0].shape[-1] ** -0.5)
    slack = rounding_of_delta(tensors, exact["o"], dtype, scale) if seen else {}
    for name, truth in exact.items():
        statistic = torch.promote_types(dtype, torch.float32)
        expected = statistic if name == "lse" else dtype
        assert ours[name].dtype == expected, name
        if truth.numel() == 0:
            assert ours[name].shape == truth.shape, name
            continue
        if name == "lse":
            assert torch.equal(torch.isneginf(ours[name]), torch.isneginf(truth)), "rows that see nothing"
            mask = torch.isfinite(truth)
            if not mask.any():
                continue
        else:
            mask = torch.ones_like(truth, dtype=torch.bool)
        error = (ours[name].double() - truth)[mask].abs().max().item()
        allowed = 2 * (same[name].double() - truth)[mask].abs().max().item()
        size = max(1.0, truth[mask].abs().max().item())
        allowed += slack.get(name, 0.0)
        assert error <= allowed + EPS[dtype] * size * scores / 8, (
            f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        )
