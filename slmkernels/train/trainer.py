"""Trains the reference model: AdamW, warm-up and cosine, exact resume.

A run's folder holds checkpoint.pt, loss.png and metrics.jsonl, one object a line: kind "train" or "valid",
step, loss in nats, bpb in bits per byte; training lines also lr, grad_norm, tokens_per_s, elapsed seconds.
The loss is the cross-entropy alone. Of a model with experts training lines also have, with a value for each
layer with some, tokens_per_expert of the step, router_entropy in nats and load_balance, that loss, 1 where
loads are equal; and experts.png draws them.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ..models import SmallLM, SmallLMConfig
from ..nn import SparseExperts
from ..ops.experts.route import Routing
from . import checkpoint, plots
from .data import Corpus, training_batch, validation_batches
from .errors import Interrupted, TrainError
from .progress import TrainingProgress
from .settings import Settings

# What a resumed run may change: how long to go on, what to report. The text itself is compared by hash.
MAY_CHANGE = {"data", "steps", "eval_every", "eval_tokens", "log_every", "save_every"}


class Trainer:
    """A model, its optimizer and how far they are.

    Args:
        settings: the run.
        corpus: its text.
        device: where to compute.
        checkpoint_activations: recompute each layer in the backward, for less memory and the same figures.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        device: torch.device | str = "cpu",
        checkpoint_activations: bool = False,
    ):
        need = settings.seq_len + 1
        if len(corpus.train) < need:
            raise TrainError(
                f"the corpus has {len(corpus.train)} bytes to train on; seq_len needs at least {need}"
            )
        if len(corpus.valid) < 2:
            raise TrainError(
                f"the corpus has {len(corpus.valid)} held-out bytes; expected at least 2: give more text"
            )
        self.settings, self.corpus, self.device = settings, corpus, torch.device(device)
        torch.manual_seed(settings.seed)
        config = settings.model_config()
        self.model = SmallLM(config, checkpoint_activations=checkpoint_activations).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors}]
        options = {"lr": settings.peak_lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(groups, **options)
        self.step = 0  # steps done
        self.seconds = 0.0  # spent in them

    def learning_rate(self, step: int) -> float:
        """Of step `step`, from 0: a line up to the peak over the warm-up, then a cosine down to a tenth."""
        s, peak = self.settings, self.settings.peak_lr
        if step < s.warmup:
            return peak * (step + 1) / s.warmup
        progress = (step - s.warmup) / max(1, s.steps - s.warmup)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))

    def train_step(self) -> dict[str, float]:
        """One optimizer step -> its figures, loss in nats.

        Raises:
            TrainError: the loss or the gradient is not finite; the model is left as it was.
        """
        s, start = self.settings, time.perf_counter()
        total, micros = torch.zeros((), device=self.device), []  # micros: routings, a list a micro-batch
        for micro in range(s.accumulate):
            index = self.step * s.accumulate + micro
            tokens, targets = training_batch(self.corpus, s.seed, index, s.batch_size, s.seq_len)
            with self._autocast():
                _, loss, routings = self.model(
                    tokens.to(self.device), targets.to(self.device), return_routings=True
                )
            ((loss + self.model.routing_loss(routings)) / s.accumulate).backward()
            micros.append([Routing(*(x.detach() for x in routing)) for routing in routings])
            total += loss.detach() / s.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        loss, norm = float(total), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise TrainError(
                f"loss is {loss} and the gradient's norm {norm} at step {self.step}; try a smaller --lr"
            )
        lr = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        experts = self._after_routing(micros)
        self.step += 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        rate = s.accumulate * s.batch_size * s.seq_len / seconds
        figures = {"loss": loss, "bpb": loss / math.log(2), "lr": lr, "grad_norm": norm}
        return {**figures, "tokens_per_s": rate, "elapsed": self.seconds, **experts}

    @torch.no_grad()
    def _after_routing(self, micros: list[list[Routing]]) -> dict[str, list]:
        """The experts' figures of a step, layer by layer, from its micro-batches; moves selection biases."""
        rate, figures = self.model.config.expert_bias_rate, {}
        layers = [block.mlp for block in self.model.blocks if isinstance(block.mlp, SparseExperts)]
        for layer, routings in zip(layers, zip(*micros, strict=True), strict=True):
            counts = sum(routing.counts for routing in routings)
            if rate:
                layer.update_selection_bias(counts, rate)
            entropy = sum(routing.entropy for routing in routings) / len(routings)
            balance = sum(routing.load_balance_loss() for routing in routings) / len(routings)
            figures.setdefault("tokens_per_expert", []).append(counts.tolist())
            figures.setdefault("router_entropy", []).append(float(entropy))
            figures.setdefault("load_balance", []).append(float(balance))
        return figures

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss in nats and bits per byte over the same held-out bytes every time."""
        s, nats, count = self.settings, 0.0, 0
        for tokens, targets in validation_batches(self.corpus, s.eval_tokens, s.batch_size, s.seq_len):
            with self._autocast():
                _, loss = self.model(tokens.to(self.device), targets.to(self.device))
            nats, count = nats + float(loss) * tokens.numel(), count + tokens.numel()
        return {"loss": nats / count, "bpb": nats / count / math.log(2)}

    def save(self, path: Path) -> None:
        """Write everything a later run needs to go on bit for bit; batches need no state (see data.py)."""
        content = {
            "config": asdict(self.model.config),
            "settings": asdict(self.settings),
            "corpus": self.corpus.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        checkpoint.write(content, path)

    def restore(self, path: Path) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            TrainError: it is of another model, other text, or settings other than those in MAY_CHANGE.
        """
        content = checkpoint.read(path, self.device)
        defaults = {**asdict(SmallLMConfig()), **asdict(Settings())}  # of fields that an older version lacked
        saved = {**defaults, **content["config"], **content["settings"]}
        for name, ours in {**asdict(self.model.config), **asdict(self.settings)}.items():
            theirs = saved[name]
            if theirs != ours and name not in MAY_CHANGE:
                raise TrainError(
                    f"{name} is {ours!r}; expected {theirs!r}, as in the checkpoint {str(path)!r}"
                )
        if content["corpus"] != self.corpus.fingerprint:
            raise TrainError(
                f"the text is not that of the checkpoint {str(path)!r}; expected the same --data, unchanged"
            )
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            torch.set_rng_state(content["rng"].cpu())
            self.step, self.seconds = int(content["step"]), float(content["seconds"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise TrainError(f"checkpoint {str(path)!r} does not fit: {reason}") from None

    def _autocast(self):
        low = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext()


def train(trainer: Trainer, out: Path, stop_at: int | None = None) -> dict[str, float]:
    """Run the trainer to its last step, or to `stop_at`, keeping checkpoint, metrics and curve in `out`.

    Returns:
        the last validation, loss in nats and bpb in bits per byte.

    Raises:
        TrainError: the loss is no longer finite, or `out` cannot be written.
        Interrupted: Ctrl-C; the step under way was finished and saved. A second Ctrl-C stops at once and
            keeps the last checkpoint.
    """
    s, path, metrics = trainer.settings, out / checkpoint.NAME, out / "metrics.jsonl"
    last = s.steps if stop_at is None else min(stop_at, s.steps)
    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = [record for record in plots.read_metrics(metrics) if record["step"] <= trainer.step]
        metrics.write_text("".join(json.dumps(record) + "\n" for record in kept if trainer.step))
    except OSError as error:
        raise TrainError(f"--out {str(out)!r} cannot be written: {error.strerror}") from None
    valid = None
    with TrainingProgress(last, trainer.step) as progress, metrics.open("a") as log, _ctrl_c() as asked:
        while trainer.step < last and not asked:
            figures = trainer.train_step()
            step, final = trainer.step, trainer.step == last
            ahead = (last - step) * trainer.seconds / step
            progress.update(step, figures["loss"], figures["bpb"], figures["tokens_per_s"], ahead)
            if step % s.log_every == 0 or final:
                _log(log, "train", step, figures)
            if step % s.eval_every == 0 or final:
                valid = trainer.evaluate()
                _log(log, "valid", step, valid)
                progress.say(f"step {step}/{last}  held-out text: {valid['bpb']:.3f} bits/byte")
            if step % s.save_every == 0 or final:
                trainer.save(path)
        if asked:
            trainer.save(path)
    if asked:
        raise Interrupted(f"stopped after step {trainer.step}; saved to {path}, go on with --resume")
    reasons = [plots.loss_curve(metrics, out / "loss.png")]
    if trainer.model.config.experts:
        reasons.append(plots.expert_curves(metrics, out / "experts.png"))
    for reason in filter(None, reasons):
        progress.say(reason)
    return valid or trainer.evaluate()


def _log(file, kind: str, step: int, figures: dict[str, float]) -> None:
    file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
    file.flush()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list]:
    """A list that is no longer empty once Ctrl-C was pressed; pressed again it raises KeyboardInterrupt."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals reach the main thread only
        return

    def note(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
