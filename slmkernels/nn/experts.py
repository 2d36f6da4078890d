"""`SparseExperts`, to which a router sends tokens, and `DomainExperts`, to which whole documents go."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import without_autocast
from ..ops.experts.function import expert_mlp, segment_mlp
from ..ops.experts.route import Routing, prepare, route, update_selection_bias
from ..validation import check_cu_seqlens, check_flag, check_float_tensor, check_number, expect, fail
from .expert_set import ExpertSet


class SparseExperts(ExpertSet):
    """A router, experts of which each token takes `top_k`, and shared ones, x `[..., C]` -> `[..., C]`.

        y = sum over the token's experts of weight * MLP_e(x), + shared(x)

    Letters: C channels, n hidden channels, E experts, Z null experts. The last Z rows of the router are
    experts that are not there: a token that chooses one spends less. The router computes in float32, under
    autocast and in narrower dtypes too.

    Args:
        dim: C, channels of x.
        hidden: n, hidden channels of an expert.
        num_experts: E.
        top_k: experts of a token, of E + Z; all there are, should experts leave fewer.
        num_null: Z.
        shared_hidden: hidden channels of the shared experts, one `FeedForward`; 0: none.
        activation: as of `slmkernels.expert_mlp`.
        bias: biases of the experts, the shared ones included.
        score, num_groups, top_groups, route_scale: as of `slmkernels.route`.
        renormalize: as of `route`; if None, where top_k > 1. (A single weight, renormalised, is always 1, and
            the router learns nothing from the outputs.)
        selection_bias: keep a bias that balances the load; `update_selection_bias` moves it.
        jitter: in training the router sees x times uniform noise in 1 - jitter .. 1 + jitter.

    Parameters and their initial values:
        router `[E + Z, C]` and w_gate_up `[E, 2n, C]` (`[E, n, C]` without a gate): normal, std `C ** -0.5`.
        w_down `[E, C, n]`: normal, std `n ** -0.5`. b_gate_up, b_down: 0. shared: as `FeedForward`.
        Buffers: expert_mask bool `[E + Z]`, True where allowed; frozen bool `[E]`; selection_bias float32
        `[E + Z]`, 0.

    Experts come, go and rest: `add_expert`, `remove_expert`, `mask_expert`, `freeze`. A state dict loads into
    a module of as many experts.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Sources: Shazeer et al. 2017; Fedus et al. 2021 (Switch), section 2.2 (jitter); Dai et al. 2024
    (DeepSeekMoE: shared experts); Zeng et al. 2024 (AdaMoE: null experts).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_null: int = 0,
        shared_hidden: int = 0,
        activation: str = "swiglu",
        bias: bool = False,
        score: str = "softmax",
        renormalize: bool | None = None,
        selection_bias: bool = False,
        num_groups: int | None = None,
        top_groups: int | None = None,
        route_scale: float = 1.0,
        jitter: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            dim, hidden, num_experts, num_null, shared_hidden=shared_hidden, activation=activation, bias=bias,
            dtype=dtype, device=device,
        )  # fmt: skip
        routes = num_experts + num_null
        expect(0 <= check_number("jitter", jitter) < 1, "jitter", jitter, "a number >= 0 and < 1")
        self.top_k, self.jitter = top_k, jitter
        self.routing_options = {
            "score": score,
            "renormalize": top_k != 1 if renormalize is None else renormalize,
            "num_groups": num_groups,
            "top_groups": top_groups,
            "route_scale": route_scale,
        }
        prepare(torch.empty(0, routes), top_k, **self.routing_options)  # for its errors
        self.router = nn.Parameter(torch.empty(routes, dim, dtype=dtype, device=device))
        balanced = check_flag("selection_bias", selection_bias)
        bias_of = torch.empty(routes, dtype=torch.float32, device=device) if balanced else None
        self.register_buffer("selection_bias", bias_of)
        self.reset_parameters()

    def route(self, x: Tensor, generator: torch.Generator | None = None) -> Routing:
        """Where the tokens x `[T, C]` go; jitter in training draws from `generator`, torch's own if None."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.jitter and self.training:
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x * (1 + self.jitter * (2 * noise - 1))
        with without_autocast(x):
            logits = F.linear(x, self.router.to(x.dtype))  # [T, E + Z]
        return route(
            logits,
            min(self.top_k, logits.shape[1]),
            selection_bias=self.selection_bias,
            expert_mask=self.expert_mask,
            **self.routing_options,
        )

    def forward(
        self, x: Tensor, *, return_routing: bool = False, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Routing]:
        """Send each token through its experts.

        Args:
            x: `[..., C]`.
            return_routing: also return where the tokens went.
            generator: of the jitter; torch's own if None.

        Returns:
            y like x; with `return_routing` also the `Routing` of all tokens, whose `load_balance_loss()` and
            `z_loss()` are to be added to the loss, times coefficients of about 0.01 and 0.001. Null experts
            count there as experts; masked ones do not.
        """
        check_float_tensor("x", x, x.ndim if isinstance(x, Tensor) else 2, "[..., C]")
        expect(x.ndim >= 1 and x.shape[-1] == self.dim, "x", x, f"{self.dim} channels")
        tokens = x.reshape(-1, self.dim)  # [T, C]
        routing = self.route(tokens, generator)
        y = expert_mlp(tokens, routing.indices, routing.weights, **self.options())
        if self.shared is not None:
            y = y + self.shared(tokens)
        y = y.view(x.shape)
        return (y, routing) if return_routing else y

    def update_selection_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Move the selection bias towards equal loads of the experts that are not masked.

        Args:
            counts: `[E + Z]`, `Routing.counts` of a step, summed.
            rate: as of `slmkernels.update_selection_bias`.
        """
        expect(self.selection_bias is not None, "selection_bias", False, "True, to have one to update")
        fits = isinstance(counts, Tensor) and counts.shape == self.selection_bias.shape
        expect(fits, "counts", counts, f"a tensor of shape {list(self.selection_bias.shape)}", TypeError)
        allowed = self.expert_mask
        bias = self.selection_bias[allowed]
        update_selection_bias(bias, counts.to(bias.device)[allowed], rate)
        self.selection_bias[allowed] = bias

    def _apply(self, fn, recurse=True):
        """Leaves the selection bias float32 in a narrower module: there an update of 1e-3 rounds away."""
        before = self.selection_bias
        super()._apply(fn, recurse)
        if before is not None and self.selection_bias.itemsize < before.itemsize:
            self.selection_bias = before.to(self.selection_bias.device)
        return self

    def _check_surgery(self, optimizer) -> None:
        groups = self.routing_options["num_groups"]
        expect(
            groups is None, "num_groups", groups, "None: groups of experts have one size; mask_expert works"
        )
        super()._check_surgery(optimizer)


class DomainExperts(ExpertSet):
    """An expert for each domain of text, and shared ones: whole documents go to the expert of their label.

    `experts(x, domains)` sends a document to one expert, without a permutation; `experts(x, mixture=m)` to
    several, each document in its own proportions (a posterior over domains, say). A document of no expert,
    because its label is -1 or its expert masked, gets what the shared experts give, or 0.

    Args:
        dim: C, channels of x.
        hidden: n, hidden channels of an expert.
        num_experts: E, domains.
        shared_hidden: hidden channels of the shared experts, one `FeedForward`; 0: none.
        activation: as of `slmkernels.expert_mlp`.
        bias: biases of the experts, the shared ones included.

    Parameters, buffers and their initial values: as of `SparseExperts`, without the router's. When an expert
    is removed, the labels after it move down by one.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Source: Gururangan et al. 2021 (DEMix layers), section 3; mixtures of them, section 5.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        shared_hidden: int = 0,
        activation: str = "swiglu",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            dim, hidden, num_experts, 0, shared_hidden=shared_hidden, activation=activation, bias=bias,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        domains: Tensor | None = None,
        *,
        mixture: Tensor | None = None,
        top_k: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Send each document through its expert or experts.

        Args:
            x: `[B, T, C]`, a document a row; with cu_seqlens `[T, C]` or `[1, T, C]`, documents one after
                another.
            domains: int32 or int64 `[N]`, the expert of each document; one outside 0 .. E-1: none.
            mixture: in place of domains: float `[N, E]`, the share of each expert, none if it is not above 0.
                Masked experts are left out, then all but the top_k greatest, and what is left is divided by
                its sum. Differentiable.
            top_k: of the mixture; E if None.
            cu_seqlens: int32 `[N+1]`, offsets of the documents.

        Returns:
            y like x.
        """
        check_float_tensor("x", x, x.ndim if isinstance(x, Tensor) else 3, "[B, T, C] or [T, C]")
        expect(x.ndim in (2, 3) and x.shape[-1] == self.dim, "x", x, f"[B, T, C], or [T, C], C = {self.dim}")
        tokens = x.reshape(-1, self.dim)  # [T, C]
        if cu_seqlens is None:
            expect(x.ndim == 3, "x", x, "[B, T, C] without cu_seqlens")
            cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
        else:
            expect(x.ndim == 2 or x.shape[0] == 1, "x", x, "[T, C] or [1, T, C] with cu_seqlens")
            check_cu_seqlens("cu_seqlens", cu_seqlens, tokens.shape[0], x.device)
        N = cu_seqlens.shape[0] - 1
        if (domains is None) == (mixture is None):
            fail(
                "domains",
                domains,
                f"either domains or mixture, which is {'' if mixture is None else 'not '}None",
            )
        if mixture is None:
            expect(top_k is None, "top_k", top_k, "None without a mixture")
            y = segment_mlp(tokens, cu_seqlens, self._experts_of(domains, N), **self.options())
        else:
            indices, weights = self._mixed(mixture, N, top_k)  # [N, k]
            document = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=tokens.shape[0])  # [T]
            y = expert_mlp(tokens, indices[document], weights[document], **self.options())
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view(x.shape)

    def _experts_of(self, domains, N: int) -> Tensor:
        """Labels -> experts, -1 where masked or none."""
        integer = isinstance(domains, Tensor) and domains.dtype in (torch.int32, torch.int64)
        expect(integer, "domains", domains, "an int32 or int64 tensor [N]", TypeError)
        fits = domains.shape == (N,) and domains.device == self.expert_mask.device
        expect(
            fits, "domains", domains, f"shape [{N}], a label for each document, on {self.expert_mask.device}"
        )
        inside = (domains >= 0) & (domains < self.num_experts)
        allowed = inside & self.expert_mask[domains.clamp(0, self.num_experts - 1)]
        return domains.masked_fill(~allowed, -1)

    def _mixed(self, mixture, N: int, top_k: int | None) -> tuple[Tensor, Tensor]:
        """Shares -> indices and weights `[N, k]`: the routing of documents whose logits are log shares."""
        E = self.num_experts
        check_float_tensor("mixture", mixture, 2, "[N, E]")
        expect(mixture.shape == (N, E), "mixture", mixture, f"shape [{N}, {E}], a row for each document")
        p = mixture.to(torch.promote_types(mixture.dtype, torch.float32))
        some = p > 0  # the others must stay out of the logarithm's gradient as well
        logits = torch.where(some, p, 1.0).log().masked_fill(~some, -torch.inf)
        routing = route(logits, E if top_k is None else top_k, expert_mask=self.expert_mask)
        return routing.indices, routing.weights
