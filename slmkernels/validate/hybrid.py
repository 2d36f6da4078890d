"""Random calls of `hybrid_attention`, the definition and PyTorch's own computation.

The backward takes delta = sum(dO O) from o as it was saved, rounded to dtype, as every flash attention does.
Where dO v and delta cancel, that rounding is all that is left of a gradient: `rounding_of_delta` allows it.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.hybrid import function, reference
from ..ops.hybrid.function import hybrid_attention
from ..ops.hybrid.step import HybridCache, hybrid_attention_step
from .draws import Draws, offsets
from .rule import Results, Tensors
from .subject import Options, Subject, step_by_step

LEAVES = ("q", "k", "v", "phi_q", "phi_k", "mix", "state", "normalizer")
ALIGNMENTS = function.ALIGNMENTS


def make(
    *, seed=0, B=1, T=70, S=None, H=2, group=1, D=32, V=32, F=16, window=16, alignment="sliding", scale=None,
    mix=True, states=False, packed=None, scores=1.0, features=1.0, zeros=False, equal_keys=False,
) -> tuple[Tensors, dict]:  # fmt: skip
    """Float64 tensors of one call (`dx`: the gradient of result x), and its options.

    Features are a softmax, as in LoLCATs. `scores` and `features` are factors of q and of the features,
    `zeros` makes a third of the keys' features 0, `equal_keys` gives every key of a head the same k.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    S, N = T if S is None else S, len(packed) - 1 if packed else B
    tensors = {"q": scores * normal(B, T, H * group, D), "k": normal(B, S, H, D), "v": normal(B, S, H, V)}
    for name, x in (("phi_q", normal(B, T, H * group, F)), ("phi_k", normal(B, S, H, F))):
        tensors[name] = features * x.softmax(-1)
    if zeros:
        tensors["phi_k"][:, ::3] = 0
    if equal_keys:
        tensors |= {name: (2 * tensors[name]).round() / 2 for name in "qk"}  # scores without a rounding
        tensors["k"] = tensors["k"][:, :1].expand_as(tensors["k"]).clone()
    if mix:
        tensors["mix"] = 2 * normal(H * group).sigmoid()
    if states:
        tensors |= {"state": normal(N, H, F, V), "normalizer": 3 * normal(N, H, F).abs()}
    tensors |= {
        "do": normal(B, T, H * group, V),
        "dstate": normal(N, H, F, V),
        "dnormalizer": normal(N, H, F),
    }
    options = {"window": window, "alignment": alignment, "scale": scale}
    if packed:
        options["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
    return tensors, options


def public(backend: str) -> Callable[..., Results]:
    """`hybrid_attention` on a backend, as `run` calls it."""

    def attend(q, k, v, phi_q, phi_k, mix=None, state=None, normalizer=None, **options):
        start = None if state is None else (state, normalizer)
        options |= {"mix": mix, "initial_state": start, "return_state": True, "backend": backend}
        o, end = hybrid_attention(q, k, v, phi_q, phi_k, **options)
        return o, *end

    return attend


def checked(q: Tensor, window: int, alignment: str, scale: float | None) -> tuple[int, bool, float]:
    """The options of a call as the backends want them."""
    return window, alignment == "block", q.shape[3] ** -0.5 if scale is None else scale


def exact(*tensors, cu_seqlens=None, form=reference.quadratic, **leaves) -> Results:
    """The definition."""
    options = {name: leaves.pop(name) for name in ("window", "alignment", "scale")}
    tensors = dict(zip(LEAVES, tensors, strict=False)) | leaves
    window, block, scale = checked(tensors["q"], **options)
    start = {f"initial_{name}": tensors.pop(name, None) for name in ("state", "normalizer")}
    options = {"window": window, "block": block, "scale": scale, "form": form}
    return reference.hybrid_attention(**tensors, **start, cu_seqlens=cu_seqlens, **options)


def plain(q, k, v, phi_q, phi_k, mix, state, z, window, block, scale) -> tuple[Tensor, ...]:
    """One sequence in PyTorch's own operations -> o, state, normalizer; of each row the sum of the weights
    and the maximum's lead over the next score, as a part of the largest.

    All in the inputs' dtype but for mix, the states and the sums, which the contract has in float32 at least.
    """
    (T, Hq), S, low, high = q.shape[1:3], k.shape[1], q.dtype, state.dtype
    if T == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), state, z, *z.new_zeros(2, q.shape[0], Hq, 0)
    n = max(0, reference.first_near(S - 1, window, block))
    far_k, far_v = phi_k[:, :n].to(high), v[:, :n].to(high)
    end = state + torch.einsum("bshf,bshv->bhfv", far_k, far_v), z + far_k.sum(1)
    k, v, phi_k = (x.repeat_interleave(Hq // k.shape[2], 2) for x in (k, v, phi_k))
    state, z = (x.repeat_interleave(Hq // x.shape[1], 1) for x in (state, z))
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)[None]
    first = reference.first_near(i, window, block)
    s = torch.einsum("bthd,bshd->bhts", q * scale, k).masked_fill((j < first) | (j > i), -torch.inf)
    two = s.detach().topk(min(2, S)).values
    lead = (two[..., 0] - two[..., -1]) / s.detach().abs().nan_to_num(posinf=0.0).amax(-1)
    p = mix[:, None, None] * torch.exp(s - s.gather(-1, s.argmax(-1, keepdim=True)))
    w = p + torch.einsum("bthf,bshf->bhts", phi_q, phi_k).masked_fill(j >= first, 0)  # [B, Hq, T, S]
    sums = w.sum(-1) + torch.einsum("bthf,bhf->bht", phi_q.to(high), z) + reference.EPS
    o = torch.einsum("bhts,bshv->bhtv", w.to(low), v)
    o = (o + torch.einsum("bthf,bhfv->bhtv", phi_q, state.to(low))) / sums[..., None]
    return o.to(low).transpose(1, 2), *end, sums, lead


def by_sequence(
    q, k, v, phi_q, phi_k, mix=None, state=None, normalizer=None, *, cu_seqlens=None, **options
) -> tuple[Tensor, ...]:
    """`plain` for each packed sequence."""
    (H, V), F, high = v.shape[2:], phi_q.shape[3], torch.promote_types(q.dtype, torch.float32)
    N = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    mix = q.new_ones(q.shape[2], dtype=high) if mix is None else mix
    state = v.new_zeros(N, H, F, V, dtype=high) if state is None else state
    z = v.new_zeros(N, H, F, dtype=high) if normalizer is None else normalizer
    tail = checked(q, **options)
    if cu_seqlens is None:
        return plain(q, k, v, phi_q, phi_k, mix, state, z, *tail)
    parts = [plain(*(x[:, :0] for x in (q, k, v, phi_q, phi_k)), mix, state[:0], z[:0], *tail)]
    for n, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        tokens = (x[:, a:b] for x in (q, k, v, phi_q, phi_k))
        parts.append(plain(*tokens, mix, state[n : n + 1], z[n : n + 1], *tail))
    return tuple(torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (1, 0, 0, 2, 2), strict=True))


def torch_same_dtype(*tensors, **options) -> Results:
    """What PyTorch's own operations give in the inputs' dtype."""
    return by_sequence(*tensors, **options)[:3]


def rounding_of_delta(tensors: Tensors, dtype: torch.dtype, options: dict) -> dict[str, float]:
    """Twice what the rounding of o to dtype alone does to each gradient.

    delta is what multiplies -d log(sum of the weights). For sums of it over all rows, which may cancel, the
    roundings of delta's own terms are added.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name in LEAVES}
    o, _, _, sums, _ = by_sequence(**leaves, **options)
    if not sums.requires_grad:  # there is no row
        return {}
    o, do, high = o.detach(), tensors["do"], torch.promote_types(dtype, torch.float32)
    rounding = (do * (o.to(dtype).double() - o)).sum(-1)  # [B, T, Hq]
    signs = torch.randn(rounding.shape, generator=torch.Generator().manual_seed(0)).sign().to(o.device)
    computing = signs * torch.finfo(high).eps / 2 * (do * o).abs().sum(-1)

    def moved(rows):
        loss = 2 * (rows.transpose(1, 2) * sums.log()).sum()
        gradients = torch.autograd.grad(loss, leaves.values(), allow_unused=True, retain_graph=True)
        pairs = zip(leaves, gradients, strict=True)
        return {f"d{name}": x.abs().max().item() for name, x in pairs if x is not None and x.numel()}

    slack, more = moved(rounding), moved(computing)
    return slack | {name: slack[name] + more[name] for name in ("dmix", "dnormalizer") if name in slack}


def slack(tensors: Tensors, dtype: torch.dtype, options: dict) -> dict[str, float]:
    """`rounding_of_delta`; and what three standard deviations of roundings do to d(mix), a sum that cancels
    where all keys are near: one of dtype for each dO o, and the rounding of the sum itself."""
    found = rounding_of_delta(tensors, dtype, options)
    if "dmix" in found:
        o = by_sequence(**{name: x for name, x in tensors.items() if name in LEAVES}, **options)[0]
        terms = tensors["do"] * o / tensors["mix"][:, None]  # [B, T, Hq, V]
        walk = torch.finfo(dtype).eps / 2 * terms.square().sum((0, 1, 3)).sqrt()
        sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2 * terms.abs().sum((0, 1, 3))
        found["dmix"] += (3 * walk + sums).max().item()
    return found


def undecided(tensors: Tensors, options: dict) -> Tensor:
    """bool [B, Hq, T]: where float32 cannot tell which key a row's shift is at, as it can of equal scores.

    There the gradient jumps from one key to the other.
    """
    lead = by_sequence(**{name: x for name, x in tensors.items() if name in LEAVES}, **options)[4]
    return (lead > 0) & (lead < 4e-6)


def settle(tensors: Tensors, options: dict) -> Tensors:
    """The call with equal scores in the undecided rows."""
    rows = undecided({name: x.double() for name, x in tensors.items()}, options)
    return tensors | {"q": tensors["q"].masked_fill(rows.transpose(1, 2)[..., None], 0.0)}


def draw_variant(d: Draws) -> Options:
    """What a call and decode steps share."""
    sizes = d.heads() | {"D": d.size(), "V": d.size(), "F": d.size()}
    options = {"alignment": d.choice(ALIGNMENTS), "scale": d.choice((None, None, -0.3)), "mix": d.flag(70)}
    return sizes | options | {"zeros": d.flag(10), "equal_keys": d.flag(10)}


def draw(d: Draws) -> Options:
    """Sizes and options of a random call."""
    options = draw_variant(d) | {"states": d.flag(), "window": d.window()}
    if d.flag(30):
        lengths = d.lengths()
        return options | {"T": sum(lengths), "packed": offsets(lengths)}
    return options | {"B": d.integer(1, 2), "T": d.length()}


def draw_steps(d: Draws) -> Options:
    """The same for decoding."""
    window = d.choice((1, 2, d.integer(3, 12), d.integer(13, 40)))
    return draw_variant(d) | {"B": d.integer(1, 3), "split": d.split(), "window": window}


def steps(backend: str) -> Callable[..., Results]:
    """`hybrid_attention_step` on a backend."""

    def attend(split, window, alignment, mix=None, scale=None, **tokens):
        k, F, V = tokens["k"], tokens["phi_k"].shape[3], tokens["v"].shape[3]
        kind = {"alignment": alignment, "dtype": k.dtype, "device": k.device}
        cache = HybridCache(k.shape[0], window, *k.shape[2:], F, V, **kind)

        def step(**parts):
            return hybrid_attention_step(**parts, cache=cache, mix=mix, scale=scale, backend=backend)

        return step_by_step(split, step, tokens), cache.state, cache.normalizer

    return attend


SUBJECT = Subject(
    draw, make, public, torch_same_dtype, exact, slack, settle, draw_steps=draw_steps, steps=steps
)
