"""Hybrid attention in Triton: tile choice, launchers, operator registration.

The kernels and their story stand in `triton_forward.py` and `triton_backward.py`; they are imported only
where Triton is, so that this file always imports and `reason_against` can say what is missing.

| launches | forward | backward | decode step |
|---|---|---|---|
| some key may be far, or an initial state is given | 3 | 4 | 1 |
| none | 1 | 2 | 1 |

A gradient of `mix` adds PyTorch's sum over the rows' parts of it. Window and lengths select no tile: one
compiled kernel serves all, and the bits of a result depend on nothing measured. SLMKERNELS_AUTOTUNE=1 in the
environment measures the `candidates` instead on the first call of each (kernel, head sizes, dtype); bits may
then differ between processes.
"""

import torch
from torch import Tensor

from ...triton_support import (
    ABSENT,
    AUTOTUNE,
    INTERPRETED,
    LOG2_E,
    OPERANDS,
    architecture,
    autotuned,
    dense,
    padded,
    positive,
    readable,
)
from .reference import first_near

if ABSENT is None:
    from . import triton_backward, triton_forward

SCANNED = {"BLOCK": 128, "STEPS": 16, "num_warps": 4, "num_stages": 1}  # of the scan over segments


# ---- tiles -------------------------------------------------------------------------------------------------


def state_spacing(F: int, V: int) -> int:
    """Keys a segment, a power of two: 64, or more where a state would take over 128 numbers a key.

    Long segments keep fewer states, short ones leave fewer far keys to be multiplied pair by pair: half a
    segment a query, at F + V multiplications each, beside the F V of the state.
    """
    return max(64, padded(F) * padded(V) // 128)


def candidates(
    kind: str, sizes: tuple[int, int, int], dtype: torch.dtype, arch: int
) -> list[tuple[int, ...]]:
    """Tiles (BLOCK_M, BLOCK_N, BLOCK_S, num_warps, num_stages) of "forward", "dq" and "dkv", the default
    first; BLOCK_S is how much of a state a product takes at a time. Of "segment" (BLOCK_N, BLOCK_F, BLOCK_V,
    num_warps, num_stages).

    `sizes`: D, F and V. tests/test_hybrid_aot.py holds the defaults to the registers and the shared memory
    that there are. The tiles of keys must divide the segments.
    """
    size, exact = max(64, *map(padded, sizes)), dtype == torch.float32
    mma = "sync" if arch < 90 or arch >= 120 else "async"
    if kind == "segment":
        return [(16, 32, 32, 4, 1) if exact else (32, 64, 64, 4, 2)]
    if exact:  # products without tensor cores: small tiles, or the registers spill
        first = (16, 16, 16, 4 if kind == "forward" and size == 128 else 8, 1)
        if size == 64:
            first = (16, 32, 16, 4, 1) if kind == "dq" else (32, 32, 16, 4, 1)
        others = [(16, 16, 16, 4, 1), (16, 16, 16, 8, 1), (32, 32, 16, 8, 1)]
    else:
        table = {
            ("forward", 64): (64, 64, 32, 4, 2),
            ("forward", 128): (64, 64, 32, 8, 2),
            ("forward", 256): (64, 32, 16, 8, 1),
            ("dq", 64, "sync"): (64, 32, 32, 4, 2),
            ("dq", 64, "async"): (64, 64, 32, 4, 2),
            ("dq", 128): (64, 32, 32, 8, 2),
            ("dq", 256, "sync"): (32, 32, 16, 8, 1),
            ("dq", 256, "async"): (64, 32, 16, 8, 1),
            ("dkv", 64, "sync"): (64, 32, 32, 4, 2),
            ("dkv", 64, "async"): (64, 64, 32, 8, 2),
            ("dkv", 128, "sync"): (64, 32, 32, 8, 2),
            ("dkv", 128, "async"): (32, 64, 32, 8, 2),
            ("dkv", 256): (32, 32, 16, 8, 1),
        }
        first = table.get((kind, size)) or table[kind, size, mma]
        others = [(64, 64, 32, 8, 2), (64, 32, 32, 4, 2), (32, 32, 32, 4, 2), (32, 64, 32, 8, 2)]
    return [first, *(tile for tile in others if tile != first)]


def step_config(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> dict[str, int]:
    """Tile of the decode step for n * G rows: the few rows tl.dot takes until there are many."""
    size, few = max(64, *map(padded, sizes)), rows <= 16
    if dtype == torch.float32:
        tile = (16, 32, 16, 4, 1) if size == 64 else (16, 16, 16, 8, 1)
    elif few:
        tile = {64: (16, 64, 16, 4, 1), 128: (16, 32, 32, 4, 1), 256: (16, 32, 16, 8, 1)}[size]
    else:
        tile = {64: (32, 64, 16, 4, 1), 128: (32, 32, 32, 8, 1), 256: (16, 32, 16, 8, 1)}[size]
    return _named("step", tile)


def _named(kind: str, tile: tuple[int, ...]) -> dict[str, int]:
    blocks = ("BLOCK_N", "BLOCK_F", "BLOCK_V") if kind == "segment" else ("BLOCK_M", "BLOCK_N", "BLOCK_S")
    return dict(zip((*blocks, "num_warps", "num_stages"), tile, strict=True))


def config(kind: str, *choice) -> dict[str, int]:
    """The default tile: what runs unless SLMKERNELS_AUTOTUNE=1."""
    return _named(kind, candidates(kind, *choice)[0])


# ---- sizes of a call ---------------------------------------------------------------------------------------


class _Sizes:
    """Sizes and flags of one call, from its arguments or from fake ones."""

    def __init__(self, q, v, phi_q, initial_state, cu_seqlens, window: int, block: bool):
        self.q, (self.B, self.T, self.HQ, self.D) = q, q.shape
        (self.S, self.H, self.V), self.F = v.shape[1:], phi_q.shape[3]
        self.packed, self.block = cu_seqlens is not None, block
        self.N = cu_seqlens.shape[0] - 1 if self.packed else self.B
        self.W = min(window, max(1, self.S))  # as long as all of them: int32
        self.SEG = state_spacing(self.F, self.V)
        far = max(0, first_near(max(self.S - 1, 0), self.W, block))  # at most, to any query of a sequence
        self.state0 = initial_state is not None
        self.has_states = far > 0 or self.state0
        self.reach = far + 1  # segments are numbered as if of so many keys a sequence
        self.slots = self.tiles(self.reach, self.SEG) if not self.packed else self.S // self.SEG + self.N

    def tiles(self, length: int, block: int) -> int:
        """Tiles of all sequences, as `triton_tiles.span` numbers them."""
        return length // block + self.N if self.packed else self.B * -(-length // block)

    def choice(self) -> tuple:
        """What selects a tile, beside the kernel."""
        return (self.D, self.F, self.V), self.q.dtype, architecture(self.q.device)

    def constants(self, kernel) -> dict:
        """Those of the kernels' compile-time arguments that `kernel` has."""
        flags = {
            "H": self.H, "G": self.HQ // self.H, "D": self.D, "F": self.F, "V": self.V,
            "D_PAD": padded(self.D), "F_PAD": padded(self.F), "V_PAD": padded(self.V), "SEG": self.SEG,
            "ALIGNED": self.block, "STATE0": self.state0, "PRECISION": OPERANDS[self.q.dtype],
        }  # fmt: skip
        return {name: value for name, value in flags.items() if name in kernel.arg_names}

    def new_states(self) -> Tensor:
        """Uninitialised states, each followed by its normaliser."""
        shape = (self.slots, self.H, self.F * (self.V + 1)) if self.has_states else (0,)
        return self.q.new_empty(shape, dtype=torch.float32)


def _launch(kernel, kind: str, grid, call: _Sizes, args: list, **flags) -> None:
    """Run `kernel` on grid(tile) programs; a 1-D grid, whose limit is 2^31 and not 65535."""
    flags, choice = call.constants(kernel) | flags, call.choice()
    tile = SCANNED if kind == "scan" else config(kind, *choice)
    if grid(tile) == 0:
        return
    with torch.cuda.device_of(call.q):  # Triton launches on the current device
        if AUTOTUNE and not INTERPRETED and kind != "scan":  # which works in place
            measured = tuple(tuple(_named(kind, row).items()) for row in candidates(kind, *choice))
            autotuned(kernel, measured, kind, *choice)[lambda meta: (grid(meta),)](*args, **flags)
        else:
            kernel[(grid(tile),)](*args, **flags, **tile)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


# ---- launchers ---------------------------------------------------------------------------------------------


def _sum_segments(call: _Sizes, phi, x, den, delta, cu, before, after, states, **flags) -> None:
    """Fill `states` from what each segment adds; from `before`, a pair or Nones, on to `after`, the same."""
    lengths = [call.S, call.T, call.N, call.reach, call.W]
    args = [phi, x, den, delta, states, cu, *lengths, *_strides(phi, x)]
    blocks = lambda tile: -(-call.F // tile["BLOCK_F"]) * -(-call.V // tile["BLOCK_V"])  # noqa: E731
    grid = lambda tile: call.slots * call.H * blocks(tile)  # noqa: E731
    _launch(triton_forward.segment_kernel, "segment", grid, call, args, **flags)
    args = [states, *before, *after, cu, call.S, call.N, call.reach, call.W]
    programs = call.N * call.H * -(-call.F * (call.V + 1) // SCANNED["BLOCK"])
    reverse = {"REVERSE": den is not None}
    _launch(triton_forward.scan_kernel, "scan", lambda _: programs, call, args, **reverse)


def forward(
    q, k, v, phi_q, phi_k, mix, initial_state, initial_normalizer, cu_seqlens, window, block, scale, segment
) -> tuple[Tensor, ...]:
    """o, state, normalizer; and with `segment` what the backward needs: of each row m, the first key at it
    and the weights' sum, and the states."""
    call = _Sizes(q, v, phi_q, initial_state, cu_seqlens, window, block)
    results = fake_forward(
        q,
        k,
        v,
        phi_q,
        phi_k,
        mix,
        initial_state,
        initial_normalizer,
        cu_seqlens,
        window,
        block,
        scale,
        segment,
    )
    o, state, normalizer, shift, top, den, _ = results
    states = call.new_states()
    unused = states.new_empty(1)
    q, unit = positive(q, scale)
    q, k, v, phi_q, phi_k = map(readable, (q, k, v, phi_q, phi_k))
    mix, before, normalizer0, cu = dense(mix, initial_state, initial_normalizer, cu_seqlens)
    if call.has_states:
        pairs = (before, normalizer0), (state, normalizer)
        _sum_segments(call, phi_k, v, None, None, cu, *pairs, states, G=1)
    else:
        state.zero_()
        normalizer.zero_()
    statistics = (shift, top, den) if segment else (None, None, None)
    args = [q, k, v, phi_q, phi_k, mix, states if call.has_states else unused, cu, o, *statistics]
    args += [call.T, call.S, call.N, call.reach, call.W, unit * LOG2_E, *_strides(q, k, v, phi_q, phi_k)]
    grid = lambda tile: call.tiles(call.T, tile["BLOCK_M"]) * call.HQ  # noqa: E731
    _launch(triton_forward.forward_kernel, "forward", grid, call, args)
    return o, state, normalizer, shift, top, den, states if segment else unused[:0]


def backward(
    do, dstate, dnormalizer, q, k, v, phi_q, phi_k, mix, initial_state, initial_normalizer, cu_seqlens, o,
    shift, top, den, states, window, block, scale, segment,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, phi_q, phi_k, mix and the initial pair; empty where one is absent."""
    call = _Sizes(q, v, phi_q, initial_state, cu_seqlens, window, block)
    dq, dk, dv, dphi_q, dphi_k, dmix, dstate0, dnormalizer0 = fake_backward(
        do, dstate, dnormalizer, q, k, v, phi_q, phi_k, mix, initial_state, initial_normalizer, cu_seqlens, o,
        shift, top, den, states, window, block, scale, segment,
    )  # fmt: skip
    do, q, k, v, phi_q, phi_k = map(readable, (do, q, k, v, phi_q, phi_k))
    mix, cu, dstate, dnormalizer = dense(mix, cu_seqlens, dstate, dnormalizer)
    delta, rest = torch.empty_like(shift), torch.empty_like(shift)
    total = None if mix is None else torch.empty_like(shift)
    unused = shift.new_empty(1)
    lengths = [call.T, call.S, call.N, call.reach, call.W, scale, scale * LOG2_E]

    args = [
        q,
        k,
        v,
        phi_k,
        mix,
        states if call.has_states else unused,
        cu,
        o.contiguous(),
        do,
        shift,
        top,
        den,
    ]
    args += [dq, dphi_q, delta, rest, total, *lengths, *_strides(q, k, v, phi_k, do)]
    grid = lambda tile: call.tiles(call.T, tile["BLOCK_M"]) * call.HQ  # noqa: E731
    _launch(triton_backward.dq_kernel, "dq", grid, call, args)
    dstates = call.new_states()
    if call.has_states:
        pairs = (dstate, dnormalizer), ((dstate0, dnormalizer0) if call.state0 else (None, None))
        _sum_segments(call, phi_q, do, den, delta, cu, *pairs, dstates)
    args = [q, k, v, phi_q, phi_k, mix, dstates if call.has_states else unused, cu, do, shift, top, den]
    args += [delta, rest, dk, dv, dphi_k, *lengths, *_strides(q, k, v, phi_q, phi_k, do)]
    grid = lambda tile: call.tiles(call.S, tile["BLOCK_N"]) * call.H  # noqa: E731
    _launch(triton_backward.dkv_kernel, "dkv", grid, call, args)
    if total is not None:
        dmix = total.sum((0, 2))
    return dq, dk, dv, dphi_q, dphi_k, dmix, dstate0, dnormalizer0


def step(
    q, k, v, phi_q, phi_k, k_ring, v_ring, phi_ring, state, normalizer, position, mix, window, block, scale
) -> Tensor:
    """Append n tokens to the rings and attend, one launch: a program per (batch, key-value head)."""
    o = fake_step(
        q,
        k,
        v,
        phi_q,
        phi_k,
        k_ring,
        v_ring,
        phi_ring,
        state,
        normalizer,
        position,
        mix,
        window,
        block,
        scale,
    )
    call = _Sizes(q, v, phi_q, None, None, window, block)
    for name, ring in (("k_ring", k_ring), ("v_ring", v_ring), ("phi_ring", phi_ring)):
        if ring.shape[3] > 1 and ring.stride(3) != 1:
            raise ValueError(f"{name} has strides {ring.stride()}; expected 1 in the last dimension")
    for name, x in (("state", state), ("normalizer", normalizer)):
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous tensor")
    if call.B * call.T * call.HQ == 0:
        return o
    q, unit = positive(q, scale)
    q, k, v, phi_q, phi_k = map(readable, (q, k, v, phi_q, phi_k))
    args = [q, k, v, phi_q, phi_k, *dense(mix), o, k_ring, v_ring, phi_ring, state, normalizer, position]
    args += [call.T, window, unit * LOG2_E, *_strides(q, k, v, phi_q, phi_k, k_ring, v_ring, phi_ring)]
    sizes, dtype, _ = call.choice()
    tile = step_config(call.T * call.HQ // call.H, sizes, dtype)
    kernel = triton_forward.step_kernel
    with torch.cuda.device_of(q):
        kernel[(call.B * call.H,)](*args, *position.stride(), **call.constants(kernel), **tile)
    return o


# ---- operators ---------------------------------------------------------------------------------------------


def fake_forward(
    q, k, v, phi_q, phi_k, mix, state, normalizer, cu_seqlens, window, block, scale, segment
):  # fmt: skip
    """Shapes of what `forward` returns; what only the backward needs is empty without `segment`."""
    call = _Sizes(q, v, phi_q, state, cu_seqlens, window, block)
    rows = (call.B, call.HQ, call.T) if segment else (0,)
    return (
        q.new_empty(call.B, call.T, call.HQ, call.V),
        q.new_empty(call.N, call.H, call.F, call.V, dtype=torch.float32),
        q.new_empty(call.N, call.H, call.F, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows, dtype=torch.float32),
        call.new_states() if segment else q.new_empty(0, dtype=torch.float32),
    )


def fake_backward(
    do, dstate, dnormalizer, q, k, v, phi_q, phi_k, mix, state, normalizer, cu_seqlens, o, shift, top, den,
    states, window, block, scale, segment,
):  # fmt: skip
    """Shapes of the gradients, contiguous; those of absent arguments are empty."""
    rest = (q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (mix, state, normalizer))
    return *(x.new_empty(x.shape) for x in (q, k, v, phi_q, phi_k)), *rest


def fake_step(
    q, k, v, phi_q, phi_k, k_ring, v_ring, phi_ring, state, normalizer, position, mix, window, block, scale
):
    return q.new_empty(*q.shape[:3], v.shape[-1])


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor? mix, Tensor? initial_state, "
    "Tensor? initial_normalizer, Tensor? cu_seqlens, "
)
_OPTIONS = "int window, bool block, float scale, int segment"
_OPERATORS = {
    "forward": (
        f"({_INPUTS}{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        forward,
        fake_forward,
    ),
    "backward": (
        f"(Tensor dout, Tensor? dstate, Tensor? dnormalizer, {_INPUTS}Tensor o, Tensor shift, Tensor top, "
        f"Tensor denominator, Tensor checkpoints, {_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward,
        fake_backward,
    ),
    "step": (
        "(Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor(a!) k_ring, Tensor(b!) v_ring, "
        "Tensor(c!) phi_ring, Tensor(d!) state, Tensor(e!) normalizer, Tensor(f!) position, Tensor? mix, "
        "int window, bool block, float scale) -> Tensor",
        step,
        fake_step,
    ),
}

# Defined even where Triton is absent, so that no caller has to ask.
for _name, (_schema, _function, _fake) in _OPERATORS.items():
    torch.library.define(f"slmkernels::triton_hybrid_attention_{_name}", _schema)
    torch.library.register_fake(f"slmkernels::triton_hybrid_attention_{_name}", _fake)
    if ABSENT is None:
        torch.library.impl(f"slmkernels::triton_hybrid_attention_{_name}", ("cpu", "cuda"), _function)
