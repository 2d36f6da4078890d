"""What a training run says while it runs."""

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..progress import LiveLine

PLAIN_LINES = 20  # about as many progress lines in a log


class TrainingProgress(LiveLine):
    """Shows steps, loss, bits per byte, tokens per second and the time that is left."""

    def __init__(self, total: int, done: int = 0):
        self.total = total
        self.every = max(1, total // PLAIN_LINES)
        figures = TextColumn("{task.fields[figures]}")
        super().__init__((BarColumn(16), MofNCompleteColumn(), figures, TimeRemainingColumn()), total, done)

    def update(self, step: int, loss: float, bpb: float, tokens_per_s: float, eta: float) -> None:
        """Step `step` is done; eta in seconds."""
        figures = f"loss {loss:.3f}  {bpb:.3f} bits/byte  {tokens_per_s / 1e3:.1f}k tok/s"
        self.show(step, figures)
        if not self.live and (step % self.every == 0 or step == self.total):
            self.say(f"step {step}/{self.total}  {figures}  {int(eta) // 60}:{int(eta) % 60:02d} left")
