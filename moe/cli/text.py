"""Tables, histograms and numbers as plain text."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .:-=+*%#"  # where the terminal cannot show the blocks
HISTOGRAM_LINES = 3
WIDTH = 80  # columns of what the commands print, whatever the terminal


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first and last are flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def cell(column: int, text: str) -> str:
        is_left = column in (0, len(header) - 1)
        return text.ljust(widths[column]) if is_left else text.rjust(widths[column])

    text = ["  ".join(cell(column, value) for column, value in enumerate(line)).rstrip() for line in lines]
    rule = ("─" if shows_blocks() else "-") * min(max(map(len, text)), WIDTH)
    return "\n".join([text[0], rule, *text[1:]])


def histogram(values: Sequence[int], *, num_lines: int = HISTOGRAM_LINES, indent: int = 6) -> str:
    """One column a value, `num_lines` high, cut into bands of a power of two columns that fit the terminal.

    A value above zero shows at least the lowest block, so that only zeros are blank.
    """
    width = max(shutil.get_terminal_size((WIDTH, 24)).columns - indent - 1, 8)
    band = 1 << (min(width, max(len(values), 1)).bit_length() - 1)
    band = len(values) if len(values) <= width else band
    blocks = BLOCKS if shows_blocks() else ASCII_BLOCKS
    levels = len(blocks) - 1
    highest = max(values, default=0) or 1
    heights = [max(round(value * num_lines * levels / highest), min(value, 1)) for value in values]
    lines = []
    for start in range(0, len(values), band):
        for line in reversed(range(num_lines)):
            label = f"{start:>{indent - 1}} " if line == 0 else " " * indent
            bars = (blocks[min(max(height - line * levels, 0), levels)] for height in heights[start : start + band])
            lines.append((label + "".join(bars)).rstrip())
    return "\n".join(lines)


def wrap(text: str, *, indent: str = "") -> str:
    """The lines of `text` broken at WIDTH columns, the lines after a break indented. Words are left whole."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        if len(line) > WIDTH
        else line
        for line in text.splitlines()
    )


def shows_blocks() -> bool:
    """Whether stdout can encode the block characters."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def decimal(value: float) -> str:
    """About three digits: 0.012, 0.12, 12.3, 1,234."""
    return (
        f"{value:.3f}"
        if 0 < value < 0.1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 1000
        else f"{value:,.0f}"
    )


@dataclass(frozen=True)
class Unit:
    """A name and how many of the plain unit (microseconds, operations a second) it is."""

    name: str
    size: float

    def format(self, value: float) -> str:
        return decimal(value / self.size)


def time_unit(longest_us: float) -> Unit:
    return Unit("us", 1.0) if longest_us < 1e5 else Unit("ms", 1e3)


def flops_unit(peak_flops: float) -> Unit:
    return Unit("TFLOP/s", 1e12) if peak_flops >= 1e13 else Unit("GFLOP/s", 1e9)
