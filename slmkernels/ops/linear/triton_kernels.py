"""Linear attention in Triton: chunk length, tiles, launchers, operator registration.

The kernels and their story stand in `triton_forward.py`, `triton_backward.py` and `triton_chunk.py`; they are
imported only where Triton is, so that this file always imports and `reason_against` can say what is missing.

| launches | forward | backward |
|---|---|---|
| no decay, decay [H] or [B, T, H] | 1 | 2 |
| the same with `normalize` | 1 | 3 |
| the two above, split over the sequence (`split_length`) | 3 | 2, 3 |
| decay [B, T, H, K], or beta | 2 | 2 |
| decay [B, T, H, K] with `normalize` | 2 | 3 |

A decode step is one launch. decay [H] adds PyTorch's sum over the chunks' parts of its gradient.

One tile for a shape, from `config`: the bits of a result then depend on nothing measured.
SLMKERNELS_AUTOTUNE=1 in the environment measures the `candidates` instead on the first call of each
(kernel, head sizes, dtype, row of the table); bits may then differ between processes. Nothing is keyed by a
length: one compiled kernel serves all.
"""

import functools

import torch
from torch import Tensor

from ...triton_support import (
    ABSENT,
    AUTOTUNE,
    INTERPRETED,
    OPERANDS,
    architecture,
    autotuned,
    dense,
    padded,
    readable,
)

if ABSENT is None:
    from . import triton_backward, triton_forward

KEPT = {"bf16": torch.bfloat16, "fp16": torch.float16}  # dtype of the states kept; float32 otherwise
FEW, LONG, SHORTEST = 128, 4096, 512  # see `split_length`; SHORTEST is a multiple of every chunk's length
IN_PLACE = ("step", "scan")  # kernels that must run once, and so are not measured
SCANNED = 512  # numbers of a state that a program of the scan over segments holds


# ---- chunks and tiles --------------------------------------------------------------------------------------


def chunk_length(K: int, dtype: torch.dtype, gate: int, beta: bool, arch: int) -> int:
    """Tokens a chunk, 16, 32 or 64.

    Long chunks keep fewer states, short ones need less of the registers in the backward, and less work for
    pairs of tokens where that is K exponentials a pair (a gate a channel) or a triangular inverse. On 8.x and
    12.x operands of products lie in registers too.
    """
    if dtype == torch.float32:
        return 16
    if padded(K) > 128 and (gate == 2 or beta or dtype == torch.float16):
        return 16
    if gate == 2 or beta or dtype == torch.float16 or padded(K) > 128 or arch < 90 or arch >= 120:
        return 32
    return 64


def split_length(call: "_Sizes") -> int:
    """Tokens a segment where the forward is split over the sequence, a multiple of its chunks; 0: it is not.

    Split are sequences of LONG tokens (packed: in all, since lengths are not known here) whose sweep would
    have under FEW programs, where one launch is enough otherwise; into segments of SHORTEST tokens, or more
    where that still gives 2 FEW programs. By shapes alone, so that the bits of a result depend on no device
    and no measurement.
    """
    programs = call.columns(config("forward", call.V, *call.choice())["BLOCK_V"])
    if call.intra() or programs >= FEW or call.T < LONG or programs == 0:
        return 0
    parts = -(-2 * FEW // programs)
    step = max(SHORTEST, call.C)
    return -(-call.T // (parts * step)) * step


def segment_length(call) -> int:
    """1: the forward keeps what the backward needs. Operators find the chunk length themselves.

    They know the GPU; here torch.compile looks on, which cannot ask for it.
    """
    return 1


def candidates(kind: str, K: int, dtype: torch.dtype, gate: int, beta: bool, arch: int) -> list[tuple]:
    """Tiles (BLOCK_V, num_warps, num_stages) of a kernel, the default first; "intra" has no BLOCK_V.

    tests/test_linear_aot.py holds the defaults to the registers and the shared memory that there are.
    """
    size, exact = max(64, padded(K)), dtype == torch.float32
    if kind == "intra":
        first = 8 if gate == 2 and size > 64 else 4
        return [(0, first, 1), (0, 12 - first, 1)]
    if kind == "step":
        return [{64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)}[size]]
    if kind == "scan":
        return [(0, 4, 1)]
    if kind in ("forward", "segment", "state"):
        first = (16, 8, 1) if exact or size == 256 else (32, 4, 2) if size == 64 else (32, 8, 2)
        others = [(16, 4, 1), (32, 4, 1), (32, 8, 1)]
        if not exact:
            others += [(32, 4, 2), (64, 4, 1), (64, 8, 2)]
    else:
        first = (16, 8, 1) if exact or size > 128 else (32, 8, 1)
        others = [(16, 4, 1), (32, 4, 1), (32, 8, 1)]
        if not exact:
            others += [(64, 8, 1), (32, 8, 2)]
    return [first, *(tile for tile in others if tile != first)]


def _named(tile: tuple[int, int, int], V: int) -> dict[str, int]:
    block, warps, stages = tile
    named = {"num_warps": warps, "num_stages": stages}
    return named | {"BLOCK_V": min(block, padded(V))} if block else named


def config(kind: str, V: int, *choice) -> dict[str, int]:
    """The default tile: what runs unless SLMKERNELS_AUTOTUNE=1."""
    return _named(candidates(kind, *choice)[0], V)


def _launch(kernel, kind: str, grid, call: "_Sizes", args: list, **flags) -> None:
    """Run `kernel` on grid(BLOCK_V) programs; a 1-D grid, whose limit is 2^31 and not 65535."""
    choice = (kind, call.V, *call.choice())
    flags = call.constants(kernel) | flags
    tile = config(*choice)
    programs = grid(tile.get("BLOCK_V"))
    if programs == 0:
        return
    with torch.cuda.device_of(call.q):  # Triton launches on the current device
        if AUTOTUNE and not INTERPRETED and kind not in IN_PLACE:
            measured = dict.fromkeys(
                tuple(_named(row, call.V).items()) for row in candidates(kind, *choice[2:])
            )
            tuned = autotuned(kernel, tuple(measured), *choice)
            tuned[lambda meta: (grid(meta.get("BLOCK_V")),)](*args, **flags)
        else:
            kernel[(programs,)](*args, **flags, **tile)


# ---- sizes of a call ---------------------------------------------------------------------------------------


def _gate(decay: Tensor | None) -> int:
    """0 none, 1 one a token (or constant), 2 one a token and channel: the kernels' GATE."""
    return 0 if decay is None else 2 if decay.ndim == 4 else 1


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of batch, token and head; a decay [H] has none of the first two."""
    strides = []
    for x in tensors:
        strides += [0, 0, 0] if x is None else [0, 0, x.stride(0)] if x.ndim == 1 else x.stride()[:3]
    return strides


@functools.cache
def _architecture(device: torch.device) -> int:
    """`architecture`, also of fake tensors on a GPU that is not there."""
    return architecture(device) if torch.cuda.is_available() else 80


class _Sizes:
    """Sizes and flags of one call, from its arguments or from fake ones."""

    def __init__(self, q, v, decay, beta, cu_seqlens, normalize: bool, l2norm: bool, C: int = 0):
        self.q, self.dtype, self.device = q, q.dtype, q.device
        (self.B, self.T, self.HK, self.K), (self.H, self.V) = q.shape, v.shape[2:]
        self.gate, self.beta = _gate(decay), beta is not None
        self.normalize, self.l2norm = normalize, l2norm
        self.C = C or chunk_length(*self.choice())
        per_row = (self.T + self.C - 1) // self.C
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunks = self.B * per_row if cu_seqlens is None else self.T // self.C + self.N
        self.precision = OPERANDS.get(q.dtype, "ieee")
        self.kept_dtype = KEPT.get(self.precision, torch.float32)

    def constants(self, kernel) -> dict:
        """Those of the kernels' compile-time arguments that `kernel` has."""
        precise = "ieee" if self.precision == "ieee" else "tf32x3"
        flags = {
            "H": self.H, "G": self.H // self.HK, "K": self.K, "V": self.V, "K_PAD": padded(self.K),
            "C": self.C, "GATE": self.gate, "NORMALIZE": self.normalize, "L2": self.l2norm,
            "PRECISION": self.precision, "SOLVE": precise,
        }  # fmt: skip
        return {name: value for name, value in flags.items() if name in kernel.arg_names}

    def choice(self) -> tuple:
        """What selects a tile, beside the kernel and V."""
        return self.K, self.dtype, self.gate, self.beta, _architecture(self.device)

    def columns(self, block: int, parts: int | None = None) -> int:
        """Programs of a sweep: a sequence (or a part), a head and a block of V each."""
        return (self.N if parts is None else parts) * self.H * max(1, -(-self.V // block))

    def intra(self) -> bool:
        """Whether M, and with beta Z, are made by a launch of their own."""
        return self.gate == 2 or self.beta

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What the forward keeps for the backward: shapes and dtypes, by name."""
        tokens, heads = self.B * self.T, self.H
        parts = {"state": ((self.chunks, heads, self.K, self.V), self.kept_dtype)}
        if self.normalize:
            parts["normalizer"] = (self.chunks, heads, self.K), torch.float32
            parts["den"] = (tokens, heads), torch.float32
        if self.intra():
            parts["m"] = (tokens, heads, self.C), torch.float32
        if self.beta:
            parts["z"] = (tokens, heads, self.C), torch.float32
            parts["w"] = (tokens, heads, self.V), self.kept_dtype
        return parts

    def kept_bytes(self) -> int:
        """Size of the one tensor that holds all parts, each at a multiple of 16 bytes."""
        return sum(_bytes(*part) for part in self.parts().values())

    def split(self, kept: Tensor) -> dict[str, Tensor]:
        """The parts as views of that tensor."""
        views, start = {}, 0
        for name, (shape, dtype) in self.parts().items():
            size, length = _bytes(shape, dtype), dtype.itemsize
            for n in shape:
                length *= n
            views[name] = kept[start : start + length].view(dtype).view(shape)
            start += size
        return views


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return (size + 15) // 16 * 16


def _readable(*tensors: Tensor | None) -> list[Tensor | None]:
    """As the kernels address them: see `readable`; one number a token may lie anywhere."""
    return [x if x is None or x.ndim < 4 else readable(x) for x in tensors]


# ---- launchers ---------------------------------------------------------------------------------------------


def forward(
    q, k, v, decay, beta, initial_state, initial_normalizer, cu_seqlens, scale, normalize, l2norm_qk, segment
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, state, normalizer, and what the backward needs, as bytes (none without `segment`)."""
    call = _Sizes(q, v, decay, beta, cu_seqlens, normalize, l2norm_qk)
    o = v.new_empty(v.shape)
    state = v.new_empty(call.N, call.H, call.K, call.V, dtype=torch.float32)
    normalizer = v.new_empty((call.N, call.H, call.K) if normalize else 0, dtype=torch.float32)
    bytes_kept = v.new_empty(call.kept_bytes() if segment else 0, dtype=torch.uint8)
    if segment:
        kept = call.split(bytes_kept)
    else:  # M and Z are still handed from one launch to the next
        needed = {name: part for name, part in call.parts().items() if name in ("m", "z")}
        kept = {name: v.new_empty(shape, dtype=dtype) for name, (shape, dtype) in needed.items()}
    q, k, v, decay, beta = _readable(q, k, v, decay, beta)
    states = dense(initial_state, initial_normalizer)
    cu = dense(cu_seqlens)[0]
    m, z = kept.get("m"), kept.get("z")
    if call.intra():
        args = [q, k, decay, beta, cu, m, z, call.T, call.N, *_strides(q, k, decay, beta)]
        _launch(triton_forward.intra_kernel, "intra", lambda _: call.chunks * call.H, call, args)

    def sweep(kind, grid, states, o, final, fade, kept, segment):
        args = [q, k, v, decay, beta, *states, cu, m, z, o, *final, fade]
        args += [kept.get(name) for name in ("state", "normalizer", "den", "w")]
        args += [call.T, call.N, segment, scale, *_strides(q, k, v, decay, beta)]
        _launch(triton_forward.forward_kernel, kind, grid, call, args)

    final = state, normalizer if normalize else None
    length = split_length(call)
    if length == 0:
        sweep("forward", call.columns, states, o, final, None, kept, None)
        return o, state, normalizer, bytes_kept
    segments = call.T // length + call.N if cu is not None else call.B * -(-call.T // length)
    new = functools.partial(v.new_empty, dtype=torch.float32)
    parts = new(segments, *state.shape[1:]), new(segments, *normalizer.shape[1:]) if normalize else None
    fade = None if decay is None else new(segments, call.H)
    grid = functools.partial(call.columns, parts=segments)
    sweep("segment", grid, (None, None), None, parts, fade, {}, length)
    args = [*parts, fade, *states, cu, *final, call.T, call.N, length]
    blocks = call.N * call.H * max(1, -(-call.K * call.V // SCANNED))
    _launch(triton_forward.scan_kernel, "scan", lambda _: blocks, call, args, BLOCK=SCANNED)
    sweep("forward", grid, parts, o, (None, None), None, kept, length)
    return o, state, normalizer, bytes_kept


def backward(
    do, dstate, dnormalizer, q, k, v, decay, beta, initial_state, initial_normalizer, cu_seqlens, checkpoints,
    scale, normalize, l2norm_qk, segment,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, decay, beta, initial_state and initial_normalizer; empty where one is absent."""
    call = _Sizes(q, v, decay, beta, cu_seqlens, normalize, l2norm_qk)
    kept = call.split(checkpoints)
    gradients = fake_backward(
        do, dstate, dnormalizer, q, k, v, decay, beta, initial_state, initial_normalizer, cu_seqlens,
        checkpoints, scale, normalize, l2norm_qk, segment,
    )  # fmt: skip
    dq, dk, dv, ddecay, dbeta, dstate0, dnormalizer0 = gradients
    constant = decay is not None and decay.ndim == 1
    parts = ddecay.new_empty(call.chunks, call.H) if constant else ddecay
    new = functools.partial(v.new_empty, dtype=torch.float32)
    tokens = call.B * call.T
    dkept_state = torch.empty_like(kept["state"])
    dkept_y = torch.empty_like(kept["w"]) if call.beta else None
    dkept_normalizer = torch.empty_like(kept["normalizer"]) if normalize else None
    dden = new(tokens, call.H) if normalize else None
    q, k, v, decay, beta = _readable(q, k, v, decay, beta)
    do = readable(do)
    m, z, den = kept.get("m"), kept.get("z"), kept.get("den")
    cu, dstate, dnormalizer = dense(cu_seqlens, dstate, dnormalizer)
    if normalize:
        args = [q, k, v, do, decay, cu, m, kept["state"], den, dden, call.T, call.N]
        args += _strides(q, k, v, do, decay)
        grid = call.chunks * call.H
        _launch(triton_backward.denominator_kernel, "denominator", lambda _: grid, call, args)
    args = [q, k, do, decay, beta, cu, m, z, den, dden, dstate, dnormalizer]
    args += [dkept_state, dkept_normalizer, dkept_y, None if initial_state is None else dstate0]
    args += [None if initial_normalizer is None else dnormalizer0, call.T, call.N, scale]
    args += _strides(q, k, do, decay, beta)
    _launch(triton_backward.state_kernel, "state", call.columns, call, args)
    args = [q, k, v, do, decay, beta, cu, m, kept["state"], kept.get("normalizer"), den, kept.get("w")]
    args += [dden, dkept_state, dkept_normalizer, dkept_y, dq, dk, dv, parts, dbeta, call.T, call.N, scale]
    args += _strides(q, k, v, do, decay, beta)
    grid = call.chunks * call.HK
    _launch(triton_backward.gradient_kernel, "gradient", lambda _: grid, call, args, CONSTANT=constant)
    if constant:
        ddecay = parts.sum(0)
    return dq, dk, dv, ddecay, dbeta, dstate0, dnormalizer0


def step(q, k, v, decay, beta, state, normalizer, scale, l2norm_qk) -> Tensor:
    """Advance the state in place by q.shape[1] tokens, one launch."""
    call = _Sizes(q, v, decay, beta, None, normalizer is not None, l2norm_qk)
    o = v.new_empty(v.shape)
    q, k, v, decay, beta = _readable(q, k, v, decay, beta)
    args = [q, k, v, decay, beta, state, normalizer, o, call.T, scale, *_strides(q, k, v, decay, beta)]
    block = config("step", call.V, *call.choice())["BLOCK_V"]
    split = 1 if normalizer is not None else max(1, -(-call.V // block))
    grid = call.B * call.H * split
    _launch(triton_forward.step_kernel, "step", lambda _: grid, call, args, SPLIT=split)
    return o


# ---- operators ---------------------------------------------------------------------------------------------


def fake_forward(q, k, v, decay, beta, state, normalizer, cu_seqlens, scale, normalize, l2norm_qk, segment):
    """Shapes of what `forward` returns."""
    call = _Sizes(q, v, decay, beta, cu_seqlens, normalize, l2norm_qk)
    return (
        v.new_empty(v.shape),
        v.new_empty(call.N, call.H, call.K, call.V, dtype=torch.float32),
        v.new_empty((call.N, call.H, call.K) if normalize else (0,), dtype=torch.float32),
        v.new_empty(call.kept_bytes() if segment else 0, dtype=torch.uint8),
    )


def fake_backward(
    do, dstate, dnormalizer, q, k, v, decay, beta, state, normalizer, cu_seqlens, kept,
    scale, normalize, l2norm_qk, segment,
):  # fmt: skip
    """Shapes of the gradients, contiguous; those of absent arguments are empty."""
    gates = (
        q.new_empty(0 if x is None else x.shape, dtype=torch.float32)
        for x in (decay, beta, state, normalizer)
    )
    return q.new_empty(q.shape), q.new_empty(q.shape), v.new_empty(v.shape), *gates


def fake_step(q, k, v, decay, beta, state, normalizer, scale, l2norm_qk):
    return v.new_empty(v.shape)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? initial_state, "
    "Tensor? initial_normalizer, Tensor? cu_seqlens, "
)
_OPTIONS = "float scale, bool normalize, bool l2norm_qk, int segment"
_OPERATORS = {
    "forward": (f"({_INPUTS}{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", forward, fake_forward),
    "backward": (
        f"(Tensor dout, Tensor? dstate, Tensor? dnormalizer, {_INPUTS}Tensor checkpoints, {_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward,
        fake_backward,
    ),
    "step": (
        "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor(a!) state, "
        "Tensor(b!)? normalizer, float scale, bool l2norm_qk) -> Tensor",
        step,
        fake_step,
    ),
}

# Defined even where Triton is absent, so that no caller has to ask.
for _name, (_schema, _function, _fake) in _OPERATORS.items():
    torch.library.define(f"slmkernels::triton_linear_attention_{_name}", _schema)
    torch.library.register_fake(f"slmkernels::triton_linear_attention_{_name}", _fake)
    if ABSENT is None:
        torch.library.impl(f"slmkernels::triton_linear_attention_{_name}", ("cpu", "cuda"), _function)
