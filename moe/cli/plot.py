"""The picture of `bench --plot`: the roofline, and time by tokens."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.cli.machine import Machine, UnfitMachine
from moe.cli.result_file import expect_writable, today
from moe.cli.text import flops_unit

NAMED_VERSIONS = ("moe-stages", "torch", "triton")
MARKED = "experts"  # what is drawn: stages 2 to 5


def expect_plot(file: Path) -> None:
    """Raise UnfitMachine where matplotlib is missing, or the file could not be written in the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnfitMachine(
            '--plot: expected matplotlib, which is not installed; `pip install "matplotlib>=3.9"`, or leave --plot out'
        )
    with _without_backend():
        from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in formats:
        raise UnfitMachine(f"--plot {file}: expected a name that ends in .{', .'.join(sorted(formats))}; rename it")
    expect_writable("--plot", file)


@contextmanager
def _without_backend() -> Iterator[None]:
    """Import matplotlib whatever MPLBACKEND names: figures are only saved here, and the one it names may not be installed."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


def plot_bench(results: Sequence[dict[str, Any]], machine: Machine, file: Path) -> None:
    """Draw what `report_json` made of each measurement; the format follows from the file's name."""
    with _without_backend():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    versions = ", ".join(f"{name} {machine.versions[name]}" for name in NAMED_VERSIONS)
    figure.suptitle(f"{machine.name}: stages 2 to 5 by token count\n{versions}; {today()}", fontsize="medium")
    roofline, latency = figure.subplots(1, 2)
    flops = flops_unit(results[0]["peaks"]["matmul_flops"])
    for name, routing in dict.fromkeys((result["model"], result["routing"]) for result in results):
        lines = [result for result in results if (result["model"], result["routing"]) == (name, routing)]
        lines.sort(key=lambda result: result["num_tokens"])
        experts = [line["stages"][MARKED] for line in lines]
        tokens, us = [line["num_tokens"] for line in lines], [stage["median_us"] for stage in experts]
        (drawn,) = latency.plot(tokens, us, marker="o", label=name if routing == "uniform" else f"{name}, {routing}")
        color = drawn.get_color()
        latency.plot(tokens, [stage["roof_us"] for stage in experts], color=color, linestyle=":")
        _draw_dense(latency, lines, color)
        intensity = [stage["flops"] / stage["num_bytes"] for stage in experts]
        rates = [1e6 * stage["flops"] / stage["median_us"] / flops.size for stage in experts]
        roofline.plot(intensity, rates, marker="o", color=color, label=drawn.get_label())
        for count, *point in zip(tokens, intensity, rates):
            roofline.annotate(f"{count:,}", point, xytext=(4, -9), textcoords="offset points", fontsize=6, color=color)
    _draw_roof(roofline, results, flops.size)
    roofline.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte moved",
        ylabel=flops.name,
        title="rate by intensity; at each point its tokens; dotted: the roof",
    )
    latency.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="microseconds a call",
        title="time; dotted: the roof; crosses: dense GEMMs of the same size",
    )
    counts = sorted({result["num_tokens"] for result in results})
    latency.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=7)
    latency.minorticks_off()
    for axis in (roofline, latency):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file)


def _draw_dense(axis: Any, lines: Sequence[dict[str, Any]], color: str) -> None:
    """What was timed beside the layer, where it was."""
    points = [(line["num_tokens"], line["beside_us"]["dense"]) for line in lines if "dense" in line["beside_us"]]
    if points:
        axis.plot(*zip(*points), color=color, linestyle="", marker="x")


def _draw_roof(axis: Any, results: Sequence[dict[str, Any]], unit: float) -> None:
    """From the smallest to the largest intensity that was measured, with the ridge between."""
    flops, num_bytes = (results[0]["peaks"][name] for name in ("matmul_flops", "copy_bytes_per_s"))
    stages = [result["stages"][MARKED] for result in results]
    intensities = [stage["flops"] / stage["num_bytes"] for stage in stages]
    points = sorted({min(intensities), flops / num_bytes, max(*intensities, 2 * flops / num_bytes)})
    axis.plot(points, [min(flops, point * num_bytes) / unit for point in points], color="0.4", linestyle=":")
