"""What a run says while it runs: a live line on a terminal, now and then a plain line elsewhere."""

import sys
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 20  # about as many progress lines in a log


class TrainingProgress(AbstractContextManager):
    """Shows steps, loss, bits per byte, tokens per second and the time that is left."""

    def __init__(self, total: int, done: int = 0):
        self.total = total
        self.every = max(1, total // PLAIN_LINES)
        figures = TextColumn("{task.fields[figures]}")
        columns = (BarColumn(16), MofNCompleteColumn(), figures, TimeRemainingColumn())
        self.console = Console()
        self.live = Progress(*columns, console=self.console) if self.console.is_terminal else None
        if self.live:
            self.task = self.live.add_task("train", total=total, completed=done, figures="")

    def __enter__(self) -> "TrainingProgress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def update(self, step: int, loss: float, bpb: float, tokens_per_s: float, eta: float) -> None:
        """Step `step` is done; eta in seconds."""
        figures = f"loss {loss:.3f}  {bpb:.3f} bits/byte  {tokens_per_s / 1e3:.1f}k tok/s"
        if self.live:
            self.live.update(self.task, completed=step, figures=figures)
        elif step % self.every == 0 or step == self.total:
            self.say(f"step {step}/{self.total}  {figures}  {int(eta) // 60}:{int(eta) % 60:02d} left")

    def say(self, text: str) -> None:
        """One line, above the live one."""
        if self.live:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text)
            sys.stdout.flush()
