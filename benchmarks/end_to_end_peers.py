"""The peers of whole models: `SmallLM` on PyTorch's own attention, and transformers without us.

The same model runs in both, so each stands in a context manager: inside, its operations are another's.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slmkernels.models import SmallLM
from slmkernels.nn import sliding_window as module
from slmkernels.ops.sliding_window.step import RingCache
from slmkernels.train.compare import sdpa_band, use_attention

from .cases import Unavailable
from .peers import sdpa_in_blocks

Within = Callable[[torch.nn.Module], AbstractContextManager]  # of a model, its operations changed

# ---- SmallLM on PyTorch's attention ------------------------------------------------------------------------


def sdpa_step(q: Tensor, k: Tensor, v: Tensor, cache: RingCache, **options) -> Tensor:
    """What `sliding_window_attention_step` does, by SDPA: one token over the filled slots of the ring, or
    several into an empty one. The order of the slots does not matter, so that nothing is copied."""
    ignored = {name: value for name, value in options.items() if value is not None}
    if ignored:
        raise Unavailable(f"SDPA is compared without {', '.join(ignored)}")
    n, length, W = q.shape[1], cache.length, cache.window
    if n > 1:
        if length:
            raise Unavailable("SDPA is compared where a prompt meets an empty cache")
        cache.append(k, v)
        return sdpa_band(q, k, v, window=W)
    slot, filled = length % W, min(length + 1, W)
    cache.k[:, :, slot : slot + 1] = k.transpose(1, 2)
    cache.v[:, :, slot : slot + 1] = v.transpose(1, 2)
    cache.position += 1
    keys, values = cache.k[:, :, :filled], cache.v[:, :, :filled]
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True).transpose(1, 2)


@lru_cache(maxsize=4)
def _blocked(shape: torch.Size, device: torch.device, window: int) -> Callable[..., Tensor]:
    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - window)

    return sdpa_in_blocks(torch.empty(1, device=device).expand(shape), window, visible)


def sdpa_blocked(q: Tensor, k: Tensor, v: Tensor, *, window=None, **options) -> Tensor:
    """A window by blocks of queries, as `peers.sdpa_in_blocks`; full attention by SDPA's own."""
    if window is None or window >= q.shape[1]:
        return sdpa_band(q, k, v, window=window, **options)
    return _blocked(q.shape, q.device, window)(q, k, v)


@contextlib.contextmanager
def pytorch_attention(attend: Callable[..., Tensor], model: SmallLM) -> Iterator[None]:
    """Every layer of `model` on `attend`, and decoding on `sdpa_step`."""
    others = set(model.config.layers) - set("SF")
    if others:
        raise Unavailable(f"layers {', '.join(sorted(others))} have no counterpart here")
    name, calls = "sliding_window_attention_step", []
    ours = getattr(module, name)

    def counted(function: Callable[..., Tensor], *args, **options) -> Tensor:
        calls.append(function)
        return function(*args, **options)

    setattr(module, name, partial(counted, sdpa_step))
    try:
        with use_attention(model, partial(counted, attend)):
            yield
    finally:
        setattr(module, name, ours)
    if not calls:
        raise RuntimeError("the model calls its attention by another name: ours would be compared with ours")


SMALL_LM_PEERS: dict[str, Within] = {
    "PyTorch, SDPA": partial(pytorch_attention, sdpa_band),
    "PyTorch, SDPA in blocks": partial(pytorch_attention, sdpa_blocked),
}

# ---- models of transformers --------------------------------------------------------------------------------

SHARED = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
# name -> the class's stem, and its configuration: what is not said is the class's default.
STYLES: dict[str, tuple[str, dict]] = {
    "qwen3_next": (
        "Qwen3Next",
        {
            **SHARED,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
        },
    ),
    "mistral": (
        "Mistral",
        {
            **SHARED,
            "intermediate_size": 512,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 256,
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            **SHARED,
            "intermediate_size": 256,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
}
FEWER = {
    "hidden_size": 64,
    "vocab_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "sliding_window": 16,
}


def style_options(style: str, small: bool) -> dict:
    """The configuration of a style; `small` shrinks every size that it names."""
    options = STYLES[style][1]
    return {name: FEWER.get(name, value) if small else value for name, value in options.items()}


def build_style(style: str, small: bool) -> torch.nn.Module:
    """A model of transformers with random weights, the same at every call."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise Unavailable(f"transformers: {error}") from error
    transformers.logging.set_verbosity_error()
    stem = STYLES[style][0]
    config = getattr(transformers, f"{stem}Config")(**style_options(style, small), use_cache=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{stem}ForCausalLM")(config)


def active_parameters(model: torch.nn.Module) -> int:
    """Parameters that a token meets: of a layer's experts `num_experts_per_tok`; input embeddings look up."""
    config = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    every = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return int(every - experts * (1 - share))


@contextlib.contextmanager
def accelerated(model: torch.nn.Module) -> Iterator[object]:
    """`slmkernels.integrations.transformers.accelerated`, which switches a model to our kernels."""
    try:
        switch = importlib.import_module("slmkernels.integrations.transformers").accelerated
    except ImportError as error:
        raise Unavailable(f"slmkernels.integrations.transformers: {error}") from error
    with switch(model) as report:
        yield report


@contextlib.contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """transformers' plain implementations, which take float64 too."""
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    yield
