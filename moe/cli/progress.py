"""What a long command is doing, and for how long it has been at it. To stderr, so that stdout keeps the result alone.

Where stderr is a terminal and rich is installed, a live line stands below the others; elsewhere a line now and then says that
the command is still at it.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from moe.cli.text import wrap

if TYPE_CHECKING:
    from moe.cli.live_line import LiveLine

QUIET_S = 3.0  # a step that takes longer says how far it is
SILENT_S = 10.0  # after so long without a line, one says that the step goes on
INDENT = " " * 11  # as wide as "[  12.3 s] "


class Progress:
    """Lines of "[elapsed s] what". Details are left out where a command has very many steps.

    Within `with`, a long step also says now and then that it goes on.
    """

    def __init__(self, stream: TextIO | None = None, *, shows_details: bool = True, is_silent: bool = False) -> None:
        self._is_silent = is_silent
        self._stream = stream
        self._shows_details = shows_details
        self._start = self._last = time.perf_counter()
        self._what = ""
        self._live: LiveLine | None = None
        self._stops = threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> Progress:
        stream = self._stream or sys.stderr
        if stream.isatty() and importlib.util.find_spec("rich"):
            from moe.cli.live_line import LiveLine

            self._live = LiveLine(stream)
            self._live.start()
        else:
            threading.Thread(target=self._keep_talking, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stops.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, text: str) -> None:
        """A new step begins."""
        self._what = text
        if self._live is not None:
            self._live.describe(text)
        self.note(text)

    def detail(self, text: str) -> None:
        """A small step begins: without a line of its own where details are left out, yet the one that `tick` is about."""
        if self._shows_details:
            self.step(text)
            return
        self._what = text
        if self._live is not None:
            self._live.describe(text)

    def note(self, text: str) -> None:
        """Something to know, while the step goes on."""
        if self._is_silent:
            return
        with self._lock:
            self._last = time.perf_counter()
            line = wrap(f"[{self._last - self._start:6.1f} s] {text}", indent=INDENT)
            if self._live is not None:
                self._live.print_above(line)
            else:
                print(line, file=self._stream or sys.stderr, flush=True)

    def tick(self, done: int, total: int) -> None:
        """The step is `done` of `total` along; printed only where nothing was for a while."""
        if self._live is not None:
            self._live.advance(done, total)
        elif time.perf_counter() - self._last > QUIET_S:
            self.note(f"    {self._what}: {100 * done // total}%")

    def result(self, text: str) -> None:
        """Print a part of the result to stdout, with nothing of the progress in its way."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
            print(text, flush=True)
            if self._live is not None:
                self._live.start()

    def _keep_talking(self) -> None:
        while not self._stops.wait(1.0):
            if self._what and time.perf_counter() - self._last > SILENT_S:
                self.note(f"    still at it: {self._what}")
