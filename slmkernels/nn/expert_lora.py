"""`ExpertLoRA`: low-rank updates of every expert, composed with the experts' own kernels."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..autocast import without_autocast
from ..validation import check_number, expect
from .expert_set import ExpertSet


class ExpertLoRA(nn.Module):
    """Experts that stay as they are, and a low-rank update of each that learns: called as the experts are.

        w_e + scale * b_e a_e          for every expert e, of w_gate_up and of w_down

    A composition: the effective weights are computed (two batched products) and given to the experts' own
    kernels. What that costs, r being the rank, on top of `6 T k n C` FLOPs forward and twice that backward:

    - `6 E r n C` FLOPs forward, twice that backward: `E r / (T k)` of it, 3 % at E = 8, r = 8, T k = 2048;
    - bytes: the effective weights, `3 E n C` elements, are written, kept for the backward and read again, and
      their full gradient, as large, is computed, written and read, although only a and b learn. Decoding a
      token makes all experts' weights for the few that it needs: `merge` first.

    Measured once on two cores of an AMD Zen 4 (C = 512, n = 1024, E = 16, k = 2, r = 8, float32), in times of
    the experts alone: 2048 tokens 1.5 forward and 1.1 with the backward; one token 79 and 2.2.

    A kernel of its own would add `scale * (x a_e^T) b_e^T` to the pre-activation, and the same to the output,
    inside an expert's tiles (`2 T k r (2 C + 3 n)` FLOPs, and a `[T k, r]` to keep), never make an effective
    weight, and leave the gradient of w_e out, a third of all FLOPs.

    Args:
        base: `SparseExperts` or `DomainExperts`. All its parameters, router and shared experts too, stop
            learning; `requires_grad_` wakes what should.
        rank: r.
        scale: of the update (LoRA's alpha / r).

    Parameters and their initial values:
        gate_up_a `[E, r, C]`: normal, std `C ** -0.5`; down_a `[E, r, n]`: normal, std `n ** -0.5`;
        gate_up_b `[E, 2n, r]` and down_b `[E, C, r]`: 0, so that at first nothing changes.

    Add or remove experts before, or after `merge`; masked and frozen ones are as in the base, and
    `hold_frozen` of this module holds the updates too.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Source: Hu et al. 2021 (LoRA), section 4.1.
    """

    def __init__(self, base: ExpertSet, rank: int, *, scale: float = 1.0):
        super().__init__()
        expect(isinstance(base, ExpertSet), "base", type(base), "SparseExperts or DomainExperts", TypeError)
        expect(type(rank) is int and rank >= 1, "rank", rank, "an int >= 1")
        self.base, self.scale = base, check_number("scale", scale)
        self._learned = {name for name, p in base.named_parameters() if p.requires_grad}
        self._splices = base.splices
        base.requires_grad_(False)
        for name, w in (("gate_up", base.w_gate_up), ("down", base.w_down)):
            E, rows, columns = w.shape
            self.register_parameter(f"{name}_a", nn.Parameter(w.new_empty(E, rank, columns)))
            self.register_parameter(f"{name}_b", nn.Parameter(w.new_empty(E, rows, rank)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set a and b to their initial values (class docstring); the base stays."""
        for a in (self.gate_up_a, self.down_a):
            nn.init.normal_(a, std=a.shape[-1] ** -0.5)
        for b in (self.gate_up_b, self.down_b):
            nn.init.zeros_(b)

    @property
    def frozen(self) -> Tensor:
        """Of the base."""
        return self.base.frozen

    @property
    def any_frozen(self) -> bool:
        """Of the base."""
        return self.base.any_frozen

    def matrices(self) -> tuple[Tensor, ...]:
        """gate_up_a, gate_up_b, down_a, down_b: what `hold_frozen` holds."""
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    def effective_weights(self) -> dict[str, Tensor]:
        """w_gate_up and w_down with their updates, in the parameters' dtype under autocast too."""
        base = self.base
        if base.splices != self._splices:
            raise ValueError(
                f"base has {base.num_experts} experts, some added or removed; expected the "
                f"{self.down_a.shape[0]} that there were at first"
            )
        with without_autocast(base.w_down):
            return {
                "w_gate_up": torch.baddbmm(base.w_gate_up, self.gate_up_b, self.gate_up_a, alpha=self.scale),
                "w_down": torch.baddbmm(base.w_down, self.down_b, self.down_a, alpha=self.scale),
            }

    def forward(self, *args, **kwargs):
        """What the base gives with the effective weights; arguments and results are the base's."""
        return functional_call(self.base, self.effective_weights(), args, kwargs)

    @torch.no_grad()
    def merge(self) -> ExpertSet:
        """Write the updates into the base and give it back, learning what it learned before; b is 0 again."""
        for name, weight in self.effective_weights().items():
            getattr(self.base, name).copy_(weight)
        for b in (self.gate_up_b, self.down_b):
            nn.init.zeros_(b)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(name in self._learned)
        return self.base
