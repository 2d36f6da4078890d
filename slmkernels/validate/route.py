"""Random calls of `route`. PyTorch's own computation is the reference, in float32 at least."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.experts.reference import SCORES, ranked
from ..ops.experts.route import prepare, route
from .draws import Draws
from .rule import Results, Tensors
from .subject import Options, Subject

FIELDS = ("indices", "weights", "counts", "probabilities", "z", "entropy")
GAP = 1e-6  # of scores, as a part of the largest: float32 tells which is the greater


def draw(d: Draws) -> Options:
    """Sizes and options of a random call."""
    E = d.choice((1, 2, 3, 4, 8, 16, 31, 60, 64, 128, 256))
    options = {"T": d.length(), "E": E, "score": d.choice(SCORES), "renormalize": d.flag(), "bias": d.flag()}
    if E % 4 == 0 and d.flag(40):
        options |= {"num_groups": d.choice((2, 4)), "top_groups": d.integer(1, 2)}
    most = E // options.get("num_groups", 1) * options.get("top_groups", 1)
    options |= {"top_k": d.integer(1, min(most, 10)), "mask": d.choice((None, None, "E", "TE"))}
    return options | {"route_scale": d.choice((1.0, 2.5))}


def make(*, seed=0, T=50, E=8, bias=False, mask=None, **options) -> tuple[Tensors, Options]:
    """Float64 tensors of one call, and its options. Gradients of means over tokens are of the size of T."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {"logits": 2 * normal(T, E), "dweights": normal(T, options["top_k"])}
    tensors |= {"dprobabilities": T * normal(E), "dz": T * normal(())}
    if bias:
        options["selection_bias"] = 0.3 * normal(E).float()
    if mask:
        options["expert_mask"] = torch.rand(*((E,) if mask == "E" else (T, E)), generator=generator) < 0.7
    return tensors, options


def ours(backend: str) -> Callable[..., Results]:
    """`route` on a backend."""

    def call(logits, **options):
        routing = route(logits, backend=backend, **options)
        return {name: getattr(routing, name) for name in FIELDS}

    return call


def undecided(logits: Tensor, **options) -> Tensor:
    """bool [T]: rows of float64 logits where float32 may swap two choices, or the values of two groups."""
    call = prepare(logits, **options)
    allowed = torch.ones_like(logits, dtype=torch.bool) if call.expert_mask is None else call.expert_mask
    s = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "softmax_after_topk": logits}[call.score]
    choice = s if call.selection_bias is None else s + call.selection_bias
    size = choice.abs().amax(1, keepdim=True)
    choice = ranked(choice, allowed.expand_as(s))

    def close(values):  # [T, n] -> [T]; two at -inf, whose gap is NaN, are not
        gaps = -values.sort(1, descending=True).values.diff(dim=1)
        return ((gaps > 0) & (gaps < GAP * size)).any(1)

    best = (
        choice.unflatten(1, (call.num_groups, -1)).topk(min(2, choice.shape[1] // call.num_groups), 2).values
    )
    groups = (
        close(best.nan_to_num(neginf=0.0).sum(2)) if call.num_groups > 1 else torch.zeros_like(size[:, 0]) > 0
    )
    return groups if call.selection_bias is None else groups | close(choice)


def settle(tensors: Tensors, options: Options) -> Tensors:
    """The call with equal logits in the undecided rows: ties go to the lower index."""
    rows = undecided(tensors["logits"].double(), **options)
    return tensors | {"logits": tensors["logits"].masked_fill(rows[:, None], 0.0)}


SUBJECT = Subject(
    draw, make, ours, ours("reference"), ours("reference"), settle=settle, float32=frozenset(FIELDS)
)
