"""The peers of linear attention: transformers' PyTorch, chunked PyTorch, our reference, and on CUDA fla.

All take the layout [B, T, H, D]. A peer raises `Unavailable` with a reason where it cannot do a case.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slmkernels.ops.linear import reference

from .cases import Candidate, Inputs, Run, Unavailable
from .peers import gpu_library

CHUNK = 64
LONGEST_LOOP = 512  # tokens that a peer may go through one by one in Python
# Tokens up to which peers run, so that a run of all cases takes minutes.
LONGEST = 4096
LONGEST_PLAIN = 16384  # without the delta rule
LEAVES = ("q", "k", "v", "decay", "beta")
TRANSFORMERS = "transformers.models.qwen3_next.modeling_qwen3_next"


def linear_run(
    function: Callable[..., Tensor], inputs: Inputs, backward: bool, constant: bool = False
) -> Run:
    """Run `function(q, k, v[, decay][, beta])` forward, or forward and backward; `constant`: no ddecay."""
    given = {name: inputs[name].detach().clone() for name in LEAVES if name in inputs}
    leaves = [x.requires_grad_(backward) for name, x in given.items() if not (constant and name == "decay")]

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            o = function(**given)
        return (o.detach(), *torch.autograd.grad(o, leaves, inputs["do"])) if backward else (o,)

    return Run(call)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, normalize: bool = False
) -> Tensor:
    """Linear attention in plain PyTorch, all chunks at once; decay is [H], one gate a head.

    Batched products inside the chunks; the states before them by one cumulative sum, or a loop with a decay.
    """
    B, T, H, _ = q.shape
    n = -(-T // CHUNK)
    q = q if normalize else q * q.shape[-1] ** -0.5
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, n * CHUNK - T)).view(B, n, CHUNK, H, -1).permute(0, 3, 1, 2, 4)
        for x in (q, k, v)
    )  # [B, H, n, C, D]
    inside = q @ k.mT  # [B, H, n, C, C]
    if decay is None:
        inside = inside.tril()
        states = (k.mT @ v).cumsum(2)  # [B, H, n, K, V]
        before = F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    else:
        at = torch.arange(CHUNK, device=q.device, dtype=decay.dtype)
        gaps = (at[:, None] - at).clamp(min=0)
        inside = inside * (decay[:, None, None] * gaps).exp().tril()[:, None].to(q.dtype)
        out_of = (decay[:, None] * (CHUNK - 1 - at)).exp()[:, None, :, None].to(q.dtype)
        written = (k * out_of).mT @ v
        gate = (decay * CHUNK).exp()[:, None, None].to(q.dtype)
        state, states = torch.zeros_like(written[:, :, 0]), []
        for i in range(n):
            states.append(state)
            state = gate * state + written[:, :, i]
        before = torch.stack(states, 2)
        q = q * (decay[:, None] * (at + 1)).exp()[:, None, :, None].to(q.dtype)
    o = inside @ v + q @ before
    if normalize:
        keys = F.pad(k.sum(3).cumsum(2)[:, :, :-1], (0, 0, 1, 0))  # [B, H, n, K]
        o = o / (inside.sum(-1, keepdim=True) + q @ keys[..., None] + 1e-6)
    return o.permute(0, 2, 3, 1, 4).reshape(B, n * CHUNK, H, -1)[:, :T]


def our_reference(options: dict, form: Callable = reference.chunked) -> Callable[..., Tensor]:
    """Our reference as a function of q, k, v, decay, beta."""

    def attend(q, k, v, decay=None, beta=None):
        scale = q.shape[-1] ** -0.5
        return reference.linear_attention(q, k, v, decay, beta, scale=scale, **options, form=form)[0]

    return attend


def linear_peers(row: str, options: dict, backward: bool, compiles: bool = True) -> tuple[Candidate, ...]:
    """The peers of one row of the table of `linear_attention`; the ones that cannot do it say so."""
    constant = row == "retention"

    def simple(inputs: Inputs) -> Run:
        _short_enough(inputs, LONGEST_PLAIN)
        return linear_run(
            lambda **x: chunked(**x, normalize=options["normalize"]), inputs, backward, constant
        )

    def compiled(inputs: Inputs) -> Run:
        torch.compiler.reset()
        function = torch.compile(chunked, fullgraph=True, dynamic=False)
        return linear_run(
            lambda **x: function(**x, normalize=options["normalize"]), inputs, backward, constant
        )

    def by_reference(inputs: Inputs) -> Run:
        _short_enough(inputs)
        if row == "gated delta" and importlib.util.find_spec("transformers"):
            raise Unavailable("transformers' chunks stand for PyTorch here")
        return linear_run(our_reference(options), inputs, backward)

    def by_transformers(name: str, longest: int) -> Callable[[Inputs], Run]:
        def prepare(inputs: Inputs) -> Run:
            _short_enough(inputs, longest)
            function = _transformers(name)

            def attend(q, k, v, beta, decay=None):
                g = torch.zeros_like(beta) if decay is None else decay
                return function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=options["l2norm_qk"])[0]

            return linear_run(attend, inputs, backward)

        return prepare

    if row in ("linear", "retention"):
        table = {"chunked PyTorch": simple, **({"chunked, torch.compile": compiled} if compiles else {})}
    else:
        table = {"our reference, by chunks": by_reference}
        if row in ("delta", "gated delta"):
            table["transformers, by chunks"] = by_transformers("torch_chunk_gated_delta_rule", LONGEST)
        if row == "gated delta":
            loop = by_transformers("torch_recurrent_gated_delta_rule", LONGEST_LOOP)
            table["transformers, by tokens"] = loop
    names = FLA_NAMES[row]
    table |= {f"fla {name}": _fla(name, row, options, backward) for name in names}
    return tuple(Candidate(name, prepare, "compile" in name) for name, prepare in table.items())


def _short_enough(inputs: Inputs, longest: int = LONGEST) -> None:
    if inputs["q"].shape[1] > longest:
        raise Unavailable(f"left out above {longest} tokens: it would take too long")


def _transformers(name: str) -> Callable:
    try:
        return getattr(importlib.import_module(TRANSFORMERS), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"transformers: {error}") from error


# The functions of fla for each row.
FLA_SIMPLE = ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla")
FLA_NAMES = {
    "linear": ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"),
    "retention": ("chunk_retention", *FLA_SIMPLE),
    "scalar decay": FLA_SIMPLE,
    "gla": ("chunk_gla",),
    "delta": ("chunk_delta_rule",),
    "gated delta": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "kda": ("chunk_kda",),
}


def _fla(name: str, row: str, options: dict, backward: bool) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        function = gpu_library("fla.ops", name, inputs["q"].device)
        if name == "chunk_delta_rule" and inputs["q"].dtype == torch.float32:
            raise Unavailable("has no float32 kernels")
        if name == "fused_recurrent_gated_delta_rule" and backward:
            raise Unavailable("has no backward")

        def attend(q, k, v, decay=None, beta=None):
            extra = {} if beta is None else {"beta": beta, "use_qk_l2norm_in_kernel": options["l2norm_qk"]}
            if decay is not None and name != "chunk_retention":
                extra["g_gamma" if row == "retention" else "g"] = decay
            if name.endswith("linear_attn"):  # their defaults differ
                extra["normalize"] = options["normalize"]
                extra |= {"scale": 1.0} if options["normalize"] else {}
            return function(q, k, v, **extra)[0]

        return linear_run(attend, inputs, backward, row == "retention")

    return prepare


def _decode_by(function: Callable, inputs: Inputs) -> Run:
    """One token by a function of whole sequences, from the state that the previous call returned."""
    tokens, gates = [inputs[x] for x in "qkv"], {"g": inputs["decay"], "beta": inputs["beta"]}
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    state = inputs["state"].clone()

    def call() -> tuple[Tensor, ...]:
        nonlocal state
        with torch.no_grad():
            o, state = function(*tokens, **gates, initial_state=state, **options)
        return (o,)

    return Run(call)


def decode_transformers(inputs: Inputs) -> Run:
    """One token by transformers' loop."""
    return _decode_by(_transformers("torch_recurrent_gated_delta_rule"), inputs)


def decode_fla(inputs: Inputs) -> Run:
    """One token by fla's kernel, which writes a new state."""
    name = "fused_recurrent_gated_delta_rule"
    return _decode_by(gpu_library("fla.ops", name, inputs["q"].device), inputs)


def decode_pytorch(inputs: Inputs) -> Run:
    """One token in plain PyTorch, the state updated in place."""
    tokens, state = [inputs[name] for name in LEAVES], inputs["state"].clone()

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            q, k, v, decay, beta = (x[:, 0] for x in tokens)  # [B, H, D] and [B, H]
            dtype = state.dtype
            q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q.to(dtype), k.to(dtype)))
            state.mul_(decay.exp()[..., None, None])
            error = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
            state.add_(k[..., None] * error[..., None, :])
            o = (q[..., None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5
        return (o[:, None].to(v.dtype),)

    return Run(call)
