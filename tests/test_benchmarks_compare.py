"""`--compare`: a regression is named, noise is not, and what cannot be compared says why."""

import copy
import io
import json
import random

import pytest
from rich.console import Console

from benchmarks import compare
from benchmarks.__main__ import main
from benchmarks.cases import OURS
from benchmarks.report import SCHEMA

ENVIRONMENT = {"cpu": "a processor", "threads": 2, "torch": "2.13", "date": "2026-11-30", "commit": "abc"}
CASE, OTHER, ALONE = "linear/plain/forward/fp32", "hybrid/standard/forward/fp32", "linear/long/forward/fp32"


def samples(seconds, seed, noise=0.1, n=11):
    """As a shared machine gives them: never faster than it can be, sometimes much slower."""
    draw = random.Random(seed)
    return [seconds * (1 + noise * draw.expovariate(2)) for _ in range(n)]


def candidate(name, taken, status="ok", reason=None):
    return {"name": name, "status": status, "reason": reason, "samples": taken}


def result(case, **times):
    return {
        "case": case,
        "flops": int(1e9),
        "bytes": int(1e6),
        "matmul_flops_per_second": 1e11,
        "copy_bytes_per_second": 1e10,
        "candidates": [candidate(name, taken) for name, taken in times.items()],
    }


def run(seed=0, ours=1.0, machine=1.0, noise=0.1, peer=3.0, environment=ENVIRONMENT):
    """A run in which ours takes `ours` ms in every case, all times `machine` of that."""
    draw = random.Random(seed)

    def taken(milliseconds):
        return samples(milliseconds * machine * 1e-3, draw.random(), noise)

    results = [
        result(CASE, **{OURS: taken(ours), "a peer": taken(peer), "another": taken(2 * peer)}),
        result(OTHER, **{OURS: taken(5), "a peer": taken(9)}),
        result(ALONE, **{OURS: taken(20)}),
    ]
    return {"schema": SCHEMA, "environment": dict(environment), "results": results}


def compared(old, new):
    console = Console(file=io.StringIO(), width=200)
    return compare.compare(old, new, console), console.file.getvalue()


def part(text, title):
    """The lines under a title."""
    return text.split(f"{title}:\n", 1)[1].split("\n\n")[0] if f"{title}:\n" in text else ""


def test_a_regression_is_named_with_its_figures():
    regressions, text = compared(run(0), run(1, ours=1.5))
    assert regressions == 1
    (line,) = part(text, "Regressions").splitlines()
    assert line.strip().startswith(f"{CASE}: 1.")
    assert "relative to a peer, another" in line
    assert "2 the same within noise" in text


def test_an_improvement_is_named_and_is_no_regression():
    regressions, text = compared(run(0), run(1, ours=0.6))
    assert regressions == 0
    assert CASE in part(text, "Improvements")


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_not_named(seed):
    regressions, text = compared(run(2 * seed), run(2 * seed + 1))
    assert regressions == 0, text
    assert "3 the same within noise" in text


def test_a_large_change_in_large_noise_is_not_named():
    noisy = {"noise": 3.0, "ours": 1.15}
    assert compared(run(0, noise=3.0), run(1, **noisy))[0] == 0


def test_minima_and_medians_must_agree():
    old, new = run(0), run(0)
    taken = new["results"][0]["candidates"][0]["samples"]
    best = taken.index(min(taken))
    new["results"][0]["candidates"][0]["samples"] = [x * (1 if i == best else 2) for i, x in enumerate(taken)]
    assert compared(old, new)[0] == 0  # something else ran besides, but once it was as fast as ever
    new["results"][0]["candidates"][0]["samples"] = [x * 2 for x in taken]
    assert compared(old, new)[0] == 1


def test_a_slow_phase_of_the_machine_is_no_regression_where_there_are_peers():
    regressions, text = compared(run(0), run(1, machine=1.4))
    named = part(text, "Regressions")
    assert CASE not in named
    assert OTHER not in named
    assert (regressions, ALONE in named) == (1, True)  # it has none, and only its time to go by


def test_another_machine_counts_relative_to_its_rates():
    other = {**ENVIRONMENT, "cpu": "another processor", "threads": 4}
    old, new = run(0), run(1, machine=2.0, environment=other)
    for found in new["results"]:
        found["matmul_flops_per_second"] /= 2
    regressions, text = compared(old, new)
    assert regressions == 0, text
    assert "differs: cpu: a processor -> another processor" in text
    assert "differs: threads: 2 -> 4" in text
    slower = copy.deepcopy(new)
    for found in slower["results"]:
        found["candidates"][0]["samples"] = [2 * x for x in found["candidates"][0]["samples"]]
    assert compared(old, slower)[0] == 3


def test_a_peer_that_became_faster_elsewhere_is_no_regression_of_ours():
    other = {**ENVIRONMENT, "torch": "2.14"}
    assert compared(run(0), run(1, peer=1.5, environment=other))[0] == 0
    assert compared(run(0), run(1, peer=1.5, ours=1.5, environment=other))[0] == 1


def test_missing_cases_are_listed_and_are_no_regression():
    old, new = run(0), run(1)
    gone = old["results"].pop(1)
    new["results"].pop(2)
    regressions, text = compared(old, new)
    assert regressions == 0
    assert f"only in the old run: {ALONE}" in text
    assert f"only in the new run: {gone['case']}" in text
    with pytest.raises(compare.NotComparable, match="no case in common"):
        compared({**old, "results": []}, new)


@pytest.mark.parametrize(("status", "reason"), [("wrong", None), ("absent", "RuntimeError: no kernel")])
def test_ours_wrong_or_gone_is_a_regression(status, reason):
    new = run(1)
    new["results"][0]["candidates"][0] |= {"status": status, "reason": reason}
    regressions, text = compared(run(0), new)
    assert regressions == 1
    assert f"{CASE}: was ok, is {status}" in part(text, "Regressions")
    assert (reason or "") in text
    assert f"{CASE}: was {status}" in part(compared(new, run(0))[1], "Improvements")


def test_few_samples_are_not_compared():
    new = run(1, ours=5.0)
    new["results"][0]["candidates"][0]["samples"] = [1.0]
    regressions, text = compared(run(0), new)
    assert regressions == 0
    assert CASE in part(text, "Not compared")


def test_other_numbers_of_threads_and_overheads_are_compared():
    old, new = run(0), run(1)
    old["threads"] = [{"threads": 1, "results": run(2)["results"]}]
    new["threads"] = [{"threads": 1, "results": run(3, ours=2.0)["results"]}]
    row = {"operation": "route", "gradients": True, "microseconds_min": 9.0, "bar": 10.0, "passed": True}
    old["overhead"] = [row]
    new["overhead"] = [{**row, "microseconds_min": 12.0, "passed": False}]
    regressions, text = compared(old, new)
    assert regressions == 2
    assert f"{CASE} (threads: 1)" in part(text, "Regressions")
    assert "overhead of route with gradients: 12.0 us, past its bar of 10.0 us" in text


def test_command_line(tmp_path, capsys):
    paths = [tmp_path / name for name in ("old.json", "same.json", "slower.json")]
    for path, data in zip(paths, (run(0), run(1), run(2, ours=2.0)), strict=True):
        path.write_text(json.dumps(data))
    assert main(["--compare", str(paths[0]), str(paths[1])]) == 0
    assert main(["--compare", str(paths[0]), str(paths[2])]) == 1
    assert CASE in part(capsys.readouterr().out, "Regressions")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "is not a run of these benchmarks"),
        ('{"a": 1}', "is not a run of these benchmarks"),
        ('{"schema": 1, "environment": {}, "results": []}', f"has schema 1; expected {SCHEMA}"),
    ],
)
def test_other_files_are_errors(text, message, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(run()))
    if text is not None:
        bad.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["--compare", str(good), str(bad)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "bad.json" in error
