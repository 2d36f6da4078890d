"""What a long command says while it runs: a live line on a terminal, plain lines elsewhere."""

import sys
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import Progress, ProgressColumn


class LiveLine(AbstractContextManager):
    """A bar that moves, on a terminal; elsewhere nothing but what `say` prints."""

    def __init__(self, columns: tuple[ProgressColumn, ...], total: float, done: float = 0):
        self.console = Console()
        self.live = Progress(*columns, console=self.console) if self.console.is_terminal else None
        if self.live:
            self.task = self.live.add_task("", total=total, completed=done, figures="")

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def show(self, done: float, figures: str) -> None:
        """Move the bar."""
        if self.live:
            self.live.update(self.task, completed=done, figures=figures)

    def say(self, text: str) -> None:
        """One line, above the live one."""
        if self.live:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text)
            sys.stdout.flush()
