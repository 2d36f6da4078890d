"""The recall benchmark: what its data asks, and a run of two steps."""

import json

import pytest
import torch

from benchmarks import recall
from benchmarks.recall import IGNORED, LENGTH, PAIRS, VOCABULARY, main, make_batch, shares


def batch(size: int = 50, pairs: int = PAIRS, seed: int = 0):
    return make_batch(size, pairs, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pairs", recall.TRAINING_PAIRS)
def test_every_query_has_one_right_answer(pairs):
    b = batch(pairs=pairs)
    assert b.tokens.shape == b.targets.shape == (50, LENGTH)
    for tokens, targets in zip(b.tokens.tolist(), b.targets.tolist(), strict=True):
        keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert set(keys) <= set(range(1, VOCABULARY // 2))
        assert set(values) <= set(range(VOCABULARY // 2, VOCABULARY))
        told, asked = dict(zip(keys, values, strict=True)), []
        for place, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if place < 2 * pairs or token == 0:
                assert target == IGNORED
            else:
                assert target == told[token]
                asked.append(token)
        assert sorted(asked) == sorted(keys)


def test_places_and_distances_are_those_of_the_pairs():
    b = batch()
    keys, values = b.tokens[:, : 2 * PAIRS : 2], b.tokens[:, 1 : 2 * PAIRS : 2]
    assert torch.equal(b.tokens.gather(1, b.queries), keys)
    assert torch.equal(b.targets.gather(1, b.queries), values)
    assert torch.equal(b.tokens.gather(1, b.queries - b.distances), values)
    assert b.distances.min() >= 1


def test_gaps_follow_the_power_law():
    """Those of the first pair: the others draw among the slots that are left."""
    gaps = (batch(20000, 4).queries[:, 0] - 8) // 2
    weights = torch.arange(1.0, 61.0) ** (recall.POWER - 1)
    for slot in (0, 1, 9):
        assert (gaps == slot).float().mean().item() == pytest.approx(
            (weights[slot] / weights.sum()).item(), abs=0.02
        )


def test_batches_repeat_with_their_seed():
    assert all(torch.equal(a, b) for a, b in zip(batch(), batch(), strict=True))
    assert not torch.equal(batch(seed=1).tokens, batch().tokens)


def test_shares_are_of_the_windows_that_layers_add():
    distances = torch.tensor([[1, 31], [32, 62], [63, 100]])
    assert shares(distances, 32, 2) == {"window": pytest.approx(2 / 6), "reach": pytest.approx(4 / 6)}


def test_sliding_layers_cannot_see_what_is_out_of_reach():
    """The key and value of a query past two windows change nothing: there S can only guess."""
    from slmkernels.models import SmallLM, SmallLMConfig

    b = batch(1)
    place = b.distances[0].argmax()
    assert b.distances[0, place] > 2 * 31
    changed = b.tokens.clone()
    changed[0, 2 * place + 1] = VOCABULARY - 1 if changed[0, 2 * place + 1] != VOCABULARY - 1 else 32
    for letter, sees in (("S", False), ("H", True)):
        torch.manual_seed(0)
        shape = {"dim": 16, "num_heads": 1, "num_kv_heads": 1, "hidden": 16, "window": 32}
        model = SmallLM(SmallLMConfig(num_layers=2, pattern=letter, vocab_size=VOCABULARY, **shape))
        with torch.no_grad():
            before, after = (model(tokens)[0, b.queries[0, place]] for tokens in (b.tokens, changed))
        assert (not torch.equal(before, after)) == sees


def test_two_steps_write_their_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recall, "HELD_OUT", 8)
    options = "--steps 2 --eval-every 1 --batch-size 2 --dim 16 --heads 1 --patterns H S --feature-map elu"
    assert main([*options.split(), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "H: step 2/2, loss" in out
    assert "95% not reached" in out
    run = json.loads((tmp_path / "recall.json").read_text())
    assert {"date", "commit", "torch"} <= set(run["environment"])
    assert (run["model"]["window"], run["training"]["steps"]) == (32, 2)
    assert 0.2 < run["queries"]["window"] < 0.6 < run["queries"]["reach"] < 0.9
    assert [result["pattern"] for result in run["runs"]] == ["H", "S"]
    for result in run["runs"]:
        assert [point["step"] for point in result["curve"]] == [1, 2]
        assert result["goal_step"] is None
        assert sum(part["queries"] for part in result["by_distance"]) == 8 * PAIRS
    assert all((tmp_path / f"recall.{suffix}").stat().st_size > 1000 for suffix in ("svg", "png"))


def test_wrong_options_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["--patterns", "X"])
    assert "pattern is 'X'" in capsys.readouterr().err
