"""What GPUs of one host do together over NCCL and symmetric memory; every rank runs every case."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
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
from torch import Tensor

import moe
from moe.flow import TopK
from moe.parallel import InHalves, ParallelLayer, WithSharedExpert, move_weights, rebalance, transport_of

TOKENS = (5, 0, 70, 2)
MOST = max(TOKENS)


def device_of_rank() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def whole_of(world: Any, seed: int = 0) -> Whole:
    tokens = TOKENS[1:] if world.size() == 2 else TOKENS
    return moved_to(make_whole(tokens[: world.size()], seed=seed), device_of_rank())


def expect_own(whole: Whole, rank: int, output: Tensor) -> None:
    """Raise unless `output` is this rank's part of the layer's."""
    first = sum(whole.tokens_of_rank[:rank])
    wanted = whole.reference()[first : first + len(output)]
    torch.testing.assert_close(output, wanted, rtol=2e-2, atol=2e-2)


def check(world: Any, **options: Any) -> None:
    whole = whole_of(world)
    layer = layer_over(transport_of(world), whole, **options)
    first = run_rank(whole, layer)
    expect_own(whole, layer.transport.rank, first)
    for _ in range(20):  # memory that is used again, with nothing to order calls but the exchange itself
        assert torch.equal(run_rank(whole, layer), first)


def gather(world: Any) -> None:
    check(world, exchange="gather")
    check(world, exchange="gather", max_tokens=MOST)


def move(world: Any) -> None:
    check(world, exchange="move")
    check(world, exchange="move", experts_of_rank=[EXPERTS, *[0] * (world.size() - 1)])


def symmetric_gather(world: Any) -> None:
    check(world, exchange="symmetric_gather", max_tokens=MOST)


def symmetric_move(world: Any) -> None:
    check(world, exchange="symmetric_move", max_tokens=MOST)


def every_sum(world: Any) -> None:
    for num_tokens in (1, 16, 65):
        whole = moved_to(make_whole([num_tokens]), device_of_rank())
        for exchange in ("sum", "symmetric_sum"):
            layer = layer_over(transport_of(world), whole, exchange=exchange, max_tokens=65)
            first = run_rank_with_all_tokens(whole, layer)
            whole.expect(first)
            for _ in range(20):
                assert torch.equal(run_rank_with_all_tokens(whole, layer), first)


def rank_invariant_bits(world: Any) -> None:
    whole = whole_of(world, seed=1)
    layer = layer_over(transport_of(world), whole, exchange="move", is_rank_invariant=True)
    output = run_rank(whole, layer)
    config = moe.MoEConfig.create(
        hidden_size=CONFIG.hidden_size, intermediate_size=INNER, num_experts=EXPERTS, top_k=TOP_K, is_batch_invariant=True
    )  # fmt: skip
    one_rank = moe.build_pipeline(config, device_of_rank())
    wanted = one_rank.run_experts(whole.topk, whole.hidden_states, whole.w1, whole.w2)
    first = sum(whole.tokens_of_rank[: layer.transport.rank])
    assert torch.equal(output, wanted[first : first + len(output)])


def in_a_graph(world: Any) -> None:
    for exchange in ("gather", "symmetric_gather", "symmetric_move"):
        whole = whole_of(world)
        layer = layer_over(transport_of(world), whole, exchange=exchange, max_tokens=MOST)
        captured(layer, whole, *whole.tokens_at(layer.transport.rank))
    for exchange in ("sum", "symmetric_sum"):
        whole = moved_to(make_whole([24]), device_of_rank())
        layer = layer_over(transport_of(world), whole, exchange=exchange, max_tokens=24)
        captured(layer, whole, whole.topk, whole.hidden_states)


def captured(layer: ParallelLayer, whole: Whole, topk: TopK, hidden_states: Tensor) -> None:
    """Raise unless replays of a CUDA graph give what the call gives."""
    call = partial(layer.run_experts, topk, hidden_states, *whole.weights_of(layer))
    wanted = call().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    layer.transport.all_gather("start", torch.zeros(1, device=wanted.device))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for _ in range(5):
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, wanted)


def weights_move(world: Any) -> None:
    whole = whole_of(world)
    layer = layer_over(transport_of(world), whole)
    found = rebalance(layer.placement, [100.0, 90.0, 80.0, 70.0] + [1.0] * (EXPERTS - 4))
    moved = [move_weights(found.moves, weights, layer.transport) for weights in whole.weights_of(layer)]
    after = layer_over(transport_of(world), whole, experts_of_rank=found.placement)
    for weights, wanted in zip(moved, whole.weights_of(after)):
        assert torch.equal(weights, wanted)


def work_beside_the_exchange(world: Any) -> None:
    whole = whole_of(world)
    transport = transport_of(world)
    shared = torch.nn.Linear(whole.hidden_states.shape[1], whole.hidden_states.shape[1], bias=False).bfloat16()
    shared = shared.to(device_of_rank())
    for exchange in ("gather", "move", "symmetric_gather", "symmetric_move"):
        first, second = (
            layer_over(transport, whole, exchange=exchange, max_tokens=MOST, memory=memory) for memory in (1, 2)
        )
        _, x = whole.tokens_at(transport.rank)
        w1, w2 = whole.weights_of(first)
        logits = torch.randn(len(x), EXPERTS, device=x.device)
        cut = -(-len(x) // 2)
        wanted = torch.cat([first(logits[part], x[part], w1, w2) for part in (slice(0, cut), slice(cut, len(x)))])
        plain = first(logits, x, w1, w2).clone()
        for _ in range(10):
            assert torch.equal(InHalves(first, second)(logits, x, w1, w2), wanted)
            assert torch.equal(WithSharedExpert(first, shared)(logits, x, w1, w2), plain + shared(x))


CASES = {
    case.__name__: case
    for case in (
        gather,
        move,
        symmetric_gather,
        symmetric_move,
        every_sum,
        rank_invariant_bits,
        in_a_graph,
        weights_move,
        work_beside_the_exchange,
    )
}
