"""Routing: each rule alone, and what it adds to a layer. No speed is asserted.

The layer behind it is small, so that what routing adds is not lost in the spread of the rest, and is the same for all
rules. pytest-benchmark's own columns time a call as a program makes it; the device's time is in `extra_info`.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from moe import MoEConfig, RoutingMethod, build_pipeline
from moe.cli.beside import BUDGET_S, TURNS
from moe.cli.layer import random_logits
from moe.cli.machine import pick_device
from moe.pipeline import MoEPipeline
from moe.routing.reference import select_experts_reference
from moe.tuning.measure import measure_in_turns
from moe.tuning.problem import make_weights, sets_for

HOST_ROUNDS = 20
HIDDEN_SIZE, INTERMEDIATE_SIZE = 512, 128
# As models use them: 128 experts and 8 a token where nothing else is said.
RULES: dict[str, dict] = {
    **{method.value: {"method": method} for method in RoutingMethod},
    "Llama4": {"method": "Llama4", "num_experts": 16, "top_k": 1},
    "MiniMax2": {"method": "MiniMax2", "num_experts": 256, "routed_scaling_factor": 2.5},
    "DeepSeekV3": {
        "method": "DeepSeekV3",
        "num_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    "DeepSeekV3, one group": {
        "method": "DeepSeekV3",
        "num_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
    },
    "Renormalize, 512 experts": {"method": "Renormalize", "num_experts": 512, "top_k": 10},
}
TOKENS = (1, 8, 32, 128, 8192)
SMOKE_TOKENS = (1, 40)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_smoke = metafunc.config.getoption("--benchmark-disable") or not torch.cuda.is_available()
    if text := metafunc.config.getoption("--tokens"):
        tokens: tuple[int, ...] = tuple(map(int, text.split(","))) if text != "all" else TOKENS
    else:
        tokens = SMOKE_TOKENS if is_smoke else TOKENS
    metafunc.parametrize("num_tokens", tokens, ids="T{}".format)


@pytest.mark.parametrize("rule", RULES)
def test_time_of_routing(
    rule: str, num_tokens: int, benchmark: BenchmarkFixture, record_routing: Callable[[dict[str, object]], None]
):
    device = pick_device("auto")
    fields = {"num_experts": 128, "top_k": 8} | RULES[rule]
    config = MoEConfig.create(hidden_size=HIDDEN_SIZE, intermediate_size=INTERMEDIATE_SIZE, **fields)
    pipeline, weights = build_pipeline(config, device), make_weights(config, device)
    generator = torch.Generator(device=device).manual_seed(0)
    sets = []
    for _ in range(sets_for(num_tokens, device)):
        logits = random_logits(num_tokens, config.num_experts, "uniform", generator)
        hidden_states = torch.empty(num_tokens, HIDDEN_SIZE, dtype=torch.bfloat16, device=device)
        sets.append((logits, hidden_states.normal_(generator=generator)))
    bias = None
    if config.routing.method.uses_bias:
        bias = 0.01 * torch.randn(config.num_experts, generator=generator, device=device)
    calls = calls_of(pipeline, sets, weights, bias)
    expected = select_experts_reference(sets[0][0], bias, config=config.routing).expert_ids
    assert (pipeline.route(sets[0][0], bias).expert_ids == expected).float().mean() > 0.99  # ties of two roundings
    turns = cycle(calls["route"])
    benchmark.pedantic(lambda: next(turns)(), rounds=HOST_ROUNDS, warmup_rounds=len(sets))
    if benchmark.disabled:
        return
    timings = measure_in_turns(calls, device=device, budget_s=BUDGET_S[device.type], num_turns=TURNS)
    us = {name: median(timing.median_us for timing in its_turns) for name, its_turns in timings.items()}
    added = median(
        whole.median_us - experts.median_us for whole, experts in zip(timings["whole"], timings["experts"], strict=True)
    )
    benchmark.group = f"routing T{num_tokens}"
    benchmark.extra_info |= {"rule": rule, "num_experts": config.num_experts, "top_k": config.top_k}
    benchmark.extra_info |= {"num_tokens": num_tokens, "route_us": us["route"], "added_us": added}
    benchmark.extra_info |= {"route_permute_us": us["route_permute"]}
    benchmark.extra_info |= {"experts_us": us["experts"], "whole_us": us["whole"]}
    record_routing(benchmark.extra_info)


def calls_of(
    pipeline: MoEPipeline,
    sets: list[tuple[torch.Tensor, torch.Tensor]],
    weights: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
) -> dict[str, list[Callable[[], object]]]:
    """Routing alone and with permutation, the layer without routing, and the layer: one call an input set."""

    def route_permute(logits: torch.Tensor) -> object:
        return pipeline.permute(pipeline.route(logits, bias))

    calls: dict[str, list[Callable[[], object]]] = {"route": [], "route_permute": [], "experts": [], "whole": []}
    for logits, hidden_states in sets:
        topk = pipeline.route(logits, bias)
        calls["route"].append(partial(pipeline.route, logits, bias))
        calls["route_permute"].append(partial(route_permute, logits))
        calls["experts"].append(partial(pipeline.run_experts, topk, hidden_states, *weights))
        calls["whole"].append(partial(pipeline, logits, hidden_states, *weights, bias=bias))
    return calls
