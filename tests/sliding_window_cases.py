"""Inputs and the acceptance rule that the tests of sliding-window attention share.

An implementation passes if its error against the float64 reference is at most twice that of the same
computation in PyTorch in the same dtype, plus a rounding of the largest value:

    |ours - ref64| <= 2 |torch_same_dtype - ref64| + eps * max(1, max|ref64|)
"""

import torch
from rule import EPS

from slmkernels import sliding_window_attention
from slmkernels.validate.sliding_window import rounding_of_delta, torch_same_dtype


def inputs(seed, B, T, S, Hq, H, D, Dv, *, sinks=False):
    """Float64 tensors q, k, v, sinks or None, and gradients of o and lse."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = normal(B, T, Hq, D), normal(B, S, H, D), normal(B, S, H, Dv)
    return q, k, v, normal(Hq) if sinks else None, normal(B, T, Hq, Dv), normal(B, Hq, T)


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


def check(tensors, dtype, backend, *, scores=8.0, **options):
    """Assert the acceptance rule for o, lse and every gradient.

    lse of size 8 rounds by 2.4e-7 in float32; where `scores` are larger, so is the rounding.
    """
    ours = run(tensors, dtype, backend, **options)
    same = run(tensors, dtype, "torch", **options)
    exact = run(rounded(tensors, dtype), torch.float64, "reference", **options)
    q, k, _, _, do, _ = tensors
    scale = options.get("scale", tensors[0].shape[-1] ** -0.5)
    slack = rounding_of_delta(q, k, do, exact["o"], dtype, scale)
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
