"""What a long command is doing, and for how long it has been at it. To stderr, so that stdout keeps the result alone."""

from __future__ import annotations

import sys
import time
from typing import TextIO

QUIET_S = 3.0  # a step that takes longer says how far it is


class Progress:
    """Lines of "[elapsed s] what". Details are left out where a command has very many steps."""

    def __init__(self, stream: TextIO | None = None, *, shows_details: bool = True) -> None:
        self._stream = stream
        self._shows_details = shows_details
        self._start = self._last = time.perf_counter()

    def step(self, text: str) -> None:
        """A new step begins."""
        self._last = time.perf_counter()
        print(f"[{self._last - self._start:6.1f} s] {text}", file=self._stream or sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """A small step begins."""
        if self._shows_details:
            self.step(text)

    def tick(self, done: int, total: int) -> None:
        """The step is `done` of `total` along; printed only where nothing was for a while."""
        if time.perf_counter() - self._last > QUIET_S:
            self.step(f"    {100 * done // total}%")
