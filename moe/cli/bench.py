"""python -m moe bench: many layers and token counts, one line each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from moe.cli.layer import FORMATS, make_layer
from moe.cli.machine import STAGES, UnfitMachine, describe_machine, expect_memory, info_json
from moe.cli.progress import Progress
from moe.cli.run import Measurement, measure_layer, report_json
from moe.cli.text import decimal
from moe.shapes import NAMED_SHAPES
from moe.tuning.measure import Peaks

NAME_WIDTH, COLUMN_WIDTH = 17, 10
TIMED = (*STAGES, "experts", "whole")


def measure_all(
    models: Sequence[str],
    token_counts: Sequence[int],
    device: torch.device,
    *,
    weight_format: str,
    routing: str,
    seed: int,
    progress: Progress,
) -> Iterator[Measurement]:
    """One measurement a model and token count; a model's weights are made once and dropped before the next model's.

    A model that does not fit the device's memory is left out, and said to be.
    """
    for model in models:
        try:
            expect_memory(NAMED_SHAPES[model], device)
        except UnfitMachine as error:
            progress.step(f"left out: {error}")
            continue
        layer = make_layer(
            NAMED_SHAPES[model], device, weight_format=FORMATS[weight_format], seed=seed, progress=progress
        )
        for num_tokens in token_counts:
            yield measure_layer(layer, num_tokens, routing=routing, seed=seed, progress=progress, with_experts=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del layer


def print_bench(
    measurements: Iterable[Measurement], peaks: Peaks, device: torch.device, json_file: Path | None
) -> bool:
    """A line as each measurement comes, microseconds; the file is rewritten each time, so that a stopped run keeps its part.

    Returns:
        Whether every result was within its error limit.
    """
    print(
        f"{peaks.matmul_flops / 1e12:,.1f} TFLOP/s {peaks.matmul_dtype} matmul, {peaks.copy_bytes_per_s / 1e9:,.0f} GB/s copy"
    )
    header = ("tokens", *TIMED, "roof", "of roof", "error")
    print("model".ljust(NAME_WIDTH) + "".join(name.rjust(COLUMN_WIDTH) for name in header), flush=True)
    results: list[dict[str, object]] = []
    is_good = True
    for measurement in measurements:
        print(_line(measurement, peaks), flush=True)
        is_good &= measurement.accuracy.is_good
        results.append(report_json(measurement, peaks))
        if json_file is not None:
            report = {"machine": info_json(describe_machine(device)), "results": results}
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    return is_good


def _line(measurement: Measurement, peaks: Peaks) -> str:
    cost = measurement.costs["whole"]
    roof_us = peaks.roof_us(cost.flops, cost.num_bytes)
    cells = [f"{measurement.num_tokens:,}"]
    cells += [decimal(measurement.timings[name].median_us) for name in TIMED]
    cells += [
        decimal(roof_us),
        f"{100 * roof_us / measurement.timings['whole'].median_us:.0f}%",
        f"{measurement.accuracy.relative_frobenius:.1e}" + ("" if measurement.accuracy.is_good else " !"),
    ]
    return measurement.layer.shape.name.ljust(NAME_WIDTH) + "".join(cell.rjust(COLUMN_WIDTH) for cell in cells)
