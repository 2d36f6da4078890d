"""Small experts and their inputs, for the tests of nn's experts."""

import torch

from slmkernels.nn import DomainExperts, SparseExperts

KIND = {"dtype": torch.float64}
RICH = {
    "num_null": 2,
    "shared_hidden": 7,
    "bias": True,
    "selection_bias": True,
    "score": "sigmoid",
    "route_scale": 1.5,
}
CU = torch.tensor([0, 4, 4, 7, 12], dtype=torch.int32)


def stirred(module):
    """Initial values of 0 would hide a tensor that is not used."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "b_" in name or "bias" in name:
                tensor.copy_(torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape))
    return module


def sparse(**changes) -> SparseExperts:
    torch.manual_seed(0)
    return stirred(SparseExperts(**{"dim": 6, "hidden": 5, "num_experts": 4, "top_k": 2, **KIND, **changes}))


def domain(**changes) -> DomainExperts:
    torch.manual_seed(0)
    return stirred(DomainExperts(**{"dim": 6, "hidden": 5, "num_experts": 4, **KIND, **changes}))


def tokens(*shape, seed=1) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed), **KIND)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
