"""`route`: the public function, its checks, its autograd, its choice of backend."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native, triton_support
from ...autograd import Function, apply_function
from ...dispatch import Operation, operators, register
from ...validation import as_dtype, check_flag, check_float_tensor, check_number, fail, wide
from . import reference, triton_kernels  # noqa: F401  (triton_kernels defines operators)

FORWARD = operators("route_forward")
BACKWARD = operators("route_backward")


class Routing(NamedTuple):
    """Which experts each token goes to. Gradients flow from `weights`, `probabilities` and `z`.

    Letters: T tokens, k experts of a token, E experts. Float tensors are float32 (float64 of float64 logits).
    """

    indices: Tensor  # int32 [T, k], best first; -1 where fewer than k experts are allowed
    weights: Tensor  # [T, k]; 0 beside an index of -1
    counts: Tensor  # int32 [E], tokens of each expert
    probabilities: Tensor  # [E], the mean over tokens
    z: Tensor  # [], the mean of logsumexp(logits)^2
    entropy: Tensor  # [], the mean entropy of a token's probabilities, in nats; has no gradient
    allowed: Tensor | None  # the expert mask

    def load_balance_loss(self) -> Tensor:
        """`E sum_e f_e P_e`, [] : f the fraction of assignments, P the mean probability of each expert.

        1 if either is uniform. E counts the experts that the mask allows some token. Differentiable through
        P. (transformers' figure is this times top_k.) Source: Fedus et al. 2021 (Switch), section 2.2.
        """
        fraction = self.counts / self.counts.sum().clamp(min=1)
        mask = self.allowed
        E = fraction.shape[0] if mask is None else (mask.any(0) if mask.ndim == 2 else mask).sum()
        return E * (fraction * self.probabilities).sum()

    def z_loss(self) -> Tensor:
        """The mean of `logsumexp(logits)^2`, []. Differentiable. Source: Zoph et al. 2022 (ST-MoE)."""
        return self.z


class Call(NamedTuple):
    """A checked call."""

    logits: Tensor  # [T, E]
    selection_bias: Tensor | None  # [E], float32 (float64 of float64 logits)
    expert_mask: Tensor | None  # bool [E] or [T, E]
    top_k: int
    score: str
    renormalize: bool
    num_groups: int  # 1: no groups
    top_groups: int
    route_scale: float


def check_count(name: str, value, most: int, what: str) -> int:
    """An int from 1 to `most`."""
    if type(value) is not int:
        fail(name, value, f"an int from 1 to {most}, {what}", TypeError)
    if not 1 <= value <= most:
        fail(name, value, f"an int from 1 to {most}, {what}")
    return value


def prepare(
    logits, top_k, *, score="softmax", renormalize=True, selection_bias=None, num_groups=None,
    top_groups=None, route_scale=1.0, expert_mask=None, backend=None,
) -> Call:  # fmt: skip
    """Check the public arguments and normalise them; the errors a user sees come from here."""
    check_float_tensor("logits", logits, 2, "[T, E]")
    T, E = logits.shape
    if E < 1:
        fail("logits", logits, "at least one expert")
    check_count("top_k", top_k, E, "the number of experts")
    if score not in reference.SCORES:
        fail("score", score, f"one of {', '.join(reference.SCORES)}")
    check_flag("renormalize", renormalize)
    route_scale = check_number("route_scale", route_scale)
    if (num_groups is None) != (top_groups is None):
        fail("top_groups", top_groups, f"to be given together with num_groups, which is {num_groups!r}")
    groups, top = 1, 1
    if num_groups is not None:
        groups = check_count("num_groups", num_groups, E, "the number of experts")
        if E % groups != 0:
            fail("num_groups", groups, f"a divisor of the number of experts, {E}")
        top = check_count("top_groups", top_groups, groups, "num_groups")
        if top_k > top * (E // groups):
            fail("top_k", top_k, f"at most the {top * (E // groups)} experts of top_groups={top} groups")
    bias, mask = selection_bias, expert_mask
    if bias is not None:
        check_float_tensor("selection_bias", bias, 1, "[E]")
        if bias.shape[0] != E or bias.device != logits.device:
            fail("selection_bias", bias, f"shape [{E}] on {logits.device}")
        bias = as_dtype(bias.detach(), wide(logits.dtype))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            fail("expert_mask", mask, "a bool tensor [E] or [T, E], True where allowed", TypeError)
        if tuple(mask.shape) not in ((E,), (T, E)) or mask.device != logits.device:
            fail("expert_mask", mask, f"shape [{E}] or [{T}, {E}] on {logits.device}")
    return Call(logits, bias, mask, top_k, score, renormalize, groups, top, route_scale)


def reason_against_cuda(call: Call) -> str | None:
    """None where the CUDA C++ kernels take the call by its dtype and shapes, else why not."""
    E = call.logits.shape[1]
    if E > 512:
        return f"logits has {E} experts; CUDA kernels take up to 512"
    return native.reason_against_float64(call.logits)


def reason_against_native(call: Call) -> str | None:
    """None where native kernels can run the call, else why not."""
    return native.reason_against(call.logits) or (reason_against_cuda(call) if call.logits.is_cuda else None)


OPERATION = register(
    Operation(
        "route",
        {
            "native": reason_against_native,
            "triton": lambda call: triton_support.reason_against_tensor("logits", call.logits),
            "reference": lambda call: None,
        },
        prepare,
    )
)


class Route(Function):
    """Forward and backward over the operators of one backend. Saves the logits, a number a row, indices."""

    @staticmethod
    def forward(logits, bias, mask, top_k, score, renormalize, groups, top, scale, prefix):
        return FORWARD[prefix](logits, bias, mask, top_k, score, renormalize, groups, top, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, _, mask, _, ctx.score, ctx.renormalize, _, _, ctx.scale, ctx.prefix = inputs
        indices, _, counts, _, _, entropy, lse = output
        ctx.save_for_backward(logits, mask, indices, lse)
        ctx.mark_non_differentiable(indices, counts, entropy, lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, _indices, dweights, _counts, dprobabilities, dz, *_):
        op = BACKWARD[ctx.prefix]
        options = ctx.score, ctx.renormalize, ctx.scale
        return op(dweights, dprobabilities, dz, *ctx.saved_tensors, *options), *[None] * 9


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    route_scale: float = 1.0,
    expert_mask: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose top_k experts for every token, and their weights, in float32.

    Args:
        logits: the router's, `[T, E]`, float32, bfloat16, float16 or float64. An expert at -inf is not
            allowed; NaN counts as the greatest of all, as in `torch.topk`.
        top_k: k, experts of a token, 1 to E.
        score: "softmax" over the allowed experts, "sigmoid" of each, or "softmax_after_topk": the logits
            themselves, and the weights are a softmax over the chosen ones.
        renormalize: divide a token's weights by their sum (no effect on "softmax_after_topk").
        selection_bias: `[E]`, added to the scores for the choice only; the weights do not see it, and it has
            no gradient. Without it the logits choose: the scores' order, and no ties made by rounding. See
            `update_selection_bias`.
        num_groups, top_groups: experts stand in `num_groups` groups of equal size; a token chooses among the
            `top_groups` groups whose two best scores (with the bias) sum highest.
        route_scale: factor of the weights.
        expert_mask: bool `[E]` or `[T, E]`, False forbids: results equal those of a model without the expert.
        backend: None (best that supports the call), "native", "triton" or "reference".

    Returns:
        a `Routing`. Ties go to the lower index, of groups too. Differentiable, once, in the logits.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: DeepSeek-V3 2024, section 2.1.2; Shazeer et al. 2017; GPT-OSS ("softmax_after_topk").
    """
    call = prepare(
        logits, top_k, score=score, renormalize=renormalize, selection_bias=selection_bias,
        num_groups=num_groups, top_groups=top_groups, route_scale=route_scale, expert_mask=expert_mask,
    )  # fmt: skip
    backend = OPERATION.choose(call, backend)
    if backend == "reference":
        results = reference.route(*call)
    else:
        inputs, (score, *options) = call[:4], call[4:]
        prefix = "triton_" if backend == "triton" else ""
        results = apply_function(Route, *inputs, reference.SCORES.index(score), *options, prefix)[:6]
    return Routing(*results, call.expert_mask)


@torch.no_grad()
def update_selection_bias(selection_bias: Tensor, counts: Tensor, rate: float = 1e-3) -> None:
    """Move the selection bias towards equal loads, in place: b_e += rate * sign(mean(counts) - counts_e).

    Args:
        selection_bias: `[E]`, as `route` takes it.
        counts: `[E]`, tokens of each expert over a step (`Routing.counts`, summed over batches and ranks).
        rate: how far, a finite number > 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Source: Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1; DeepSeek-V3 takes rate 1e-3.
    """
    check_float_tensor("selection_bias", selection_bias, 1, "[E]")
    if not isinstance(counts, Tensor) or counts.shape != selection_bias.shape:
        fail("counts", counts, f"a tensor of shape {list(selection_bias.shape)}", TypeError)
    rate = check_number("rate", rate, positive=True)
    load = counts.to(selection_bias.device, torch.promote_types(selection_bias.dtype, torch.float32))
    selection_bias += rate * (load.mean() - load).sign().to(selection_bias.dtype)


def fake_forward(logits, bias, mask, top_k, score, renormalize, groups, top, scale):
    """Shapes: indices, weights, counts, mean probabilities, z, entropy, logsumexp of each row."""
    (T, E), dtype = logits.shape, wide(logits.dtype)
    return (
        logits.new_empty(T, top_k, dtype=torch.int32),
        logits.new_empty(T, top_k, dtype=dtype),
        logits.new_empty(E, dtype=torch.int32),
        logits.new_empty(E, dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(T, dtype=dtype),
    )


def fake_backward(dweights, dprobabilities, dz, logits, mask, indices, lse, score, renormalize, scale):
    """The gradient of the logits, contiguous."""
    return logits.new_empty(logits.shape)


for _prefix in ["", "triton_"] if native.HAS_CPU else ["triton_"]:
    torch.library.register_fake(f"slmkernels::{_prefix}route_forward", fake_forward)
    torch.library.register_fake(f"slmkernels::{_prefix}route_backward", fake_backward)
