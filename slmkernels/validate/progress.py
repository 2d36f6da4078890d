"""What a validation says while it runs."""

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from ..progress import LiveLine
from .report import Report

EVERY = 10.0  # seconds between the lines of a log


class ValidationProgress(LiveLine):
    """Shows calls, failures and the time that is left."""

    def __init__(self, seconds: float):
        self.seconds, self.next = seconds, EVERY
        figures = TextColumn("{task.fields[figures]}")
        super().__init__((BarColumn(16), figures, TimeRemainingColumn()), max(seconds, 1e-3))

    def update(self, report: Report) -> None:
        """A turn is done."""
        figures = f"{report.calls} calls, {len(report.failures)} failed"
        self.show(report.seconds, figures)
        if not self.live and report.seconds >= self.next:
            self.next = report.seconds + EVERY
            self.say(f"{report.seconds:.0f} of {self.seconds:.0f} s: {figures}")
