"""Feature maps of linear attention: x `[B, T, H, D]` -> phi(x) `[B, T, H, F]`, with F the attribute `size`.

| name | phi(x) | F |
|---|---|---|
| elu | elu(x) + 1 | D |
| relu | max(x, 0) | D |
| hedgehog | softmax(x W), softmax(-x W) | 2 d, by default d = D |
| taylor | y = x W, then 1, y and its products y_i y_j | 1 + d + d (d + 1) / 2, by default d = min(16, D) |
| identity | x | D |

W is learned, `[H, D, d]`, and d the argument feature_dim.
Sources: Katharopoulos et al. 2020, section 3.2 (elu); Kasai et al. 2021 (relu); Zhang et al. 2024 (Hedgehog);
Arora et al. 2024 (Based: taylor).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import expect


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FeatureMap(nn.Module):
    """Base of the maps without parameters.

    Args:
        head_dim: D.
        num_heads: H; a learned map has one matrix a head.
        feature_dim: what a learned map projects to; None for the others, or for the default.

    Attributes:
        size: F, the size of phi(x).
        positive: phi(a) . phi(b) is never negative, so that a sum of them can divide (`normalize`).
        product: about the mean of phi(a) . phi(b) over independent standard normal a and b, at first.
    """

    positive = True
    product = 0.0

    def __init__(
        self,
        head_dim: int,
        num_heads: int = 1,
        feature_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        expect(type(head_dim) is int and head_dim >= 1, "head_dim", head_dim, "an int >= 1")
        expect(type(num_heads) is int and num_heads >= 1, "num_heads", num_heads, "an int >= 1")
        learned = isinstance(self, Projected)
        hint = f"None: {type(self).__name__} projects nothing"
        expect(learned or feature_dim is None, "feature_dim", feature_dim, hint)
        self.head_dim, self.num_heads, self.size = head_dim, num_heads, head_dim

    def extra_repr(self) -> str:
        return f"{self.num_heads}x{self.head_dim} -> {self.size}"


class Elu(FeatureMap):
    """elu(x) + 1 = exp(x) below 0, x + 1 above; written so that a small value keeps its digits."""

    @property
    def product(self) -> float:
        return 1.347 * self.size  # the mean of elu(x) + 1 is 1.1605

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=0).exp() + F.relu(x)


class Relu(FeatureMap):
    """max(x, 0)."""

    @property
    def product(self) -> float:
        return self.size / (2 * math.pi)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Identity(FeatureMap):
    """x itself. Its products may be negative: no normaliser."""

    positive = False

    def forward(self, x: Tensor) -> Tensor:
        return x


class Projected(FeatureMap):
    """A map behind a learned projection, `weight` `[H, D, feature_dim]`, of every head."""

    def __init__(self, head_dim: int, num_heads: int = 1, feature_dim: int | None = None, **kind):
        super().__init__(head_dim, num_heads, feature_dim, **kind)
        feature_dim = self.default_dim(head_dim) if feature_dim is None else feature_dim
        expect(type(feature_dim) is int and feature_dim >= 1, "feature_dim", feature_dim, "an int >= 1")
        self.feature_dim = feature_dim
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim, **kind))
        self.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        """x `[B, T, H, D]` -> `[B, T, H, feature_dim]`, in float32 at least."""
        return wide(torch.einsum("bthd,hdf->bthf", x, self.weight))


class Hedgehog(Projected):
    """softmax(x W) beside softmax(-x W), over the features. W starts as the identity."""

    def __init__(self, head_dim: int, num_heads: int = 1, feature_dim: int | None = None, **kind):
        super().__init__(head_dim, num_heads, feature_dim, **kind)
        self.size = 2 * self.feature_dim

    @property
    def product(self) -> float:
        return 2 / self.feature_dim

    @staticmethod
    def default_dim(head_dim: int) -> int:
        return head_dim

    def reset_parameters(self) -> None:
        """Set the weight to its initial value."""
        with torch.no_grad():
            self.weight.zero_().diagonal(dim1=1, dim2=2).fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)  # [B, T, H, feature_dim]
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).to(x.dtype)


class Taylor(Projected):
    """phi(q) . phi(k) = 1 + s + s^2 / 2, at least 1/2, with s = y_q . y_k / sqrt(d) and y = x W.

    phi(x) = 1, y / d^(1/4), and every product y_i y_j / sqrt(2 d), i and j: here those with i < j stand once,
    times sqrt(2), which leaves the products of features what they are and the state half as large. W starts
    normal, std `D ** -0.5`.
    """

    product = 1.5

    def __init__(self, head_dim: int, num_heads: int = 1, feature_dim: int | None = None, **kind):
        super().__init__(head_dim, num_heads, feature_dim, **kind)
        d = self.feature_dim
        self.size = 1 + d + d * (d + 1) // 2

    @staticmethod
    def default_dim(head_dim: int) -> int:
        return min(16, head_dim)

    def reset_parameters(self) -> None:
        """Set the weight to its initial value."""
        nn.init.normal_(self.weight, std=self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        d = self.feature_dim
        y = self.project(x) * d**-0.25  # [B, T, H, d]
        i, j = torch.triu_indices(d, d, device=x.device)
        pairs = (y[..., :, None] * y[..., None, :]).flatten(-2)[..., i * d + j]  # no element twice
        pairs = pairs / (1 + (i == j)).to(y.dtype).sqrt()
        return torch.cat([torch.ones_like(y[..., :1]), y, pairs], dim=-1).to(x.dtype)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "hedgehog": Hedgehog,
    "taylor": Taylor,
    "identity": Identity,
}


def feature_map(
    name: str, head_dim: int, num_heads: int = 1, feature_dim: int | None = None, **kind
) -> FeatureMap:
    """The map of that name (module docstring); `kind` is dtype and device.

    Raises:
        ValueError: no such map, or a size it cannot have; the message names it.
    """
    expect(name in FEATURE_MAPS, "feature_map", name, f"one of {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name](head_dim, num_heads, feature_dim, **kind)
