"""Each stage, the experts' part and the whole layer, against the roof and against dense GEMMs of the same size.

pytest-benchmark's own columns time a call as a program makes it: launches, kernels, and a wait for the device. The device's
time alone, from replayed CUDA graphs, is in `extra_info` and in the table at the end. No speed is asserted.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from moe.cli.beside import TURNS, dense_gemms
from moe.cli.exact import check_accuracy
from moe.cli.layer import Inputs, Layer
from moe.cli.load import Cost, mean_costs, measure_load, stage_costs
from moe.cli.machine import STAGES
from moe.cli.progress import Progress
from moe.cli.run import MAX_CHECKED_TOKENS, stage_calls
from moe.tuning.measure import Peaks, Timing, measure_in_turns, measure_peaks

HOST_ROUNDS = 20
BUDGET_S = {"cuda": 0.1, "cpu": 0.02}  # a turn


@pytest.mark.parametrize("name", [*STAGES, "experts", "whole"])
def test_time_of(
    name: str,
    layer: Layer,
    sets: list[Inputs],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    record: Callable[[dict[str, object]], None],
):
    call = stage_calls(layer, with_experts=True)[name]
    if name not in STAGES:
        expect_good(layer, sets[0], call(sets[0]))
    turns = cycle(sets)
    benchmark.pedantic(lambda: wait_for(call(next(turns))), rounds=HOST_ROUNDS, warmup_rounds=len(sets))
    if benchmark.disabled:
        return
    num_tokens, routing = request.node.callspec.params["sets"]
    loads = [measure_load(layer, inputs) for inputs in sets]
    cost = mean_costs([stage_costs(layer.shape, num_tokens, load) for load in loads])[name]
    num_rows = sum(load.num_real for load in loads) // len(loads)
    timed: dict[str, Sequence[Callable[[], object]]] = {"ours": [partial(call, inputs) for inputs in sets]}
    if dense := dense_gemms(name, layer, num_rows):
        timed["dense"] = [dense]
    benchmark.group = f"{layer.shape.name} T{num_tokens} {routing}"
    benchmark.extra_info |= {"model": layer.shape.name, "num_tokens": num_tokens, "routing": routing, "timed": name}
    benchmark.extra_info |= {"weights": request.config.getoption("--format"), "num_input_sets": len(sets)}
    timings = measure_in_turns(timed, device=layer.device, budget_s=BUDGET_S[layer.device.type], num_turns=TURNS)
    benchmark.extra_info |= report(timings, cost, peaks_of(layer.device))
    record(benchmark.extra_info)


def expect_good(layer: Layer, inputs: Inputs, output: torch.Tensor) -> None:
    """`output` may come from other kernels than the stages one by one: few tokens have their own."""
    accuracy = check_accuracy(layer, replace(inputs, output=output), MAX_CHECKED_TOKENS, Progress(shows_details=False))
    assert accuracy.is_good, accuracy


def wait_for(result: object) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def peaks_of(device: torch.device) -> Peaks:
    return measure_peaks(device)


def report(timings: dict[str, list[Timing]], cost: Cost, peaks: Peaks) -> dict[str, object]:
    """Medians over the turns; shares of `dense` are turn by turn."""
    ours = timings["ours"]
    device_us = median(timing.median_us for timing in ours)
    roof_us = peaks.roof_us(cost.flops, cost.num_bytes)
    values: dict[str, object] = {
        "device_us": device_us,
        "device_us_quartiles": [
            median(timing.first_quartile_us for timing in ours),
            median(timing.third_quartile_us for timing in ours),
        ],
        "tflops": 1e-6 * cost.flops / device_us if cost.flops else None,
        "gb_per_s": 1e-3 * cost.num_bytes / device_us,
        "roof_us": roof_us,
        "share_of_roof": roof_us / device_us,
        "peak_tflops": 1e-12 * peaks.matmul_flops,
        "peak_gb_per_s": 1e-9 * peaks.copy_bytes_per_s,
    }
    if dense := timings.get("dense"):
        values["dense_us"] = median(timing.median_us for timing in dense)
        values["share_of_dense"] = median(theirs.median_us / mine.median_us for theirs, mine in zip(dense, ours))
    return values
