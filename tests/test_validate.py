"""`python -m slmkernels validate`: it passes, and it catches whatever is planted."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rule import needs_native
from test_cli import refused

from slmkernels import dispatch, triton_support
from slmkernels.cli import main
from slmkernels.validate import DTYPES, SUBJECTS, validate
from slmkernels.validate.draws import Draws
from slmkernels.validate.layouts import LAYOUTS, laid_out
from slmkernels.validate.rule import deviation
from slmkernels.validate.runner import Call

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
every_subject = pytest.mark.parametrize("op", SUBJECTS)


COMMAND = ["validate", "--device", "cpu", "--backend", "native"]


def test_every_operation_is_there():
    steps = {f"{name}_step" for name, subject in SUBJECTS.items() if subject.steps}
    assert SUBJECTS.keys() | steps == dispatch.OPERATIONS.keys()


@needs_native
@every_subject
def test_passes(op, capsys):
    assert main([*COMMAND, "--op", op, "--seconds", "1"]) == 0
    out = capsys.readouterr().out
    assert all(dtype in out for dtype in DTYPES)
    assert out.splitlines()[-1].startswith("passed: ")


@every_subject
def test_a_seed_gives_the_same_cases_and_another_gives_others(op):
    def calls(first):
        return [Call(SUBJECTS[op], first + i, torch.bfloat16, CPU, False) for i in range(20)]

    one, two, other = calls(5), calls(5), calls(5_000_000)
    assert [x.sizes for x in one] == [x.sizes for x in two] != [x.sizes for x in other]
    assert len({x.layout for x in one}) > 2
    (tensors, options), (again, _), (another, _) = one[0].tensors(), two[0].tensors(), one[0].tensors(draw=1)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert any(not torch.equal(tensors[name], another[name]) for name in tensors if tensors[name].numel())
    assert not any(isinstance(x, torch.Tensor) and x.device != CPU for x in options.values())


def test_cases_reach_the_corners():
    """Empty and single sequences, primes, empty packed ones, every layout, every row of the table."""
    draws = {op: [SUBJECTS[op].draw(Draws(case)) for case in range(300)] for op in SUBJECTS}
    for op in ("sliding_window_attention", "linear_attention", "hybrid_attention", "causal_conv1d"):
        assert {0, 1, 127, 257} <= {sizes["T"] for sizes in draws[op]}
        assert any(0 in torch.tensor(sizes["packed"]).diff() for sizes in draws[op] if "packed" in sizes)
    windows = [(sizes["window"], sizes["T"]) for sizes in draws["sliding_window_attention"]]
    assert any(isinstance(w, int) and w > T > 1 for w, T in windows)
    assert any(isinstance(w, int) and w < T for w, T in windows)
    assert any(isinstance(w, tuple) for w, T in windows)
    assert len({(sizes["row"], sizes["normalize"]) for sizes in draws["linear_attention"]}) == 10
    assert {sizes["score"] for sizes in draws["route"]} == {"softmax", "sigmoid", "softmax_after_topk"}
    steps = [SUBJECTS["sliding_window_attention"].draw_steps(Draws(case)) for case in range(100)]
    assert sum(sum(x["split"]) > 2 * x["window"] for x in steps) > 20, "the ring wraps"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_numbers(layout):
    tensors = {"q": torch.randn(2, 5, 3, 4), "x": torch.randn(5, 4), "decay": torch.randn(3)}
    tensors["do"] = torch.ones(2, 5, 3, 4)
    given = laid_out(tensors, layout)
    assert all(torch.equal(given[name], x) for name, x in tensors.items())
    strides = {
        "dense": (60, 12, 4, 1), "transposed": (60, 4, 20, 1), "slice": (135, 27, 9, 1),
        "every other": (195, 39, 13, 2), "equal gradients": (60, 12, 4, 1),
    }  # fmt: skip
    assert given["q"].stride() == strides[layout]
    assert (given["do"].stride() == (0, 0, 0, 0)) == (layout == "equal gradients")


def test_the_rule():
    truth = torch.tensor([1.0, -torch.inf, 3.0], dtype=torch.float64)
    same = torch.tensor([1.1, -torch.inf, 3.0])

    def ratio(*values):
        return deviation("lse", torch.tensor(values), same, truth, torch.float32).ratio

    assert ratio(1.0, -torch.inf, 3.0) == 0
    assert ratio(1.0, -torch.inf, 3.1) == pytest.approx(0.5, rel=1e-3)
    assert ratio(1.0, -torch.inf, 3.3) > 1
    for wrong in (
        (1.0, 0.0, 3.0),
        (torch.nan, -torch.inf, 3.0),
        (1.0, torch.nan, 3.0),
        (1.0, -torch.inf, torch.inf),
    ):
        assert ratio(*wrong) == torch.inf
    assert "float16" in str(deviation("lse", same.half(), same, truth, torch.float32))
    assert deviation("lse", same[:2], same, truth, torch.float32).ratio == torch.inf
    integers = torch.arange(3)
    assert deviation("counts", integers, integers, integers, torch.float32).ratio == 0
    assert deviation("counts", integers + 1, integers, integers, torch.float32).ratio == torch.inf
    nothing = torch.full((3,), torch.nan)
    assert "PyTorch's own" in str(deviation("lse", same, nothing, truth, torch.float32))


def scaled_gradient(x):
    """x, with a gradient that is a tenth too large."""
    return x + 0.1 * (x - x.detach())


def plant(monkeypatch, module, name, defect):
    """`defect(function, *args, **kwargs)` in place of a public function of a backend; the reference stays."""
    path = f"slmkernels.validate.{module}.{name}"
    function = getattr(sys.modules[f"slmkernels.validate.{module}"], name)

    def planted(*args, backend, **kwargs):
        if backend == "reference":
            return function(*args, backend=backend, **kwargs)
        return defect(lambda *a, **k: function(*a, backend=backend, **k), *args, **kwargs)

    monkeypatch.setattr(path, planted)


def wrong_forward(function, *args, **kwargs):
    o, lse = function(*args, **kwargs)
    return 1.05 * o, lse


def wrong_lse(function, *args, **kwargs):
    o, lse = function(*args, **kwargs)
    return o, lse.nan_to_num(neginf=0.0)


def wrong_gradient(function, q, k, v, **kwargs):
    return function(q, k, scaled_gradient(v), **kwargs)


def one_nan(function, *args, **kwargs):
    o, state = function(*args, **kwargs)
    return o.masked_fill(torch.arange(o.numel()).view(o.shape) == o.numel() - 1, torch.nan), state


def crash(function, *args, **kwargs):
    raise RuntimeError("the planted crash")


def stuck_step(function, *args, cache, **kwargs):
    o = function(*args, cache=cache, **kwargs)
    cache.position -= (cache.position > 3).long()
    return o


def state_left_behind(function, q, k, v, state, **kwargs):
    state = tuple(x.clone() for x in state) if isinstance(state, tuple) else state.clone()
    return function(q, k, v, state, **kwargs)


def write_into_x(function, x, *args, **kwargs):
    y = function(x, *args, **kwargs)
    x.data.fill_(7.0)  # autograd does not see it
    return y


def another_choice(function, *args, **kwargs):
    routing = function(*args, **kwargs)
    return routing._replace(indices=routing.indices.flip(1))


DEFECTS = {
    "forward": ("sliding_window", "sliding_window_attention", wrong_forward, "o: error"),
    "infinities": ("sliding_window", "sliding_window_attention", wrong_lse, "lse: is not infinite where"),
    "gradient": ("linear", "linear_attention", wrong_gradient, "dv: error"),
    "nan": ("hybrid", "hybrid_attention", one_nan, "o: error nan"),
    "exception": ("causal_conv1d", "causal_conv1d", crash, "RuntimeError: the planted crash"),
    "ring": ("sliding_window", "sliding_window_attention_step", stuck_step, "decode steps of"),
    "hybrid ring": ("hybrid", "hybrid_attention_step", stuck_step, "decode steps of"),
    "state": ("linear", "linear_attention_step", state_left_behind, "decode steps of"),
    "argument": ("experts", "expert_mlp", write_into_x, "x changed during the call"),
    "integers": ("route", "route", another_choice, "indices: differs"),
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("defect", DEFECTS)
def test_catches(defect, capsys, monkeypatch, tmp_path):
    module, name, function, message = DEFECTS[defect]
    plant(monkeypatch, module, name, function)
    op, file = name.removesuffix("_step"), tmp_path / "out.json"
    one = [*COMMAND, "--op", op, "--dtype", "float32", "--json", str(file), "--case"]
    case = next(case for case in range(100) if main([*one, str(case)]) == 1)
    out = capsys.readouterr().out
    assert f"FAILED {op}, native, float32" in out
    assert message in out
    assert out.splitlines()[-1].startswith("FAILED: ")
    failures = json.loads(file.read_text())["failures"]
    failure = next(x for x in failures if message in f"{x['message']} {'decode steps of' * x['decode']}")
    assert failure["case"] == case
    assert failure["sizes"].keys() & {"H", "E", "C"}
    assert ("planted crash" in failure["trace"]) == (defect == "exception")
    again = shlex.split(failure["command"])
    assert again[:3] == ["python", "-m", "slmkernels"]
    assert main(again[3:]) == 1, "the line that is printed runs the failure again"
    assert f"case {failure['case']}: {failure['message']}" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(again[3:]) == 0


@needs_native
def test_json(tmp_path, capsys):
    file, ops = tmp_path / "new" / "out.json", ("route", "causal_conv1d")
    assert main([*COMMAND, "--op", *ops, "--seed", "3", "--seconds", "0", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert {"date", "commit", "torch", "triton", "slmkernels", "cpu", "isa", "device"} <= result[
        "environment"
    ].keys()
    assert (result["seed"], result["passed"], result["failures"]) == (3, True, [])
    rows = {(row["op"], row["backend"], row["dtype"]): row for row in result["rows"]}
    assert rows.keys() == {(op, "native", dtype) for op in ops for dtype in DTYPES}
    assert result["calls"] == sum(row["calls"] for row in rows.values()) >= 8
    for (op, _, _), row in rows.items():
        assert row["calls"] >= 1
        assert row["worst"].keys() == {"forward", "backward"} | (
            {"decode"} if op == "causal_conv1d" else set()
        )
        assert all(0 <= x <= 1 for x in row["worst"].values())


@pytest.mark.skipif(triton_support.INTERPRETED, reason="Triton's kernels run in its interpreter")
def test_a_backend_that_refuses_is_counted_and_proves_nothing(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert (
        main(["validate", "--device", "cpu", "--backend", "triton", "--op", "route", "--json", str(file)])
        == 1
    )
    assert "NOTHING RAN" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert sum(row["unsupported"] for row in rows) >= len(DTYPES)
    assert all((row["calls"], row["failures"]) == (0, 0) for row in rows)
    assert all(reason for row in rows for reason in row["reasons"])


@needs_native
def test_every_backend_gets_its_turns():
    report = validate(["route", "segment_mlp"], ["native"], ["float32", "float16"], seconds=2.0)
    calls = {op: sum(row.calls for row in report.rows if row.op == op) for op in ("route", "segment_mlp")}
    assert min(calls.values()) > 4
    assert report.passed


@pytest.mark.skipif(triton_support.ABSENT is not None, reason=str(triton_support.ABSENT))
def test_triton_in_its_interpreter():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    arguments = ["validate", "--device", "cpu", "--backend", "triton", "--op", "route", "--seconds", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "slmkernels", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computes garbage in bfloat16" in done.stdout
    assert "passed: 2 calls" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--op", "softmax"], "--op"),
        (["--backend", "reference"], "--backend"),
        (["--dtype", "int8"], "--dtype"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--seconds", "long"], "--seconds"),
        (["--seed", "-1"], "--seed is -1"),
        (["--case", "-1"], "--case is -1"),
        (["--case", "1", "--seconds", "2"], "no --seed and no --seconds"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--threads", "0"], "--threads is 0"),
        (["--json", "."], "is a folder"),
    ],
)
def test_refuses(more, message, capsys):
    assert message in refused(["validate", *more], capsys)
