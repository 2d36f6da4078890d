"""Inputs and the acceptance rule that the tests of the causal convolution share.

An implementation passes if its error against the float64 reference is at most twice that of the same
computation in PyTorch in the same dtype, plus a rounding of the largest value:

    |ours - ref64| <= 2 |torch_same_dtype - ref64| + eps * max(1, max|ref64|)
"""

import torch
from rule import EPS

from slmkernels import causal_conv1d
from slmkernels.validate.causal_conv1d import plain

NAMES = ("y", "state", "dx", "dweight", "dbias", "dinitial")


def inputs(seed, B, T, C, W, *, N=None, bias=True, initial=True):
    """Float64 tensors x, weight, bias or None, initial state or None, and gradients of y and of the state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    N = B if N is None else N
    x, weight, b, state = normal(B, T, C), normal(C, W), normal(C), normal(N, W - 1, C)
    tensors = (x, weight, b if bias else None, state if initial else None)
    return *tensors, normal(B, T, C), normal(N, W - 1, C)


def run(tensors, dtype, backend, *, parameters=None, **options):
    """y, state and all gradients of one implementation, from float64 tensors rounded to dtype."""
    x, weight, bias, initial, dy, dstate = tensors
    leaves = {"x": x.to(dtype).clone(), "weight": weight.to(parameters or dtype).clone()}
    if bias is not None:
        leaves["bias"] = bias.to(parameters or dtype).clone()
    if initial is not None:
        leaves["initial_state"] = initial.to(dtype).clone()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    if backend == "torch":
        y, state = plain(**leaves, **options)
    else:
        y, state = causal_conv1d(**leaves, return_state=True, backend=backend, **options)
    loss = (y.double() * dy.to(dtype).double()).sum() + (state.double() * dstate.to(dtype).double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"y": y.detach(), "state": state.detach()}
    names = {"x": "dx", "weight": "dweight", "bias": "dbias", "initial_state": "dinitial"}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[names[name]] = torch.zeros_like(leaf) if grad is None else grad
    return results


def rounded(tensors, dtype, parameters=None):
    """The tensors as dtype sees them, in float64 again: the reference then answers for the same inputs."""
    dtypes = (dtype, parameters or dtype, parameters or dtype, dtype, dtype, dtype)
    return tuple(x if x is None else x.to(d).double() for x, d in zip(tensors, dtypes, strict=True))


def check(tensors, dtype, backend, *, parameters=None, **options):
    """Assert the acceptance rule for y, the state (bit-equal) and every gradient."""
    ours = run(tensors, dtype, backend, parameters=parameters, **options)
    same = run(tensors, dtype, "torch", parameters=parameters, **options)
    exact = run(rounded(tensors, dtype, parameters), torch.float64, "reference", **options)
    assert torch.equal(ours["state"].double(), exact["state"])
    for name, truth in exact.items():
        expected = parameters if parameters and name in ("dweight", "dbias") else dtype
        assert ours[name].dtype == expected, name
        assert ours[name].shape == truth.shape, name
        if truth.numel() == 0:
            continue
        error = (ours[name].double() - truth).abs().max().item()
        allowed = 2 * (same[name].double() - truth).abs().max().item()
        size = max(1.0, truth.abs().max().item())
        assert error <= allowed + EPS[dtype] * size, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return ours


def same_bits(a, b, backend):
    """Equal, for our kernels; PyTorch's silu rounds an element by its place in memory."""
    tolerance = 0 if backend == "native" else 4 * torch.finfo(a.dtype).eps
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
