"""`linear_attention`: the public function, its checks, its autograd, its choice of backend."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ... import autograd, native, triton_support
from ...autocast import as_autocast_wants, autocasts, without_autocast
from ...autograd import Function, apply_function
from ...dispatch import Operation, operators, register
from ...validation import (
    FLOATS,
    State,
    alike,
    as_dtype,
    check_cu_seqlens,
    check_flag,
    check_float_tensor,
    check_like,
    check_number,
    check_state,
    fail,
    wide,
)
from . import reference, triton_kernels

FORWARD = operators("linear_attention_forward")
BACKWARD = operators("linear_attention_backward")

CHECKPOINT_BYTES = 1 << 18  # see `segment_length`
# What the CUDA kernel takes of shared memory, by (K > 64, with beta); csrc/linear/forward.cu asserts it.
SHARED_KIB = {(False, False): 70, (False, True): 92, (True, False): 102, (True, True): 124}


class Call(NamedTuple):
    """A checked call. Gates and states are in float32 (float64 for float64 inputs)."""

    q: Tensor  # [B, T, Hk, K]
    k: Tensor  # [B, T, Hk, K]
    v: Tensor  # [B, T, H, V]
    decay: Tensor | None  # [H], [B, T, H] or [B, T, H, K]
    beta: Tensor | None  # [B, T, H]
    initial_state: Tensor | None  # [N, H, K, V]
    initial_normalizer: Tensor | None  # [N, H, K]
    cu_seqlens: Tensor | None  # [N+1]
    scale: float
    normalize: bool
    l2norm_qk: bool


def check_tokens(q, k, v):
    """q, k, v of a call or of a step, cast as autocast wants them, and their sizes (B, T, Hk, K, H, V)."""
    if not alike(4, q, k, v) or autocasts(q):
        check_float_tensor("q", q, 4, "[B, T, Hk, K]")
        check_float_tensor("k", k, 4, "[B, T, Hk, K]")
        check_float_tensor("v", v, 4, "[B, T, H, V]")
        q, k, v = as_autocast_wants(q, k, v)
        check_like("k", k, "q", q)
        check_like("v", v, "q", q)
    shape = B, T, Hk, K = q.shape
    v_B, v_T, H, V = v.shape
    if k.shape != shape:
        fail("k", k, f"shape {list(shape)} like q")
    if v_B != B or v_T != T:
        fail("v", v, f"batch and length {[B, T]} like q")
    if K < 1:
        fail("q", q, "a head dimension of at least 1")
    if H < 1 or V < 1:
        fail("v", v, "at least one head, and a head dimension of at least 1")
    if Hk < 1 or H % Hk != 0:
        fail("v", v, f"a number of heads that q's {Hk} heads divide")
    return q, k, v, (B, T, Hk, K, H, V)


def check_gates(decay, beta, q: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """decay and beta in the dtype of the state. decay's sign is looked at on the CPU only."""
    if decay is None and beta is None:
        return None, None
    B, T, _, K, H, _ = sizes
    dtype = wide(q.dtype)
    if decay is not None:
        shapes = {1: (H,), 3: (B, T, H), 4: (B, T, H, K)}
        if not isinstance(decay, Tensor) or decay.dtype not in FLOATS or decay.layout != torch.strided:
            expected = "a dense floating-point tensor [H], [B, T, H] or [B, T, H, K]"
            fail("decay", decay, f"{expected}, float32, bfloat16, float16 or float64", TypeError)
        if decay.ndim not in shapes or decay.shape != shapes[decay.ndim] or decay.device != q.device:
            expected = ", ".join(str(list(shape)) for shape in shapes.values())
            fail("decay", decay, f"one of the shapes {expected} on {q.device}")
        visible = not torch.compiler.is_compiling() and not isinstance(decay, FakeTensor)
        if decay.is_cpu and visible and decay.numel():
            gates = decay.detach() if decay.requires_grad else decay
            largest = gates.max().item()  # amax takes longer
            if largest > 0:
                fail("decay", largest, "log gates <= 0; this is the largest")
        decay = as_dtype(decay, dtype)
    if beta is not None:
        check_float_tensor("beta", beta, 3, "[B, T, H]")
        if beta.shape != (B, T, H) or beta.device != q.device:
            fail("beta", beta, f"shape {[B, T, H]} on {q.device}")
        beta = as_dtype(beta, dtype)
    return decay, beta


def prepare(
    q, k, v, *, decay=None, beta=None, scale=None, normalize=False, l2norm_qk=False,
    initial_state=None, return_state=False, cu_seqlens=None, backend=None,
) -> Call:  # fmt: skip
    """Check the public arguments and normalise them; the errors a user sees come from here."""
    check_flag("normalize", normalize)
    check_flag("l2norm_qk", l2norm_qk)
    q, k, v, sizes = check_tokens(q, k, v)
    decay, beta = check_gates(decay, beta, q, sizes)
    if normalize and beta is not None:
        fail("normalize", normalize, "False with beta: the delta rule has no normaliser")
    scale = sizes[3] ** -0.5 if scale is None else check_number("scale", scale)
    N = sizes[0]
    if cu_seqlens is not None:
        if N != 1:
            fail("q", q, "batch 1 with cu_seqlens (sequences are packed along T)")
        check_cu_seqlens("cu_seqlens", cu_seqlens, sizes[1], q.device)
        N = cu_seqlens.shape[0] - 1
    states = (None, None)
    if initial_state is not None:
        dtype = wide(q.dtype)
        states = check_state("initial_state", initial_state, normalize, (N, sizes[4], sizes[3], sizes[5]), q)
        states = tuple(None if x is None else x.to(dtype) for x in states)
    return Call(q, k, v, decay, beta, *states, cu_seqlens, scale, normalize, l2norm_qk)


def wants_gradient(call: Call) -> str | None:
    """The first argument whose gradient a backward would want, if any."""
    if not autograd.wants_gradient(*call[:7]):
        return None
    named = zip(call._fields[:7], call[:7], strict=True)
    return next((name for name, x in named if x is not None and x.requires_grad), None)


def reason_against_cuda(call: Call) -> str | None:
    """None where the CUDA C++ kernel takes the call by its dtypes, shapes and gradients, else why not."""
    K, V = call.q.shape[3], call.v.shape[3]
    if K % 8 or K > 128:
        return f"q has head dimension {K}; CUDA kernels take multiples of 8 up to 128"
    if V % 8:
        return f"v has head dimension {V}; CUDA kernels take multiples of 8"
    if call.decay is not None and call.decay.ndim == 4:
        return "decay has a gate for each channel; CUDA kernels take [H] and [B, T, H]"
    name = wants_gradient(call)
    if name is not None:
        return f"{name} wants a gradient; this operation has no CUDA C++ backward"
    reason = native.reason_against_16bit(call.q)
    if reason is None and call.q.device.type == "cuda":
        needed = SHARED_KIB[K > 64, call.beta is not None]
        there = native.shared_kib(call.q.device)
        if there < needed:
            return f"the CUDA kernel needs {needed} KiB of shared memory a block, this GPU has {there}"
    return reason


def reason_against_native(call: Call) -> str | None:
    """None where native kernels can run the call, else why not."""
    return native.reason_against(call.q) or (reason_against_cuda(call) if call.q.is_cuda else None)


def slower_than_triton(call: Call) -> str | None:
    """Why Triton should run a call that the CUDA C++ kernel takes, if it should.

    A block of that goes through its sequence alone, about 1 us for 64 tokens. Triton splits long sequences
    where heads are few, and takes about 4 us for 64 tokens of a segment, its two sweeps together. It has
    2 FEW / blocks segments and wins from 4 on; asked for are 8, since both times are counted, not measured.
    """
    (B, T, H, V), cu = call.v.shape, call.cu_seqlens
    N = B if cu is None else cu.shape[0] - 1
    blocks = N * H * -(-V // 32)
    few, long = 0 < blocks <= triton_kernels.FEW // 4, B * T >= N * triton_kernels.LONG
    return (
        "sequences are long and heads few: Triton splits them" if few and long and call.beta is None else None
    )


# Best first.
SUPPORTS = {
    "native": reason_against_native,
    "triton": triton_support.reason_against,
    "reference": lambda call: None,
}
GIVES_WAY = {"native": lambda call: slower_than_triton(call) if call.q.is_cuda else None}
OPERATION = register(Operation("linear_attention", dict(SUPPORTS), prepare, GIVES_WAY))


def segment_length(K: int, V: int) -> int:
    """Tokens between two states that the native forward keeps for the backward: 256 to 512.

    The backward computes the states of one segment's chunks (of 32 tokens) again, and holds them, in cache:
    256 KiB at K = V = 64, 512 KiB at 128. What is kept takes K V / (2 segment (K + V)) of
    the memory of q, k, v and o in float32: 3 % at 64, 12 % at 128.
    """
    return 64 * min(8, max(4, CHECKPOINT_BYTES // (4 * K * max(V, 1))))


class LinearAttention(Function):
    """Forward and backward over the operators of one backend.

    Saves the inputs and a state every `segment` tokens (0: none, no backward follows).
    """

    @staticmethod
    def forward(
        q, k, v, decay, beta, state, normalizer, cu_seqlens, scale, normalize, l2norm, segment, prefix
    ):
        op = FORWARD[prefix]
        tensors = q, k, v, decay, beta, state, normalizer, cu_seqlens
        return op(*tensors, scale, normalize, l2norm, segment)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, scale, normalize, l2norm, segment, ctx.prefix = inputs
        ctx.options = scale, normalize, l2norm, segment
        ctx.save_for_backward(*tensors, output[3])
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dstate, dnormalizer, _):
        *tensors, checkpoints = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(tensors[2])
        if not ctx.options[1]:
            dnormalizer = None
        op = BACKWARD[ctx.prefix]
        gradients = op(do, dstate, dnormalizer, *tensors, checkpoints, *ctx.options)
        given = zip(gradients, tensors[:7], strict=True)
        return *(gradient if x is not None else None for gradient, x in given), *[None] * 6


def attend(call: Call, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a checked call on a backend that supports it -> o, state, normalizer (None unless `normalize`)."""
    if backend == "reference":
        options = {"scale": call.scale, "normalize": call.normalize, "l2norm_qk": call.l2norm_qk}
        with without_autocast(call.q):
            return reference.linear_attention(*call[:8], **options)
    segment = 0
    if wants_gradient(call) is not None:
        K, V = call.q.shape[3], call.v.shape[3]
        segment = triton_kernels.segment_length(call) if backend == "triton" else segment_length(K, V)
    prefix = "triton_" if backend == "triton" else ""
    o, state, normalizer, _ = apply_function(LinearAttention, *call, segment, prefix)
    return o, state, normalizer if call.normalize else None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    l2norm_qk: bool = False,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Attention without a softmax, as a recurrence over a state S `[K, V]` a head, in time linear in T.

        S' = exp(decay_t) S                    rows of S scaled
        S  = S' + k_t v_t^T                    without beta
        S  = S' + beta_t k_t (v_t - S'^T k_t)^T    with beta: the delta rule
        o_t = scale S^T q_t

    | decay | beta | the model |
    |---|---|---|
    | None | None | linear attention (with `normalize` and a positive feature map: Katharopoulos) |
    | `[H]` | None | RetNet, Lightning attention |
    | `[B, T, H]` | None | Mamba-2 / SSD, simple GLA |
    | `[B, T, H, K]` | None | GLA |
    | None | `[B, T, H]` | DeltaNet |
    | `[B, T, H]` | `[B, T, H]` | Gated DeltaNet |
    | `[B, T, H, K]` | `[B, T, H]` | Kimi Delta Attention |

    Args:
        q, k: queries and keys `[B, T, Hk, K]`, float32, bfloat16, float16 or float64.
        v: values `[B, T, H, V]`, like q; Hk divides H, and head h reads query and key head h // (H / Hk).
        decay: natural logarithm of the gate, <= 0, of any of these dtypes; -inf forgets everything. A
            positive one is an error on the CPU in eager mode, and undefined elsewhere.
        beta: the delta rule's rate, of any of these dtypes.
        scale: factor of the queries, `K ** -0.5` if None. It cancels, and is not applied, with `normalize`.
        normalize: o_t = S^T q_t / (z . q_t + 1e-6), with z = exp(decay_t) z + k_t. Not with beta.
        l2norm_qk: q and k are divided by `sqrt(sum(x^2) + 1e-6)` first.
        initial_state: `[N, H, K, V]`, N sequences (B, or those of cu_seqlens); zeros if None. With
            `normalize` a pair with z `[N, H, K]`.
        return_state: also return the final state, in the form of initial_state.
        cu_seqlens: int32 `[N+1]`, offsets of N sequences packed along T (B must be 1); nothing crosses a
            boundary, empty sequences are legal.
        backend: None (best that supports the call), "native", "triton" or "reference".

    Returns:
        o `[B, T, H, V]` in q's dtype, and with `return_state` the state in float32 (float64 for float64
        inputs). Both are differentiable, once. A NaN or infinity at a token reaches no earlier
        output; its gradients may reach the tokens around it.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: Katharopoulos et al. 2020, section 3.2; Yang et al. 2024 (GLA), section 4; Yang et al. 2024
    (DeltaNet), section 3.2; Yang et al. 2025 (Gated DeltaNet), section 3.3; Kimi Team 2025 (Kimi Linear).
    """
    check_flag("return_state", return_state)
    call = prepare(
        q, k, v, decay=decay, beta=beta, scale=scale, normalize=normalize, l2norm_qk=l2norm_qk,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    o, state, normalizer = attend(call, OPERATION.choose(call, backend))
    if not return_state:
        return o
    return o, (state, normalizer) if normalize else state


def fake_forward(q, k, v, decay, beta, state, normalizer, cu_seqlens, scale, normalize, l2norm_qk, segment):
    """Shapes of the native forward: o, state, normalizer, and the states between segments."""
    (B, T, _, K), (H, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kept = (B, T // segment, H, K * V + (K if normalize else 0)) if segment else (0,)
    return (
        v.new_empty(v.shape),
        v.new_empty(N, H, K, V, dtype=dtype),
        v.new_empty((N, H, K) if normalize else (0,), dtype=dtype),
        v.new_empty(kept, dtype=dtype),
    )


def fake_backward(
    do, dstate, dnormalizer, q, k, v, decay, beta, state, normalizer, cu_seqlens, kept,
    scale, normalize, l2norm_qk, segment,
):  # fmt: skip
    """Shapes of the gradients, contiguous; those of absent arguments are empty."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    gates = (q.new_empty(0 if x is None else x.shape, dtype=dtype) for x in (decay, beta, state, normalizer))
    return q.new_empty(q.shape), q.new_empty(q.shape), v.new_empty(v.shape), *gates


if native.HAS_CPU:
    torch.library.register_fake("slmkernels::linear_attention_forward", fake_forward)
    torch.library.register_fake("slmkernels::linear_attention_backward", fake_backward)
