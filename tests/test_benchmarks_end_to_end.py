"""Whole models: the peers run PyTorch's operations and nothing of ours, and compute the same."""

import contextlib
import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import end_to_end, machine, memory, report, runner
from benchmarks import end_to_end_peers as peers
from benchmarks.cases import OURS, Unavailable, registry
from benchmarks.check import Expected
from slmkernels import RingCache, sliding_window_attention_step
from slmkernels.models import SmallLM, SmallLMConfig
from slmkernels.nn import sliding_window as module

CPU = torch.device("cpu")
RATES = machine.Rates(matmul=1e9, copy=1e9)
TRAINING = end_to_end.small_lm_case("1m", "training", small=True)
GENERATION = end_to_end.small_lm_case("1m", "generation", small=True)
INTEGRATION = "slmkernels.integrations.transformers"


def qkv(n, *, heads=4, kv_heads=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, n, h, size, generator=generator) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("prompt", [1, 5, 23])
def test_the_step_by_sdpa_is_ours_across_wraps(prompt):
    ours, theirs = (RingCache(1, 7, 2, 8) for _ in range(2))
    for i, n in enumerate([prompt] + 20 * [1]):
        q, k, v = qkv(n, seed=i)
        exact = sliding_window_attention_step(q.double(), k.double(), v.double(), _wide(ours))
        found = peers.sdpa_step(q, k, v, theirs)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        ours.append(k, v)
        assert theirs.length == ours.length


def _wide(cache):
    """A copy in float64."""
    wide = RingCache(1, cache.window, 2, 8, dtype=torch.float64)
    wide.k.copy_(cache.k), wide.v.copy_(cache.v), wide.position.copy_(cache.position)
    return wide


def test_the_step_by_sdpa_refuses_what_it_cannot_do():
    cache = RingCache(1, 7, 2, 8)
    with pytest.raises(Unavailable, match="without softcap"):
        peers.sdpa_step(*qkv(1), cache, softcap=5.0, sinks=None)
    peers.sdpa_step(*qkv(3), cache)
    with pytest.raises(Unavailable, match="empty cache"):
        peers.sdpa_step(*qkv(3), cache)


@pytest.mark.parametrize("case", [TRAINING, GENERATION], ids=["training", "generation"])
def test_peers_run_nothing_of_ours(case, monkeypatch):
    def ours(*args, **options):
        raise AssertionError("ours was called")

    monkeypatch.setattr(module, "sliding_window_attention_step", ours)
    monkeypatch.setattr(module, "sliding_window_attention", ours)  # what a new layer takes
    inputs = case.inputs(CPU)
    for peer in case.peers:
        peer.prepare(inputs).call()
    with pytest.raises(AssertionError, match="ours was called"):
        case.ours.prepare(inputs).call()
    assert module.sliding_window_attention_step is ours


def test_a_model_that_does_not_call_what_is_replaced_is_an_error():
    model = SmallLM(SmallLMConfig())
    before = [block.mixer.attend for block in model.blocks]
    with (
        pytest.raises(RuntimeError, match="ours would be compared with ours"),
        peers.pytorch_attention(peers.sdpa_band, model),
    ):
        pass
    assert [block.mixer.attend for block in model.blocks] == before
    linear = SmallLM(SmallLMConfig(pattern="SLHF"))
    with pytest.raises(Unavailable, match="layers H, L"), peers.pytorch_attention(peers.sdpa_band, linear):
        pass


def test_training_changes_the_weights_and_the_check_sees_the_gradient():
    run = TRAINING.ours.prepare(TRAINING.inputs(CPU))
    logits, gradient = (x.clone() for x in run.call())
    again, _ = run.call()
    assert not torch.equal(logits, again)
    assert gradient.abs().max() > 0
    assert TRAINING.outputs == ("logits", "dembedding")


def test_decoding_scores_like_the_whole_text():
    inputs = GENERATION.inputs(CPU)
    (found,) = GENERATION.ours.prepare(inputs).call()
    config = SmallLMConfig.preset("1m", dim=64, num_heads=2, num_kv_heads=1, hidden=64, window=16)
    whole = end_to_end._build_small_lm(config)(inputs["tokens"])[:, end_to_end.SMALL :]
    assert found.shape == (1, GENERATION.tokens, config.vocab_size)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_work_is_counted_by_parameters_and_tokens():
    full = registry()
    training, decoding = (full[f"end_to_end/small_lm_1m/{mode}/fp32"] for mode in ("training", "generation"))
    parameters = SmallLM(SmallLMConfig.preset("1m")).num_parameters()
    assert (training.tokens, decoding.tokens) == (2048, end_to_end.DECODED)
    assert training.flops == 6 * parameters * 2048
    assert decoding.bytes == 4 * parameters * end_to_end.DECODED
    assert full["end_to_end/small_lm_15m/generation/fp32"].bars == ((("PyTorch, *"), 1.5, 2),)


def test_tokens_and_bars_are_reported():
    found = runner.measure(GENERATION, CPU, RATES, rounds=2, with_memory=False)
    data = report.to_json({}, [found])["results"][0]
    assert data["tokens"] == end_to_end.SMALL_DECODED
    assert [c["status"] for c in data["candidates"]] == ["ok", "ok"]
    assert data["candidates"][1]["speedup"]["medians"] > 0


def test_memory_of_a_model_is_measured():
    if not memory.RESET_PEAK.exists():
        pytest.skip("needs Linux's /proc")
    found = memory.measure(GENERATION, [OURS, "PyTorch, SDPA"], CPU, small=True)
    assert set(found) == {OURS, "PyTorch, SDPA"}
    with pytest.raises(Unavailable, match="KeyError"):
        memory.measure(replace(GENERATION, name="none/such"), [OURS], CPU, small=True)
    assert memory.measure(GENERATION, [OURS], CPU, small=True)  # the process lives on


# ---- models of transformers --------------------------------------------------------------------------------


@pytest.fixture
def integration(monkeypatch):
    """A stand-in for ours, which scales the logits: 1 changes nothing."""
    pytest.importorskip("transformers")
    fake = types.ModuleType(INTEGRATION)
    fake.scale, fake.inside = 1.0, []

    @contextlib.contextmanager
    def accelerated(model):
        handle = model.lm_head.register_forward_hook(lambda module, args, logits: logits * fake.scale)
        fake.inside.append(model)
        try:
            yield types.SimpleNamespace(replaced=["attention, in the place of 'sdpa'", "experts: 4 x Mlp"])
        finally:
            handle.remove()

    fake.accelerated = accelerated
    monkeypatch.setitem(sys.modules, "slmkernels.integrations", types.ModuleType("slmkernels.integrations"))
    monkeypatch.setitem(sys.modules, INTEGRATION, fake)
    return fake


@pytest.mark.parametrize("mode", ["training", "generation"])
@pytest.mark.parametrize("style", peers.STYLES)
def test_models_of_transformers_are_checked_with_and_without_us(style, mode, integration):
    case = end_to_end.style_case(style, mode, small=True)
    inputs = case.inputs(CPU)
    expected = Expected.of(case, inputs)
    assert not integration.inside
    assert expected.check(case.peers[0])[0].passed
    assert not integration.inside  # the peer runs without us
    assert expected.check(case.ours)[0].passed
    assert integration.inside
    integration.scale = 1 + 1e-4
    assert not expected.check(case.ours)[0].passed
    assert case.backend(inputs) == "attention, experts"


def test_without_the_integration_ours_says_why(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, INTEGRATION, None)
    case = end_to_end.style_case("mistral", "training", small=True)
    with pytest.raises(Unavailable, match=INTEGRATION):
        case.ours.prepare(case.inputs(CPU)).call()


@pytest.mark.parametrize("style", peers.STYLES)
def test_parameters_that_a_token_meets(style):
    pytest.importorskip("transformers")
    assert peers.active_parameters(peers.build_style(style, small=False)) == end_to_end.PARAMETERS[style]


def test_the_sizes_are_those_of_the_bars():
    qwen, mistral = (peers.STYLES[name][1] for name in ("qwen3_next", "mistral"))
    assert (qwen["hidden_size"], qwen["num_hidden_layers"]) == (256, 4)
    assert (mistral["hidden_size"], mistral["num_hidden_layers"], mistral["sliding_window"]) == (256, 4, 256)
    assert end_to_end.STYLE_TOKENS | {"olmoe": 0} == {"qwen3_next": 1024, "mistral": 4096, "olmoe": 0}
    assert math.prod(bar.must for bars in end_to_end.BARS.values() for bar in bars) == 1.5 * 2 * 2
    pytest.importorskip("transformers")
    layers = peers.build_style("qwen3_next", small=True).config.layer_types
    assert layers == ["linear_attention"] * 3 + ["full_attention"]
