"""python -m moe run: one layer of a named model, timed stage by stage and held against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from moe.cli.exact import ERROR_LIMIT, MIN_SAME_CHOICES, Accuracy, check_accuracy
from moe.cli.layer import Inputs, Layer, make_inputs
from moe.cli.load import Cost, Load, mean_costs, measure_load, stage_costs
from moe.cli.machine import STAGES, function_of_stage, is_kernel
from moe.cli.progress import Progress
from moe.cli.text import Unit, decimal, flops_unit, histogram, table, time_unit, wrap
from moe.tuning.measure import Peaks, Timing, measure_in_turns, median_turn
from moe.tuning.problem import sets_for

MAX_CHECKED_TOKENS = 64
# The layer and its stages take turns, for a machine's speed drifts. A GPU that is busy for 50 ms and more lowers its clock, so
# little in each turn.
TURNS = 3
TURN_BUDGET_S = {"cuda": 0.02, "cpu": 0.5}
ENOUGH_S = {"cuda": math.inf, "cpu": 15.0}  # a CPU may take seconds a call: then fewer turns
VARIES = 1.5  # third quartile over first: more than that is not the layer's doing


@dataclass(frozen=True)
class Measurement:
    """One layer at one token count. Times, costs and loads are by stage, and for `whole`, all stages as one call."""

    layer: Layer
    num_tokens: int
    routing: str
    num_sets: int
    load: Load  # of the first input set
    costs: dict[str, Cost]  # mean over input sets
    timings: dict[str, Timing]
    accuracy: Accuracy


def measure_layer(
    layer: Layer, num_tokens: int, *, routing: str, seed: int, progress: Progress, with_experts: bool = False
) -> Measurement:
    """Make inputs, time each stage and the whole, and check the result.

    Args:
        with_experts: time also `experts`, the whole without routing.
    """
    progress.step(f"{layer.shape.name}, {num_tokens:,} tokens: first calls, which compile")
    num_sets = sets_for(num_tokens, layer.device)
    sets = make_inputs(layer, num_tokens, num_sets, routing=routing, seed=seed)
    loads = [measure_load(layer, inputs) for inputs in sets]
    costs = mean_costs([stage_costs(layer.shape, num_tokens, load) for load in loads])
    calls = {
        name: [partial(call, inputs) for inputs in sets]
        for name, call in stage_calls(layer, with_experts=with_experts).items()
    }
    device = layer.device
    progress.detail("timing the layer and its stages by turns")
    turns = measure_in_turns(
        calls,
        device=device,
        budget_s=TURN_BUDGET_S[device.type],
        num_turns=TURNS,
        report=progress.tick,
        is_warm=True,  # making the inputs has called every stage
        enough_s=ENOUGH_S[device.type],
    )
    timings = {name: median_turn(its_turns) for name, its_turns in turns.items()}
    progress.detail(f"float64 reference of {min(num_tokens, MAX_CHECKED_TOKENS)} tokens")
    accuracy = check_accuracy(layer, sets[0], MAX_CHECKED_TOKENS, progress)
    return Measurement(layer, num_tokens, routing, num_sets, loads[0], costs, timings, accuracy)


def stage_calls(layer: Layer, *, with_experts: bool) -> dict[str, Callable[[Inputs], object]]:
    """What is timed, by name: each stage on the output of the one before, then the whole."""
    pipeline, w1, w2, bias = layer.pipeline, layer.w1, layer.w2, layer.bias
    calls: dict[str, Callable[[Inputs], object]] = {
        "route": lambda i: pipeline.route(i.logits, bias),
        "permute": lambda i: pipeline.permute(i.topk),
        "gemm1": lambda i: pipeline.gemm1(i.hidden_states, w1, i.permutation),
        "gemm2": lambda i: pipeline.gemm2(i.activation, w2, i.permutation),
        "finalize": lambda i: pipeline.finalize(i.rows, i.topk, i.permutation),
        "whole": lambda i: pipeline(i.logits, i.hidden_states, w1, w2, bias=bias),
    }
    if with_experts:
        calls["experts"] = lambda i: pipeline.run_experts(i.topk, i.hidden_states, w1, w2)
    return calls


def report_text(measurement: Measurement, peaks: Peaks) -> str:
    """What `run` prints: dimensions, times, load and error."""
    return "\n\n".join(
        (
            _dimensions_text(measurement),
            _times_text(measurement, peaks),
            _load_text(measurement.load),
            _accuracy_text(measurement.accuracy),
        )
    )


def _dimensions_text(measurement: Measurement) -> str:
    shape = measurement.layer.shape
    local = "" if shape.num_local_experts == shape.num_experts else f" ({shape.num_local_experts} of them here)"
    return wrap(
        f"{shape.name}: hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, {shape.num_experts} experts"
        f"{local}, top-{shape.top_k}, {shape.method} routing\n"
        f"{measurement.num_tokens:,} tokens, {measurement.routing} routing, random bf16 weights"
    )


def _times_text(measurement: Measurement, peaks: Peaks) -> str:
    unit = time_unit(max(timing.median_us for timing in measurement.timings.values()))
    flops = flops_unit(peaks.matmul_flops)
    rows = []
    for name, timing in measurement.timings.items():
        cost = measurement.costs[name]
        roof_us = peaks.roof_us(cost.flops, cost.num_bytes)
        bound = "compute" if cost.flops / peaks.matmul_flops > cost.num_bytes / peaks.copy_bytes_per_s else "memory"
        rows.append(
            (
                name,
                unit.format(timing.median_us),
                _spread_text(timing, unit),
                flops.format(1e6 * cost.flops / timing.median_us) if cost.flops else "-",
                decimal(1e-3 * cost.num_bytes / timing.median_us),
                f"{100 * roof_us / timing.median_us:.0f}%",
                bound,
                _runner_of(measurement.layer, name),
            )
        )
    header = ("stage", f"median {unit.name}", "quartiles", flops.name, "GB/s", "of roof", "bound", "runs")
    return table(header, rows) + (
        f"\nroof: the larger of operations / {flops.format(peaks.matmul_flops)} {flops.name} and fewest bytes / "
        f"{decimal(1e-9 * peaks.copy_bytes_per_s)} GB/s,\n      both measured on this device just now "
        f"({peaks.matmul_dtype} matmul; copy, in and out)"
        "\nwhole: all stages as one call; its bytes leave out what passes between stages\n"
        f"{_samples_text(measurement.timings)}"
    )


def _samples_text(timings: dict[str, Timing]) -> str:
    """How many samples the medians are of, and a warning where they are far apart."""
    counts = sorted({timing.num_samples for timing in timings.values()})
    text = f"medians of {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") + " samples"
    varying = [name for name, timing in timings.items() if timing.third_quartile_us > VARIES * timing.first_quartile_us]
    if varying:
        text += f"; {', '.join(varying)} varied widely: is something else running on this machine?"
    return wrap(text)


def _spread_text(timing: Timing, unit: Unit) -> str:
    return f"{unit.format(timing.first_quartile_us)} .. {unit.format(timing.third_quartile_us)}"


def _runner_of(layer: Layer, name: str) -> str:
    if name not in STAGES:
        return ""
    function = function_of_stage(layer.pipeline, name)
    return "kernel" if is_kernel(function) else "torch"


def _load_text(load: Load) -> str:
    rows = load.rows_of_expert
    idle = len(rows) - load.num_active
    return (
        f"rows an expert: min {min(rows)}, mean {load.num_real / len(rows):.1f}, max {max(rows)}; "
        f"imbalance {load.imbalance:.2f} (max / mean)\n{idle} of {len(rows)} experts idle\n"
        f"{histogram(rows)}\n"
        f"{load.num_rows:,} rows for {load.num_real:,} real ones: {100 * load.padding_share:.0f}% padding "
        f"(tiles of {load.tile_rows} rows)"
    )


def _accuracy_text(accuracy: Accuracy) -> str:
    verdict = "good" if accuracy.is_close else f"WRONG, over the limit of {ERROR_LIMIT:.0e}"
    choices = "" if accuracy.chooses_alike else f" (WRONG, expected more than {100 * MIN_SAME_CHOICES:.1f}%)"
    return wrap(
        f"error against float64 over {accuracy.num_checked} tokens: relative Frobenius "
        f"{accuracy.relative_frobenius:.2e} ({verdict})\n"
        f"worst element: off by {accuracy.worst_error:.2e} where {accuracy.worst_exact:+.3f} is exact "
        f"(token {accuracy.worst_token}, column {accuracy.worst_column})\n"
        f"choices of experts that agree with the routing reference: {100 * accuracy.same_choices:.2f}%{choices}"
    )


def report_json(measurement: Measurement, peaks: Peaks) -> dict[str, object]:
    """The same as plain values."""
    stages = {}
    for name, timing in measurement.timings.items():
        cost = measurement.costs[name]
        roof_us = peaks.roof_us(cost.flops, cost.num_bytes)
        stages[name] = asdict(timing) | asdict(cost) | {"roof_us": roof_us, "share_of_roof": roof_us / timing.median_us}
    load = measurement.load
    return {
        "model": measurement.layer.shape.name,
        "num_tokens": measurement.num_tokens,
        "routing": measurement.routing,
        "num_input_sets": measurement.num_sets,
        "stages": stages,
        "peaks": asdict(peaks),
        "load": asdict(load) | {"imbalance": load.imbalance, "padding_share": load.padding_share},
        "accuracy": asdict(measurement.accuracy) | {"is_good": measurement.accuracy.is_good},
    }
