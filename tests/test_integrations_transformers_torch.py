"""transformers models on our kernels inside PyTorch's machinery: compiled, exported, autocast and so on."""

import contextlib

import pytest
import torch
from test_integrations_transformers import (
    LENGTHS,
    LOGITS,
    T,
    alone,
    forward_backward,
    packed,
    padded,
    relative,
    same,
)
from transformers_models import decoder, tokens, transformers

from slmkernels.integrations.transformers import accelerated

some = pytest.mark.parametrize("name", ["mistral", "gpt_oss", "qwen3_next"])


@pytest.fixture(autouse=True)
def fresh():
    transformers.logging.set_verbosity_error()
    torch._dynamo.reset()


class Compiled(torch.nn.Module):
    """A model behind torch.compile, with its parameters by their own names."""

    def __init__(self, model):
        super().__init__()
        self.run = torch.compile(model, fullgraph=True, backend="aot_eager")
        self.named_parameters, self.zero_grad = model.named_parameters, model.zero_grad

    def forward(self, *arguments, **options):
        return self.run(*arguments, **options)


slow = pytest.mark.slow  # ten seconds each to trace


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("mistral", 0),
        ("qwen3_next", 7),
        pytest.param("mistral", 7, marks=slow),
        pytest.param("gpt_oss", 0, marks=slow),
        pytest.param("gpt_oss", 7, marks=slow),
        pytest.param("qwen3_next", 0, marks=slow),
    ],
)
def test_compiled_equals_eager(name, left):
    """One graph, forward and backward, also with padding."""
    model, ids = decoder(name), tokens(2, T)
    real = padded(ids, left=left) if left else None
    options = {"use_cache": False} | ({"attention_mask": real} if left else {})
    theirs = forward_backward(model, ids, real, **options)
    with accelerated(model):
        ours = forward_backward(Compiled(model), ids, real, **options)
    same(ours, theirs)


@pytest.mark.parametrize(
    ("name", "by_offsets"), [("mistral", False), pytest.param("gpt_oss", True, marks=slow)]
)
def test_compiled_documents(name, by_offsets):
    """By position_ids alone, or by offsets beside them, which GPT-OSS needs here."""
    model, ids = decoder(name), tokens(1, sum(LENGTHS))
    positions, offsets = packed(LENGTHS)
    options = {"position_ids": positions, "use_cache": False}
    if by_offsets:
        options |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    theirs = alone(model, ids)
    with accelerated(model):
        ours = forward_backward(Compiled(model), ids, **options)
    same(ours, theirs)


def test_compiled_masks_that_are_no_windows_are_refused():
    """Llama 4's chunks with a mask of ones, and blocks both ways."""
    from transformers_models import COMMON, randomised

    changes = {"intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 8}
    config = transformers.Llama4TextConfig(**{**COMMON, **changes})
    model = randomised(transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager"))
    ids = tokens(2, T)
    with accelerated(model), pytest.raises(RuntimeError, match="no window over packed documents"):
        torch.compile(model, backend="aot_eager")(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model = decoder("mistral")
    blocks = torch.full((1, T), -1).index_fill(1, torch.arange(5, 12), 0)
    mask = transformers.masking_utils.create_causal_mask
    made = torch.compile(mask, backend="aot_eager")
    with accelerated(model), pytest.raises(RuntimeError, match="no window over packed documents"):
        made(model.config, torch.zeros(1, T, 32), None, None, block_sequence_ids=blocks)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
def test_exported_program_equals_eager(name):
    model, ids = decoder(name), tokens(2, T)
    theirs = model(ids).logits.detach()
    with accelerated(model), torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    names = {node.target.name() for node in program.graph.nodes if hasattr(node.target, "name")}
    assert "slmkernels::sliding_window_forward" in names
    assert relative(program.module()(ids, use_cache=False).logits, theirs) < LOGITS


@some
def test_activation_checkpointing(name):
    model, ids = decoder(name).train(), tokens(2, T)
    theirs = forward_backward(model, ids, use_cache=False)
    model.gradient_checkpointing_enable()
    with accelerated(model):
        ours = forward_backward(model, ids, use_cache=False)
    same(ours, theirs)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo3"])
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bfloat16_is_as_near_to_float32_as_eager(name, autocast):
    """Models without experts: a router's choice jumps."""
    model, ids = decoder(name), tokens(2, T)
    exact = model(ids).logits.detach()
    model = model if autocast else model.bfloat16()
    within = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), within:
        theirs = model(ids).logits.float()
        with accelerated(model):
            ours = model(ids).logits.float()
    assert relative(ours, exact) < 2 * relative(theirs, exact)
