"""What a long command says while it works: plain lines, or a live line where there is a terminal."""

import io
import time

import pytest

from moe.cli import progress
from moe.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_fit_80_columns_and_continue_indented():
    stream = io.StringIO()
    Progress(stream).step("making " + "many " * 30 + "things")
    lines = stream.getvalue().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(" " * 11) for line in lines[1:])


def test_a_long_step_says_that_it_goes_on_and_stops_when_it_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    stream = io.StringIO()
    with Progress(stream) as shown:
        shown.step("waiting")
        end = time.monotonic() + 10
        while "still at it" not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
    assert "still at it" in stream.getvalue()
    said = stream.getvalue()
    time.sleep(1.2)
    assert stream.getvalue() == said


def test_details_are_left_out_where_there_are_many():
    stream = io.StringIO()
    shown = Progress(stream, shows_details=False)
    shown.detail("small")
    shown.step("large")
    assert "small" not in stream.getvalue()
    assert "large" in stream.getvalue()


def test_a_terminal_has_the_same_lines_and_a_live_one_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream) as shown:
        shown.step("first [not markup]")
        shown.tick(1, 4)
        shown.result("a result")
        shown.step("second")
        time.sleep(0.3)
    text = stream.getvalue()
    assert "s] first [not markup]" in text
    assert "s] second" in text
    assert "25%" in text
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in text


def test_a_terminal_without_rich_has_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    stream = Terminal()
    with Progress(stream) as shown:
        shown.step("plain")
    assert stream.getvalue().endswith("s] plain\n")
