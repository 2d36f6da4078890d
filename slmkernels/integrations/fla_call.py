"""`linear_attention` in flash-linear-attention's conventions, and the gates that its kernels compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Unsupported
from ..ops.linear.function import linear_attention
from ..validation import check_cu_seqlens, check_flag, check_float_tensor, check_number, expect, fail
from .arguments import call_renamed, refuse_unless_none

NORMALIZER_EPS = 1e-10  # beside the scaled denominator of flash-linear-attention; `linear_attention` has 1e-6


def wide(x: Tensor) -> Tensor:
    """In float32 at least, as gates and denominators are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    """int64 offsets, the usual ones there, as int32; anything else is left for the operation to judge."""
    is_long = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64
    return cu_seqlens.to(torch.int32) if is_long else cu_seqlens


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Tensors of four dimensions, so that shapes can be read; the operation checks the rest."""
    check_float_tensor("q", q, 4, "[B, T, H, K]")
    check_float_tensor("k", k, 4, "[B, T, H, K]")
    check_float_tensor("v", v, 4, "[B, T, HV, V]")


def attend(
    q, k, v, *, decay=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    cu_seqlens=None, reverse=False, state_v_first=False, l2norm_qk=False, gate="g",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence -> o and the final state, None unless asked for. `gate`: the decay's name in errors."""
    check_qkv(q, k, v)
    check_flag("output_final_state", output_final_state)
    check_flag("state_v_first", state_v_first)
    cu_seqlens = offsets(cu_seqlens)
    if initial_state is not None and state_v_first:
        check_float_tensor("initial_state", initial_state, 4, "[N, H, V, K]")
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (N, *v.shape[2:], q.shape[3])
        if initial_state.shape != shape:
            fail("initial_state", initial_state, f"shape {list(shape)}: [N, HV, V, K]")
        initial_state = initial_state.mT
    if check_flag("reverse", reverse):  # the mirrored sequences, forwards; packed ones change places too
        q, k, v, decay, beta = (
            x.flip(1) if x is not None and x.ndim > 1 else x for x in (q, k, v, decay, beta)
        )
        if cu_seqlens is not None:
            check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[1], q.device)
            cu_seqlens = q.shape[1] - cu_seqlens.flip(0)
            initial_state = None if initial_state is None else initial_state.flip(0)
    names = {"decay": gate, "l2norm_qk": "use_qk_l2norm_in_kernel"}
    o, state = call_renamed(
        linear_attention, names, q, k, v, decay=decay, beta=beta, scale=scale, l2norm_qk=l2norm_qk,
        initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if reverse:
        o = o.flip(1)
        state = state if cu_seqlens is None else state.flip(0)
    if not output_final_state:
        return o, None
    return o, state.mT.contiguous() if state_v_first else state


def linear_attn(
    q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse=False
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """Without a gate; `normalize` divides by the scaled sum of the queries' products with all keys so far.

    That sum is one more value channel, of ones, so that it is computed as the numerator is.
    """
    options = {"scale": scale, "output_final_state": output_final_state, "reverse": reverse}
    if not check_flag("normalize", normalize):
        return attend(q, k, v, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)
    check_qkv(q, k, v)
    (B, _, _, K), (H, V) = q.shape, v.shape[2:]
    if initial_state is not None:
        N = len(cu_seqlens) - 1 if isinstance(cu_seqlens, Tensor) else B
        initial_state = join_states(initial_state, (N, H, K, V), q)
    ones = v.new_ones(*v.shape[:3], 1)
    o, state = attend(
        q, k, torch.cat([v, ones], -1), initial_state=initial_state, cu_seqlens=cu_seqlens, **options
    )
    numerator, denominator = wide(o).split([V, 1], -1)
    o = (numerator / (denominator + NORMALIZER_EPS)).to(o.dtype)
    if state is None:
        return o, None
    state, z = state.split([V, 1], -1)
    return o, (state.contiguous(), z.permute(0, 3, 1, 2).contiguous())


def join_states(initial_state, shape: tuple[int, ...], q: Tensor) -> Tensor:
    """(state `[N, H, K, V]`, z `[N, 1, H, K]`) as one `[N, H, K, V + 1]`.

    Zeros stand for one that is None, and for the z of a state alone.
    """
    pair = initial_state if isinstance(initial_state, (tuple, list)) else (initial_state, None)
    expect(len(pair) == 2, "initial_state", initial_state, "a pair (state, z), or a state alone", TypeError)
    N, H, K, _ = shape
    parts = []
    for i, (part, letters, size) in enumerate(
        zip(pair, ("[N, H, K, V]", "[N, 1, H, K]"), (shape, (N, 1, H, K)), strict=True)
    ):
        name = f"initial_state[{i}]" if pair is initial_state else "initial_state"
        if part is None:
            part = q.new_zeros(size, dtype=torch.promote_types(q.dtype, torch.float32))
        check_float_tensor(name, part, 4, letters)
        expect(
            part.shape == size and part.device == q.device, name, part, f"shape {list(size)} on {q.device}"
        )
        parts.append(wide(part))
    return torch.cat([parts[0], parts[1].permute(0, 2, 3, 1)], -1)


def computed_gate(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_gate_in_kernel: bool,
    lower_bound: float | None = None,
) -> Tensor:
    """The log gate `[B, T, HV]` or `[B, T, HV, K]`: g itself, or with `use_gate_in_kernel` what g stands for.

    -exp(A_log) softplus(g + dt_bias), or lower_bound sigmoid(exp(A_log) (g + dt_bias)), in float32 at least.
    """
    parameters = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    if not check_flag("use_gate_in_kernel", use_gate_in_kernel):
        for name, value in parameters.items():
            expect(value is None, name, value, "None without use_gate_in_kernel: it would change nothing")
        return g
    if A_log is None and lower_bound is None:
        fail("A_log", A_log, "a tensor of HV numbers with use_gate_in_kernel", TypeError)
    heads, size = g.shape[2], g.shape[2:]
    for name, value, count in (("A_log", A_log, heads), ("dt_bias", dt_bias, size.numel())):
        if value is not None:
            good = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == count
            expect(good, name, value, f"a floating-point tensor of {count} numbers")
    g = wide(g)
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype).reshape(size)
    rate = None if A_log is None else A_log.to(g.dtype).exp().reshape(heads, *[1] * (len(size) - 1))
    if lower_bound is None:
        return -rate * F.softplus(g)
    bound = check_number("lower_bound", lower_bound)
    expect(bound < 0, "lower_bound", lower_bound, "a number < 0, or None")
    return bound * torch.sigmoid(g if rate is None else rate * g)


def computed_beta(
    beta: Tensor, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False
) -> Tensor:
    """The delta rule's rate `[B, T, HV]`: beta itself, or its sigmoid, doubled with `allow_neg_eigval`."""
    check_flag("allow_neg_eigval", allow_neg_eigval)
    if isinstance(beta, Tensor) and beta.ndim == 4:
        fail("beta", beta, "[B, T, HV]: a rate for each value channel has no kernel here", Unsupported)
    check_float_tensor("beta", beta, 3, "[B, T, HV]")
    if not check_flag("use_beta_sigmoid_in_kernel", use_beta_sigmoid_in_kernel):
        expect(not allow_neg_eigval, "allow_neg_eigval", True, "False without use_beta_sigmoid_in_kernel")
        return beta
    return wide(beta).sigmoid() * (2 if allow_neg_eigval else 1)


def refuse_value_gate(gv) -> None:
    """Gates of value channels."""
    refuse_unless_none("gv", gv, "states are gated by head or by key channel, not by value channel")


def refuse_context(cp_context) -> None:
    """A sequence split over devices."""
    refuse_unless_none("cp_context", cp_context, "a sequence is computed on one device")
