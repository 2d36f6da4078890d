"""The overhead benchmark: a row for every operation, and what the rows say. No times are asserted."""

import json

import pytest

from benchmarks import overhead
from slmkernels.dispatch import OPERATIONS


@pytest.fixture(scope="module")
def rows():
    return overhead.measure(rounds=2, calls=1)


def test_every_public_operation_has_its_rows(rows):
    found = {(row["operation"].split(" ")[0], row["gradients"]) for row in rows}
    steps = {name for name in OPERATIONS if name.endswith("_step")}
    assert found == {(name, False) for name in OPERATIONS} | {
        (name, True) for name in OPERATIONS.keys() - steps
    }
    assert len({(row["operation"], row["gradients"]) for row in rows}) == len(rows)


def test_rows_say_what_passes(rows):
    for row in rows:
        assert row["threads"] >= 1
        assert 0 < row["microseconds_min"] <= row["microseconds_median"]
        assert row["bar"] == pytest.approx((2 if row["gradients"] else 1) * (3 * row["add_min"] + 5))
        assert row["passed"] == (row["microseconds_min"] <= row["bar"])


@pytest.mark.parametrize("name", overhead.DIFFERENTIABLE)
def test_inputs_require_gradients_where_they_say(name):
    for gradients in (False, True):
        x, call = overhead.DIFFERENTIABLE[name](gradients)
        result = call()
        y = result.weights if name == "route" else result
        assert x.requires_grad == y.requires_grad == gradients


def test_the_command_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    code = overhead.main(["--rounds", "1", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert code == int(not all(row["passed"] for row in rows))
    assert "causal_conv1d_step" in capsys.readouterr().out
