"""python -m moe bench: many layers and token counts, one line each, beside other ways to do the work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.cli.beside import TURNS, measure_beside, tuned_layer
from moe.cli.layer import NamedLayer, make_inputs, make_layer
from moe.cli.machine import STAGES, UnfitMachine, describe_machine, info_json
from moe.cli.memory import expect_memory
from moe.cli.plot import plot_bench
from moe.cli.progress import Progress
from moe.cli.run import Measurement, measure_layer, report_json
from moe.cli.text import decimal
from moe.tuning.measure import Peaks

NAME_WIDTH = 17
TIMED = (*STAGES, "experts", "whole")
BESIDE = ("untuned", "dense", "grouped_mm", "eager_experts", "eager")
# Each has a space before it, for a name or a number may be as wide as its column.
COLUMNS = {name: max(11, len(name) + 1) for name in ("tokens", *TIMED, *BESIDE, "roof", "of roof", "error")}


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
        fitting = _fitting(named, token_counts, device, progress)
        if not fitting:
            continue
        layer = make_layer(named, device, seed=seed, progress=progress)
        for num_tokens in fitting:
            chosen = tuned_layer(layer, num_tokens) if uses_tables else layer
            measurement = measure_layer(
                chosen, num_tokens, routing=routing, seed=seed, progress=progress, with_experts=True
            )
            sets = make_inputs(chosen, num_tokens, measurement.num_sets, routing=routing, seed=seed)
            yield BenchLine(measurement, measure_beside(chosen, layer, sets, num_turns=num_turns))
            del sets, chosen, measurement
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del layer


def _fitting(named: NamedLayer, token_counts: Sequence[int], device: torch.device, progress: Progress) -> list[int]:
    """The token counts, each once, that fit what is free before anything is made."""
    fitting = []
    for num_tokens in dict.fromkeys(token_counts):
        try:
            expect_memory(named, device, num_tokens)
        except UnfitMachine as error:
            progress.step(f"left out: {error}")
        else:
            fitting.append(num_tokens)
    return fitting


def print_bench(
    lines: Iterable[BenchLine],
    peaks: Peaks,
    device: torch.device,
    json_file: Path | None,
    plot_file: Path | None = None,
) -> bool:
    """A line as each measurement comes, microseconds; the file is rewritten each time, so that a stopped run keeps its part.

    The picture is drawn at the end.

    Returns:
        Whether every result was within its error limit.
    """
    print(
        f"{peaks.matmul_flops / 1e12:,.1f} TFLOP/s {peaks.matmul_dtype} matmul, {peaks.copy_bytes_per_s / 1e9:,.0f} GB/s copy"
    )
    print("model".ljust(NAME_WIDTH) + "".join(name.rjust(width) for name, width in COLUMNS.items()), flush=True)
    results: list[dict[str, object]] = []
    machine = describe_machine(device)
    is_good = True
    for line in lines:
        print(_text(line, peaks), flush=True)
        is_good &= line.measurement.accuracy.is_good
        results.append(line.report(peaks))
        if json_file is not None:
            report = {"machine": info_json(machine), "results": results}
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_file is not None and results:
        plot_bench(results, machine.name, plot_file)
    return is_good


def _text(line: BenchLine, peaks: Peaks) -> str:
    measurement = line.measurement
    cost = measurement.costs["whole"]
    roof_us = peaks.roof_us(cost.flops, cost.num_bytes)
    cells = [f"{measurement.num_tokens:,}"]
    cells += [decimal(measurement.timings[name].median_us) for name in TIMED]
    cells += [decimal(line.beside_us[name]) if name in line.beside_us else "-" for name in BESIDE]
    cells += [
        decimal(roof_us),
        f"{100 * roof_us / measurement.timings['whole'].median_us:.0f}%",
        f"{measurement.accuracy.relative_frobenius:.1e}" + ("" if measurement.accuracy.is_good else " !"),
    ]
    name = measurement.layer.shape.name.ljust(NAME_WIDTH)
    return name + "".join(f" {cell.rjust(width - 1)}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
