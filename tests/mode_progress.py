"""Lines that say how far a mode is, in the place of a dot a test: `make test` runs modes side by side, in one terminal."""

from __future__ import annotations

import time

import pytest

EVERY_S = 5.0


class ModeProgress:
    """A line every few seconds, whatever runs, and one at each failure at once."""

    def __init__(self, mode: str, config: pytest.Config) -> None:
        self._mode = mode
        self._config = config
        self._total = self._num_done = self._num_failed = 0
        self._start = self._last = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._total = len(session.items)
        self._say(f"{self._total} tests")

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots; failures keep their place in the summary."""
        return (report.outcome if report.when == "call" else "", "", "") if report.passed else None

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if time.monotonic() - self._last >= EVERY_S:
            self._say(f"{self._num_done} of {self._total}, now {nodeid.partition('::')[0]}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._num_failed += 1
            self._say(f"FAILED {report.nodeid}")
        if report.when == "teardown":
            self._num_done += 1

    def pytest_sessionfinish(self) -> None:
        self._say(f"{self._num_done} of {self._total} done, {self._num_failed} failed")

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"{self._mode:>11} {self._last - self._start:4.0f} s  {text}")
            reporter.flush()
