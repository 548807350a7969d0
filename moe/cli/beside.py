"""What `bench` sets beside a layer: the same without a table, dense and grouped GEMMs of its size, and calls from Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from moe.cli.layer import Inputs, Layer
from moe.cli.load import Load, measure_load
from moe.cli.progress import Progress
from moe.compose import build_pipeline
from moe.tuning.measure import measure_in_turns
from moe.tuning.tuned import tuned_config

TURNS = 4  # power and clock drift, so nothing is timed in one piece
BUDGET_S = {"cuda": 0.05, "cpu": 0.02}  # a turn
MAX_EAGER_TOKENS = 256  # above, a call takes the GPU longer than the host
EAGER_S = 0.2

Calls = dict[str, Sequence[Callable[[], object]]]


def tuned_layer(layer: Layer, num_tokens: int) -> Layer:
    """The layer as the tables have it for so many tokens: itself where they change nothing."""
    config = tuned_config(layer.config, num_tokens, layer.device)
    if config == layer.config:
        return layer
    return replace(layer, config=config, pipeline=build_pipeline(config, layer.device))


def measure_beside(
    layer: Layer, untuned: Layer, sets: Sequence[Inputs], progress: Progress, *, num_turns: int = TURNS
) -> dict[str, float]:
    """Microseconds a call, by name, medians over turns: what does not run here is left out; all of it without turns.

    experts: stages 2 to 5 of `layer`; untuned: those of `untuned`, where that is another layer; dense, grouped_mm: gemm1 and
    gemm2 alone, by torch.matmul with one expert's weights and by torch's grouped_mm over rows permuted already; eager and
    eager_experts: the whole layer and its experts' part called from Python again and again, by the clock, up to 256 tokens.
    """
    if not num_turns:
        return {}
    progress.step("timing other ways beside it")
    loads = [measure_load(layer, inputs) for inputs in sets]
    calls: Calls = {"experts": [_experts(layer, inputs) for inputs in sets]}
    if untuned is not layer:
        calls["untuned"] = [_experts(untuned, inputs) for inputs in sets]
    if dense := dense_gemms("experts", layer, sum(load.num_real for load in loads) // len(loads)):
        calls["dense"] = [dense]
    grouped = [grouped_gemms(layer, load) for load in loads]
    if runs(grouped):
        calls["grouped_mm"] = grouped
    budget_s = BUDGET_S[layer.device.type]
    times = measure_in_turns(calls, device=layer.device, budget_s=budget_s, num_turns=num_turns, report=progress.tick)
    beside = {name: median(timing.median_us for timing in timings) for name, timings in times.items()}
    if sets[0].logits.shape[0] <= MAX_EAGER_TOKENS:
        beside["eager"] = eager_us(
            [partial(layer.pipeline, i.logits, i.hidden_states, layer.w1, layer.w2, bias=layer.bias) for i in sets],
            layer.device,
        )
        beside["eager_experts"] = eager_us(calls["experts"], layer.device)
    return beside


def dense_gemms(name: str, layer: Layer, num_rows: int) -> Callable[[], object] | None:
    """As many rows times one expert's weights by torch.matmul: what grouping, gathering and activation are to cost little over.

    None for what multiplies nothing.
    """
    factors = []
    for stage, gemm in (("gemm1", layer.config.gemm1), ("gemm2", layer.config.gemm2)):
        if num_rows and name in (stage, "experts", "whole"):
            rows = torch.randn(num_rows, gemm.in_features, device=layer.device).bfloat16()
            weights = torch.randn(gemm.weight_rows, gemm.in_features, device=layer.device).bfloat16()
            factors.append((rows, weights))
    return (lambda: [rows @ weights.mT for rows, weights in factors]) if factors else None


def grouped_gemms(layer: Layer, load: Load) -> Callable[[], object]:
    """Both GEMMs over rows that are grouped by expert, without gathering, activation or sum, by torch's grouped_mm.

    Weights in other formats are read as if they were MajorK: as many bytes from the same places.
    """
    ends = torch.tensor(load.rows_of_expert, device=layer.device).cumsum(0).to(torch.int32)
    factors: list[tuple[Tensor, Tensor]] = []
    for weights, gemm in ((layer.w1, layer.config.gemm1), (layer.w2, layer.config.gemm2)):
        rows = torch.randn(load.num_real, gemm.in_features, device=layer.device).bfloat16()
        factors.append((rows, weights.reshape(-1, gemm.weight_rows, gemm.in_features).mT))
    return lambda: [torch._grouped_mm(rows, weights, ends) for rows, weights in factors]


def runs(calls: Sequence[Callable[[], object]]) -> bool:
    """Whether each call succeeds here: torch's grouped_mm needs some GPUs and refuses some shapes."""
    try:
        for call in calls:
            call()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def eager_us(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Microseconds a call by the clock, called back to back with one wait for the device at the end."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def time_rounds(num_rounds: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(num_rounds):
            for call in calls:
                call()
        wait()
        return time.perf_counter() - start

    first_s = min(time_rounds(1) for _ in range(2))
    num_rounds = max(1, int(EAGER_S / first_s))
    return 1e6 * time_rounds(num_rounds) / (num_rounds * len(calls))


def _experts(layer: Layer, inputs: Inputs) -> Callable[[], object]:
    return partial(layer.pipeline.run_experts, inputs.topk, inputs.hidden_states, layer.w1, layer.w2)
