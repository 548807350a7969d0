"""python -m moe bench --stage NAME=MODULE:FUNCTION: a stage of one's own, checked and timed beside ours and dense GEMMs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from moe.cli.beside import BUDGET_S, TURNS, dense_gemms
from moe.cli.exact import Accuracy, check_accuracy
from moe.cli.layer import Inputs, Layer, make_inputs
from moe.cli.load import Cost, mean_costs, measure_load, stage_costs
from moe.cli.machine import STAGES, UnfitMachine
from moe.cli.progress import Progress
from moe.cli.run import MAX_CHECKED_TOKENS, stage_calls
from moe.cli.text import Unit, decimal, table
from moe.tuning.measure import Peaks, Timing, measure_in_turns, median_turn
from moe.tuning.problem import sets_for

HEADER = ("tokens", "mine", "ours", "dense", "roof", "of roof", "ours/mine", "error")


@dataclass(frozen=True)
class OwnStage:
    """A stage of the layer by a callable of somebody else's."""

    name: str  # one of STAGES
    function: Callable[..., Any]
    source: str  # as it was typed


@dataclass(frozen=True)
class StageTimes:
    """A stage at one token count: `mine`, `ours` and, for a GEMM, `dense`, turn by turn; and the layer's error with `mine` in it."""

    stage: str
    model: str
    num_tokens: int
    num_sets: int
    turns: dict[str, list[Timing]]
    cost: Cost
    accuracy: Accuracy

    def median_us(self, name: str) -> float | None:
        return median_turn(self.turns[name]).median_us if name in self.turns else None

    def ratio_to(self, other: str) -> float | None:
        """How many times as long `other` took, the median over turns: above 1, `mine` is faster."""
        if other not in self.turns:
            return None
        return median(theirs.median_us / mine.median_us for theirs, mine in zip(self.turns[other], self.turns["mine"]))

    def report(self, peaks: Peaks) -> dict[str, object]:
        """Plain values: times, operations, bytes and the share of the roof."""
        mine = median_turn(self.turns["mine"])
        roof_us = peaks.roof_us(self.cost.flops, self.cost.num_bytes)
        return {
            "stage": self.stage,
            "model": self.model,
            "num_tokens": self.num_tokens,
            "num_input_sets": self.num_sets,
            "device_us": mine.median_us,
            "device_us_quartiles": [mine.first_quartile_us, mine.third_quartile_us],
            "num_samples": mine.num_samples,
            "ours_us": self.median_us("ours"),
            "dense_us": self.median_us("dense"),
            "share_of_ours": self.ratio_to("ours"),
            "share_of_dense": self.ratio_to("dense"),
            "flops": self.cost.flops,
            "num_bytes": self.cost.num_bytes,
            "tflops": 1e-6 * self.cost.flops / mine.median_us if self.cost.flops else None,
            "gb_per_s": 1e-3 * self.cost.num_bytes / mine.median_us,
            "roof_us": roof_us,
            "share_of_roof": roof_us / mine.median_us,
            "accuracy": asdict(self.accuracy) | {"is_good": self.accuracy.is_good},
        }


def read_stage(text: str) -> OwnStage:
    """A stage from "gemm2=my.module:my_gemm2" or "gemm2=path/to/file.py:my_gemm2".

    Raises:
        UnfitMachine: another form, no such stage, module or function.
    """
    name, equals, source = text.partition("=")
    place, colon, function_name = source.rpartition(":")
    wanted = f"--stage {text}: expected STAGE=MODULE:FUNCTION"
    if not (equals and colon and place and function_name):
        raise UnfitMachine(f"{wanted}, as gemm2=my.module:my_gemm2")
    if name not in STAGES:
        raise UnfitMachine(f"{wanted} with a stage out of {', '.join(STAGES)}, got {name!r}")
    try:
        function = getattr(_import(place), function_name)
    except (ImportError, OSError) as error:
        raise UnfitMachine(f"{wanted}, got {type(error).__name__}: {error}") from error
    except AttributeError as error:
        raise UnfitMachine(f"{wanted}, got a module without {function_name!r}") from error
    if not callable(function):
        raise UnfitMachine(f"{wanted}, got {function_name!r}, which cannot be called")
    return OwnStage(name, function, text)


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure_stage(
    own: OwnStage,
    layer: Layer,
    num_tokens: int,
    *,
    routing: str = "uniform",
    seed: int = 0,
    num_turns: int = TURNS,
    progress: Progress | None = None,
) -> StageTimes:
    """Check the layer with the stage in it against float64, then time the stage, ours and dense GEMMs by turns.

    On a GPU calls are replayed from CUDA graphs, over input sets that take turns (`moe.tuning.measure`).

    Raises:
        UnfitMachine: a stage that cannot be captured in a CUDA graph, or a Triton kernel on a CPU.
    """
    progress = progress or Progress(shows_details=False)
    progress.step(f"{layer.shape.name}, {num_tokens:,} tokens: {own.name} of your own, checked and timed")
    swapped: dict[str, Any] = {own.name: own.function}
    mine = replace(layer, pipeline=replace(layer.pipeline, **swapped))
    try:
        accuracy = _accuracy(mine, num_tokens, routing=routing, seed=seed, progress=progress)
    except RuntimeError as error:
        if layer.device.type == "cuda" or "active driver" not in str(error):
            raise
        raise UnfitMachine(
            f"--stage {own.source}: expected a stage that runs on a CPU, got a Triton kernel; time it on a GPU, and check it here "
            "with moe.testing in Triton's interpreter (TRITON_INTERPRET=1)"
        ) from error
    sets = make_inputs(layer, num_tokens, sets_for(num_tokens, layer.device), routing=routing, seed=seed)
    loads = [measure_load(layer, inputs) for inputs in sets]
    calls: dict[str, Sequence[Callable[[], object]]] = {
        "mine": _calls(mine, own.name, sets),
        "ours": _calls(layer, own.name, sets),
    }
    if dense := dense_gemms(own.name, layer, sum(load.num_real for load in loads) // len(loads)):
        calls["dense"] = [dense]
    try:
        turns = measure_in_turns(
            calls,
            device=layer.device,
            budget_s=BUDGET_S[layer.device.type],
            num_turns=max(num_turns, 3),
            report=progress.tick,
        )
    except RuntimeError as error:
        if layer.device.type == "cuda" and "captur" in str(error):
            raise UnfitMachine(
                f"--stage {own.source}: expected a function that a CUDA graph can hold, got one that waits for the GPU or allocates "
                f"by what it finds there ({str(error).splitlines()[0]}); launch for the bounds in the permutation"
            ) from error
        raise
    cost = mean_costs([stage_costs(layer.shape, num_tokens, load) for load in loads])[own.name]
    return StageTimes(own.name, layer.shape.name, num_tokens, len(sets), turns, cost, accuracy)


def _accuracy(mine: Layer, num_tokens: int, *, routing: str, seed: int, progress: Progress) -> Accuracy:
    (inputs,) = make_inputs(mine, num_tokens, 1, routing=routing, seed=seed)
    return check_accuracy(mine, inputs, MAX_CHECKED_TOKENS, progress)


def _calls(layer: Layer, stage: str, sets: Sequence[Inputs]) -> list[Callable[[], object]]:
    call = stage_calls(layer, with_experts=False)[stage]
    return [partial(call, inputs) for inputs in sets]


def stage_table(lines: Sequence[StageTimes], peaks: Peaks, unit: Unit) -> str:
    """A line a token count, of one layer."""
    rows = []
    for line in lines:
        roof_us = peaks.roof_us(line.cost.flops, line.cost.num_bytes)
        mine_us = line.median_us("mine") or 0.0
        times = (line.median_us(name) for name in ("mine", "ours", "dense"))
        ratio = line.ratio_to("ours") or 0.0
        error = f"{line.accuracy.relative_frobenius:.1e}" + ("" if line.accuracy.is_good else " WRONG")
        cells = [f"{line.num_tokens:,}", *("-" if us is None else unit.format(us) for us in times)]
        rows.append((*cells, unit.format(roof_us), f"{100 * roof_us / mine_us:.0f}%", decimal(ratio), error))
    return table(HEADER, rows)
