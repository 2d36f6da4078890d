"""The peers of the experts: loops, grouped_mm, batched products and a routing in PyTorch; yardsticks.

Eager loop, grouped_mm and batched_mm are what transformers runs under the names "eager", "grouped_mm" and
"batched_mm". An expert function takes x [T, d], w_gate_up [E, 2n, d], w_down [E, d, n], weights [T, k] or
None, and indices [T, k]. A peer raises `Unavailable` with a reason where it cannot do a case.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Candidate, Inputs, Run, Unavailable
from .peers import gpu_library

LEAVES = ("x", "weights", "w_gate_up", "w_down")  # documents have no weights
LARGEST_COPIES = 2**27  # elements of the matrices copied for every row; above, batched products are left out


def expert_run(function: Callable[..., Tensor], inputs: Inputs, backward: bool) -> Run:
    """Run `function(x[, weights], w_gate_up, w_down)` forward, or forward and backward."""
    given = {name: inputs[name].detach() for name in LEAVES if name in inputs}
    leaves = {name: x.requires_grad_(backward) for name, x in given.items()}

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            y = function(**leaves)
        return (
            (y.detach(), *torch.autograd.grad(y, tuple(leaves.values()), inputs["dy"])) if backward else (y,)
        )

    return Run(call, parameters=(leaves["w_gate_up"], leaves["w_down"]))


def expert_peers(backward: bool, documents: bool) -> tuple[Candidate, ...]:
    """Every peer of a routing, or of whole documents; the ones that cannot do a case say so when prepared."""
    table = {
        "eager loop": partial(_pytorch, eager_loop),
        "sorted loop": partial(_pytorch, partial(sorted_by_expert, in_turn)),
        "grouped_mm": partial(_pytorch, partial(sorted_by_expert, grouped)),
        "batched_mm": _batched,
        "scattermoe": _scattermoe,
    }
    table |= {"loop over documents": _document_loop} if documents else {}
    yardsticks = {
        "grouped_mm alone": (_grouped_alone, "its two products only, of rows already sorted by expert"),
        "dense": (_dense, "a dense SwiGLU of as many FLOPs: every token through the first k experts"),
    }
    return (
        *(Candidate(name, partial(prepare, backward=backward)) for name, prepare in table.items()),
        *(
            Candidate(name, partial(prepare, backward=backward), yardstick=what)
            for name, (prepare, what) in yardsticks.items()
        ),
    )


# ---- the same function -------------------------------------------------------------------------------------


def gated(h: Tensor) -> Tensor:
    """silu(gate) up, [R, 2n] -> [R, n]."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager_loop(x, w_gate_up, w_down, weights=None, *, indices: Tensor) -> Tensor:
    """One expert with tokens after the other: gather its tokens, two products, add into their rows."""
    y, chosen = torch.zeros_like(x), F.one_hot(indices, w_down.shape[0]).permute(2, 1, 0)  # [E, k, T]
    for e in chosen.sum((1, 2)).nonzero().flatten().tolist():
        slot, token = torch.where(chosen[e])
        rows = F.linear(gated(F.linear(x[token], w_gate_up[e])), w_down[e])
        y.index_add_(0, token, rows if weights is None else rows * weights[token, slot, None])
    return y


def sorted_by_expert(products: Callable, x, w_gate_up, w_down, weights=None, *, indices: Tensor) -> Tensor:
    """Copy the rows in the order of experts, `products` of them, bring the weighted results back, sum."""
    (T, k), E = indices.shape, w_down.shape[0]
    expert, order = indices.flatten().sort()
    ends = torch.histc(expert.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
    rows = products(x.index_select(0, order // k), ends, w_gate_up, w_down)  # [T k, d]
    if weights is not None:
        rows = rows * weights.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(T * k, device=order.device))
    return rows.index_select(0, back).view(T, k, -1).sum(1)


def grouped(rows: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The two products of rows sorted by expert; `ends` int32 [E] is where each expert's rows end."""
    a = gated(F.grouped_mm(rows, w_gate_up.mT, offs=ends))
    return F.grouped_mm(a, w_down.mT, offs=ends)


def loop(parts: Sequence[Tensor], experts: Sequence[int], w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Part after part through its expert. `unbind`, as the gradient of w[e] fills all of w with zeros."""
    up, down = w_gate_up.unbind(), w_down.unbind()
    rows = zip(parts, experts, strict=True)
    return torch.cat([F.linear(gated(F.linear(part, up[e])), down[e]) for part, e in rows])


def in_turn(rows: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """What `grouped` computes, in a loop over experts."""
    return loop(rows.tensor_split(ends[:-1].tolist()), range(len(ends)), w_gate_up, w_down)


def batched(x, w_gate_up, w_down, weights=None, *, indices: Tensor) -> Tensor:
    """Copy the matrices for every row, and batched products: without a sort, for a few tokens."""
    expert, k = indices.flatten(), indices.shape[1]
    rows = x.repeat_interleave(k, 0)[:, None]  # [T k, 1, d]
    a = gated(rows @ w_gate_up.index_select(0, expert).mT)
    rows = (a @ w_down.index_select(0, expert).mT).view(-1, k, x.shape[1])  # [T, k, d]
    return (rows if weights is None else rows * weights[..., None]).sum(1)


def _native(inputs: Inputs) -> Inputs:
    """int64 indices, as topk gives them, and weights in x's dtype, as models cast them."""
    cast = {"weights": inputs["weights"].to(inputs["x"].dtype)} if "weights" in inputs else {}
    return {**inputs, **cast, "indices": inputs["indices"].long()}


def _pytorch(function: Callable[..., Tensor], inputs: Inputs, backward: bool) -> Run:
    inputs = _native(inputs)
    return expert_run(partial(function, indices=inputs["indices"]), inputs, backward)


def _batched(inputs: Inputs, backward: bool) -> Run:
    copies = inputs["indices"].numel() * (inputs["w_gate_up"][0].numel() + inputs["w_down"][0].numel())
    if copies > LARGEST_COPIES:
        size = copies * inputs["x"].element_size() / 2**30
        raise Unavailable(f"left out: its copies of the matrices, one for every row, take {size:.1f} GiB")
    return _pytorch(batched, inputs, backward)


def _document_loop(inputs: Inputs, backward: bool) -> Run:
    """Document after document, where it lies."""
    ends, experts = (inputs[name].tolist() for name in ("cu_seqlens", "experts"))

    def function(x, w_gate_up, w_down):
        return loop(x.tensor_split(ends[1:-1]), experts, w_gate_up, w_down)

    return expert_run(function, inputs, backward)


def _scattermoe(inputs: Inputs, backward: bool) -> Run:
    device = inputs["x"].device
    sort, linear = (
        gpu_library("scattermoe.parallel_experts", name, device)
        for name in ("flatten_sort_count", "parallel_linear")
    )
    if "weights" not in inputs:
        raise Unavailable("it needs a routing with weights")

    def function(x, weights, w_gate_up, w_down, indices):
        order = sort(indices, num_experts=w_down.shape[0])
        h = linear(x, w_gate_up.mT, indices.shape[1], *order, grouped_out=True)
        return linear(gated(h), w_down.mT, 1, *order, gates=weights, grouped_in=True)

    return _pytorch(function, inputs, backward)


def route_pytorch(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Softmax and top-k renormalised, the counts, the mean probabilities and the mean squared logsumexp."""
    p = logits.softmax(1, dtype=torch.float32)
    weights, indices = p.topk(top_k)
    counts = indices.flatten().bincount(minlength=logits.shape[1])
    z = logits.float().logsumexp(1).square().mean()
    return indices, weights / weights.sum(1, keepdim=True), counts, p.mean(0), z


# ---- yardsticks --------------------------------------------------------------------------------------------


def _grouped_alone(inputs: Inputs, backward: bool) -> Run:
    indices, dy = inputs["indices"], inputs["dy"]
    expert, order = indices.flatten().sort()
    E, token = inputs["w_down"].shape[0], order // indices.shape[1]
    ends = expert.bincount(minlength=E).cumsum(0, dtype=torch.int32)
    rows, up, down = (inputs["x"][token], inputs["w_gate_up"], inputs["w_down"])
    h = F.grouped_mm(rows, up.mT, offs=ends)
    leaves = [x.detach().requires_grad_(backward) for x in (rows, gated(h), up, down)]
    gradients = h, dy[token]  # of h any values

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            rows, a, up, down = leaves
            results = F.grouped_mm(rows, up.mT, offs=ends), F.grouped_mm(a, down.mT, offs=ends)
        if not backward:
            return results
        return *(x.detach() for x in results), *torch.autograd.grad(results, leaves, gradients)

    return Run(call, parameters=tuple(leaves[2:]))


def _dense(inputs: Inputs, backward: bool) -> Run:
    k = inputs["indices"].shape[1]
    up, down = (inputs[name][:k] for name in ("w_gate_up", "w_down"))
    gate, up = up.chunk(2, dim=1)  # [k, n, d]
    matrices = {
        "w_gate_up": torch.cat([gate.flatten(0, 1), up.flatten(0, 1)]),  # [2 k n, d]
        "w_down": down.transpose(0, 1).flatten(1).contiguous(),  # [d, k n]
    }

    def function(x, w_gate_up, w_down):
        return F.linear(gated(F.linear(x, w_gate_up)), w_down)

    return expert_run(function, {"x": inputs["x"], "dy": inputs["dy"], **matrices}, backward)
