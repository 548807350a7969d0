"""python -m moe bench: many layers and token counts, one line each, beside other ways to do the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.cli.beside import TURNS, measure_beside, tuned_layer
from moe.cli.html import html_page
from moe.cli.layer import NamedLayer, make_inputs, make_layer
from moe.cli.machine import STAGES, Machine, UnfitMachine, describe_machine, info_json
from moe.cli.memory import expect_memory
from moe.cli.plot import plot_bench
from moe.cli.progress import Progress
from moe.cli.result_file import ResultFile, today
from moe.cli.run import Measurement, measure_layer, report_json
from moe.cli.text import Unit, decimal, flops_unit, wrap
from moe.tuning.measure import Peaks

TIMED = (*STAGES, "experts", "whole")
BESIDE = ("untuned", "dense", "grouped_mm", "eager_experts", "eager")
# Each has a space before it. 80 columns together.
COLUMNS = {name: max(8, len(name) + 1) for name in ("tokens", *TIMED, "of roof", "error")}
BESIDE_INDENT = 8


@dataclass(frozen=True)
class BenchLine:
    """A layer at one token count, and what is set beside it: microseconds by name (`measure_beside`)."""

    measurement: Measurement
    beside_us: dict[str, float]

    def report(self, peaks: Peaks) -> dict[str, object]:
        tuned = self.measurement.layer.config.model_dump(mode="json")
        return report_json(self.measurement, peaks) | {
            "beside_us": self.beside_us,
            "is_tuned": "untuned" in self.beside_us,
            "tiles": {name: tuned[name] for name in ("few_tokens", "finalize")}
            | {"tile_rows": tuned["permute"]["tile_rows"]}
            | {stage: {name: tuned[stage][name] for name in ("kernel", "tile")} for stage in ("gemm1", "gemm2")},
        }


def measure_all(
    named_layers: Iterable[NamedLayer],
    token_counts: Sequence[int],
    device: torch.device,
    *,
    routing: str,
    seed: int,
    progress: Progress,
    uses_tables: bool = True,
    num_turns: int = TURNS,
) -> Iterator[BenchLine]:
    """One line a layer and token count; a layer's weights are made once and dropped before the next one's.

    What does not fit the device's memory is left out, and said to be.

    Args:
        uses_tables: run what the tuning tables say, and the model's own choices beside it where they differ.
        num_turns: of what is timed beside the layer; 0 leaves that out.
    """
    for named in named_layers:
        fitting = fitting_tokens(named, token_counts, device, progress)
        if not fitting:
            continue
        layer = make_layer(named, device, seed=seed, progress=progress)
        for num_tokens in fitting:
            chosen = tuned_layer(layer, num_tokens) if uses_tables else layer
            measurement = measure_layer(
                chosen, num_tokens, routing=routing, seed=seed, progress=progress, with_experts=True
            )
            sets = make_inputs(chosen, num_tokens, measurement.num_sets, routing=routing, seed=seed)
            yield BenchLine(measurement, measure_beside(chosen, layer, sets, progress, num_turns=num_turns))
            del sets, chosen, measurement
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del layer


def fitting_tokens(
    named: NamedLayer, token_counts: Sequence[int], device: torch.device, progress: Progress
) -> list[int]:
    """The token counts, each once, that fit what is free before anything is made."""
    fitting = []
    for num_tokens in dict.fromkeys(token_counts):
        try:
            expect_memory(named, device, num_tokens)
        except UnfitMachine as error:
            progress.note(f"left out: {error}")
        else:
            fitting.append(num_tokens)
    return fitting


def print_bench(
    lines: Iterable[BenchLine],
    peaks: Peaks,
    device: torch.device,
    progress: Progress,
    json_file: ResultFile | None = None,
    plot_file: Path | None = None,
    html_file: ResultFile | None = None,
) -> bool:
    """A line as each measurement comes; the file is rewritten each time, so that a stopped run keeps its part.

    The picture is drawn at the end, and the page after each measurement.

    Returns:
        Whether every result was within its error limit, and all were written.
    """
    unit, flops = bench_unit(device), flops_unit(peaks.matmul_flops)
    progress.result(
        f"{flops.format(peaks.matmul_flops)} {flops.name} {peaks.matmul_dtype} matmul, "
        f"{decimal(peaks.copy_bytes_per_s / 1e9)} GB/s copy; times in {unit.name}"
    )
    results: list[dict[str, object]] = []
    machine = describe_machine(device)
    is_good, model = True, None
    for line in lines:
        if line.measurement.layer.shape.name != model:
            model = line.measurement.layer.shape.name
            progress.result(f"\n{model}, {line.measurement.routing} routing\n{HEADER}")
        progress.result(bench_text(line, peaks, unit))
        is_good &= line.measurement.accuracy.is_good
        results.append(line.report(peaks))
        if json_file is not None:
            json_file.write({"machine": info_json(machine), "date": today(), "results": results})
        if html_file is not None:
            html_file.write_text(html_page(results, machine, today(), unit))
    is_drawn = plot_file is None or not results or _is_drawn(results, machine, plot_file, progress)
    are_written = [file is None or file.is_written(progress) for file in (json_file, html_file)]
    return is_good and is_drawn and all(are_written)


def _is_drawn(results: list[dict[str, object]], machine: Machine, file: Path, progress: Progress) -> bool:
    try:
        plot_bench(results, machine, file)
    except OSError as failure:
        progress.note(f"--plot {file}: {failure.strerror}; nothing is drawn")
        return False
    return True


def bench_unit(device: torch.device) -> Unit:
    return Unit("us", 1.0) if device.type == "cuda" else Unit("ms", 1e3)


def bench_text(line: BenchLine, peaks: Peaks, unit: Unit) -> str:
    """Stages, error and share of the roof in a line, and what was timed beside them in one or two below."""
    measurement = line.measurement
    cost, timings = measurement.costs["whole"], measurement.timings
    roof_us = peaks.roof_us(cost.flops, cost.num_bytes)
    accuracy = measurement.accuracy
    cells = [f"{measurement.num_tokens:,}"]
    cells += [unit.format(timings[name].median_us) for name in TIMED]
    cells += [f"{100 * roof_us / timings['whole'].median_us:.0f}%"]
    cells += [("" if accuracy.is_good else "!") + f"{accuracy.relative_frobenius:.1e}".replace("e-0", "e-")]
    beside = [f"{name} {unit.format(line.beside_us[name])}" for name in BESIDE if name in line.beside_us]
    text = ", ".join([f"roof {unit.format(roof_us)}", *beside])
    return _row(cells) + "\n" + wrap(" " * BESIDE_INDENT + text, indent=" " * BESIDE_INDENT)


def _row(cells: Sequence[str]) -> str:
    return "".join(f" {cell.rjust(width - 1)}" for cell, width in zip(cells, COLUMNS.values(), strict=True))[1:]


HEADER = _row(list(COLUMNS))
