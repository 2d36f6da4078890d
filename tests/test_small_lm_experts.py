"""Experts in the reference model and its training: losses, metrics, selection bias, resume, generation."""

import dataclasses
import json
import math

import pytest
import torch

from slmkernels import cli
from slmkernels.models import SmallLM, SmallLMConfig
from slmkernels.models.small_lm import sample
from slmkernels.nn import FeedForward, SparseExperts, hold_frozen
from slmkernels.train import Corpus, Settings, Trainer, TrainError, load_corpus, load_model, train
from slmkernels.train import checkpoint as checkpoints
from slmkernels.train.data import encode, stdlib_files, training_batch
from slmkernels.train.plots import expert_curves, read_metrics
from slmkernels.train.settings import EXPERTS

FAST = Settings(
    steps=6, batch_size=2, seq_len=32, warmup=2, eval_tokens=64, eval_every=3, log_every=1, save_every=3,
    experts=4, expert_hidden=64, expert_shared=32, expert_every=2, expert_bias_rate=0.01, accumulate=2,
)  # fmt: skip
FIGURES = {"tokens_per_expert", "router_entropy", "load_balance"}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus([str(file) for file in stdlib_files()[:12]])


def small(**changes) -> SmallLM:
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden": 48, "window": 6}
    options = {"pattern": "SF", "max_seq_len": 64, "experts": 4, "expert_shared": 16}
    return SmallLM(SmallLMConfig(**{**shape, **options, **changes}))


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


def total_loss(model, tokens):
    _, loss, routings = model(tokens[:, :-1], tokens[:, 1:], return_routings=True)
    return loss + model.routing_loss(routings)


def state(trainer: Trainer) -> list[torch.Tensor]:
    moments = [x for s in trainer.optimizer.state.values() for x in s.values()]
    return [*trainer.model.state_dict().values(), *moments]


# The model


def test_experts_stand_in_every_nth_layer():
    kinds = [type(block.mlp) for block in small(num_layers=5, expert_every=2).blocks]
    assert kinds == [FeedForward, SparseExperts, FeedForward, SparseExperts, FeedForward]
    assert all(type(block.mlp) is SparseExperts for block in small().blocks)
    assert all(type(block.mlp) is FeedForward for block in small(experts=0, expert_shared=0).blocks)
    mlp = small(expert_top_k=3, expert_bias_rate=0.1).blocks[0].mlp
    assert (mlp.num_experts, mlp.top_k, mlp.hidden, mlp.shared.out.in_features) == (4, 3, 16, 16)
    assert mlp.selection_bias is not None
    assert small(expert_hidden=20).blocks[0].mlp.hidden == 20
    assert small(expert_shared=0).blocks[0].mlp.shared is None
    assert small().blocks[0].mlp.selection_bias is None


def test_what_ends_in_the_residual_stream_starts_smaller():
    model = small(dim=128, hidden=256, num_layers=8)
    for block in model.blocks:
        for weight, fan_in in ((block.mlp.w_down, 128), (block.mlp.shared.out.weight, 16)):
            assert abs(weight.std() * (16 * fan_in) ** 0.5 - 1) < 0.1
        for weight in (block.mlp.w_gate_up, block.mlp.router):
            assert abs(weight.std() * 128**0.5 - 1) < 0.15


def test_losses_of_the_router_stay_beside_the_cross_entropy():
    model, tokens = small(expert_balance=0.5, expert_z=0.25), text(2, 17)
    logits, loss, routings = model(tokens[:, :-1], tokens[:, 1:], return_routings=True)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, plain)
    assert torch.equal(model(tokens[:, :-1], tokens[:, 1:])[1], loss)
    assert torch.equal(model(tokens[:, :-1]), logits)
    assert len(model(tokens[:, :-1], return_routings=True)[1]) == len(routings) == 2
    expected = sum(0.5 * r.load_balance_loss() + 0.25 * r.z_loss() for r in routings)
    torch.testing.assert_close(model.routing_loss(routings), expected)
    assert model.routing_loss(routings) > 1  # each load-balance loss is about 1
    assert all(r.counts.sum() == 2 * 16 * 2 for r in routings)
    dense = small(experts=0, expert_shared=0)
    assert dense.routing_loss(dense(tokens, return_routings=True)[1]) == 0


def test_every_parameter_learns():
    model = small()
    total_loss(model, text(4, 60)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for flag in (False, True):
        model = small(expert_balance=1.0)
        model.checkpoint_activations = flag
        total_loss(model, text(2, 17)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_losses_of_the_router_have_gradients_through_checkpointed_activations():
    model = small()
    model.checkpoint_activations = True
    _, _, routings = model(text(1, 9), text(1, 9), return_routings=True)
    model.routing_loss(routings).backward()
    assert all(block.mlp.router.grad.abs().max() > 0 for block in model.blocks)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_equals_computing_from_scratch(temperature):
    model, tokens = small(expert_bias_rate=0.1), text(2, 5)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
        for block in model.blocks:
            block.mlp.selection_bias.copy_(torch.linspace(-0.1, 0.1, 4))
    ours, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    generated = torch.stack(list(model.generate(tokens, 40, temperature=temperature, generator=ours)), dim=1)
    with torch.no_grad():
        for _ in range(40):
            token = sample(model(tokens)[:, -1], temperature, generator=theirs)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
    assert torch.equal(generated, tokens[:, 5:])


def test_packed_equals_separate():
    model, tokens = small(), text(1, 21)
    cu_seqlens = torch.tensor([0, 8, 8, 21], dtype=torch.int32)
    separate = torch.cat([model(tokens[:, :8]), model(tokens[:, 8:])], dim=1)
    torch.testing.assert_close(model(tokens, cu_seqlens=cu_seqlens), separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": -1}, "experts is -1"),
        ({"expert_top_k": 0}, "expert_top_k is 0"),
        ({"expert_top_k": 5}, "expert_top_k is 5.*at most the 4 experts"),
        ({"expert_hidden": 0}, "expert_hidden is 0"),
        ({"expert_shared": 1.5}, "expert_shared is 1.5"),
        ({"expert_every": 3}, "expert_every is 3.*at most num_layers 2"),
        ({"expert_balance": -1.0}, "expert_balance is -1.0"),
        ({"expert_balance": "x"}, "expert_balance is 'x'"),
        ({"expert_z": math.inf}, "expert_z is inf"),
        ({"expert_bias_rate": -0.1}, "expert_bias_rate is -0.1"),
        ({"experts": 0, "expert_top_k": 1}, "expert_top_k is 1.*2 without experts"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SmallLMConfig(**{"num_layers": 2, "experts": 4, **changes})


# Training


def test_it_learns(corpus):
    settings = dataclasses.replace(FAST, steps=30, batch_size=4, seq_len=64, accumulate=1, eval_tokens=1024)
    trainer = Trainer(settings, corpus)
    before = trainer.evaluate()["bpb"]
    while trainer.step < 30:
        trainer.train_step()
    assert 8 < before < 9
    assert trainer.evaluate()["bpb"] < 5  # measured: 4.3


def test_the_reported_loss_is_the_cross_entropy(corpus):
    """And the gradient is that of the sum with the router's losses."""
    trainer = Trainer(dataclasses.replace(FAST, expert_balance=1.0), corpus)
    model, plain, whole = trainer.model, 0.0, 0.0
    for i in range(2):
        _, loss, routings = model(*training_batch(corpus, 0, i, 2, 32), return_routings=True)
        plain, whole = plain + loss / 2, whole + (loss + model.routing_loss(routings)) / 2
    grads = torch.autograd.grad(whole, list(model.parameters()))
    figures = trainer.train_step()
    assert figures["loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert figures["bpb"] == pytest.approx(plain.item() / math.log(2), rel=1e-5)
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert whole > plain + 1
    tokens, targets = next(iter(training_validation(trainer)))
    assert trainer.evaluate()["loss"] == pytest.approx(model(tokens, targets)[1].item(), rel=1e-5)


def training_validation(trainer):
    from slmkernels.train.data import validation_batches

    s = trainer.settings
    return validation_batches(trainer.corpus, s.eval_tokens, s.batch_size, s.seq_len)


def test_metrics_of_experts(corpus, tmp_path):
    trainer = Trainer(FAST, corpus)
    micro = [trainer.model(*training_batch(corpus, 0, i, 2, 32), return_routings=True)[2] for i in range(2)]
    train(trainer, tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    lines = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert not any(FIGURES & set(r) for r in records if r["kind"] == "valid")
    for r in lines:
        assert [sum(layer) for layer in r["tokens_per_expert"]] == [2 * 2 * 32 * 2] * 2  # T k, summed
        assert [len(r[name]) for name in sorted(FIGURES)] == [2, 2, 2]
        assert all(0 < e <= math.log(4) + 1e-5 for e in r["router_entropy"])
    for layer in range(2):
        routings = [routings[layer] for routings in micro]
        assert lines[0]["tokens_per_expert"][layer] == sum(r.counts for r in routings).tolist()
        means = [sum(x.item() for x in xs) / 2 for xs in zip(*map(figures_of, routings), strict=True)]
        assert lines[0]["router_entropy"][layer] == pytest.approx(means[0], rel=1e-5)
        assert lines[0]["load_balance"][layer] == pytest.approx(means[1], rel=1e-5)
    names = {"checkpoint.pt", "loss.png", "experts.png", "metrics.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def figures_of(routing):
    return routing.entropy, routing.load_balance_loss()


def test_a_dense_run_tells_nothing_of_experts(corpus, tmp_path):
    defaults = {name: getattr(Settings(), name) for name in EXPERTS}
    train(Trainer(dataclasses.replace(FAST, **defaults, steps=1), corpus), tmp_path)
    assert not any(FIGURES & set(r) for r in read_metrics(tmp_path / "metrics.jsonl"))
    assert not (tmp_path / "experts.png").exists()
    assert "no step" in expert_curves(tmp_path / "metrics.jsonl", tmp_path / "experts.png")


def test_the_selection_bias_moves_by_the_counts_of_the_step(corpus):
    trainer = Trainer(FAST, corpus)
    layers = [block.mlp for block in trainer.model.blocks if isinstance(block.mlp, SparseExperts)]
    counts = torch.tensor(trainer.train_step()["tokens_per_expert"], dtype=torch.float32)
    for mlp, load in zip(layers, counts, strict=True):
        torch.testing.assert_close(mlp.selection_bias, 0.01 * (load.mean() - load).sign())
        assert mlp.selection_bias.any()
    loads = [trainer.train_step()["load_balance"] for _ in range(30)]
    assert all(max(layer) < 2 for layer in loads[-5:])


def test_without_a_rate_there_is_no_selection_bias(corpus):
    trainer = Trainer(dataclasses.replace(FAST, expert_bias_rate=0.0), corpus)
    trainer.train_step()
    assert not any("selection_bias" in name for name in trainer.model.state_dict())


def test_a_loss_that_is_not_finite_moves_no_bias(corpus):
    trainer = Trainer(FAST, corpus)
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.nan
    with pytest.raises(TrainError, match=r"loss is nan"):
        trainer.train_step()
    assert not trainer.model.blocks[1].mlp.selection_bias.any()


def test_resume_is_exact_to_the_bit(corpus, tmp_path):
    whole = Trainer(FAST, corpus)
    train(whole, tmp_path / "whole")
    train(Trainer(FAST, corpus), tmp_path / "parts", stop_at=3)
    second = Trainer(FAST, corpus)
    second.restore(tmp_path / "parts" / checkpoints.NAME)
    train(second, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    told = [
        [{k: v for k, v in r.items() if k not in ("tokens_per_s", "elapsed")} for r in ls] for ls in lines
    ]
    assert told[0] == told[1]
    model = load_model(tmp_path / "parts")
    assert model.config == second.model.config
    assert torch.equal(model(encode("def ")), second.model(encode("def ")))


def test_activation_checkpointing_changes_no_bit(corpus):
    runs = []
    for flag in (False, True):
        trainer = Trainer(FAST, corpus, checkpoint_activations=flag)
        figures = [trainer.train_step() for _ in range(3)]
        runs.append([(f["loss"], f["grad_norm"], f["tokens_per_expert"]) for f in figures])
    assert runs[0] == runs[1]


def test_checkpoints_from_before_experts_load_and_resume(corpus, tmp_path):
    dense = dataclasses.replace(FAST, **{name: getattr(Settings(), name) for name in EXPERTS})
    train(Trainer(dense, corpus), tmp_path, stop_at=3)
    content = checkpoints.read(tmp_path)
    for part in ("config", "settings"):
        for name in EXPERTS:
            del content[part][name]
    checkpoints.write(content, tmp_path / checkpoints.NAME)
    assert load_model(tmp_path).config == dense.model_config()
    Trainer(dense, corpus).restore(tmp_path / checkpoints.NAME)
    with pytest.raises(TrainError, match=r"experts is 4; expected 0"):
        Trainer(FAST, corpus).restore(tmp_path / checkpoints.NAME)


def test_frozen_experts_of_a_model_do_not_move(corpus):
    trainer = Trainer(FAST, corpus)
    hold_frozen(trainer.model, trainer.optimizer)
    mlp = trainer.model.blocks[1].mlp
    mlp.freeze(2)
    before = mlp.w_down.detach().clone()
    for _ in range(2):
        trainer.train_step()
    assert [torch.equal(a, b) for a, b in zip(mlp.w_down, before, strict=True)] == [False, False, True, False]


def test_bfloat16_autocast_learns(corpus):
    trainer = Trainer(dataclasses.replace(FAST, dtype="bfloat16"), corpus)
    losses = [trainer.train_step()["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]


def test_options_of_the_command_line(tmp_path, capsys):
    file = next(f for f in stdlib_files() if f.name == "argparse.py")
    sizes = "--batch-size 2 --seq-len 32 --steps 2 --eval-tokens 64 --log-every 1"
    experts = "--experts 4 --expert-top-k 1 --expert-hidden 32 --expert-shared 16 --expert-every 4"
    losses = "--expert-balance 0.02 --expert-z 0 --expert-bias-rate 0.001"
    run = ["train", "--data", str(file), "--out", str(tmp_path), *f"{sizes} {experts} {losses}".split()]
    assert cli.main(run) == 0
    assert "1m SSSF-4experts" in capsys.readouterr().out
    config = load_model(tmp_path).config
    values = {name: getattr(config, name) for name in EXPERTS}
    assert list(values.values()) == [4, 1, 32, 16, 4, 0.02, 0.0, 0.001]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert sum(line["tokens_per_expert"][0]) == 2 * 32
    assert cli.main(["generate", str(tmp_path), "--prompt", "def ", "--max-new-tokens", "5"]) == 0
    assert cli.main(["train", "--expert-top-k", "3", "--out", str(tmp_path / "x")]) == 2
    assert "expert_top_k is 3" in capsys.readouterr().err
