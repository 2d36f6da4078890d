"""Inputs, an independent definition and the acceptance rule that the tests of `route` share."""

import itertools
import math

import torch

from slmkernels import route
from slmkernels.ops.experts.reference import SCORES

EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
LOW = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of d(logits), which stands in the logits' dtype
EXACT = ("indices", "counts")

# Every way to choose and to weigh, as keyword arguments; tensors are made by `arguments`.
OPTIONS = [
    {"score": score, "renormalize": renormalize, "bias": bias, "groups": groups, "mask": mask}
    for score, renormalize, bias, groups, mask in itertools.product(
        SCORES, (True, False), (False, True), (None, (4, 2)), (None, "E", "TE")
    )
]


def name(options) -> str:
    return "-".join(str(value) for value in options.values())


def arguments(T, E, options, *, seed=0, scale=2.5, dtype=torch.float64):
    """logits [T, E] in dtype, float64 values rounded, and the keyword arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(T, E, dtype=torch.float64, generator=generator)
    keywords = {"score": options["score"], "renormalize": options["renormalize"], "route_scale": scale}
    if options["bias"]:
        keywords["selection_bias"] = 0.3 * torch.randn(E, generator=generator)
    if options["groups"]:
        keywords["num_groups"], keywords["top_groups"] = options["groups"]
    if options["mask"]:
        shape = (E,) if options["mask"] == "E" else (T, E)
        keywords["expert_mask"] = torch.rand(*shape, generator=generator) < 0.7
    return logits.to(dtype), keywords


def naive(
    logits, top_k, *, score, renormalize, route_scale=1.0, selection_bias=None, num_groups=None,
    top_groups=None, expert_mask=None,
):  # fmt: skip
    """A loop over tokens and experts, word by word, on Python's floats -> the fields of a Routing."""
    T, E = logits.shape
    mask = torch.ones(T, E, dtype=torch.bool) if expert_mask is None else expert_mask.expand(T, E)
    bias = [0.0] * E if selection_bias is None else selection_bias.tolist()
    indices, weights, counts = [], [], [0] * E
    mean, z, entropy = [0.0] * E, 0.0, 0.0
    for t in range(T):
        x = {e: v for e, v in enumerate(logits[t].tolist()) if mask[t, e] and v != -math.inf}
        lse = math.log(sum(math.exp(v) for v in x.values())) if x else 0.0
        soft = {e: math.exp(v - lse) for e, v in x.items()}
        sigmoid = {e: 1 / (1 + math.exp(-v)) for e, v in x.items()}
        s = {"softmax": soft, "sigmoid": sigmoid, "softmax_after_topk": x}[score]
        p = {e: v / (sum(s.values()) + 1e-20) for e, v in s.items()} if score == "sigmoid" else soft
        choice = {e: v + bias[e] for e, v in s.items()}
        if num_groups:
            size = E // num_groups
            value = {}
            for e in x:
                value.setdefault(e // size, []).append(choice[e])
            value = {g: sum(sorted(members)[-2:]) for g, members in value.items()}
            kept = sorted(value, key=lambda g: (-value[g], g))[:top_groups]
            choice = {e: v for e, v in choice.items() if e // size in kept}
        chosen = sorted(choice, key=lambda e: (-choice[e], e))[:top_k]
        w = [s[e] for e in chosen]
        if score == "softmax_after_topk":
            w = [math.exp(x[e]) for e in chosen]
        if score == "softmax_after_topk" or renormalize:
            total = sum(w)
            w = [v / (total + (1e-20 if score == "sigmoid" else 0.0)) for v in w]
        absent = top_k - len(chosen)
        indices.append(chosen + [-1] * absent)
        weights.append([v * route_scale for v in w] + [0.0] * absent)
        for e in chosen:
            counts[e] += 1
        for e, v in p.items():
            mean[e] += v / T
            entropy -= v * math.log(v) / T
        z += lse**2 / T
    f64 = torch.float64
    return {
        "indices": torch.tensor(indices, dtype=torch.int32).reshape(T, top_k),
        "weights": torch.tensor(weights, dtype=f64).reshape(T, top_k),
        "counts": torch.tensor(counts, dtype=torch.int32),
        "probabilities": torch.tensor(mean, dtype=f64),
        "z": torch.tensor(z, dtype=f64),
        "entropy": torch.tensor(entropy, dtype=f64),
    }


def results(routing):
    """The fields that a Routing computes, detached."""
    return {key: value.detach() for key, value in zip(routing._fields[:6], routing[:6], strict=True)}


def cotangents(T, E, k, seed=1):
    """Float64 gradients of weights, probabilities (of the size that 1/T leaves visible) and z."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return normal(T, k), T * normal(E), T * normal(())


def run(logits, top_k, backend, gradients=None, **keywords):
    """All results, and d(logits) of the given gradients (of `cotangents` unless given; None is absent)."""
    leaf = logits.detach().requires_grad_() if logits.is_leaf else logits
    routing = route(leaf, top_k, backend=backend, **keywords)
    if gradients is None:
        gradients = [g.to(logits.device) for g in cotangents(*logits.shape, top_k)]
    pairs = zip((routing.weights, routing.probabilities, routing.z), gradients, strict=True)
    outputs, seeds = zip(*((x, g.to(x.dtype)) for x, g in pairs if g is not None), strict=True)
    (dlogits,) = torch.autograd.grad(outputs, leaf, seeds)
    return results(routing) | {"dlogits": dlogits}


def check(logits, top_k, backend, gradients=None, **keywords):
    """|ours - ref64| <= 2 |torch_same_dtype - ref64| + eps max(1, max|ref64|); indices and counts equal."""
    ours = run(logits, top_k, backend, gradients, **keywords)
    same = run(logits, top_k, "reference", gradients, **keywords)
    if gradients is None:
        gradients = [g.to(logits.device) for g in cotangents(*logits.shape, top_k)]
    high = torch.promote_types(logits.dtype, torch.float32)  # all see the same gradients
    gradients = [None if g is None else g.to(high).double() for g in gradients]
    truth = run(logits.double(), top_k, "reference", gradients, **keywords)
    for key, exact in truth.items():
        assert ours[key].shape == exact.shape, key
        assert ours[key].dtype == same[key].dtype, key
        if key in EXACT:
            assert torch.equal(ours[key], same[key]), key
        elif exact.numel():
            error = (ours[key].double() - exact).abs().max().item()
            allowed = 2 * (same[key].double() - exact).abs().max().item()
            assert allowed < math.inf, (
                f"{key}: PyTorch's own result is not finite, the rule would say nothing"
            )
            eps = LOW.get(logits.dtype, EPS[logits.dtype]) if key == "dlogits" else EPS[logits.dtype]
            allowed += eps * max(1.0, exact.abs().max().item())
            assert error <= allowed, f"{key}: error {error:.2e}, allowed {allowed:.2e}"
    return ours
