"""The reference model: sizes, initial values, generation, packing, checkpointed activations."""

import math

import pytest
import torch

from slmkernels.models import PRESETS, SmallLM, SmallLMConfig
from slmkernels.models.small_lm import sample
from slmkernels.nn import FEATURE_MAPS
from slmkernels.nn.linear_attention import MODES

LINEAR = [{"linear_mode": mode} for mode in MODES if mode != "linear"]
LINEAR += [{"linear_mode": "linear", "linear_feature_map": name} for name in FEATURE_MAPS]


def small(**changes) -> SmallLM:
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "hidden": 48, "window": 6}
    return SmallLM(SmallLMConfig(**{**shape, "pattern": "SSF", "max_seq_len": 64, **changes}))


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "count"), [("1m", 1e6), ("5m", 5e6), ("15m", 15e6), ("50m", 50e6), ("125m", 125e6)]
)
def test_presets_have_the_size_of_their_name(name, count):
    with torch.device("meta"):
        model = SmallLM(SmallLMConfig.preset(name))
    assert abs(model.num_parameters() / count - 1) < 0.1
    assert model.config.dim // model.config.num_heads in (16, 32, 64, 96, 128, 256)  # what the kernels have


def test_every_preset_is_tested():
    assert list(PRESETS) == ["1m", "5m", "15m", "50m", "125m"]


def test_pattern_is_cycled_over_the_layers():
    assert SmallLMConfig(num_layers=6, pattern="SSF").layers == "SSFSSF"
    assert SmallLMConfig(num_layers=2, pattern="SSF").layers == "SS"
    windows = [block.mixer.window for block in small().blocks]
    assert windows == [6, 6, None]


def test_initial_values_are_those_of_the_docstring():
    model = SmallLM(SmallLMConfig.preset("1m", sinks=True))
    layers = model.config.num_layers
    expected = {"embedding.weight": 128**-0.5}
    for i in range(layers):
        expected[f"blocks.{i}.mixer.qkv.weight"] = 128**-0.5
        expected[f"blocks.{i}.mixer.out.weight"] = 128**-0.5 / (2 * layers) ** 0.5
        expected[f"blocks.{i}.mlp.gate_up.weight"] = 128**-0.5
        expected[f"blocks.{i}.mlp.out.weight"] = 512**-0.5 / (2 * layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name in expected:
            assert abs(parameter.std() / expected.pop(name) - 1) < 0.03, name
        else:
            assert (parameter == (0 if "sinks" in name else 1)).all(), name
    assert not expected


def test_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    tokens = text(4, 201)
    logits, loss = SmallLM(SmallLMConfig.preset("1m"))(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - (math.log(256) + 0.5)) < 0.1  # logits of variance 1 cost half a nat
    assert abs(logits.var().item() - 1) < 0.1
    assert loss.dtype == torch.float32
    assert logits.shape == (4, 200, 256)


def test_loss_is_the_mean_cross_entropy_and_can_skip_targets():
    model, tokens = small(), text(2, 9)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    logits, loss = model(tokens, targets)
    chosen = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, targets[:, :-1, None])
    torch.testing.assert_close(loss, -chosen.mean())


def test_a_change_leaves_what_stands_before_it():
    model, tokens = small(), text(1, 20)
    changed = tokens.clone()
    changed[0, 12] += 1
    before, after = model(tokens), model(changed % 256)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12], after[:, 12])


def test_packed_equals_separate():
    model, tokens = small(qk_norm=False, sinks=True), text(1, 21)
    cu_seqlens = torch.tensor([0, 8, 8, 21], dtype=torch.int32)
    separate = torch.cat([model(tokens[:, :8]), model(tokens[:, 8:])], dim=1)
    torch.testing.assert_close(model(tokens, cu_seqlens=cu_seqlens), separate, rtol=1e-4, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradients():
    tokens, grads = text(2, 17), []
    for flag in (False, True):
        model = small()
        model.checkpoint_activations = flag
        model(tokens, tokens.roll(-1, dims=1))[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointed_activations_save_memory():
    saved = []
    for flag in (False, True):
        model, bytes_ = small(), 0

        def pack(x):
            nonlocal bytes_
            bytes_ += x.numel() * x.element_size()
            return x

        model.checkpoint_activations = flag
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden_states(text(2, 64))
        saved.append(bytes_)
    assert saved[1] < saved[0] / 4


@pytest.mark.parametrize("pattern", ["S", "SSF", "F", "L", "SL"])
@pytest.mark.parametrize("prompt", [1, 5, 13])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_equals_computing_from_scratch(pattern, prompt, temperature):
    model, tokens = small(pattern=pattern), text(2, prompt)
    with torch.no_grad():
        model.embedding.weight.mul_(2)  # so that the choices are clear
    ours, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    options = {"temperature": temperature, "generator": ours}
    generated = torch.stack(list(model.generate(tokens, 40, **options)), dim=1)  # several windows of 6
    with torch.no_grad():
        for _ in range(40):
            token = sample(model(tokens)[:, -1], temperature, generator=theirs)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
    assert torch.equal(generated, tokens[:, prompt:])
    assert temperature == 0 or len(generated.unique()) > 10


def test_cached_logits_equal_the_whole_for_any_split():
    model, tokens = small(sinks=True), text(2, 30)
    with torch.no_grad():
        caches = model.new_caches(2)
        parts = [model.hidden_states(part, caches=caches) for part in tokens.split([1, 9, 1, 12, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(tokens), rtol=1e-4, atol=1e-4)


def test_memory_of_sliding_layers_does_not_grow():
    model = small(pattern="S", max_seq_len=8)

    def size(caches):
        return sum(
            x.numel() * x.element_size() for cache in caches for x in (cache.k, cache.v, cache.position)
        )

    assert size(model.new_caches(1, 10)) == size(model.new_caches(1, 1_000_000))
    caches = model.new_caches(1)
    before, pointers = size(caches), [cache.k.data_ptr() for cache in caches]
    with torch.no_grad():
        for _ in range(20):
            model.hidden_states(text(1, 3), caches=caches)
    assert size(caches) == before
    assert [cache.k.data_ptr() for cache in caches] == pointers
    assert len(list(model.generate(text(1, 4), 100))) == 100  # far past max_seq_len


def test_memory_of_linear_layers_does_not_grow():
    for mode in MODES:
        model = small(pattern="L", linear_mode=mode, max_seq_len=8)

        def held(caches):
            return [(x.data_ptr(), x.numel()) for cache in caches for x in cache.tensors()]

        sizes = [[n for _, n in held(model.new_caches(1, length))] for length in (1, 1_000_000)]
        assert sizes[0] == sizes[1]
        caches = model.new_caches(1)
        before = held(caches)
        with torch.no_grad():
            for _ in range(20):
                model.hidden_states(text(1, 3), caches=caches)
        assert held(caches) == before
    for pattern in ("L", "SL"):
        assert len(list(small(pattern=pattern, max_seq_len=8).generate(text(1, 4), 100))) == 100


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: "-".join(kind.values()))
def test_linear_layers_learn(kind):
    """A text that repeats after 16 bytes: to foretell it is to remember it."""
    model = small(pattern="L", num_layers=2, **kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = text(8, 16).repeat(1, 3), []
    for _ in range(50):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 3
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: "-".join(kind.values()))
def test_linear_layers_in_the_model(kind):
    """Packed documents, decoding in parts and recomputed activations change nothing."""
    model, tokens = small(pattern="SL", **kind), text(1, 30)
    cu_seqlens = torch.tensor([0, 8, 8, 30], dtype=torch.int32)
    options = {"rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        whole, caches = model.hidden_states(tokens), model.new_caches(1)
        parts = [model.hidden_states(part, caches=caches) for part in tokens.split([1, 9, 1, 12, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **options)
        separate = torch.cat([model(tokens[:, :8]), model(tokens[:, 8:])], dim=1)
        torch.testing.assert_close(model(tokens, cu_seqlens=cu_seqlens), separate, **options)
    gradients = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model(tokens, tokens.roll(-1, dims=1))[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_linear_layers_take_their_shape_from_the_configuration():
    mixer = small(pattern="L", rope_base=50.0).blocks[0].mixer
    assert (mixer.mode, mixer.num_heads, mixer.num_qk_heads, mixer.head_dim) == ("gated_delta", 2, 1, 16)
    for mode in set(MODES) - {"gated_delta"}:
        assert small(pattern="L", linear_mode=mode).blocks[0].mixer.num_qk_heads == 2
    assert small(pattern="L", linear_mode="retention", rope_base=50.0).blocks[0].mixer.rope_base == 50.0
    model = small(pattern="L", linear_mode="linear", linear_feature_map="relu")
    assert type(model.blocks[0].mixer.q_map) is FEATURE_MAPS["relu"]
    assert abs(model.blocks[0].mixer.out.weight.std() * (32 * 6) ** 0.5 - 1) < 0.1  # 1 / sqrt(2 layers) of it


def test_full_layers_bound_the_length_and_say_so_at_the_call():
    model = small()
    with pytest.raises(ValueError, match=r"max_new_tokens is 61.*prompt of 4.*at most 60.*max_seq_len=64"):
        model.generate(text(1, 4), 61)
    assert len(list(model.generate(text(1, 4), 60))) == 60


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0], [5.0, 0.0, 0.0, 4.0]])
    assert sample(logits, 0).tolist() == [1, 0]
    assert sample(logits, 1.0, top_k=1).tolist() == [1, 0]
    draws = torch.stack([sample(logits, 1.0, top_k=2) for _ in range(300)])
    assert set(draws[:, 0].tolist()) == {1, 2}
    assert set(draws[:, 1].tolist()) == {0, 3}
    share = (draws[:, 0] == 1).float().mean()
    assert abs(share - torch.sigmoid(torch.tensor(1.0))) < 0.1
    cold = torch.stack([sample(logits, 0.01) for _ in range(20)])
    assert (cold == torch.tensor([1, 0])).all()


def test_generation_repeats_with_its_seed():
    model, prompt = small(), text(1, 4)
    runs = [
        torch.cat(list(model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed))))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "SSX"}, "pattern is 'SSX'.*not 'X'"),
        ({"pattern": ""}, "pattern is ''"),
        ({"dim": 30, "num_heads": 4}, "num_heads is 4.*divisor of dim 30"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"window": 0}, "window is 0"),
        ({"num_layers": 1.5}, "num_layers is 1.5"),
        ({"linear_mode": "rwkv"}, "linear_mode is 'rwkv'.*one of linear, retention"),
        ({"linear_mode": "linear", "linear_feature_map": "cos"}, "linear_feature_map is 'cos'.*one of elu"),
        ({"linear_feature_map": "elu"}, "linear_feature_map is 'elu'.*None with linear_mode 'gated_delta'"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SmallLMConfig(**changes)


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match=r"preset is '2m'; expected one of 1m, 5m"):
        SmallLMConfig.preset("2m")
    model = small()
    with pytest.raises(ValueError, match=r"tokens is float32"):
        model(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"targets is .*shape \[1, 4\]"):
        model(text(1, 4), text(1, 5))
    with pytest.raises(ValueError, match=r"prompt is .*at least one token"):
        model.generate(text(1, 0), 4)
    for bad in ({"temperature": -1}, {"top_k": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            model.generate(text(1, 4), 4, **bad)
