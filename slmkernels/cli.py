"""The command line: `slmkernels train | generate | demo | validate | info`.

Whatever the user got wrong ends in one line on stderr and exit code 2; Ctrl-C in one line and 130.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from .dispatch import BACKENDS, Unsupported, use_backend
from .facts import info
from .train import Interrupted, Settings, Trainer, TrainError, demo, load_corpus, load_model, train
from .train import checkpoint as checkpoints
from .train.data import decode_stream, encode
from .train.settings import LAYERS
from .validate import BACKENDS as VALIDATED
from .validate import DTYPES, SUBJECTS, validate
from .validate.progress import ValidationProgress

DEMO_SETTINGS = ("steps", *LAYERS)  # that `demo` takes too


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line -> its exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        print(f"{info()}\n")
        parser.print_help()
        return 0
    try:
        if getattr(args, "threads", None) is not None:
            if args.threads < 1:
                raise TrainError(f"--threads is {args.threads}; expected an int >= 1")
            torch.set_num_threads(args.threads)
        with _backend(args):
            return args.run(args) or 0
    except BrokenPipeError:  # the reader of our output left; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (TrainError, Unsupported, OSError, MemoryError) as error:
        print(f"slmkernels {args.command}: {error or 'out of memory'}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"slmkernels {args.command}: {stop}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"slmkernels {args.command}: interrupted", file=sys.stderr)
    return 130


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _backend(args: argparse.Namespace):
    name = getattr(args, "backend", None)
    return use_backend(name) if isinstance(name, str) else contextlib.nullcontext()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="slmkernels", description="Fused attention for small language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("train", help="train a small language model on bytes of text")
    for field in dataclasses.fields(Settings):
        _add_setting(command, field)
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (default: runs/PRESET-LAYERS)"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from --out's checkpoint, with its settings"
    )
    command.add_argument(
        "--stop-at", type=int, metavar="STEP", help="stop early, as if interrupted; --resume goes on"
    )
    command.add_argument("--checkpoint-activations", action="store_true", help="less memory, more computing")
    _add_common(command)
    command.set_defaults(run=_train)

    command = commands.add_parser("generate", help="continue a prompt with a trained model")
    command.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run"
    )
    command.add_argument("--prompt", default="", metavar="TEXT", help="what to continue")
    command.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="INT", help="bytes to write (default: 256)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="FLOAT", help="0: likeliest (default: 0.8)"
    )
    command.add_argument("--top-k", type=int, metavar="INT", help="draw among the likeliest only")
    command.add_argument("--seed", type=int, default=0, metavar="INT", help="of the draws (default: 0)")
    _add_common(command)
    command.set_defaults(run=_generate)

    command = commands.add_parser(
        "demo", help="train for a minute, sample, plot and compare with PyTorch's attention"
    )
    for field in dataclasses.fields(Settings):
        if field.name in DEMO_SETTINGS:
            _add_setting(command, field)
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo"
    )
    _add_common(command)
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "validate", help="random calls of every operation on every backend, against float64"
    )
    command.add_argument(
        "--op",
        nargs="+",
        choices=SUBJECTS,
        default=tuple(SUBJECTS),
        metavar="NAME",
        help=(f"only these (default: all: {', '.join(SUBJECTS)})"),
    )
    command.add_argument(
        "--backend",
        nargs="+",
        choices=VALIDATED,
        default=VALIDATED,
        metavar="NAME",
        help="only these: native, triton (default: both)",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="NAME",
        help=f"only these: {', '.join(DTYPES)} (default: all; on cuda all but float64)",
    )
    command.add_argument(
        "--seconds",
        type=float,
        metavar="FLOAT",
        help="of all together (default: 60); 0: one case in every dtype",
    )
    command.add_argument("--seed", type=int, metavar="INT", help="of the cases (default: 0)")
    command.add_argument(
        "--case", type=int, metavar="INT", help="run this one alone, as a failure's line says"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    _add_machine(command)
    command.set_defaults(run=_validate)

    command = commands.add_parser("info", help="what is installed, and why something is not")
    command.set_defaults(run=lambda args: print(info()))
    return parser


def _add_setting(command: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if field.name == "data":
        command.add_argument(flag, nargs="+", metavar="PATH", help=text)
        return
    kind = field.metadata["type"]
    default = "" if field.default is None else f" (default: {field.default})"
    command.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text + default)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", choices=BACKENDS, help="force one (default: the best that can)")
    _add_machine(command)


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=int, metavar="INT", help="CPU threads (default: torch's)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument(
        "--device", default=device, metavar="NAME", help=f"cpu or cuda (default here: {device})"
    )


def _device(name: str) -> torch.device:
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise TrainError(f"--device {name!r} cannot be used; expected cpu or cuda")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _settings(given: dict, base: dict) -> Settings:
    try:
        merged = {**base, **{name: value for name, value in given.items() if value is not None}}
        return Settings(**{**merged, "data": tuple(merged.get("data", ()))})
    except (TypeError, ValueError) as error:
        raise TrainError(str(error)) from None


def _train(args: argparse.Namespace) -> None:
    if args.stop_at is not None and args.stop_at < 1:
        raise TrainError(f"--stop-at is {args.stop_at}; expected an int >= 1")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    out = args.out
    if out is None:
        asked = _settings(given, {})
        out = Path("runs") / f"{asked.preset}-{asked.layers}"
    path = out / checkpoints.NAME
    settings = _settings(given, checkpoints.read(path)["settings"] if args.resume else {})
    if path.exists() and not args.resume:
        raise TrainError(f"{str(path)!r} is there already; expected --resume, or another --out")
    device = _device(args.device)
    trainer = Trainer(settings, load_corpus(settings.data), device, args.checkpoint_activations)
    if args.resume:
        trainer.restore(path)
    name = f"{settings.preset} {settings.layers}, {trainer.model.num_parameters():,} parameters"
    print(f"{name}; {len(trainer.corpus.train) / 1e6:.1f} MB of text; {out}", flush=True)
    valid = train(trainer, out, args.stop_at)
    print(f"held-out text: {valid['bpb']:.3f} bits per byte after {trainer.step} steps; all files in {out}")


def _generate(args: argparse.Namespace) -> None:
    device = _device(args.device)
    model = load_model(args.checkpoint, device)
    if not 0 <= args.seed < 2**63:
        raise TrainError(f"--seed is {args.seed}; expected an int from 0 to 2^63 - 1")
    generator = torch.Generator(device).manual_seed(args.seed)
    options = {"temperature": args.temperature, "top_k": args.top_k, "generator": generator}
    try:
        tokens = model.generate(encode(args.prompt).to(device), args.max_new_tokens, **options)
    except ValueError as error:
        raise TrainError(str(error)) from None
    print(args.prompt, end="", flush=True)
    for text in decode_stream(tokens):
        print(text, end="", flush=True)
    print()


def _demo(args: argparse.Namespace) -> None:
    settings = _settings({name: getattr(args, name) for name in DEMO_SETTINGS}, {})
    demo.run(settings, args.out, _device(args.device))


def _validate(args: argparse.Namespace) -> int:
    device = _device(args.device)
    dtypes = args.dtype or [name for name in DTYPES if device.type == "cpu" or name != "float64"]
    if args.case is not None and (args.seed is not None or args.seconds is not None):
        raise TrainError("--case runs one case alone; expected no --seed and no --seconds beside it")
    seconds, seed = 60.0 if args.seconds is None else args.seconds, args.seed or 0
    if not 0 <= seconds < math.inf:
        raise TrainError(f"--seconds is {seconds}; expected a number >= 0")
    for name, number, end in (("--seed", seed, 10**9), ("--case", args.case or 0, 10**15)):
        if not 0 <= number < end:
            raise TrainError(f"{name} is {number}; expected an int from 0 to {end - 1}")
    if args.json and args.json.is_dir():
        raise TrainError(f"--json {str(args.json)!r} is a folder; expected a file")
    with ValidationProgress(seconds) as progress:
        report = validate(
            args.op,
            args.backend,
            dtypes,
            device=device,
            seconds=seconds,
            seed=seed,
            case=args.case,
            found=lambda failure: progress.say(str(failure)),
            progress=progress.update,
        )
    report.print()
    if args.json:
        report.write(args.json)
    return int(not report.passed)
