"""Tiny transformers models with random weights, one for each kind of layer that the integration serves."""

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.6", reason="needs transformers 5.6 or later")

WINDOW, VOCABULARY, PAD = 8, 128, 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
YARN_FREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

# name -> configuration class, what differs from COMMON
CONFIGS: dict[str, tuple[str, dict]] = {
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "num_hidden_layers": 6}),
    "gpt_oss": (
        "GptOssConfig",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, **YARN_FREE},
    ),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "sliding_window": None}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "head_dim": 8,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            **YARN_FREE,
        },
    ),
    "qwen3_next": ("Qwen3NextConfig", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
    "olmo_hybrid": ("OlmoHybridConfig", {**DELTA, "linear_num_key_heads": 4}),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **EXPERTS,
            "head_dim": 24,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
            "linear_num_heads": 2,
            "linear_head_dim": 16,
        },
    ),
}
DECODERS = tuple(CONFIGS)
WITH_DELTA = ("qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear")
WITH_EXPERTS = ("gpt_oss", "mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "qwen3_next", "kimi_linear")
WITH_WINDOW = ("mistral", "gemma2", "gemma3", "gpt_oss", "olmo3")


def config(name: str):
    """The configuration of a tiny model; skips where this transformers does not have it."""
    kind, changes = CONFIGS[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return getattr(transformers, kind)(**{**COMMON, **changes})


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that make every part count: sinks, norms and biases are not left at their first values.

    Decays are mild (exp(A_log) about 0.1): transformers takes differences of their sums over 64 tokens, and
    where these are hundreds its own gradients lose the digits that a comparison needs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("A_log"):
                p.copy_(0.5 * noise - 2)
            elif name.endswith("sinks"):
                p.copy_(noise)
            elif p.ndim < 2:
                p.add_(0.3 * noise)
            else:
                p.copy_(noise * p.shape[-1] ** -0.5)
    return model.eval()


def decoder(name: str, implementation: str = "eager") -> torch.nn.Module:
    """A causal language model on transformers' own path."""
    options = {"attn_implementation": implementation}
    torch.manual_seed(0)  # for the first values of biases and norms
    if name in WITH_EXPERTS:
        options["experts_implementation"] = "eager"
    return randomised(transformers.AutoModelForCausalLM.from_config(config(name), **options))


def encoder() -> torch.nn.Module:
    """ModernBERT: attention both ways, in windows and over all."""
    shape = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
    small = transformers.ModernBertConfig(
        **shape, local_attention=WINDOW, global_attn_every_n_layers=2, cls_token_id=3, sep_token_id=4
    )
    return randomised(transformers.AutoModelForMaskedLM.from_config(small, attn_implementation="eager"))


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random tokens `[batch, length]` that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)
