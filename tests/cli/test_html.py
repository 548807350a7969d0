"""The page of bench --html: whole, well-formed, with nothing to fetch."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe.__main__ import main
from moe.cli import commands
from moe.cli.svg import Curve, plot
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.tuning.measure import Peaks

VOID = {"meta", "rect", "circle", "line", "polyline"}


class Outline(HTMLParser):
    """Which elements are open: all must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, top_k in (("tiny", 4), ("tiny <2>", 2)):
        monkeypatch.setitem(NAMED_SHAPES, name, MoEShape(name, 64, 64, 16, top_k, "Renormalize", 16))
    monkeypatch.setattr(commands, "measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))
    monkeypatch.setattr("moe.cli.run.TURN_BUDGET_S", {"cpu": 0.0})
    file = tmp_path / "bench.html"
    arguments = ["bench", "--model", "tiny", "tiny <2>", "--tokens", "1", "9", "--turns", "0", "--device", "cpu"]
    assert main([*arguments, "--html", str(file)]) == 0
    return file.read_text()


def test_the_page_is_well_formed_and_fetches_nothing(page: str):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.seen.count("svg") == 1 + 2 * 2
    assert not re.search(r"https?://|src=|<script|<link|url\(", page)
    assert "tiny <2>, uniform routing" in outline.text


def test_the_page_has_every_time_and_the_versions(page: str):
    outline = Outline()
    outline.feed(page)
    assert outline.seen.count("table") == 3
    for word in ("9 tokens", "of roof", "finalize", "roof", "imbalance", "torch", "triton", "error"):
        assert word in outline.text, word
    assert len(re.findall(r"<title>expert \d+: \d+ rows", page)) == 2 * 16


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_timed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["bench", "--model", "sonic-7b", "--device", "cpu", "--html", "/nonexistent/page.html"])
    assert "--html /nonexistent/page.html: expected a file" in " ".join(capsys.readouterr().err.split())


def test_a_plot_of_a_single_point_has_axes():
    picture = plot([Curve("one", [(3.0, 7.0)], ["1"])], "x", "y", "title")
    assert "nan" not in picture
    assert picture.count("<circle") == 1
