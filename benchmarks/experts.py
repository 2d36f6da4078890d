"""The cases of `expert_mlp`, `segment_mlp` and `route`.

Useful work of the experts, in FLOPs: 6 d n a row (a token at one of its experts), backward twice that. Bytes:
x, y, the matrices of experts that have tokens, indices and weights; backward dy, dx, gradients of matrices.
Of a routing: four FLOPs a logit each way (exponential, sum, share, mean), which says little.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from slmkernels import expert_mlp, route, segment_mlp
from slmkernels.ops.experts import reference

from . import experts_peers as peers
from .cases import DTYPES, OURS, Bar, Candidate, Case, Inputs, Run, Scaling, chosen_backend, for_gpu

CASE_DTYPES = ("fp32", "bf16")
MODES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Shape:
    """T tokens of d channels, k of E experts each, of n hidden channels; SwiGLU."""

    T: int = 2048
    d: int = 512
    n: int = 1024
    E: int = 16
    k: int = 2
    skewed: bool = False  # every token's first expert is the same one
    documents: int = 0  # so many, of random lengths, each of one expert: `segment_mlp`

    def small(self) -> "Shape":
        """The same kind of case in milliseconds."""
        return replace(self, T=min(self.T, 96), d=32, n=48, E=min(self.E, 4 * self.k))

    def flops(self, backward: bool) -> int:
        """See the head of this file."""
        return 6 * self.T * self.k * self.d * self.n * (1 + 2 * backward)

    def bytes(self, backward: bool, element: int) -> int:
        """See the head of this file."""
        tokens, matrices = 2 * self.T * self.d, 3 * self.d * self.n
        forward = element * (tokens + min(self.E, self.T * self.k) * matrices) + 8 * self.T * self.k
        return forward + backward * element * (tokens + self.E * matrices)

    def __str__(self) -> str:
        how = f" documents={self.documents}" if self.documents else f" k={self.k}" + " skewed" * self.skewed
        return f"T={self.T} d={self.d} n={self.n} E={self.E}{how} swiglu"


SHAPES = {
    "standard": Shape(),
    "fine": Shape(n=256, E=64, k=8),
    "few_tokens": Shape(T=64),
    "decode": Shape(T=1),
    "skewed": Shape(skewed=True),
    "segments": Shape(E=8, k=1, documents=16),
}
NUMBERS = (2, 8, 32, 128)  # of experts of 256, forward and backward in fp32: the useful work is the same


# For a GPU, in bf16.
GPU_SHAPES = {"gpu": Shape(T=16384, d=1024, n=512, E=32, k=4)}
BARS = (Bar("grouped_mm", 1.3, 2),)  # either mode
FEW = 64  # up to so many tokens a GPU takes microseconds


def _draw(T: int, E: int, generator: torch.Generator) -> Tensor:
    """Router logits [T, E]: in each row the normal quantiles in a random order.

    They are distinct in bfloat16 too, so that topk's choice among equal ones does not matter.
    """
    quantiles = torch.special.ndtri((torch.arange(E) + 0.5) / E)
    return quantiles[torch.rand(T, E, generator=generator).argsort(1)]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    T, d, n, E, k = shape.T, shape.d, shape.n, shape.E, shape.k
    inputs = {
        "x": draw(T, d).to(dtype),
        "dy": draw(T, d).to(dtype),
        "w_gate_up": (draw(E, 2 * n, d) * d**-0.5).to(dtype),
        "w_down": (draw(E, d, n) * n**-0.5).to(dtype),
    }
    if shape.documents:
        cuts = torch.randperm(T - 1, generator=generator)[: shape.documents - 1].sort().values + 1
        cu_seqlens = torch.cat([torch.zeros(1), cuts, torch.full((1,), T)]).int()
        experts = torch.randint(E, (shape.documents,), generator=generator, dtype=torch.int32)
        inputs |= {"cu_seqlens": cu_seqlens, "experts": experts}
        inputs["indices"] = experts.repeat_interleave(cu_seqlens.diff())[:, None]  # [T, 1], for the peers
    else:
        logits = _draw(T, E, generator)
        if shape.skewed:
            logits[:, 0] = 0.1 + logits.max(1).values
        best, indices = logits.topk(k)
        inputs["indices"] = indices.int()
        inputs["weights"] = best.softmax(1).to(dtype).float()  # ours takes float32, peers may take dtype
    return {name: x.to(device) for name, x in inputs.items()}


def _as(dtype: torch.dtype | None, inputs: Inputs) -> Inputs:
    """The inputs, the floating ones in a dtype if one is given."""
    if dtype is None:
        return inputs
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _expected(backward: bool, dtype: torch.dtype | None, inputs: Inputs) -> tuple[Tensor, ...]:
    """By our reference in `dtype` or in the inputs' own; of documents token by token."""
    options = {"b_gate_up": None, "b_down": None, "activation": "swiglu", "interleaved": False}
    function = partial(reference.expert_mlp, indices=inputs["indices"], **{"weights": None, **options})
    return peers.expert_run(function, _as(dtype, inputs), backward).call()


def _arguments(inputs: Inputs) -> dict[str, Tensor]:
    """What our function takes besides the leaves."""
    if "experts" in inputs:
        return {"cu_seqlens": inputs["cu_seqlens"], "expert_of_segment": inputs["experts"]}
    return {"indices": inputs["indices"]}


def expert_case(label: str, shape: Shape, mode: str, dtype: str) -> Case:
    """The case of one shape, `forward` or `forward_backward`, in one dtype."""
    backward = mode == "forward_backward"
    function = segment_mlp if shape.documents else expert_mlp
    leaves = [name for name in peers.LEAVES if not (shape.documents and name == "weights")]

    def ours(inputs: Inputs) -> Run:
        return peers.expert_run(partial(function, **_arguments(inputs)), inputs, backward)

    def backend(inputs: Inputs) -> str:
        tensors = {name: inputs[name] for name in leaves}
        return chosen_backend(function.__name__, **_arguments(inputs), **tensors)

    return Case(
        name=f"experts/{label}/{mode}/{dtype}",
        operation=function.__name__,
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("y", *(f"d{name}" for name in leaves)) if backward else ("y",),
        inputs=partial(_inputs, shape, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, ours),
        peers=peers.expert_peers(backward, shape.documents > 0),
        reference=partial(_expected, backward, torch.float64),
        plain=partial(_expected, backward, None),
        backend=backend,
        flops=shape.flops(backward),
        bytes=shape.bytes(backward, DTYPES[dtype].itemsize),
        graph=shape.T <= FEW,
    )


# ---- routing -----------------------------------------------------------------------------------------------

ROUTING = ("indices", "weights", "counts", "probabilities", "z")
DIFFERENTIABLE = ("weights", "probabilities", "z")


def _route_inputs(T: int, E: int, k: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sizes = zip(DIFFERENTIABLE, ((T, k), (E,), ()), strict=True)
    gradients = {f"d{name}": torch.randn(size, generator=generator) for name, size in sizes}
    inputs = {"logits": _draw(T, E, generator).to(dtype), **gradients}
    return {name: x.to(device) for name, x in inputs.items()}


def _route_run(function, backward: bool, inputs: Inputs) -> Run:
    """Run `function(logits)`, which returns the tensors of `ROUTING`, forward, or forward and backward."""
    logits = inputs["logits"].detach().requires_grad_(backward)
    gradients = [inputs[f"d{name}"] for name in DIFFERENTIABLE]

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            found = dict(zip(ROUTING, function(logits), strict=True))
        if not backward:
            return tuple(found.values())
        wanted = [found[name] for name in DIFFERENTIABLE]
        return *(x.detach() for x in found.values()), *torch.autograd.grad(wanted, logits, gradients)

    return Run(call, lambda x: x if x.ndim == 2 else x.reshape(1, -1))  # the check compares along dimension 1


def _route_expected(
    function, backward: bool, dtype: torch.dtype | None, inputs: Inputs
) -> tuple[Tensor, ...]:
    run = _route_run(function, backward, _as(dtype, inputs))
    return tuple(run.ours(x) for x in run.call())


def route_case(label: str, T: int, E: int, k: int, mode: str, dtype: str) -> Case:
    """Softmax, top-k renormalised, and the figures of both losses."""
    backward = mode == "forward_backward"

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        routing = route(logits, k)
        return tuple(getattr(routing, name) for name in ROUTING)

    def exact(logits: Tensor) -> tuple[Tensor, ...]:
        return reference.route(logits, None, None, k, "softmax", True, 1, 1, 1.0)[: len(ROUTING)]

    pytorch = partial(peers.route_pytorch, top_k=k)
    logits, chosen = T * E * DTYPES[dtype].itemsize, T * k * 4
    return Case(
        name=f"experts/{label}/{mode}/{dtype}",
        operation="route",
        dtype=DTYPES[dtype],
        sizes=f"T={T} E={E} k={k} softmax, renormalised",
        outputs=(*ROUTING, "dlogits") if backward else ROUTING,
        inputs=partial(_route_inputs, T, E, k, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, partial(_route_run, ours, backward)),
        peers=(Candidate("PyTorch", partial(_route_run, pytorch, backward)),),
        reference=partial(_route_expected, exact, backward, torch.float64),
        plain=partial(_route_expected, pytorch, backward, None),
        backend=lambda inputs: chosen_backend("route", inputs["logits"], k),
        flops=4 * T * E * (1 + backward),
        bytes=logits + 2 * chosen + backward * (2 * logits + 2 * chosen),
        graph=T <= FEW,
    )


def cases(small: bool = False) -> Iterator[Case]:
    """Every shape, more and more experts, routing, forward and with backward; then for a GPU."""
    for label, shape in SHAPES.items():
        for mode in MODES:
            for dtype in CASE_DTYPES:
                yield expert_case(label, shape.small() if small else shape, mode, dtype)
    for E in NUMBERS:
        shape = Shape(n=256, E=E)
        case = expert_case(f"scaling_E_{E}", shape.small() if small else shape, "forward_backward", "fp32")
        yield replace(case, scaling=Scaling("T=2048 k=2 n=256", "E", E))
    for label, T in (("route", 2048), ("route_decode", 1)):
        for mode in MODES:
            for dtype in CASE_DTYPES:
                yield route_case(label, min(T, 96) if small else T, 64, 8, mode, dtype)
    for label, shape in GPU_SHAPES.items():
        for mode in MODES:
            yield for_gpu(expert_case(label, shape.small() if small else shape, mode, "bf16"), BARS, small)
