"""`expert_mlp` and `segment_mlp`: the public functions, their checks, their autograd, their backends."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native, triton_support
from ...autocast import as_autocast_wants, autocasts, without_autocast
from ...autograd import Function, apply_function
from ...dispatch import Operation, operators, register
from ...validation import alike, as_dtype, check_cu_seqlens, check_float_tensor, check_like, fail, wide
from . import reference, triton_kernels  # noqa: F401  (triton_kernels defines operators)

FORWARD = operators("expert_mlp_forward")
BACKWARD = operators("expert_mlp_backward")

LAYOUTS = ("concatenated", "interleaved")
# What the CUDA C++ kernels take: experts, rows, d and n, numbers of x.
MANY = 128  # rows an expert, from where tensor cores are the limit
MOST_EXPERTS, MOST_ROWS, MOST_CHANNELS, MOST_NUMBERS = 2**14, 2**29, 2**28, 2**34


class Call(NamedTuple):
    """A checked call of either function."""

    x: Tensor  # [T, d]
    indices: Tensor  # int32 [T, k]; of segments [N]
    weights: Tensor | None  # [T, k] float32 (float64 of float64 x); None of segments
    cu_seqlens: Tensor | None  # int32 [N+1], of segments
    w_gate_up: Tensor  # [E, H, d], H = 2n, or n of an activation without a gate
    w_down: Tensor  # [E, d, n]
    b_gate_up: Tensor | None  # [E, H]
    b_down: Tensor | None  # [E, d]
    activation: str
    interleaved: bool


def check_indices(name: str, value, ndim: int, letters: str, x: Tensor, E: int) -> Tensor:
    """int32 indices; those outside 0 .. E-1 stay outside."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        fail(name, value, f"an int32 or int64 tensor {letters}", TypeError)
    if value.ndim != ndim or value.device != x.device:
        fail(name, value, f"an integer tensor {letters} on {x.device}")
    return value if value.dtype == torch.int32 else value.clamp(-1, E).to(torch.int32)


def fits(x, w_gate_up, w_down, b_gate_up, b_down, factor: int) -> bool:
    """Whether these are dense tensors of one dtype and of fitting sizes: nearly every call, found quickly."""
    biases = [b for b in (b_gate_up, b_down) if b is not None]
    if not alike(None, x, w_gate_up, w_down, *biases) or autocasts(x) or x.ndim != 2 or w_down.ndim != 3:
        return False
    E, d, n = w_down.shape
    return (
        min(E, d, n) >= 1
        and x.shape[1] == d
        and w_gate_up.shape == (E, factor * n, d)
        and (b_gate_up is None or b_gate_up.shape == (E, factor * n))
        and (b_down is None or b_down.shape == (E, d))
    )


def check_matrices(x, w_gate_up, w_down, b_gate_up, b_down, activation, layout) -> tuple:
    """What the two functions share -> x, the matrices and the biases as autocast wants them."""
    if activation not in reference.ACTIVATIONS:
        fail("activation", activation, f"one of {', '.join(reference.ACTIVATIONS)}")
    if layout not in LAYOUTS:
        fail("layout", layout, f"one of {', '.join(LAYOUTS)}")
    factor = 2 if activation in reference.GATED else 1
    if fits(x, w_gate_up, w_down, b_gate_up, b_down, factor):
        return x, w_gate_up, w_down, b_gate_up, b_down
    check_float_tensor("x", x, 2, "[T, d]")
    if x.shape[1] < 1:
        fail("x", x, "at least one channel")
    named = {"w_gate_up": (w_gate_up, 3, "[E, 2n, d]"), "w_down": (w_down, 3, "[E, d, n]")}
    named |= {"b_gate_up": (b_gate_up, 2, "[E, 2n]"), "b_down": (b_down, 2, "[E, d]")}
    for name, (value, ndim, letters) in named.items():
        if value is not None or ndim == 3:
            check_float_tensor(name, value, ndim, letters)
    present = {name: value for name, (value, *_) in named.items() if value is not None}
    x, *cast = as_autocast_wants(x, *present.values())
    matrices = dict.fromkeys(named) | dict(zip(present, cast, strict=True))
    for name in present:
        check_like(name, matrices[name], "x", x)
    E, d, n = w_down.shape
    if E < 1 or n < 1 or d != x.shape[1]:
        fail("w_down", w_down, f"shape [E, {x.shape[1]}, n] to go with x, E and n at least 1")
    rows = f"2n = {2 * n}" if factor == 2 else f"n = {n} ({activation} has no gate)"
    for name, shape in (
        ("w_gate_up", (E, factor * n, d)),
        ("b_gate_up", (E, factor * n)),
        ("b_down", (E, d)),
    ):
        if matrices[name] is not None and matrices[name].shape != shape:
            fail(name, matrices[name], f"shape {list(shape)}, to go with x and w_down; {rows}")
    return x, *matrices.values()


def prepare(
    x, indices, weights, w_gate_up, w_down, *, b_gate_up=None, b_down=None, activation="swiglu",
    layout="concatenated", backend=None,
) -> Call:  # fmt: skip
    """Check `expert_mlp`'s arguments and normalise them; the errors a user sees come from here."""
    x, *matrices = check_matrices(x, w_gate_up, w_down, b_gate_up, b_down, activation, layout)
    indices = check_indices("indices", indices, 2, "[T, k]", x, w_down.shape[0])
    if indices.shape[0] != x.shape[0] or indices.shape[1] < 1:
        fail("indices", indices, f"shape [{x.shape[0]}, k] to go with x, k at least 1")
    check_float_tensor("weights", weights, 2, "[T, k]")
    if weights.shape != indices.shape or weights.device != x.device:
        fail("weights", weights, f"shape {list(indices.shape)} on {x.device}, to go with indices")
    weights = as_dtype(weights, wide(x.dtype))
    return Call(x, indices, weights, None, *matrices, activation, layout == "interleaved")


def prepare_segments(
    x, cu_seqlens, expert_of_segment, w_gate_up, w_down, *, b_gate_up=None, b_down=None,
    activation="swiglu", layout="concatenated", backend=None,
) -> Call:  # fmt: skip
    """The same for `segment_mlp`."""
    x, *matrices = check_matrices(x, w_gate_up, w_down, b_gate_up, b_down, activation, layout)
    check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x.device)
    experts = check_indices("expert_of_segment", expert_of_segment, 1, "[N]", x, w_down.shape[0])
    N = cu_seqlens.shape[0] - 1
    if experts.shape[0] != N:
        fail("expert_of_segment", experts, f"shape [{N}], an expert for each segment of cu_seqlens")
    return Call(x, experts, None, cu_seqlens, *matrices, activation, layout == "interleaved")


def wants_gradient(call: Call) -> bool:
    """Will autograd ask for this call's backward?"""
    tensors = (*call[:3], *call[4:8])
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows_of(call: Call) -> int:
    """Rows that pass an expert: T k, or T of segments."""
    return call.indices.numel() if call.cu_seqlens is None else call.x.shape[0]


def reason_against_cuda(call: Call) -> str | None:
    """None where the CUDA C++ kernels can run a call by its sizes and dtypes, else why not."""
    (E, d, n), rows = call.w_down.shape, rows_of(call)
    if (reason := native.reason_against_16bit(call.x)) is not None:
        return reason
    if d % 8 or n % 8 or max(d, n) > MOST_CHANNELS:
        return (
            f"CUDA kernels take d and n that are multiples of 8 up to {MOST_CHANNELS}, not d = {d}, n = {n}"
        )
    if E > MOST_EXPERTS or rows > MOST_ROWS:
        return (
            f"CUDA kernels take up to {MOST_EXPERTS} experts and {MOST_ROWS} rows, not E = {E}, T k = {rows}"
        )
    if call.x.numel() >= MOST_NUMBERS:
        return f"CUDA kernels take x of fewer than {MOST_NUMBERS} numbers, not {call.x.numel()}"
    if wants_gradient(call):
        return "a gradient is wanted, and there is no native CUDA backward (Triton has one)"
    return None


def reason_against_native(call: Call) -> str | None:
    """None where native kernels can run a call, else why not."""
    return native.reason_against(call.x) or (reason_against_cuda(call) if call.x.is_cuda else None)


def slower_than_triton(call: Call, capability: tuple[int, int]) -> str | None:
    """Why Triton should run a call that the CUDA C++ kernels take on a GPU of this capability, if it should.

    They multiply by mma.sync, which has two thirds of wgmma's rate on 9.0. Below MANY rows an expert the
    bytes of the matrices take longer than either. Counted, not measured.
    """
    many = rows_of(call) >= MANY * call.w_down.shape[0]
    return "the CUDA kernels have no wgmma yet: Triton has" if many and capability[0] == 9 else None


def gives_way(call: Call) -> str | None:
    """The same for the GPU that x is on."""
    return slower_than_triton(call, native.capability(call.x.device)) if call.x.is_cuda else None


GIVES_WAY = {"native": gives_way}
SUPPORTS = {
    "native": reason_against_native,
    "triton": lambda call: triton_support.reason_against_tensor("x", call.x),
    "reference": lambda call: None,
}
OPERATION = register(Operation("expert_mlp", dict(SUPPORTS), prepare, GIVES_WAY))
SEGMENTS = register(Operation("segment_mlp", dict(SUPPORTS), prepare_segments, GIVES_WAY))


class ExpertMLP(Function):
    """Forward and backward over the operators of one backend.

    Saves the inputs and the pre-activation h, T k rows of it; nothing of size T k d.
    """

    @staticmethod
    def forward(
        x, indices, weights, cu_seqlens, up, down, b_up, b_down, activation, interleaved, save, prefix
    ):
        return FORWARD[prefix](
            x, indices, weights, cu_seqlens, up, down, b_up, b_down, activation, interleaved, save
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.prefix = inputs[8:10], inputs[11]
        ctx.save_for_backward(*inputs[:8], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 12
        need = ctx.needs_input_grad
        op = BACKWARD[ctx.prefix]
        gradients = op(dy, *ctx.saved_tensors, *ctx.options, need[0], any(need[4:8]))
        wanted = need[0], need[2], *need[4:8]
        dx, dweights, *dmatrices = (g if n else None for g, n in zip(gradients, wanted, strict=True))
        return dx, None, dweights, None, *dmatrices, None, None, None, None


def compute(operation: Operation, call: Call, backend: str | None) -> Tensor:
    """Run a checked call on a backend that supports it -> y [T, d]."""
    backend = operation.choose(call, backend)
    if backend == "reference":
        x, indices, weights, cu_seqlens, *rest = call
        with without_autocast(x):
            if cu_seqlens is not None:
                return reference.segment_mlp(x, cu_seqlens, indices, *rest)
            return reference.expert_mlp(x, indices, weights, *rest)
    save = wants_gradient(call)
    number = reference.ACTIVATIONS.index(call.activation)
    prefix = "triton_" if backend == "triton" else ""
    return apply_function(ExpertMLP, *call._replace(activation=number), save, prefix)[0]


def expert_mlp(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    layout: str = "concatenated",
    backend: str | None = None,
) -> Tensor:
    """The weighted sum of the experts that each token is routed to, an MLP each.

        y_t = sum_j weights[t, j] MLP_{indices[t, j]}(x_t)
        MLP_e(x) = w_down[e] (act(w_gate_up[e] x + b_gate_up[e])) + b_down[e]

    Gather, activation and combination are part of the operation. For the backward it keeps x, the
    pre-activation (T k rows of 2n values), indices and weights.

    Args:
        x: tokens `[T, d]`, float32, bfloat16, float16 or float64.
        indices: int32 or int64 `[T, k]`. One outside 0 .. E-1, such as -1, is an absent expert: it adds
            nothing and gets no gradient. Twice the same expert counts twice.
        weights: `[T, k]`, of any of these dtypes; computed with in float32 (float64 for float64 x).
        w_gate_up: `[E, 2n, d]` like x, gate and up as `layout` says; `[E, n, d]` for an activation without a
            gate. Any strides: a transposed view costs no copy.
        w_down: `[E, d, n]` like x, any strides.
        b_gate_up, b_down: biases `[E, 2n]` (or `[E, n]`) and `[E, d]` like x.
        activation: "swiglu", "geglu", "geglu_tanh": silu(gate) up, gelu(gate) up, with the tanh form of gelu;
            "swigluoai": GPT-OSS's, gate sigmoid(1.702 gate) (up + 1), of gates up to 7 and ups from -7 to 7;
            "relu2", "gelu", "gelu_tanh": without a gate, relu(h)^2 and gelu(h).
        layout: "concatenated", n rows of gates and then n of ups, or "interleaved", in turn.
        backend: None (best that supports the call), "native", "triton" or "reference".

    Returns:
        y `[T, d]` in x's dtype. Differentiable, once, in x, weights and all matrices and biases. An expert
        without tokens gets gradients of zero.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: Shazeer et al. 2017; what is saved and d(weights) = <dA', A> after SonicMoE (2025), section 3.
    """
    call = prepare(
        x, indices, weights, w_gate_up, w_down, b_gate_up=b_gate_up, b_down=b_down,
        activation=activation, layout=layout,
    )  # fmt: skip
    return compute(OPERATION, call, backend)


def segment_mlp(
    x: Tensor,
    cu_seqlens: Tensor,
    expert_of_segment: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    layout: str = "concatenated",
    backend: str | None = None,
) -> Tensor:
    """Whole documents to experts, without a permutation: all tokens of segment s go through the MLP of
    `expert_of_segment[s]`.

    Args:
        x: tokens of all segments `[T, d]`.
        cu_seqlens: int32 `[N+1]`, offsets of N segments, from 0 to T; empty segments are legal.
        expert_of_segment: int32 or int64 `[N]`. One outside 0 .. E-1 is absent: its tokens get y = 0.
        w_gate_up, w_down, b_gate_up, b_down, activation, layout, backend: as of `expert_mlp`.

    Returns:
        y `[T, d]` in x's dtype. Differentiable, once, in x, the matrices and the biases.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: Gururangan et al. 2021 (DEMix layers), section 3.
    """
    call = prepare_segments(
        x, cu_seqlens, expert_of_segment, w_gate_up, w_down, b_gate_up=b_gate_up, b_down=b_down,
        activation=activation, layout=layout,
    )  # fmt: skip
    return compute(SEGMENTS, call, backend)


def fake_forward(x, indices, weights, cu, up, down, b_up, b_down, activation, interleaved, save):
    """y, and the pre-activation of every row in an order of the backend's own."""
    rows = indices.numel() if cu is None else x.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows * up.shape[1] if save else 0)


def fake_backward(
    dy, x, indices, weights, cu, up, down, b_up, b_down, h, activation, interleaved, need_x, need_w
):  # fmt: skip
    """Shapes of the gradients, contiguous; what is absent or not needed is empty."""

    def like(tensor, needed=True):
        return x.new_empty(tensor.shape if needed and tensor is not None else 0)

    dweights = x.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    matrices = (like(tensor, need_w) for tensor in (up, down, b_up, b_down))
    return like(x, need_x), dweights, *matrices


for _prefix in ["", "triton_"] if native.HAS_CPU else ["triton_"]:
    torch.library.register_fake(f"slmkernels::{_prefix}expert_mlp_forward", fake_forward)
    torch.library.register_fake(f"slmkernels::{_prefix}expert_mlp_backward", fake_backward)
