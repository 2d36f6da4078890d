"""Conversion of trained models to hybrid attention: what is learned, and what stays as it was."""

import pytest
import torch

from slmkernels.models import SmallLM, SmallLMConfig
from slmkernels.nn import HybridAttention, SlidingWindowAttention, hybrid_from_softmax
from slmkernels.train import attention_transfer, hybridize

LEARNED = ("q_map.weight", "k_map.weight", "mix_logit")


def model(**changes) -> SmallLM:
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "hidden": 48, "window": 6}
    return SmallLM(SmallLMConfig(**{**shape, "pattern": "SF", "max_seq_len": 64, **changes})).eval()


def text(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def states(steps: int) -> torch.Tensor:
    return torch.randn(steps, 4, 64, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["hedgehog", "taylor"])
@pytest.mark.parametrize("alignment", ["sliding", "block"])
def test_the_error_of_a_layer_falls_to_less_than_half(name, alignment):
    torch.manual_seed(0)
    softmax = SlidingWindowAttention(32, 2, 1, qk_norm=True)
    hybrid = hybrid_from_softmax(softmax, window=8, alignment=alignment, feature_map=name)
    losses = attention_transfer(softmax, hybrid, states(100))
    assert len(losses) == 100
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        x = states(101)[-1]
        assert (hybrid(x) - softmax(x)).square().mean() < losses[0] / 2


def test_only_maps_and_mix_are_learned():
    softmax = SlidingWindowAttention(32, 2, 1, qk_norm=True, bias=True)
    hybrid = hybrid_from_softmax(softmax, window=8)
    hybrid.k_norm.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in hybrid.named_parameters()}
    before = {name: p.clone() for name, p in hybrid.state_dict().items()}
    teacher = {name: p.clone() for name, p in softmax.state_dict().items()}
    attention_transfer(softmax, hybrid, states(2))
    for name, p in hybrid.named_parameters():
        assert torch.equal(p, before[name]) == (name not in LEARNED), name
        assert (p.requires_grad, p.grad) == (flags[name], None)
    assert all(torch.equal(p, teacher[name]) for name, p in softmax.state_dict().items())
    assert not softmax._forward_hooks


def test_flags_and_hooks_are_restored_after_an_error():
    softmax = SlidingWindowAttention(32, 2)
    hybrid = hybrid_from_softmax(softmax, window=8)
    with pytest.raises(ValueError, match=r"x is .*32 channels"):
        attention_transfer(softmax, hybrid, [torch.randn(1, 4, 31)])
    assert all(p.requires_grad for p in hybrid.parameters())
    assert not softmax._forward_hooks


def test_a_model_is_converted_and_taught():
    teacher = model()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    hybrid = hybridize(teacher, window=6, feature_map="taylor", feature_dim=8)
    assert hybrid.config.layers == "SHS"
    assert isinstance(hybrid.blocks[1].mixer, HybridAttention)
    assert not hybrid.training
    sequences = text(60, 4, 40)
    losses = attention_transfer(teacher, hybrid, sequences)
    assert losses[-1] < losses[0] / 2
    for name, p in teacher.state_dict().items():
        assert torch.equal(p, before[name]), name
        assert torch.equal(p, hybrid.state_dict()[name]), name
    again = SmallLM(hybrid.config)
    again.load_state_dict(hybrid.state_dict())
    assert torch.equal(again(sequences[0]), hybrid(sequences[0]))
    assert len(list(hybrid.generate(sequences[0][:, :5], 70))) == 70  # past what the full layer could hold


def test_each_layer_sees_the_states_of_the_softmax_model():
    """A hybrid layer that nothing is wrong with has no error, whatever the ones below it do."""
    teacher = model(pattern="F", num_layers=2)
    hybrid = hybridize(teacher, window=8)
    hybrid.blocks[1].mixer.window = 100
    first = hybrid.blocks[0].mixer, teacher.blocks[0].mixer
    x = teacher.blocks[0].mixer_norm(teacher.embedding(text(2, 40)))
    expected = (first[0](x) - first[1](x)).square().mean() / 2
    losses = attention_transfer(teacher, hybrid, [text(2, 40)])
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3)


def test_sliding_layers_are_converted_on_request():
    assert hybridize(model(), "S").config.layers == "HFH"
    hybrid = hybridize(model(), "FS", window=9, alignment="block")
    assert hybrid.config.layers == "HHH"
    assert {(b.mixer.window, b.mixer.alignment) for b in hybrid.blocks} == {(9, "block")}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"letters": "L"}, "letters is 'L'.*'F', 'S' or 'FS'"),
        ({"pattern": "S"}, {}, "model.config.layers is 'SSS'.*some of 'F'"),
        ({"pattern": "HF"}, {}, "model.config.layers is 'HFH'.*no H yet"),
        ({}, {"window": 9}, "window is 9.*6, that of the S layers that stay"),
        ({"sinks": True}, {}, "attention.sinks is"),
        ({"softcap": 5.0}, {}, "attention.softcap is 5.0"),
        ({}, {"feature_map": "identity"}, "hybrid_feature_map is 'identity'"),
    ],
)
def test_what_cannot_be_converted_is_named(changes, options, message):
    with pytest.raises(ValueError, match=message):
        hybridize(model(**changes), **options)


def test_pairs_are_needed():
    with pytest.raises(ValueError, match=r"hybrid is .*HybridAttention where `softmax`"):
        attention_transfer(model(), model(), [text(1, 8)])


def test_transfer_learns_under_no_grad_and_names_a_missing_teacher():
    torch.manual_seed(0)
    softmax = SlidingWindowAttention(32, num_heads=2, window=None)
    hybrid = hybrid_from_softmax(softmax, window=4)
    with torch.no_grad():
        assert len(attention_transfer(softmax, hybrid, states(2))) == 2
    with pytest.raises(ValueError, match="hybrid is"):
        attention_transfer(softmax, torch.nn.Sequential(hybrid), states(1))
    with pytest.raises(TypeError, match="model is"):
        hybridize(softmax)
