"""flash-linear-attention's functions over our operators: `import slmkernels.integrations.fla as fla_ops`.

Names, arguments, their order and defaults are those of fla-core 0.6.0, and so is what comes back; what its
`**kwargs` take is spelt out, so that a misspelt argument is a TypeError. They run wherever ours do, on CPUs
too, in float32, bfloat16, float16 and float64. The `chunk_`, `fused_chunk_`, `fused_recurrent_` and
`parallel_` forms of one model are the same operation here, with a backward also where fla has none.

Arguments with one meaning throughout:
    q, k: `[B, T, H, K]`.
    v: `[B, T, HV, V]`; H divides HV, and value head h reads query and key head h // (HV / H).
    g, gk, g_gamma: natural logarithms of gates, <= 0 (a positive one is an error on the CPU).
    scale: factor of the queries, `K ** -0.5` if None.
    initial_state: `[N, HV, K, V]`, N sequences (B, or those of cu_seqlens); zeros if None.
    output_final_state: the second result is the final state, float32 (float64 for float64 inputs), else None.
    state_v_first: states are `[N, HV, V, K]`, both of them.
    reverse: every sequence is read from its end; the initial state stands after its last token.
    cu_seqlens: int64 or int32 `[N+1]`, offsets of N sequences packed along T (B must be 1).
    cu_seqlens_cpu, chunk_indices, chunk_size, safe_gate, disable_recompute: how fla's kernels go about their
        work; without effect on the result there, and unused here.

Raises, throughout:
    TypeError, ValueError: an argument is not as above; the message names it.
    Unsupported: an argument that has no counterpart here is set; the message names it and what is supported.
"""

import torch
from torch import Tensor

from ..dispatch import Unsupported
from ..ops.causal_conv1d import function as convolution
from ..ops.sliding_window.function import sliding_window_attention
from ..validation import check_flag, check_float_tensor, expect, fail
from . import fla_call
from .arguments import call_renamed, refuse_if_set, refuse_unless_none
from .fla_call import attend, computed_beta, computed_gate, offsets, refuse_context, refuse_value_gate, wide

Result = tuple[Tensor, Tensor | None]


def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None, output_final_state: bool = False,
    normalize: bool = True, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Linear attention without a gate (Katharopoulos et al. 2020).

    normalize: o = scale S^T q / (scale z . q + 1e-10), z the sum of the keys so far. States are then a pair
        with z `[N, 1, H, K]`; a state alone starts z at zero. Without output_final_state the second result is
        None (fla has (None, z)).
    """
    return fla_call.linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None, output_final_state: bool = False,
    reverse: bool = False, normalize: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:  # fmt: skip
    """`chunk_linear_attn`, not normalised by default."""
    return fla_call.linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse
    )


def _simple_gate(g, g_gamma) -> Tensor | None:
    """The decay of simple GLA: `[B, T, H]`, `[H]` or none."""
    if g is not None:
        expect(g_gamma is None, "g_gamma", g_gamma, "None beside g")
        check_float_tensor("g", g, 3, "[B, T, H]")
        return g
    if g_gamma is not None:
        check_float_tensor("g_gamma", g_gamma, 1, "[H]")
    return g_gamma


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    *, chunk_size: int | None = None,
) -> Result:  # fmt: skip
    """A gate for each head: g `[B, T, H]` (Mamba-2), or g_gamma `[H]`, the same for all tokens, or none.

    g_gamma gets a gradient too, which fla does not compute.
    """
    return attend(
        q, k, v, decay=_simple_gate(g, g_gamma), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        gate="g" if g_gamma is None else "g_gamma",
    )  # fmt: skip


def fused_chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_simple_gla`."""
    return fused_recurrent_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_simple_gla`."""
    return attend(
        q, k, v, decay=_simple_gate(g, g_gamma), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens, gate="g" if g_gamma is None else "g_gamma",
    )  # fmt: skip


def parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    output_attentions: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """As `chunk_simple_gla`; the second result, fla's attention matrix, is always None."""
    refuse_if_set("output_attentions", output_attentions, "nothing of size T x T is formed")
    return chunk_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens)


def _retention_gamma(q: Tensor) -> Tensor:
    """log(1 - 2^(-5 - h)) for head h (Sun et al. 2023, RetNet, section 2.2)."""
    check_float_tensor("q", q, 4, "[B, T, H, K]")
    heads = torch.arange(q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return (1 - 2.0 ** (-5.0 - heads)).log()


def chunk_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None, *, chunk_size: int | None = None,
) -> Result:  # fmt: skip
    """RetNet: head h forgets by 1 - 2^(-5-h) a token."""
    return fused_recurrent_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def fused_chunk_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_retention`."""
    return fused_recurrent_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def fused_recurrent_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, reverse: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_retention`."""
    return fused_recurrent_simple_gla(
        q, k, v, None, _retention_gamma(q), scale, initial_state, output_final_state, reverse,
        state_v_first, cu_seqlens,
    )  # fmt: skip


def parallel_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """As `chunk_retention`; the second result, fla's attention matrix, is always None."""
    refuse_if_set("output_attentions", output_attentions, "nothing of size T x T is formed")
    return fused_recurrent_retention(q, k, v, scale, cu_seqlens=cu_seqlens)


def chunk_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """A gate for each key channel: g `[B, T, H, K]` (GLA, Yang et al. 2024)."""
    check_float_tensor("g", g, 4, "[B, T, H, K]")
    return attend(
        q, k, v, decay=g, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None = None, gv: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_gla`, with the gate as gk, which may be None; gv, gates of value channels: `Unsupported`."""
    refuse_value_gate(gv)
    if gk is not None:
        check_float_tensor("gk", gk, 4, "[B, T, H, K]")
    return attend(
        q, k, v, decay=gk, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        reverse=reverse, state_v_first=state_v_first, cu_seqlens=cu_seqlens, gate="gk",
    )  # fmt: skip


def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, *, chunk_size: int | None = None,
) -> Result:  # fmt: skip
    """The delta rule with rates beta `[B, T, H]` (DeltaNet, Yang et al. 2024); float32 too, unlike fla's."""
    return attend(
        q, k, v, beta=computed_beta(beta), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, l2norm_qk=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_delta_rule`; beta None stands for ones. A beta `[B, T, H, V]`: `Unsupported`."""
    return chunk_delta_rule(
        q, k, v, _beta_or_ones(beta, v), scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        cu_seqlens,
    )  # fmt: skip


def _beta_or_ones(beta: Tensor | None, v: Tensor) -> Tensor:
    if beta is not None:
        return beta
    check_float_tensor("v", v, 4, "[B, T, HV, V]")
    return v.new_ones(v.shape[:3])


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None, cp_context=None,
    *, use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Result:  # fmt: skip
    """The delta rule with gates g and rates beta, both `[B, T, HV]` (Gated DeltaNet, Yang et al. 2025).

    use_gate_in_kernel: the gate is -exp(A_log) softplus(g + dt_bias), with A_log and dt_bias `[HV]`.
    use_beta_sigmoid_in_kernel: the rate is sigmoid(beta), with allow_neg_eigval twice that.
    cp_context: `Unsupported`.
    """
    refuse_context(cp_context)
    check_float_tensor("g", g, 3, "[B, T, HV]")
    return attend(
        q, k, v, decay=computed_gate(g, A_log, dt_bias, use_gate_in_kernel),
        beta=computed_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens, l2norm_qk=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None,
    gv: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_gated_delta_rule`; g may be None, gk `[B, T, HV, K]` gates key channels besides.

    beta None stands for ones. gv, gates of value channels, and a beta `[B, T, HV, V]`: `Unsupported`.
    """
    refuse_value_gate(gv)
    if g is not None or use_gate_in_kernel:
        check_float_tensor("g", g, 3, "[B, T, HV]")
    g = computed_gate(g, A_log, dt_bias, use_gate_in_kernel)
    gate = "g"
    if gk is not None:
        check_float_tensor("gk", gk, 4, "[B, T, HV, K]")
        if g is not None:
            expect(g.shape == gk.shape[:3], "g", g, f"shape {list(gk.shape[:3])} beside gk")
        g, gate = gk if g is None else wide(gk) + g[..., None], "gk"
    return attend(
        q, k, v, decay=g,
        beta=computed_beta(_beta_or_ones(beta, v), use_beta_sigmoid_in_kernel, allow_neg_eigval), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens, l2norm_qk=use_qk_l2norm_in_kernel, gate=gate,
    )  # fmt: skip


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, safe_gate: bool = False,
    lower_bound: float | None = None, disable_recompute: bool = False,
    return_intermediate_states: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, cp_context=None, use_graph: bool = False,
    max_num_seqs: int | None = None, *, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Result:  # fmt: skip
    """The delta rule with gates g `[B, T, HV, K]` and rates beta `[B, T, HV]` (Kimi Linear, 2025).

    use_gate_in_kernel: the gate is -exp(A_log) softplus(g + dt_bias), A_log `[HV]` and dt_bias `[HV * K]`;
        with lower_bound < 0 it is lower_bound sigmoid(exp(A_log) (g + dt_bias)), and A_log may be None.
    use_beta_sigmoid_in_kernel: the rate is sigmoid(beta), with allow_neg_eigval twice that.
    cp_context, use_graph, max_num_seqs, return_intermediate_states: `Unsupported`.
    """
    refuse_context(cp_context)
    refuse_if_set(
        "use_graph", use_graph, "launches are the same for all offsets and can be captured as they are"
    )
    refuse_unless_none("max_num_seqs", max_num_seqs, "it goes with use_graph")
    refuse_if_set(
        "return_intermediate_states", return_intermediate_states, "the states of chunks are not kept"
    )
    if check_flag("safe_gate", safe_gate) and use_gate_in_kernel:
        expect(lower_bound is not None, "lower_bound", lower_bound, "a number < 0 with safe_gate")
    return fused_recurrent_kda(
        q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
        cu_seqlens,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, lower_bound: float | None = None, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_kda`. A beta `[B, T, HV, V]`: `Unsupported`."""
    check_float_tensor("g", g, 4, "[B, T, HV, K]")
    return attend(
        q, k, v, decay=computed_gate(g, A_log, dt_bias, use_gate_in_kernel, lower_bound),
        beta=computed_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens, l2norm_qk=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def parallel_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    window_size: int | None = None, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
    *, sink_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal softmax attention: q `[B, T, HQ, K]`, k `[B, T, H, K]`, v `[B, T, H, V]` -> o `[B, T, HQ, V]`.

    window_size: an int W, the last W keys, itself included; None for all.
    sink_bias: `[HQ]`, a logit that joins the softmax's denominator.
    g, gates of the scores (forgetting attention): `Unsupported`.
    """
    refuse_unless_none("g", g, "scores have no gate; `chunk_simple_gla` gates linear attention")
    good = window_size is None or (type(window_size) is int and window_size >= 1)
    expect(good, "window_size", window_size, "an int >= 1, or None")
    return call_renamed(
        sliding_window_attention, {"sinks": "sink_bias"}, q, k, v,
        window=window_size, scale=scale, sinks=sink_bias, cu_seqlens=offsets(cu_seqlens),
    )  # fmt: skip


def causal_conv1d(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool | None = False,
    activation: str | None = None, backend: str | None = "triton", cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None, cp_context=None,
) -> Result:  # fmt: skip
    """Short depthwise convolution over tokens, `fla.modules.causal_conv1d` there.

    y_t = activation(bias + sum_w weight[:, w] x_{t-W+1+w}) + residual_t

    Args:
        x: `[B, T, D]`, or with the channels over several dimensions. weight `[D, W]`, bias `[D]`.
        residual: like x, added after the activation.
        initial_state: `[N, D, W]` in x's dtype, the W tokens before each sequence, the newest last; so is
            the second result.
        activation: None, "silu" or "swish".
        backend: fla's own choice of kernels, "triton", "cuda", "mix" or None: without effect on the result.
        weight None, cp_context: `Unsupported`.
    """
    refuse_context(cp_context)
    if weight is None:
        fail("weight", weight, "a tensor [D, W]: a plain sum of tokens has no kernel here", Unsupported)
    expect(backend in (None, "triton", "cuda", "mix"), "backend", backend, '"triton", "cuda", "mix" or None')
    expect(activation in (None, "silu", "swish"), "activation", activation, 'None, "silu" or "swish"')
    expect(isinstance(x, Tensor) and x.ndim >= 3, "x", x, "a tensor [B, T, D]", TypeError)
    check_float_tensor("weight", weight, 2, "[D, W]")
    if residual is not None:
        good = isinstance(residual, Tensor) and residual.shape == x.shape
        expect(good, "residual", residual, f"a tensor of x's shape {list(x.shape)}")
    if initial_state is not None:
        check_float_tensor("initial_state", initial_state, 3, "[N, D, W]")
        N = len(cu_seqlens) - 1 if isinstance(cu_seqlens, Tensor) else x.shape[0]
        expect(initial_state.shape == (N, *weight.shape), "initial_state", initial_state,
               f"shape {[N, *weight.shape]}")  # fmt: skip
        initial_state = initial_state.transpose(1, 2)  # [N, W, D]
    if (
        output_final_state
    ):  # ours keeps as many tokens as taps reach back to: one more tap, of zero, for W of them
        weight = torch.nn.functional.pad(weight, (1, 0))
    elif initial_state is not None:
        initial_state = initial_state[:, 1:]
    y, state = convolution.causal_conv1d(
        x.flatten(2), weight, bias, activation=activation and "silu", initial_state=initial_state,
        return_state=True, cu_seqlens=offsets(cu_seqlens),
    )  # fmt: skip
    y = y.reshape(x.shape) if residual is None else y.reshape(x.shape) + residual
    return y, state.transpose(1, 2).contiguous() if output_final_state else None
