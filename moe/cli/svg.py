"""Charts as SVG text, for a page that needs nothing but a browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#2a78d6", "#eb6834", "#2b9f6b", "#8a5fc7", "#c9a227", "#c2417c", "#5b7083")
INK, FAINT = "#33322f", "#d9d8d4"
WIDTH, LEFT, BAR_HEIGHT = 760, 120, 22
TEXT = 'font-size="12" fill="#33322f"'


@dataclass(frozen=True)
class Curve:
    """Points of a line; each may have a word beside it."""

    name: str
    points: Sequence[tuple[float, float]]
    words: Sequence[str] = ()
    is_dotted: bool = False
    color: str | None = None


def bars(rows: Sequence[tuple[str, Sequence[float], str]], names: Sequence[str], title: str) -> str:
    """Stacked bars, one a row: its name, the lengths of its parts, and what stands behind it."""
    longest = max((sum(parts) for _, parts, _ in rows), default=0.0) or 1.0
    room = WIDTH - LEFT - 150
    lines = [_legend(names, 16)]
    for number, (name, parts, after) in enumerate(rows):
        y, x = 34 + number * (BAR_HEIGHT + 6), float(LEFT)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end" {TEXT}>{escape(name)}</text>')
        for part, color, label in zip(parts, COLORS, names):
            width = part / longest * room
            hint = f"<title>{escape(label)}: {part:.4g}</title>"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{color}">{hint}</rect>'
            )
            x += width
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 15}" {TEXT}>{escape(after)}</text>')
    return _svg(34 + len(rows) * (BAR_HEIGHT + 6) + 6, lines, title)


def columns(values: Sequence[int], title: str) -> str:
    """A column a value, side by side."""
    height, highest = 90, max(values, default=0) or 1
    step = (WIDTH - LEFT) / max(len(values), 1)
    lines = [
        f'<rect x="{LEFT + number * step:.2f}" y="{height - value / highest * 80:.1f}" width="{max(step - 1, 0.8):.2f}" '
        f'height="{value / highest * 80:.1f}" fill="{COLORS[0]}"><title>expert {number}: {value} rows</title></rect>'
        for number, value in enumerate(values)
    ]
    lines.append(f'<text x="{LEFT - 8}" y="20" text-anchor="end" {TEXT}>{highest} rows</text>')
    lines.append(f'<text x="{LEFT - 8}" y="{height}" text-anchor="end" {TEXT}>0</text>')
    lines.append(f'<text x="{LEFT}" y="{height + 16}" {TEXT}>expert 0</text>')
    lines.append(f'<text x="{WIDTH}" y="{height + 16}" text-anchor="end" {TEXT}>expert {len(values) - 1}</text>')
    return _svg(height + 22, lines, title)


def plot(curves: Sequence[Curve], x_name: str, y_name: str, title: str) -> str:
    """Lines over two logarithmic axes."""
    xs, ys = zip(*(point for curve in curves for point in curve.points))
    across, up = _Axis.of(xs, LEFT, WIDTH - 20), _Axis.of(ys, 330, 40)
    lines = [_legend([curve.name for curve in curves], 16, curves)]
    for value in across.ticks():
        x = across.at(value)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="40" y2="330" stroke="{FAINT}"/>')
        lines.append(f'<text x="{x:.1f}" y="346" text-anchor="middle" {TEXT}>{value:g}</text>')
    for value in up.ticks():
        y = up.at(value)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" {TEXT}>{value:g}</text>')
    for number, curve in enumerate(curves):
        lines += _curve(curve, _color(curve, number), across, up)
    lines.append(f'<text x="{(LEFT + WIDTH) / 2}" y="366" text-anchor="middle" {TEXT}>{escape(x_name)}</text>')
    lines.append(f'<text transform="translate(16 190) rotate(-90)" text-anchor="middle" {TEXT}>{escape(y_name)}</text>')
    return _svg(374, lines, title)


def _curve(curve: Curve, color: str, across: _Axis, up: _Axis) -> list[str]:
    places = [(across.at(x), up.at(y)) for x, y in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="3 4"' if curve.is_dotted else ""
    lines = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>']
    if not curve.is_dotted:
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
    for (x, y), word in zip(places, curve.words):
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 14:.1f}" font-size="10" fill="{color}">{escape(word)}</text>')
    return lines


def _color(curve: Curve, number: int) -> str:
    return curve.color or COLORS[number % len(COLORS)]


@dataclass(frozen=True)
class _Axis:
    """From the logarithm of a value to a place between two."""

    low: float
    high: float
    first: float
    last: float

    @classmethod
    def of(cls, values: Sequence[float], first: float, last: float) -> _Axis:
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = 0.05 * (high - low) or 0.5
        return cls(low - margin, high + margin, first, last)

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Powers of ten within; where there are fewer than two, their doubles and fives too."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            ticks = [step * 10.0**power for power in powers for step in steps]
            inside = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            if len(inside) >= 3:
                break
        return inside


def _legend(names: Sequence[str], y: int, curves: Sequence[Curve] = ()) -> str:
    parts, x = [], float(LEFT)
    for number, name in enumerate(names):
        color = _color(curves[number], number) if curves else COLORS[number % len(COLORS)]
        parts.append(f'<rect x="{x:.0f}" y="{y - 10}" width="11" height="11" fill="{color}"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="{y}" {TEXT}>{escape(name)}</text>')
        x += 30 + 7 * len(name)
    return "".join(parts)


def _svg(height: int, lines: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title)}">'
        + "".join(lines)
        + "</svg>"
    )
