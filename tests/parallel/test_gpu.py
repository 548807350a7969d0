"""The layer on a GPU: one with simulated ranks, and one a rank over NCCL and symmetric memory where there are two and more."""

from __future__ import annotations

import pytest
import torch
from parallel.gpu_cases import CASES
from parallel.layers import (
    CONFIG,
    EXPERTS,
    INNER,
    TOP_K,
    Whole,
    layer_over,
    make_whole,
    moved_to,
    run_rank,
    run_rank_with_all_tokens,
)
from parallel.processes import run_cases
from torch import Tensor

import moe
from moe.parallel import Placement
from moe.parallel.simulated import simulate
from moe.parallel.transport import Transport

PLACEMENTS = {
    "even": None,
    "a_rank_without_experts": [5, 0, 2, 1],
    "copies": Placement(EXPERTS, ((0, 1, 2), (3, 4, 0), (5, 0, 6), (7, 4))),
}
EXCHANGES = ["gather", "move", "symmetric_gather", "symmetric_move"]


def outputs_of(whole: Whole, **options: object) -> Tensor:
    num_ranks = len(whole.tokens_of_rank)
    return torch.cat(simulate(num_ranks, lambda t: run_rank(whole, layer_over(t, whole, **options))))


@pytest.mark.parametrize("tokens", [(5, 0, 70, 2), (1, 1, 1, 1), (300, 7, 0, 129)], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_simulated_ranks_get_their_tokens_results(exchange, placement, tokens, cuda):
    whole = moved_to(make_whole(tokens), cuda)
    whole.expect(outputs_of(whole, exchange=exchange, experts_of_rank=placement, max_tokens=300))


@pytest.mark.parametrize("exchange", ["sum", "symmetric_sum"])
@pytest.mark.parametrize("num_tokens", [1, 16, 65])
def test_simulated_ranks_get_all_sums(num_tokens, exchange, cuda):
    whole = moved_to(make_whole([num_tokens]), cuda)
    for output in simulate(
        3, lambda t: run_rank_with_all_tokens(whole, layer_over(t, whole, exchange=exchange, max_tokens=65))
    ):
        whole.expect(output)


@pytest.mark.parametrize("placement", ["even", "copies"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_rank_invariant_layers_have_the_bits_of_one_rank(num_ranks, placement, cuda):
    tokens = {1: (140,), 2: (0, 140), 4: (37, 1, 2, 100), 8: (9, 0, 1, 30, 50, 25, 20, 5)}[num_ranks]
    whole = moved_to(make_whole(tokens), cuda)
    config = moe.MoEConfig.create(
        hidden_size=CONFIG.hidden_size, intermediate_size=INNER, num_experts=EXPERTS, top_k=TOP_K, is_batch_invariant=True
    )  # fmt: skip
    wanted = moe.build_pipeline(config, cuda).run_experts(whole.topk, whole.hidden_states, whole.w1, whole.w2)
    chosen = PLACEMENTS["copies"] if placement == "copies" and num_ranks == 4 else None
    found = outputs_of(whole, exchange="move", is_rank_invariant=True, experts_of_rank=chosen)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("exchange", ["gather", "sum", "symmetric_gather", "symmetric_move", "symmetric_sum"])
def test_nothing_waits_for_the_host(exchange, cuda):
    tokens = (6,) if exchange.endswith("sum") else (6, 2)
    whole = moved_to(make_whole(tokens), cuda)
    run = run_rank_with_all_tokens if exchange.endswith("sum") else run_rank

    def one_rank(transport: Transport) -> None:
        layer = layer_over(transport, whole, exchange=exchange, max_tokens=6, counts_load=True)
        topk, x = (whole.topk, whole.hidden_states) if exchange.endswith("sum") else whole.tokens_at(transport.rank)
        w1, w2 = whole.weights_of(layer)
        run(whole, layer)  # compiles
        none = torch.zeros(1)
        transport.all_gather("start", none)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.run_experts(topk, x, w1, w2)
            transport.all_gather("end", none)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    simulate(2, one_rank)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        pytest.skip(f"expected two GPUs and more, got {num_gpus}; simulated ranks run on one")
    return run_cases(min(num_gpus, 4), CASES, tmp_path_factory.mktemp("ranks"), backend="nccl")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpus_together(case, reports):
    assert not reports[case], reports[case]
