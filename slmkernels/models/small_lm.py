"""A small language model on one page: embeddings, blocks of a mixer and an MLP or experts, tied logits.

Letters in the shape comments: B batch, T tokens, C channels, N hidden channels, V vocabulary.
Text is bytes: the vocabulary is the 256 byte values. Special tokens take bytes that never occur in UTF-8
(0xC0, 0xC1, 0xF5 to 0xFF); `DOCUMENT` is the one in use.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import (
    FEATURE_MAPS,
    FeedForward,
    HybridAttention,
    LinearAttention,
    RMSNorm,
    SlidingWindowAttention,
    SparseExperts,
)
from ..nn.feature_maps import Projected
from ..nn.hybrid_attention import POSITIVE_MAPS
from ..nn.linear_attention import MODES
from ..ops.experts.route import Routing
from ..ops.hybrid.function import ALIGNMENTS
from ..validation import check_number, expect

DOCUMENT = 0xFF  # the token between two documents

# Parameter counts as in the names, embeddings included.
_FIELDS = ("dim", "num_layers", "num_heads", "num_kv_heads", "hidden", "window", "max_seq_len")
PRESETS: dict[str, dict[str, int]] = {
    name: dict(zip(_FIELDS, row, strict=True))
    for name, row in {
        "1m": (128, 4, 4, 2, 512, 64, 2048),
        "5m": (256, 8, 8, 4, 512, 128, 2048),
        "15m": (384, 8, 6, 3, 1280, 128, 4096),
        "50m": (640, 12, 10, 5, 1536, 256, 8192),
        "125m": (768, 16, 12, 6, 2560, 512, 8192),
    }.items()
}


@dataclass(frozen=True)
class SmallLMConfig:
    """The shape of a model. `SmallLMConfig.preset(name, **changes)` starts from a row of `PRESETS`."""

    dim: int = 128  # C
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2  # divides num_heads; in L layers of mode gated_delta the heads of q and k
    hidden: int = 512  # N, of the SwiGLU
    pattern: str = "SSSF"  # one letter of MIXERS a layer, cycled over the layers
    window: int = 64  # keys a query of an S layer sees, itself included; of an H layer the near ones
    max_seq_len: int = 2048  # tokens the cache of an F layer holds; the others have no limit
    vocab_size: int = 256  # V
    rope_base: float = 10000.0
    qk_norm: bool = True
    sinks: bool = False  # in S and F layers
    softcap: float | None = None  # of the attention scores of S and F layers
    linear_mode: str = "gated_delta"  # of L layers, a mode of nn.LinearAttention
    linear_feature_map: str | None = (
        None  # of L layers in mode "linear": a name of nn.FEATURE_MAPS, None: elu
    )
    hybrid_feature_map: str = "hedgehog"  # of H layers, as nn.HybridAttention's
    hybrid_feature_dim: int | None = None
    hybrid_alignment: str = "sliding"
    experts: int = 0  # in place of the SwiGLU, in every expert_every-th layer; 0: none
    expert_top_k: int = 2  # experts of a token
    expert_hidden: int | None = None  # of an expert; None: hidden // expert_top_k, a token costs what it did
    expert_shared: int = 0  # hidden channels of the shared experts; 0: none
    expert_every: int = 1
    expert_balance: float = 0.01  # coefficient of the load-balance loss
    expert_z: float = 0.001  # coefficient of the z-loss
    expert_bias_rate: float = 0.0  # of the selection bias, a step of training; 0: there is no bias

    def __post_init__(self):
        for name in (*_FIELDS, "vocab_size"):
            value = getattr(self, name)
            expect(type(value) is int and value >= 1, name, value, "an int >= 1")
        expect(self.dim % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of dim {self.dim}")
        divides = self.num_heads % self.num_kv_heads == 0
        expect(divides, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads {self.num_heads}")
        known = ", ".join(f"{letter} ({build.__doc__})" for letter, build in MIXERS.items())
        some = isinstance(self.pattern, str) and self.pattern != ""
        expect(some, "pattern", self.pattern, f"letters of {known}")
        for letter in self.pattern:
            expect(letter in MIXERS, "pattern", self.pattern, f"letters of {known}, not {letter!r}")
        expect(self.linear_mode in MODES, "linear_mode", self.linear_mode, f"one of {', '.join(MODES)}")
        name = self.linear_feature_map
        if name is not None:
            expect(name in FEATURE_MAPS, "linear_feature_map", name, f"one of {', '.join(FEATURE_MAPS)}")
            hint = f"None with linear_mode {self.linear_mode!r}: feature maps are of mode 'linear'"
            expect(self.linear_mode == "linear", "linear_feature_map", name, hint)
        choices = {"hybrid_feature_map": POSITIVE_MAPS, "hybrid_alignment": ALIGNMENTS}
        for name, known in choices.items():
            value = getattr(self, name)
            expect(value in known, name, value, f"one of {', '.join(known)}")
        size = self.hybrid_feature_dim
        if size is not None:
            expect(type(size) is int and size >= 1, "hybrid_feature_dim", size, "an int >= 1")
            learned = issubclass(FEATURE_MAPS[self.hybrid_feature_map], Projected)
            hint = f"None: feature map {self.hybrid_feature_map!r} projects nothing"
            expect(learned, "hybrid_feature_dim", size, hint)
        self._check_experts()

    def _check_experts(self) -> None:
        least = {"experts": 0, "expert_top_k": 1, "expert_hidden": 1, "expert_shared": 0, "expert_every": 1}
        for name, low in least.items():
            value = getattr(self, name)
            default = name == "expert_hidden" and value is None
            expect(default or (type(value) is int and value >= low), name, value, f"an int >= {low}")
        for name in ("expert_balance", "expert_z", "expert_bias_rate"):
            value = getattr(self, name)
            expect(check_number(name, value) >= 0, name, value, "a finite number >= 0")
        if self.experts:
            hint = f"at most the {self.experts} experts"
            expect(self.expert_top_k <= self.experts, "expert_top_k", self.expert_top_k, hint)
            hint = f"at most num_layers {self.num_layers}, or no layer has experts"
            expect(self.expert_every <= self.num_layers, "expert_every", self.expert_every, hint)
        else:
            for field in fields(self):
                value = getattr(self, field.name)
                unused = not field.name.startswith("expert_") or value == field.default
                expect(unused, field.name, value, f"{field.default} without experts")

    @classmethod
    def preset(cls, name: str, **changes) -> "SmallLMConfig":
        """The configuration `PRESETS[name]` with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def layers(self) -> str:
        """The letter of every layer: the pattern, cycled."""
        return "".join(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))


def _attention(config: SmallLMConfig, window: int | None) -> SlidingWindowAttention:
    return SlidingWindowAttention(
        config.dim,
        config.num_heads,
        config.num_kv_heads,
        window=window,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
        sinks=config.sinks,
        softcap=config.softcap,
    )


def _sliding(config: SmallLMConfig) -> nn.Module:
    """sliding-window attention"""
    return _attention(config, config.window)


def _full(config: SmallLMConfig) -> nn.Module:
    """full attention"""
    return _attention(config, None)


def _linear(config: SmallLMConfig) -> nn.Module:
    """linear attention"""
    mode = config.linear_mode
    return LinearAttention(
        config.dim,
        config.num_heads,
        config.num_kv_heads if mode == "gated_delta" else None,  # as in Qwen3-Next; no other shares keys
        mode=mode,
        feature_map=config.linear_feature_map,
        rope_base=config.rope_base if mode == "retention" else None,
    )


def _hybrid(config: SmallLMConfig) -> nn.Module:
    """hybrid attention"""
    return HybridAttention(
        config.dim,
        config.num_heads,
        config.num_kv_heads,
        window=config.window,
        alignment=config.hybrid_alignment,
        feature_map=config.hybrid_feature_map,
        feature_dim=config.hybrid_feature_dim,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
    )


# What a letter of the pattern builds: a module x [B, T, C] -> [B, T, C] that takes cache= and cu_seqlens=,
# has new_cache(batch, max_length), and whose last projection is `out`.
MIXERS: dict[str, Callable[[SmallLMConfig], nn.Module]] = {
    "S": _sliding,
    "F": _full,
    "L": _linear,
    "H": _hybrid,
}


def _mlp(config: SmallLMConfig, layer: int) -> FeedForward | SparseExperts:
    """What stands after the mixer of layer 0, 1, ...: of n layers the last has the experts (GShard)."""
    if not config.experts or (layer + 1) % config.expert_every:
        return FeedForward(config.dim, config.hidden)
    return SparseExperts(
        config.dim,
        config.expert_hidden or max(1, config.hidden // config.expert_top_k),
        config.experts,
        config.expert_top_k,
        shared_hidden=config.expert_shared,
        selection_bias=config.expert_bias_rate > 0,
    )


class Block(nn.Module):
    """One layer: `x + mixer(norm(x))`, then `x + mlp(norm(x))`. Norm weights start at 1."""

    # What ends in the residual stream.
    OUT = ("mixer.out.weight", "mlp.out.weight", "mlp.w_down", "mlp.shared.out.weight")

    def __init__(self, config: SmallLMConfig, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim)
        self.mixer = MIXERS[config.layers[layer]](config)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp = _mlp(config, layer)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, cache=None
    ) -> tuple[Tensor, Routing | None]:
        """x `[B, T, C]` -> the same, and where the tokens went if the layer has experts."""
        x = x + self.mixer(self.mixer_norm(x), cu_seqlens=cu_seqlens, cache=cache)  # [B, T, C]
        if isinstance(self.mlp, SparseExperts):
            y, routing = self.mlp(self.mlp_norm(x), return_routing=True)
            return x + y, routing
        return x + self.mlp(self.mlp_norm(x)), None


class SmallLM(nn.Module):
    """Byte-level language model with tied embeddings.

    Initial values: embedding normal, std `dim ** -0.5`, so that tied logits have variance 1 and the first
    loss is ln V + 1/2 (std 0.02 was tried on the 1m preset: about 0.5 bits per byte worse after 300 steps);
    projections normal, std `in_features ** -0.5`, where they end in the residual stream (`Block.OUT`)
    divided by `sqrt(2 * num_layers)`, so that its variance does not grow with depth (GPT-2); norms 1;
    sinks 0; of L and H layers and experts, the rest as `nn.LinearAttention`, `nn.HybridAttention` and
    `nn.SparseExperts` say.

    Args:
        config: the shape.
        checkpoint_activations: keep only each layer's input for the backward and compute the rest again.

    Kernels are chosen per call; `slmkernels.use_backend` forces one.
    """

    def __init__(self, config: SmallLMConfig, *, checkpoint_activations: bool = False):
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        with torch.no_grad():
            for block in self.blocks:
                for name, parameter in block.named_parameters():
                    if name in Block.OUT:
                        parameter /= (2 * config.num_layers) ** 0.5

    def num_parameters(self) -> int:
        """Parameters, embeddings included (tied, so counted once)."""
        return sum(p.numel() for p in self.parameters())

    def hidden_states(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None, caches: list | None = None
    ) -> Tensor:
        """Everything but the logits: tokens `[B, T]` -> `[B, T, C]`."""
        return self._run(tokens, cu_seqlens, caches)[0]

    def _run(self, tokens, cu_seqlens=None, caches=None) -> tuple[Tensor, list[Routing]]:
        """Hidden states, and the routing of every layer that has experts."""
        x, routings = self.embedding(tokens), []  # [B, T, C]
        for i, block in enumerate(self.blocks):
            if caches is not None:
                x, routing = block(x, cache=caches[i])
            elif self.checkpoint_activations and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, cu_seqlens, use_reentrant=False)
            else:
                x, routing = block(x, cu_seqlens)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `[..., C]` -> scores of the next token `[..., V]`."""
        return F.linear(x, self.embedding.weight)

    def routing_loss(self, routings: list[Routing]) -> Tensor:
        """What to add to the loss for the experts' sake, [], float32: the load-balance loss and the z-loss of
        every layer that has experts, times `config.expert_balance` and `config.expert_z`."""
        c, zero = self.config, self.embedding.weight.new_zeros((), dtype=torch.float32)
        losses = (c.expert_balance * r.load_balance_loss() + c.expert_z * r.z_loss() for r in routings)
        return sum(losses, start=zero)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_routings: bool = False,
    ) -> Tensor | tuple:
        """Score the next token everywhere.

        Args:
            tokens: integer `[B, T]`.
            targets: `[B, T]`, the token after each; -100 is left out of the loss.
            cu_seqlens: int32 `[N+1]`, documents packed along T (B must be 1).
            return_routings: also return where the tokens went. Training a model with experts needs it: the
                loss to go down is `loss + model.routing_loss(routings)`.

        Returns:
            logits `[B, T, V]`; with targets also the mean cross-entropy in nats, float32; with
            return_routings also a list, a `Routing` for each layer that has experts.
        """
        self._check_tokens("tokens", tokens)
        x, routings = self._run(tokens, cu_seqlens)
        results = (self.logits(x),)  # [B, T, V]
        if targets is not None:
            hint = f"shape {list(tokens.shape)} like tokens"
            expect(targets.shape == tokens.shape, "targets", targets, hint)
            results += (F.cross_entropy(results[0].float().flatten(0, 1), targets.flatten()),)
        if return_routings:
            results += (routings,)
        return results if len(results) > 1 else results[0]

    def new_caches(self, batch: int, max_length: int | None = None) -> list:
        """One empty cache a layer: `window` tokens in S, `max_length` in F, a state in L, both in H."""
        return [block.mixer.new_cache(batch, max_length or self.config.max_seq_len) for block in self.blocks]

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue a prompt, token by token, as an iterator: `for token in model.generate(...)`.

        Args:
            prompt: integer `[B, T]`, T >= 1.
            max_new_tokens: how many tokens to yield. Memory does not depend on it, except in F layers, whose
                caches keep every token: there T + max_new_tokens must not pass `config.max_seq_len`.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it.
            top_k: sample among the k likeliest only.
            generator: source of randomness, on the model's device; torch's own if None.

        Yields:
            the next tokens, int64 `[B]`.

        Raises:
            ValueError: an argument is not as above, at the call and not at the first token.
        """
        self._check_tokens("prompt", prompt)
        T = prompt.shape[1]
        expect(T >= 1, "prompt", prompt, "at least one token a row")
        expect(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "an int >= 0")
        expect(temperature >= 0, "temperature", temperature, "a number >= 0")
        expect(top_k is None or top_k >= 1, "top_k", top_k, "an int >= 1 or None")
        limit = self.config.max_seq_len
        if "F" in self.config.layers and T + max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens} after a prompt of {T}; expected at most "
                f"{max(limit - T, 0)}: full-attention layers hold max_seq_len={limit} tokens (the others any)"
            )
        return self._stream(prompt, max_new_tokens, temperature, top_k, generator)

    @torch.no_grad()
    def _stream(self, tokens, max_new_tokens, temperature, top_k, generator) -> Iterator[Tensor]:
        caches = self.new_caches(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            x = self.hidden_states(tokens, caches=caches)[:, -1]  # [B, C]
            token = sample(self.logits(x).float(), temperature, top_k, generator)  # [B]
            yield token
            tokens = token[:, None]  # [B, 1]

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        expect(isinstance(tokens, Tensor), name, tokens, "an integer tensor [B, T]", TypeError)
        integer = tokens.dtype in (torch.int64, torch.int32)
        expect(integer and tokens.ndim == 2, name, tokens, "int64 or int32 of shape [B, T]")


def sample(
    logits: Tensor, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token a row from logits `[B, V]` -> int64 `[B]`; the likeliest at temperature 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    logits = logits - logits.amax(dim=-1, keepdim=True)  # a small temperature must not make two infinities
    p = torch.softmax(logits / temperature, dim=-1)  # [B, V]
    return torch.multinomial(p, 1, generator=generator)[:, 0]
