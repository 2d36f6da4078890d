"""The command line: what it prints, what it leaves, and its exit codes."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmkernels.cli import main
from slmkernels.train.compare import training_step_times
from slmkernels.train.data import stdlib_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(next(f for f in stdlib_files() if f.name == "argparse.py").read_bytes())
    return str(file)


def fast(text, out, *more) -> list[str]:
    sizes = "--batch-size 2 --seq-len 32 --steps 4 --eval-tokens 64 --save-every 2 --log-every 1"
    return ["train", *sizes.split(), "--data", text, "--out", str(out), *more]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(fast(text, out)) == 0
    return out


def refused(arguments, capsys) -> str:
    """Runs a command that must fail: exit code 2, one line on stderr -> that line."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    assert (code, errors.count("\n"), "Traceback" in errors) == (2, 1, False), errors
    return errors


def test_train_prints_plain_lines_and_leaves_its_files(text, tmp_path, capsys):
    assert main(fast(text, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "step 4/4  loss" in out
    assert "bits per byte after 4 steps" in out
    assert "\x1b" not in out
    assert "\r" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "loss.png", "metrics.jsonl"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]


def test_resume_takes_its_settings_from_the_checkpoint(text, tmp_path, capsys):
    assert main(fast(text, tmp_path, "--stop-at", "2", "--pattern", "SF")) == 0
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert "1m SF" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert main(fast(text, tmp_path / "whole", "--pattern", "SF")) == 0
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line)["loss"] for line in whole if '"train"' in line]
    assert [loss for loss in losses if loss in kept] == kept


def test_generate_streams_and_repeats_with_its_seed(trained, capsys):
    command = ["generate", str(trained), "--prompt", "def é", "--max-new-tokens", "20", "--top-k", "30"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def é")
    assert texts[0].endswith("\n")


def test_info_and_no_command(capsys):
    assert main(["info"]) == 0
    info = capsys.readouterr().out
    assert "torch" in info
    assert main([]) == 0
    both = capsys.readouterr().out
    assert info.splitlines()[0] in both
    assert "usage: slmkernels" in both
    assert "generate" in both


def test_demo(tmp_path, capsys, monkeypatch):
    once = functools.partial(training_step_times, runs=1)
    monkeypatch.setattr("slmkernels.train.demo.training_step_times", once)
    (tmp_path / "checkpoint.pt").write_text("an earlier demo, which is replaced")
    assert main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in (
        "It goes on from 'def '",
        "bits per byte after 2 steps",
        "loss.png",
        "SDPA with a band mask",
    ):
        assert part in out
    assert "FlexAttention" in out
    assert "x ours" in out
    assert (tmp_path / "loss.png").exists()


def test_linear_attention_from_the_command_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = fast(text, "unused")
    command = command[: command.index("--out")]
    layers = ["--pattern", "L", "--linear-mode", "linear", "--linear-feature-map", "hedgehog"]
    assert main([*command, *layers]) == 0
    assert "1m L-linear-hedgehog, " in capsys.readouterr().out
    out = Path("runs/1m-L-linear-hedgehog")
    assert (out / "checkpoint.pt").exists()
    assert main([*command, *layers, "--resume", "--steps", "5"]) == 0
    assert main([*command, "--pattern", "SL", "--linear-mode", "gla"]) == 0
    assert Path("runs/1m-SL-gla/checkpoint.pt").exists()
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "x", "--max-new-tokens", "9", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) >= 2


def test_hybrid_attention_from_the_command_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = fast(text, "unused")
    command = command[: command.index("--out")]
    layers = ["--pattern", "H", "--hybrid-feature-map", "taylor", "--hybrid-feature-dim", "4"]
    assert main([*command, *layers, "--hybrid-alignment", "block"]) == 0
    name = "1m-H-taylor-4-block"
    assert f"{name.replace('-', ' ', 1)}, " in capsys.readouterr().out
    assert main(["generate", f"runs/{name}", "--max-new-tokens", "9"]) == 0
    assert main([*command, "--pattern", "LH"]) == 0
    assert Path("runs/1m-LH-gated_delta-hedgehog-sliding/checkpoint.pt").exists()
    capsys.readouterr()
    wrong = ["--pattern", "H", "--hybrid-feature-map", "elu", "--hybrid-feature-dim", "4"]
    assert "hybrid_feature_dim is 4" in refused([*command, *wrong], capsys)


def test_demo_of_linear_attention(tmp_path, capsys):
    command = ["demo", "--steps", "1", "--out", str(tmp_path), "--pattern", "L", "--linear-mode", "linear"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "layers L-linear, learns Python" in out
    assert "bits per byte after 1 steps" in out
    assert "no PyTorch attention to compare with" in out
    assert "x ours" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "7b"], "preset is '7b'"),
        (["--pattern", "SX"], "not 'X'"),
        (["--linear-mode", "rnn"], "linear_mode is 'rnn'"),
        (["--linear-feature-map", "elu"], "None with linear_mode 'gated_delta'"),
        (["--data", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--data", "*.nothing"], "matches nothing"),
        (["--seq-len", "0"], "seq_len is 0"),
        (["--seq-len", "99999999"], "seq_len needs at least"),
        (["--steps", "many"], "--steps"),
        (["--lr", "nan"], "lr is nan"),
        (["--lr", "1e30", "--warmup", "0", "--clip", "1e30"], "try a smaller --lr"),
        (["--threads", "0"], "--threads is 0"),
        (["--stop-at", "0"], "--stop-at is 0"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--backend", "fortran"], "--backend"),
        (["--resume"], "no checkpoint at"),
        (["--colour"], "unrecognized arguments"),
    ],
)
def test_train_refuses(text, tmp_path, capsys, more, message):
    assert message in refused(fast(text, tmp_path / "out", *more), capsys)


def test_train_refuses_to_overwrite_or_mix_runs(text, trained, tmp_path, capsys):
    assert "is there already; expected --resume" in refused(fast(text, trained), capsys)
    resume = ["train", "--resume", "--out", str(trained)]
    assert "pattern is 'S'; expected 'SSSF'" in refused([*resume, "--pattern", "S"], capsys)
    other = tmp_path / "other.txt"
    other.write_text("other text\n" * 100)
    assert "the text is not that of the checkpoint" in refused([*resume, "--data", str(other)], capsys)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in refused(fast(text, blocked / "out"), capsys)


def test_generate_refuses(trained, tmp_path, capsys):
    assert "no checkpoint at" in refused(["generate", str(tmp_path)], capsys)
    (tmp_path / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes()[:5000])
    assert "cannot be read" in refused(["generate", str(tmp_path)], capsys)
    assert "max_seq_len=2048" in refused(["generate", str(trained), "--max-new-tokens", "5000"], capsys)
    assert "temperature is -1.0" in refused(["generate", str(trained), "--temperature", "-1"], capsys)


def start(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "slmkernels", *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_saves_and_exits_130(text, tmp_path):
    process = start(*fast(text, tmp_path, "--steps", "1000000"))
    metrics, end = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert "saved to" in errors
    assert "--resume" in errors
    assert (tmp_path / "checkpoint.pt").exists()


def test_module_exits_with_the_code_of_main():
    process = start("generate", "nowhere")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("slmkernels generate: no checkpoint at 'nowhere'")
