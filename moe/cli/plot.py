"""The picture of `bench --plot`: the roofline, and time by tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.cli.machine import UnfitMachine, expect_writable


def expect_plot(file: Path) -> None:
    """Raise UnfitMachine where matplotlib is missing, or the file could not be written in the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnfitMachine(
            "--plot: expected matplotlib, which is not installed; `pip install 'moe-stages[plot]'`, or leave --plot out"
        )
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in formats:
        raise UnfitMachine(f"--plot {file}: expected a name that ends in .{', .'.join(sorted(formats))}; rename it")
    expect_writable("--plot", file)


def plot_bench(results: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draw what `report_json` made of each measurement; the format follows from the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    figure.suptitle(title)
    roofline, latency = figure.subplots(1, 2)
    for name in dict.fromkeys(result["model"] for result in results):
        lines = sorted((r for r in results if r["model"] == name), key=lambda result: result["num_tokens"])
        experts = [line["stages"]["experts"] for line in lines]
        tokens, us = [line["num_tokens"] for line in lines], [stage["median_us"] for stage in experts]
        (drawn,) = latency.plot(tokens, us, marker="o", label=name)
        latency.plot(tokens, [stage["roof_us"] for stage in experts], color=drawn.get_color(), linestyle=":")
        intensity = [stage["flops"] / stage["num_bytes"] for stage in experts]
        rates = [1e-6 * stage["flops"] / stage["median_us"] for stage in experts]
        roofline.plot(intensity, rates, marker="o", color=drawn.get_color(), label=name)
    _draw_roof(roofline, results)
    roofline.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title="stages 2 to 5, roofline"
    )
    latency.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title="stages 2 to 5; dotted: the roof"
    )
    for axis in (roofline, latency):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file)


def _draw_roof(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """From the smallest to the largest intensity that was measured, with the ridge between."""
    flops, num_bytes = (results[0]["peaks"][name] for name in ("matmul_flops", "copy_bytes_per_s"))
    stages = [result["stages"]["experts"] for result in results]
    intensities = [stage["flops"] / stage["num_bytes"] for stage in stages]
    points = sorted({min(intensities), flops / num_bytes, max(*intensities, 2 * flops / num_bytes)})
    axis.plot(points, [1e-12 * min(flops, point * num_bytes) for point in points], color="0.4", linestyle=":")
