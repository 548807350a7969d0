"""Writes docs/performance.md's numbers and docs/performance.svg from what `python -m moe bench --json` measured.

    python tests/benchmarks/report.py bench.json bench-zipf.json --date 2026-11-22 --driver 580.159
    python tests/benchmarks/report.py                              draws the picture anew from the page's table

The text around the numbers stays; what lies between the markers is replaced. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).parents[2]
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
PEERS = Path(__file__).with_name("peers_h200.json")
STAGES = ("route", "permute", "gemm1", "gemm2", "finalize")
TIE = 1.05  # leads up to it say nothing: peers were timed on the same kind of GPU in other processes
# Roofs of one cell differ by less where the same number of experts was drawn: the peak matmul rate drifts with the clock.
SAME_DRAW = 0.12
MAX_GAP = 16  # times as many tokens: points further apart are not joined by a line
SURFACE, INK, SOFT_INK, FAINT = "#fcfcfb", "#0b0b0b", "#52514e", "#d9d8d4"
OURS, PEER, ROOF = "#2a78d6", "#eb6834", "#8a8984"

Cell = tuple[str, str, int]  # model, routing, tokens


@dataclass(frozen=True)
class Line:
    """One layer at one load. Microseconds; `peer` is the fastest library of the peers' file there, where it has the cell."""

    model: str
    routing: str
    num_tokens: int
    us: dict[str, float]  # by stage, and for experts and whole
    roof_us: float
    peer: str | None = None
    peer_us: float | None = None
    is_same_draw: bool = True
    beside_us: dict[str, float] = field(default_factory=dict)  # as `moe.cli.beside` names them

    @property
    def lead(self) -> float:
        """How many times as fast as the best peer."""
        assert self.peer_us is not None
        return self.peer_us / self.us["experts"]


def read_lines(results: Iterable[dict], peers: dict) -> list[Line]:
    """By layer in the order of `results`, uniform routing first, then tokens; a cell that comes twice counts as last measured."""
    cells = {_cell(cell): cell for cell in peers["cells"]}
    lines = {}
    for result in results:
        stages = result["stages"]
        us = {name: stage["median_us"] for name, stage in stages.items()}
        roof_us = stages["experts"]["roof_us"]
        beside_us = result.get("beside_us", {})
        line = Line(*_cell(result), us, roof_us, beside_us=beside_us)
        if cell := cells.get(_cell(result)):
            best = min(cell["us"], key=cell["us"].__getitem__)
            is_same_draw = abs(cell["roof_us"] / roof_us - 1) <= SAME_DRAW
            name = peers["libraries"][best]["name"]
            line = Line(*_cell(result), us, roof_us, name, cell["us"][best], is_same_draw, beside_us)
        lines[_cell(result)] = line
    models = list(dict.fromkeys(line.model for line in lines.values()))
    return sorted(
        lines.values(), key=lambda line: (models.index(line.model), line.routing != "uniform", line.num_tokens)
    )


def _cell(values: dict) -> Cell:
    return values["model"], values["routing"], values["num_tokens"]


def table_text(lines: Sequence[Line]) -> str:
    """Markdown, a line a layer and load."""
    header = ("layer", "T", *STAGES, "experts", "whole", "roof", "of roof", "best peer", "its time", "lead")
    rows = [header, ("---", *["---:"] * (len(header) - 4), "---", "---:", "---:")]
    for line in lines:
        name = line.model if line.routing == "uniform" else f"{line.model}, {line.routing}"
        row = [name, str(line.num_tokens), *(_number(line.us[name]) for name in (*STAGES, "experts", "whole"))]
        row += [_number(line.roof_us), f"{100 * line.roof_us / line.us['experts']:.0f}%"]
        if line.peer_us is None:
            row += ["", "", ""]
        else:
            mark = "" if line.is_same_draw else " †"
            row += [str(line.peer), _number(line.peer_us), f"{line.lead:.2f}{mark}"]
        rows.append(tuple(row))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def beside_text(lines: Sequence[Line]) -> str:
    """Markdown, a line a layer and load: what was timed in turns with the experts' part, and the calls from Python."""
    header = (
        "layer",
        "T",
        "experts",
        "untuned",
        "dense",
        "grouped_mm",
        "whole, graph",
        "whole, eager",
        "experts, eager",
    )
    rows = [header, ("---", *["---:"] * (len(header) - 1))]
    for line in lines:
        if not line.beside_us:
            continue
        times = [line.beside_us.get(name) for name in ("experts", "untuned", "dense", "grouped_mm")]
        eager = line.beside_us.get("eager")
        times += [None if eager is None else line.us["whole"], eager, line.beside_us.get("eager_experts")]
        name = line.model if line.routing == "uniform" else f"{line.model}, {line.routing}"
        rows.append((name, str(line.num_tokens), *("" if time is None else _number(time) for time in times)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def summary_text(lines: Sequence[Line]) -> str:
    """Where we lead and where we trail, over cells that a peer has too, the same number of experts drawn."""
    compared = [line for line in lines if line.peer_us is not None and line.is_same_draw]
    if not compared:
        return "No cell of this run has a peer."
    num_ahead = sum(line.lead >= 1 for line in compared)
    num_clear = sum(round(line.lead, 2) > TIE for line in compared)  # as the table shows it
    num_behind = sum(round(line.lead, 2) < 2 - TIE for line in compared)
    by_lead = sorted(compared, key=lambda line: line.lead)
    num_named = min(5, len(compared) // 2)
    rows = [
        "| T | cells | no slower | geometric mean of lead | least | most |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for num_tokens in sorted({line.num_tokens for line in compared}):
        leads = [line.lead for line in compared if line.num_tokens == num_tokens]
        ahead = sum(lead >= 1 for lead in leads)
        rows.append(
            f"| {num_tokens} | {len(leads)} | {ahead} | {geometric_mean(leads):.2f} | {min(leads):.2f} | {max(leads):.2f} |"
        )
    mean = geometric_mean([line.lead for line in compared])
    parts = [
        f"At least as fast as the best peer in {num_ahead} of {len(compared)} cells, by more than 5% in {num_clear}; more than 5% "
        f"slower in {num_behind}. Geometric mean of the lead **{mean:.2f}**.",
        "\n".join(rows),
    ]
    if num_named:
        parts.append(
            f"Furthest ahead: {_named(by_lead[::-1][:num_named])}.\nFurthest behind: {_named(by_lead[:num_named])}."
        )
    return "\n\n".join(parts)


def _named(lines: Iterable[Line]) -> str:
    return "; ".join(
        f"{line.model} T={line.num_tokens}{'' if line.routing == 'uniform' else ' ' + line.routing} {line.lead:.2f}"
        for line in lines
    )


def run_text(reports: Sequence[dict], date: str, driver: str, weights: str) -> str:
    """Machine, versions, date and peaks of the run."""
    machine = reports[0]["machine"]
    versions = machine["versions"]
    shown = [f"{name} {versions[name]}" for name in ("torch", "triton", "numba-cuda", "cuda-core")]
    peaks = [result["peaks"] for report in reports for result in report["results"][:1]]
    each = [
        f"{1e-12 * peak['matmul_flops']:.0f} TFLOP/s {peak['matmul_dtype']} matmul and {1e-9 * peak['copy_bytes_per_s']:.0f} GB/s copy"
        for peak in peaks
    ]
    rates = ", ".join(dict.fromkeys(each))
    worst = max(result["accuracy"]["relative_frobenius"] for report in reports for result in report["results"])
    return (
        f"{date}, one {machine['name']} ({machine['details']}), {', '.join(shown)}, CUDA {versions['cuda of torch']}, "
        f"driver {driver}, {weights} weights.\nPeaks of the run: {rates}. Largest relative error against float64: {worst:.1e}."
    )


def replace_part(page: str, name: str, text: str) -> str:
    """`page` with what lies between the two markers of a name replaced.

    Raises:
        ValueError: where a marker is missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in page or end not in page:
        raise ValueError(f"expected a page with {begin} and {end}")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def lines_of_page(page: str, peers: dict) -> list[Line]:
    """The lines of the page's own table, as `table_text` wrote them: to draw them anew."""
    part = page.partition("<!-- table: begin -->")[2].partition("<!-- table: end -->")[0]
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in part.strip().splitlines())
    results = []
    for row in rows:
        values = dict(zip(header, row))
        model, _, routing = values["layer"].partition(", ")
        roof_us = float(values["roof"])
        stages = {
            name: {"median_us": float(values[name]), "roof_us": roof_us} for name in (*STAGES, "experts", "whole")
        }
        results.append(
            {"model": model, "routing": routing or "uniform", "num_tokens": int(values["T"]), "stages": stages}
        )
    return read_lines(results, peers)


def draw(lines: Sequence[Line], peers: dict, file: Path) -> None:
    """For each layer that peers were measured on, time of the experts' part over tokens, and below it the lead over the best peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(cell["model"] for cell in peers["cells"]))
    # Text as text, and nothing that changes from run to run but the numbers.
    style = {"svg.fonttype": "none", "svg.hashsalt": "moe", "font.size": 9, "axes.edgecolor": FAINT}
    style |= {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"]}
    style |= {"text.color": INK, "axes.labelcolor": SOFT_INK, "xtick.color": SOFT_INK, "ytick.color": SOFT_INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            4, 4, figsize=(12.5, 9), facecolor=SURFACE, layout="constrained", height_ratios=(2.4, 1, 2.4, 1)
        )
        places = [(axes[2 * row, column], axes[2 * row + 1, column]) for row in (0, 1) for column in range(4)]
        for number, (model, (times, ratios)) in enumerate(zip(models, places)):
            its_lines = [line for line in lines if (line.model, line.routing) == (model, "uniform")]
            _draw_times(times, model, its_lines, peers)
            _draw_ratios(ratios, its_lines)
            if number % 4 == 0:
                times.set_ylabel("microseconds")
                ratios.set_ylabel("best peer / ours")
            ratios.set_xlabel("tokens")
        for times, ratios in places[len(models) :]:
            _draw_legend(times, places[0][0])
            ratios.set_axis_off()
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _draw_times(axis, model: str, lines: list[Line], peers: dict) -> None:
    lines = sorted(lines, key=lambda line: line.num_tokens)
    cells = [cell for cell in peers["cells"] if (cell["model"], cell["routing"]) == (model, "uniform")]
    axis.set(yscale="log")
    roof_us = {cell["num_tokens"]: cell["roof_us"] for cell in cells} | {
        line.num_tokens: line.roof_us for line in lines
    }
    tokens, roofs = zip(*sorted(roof_us.items()))
    axis.plot(tokens, roofs, color=ROOF, linestyle=(0, (4, 2)), linewidth=1.2, label="roof")
    peer_us = [min(cell["us"].values()) for cell in cells]
    peer_tokens = [cell["num_tokens"] for cell in cells]
    axis.plot(peer_tokens, peer_us, color=PEER, marker="s", markersize=4.5, linewidth=1.6, label="best peer")
    tokens, ours = _with_gaps([(line.num_tokens, line.us["experts"]) for line in lines])
    axis.plot(tokens, ours, color=OURS, marker="o", markersize=4, linewidth=1.8, label="this package")
    axis.set_title(model, loc="left", fontsize=10, color=INK)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _shape_axis(axis)
    axis.tick_params(labelbottom=False)


def _draw_ratios(axis, lines: list[Line]) -> None:
    """The lead, a bar a token count from 1, where it is even; what is within a tie is pale."""
    compared = [line for line in lines if line.peer_us is not None and line.is_same_draw]
    for line in compared:
        color = OURS if line.lead >= 1 else PEER
        alpha = 1.0 if not 2 - TIE <= line.lead <= TIE else 0.45
        axis.plot([line.num_tokens] * 2, [1, line.lead], color=color, linewidth=5, alpha=alpha, solid_capstyle="butt")
        counts = {other.num_tokens for other in compared}
        aside = 6 * (line.num_tokens // 2 in counts) - 6 * (2 * line.num_tokens in counts)  # neighbours would overlap
        place = {"textcoords": "offset points", "xytext": (aside, 3), "ha": "center", "fontsize": 7.5}
        axis.annotate(f"{line.lead:.2f}", (line.num_tokens, max(line.lead, 1)), color=INK, **place)
    axis.axhline(1, color=SOFT_INK, linewidth=0.8)
    axis.set_ylim(0.85, 1.75)
    axis.set_yticks([1, 1.25, 1.5], ["1", "1.25", "1.5"])
    _shape_axis(axis)


def _shape_axis(axis) -> None:
    axis.set_facecolor(SURFACE)
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
    axis.minorticks_off()
    axis.set_xlim(0.45, 36000)
    axis.grid(True, color=FAINT, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)


def _with_gaps(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """x and y, with a NaN wherever a line between two points would claim too much about what lies between."""
    xs: list[float] = []
    ys: list[float] = []
    for x, y in points:
        if xs and x > MAX_GAP * xs[-1]:
            xs.append(x)
            ys.append(float("nan"))
        xs.append(x)
        ys.append(y)
    return xs, ys


def _draw_legend(axis, source) -> None:
    axis.set_axis_off()
    handles, labels = source.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="upper left", frameon=False, fontsize=10)
    axis.text(
        0.04,
        0.6,
        "above: time of the experts' part\n(permute to finalize) over tokens,\nuniform routing\n\n"
        "below: the best peer's time / ours;\nabove 1 this package is faster,\npale: within 5%, a tie",
        transform=axis.transAxes,
        va="top",
        fontsize=9,
        color=SOFT_INK,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="written by `python -m moe bench --json`, of one machine")
    parser.add_argument("--date", help="of the measurement, YYYY-MM-DD")
    parser.add_argument("--driver", help="as nvidia-smi names it")
    parser.add_argument("--launches", type=Path, help="what `python -m moe launches` printed")
    parser.add_argument("--format", default="hf", help="what bench ran with; default: hf")
    options = parser.parse_args(arguments)
    if not options.files:
        peers = json.loads(PEERS.read_text())
        draw(lines_of_page(PAGE.read_text(), peers), peers, PICTURE)
        return
    if not (options.date and options.driver):
        parser.error(
            "expected --date and --driver with results; without any the picture is drawn from the page's table"
        )
    reports = [json.loads(file.read_text()) for file in options.files]
    peers = json.loads(PEERS.read_text())
    lines = read_lines([result for report in reports for result in report["results"]], peers)
    page = PAGE.read_text()
    page = replace_part(page, "run", run_text(reports, options.date, options.driver, options.format))
    page = replace_part(page, "summary", summary_text(lines))
    page = replace_part(page, "table", table_text(lines))
    page = replace_part(page, "beside", beside_text(lines))
    if options.launches:
        page = replace_part(page, "launches", f"```\n{options.launches.read_text().strip()}\n```")
    draw(lines, peers, PICTURE)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
