"""Random calls of `linear_attention` in every row of its table, and two loops over tokens in PyTorch."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import reference
from ..ops.linear.function import linear_attention
from ..ops.linear.step import linear_attention_step
from .draws import Draws, offsets
from .rule import Results, Tensors
from .subject import Options, Subject, step_by_step

# The rows of the table in `linear_attention`: the shape of decay, and whether there is a beta.
ROWS = {
    "linear": (None, False),
    "retention": ("H", False),
    "simple gla": ("BTH", False),
    "gla": ("BTHK", False),
    "delta": (None, True),
    "gated delta": ("BTH", True),
    "kda": ("BTHK", True),
}
GATED = [row for row, (decay, _) in ROWS.items() if decay]
DELTA = [row for row, (_, beta) in ROWS.items() if beta]
# (row, normalize)
VARIANTS = [(row, False) for row in ROWS] + [("linear", True), ("retention", True), ("gla", True)]
VARIANT_IDS = [f"{row}{' normalized' * normalize}" for row, normalize in VARIANTS]

LEAVES = ("q", "k", "v", "decay", "beta", "state", "normalizer")


def gates(kind: str | float, shape: tuple[int, ...], draw: Tensor) -> Tensor:
    """Log gates: `random` ones lie anywhere from -10 to -1e-4."""
    x = F.logsigmoid(3 * draw).reshape(shape)
    if kind == "random":
        return x
    if kind == "mixed":
        return torch.where(x < -1, -50.0, -1e-3).double()
    if kind == "-inf":
        return torch.where(x < -3, -torch.inf, x)
    return torch.full_like(x, kind)


def make(
    row: str, *, seed=0, B=1, T=70, H=2, Hk=None, K=32, V=32, normalize=False, l2norm_qk=False, scale=None,
    states=False, packed=None, decay="random", beta="random", zero_keys=False,
) -> tuple[Tensors, dict]:  # fmt: skip
    """Float64 tensors of one call (`dx`: the gradient of result x), and its options.

    Keys have length 1 with the delta rule, and q and k are positive with `normalize`, as in use: the
    recurrence is then stable, and no denominator cancels.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    Hk, N = Hk or H, len(packed) - 1 if packed else B
    gate, delta = ROWS[row]
    tensors = {"q": normal(B, T, Hk, K), "k": normal(B, T, Hk, K), "v": normal(B, T, H, V)}
    if delta and not l2norm_qk:
        tensors["k"] = F.normalize(tensors["k"], dim=-1)
    if normalize:
        tensors |= {name: F.elu(tensors[name]) + 1 for name in "qk"}
    if zero_keys:
        tensors["k"][:, ::3], tensors["q"][:, ::4] = 0, 0
    if gate:
        sizes = {"B": B, "T": T, "H": H, "K": K}
        shape = tuple(sizes[letter] for letter in gate)
        tensors["decay"] = gates(decay, shape, normal(*shape))
    if delta:
        tensors["beta"] = (
            normal(B, T, H).sigmoid() if beta == "random" else torch.full((B, T, H), beta).double()
        )
    if states:
        tensors["state"] = normal(N, H, K, V)
        if normalize:
            tensors["normalizer"] = 3 * normal(N, H, K).abs()
    tensors |= {"do": normal(B, T, H, V), "dstate": normal(N, H, K, V), "dnormalizer": normal(N, H, K)}
    options = {"normalize": normalize, "l2norm_qk": l2norm_qk, "scale": scale}
    if packed:
        options["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
    return tensors, options


def public(backend: str) -> Callable[..., Results]:
    """`linear_attention` on a backend, as `run` calls it."""

    def attend(q, k, v, decay=None, beta=None, state=None, normalizer=None, **options):
        start = state if normalizer is None else (state, normalizer)
        gates = {"decay": decay, "beta": beta}
        o, end = linear_attention(
            q, k, v, **gates, initial_state=start, return_state=True, backend=backend, **options
        )
        return (o, *end) if options["normalize"] else (o, end, None)

    return attend


def exact(q, k, v, decay=None, beta=None, state=None, normalizer=None, *, scale=None, **options) -> Results:
    """The reference, token by token."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors, options = (q, k, v, decay, beta, state, normalizer), {**options, "scale": scale}
    return reference.linear_attention(*tensors, **options, form=reference.recurrent)


def torch_same_dtype(
    q, k, v, decay=None, beta=None, state=None, normalizer=None, *,
    normalize, l2norm_qk, scale=None, cu_seqlens=None,
) -> Results:  # fmt: skip
    """What PyTorch's own operations give in the inputs' dtype, token by token.

    Of float32 at least, as the contract has it, are only the gates, the states and what is divided by.
    """
    (B, T, Hk, K), (H, V) = q.shape, v.shape[2:]
    low, high = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if l2norm_qk:
        q, k = (x * (x.to(high).square().sum(-1, keepdim=True) + 1e-6).rsqrt().to(low) for x in (q, k))
    q, k = (x.repeat_interleave(H // Hk, 2) for x in (q, k))
    if decay is not None:
        decay = decay.expand(B, T, H) if decay.ndim == 1 else decay
        decay = decay[..., None] if decay.ndim == 3 else decay  # [B, T, H, 1 or K]
    offsets = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    N = B if cu_seqlens is None else len(offsets) - 1
    state = v.new_zeros(N, H, K, V, dtype=high) if state is None else state
    z = v.new_zeros(N, H, K, dtype=high) if normalizer is None else normalizer
    outputs, states, normalizers = [v[:, :0]], [], []
    for n, (a, b) in enumerate(pairwise(offsets)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        S, zn = state[rows], z[rows]
        for t in range(a, b):
            query, key, value = q[:, t], k[:, t], v[:, t]
            if decay is not None:
                gate = decay[:, t].exp()
                S, zn = gate[..., None] * S, gate * zn
            if beta is not None:
                error = value - torch.einsum("bhkv,bhk->bhv", S.to(low), key)
                value = (beta[:, t, :, None] * error).to(low)
            S, zn = S + key[..., None] * value[..., None, :], zn + key
            o = torch.einsum("bhkv,bhk->bhv", S.to(low), query)
            if normalize:
                o = (o / ((zn * query).sum(-1, keepdim=True) + 1e-6)).to(low)
            else:
                o = (K**-0.5 if scale is None else scale) * o
            outputs.append(o[:, None])
        states.append(S), normalizers.append(zn)
    states, normalizers = torch.cat(states or [state]), torch.cat(normalizers or [z])
    return torch.cat(outputs, 1), states, normalizers if normalize else None


def draw_variant(d: Draws) -> Options:
    """What a call and decode steps share."""
    row, normalize = d.choice(VARIANTS)
    heads = d.heads()
    sizes = {"H": heads["H"] * heads["group"], "Hk": heads["H"], "K": d.size(), "V": d.size(300)}
    options = {"row": row, "normalize": normalize, "l2norm_qk": d.flag()}
    options["zero_keys"] = d.flag(10) and not normalize  # a denominator of 1e-6 makes gradients of any size
    options["decay"] = d.choice(("random", "random", "mixed", "-inf", -0.01, 0.0))
    options["beta"] = d.choice(("random", "random", 0.0, 1.0))
    return sizes | options | {"scale": d.choice((None, None, 0.5, -0.3))}


def draw(d: Draws) -> Options:
    """Sizes and options of a random call."""
    options = draw_variant(d) | {"states": d.flag()}
    if d.flag(30):
        lengths = d.lengths()
        return options | {"T": sum(lengths), "packed": offsets(lengths)}
    return options | {"B": d.integer(1, 2), "T": d.length()}


def draw_steps(d: Draws) -> Options:
    """The same for decoding."""
    return draw_variant(d) | {"states": True, "B": d.integer(1, 3), "split": d.split()}


def steps(backend: str) -> Callable[..., Results]:
    """`linear_attention_step` on a backend."""

    def attend(split, decay=None, state=None, normalizer=None, **rest):
        options = {name: rest.pop(name) for name in ("normalize", "l2norm_qk", "scale")}
        state, normalizer = (None if x is None else x.clone() for x in (state, normalizer))
        options["state"] = state if normalizer is None else (state, normalizer)
        tokens = {name: x for name, x in rest.items() if x is not None}
        if decay is not None and decay.ndim > 1:
            tokens["decay"] = decay
        else:
            options["decay"] = decay

        def step(**parts):
            return linear_attention_step(**parts, **options, backend=backend)

        return step_by_step(split, step, tokens), state, normalizer

    return attend


SUBJECT = Subject(draw, make, public, torch_same_dtype, exact, draw_steps=draw_steps, steps=steps)
