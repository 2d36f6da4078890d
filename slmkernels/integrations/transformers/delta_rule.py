"""The delta rules of transformers' hybrid models and their convolution, under transformers' names.

Each of these models keeps its own copies of the functions as globals of its module, which its layers call:
`patch_gated_delta_rule` and, for a while, `held` put ours in their place.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations import hub_kernels

from ...dispatch import Unsupported
from ...ops.causal_conv1d.function import causal_conv1d
from ...ops.linear.function import linear_attention
from ...ops.linear.step import linear_attention_step
from .masks import document_offsets

# What is told beside the tensors and changes no result.
HARMLESS = {
    "chunk_size",
    "position_ids",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "use_cache",
    "output_hidden_states",
    "output_router_logits",
    "output_attentions",
    "num_items_in_batch",
    "labels",
    "logits_to_keep",
    "cache_position",
}


def _refuse_others(name: str, options: dict) -> None:
    for option, value in options.items():
        if option not in HARMLESS and value is not None and value is not False:
            raise Unsupported(f"{name}: {option} is {value!r}; it has no kernel: unpatch_gated_delta_rule()")


def _offsets(cu_seqlens: Tensor | None, cu_seq_lens_q: Tensor | None) -> Tensor | None:
    given = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
    return None if given is None else given.to(torch.int32)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, or with a gate for each channel Kimi Delta Attention, of a text or of one token.

    Args:
        query, key: `[B, T, Hk, K]`; value `[B, T, H, V]`.
        g: log gates `[B, T, H]` or `[B, T, H, K]`; beta `[B, T, H]`.
        initial_state: `[B, H, K, V]`; of one token without gradients it is updated in place.
        output_final_state: also return the state behind the last token.
        use_qk_l2norm_in_kernel: query and key of length 1.
        cu_seqlens, cu_seq_lens_q: offsets of packed documents; nothing crosses a boundary.

    Returns:
        o `[B, T, H, V]` in query's dtype, and the state in float32 or None.

    Raises:
        Unsupported: an option that has no kernel.
    """
    _refuse_others("delta rule", options)
    offsets = _offsets(cu_seqlens, cu_seq_lens_q)
    given = {"decay": g, "beta": beta, "l2norm_qk": use_qk_l2norm_in_kernel}
    if query.shape[1] == 1 and offsets is None and initial_state is not None and not torch.is_grad_enabled():
        # In place: a cache, whose it is, takes what is returned over it in any case.
        state = initial_state.to(torch.float32).contiguous()
        return linear_attention_step(query, key, value, state, **given), state if output_final_state else None
    o, state = linear_attention(
        query, key, value, **given, initial_state=initial_state, return_state=True, cu_seqlens=offsets
    )
    return o, state if output_final_state else None


def _convolve(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options,
) -> Tensor:
    """The short causal convolution of a text: hidden_states `[B, C, T]`, weight `[C, W]`, bias `[C]`.

    cu_seqlens, cu_seq_lens_q or seq_idx `[B, T]` (a number for each document) say where documents begin.
    """
    _refuse_others("causal_conv1d", options)
    x, offsets = hidden_states.transpose(1, 2), _offsets(cu_seqlens, cu_seq_lens_q)
    if offsets is None and seq_idx is not None:
        offsets = document_offsets(seq_idx)[0]
        x = x.reshape(1, -1, x.shape[2])
    y = causal_conv1d(x, weight, bias, activation=_silu(activation), cu_seqlens=offsets)
    return y.reshape(hidden_states.shape[0], -1, y.shape[2]).transpose(1, 2)


def _convolve_step(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """New tokens `[B, C, n]` behind conv_state `[B, C, W]`, the last tokens, which is updated in place."""
    n = hidden_states.shape[2]
    tokens = torch.cat((conv_state.to(hidden_states.dtype), hidden_states), 2)  # [B, C, W + n]
    conv_state.copy_(tokens[:, :, -conv_state.shape[2] :])
    y = causal_conv1d(tokens.transpose(1, 2), weight, bias, activation=_silu(activation))
    return y[:, -n:].transpose(1, 2)


def _silu(activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise Unsupported(f"causal_conv1d: activation is {activation!r}; silu is supported, or None")
    return None if activation is None else "silu"


REPLACEMENTS: dict[str, Callable] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "torch_recurrent_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "recurrent_kimi_delta_attention": _delta_rule,
    "causal_conv1d_fn": _convolve,
    "causal_conv1d_update": _convolve_step,
}
RULES = [name for name, ours in REPLACEMENTS.items() if ours is _delta_rule]
FAMILIES = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "olmo_hybrid",
    "kimi_linear",
    "bailing_hybrid",
    "glm5_next",
    "lara_mini",
    "qwen4_exp",
)
# Before 5.16 each layer held its functions itself: to replace the globals would change nothing.
CALLED_BY_NAME = hasattr(hub_kernels, "use_kernel_func_from_hub_with_fallback")
OLDER = f"delta rule: transformers is {transformers.__version__}; its layers take ours from 5.16 on"
Function = tuple[str, str]  # the names of a module and of a function in it
_replaced: dict[Function, Callable] = {}  # -> theirs
_for_good: set[Function] = set()  # until `unpatch_gated_delta_rule`
_holders: Counter[Function] = Counter()  # -> blocks of `accelerated` that need ours


def modeling_modules(model: nn.Module) -> list[ModuleType]:
    """The modules in which a model's layers are defined and that have a delta rule."""
    names = dict.fromkeys(type(part).__module__ for part in model.modules())
    modules = (sys.modules[name] for name in names if name in sys.modules)
    return [module for module in modules if any(hasattr(module, rule) for rule in RULES)]


def _family(name: str) -> list[ModuleType]:
    path = f"transformers.models.{name}"
    if importlib.util.find_spec(path) is None:
        return []
    return [importlib.import_module(f"{path}.modeling_{name}")]


def patch_gated_delta_rule(*models: str | nn.Module) -> list[str]:
    """Put our delta rule, Kimi Delta Attention and convolution in the place of transformers' own.

    For every model of these families, those already made included, until `unpatch_gated_delta_rule`.

    Args:
        models: model types ("qwen3_next", ...) or models; all `FAMILIES` that this transformers has if none.

    Returns:
        What was replaced now, as "module.function".

    Raises:
        Unsupported: a model or a model type that has no such functions; transformers before 5.16.
    """
    if not CALLED_BY_NAME:
        raise Unsupported(OLDER)
    modules = [module for family in FAMILIES for module in _family(family)] if not models else []
    for model in models:
        found = modeling_modules(model) if isinstance(model, nn.Module) else _family(model)
        if not any(hasattr(module, rule) for module in found for rule in RULES):
            name = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
            raise Unsupported(f"models: {name} has no gated delta rule; {', '.join(FAMILIES)} have")
        modules += found
    functions = functions_of(modules)
    done = [".".join(function) for function in functions if function not in _replaced]
    _for_good.update(functions)
    _settle(functions)
    return done


def unpatch_gated_delta_rule() -> None:
    """Put transformers' functions back, but where a block of `accelerated` runs: at its end."""
    functions = list(_for_good)
    _for_good.clear()
    _settle(functions)


def functions_of(modules: list[ModuleType]) -> list[Function]:
    """What there is to replace in these modules."""
    return [(m.__name__, name) for m in modules for name in REPLACEMENTS if hasattr(m, name)]


@contextlib.contextmanager
def held(functions: list[Function]) -> Iterator[None]:
    """Ours inside the block, however many of them there are and in whatever order they end."""
    _holders.update(functions)
    _settle(functions)
    try:
        yield
    finally:
        _holders.subtract(functions)
        _settle(functions)


def _settle(functions: list[Function]) -> None:
    """Put ours where somebody needs it, and theirs back where nobody does any more."""
    for function in functions:
        module, name = function
        wanted = function in _for_good or _holders[function] > 0
        if wanted and function not in _replaced:
            _replaced[function] = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, REPLACEMENTS[name])
        elif not wanted and function in _replaced:
            setattr(sys.modules[module], name, _replaced.pop(function))
