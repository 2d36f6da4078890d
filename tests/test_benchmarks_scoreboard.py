"""The scoreboard: one report with every row and figure, within its time, and the names of machines."""

import functools
import io
import json
import re
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import figures, machine, machine_kind, markdown, report, runner, scoreboard
from benchmarks.__main__ import RESULTS, _parser, _scoreboard_folder, main
from benchmarks.cases import OURS, Candidate, Run, registry
from benchmarks.check import Check

CPU = torch.device("cpu")
SMALL, FULL = registry(small=True), registry()
ENVIRONMENT = {"cpu": "a processor", "threads": 4, "torch": "2.13", "date": "2026-11-30T00:00:00Z"}
RATES = machine.Rates(matmul=1e9, copy=1e9)
GOOD, BAD = Check(1e-7, 1e-6, "o"), Check(1e-3, 1e-6, "o")
NAMES = (
    "sliding_window/standard/forward/fp32",
    "sliding_window/decode/step/bf16",
    "sliding_window/scaling_T_1024/forward_backward/fp32",
    "sliding_window/scaling_T_8192/forward_backward/fp32",
    "sliding_window/scaling_W_64/forward_backward/fp32",
    "linear/scaling_plain_4096/forward/fp32",
    "hybrid/scaling_4096/forward_backward/fp32",
    "experts/scaling_E_8/forward_backward/fp32",
    "experts/standard/forward/fp32",
    "end_to_end/small_lm_15m/training/fp32",
    "end_to_end/small_lm_15m/generation/fp32",
)
OVERHEAD = [
    {
        "operation": "route",
        "gradients": gradients,
        "microseconds_min": 4.5,
        "microseconds_median": 5.25,
        "add_min": 1.125,
        "bar": 8.375,
        "passed": not gradients,
    }
    for gradients in (False, True)
]


def measured(name, *samples, check=GOOD, **fields):
    return runner.Measurement(name, check=check, samples=list(samples), **fields)


def fake_run(names=NAMES, factor=1.0):
    results = []
    for i, name in enumerate(names, 1):
        peers = (
            measured("a peer", 0.03 * i),
            measured("a slower | peer", 0.04 * i),
            measured("bad", 1, check=BAD),
        )
        absent = runner.Measurement("gone", reason="needs a CUDA device")
        yardstick = runner.Measurement("another function", yardstick="less", samples=[0.001])
        ours = measured(OURS, 0.01 * i * factor, 0.011 * i * factor, extra_memory=2**20 * i)
        results.append(runner.Result(FULL[name], "native", RATES, [ours, *peers, yardstick, absent]))
    return report.to_json(ENVIRONMENT, results)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("report")
    run = fake_run()
    run |= {"overhead": OVERHEAD, "threads": [{"threads": 1, "results": fake_run(NAMES[:1], 3.0)["results"]}]}
    run = json.loads(json.dumps(run))
    scoreboard.write_report(run, tmp_path)
    return run, tmp_path, (tmp_path / "report.md").read_text()


def test_report_has_every_row(written):
    run, _, text = written
    lines = text.splitlines()
    for result in run["results"]:
        ours = result["candidates"][0]
        scaling = result["scaling"]
        if scaling:
            name = f"{result['operation']}, {scaling['curve']}"
            table = text.split(f"**{name}", 1)[1].split("\n\n")[1]
            row = next(line for line in table.splitlines() if line.startswith(f"| {scaling['at']} |"))
            assert f"| {ours['median_s'] * 1e3:.4g} |" in row
            assert row.count("WRONG") == 1
            continue
        at = next(i for i, line in enumerate(lines) if line.startswith(f"| **{result['case']}**"))
        rows = {line.split(" | ")[0].strip("| "): line for line in lines[at + 1 : at + 7]}
        names = (f"**{OURS}** (native)", "a peer", r"a slower \| peer", "bad", "another function (yardstick)")
        assert tuple(rows)[:5] == names
        peer = result["candidates"][1]
        assert f"| {peer['speedup']['medians']:.2f} | {peer['speedup']['minima']:.2f} |" in rows["a peer"]
        assert "1.0e-07 | 1.0e-06" in rows["a peer"]
        assert "| WRONG |" in rows["bad"]
    assert f"| gone | needs a CUDA device | {len(run['results'])} cases |" in lines


def test_report_of_models_has_tokens_a_second(written):
    _, _, text = written
    tokens = FULL["end_to_end/small_lm_15m/generation/fp32"].tokens
    seconds = 11 * 0.0105  # the median of the last case
    assert f"| {tokens / seconds:.0f} | {seconds / tokens * 1e3:.3g} |" in text
    assert "| end_to_end/small_lm_15m/generation/fp32 | PyTorch, * | 1.5 | 2 |" in text


def test_report_has_overheads_and_threads(written):
    _, _, text = written
    assert "| route | 4.5 | 5.25 | 1.12 | 8.38 | yes |" in text
    assert "| route, with gradients | 4.5 | 5.25 | 1.12 | 8.38 | NO |" in text
    assert f"| {NAMES[0]} | {OURS} | 4 | 3.00 |" in text
    assert f"| {NAMES[0]} | a peer | 4 | 1.00 |" in text


def test_every_figure_is_drawn_linked_and_small(written):
    _, folder, text = written
    expected = {"scoreboard", "sliding_window_attention", "sliding_window_attention_step", "expert_mlp"}
    expected |= {
        "training",
        "generation",
        "scaling_T",
        "scaling_W",
        "scaling_E",
        "scaling_threads",
        "overhead",
    }
    assert {path.stem for path in folder.glob("*.svg")} == expected
    assert {path.stem for path in folder.glob("*.png")} == expected
    assert set(re.findall(r"\]\((\w+)\.svg\)", text)) == expected
    assert all(path.stat().st_size < 60_000 for path in folder.glob("*.svg"))
    overview = (folder / "scoreboard.svg").read_text()
    assert ">Sliding window, forward<" in overview  # text stays text
    assert "a peer" in overview
    assert "another function" not in overview
    assert ">bad<" not in overview


def test_report_without_headlines_threads_or_overhead():
    run = fake_run(NAMES[1:2]) | {"overhead_reason": "ImportError: no module", "threads": []}
    text = markdown.render(run)
    assert "Not measured: ImportError: no module" in text
    assert "Scaling" not in text
    assert "![" not in text
    assert list(figures._headlines(run["results"])) == [NAMES[1]]


def test_headlines_are_cases():
    named = {name for name in figures.HEADLINES if not name.startswith("end_to_end/")}
    assert named <= set(FULL)
    assert {"end_to_end/small_lm_15m/training/fp32", "end_to_end/small_lm_15m/generation/fp32"} <= set(FULL)
    assert set(scoreboard.THREAD_CASES) <= set(figures.HEADLINES)


def test_scaling_cases_say_where_they_stand():
    for cases in (FULL, SMALL):
        for name, case in cases.items():
            assert ("scaling" in name) == (case.scaling is not None), name
            if case.scaling:
                assert case.scaling.axis in figures.AXES
                assert str(case.scaling.at) in name
    for axis in figures.AXES:
        assert sum(case.scaling is not None and case.scaling.axis == axis for case in FULL.values()) >= 4
    assert "T=8192 " in FULL["sliding_window/scaling_T_8192/forward_backward/fp32"].sizes
    assert "W=64" in FULL["sliding_window/scaling_W_64/forward_backward/fp32"].sizes
    assert "E=128 " in FULL["experts/scaling_E_128/forward_backward/fp32"].sizes


# ---- a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def known_rates(monkeypatch):
    """Measuring them takes longer than all else here."""
    monkeypatch.setattr(machine, "matmul_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 1e10)


def test_all_quick_writes_one_report(tmp_path, monkeypatch, capsys, known_rates):
    overhead = types.ModuleType("benchmarks.overhead")
    overhead.measure = lambda: OVERHEAD
    monkeypatch.setitem(sys.modules, "benchmarks.overhead", overhead)
    names = {"sliding_window/standard/forward_backward/fp32", "causal_conv1d/decode/step/fp32"}
    monkeypatch.setattr("benchmarks.__main__.registry", lambda small=False: {n: SMALL[n] for n in names})
    threads = torch.get_num_threads()
    try:
        assert main(["--all", "--quick", "--threads", "2", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    run = json.loads((tmp_path / "results.json").read_text())
    assert {result["case"] for result in run["results"]} == names
    assert [part["threads"] for part in run["threads"]] == [1]
    assert run["overhead"] == OVERHEAD
    assert all(len(c["samples"]) == c["rounds"] for result in run["results"] for c in result["candidates"])
    text = (tmp_path / "report.md").read_text()
    assert all(f"**{name}**" in text for name in names)
    assert all((tmp_path / name).exists() for name in re.findall(r"\]\((\w+\.svg)\)", text))
    assert "left out: it must be compiled" in text
    (tmp_path / "report.md").unlink()
    assert main(["--all", "--load", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "report.md").read_text() == text
    assert main(["--compare", *[str(tmp_path / "results.json")] * 2]) == 0
    assert "0 regressions" in capsys.readouterr().out


def test_where_the_scoreboard_goes(tmp_path):
    def folder(*arguments):
        return _scoreboard_folder(_parser().parse_args(["--all", *arguments]))

    assert folder() == RESULTS / machine_kind.kind(CPU)
    assert folder("--out", str(tmp_path)) == tmp_path
    assert RESULTS not in folder("--quick").parents


def case_with(*peers):
    return replace(SMALL[NAMES[0]], peers=peers)


def test_what_must_be_compiled_is_left_out_with_a_reason():
    case = case_with(Candidate("compiled", lambda inputs: 1 / 0, compiles=True))
    found = runner.measure(scoreboard.without_compilers(case, "why"), CPU, RATES, rounds=2, with_memory=False)
    assert found.measurements[1].reason == "why"


def test_a_slow_peer_has_one_sample_and_ours_all():
    def slow(inputs):
        run = SMALL[NAMES[0]].ours.prepare(inputs)
        return Run(lambda: (time.sleep(0.05), run.call())[1], run.ours)

    case = case_with(Candidate("slow", slow), Candidate("quick", SMALL[NAMES[0]].ours.prepare))
    found = runner.measure(case, CPU, RATES, rounds=4, with_memory=False, patience=0.045)
    assert [len(m.samples) for m in found.measurements] == [4, 1, 4]
    assert found.speedup(found.measurements[1])[0] > 1


def test_pace_shares_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scoreboard.time, "monotonic", lambda: now[0])
    pace = scoreboard.Pace(1.0, {"model": 4, "one": 1, "other": 1})
    assert pace.limit("one") == pytest.approx(scoreboard.SHARE * 10)
    assert pace.limit("model") == pytest.approx(scoreboard.SHARE * 40)
    now[0] = 30.0
    pace.done("one")
    assert pace.behind == pytest.approx(1 / 2 - 1 / 6)
    assert pace.limit("other") == pytest.approx(scoreboard.SHARE * 6)
    now[0] = 61.0
    assert pace.spent > 1
    assert pace.limit("other") == 0.0


def test_a_run_that_is_behind_leaves_out_compilers_and_memory(known_rates):
    case = case_with(Candidate("compiled", lambda inputs: 1 / 0, compiles=True))
    pace = scoreboard.Pace(1.0, {NAMES[0]: scoreboard.weight(case)})
    pace.start -= 30
    found = run_at(pace, case, with_memory=True)
    assert found.measurements[1].reason == "left out: the run is behind, and it must be compiled"
    assert found.memory_reason == "left out: the run is behind"
    assert found.ours.samples
    assert pace.left == 0


def run_at(pace, case, **options):
    console = Console(file=io.StringIO())
    keep = functools.partial(report.to_json, ENVIRONMENT)
    options = {"rounds": 2, "with_memory": False, "pace": pace, **options}
    return scoreboard.measure({case.name: case}, None, CPU, console, keep, **options)[0]


def test_cases_are_not_run_once_the_time_is_up(known_rates):
    pace = scoreboard.Pace(1.0, {NAMES[0]: 1})
    pace.start -= 61
    assert "the time of 1 minutes was up" in run_at(pace, SMALL[NAMES[0]]).ours.reason


# ---- names of machines -------------------------------------------------------------------------------------


def cpuinfo(vendor, family, model, flags=""):
    processor = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: A CPU\n"
    return 2 * (processor + f"flags\t\t: fpu {flags}\n\n")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (("AuthenticAMD", 25, 17), "amd-zen4"),
        (("AuthenticAMD", 25, 1), "amd-zen3"),
        (("AuthenticAMD", 23, 49), "amd-zen2"),
        (("AuthenticAMD", 26, 2), "amd-zen5"),
        (("GenuineIntel", 6, 143), "intel-sapphire-rapids"),
        (("GenuineIntel", 6, 85), "intel-skylake-sp"),
        (("GenuineIntel", 6, 85, "avx512_vnni"), "intel-cascade-lake"),
        (("GenuineIntel", 6, 85, "avx512_vnni avx512_bf16"), "intel-cooper-lake"),
        (("GenuineIntel", 6, 167), "intel-rocket-lake"),
        (("GenuineIntel", 6, 167, "amx_bf16 amx_tile"), "intel-sapphire-rapids"),  # a masked model
        (("GenuineIntel", 6, 173, "amx_tile amx_fp16"), "intel-granite-rapids"),
        (("GenuineIntel", 6, 999), "intel-family-6-model-999"),
        (("HygonGenuine", 24, 1), "hygongenuine-family-24-model-1"),
    ],
)
def test_names_of_processors(facts, name):
    assert machine_kind.cpu(cpuinfo(*facts)) == name


def test_processors_that_are_not_x86_have_the_name_of_their_architecture(monkeypatch):
    monkeypatch.setattr(machine_kind.platform, "machine", lambda: "aarch64")
    assert machine_kind.cpu("processor\t: 0\nCPU implementer\t: 0x41\n") == "aarch64"


def test_kind_has_the_cores(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo("AuthenticAMD", 25, 17))
    monkeypatch.setattr(machine_kind, "CPUINFO", path)
    monkeypatch.setattr(machine_kind.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert machine_kind.kind(CPU) == "cpu-amd-zen4-2-cores"
