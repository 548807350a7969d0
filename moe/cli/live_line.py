"""A line at the foot of the terminal: what runs, how far it is and for how long, drawn by rich."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class LiveLine:
    """Lives between `start` and `stop`, and leaves nothing behind."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        # stdout stays as it is: rich would send what is printed there to this console.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=None)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def describe(self, text: str) -> None:
        """Another step begins; how far it is, is not known."""
        self._progress.reset(self._task, description=text, total=None)

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def print_above(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
