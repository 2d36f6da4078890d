"""Whole transformers models on our kernels against transformers' own eager path, in float32."""

import contextlib

import pytest
import torch
from transformers_models import (
    DECODERS,
    VOCABULARY,
    WINDOW,
    WITH_DELTA,
    WITH_EXPERTS,
    WITH_WINDOW,
    decoder,
    encoder,
    tokens,
    transformers,
)

from slmkernels import Unsupported
from slmkernels.integrations.transformers import (
    NAME,
    accelerated,
    patch_gated_delta_rule,
    register,
    speedup,
    unpatch_gated_delta_rule,
)
from slmkernels.integrations.transformers import experts as experts_module

LOGITS, GRADIENTS = 2e-5, 1e-4  # relative, in the norm
T = 40  # five windows

every_decoder = pytest.mark.parametrize("name", DECODERS)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def relative(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=max(floor, 1e-30))).item()


def forward_backward(model, ids, real=None, **options):
    """Logits of the real tokens, and the gradients of all parameters by name."""
    model.zero_grad()
    logits = model(ids, **options).logits
    if real is not None:
        logits = logits * real[..., None]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs) -> None:
    """Logits and every gradient, each relative to its own norm (those 1e6 times smaller than the largest to
    that)."""
    assert relative(ours[0], theirs[0]) < LOGITS
    assert ours[1].keys() == theirs[1].keys()
    floor = 1e-6 * max(x.norm() for x in theirs[1].values())
    errors = {name: relative(ours[1][name], x, floor) for name, x in theirs[1].items()}
    assert max(errors.values()) < GRADIENTS, max(errors.items(), key=lambda item: item[1])


def padded(ids, left=0, right=0):
    """Padding in the first row, [B, T]."""
    real = torch.ones_like(ids)
    real[0, :left] = 0
    real[0, ids.shape[1] - right :] = 0
    return real


# --- parity


@every_decoder
def test_logits_and_gradients(name):
    model, ids = decoder(name), tokens(2, T)
    theirs = forward_backward(model, ids)
    with accelerated(model) as report:
        ours = forward_backward(model, ids)
    same(ours, theirs)
    assert not report.left
    parts = 1 + (name in WITH_EXPERTS) + (name in WITH_DELTA)
    assert len(report.replaced) == parts


@every_decoder
@pytest.mark.parametrize("sides", [{"left": 11}, {"right": 11}], ids=["left", "right"])
def test_padding(name, sides):
    model, ids = decoder(name), tokens(2, T)
    real = padded(ids, **sides)
    theirs = forward_backward(model, ids, real, attention_mask=real)
    with accelerated(model):
        ours = forward_backward(model, ids, real, attention_mask=real)
    same(ours, theirs)


@pytest.mark.parametrize("sides", [{}, {"left": 11}, {"right": 11}], ids=["whole", "left", "right"])
def test_attention_both_ways(sides):
    """ModernBERT, with windows on both sides."""
    model, ids = encoder(), tokens(2, T)
    real = padded(ids, **sides) if sides else None
    theirs = forward_backward(model, ids, real, attention_mask=real)
    with accelerated(model):
        ours = forward_backward(model, ids, real, attention_mask=real)
    same(ours, theirs)


def packed(lengths):
    """position_ids `[1, T]` and int32 offsets `[N + 1]` of documents of these lengths."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return positions, offsets


LENGTHS = (13, 1, 20, 6)


@every_decoder
def test_packed_documents(name):
    """Equal to each document alone on their path; with and without a cache being filled."""
    model, ids = decoder(name), tokens(1, sum(LENGTHS))
    positions, offsets = packed(LENGTHS)
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1).detach()
    options = {"position_ids": positions, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    options |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    with accelerated(model), torch.no_grad():
        for use_cache in (False, True):
            ours = model(ids, **options, use_cache=use_cache).logits
            assert relative(ours, alone) < LOGITS


def alone(model, ids):
    """Logits and gradients where each document is a text of its own."""

    class Apart:
        named_parameters, zero_grad = model.named_parameters, model.zero_grad

        def __call__(self, ids, **options):
            parts = [model(part, **options).logits for part in ids.split(LENGTHS, 1)]
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.cat(parts, 1))

    return forward_backward(Apart(), ids, use_cache=False)


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in WITH_DELTA])
def test_packed_documents_by_position_ids_alone(name):
    """As a batch collator without offsets gives them; gradients too. Every model but those of delta rules.

    transformers' own path mixes documents beside a cache, and GPT-OSS's without one, too: ours never.
    """
    model, ids = decoder(name), tokens(1, sum(LENGTHS))
    positions, _ = packed(LENGTHS)
    options = {"position_ids": positions, "use_cache": False}
    theirs = forward_backward(model, ids, **options) if name != "gpt_oss" else alone(model, ids)
    with accelerated(model):
        ours = forward_backward(model, ids, **options)
        with torch.no_grad():
            cached = model(ids, position_ids=positions, use_cache=True).logits
    same(ours, theirs)
    assert relative(cached, theirs[0]) < LOGITS


@pytest.mark.parametrize("name", WITH_DELTA)
def test_packed_documents_without_offsets_are_refused(name):
    """By whatever door, and no others: positions may grow by other steps than one."""
    model, (positions, _), ids = decoder(name), packed(LENGTHS), tokens(1, sum(LENGTHS))
    with accelerated(model):
        for call in (
            lambda: model(ids, position_ids=positions),
            lambda: model(ids, None, positions),
            lambda: model.model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)),
        ):
            with pytest.raises(Unsupported, match="cu_seq_lens_q is missing"):
                call()
        model(ids, position_ids=2 * torch.arange(sum(LENGTHS))[None], attention_mask=torch.ones_like(ids))


def test_positions_may_grow_by_any_steps():
    model, ids = decoder("mistral"), tokens(2, T)
    options = {"position_ids": 2 * torch.arange(T)[None], "attention_mask": torch.ones_like(ids)}
    theirs = forward_backward(model, ids, **options)
    with accelerated(model):
        same(forward_backward(model, ids, **options), theirs)


def test_blocks_that_do_not_nest():
    """The one that began first ends first: the other still runs on ours."""
    module = transformers.models.qwen3_next.modeling_qwen3_next
    theirs = module.torch_chunk_gated_delta_rule
    first, second = accelerated(decoder("qwen3_next")), accelerated(decoder("qwen3_next"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module.torch_chunk_gated_delta_rule is not theirs
    second.__exit__(None, None, None)
    assert module.torch_chunk_gated_delta_rule is theirs


# --- generation


def generated(model, ids, real, **options):
    settings = {"max_new_tokens": 3 * WINDOW, "min_new_tokens": 3 * WINDOW, "do_sample": False}
    return model.generate(ids, attention_mask=real, **settings, **options)


@every_decoder
@pytest.mark.parametrize("length", [5, 2 * WINDOW + 3])
def test_greedy_generation(name, length):
    """Token for token over several windows, from prompts below and above a window, with left padding."""
    model, ids = decoder(name), tokens(2, length)
    real = padded(ids, left=2)
    theirs = generated(model, ids, real)
    with accelerated(model):
        ours = generated(model, ids, real)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [*WITH_WINDOW, "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("left", [0, 3])
def test_generation_with_a_static_cache(name, left):
    model, ids = decoder(name), tokens(2, 2 * WINDOW + 3)
    real = padded(ids, left=left)
    theirs = generated(model, ids, real)
    with accelerated(model):
        ours = generated(model, ids, real, cache_implementation="static")
    assert torch.equal(ours, theirs)


def test_generation_of_one_row_without_a_mask():
    model, ids = decoder("gemma3"), tokens(1, 2 * WINDOW + 3)
    theirs = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    with accelerated(model):
        for implementation in ("dynamic", "static"):
            settings = {"max_new_tokens": 20, "min_new_tokens": 20, "cache_implementation": implementation}
            assert torch.equal(model.generate(ids, do_sample=False, **settings), theirs)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "qwen3_next", "kimi_linear"])
def test_any_split_of_a_text_with_a_cache(name):
    """A text in pieces through one cache equals the whole, whether several tokens follow or one."""
    model, ids = decoder(name), tokens(2, T)
    whole = model(ids).logits.detach()
    with accelerated(model), torch.no_grad():
        cache, logits = None, []
        for piece in ids.split([9, 1, 12, 1, 1, 16], 1):
            options = {} if cache is None else {"past_key_values": cache}
            out = model(piece, use_cache=True, **options)
            cache = out.past_key_values
            logits.append(out.logits)
    assert relative(torch.cat(logits, 1), whole) < LOGITS


def test_beam_search():
    model, ids = decoder("qwen3_next"), tokens(2, 12)
    settings = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    theirs = model.generate(ids, **settings)
    with accelerated(model):
        assert torch.equal(model.generate(ids, **settings), theirs)


# --- saving, names


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
def test_saved_inside_and_loaded_outside(name, tmp_path):
    model, ids = decoder(name), tokens(2, T)
    theirs = model(ids).logits.detach()
    with accelerated(model):
        model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert relative(again(ids).logits, theirs) < LOGITS
    register()
    options = {"attn_implementation": NAME, "experts_implementation": NAME}
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert ours.config._attn_implementation == ours.config._experts_implementation == NAME
    assert relative(ours(ids).logits, theirs) < LOGITS


def test_names_for_good():
    """`register` and the two setters, without the context manager."""
    model, ids = decoder("gpt_oss"), tokens(2, T)
    theirs = model(ids).logits.detach()
    register()
    model.set_attn_implementation(NAME)
    model.set_experts_implementation(NAME)
    assert relative(model(ids).logits, theirs) < LOGITS


def test_accelerated_puts_everything_back():
    model = decoder("qwen3_next")
    module = transformers.models.qwen3_next.modeling_qwen3_next
    before = vars(module).copy(), model.config._attn_implementation, model.config._experts_implementation
    with contextlib.suppress(ZeroDivisionError), accelerated(model) as report:
        assert module.torch_chunk_gated_delta_rule is not before[0]["torch_chunk_gated_delta_rule"]
        assert model.config._attn_implementation == model.config._experts_implementation == NAME
        with accelerated(model):  # inside itself
            pass
        assert module.torch_chunk_gated_delta_rule is not before[0]["torch_chunk_gated_delta_rule"]
        assert model.config._attn_implementation == NAME
        raise ZeroDivisionError
    after = vars(module).copy(), model.config._attn_implementation, model.config._experts_implementation
    assert after == before
    assert not model._forward_pre_hooks
    text = str(report)
    assert "in the place of 'eager'" in text
    assert "Qwen3NextExperts" in text
    assert "torch_chunk_gated_delta_rule" in text


def test_patch_names_what_it_replaced():
    module = transformers.models.qwen3_next.modeling_qwen3_next
    theirs = module.torch_chunk_gated_delta_rule
    done = patch_gated_delta_rule("qwen3_next")
    try:
        assert f"{module.__name__}.causal_conv1d_update" in done
        assert len(done) == 4
        assert patch_gated_delta_rule("qwen3_next") == []  # it is there already
        assert len(patch_gated_delta_rule(decoder("kimi_linear"))) == 4
    finally:
        unpatch_gated_delta_rule()
    assert module.torch_chunk_gated_delta_rule is theirs
    model = decoder("qwen3_next")
    with accelerated(model):
        patch_gated_delta_rule(model)
        unpatch_gated_delta_rule()  # the block goes on
        assert module.torch_chunk_gated_delta_rule is not theirs
    assert module.torch_chunk_gated_delta_rule is theirs
    with pytest.raises(Unsupported, match="'mistral' has no gated delta rule"):
        patch_gated_delta_rule("mistral")
    with pytest.raises(Unsupported, match="MistralForCausalLM has no gated delta rule"):
        patch_gated_delta_rule(decoder("mistral"))


def test_patch_of_every_family():
    done = patch_gated_delta_rule()
    unpatch_gated_delta_rule()
    there = {name for name in WITH_DELTA if hasattr(transformers.models, name)}
    assert {name.split(".")[2] for name in done} >= there


# --- refused


def test_what_has_no_kernel_is_refused():
    model, ids = decoder("mistral"), tokens(2, T)
    holes = torch.ones_like(ids)
    holes[0, 5:8] = 0
    own = torch.zeros(2, 1, T, T)
    with accelerated(model):
        with pytest.raises(Unsupported, match="padding between the real tokens"):
            model(ids, attention_mask=holes)
        with pytest.raises(Unsupported, match=r"mask of the caller's own \(torch.float32\[2, 1, 40, 40\]\)"):
            model(ids, attention_mask=own)
        with pytest.raises(Unsupported, match="output_attentions"):
            model(ids, output_attentions=True)


def test_dropout_is_refused_in_training_alone():
    model, ids = decoder("mistral"), tokens(2, T)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with accelerated(model):
        model(ids)
        with pytest.raises(Unsupported, match=r"dropout is 0.1; 0 is supported"):
            model.train()(ids)


def test_masks_that_are_no_windows_are_refused():
    """Gemma 3 both ways lets a text's future in by a function of its own."""
    model = decoder("gemma3")
    mask = transformers.masking_utils.create_causal_mask
    options = {"or_mask_function": lambda b, h, q, k: q >= 0}
    with accelerated(model), pytest.raises(Unsupported, match="attention_mask is made by or_masks"):
        mask(model.config, torch.zeros(1, T, 32), None, None, **options)


def test_experts_with_another_activation_are_left_alone():
    """And named directly, refused."""
    model, ids = decoder("mixtral"), tokens(2, T)
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Tanh()
    theirs = model(ids).logits
    with accelerated(model) as report:
        assert relative(model(ids).logits, theirs) < LOGITS
    assert "activation of MixtralExperts is none of swiglu" in report.left[0]
    model.set_experts_implementation(NAME)
    with pytest.raises(Unsupported, match="activation of MixtralExperts"):
        model(ids)


def test_limits_of_gpt_oss_that_are_others_are_seen():
    model = decoder("gpt_oss")
    module = model.model.layers[0].mlp.experts
    assert experts_module.recognise(module) == ("swigluoai", True)
    with accelerated(model):
        model(tokens(1, T))
        module.limit = 5.0  # also when it is known already
        with pytest.raises(Unsupported, match="none of"):
            model(tokens(1, T))


@pytest.mark.parametrize("name", [n for n in WITH_EXPERTS if n != "kimi_linear"])
def test_absent_experts(name):
    """Indices at num_experts, as expert parallelism sends them: nothing from there, and no gradient."""
    module = next(m for m in decoder(name).modules() if experts_module.has_experts(m))
    E = module.num_experts
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    index = torch.arange(60).view(30, 2) % E
    weights = torch.full((30, 2), 0.5)
    gone = torch.arange(30) % 3 == 0
    spoilt, zeroed = index.clone(), weights.clone()
    spoilt[gone, 1] = E
    zeroed[gone, 1] = 0
    weights.requires_grad_()
    y = experts_module.experts(module, x, spoilt, weights)
    y.sum().backward()
    torch.testing.assert_close(y, experts_module.experts(module, x, index, zeroed))
    assert not weights.grad[gone, 1].any()
    assert weights.grad[~gone].all()


def test_a_model_with_nothing_to_replace():
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)
    with (
        pytest.raises(Unsupported, match="BloomForCausalLM: nothing to replace"),
        accelerated(transformers.BloomForCausalLM(config)),
    ):
        pass


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model is 'Linear'"), accelerated(torch.nn.Linear(2, 2)):
        pass


# --- speedup


@pytest.mark.parametrize("training", [False, True])
def test_speedup_prints_what_it_measured(training):
    model = decoder("qwen3_next").train(training)
    result = speedup(model, tokens=T, batch=2, rounds=2)
    assert result.difference < LOGITS
    assert len(result.theirs) == len(result.ours) == 2
    text = str(result)
    kind = "forward and backward" if training else "forward"
    assert text.startswith(f"Qwen3NextForCausalLM, {kind}, 2 x {T} tokens: ")
    assert f"{result.ratio:.2f} times as fast" in text
    assert "Qwen3NextExperts" in text
    assert model.config._attn_implementation == "eager"
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="tokens is 0"):
        speedup(model, tokens=0)
