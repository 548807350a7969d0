"""What four processes do together over gloo; every rank runs every case."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.layers import EXPERTS, Whole, layer_over, make_exact_whole, make_whole, run_rank, run_rank_with_all_tokens
from parallel.processes import RankDied

import moe
from moe.cli.layer import NamedLayer
from moe.cli.parallel import ERROR_LIMIT, measure_parallel
from moe.flow import TopK
from moe.parallel import ParallelLayer, Placement, build_layer, move_weights, rebalance_together, transport_of

LATE_S = 1.5
COPIES = Placement(EXPERTS, ((0, 1, 2), (3, 4, 0), (5, 0, 6), (7, 4)))


def check_exchange(group: Any, tokens: tuple[int, ...], **options: Any) -> None:
    whole = make_whole(tokens)
    layer = layer_over(transport_of(group), whole, **options)
    for _ in range(2):
        output = run_rank(whole, layer)
        most = max(tokens)
        padded = output.new_zeros(most, output.shape[1])
        padded[: len(output)] = output
        gathered = transport_of(group).all_gather("outputs", padded).view(len(tokens), most, -1)
        whole.expect(torch.cat([gathered[rank, :count] for rank, count in enumerate(tokens)]))


def check_sum(group: Any, num_tokens: int, **options: Any) -> None:
    whole = make_whole([num_tokens])
    output = run_rank_with_all_tokens(whole, layer_over(transport_of(group), whole, exchange="sum", **options))
    whole.expect(output)


def check_invariant(group: Any, tokens: tuple[int, ...], experts_of_rank: Any) -> None:
    whole = make_exact_whole(tokens)
    layer = layer_over(
        transport_of(group), whole, exchange="move", is_rank_invariant=True, experts_of_rank=experts_of_rank
    )
    output = run_rank(whole, layer)
    first = sum(tokens[: layer.transport.rank])
    assert torch.equal(output, whole.reference()[first : first + len(output)])


def on_two_ranks(world: Any, case: Any) -> None:
    """The case on ranks 0 and 1 alone; making a group takes all ranks."""
    group = dist.new_group([0, 1])
    if dist.get_rank(world) < 2:
        case(group)


def gather_between_four(world: Any) -> None:
    check_exchange(world, (5, 0, 7, 2), experts_of_rank=[4, 0, 3, 1])
    check_exchange(world, (5, 0, 7, 2), max_tokens=8, experts_of_rank=COPIES)


def move_between_four(world: Any) -> None:
    check_exchange(world, (5, 0, 7, 2), exchange="move", experts_of_rank=[4, 0, 3, 1])
    check_exchange(world, (5, 0, 7, 2), exchange="move", experts_of_rank=COPIES)
    check_exchange(world, (0, 0, 1, 0), exchange="move")


def sum_between_four(world: Any) -> None:
    check_sum(world, 6, experts_of_rank=[4, 0, 3, 1])
    check_sum(world, 1)


def rank_invariant_on_four(world: Any) -> None:
    check_invariant(world, (3, 0, 6, 1), [2, 1, 0, 5])
    check_invariant(world, (3, 0, 6, 1), COPIES)


def placements_and_weights_agree_after_rebalancing(world: Any) -> None:
    whole = make_whole((4, 4, 4, 4))
    crowded = replace(whole, topk=TopK(whole.topk.expert_ids % 3, whole.topk.weights))
    layer = layer_over(transport_of(world), crowded, experts_of_rank=COPIES, counts_load=True)
    run_rank(crowded, layer)
    assert layer.load is not None
    found = rebalance_together(layer.placement, layer.load, layer.transport)
    assert found.max_load < found.max_load_before
    w1, w2 = (move_weights(found.moves, weights, layer.transport) for weights in crowded.weights_of(layer))
    after = layer_over(transport_of(world), crowded, experts_of_rank=found.placement)
    for moved, wanted in zip((w1, w2), crowded.weights_of(after)):
        assert torch.equal(moved, wanted)


def the_bench_times_halves_and_counts_bytes(world: Any) -> None:
    config = moe.MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2)
    named = NamedLayer("small", config)
    (line,) = measure_parallel([named], [3], world, torch.device("cpu"), seed=0)
    report = line.report(1e9)
    assert (line.num_tokens, line.num_ranks) == (3, 4)
    assert line.parts.keys() == {"gather", "move"}
    for parts in line.parts.values():
        assert min(parts.dispatch_us, parts.experts_us, parts.combine_us, parts.whole_us, parts.eager_us) > 0
        assert parts.error is not None
        assert parts.error < ERROR_LIMIT
    gather = line.parts["gather"]
    assert (gather.dispatch_bytes, gather.combine_bytes) == (3 * 3 * (2 * 64 + 8 * 2), 3 * 3 * 2 * 64)
    assert 0 < line.parts["move"].combine_bytes < gather.combine_bytes
    found = report["exchanges"]["gather"]  # type: ignore[index]
    assert found["combine_share_of_link"] == pytest.approx(gather.combine_bytes / gather.combine_us / 1e3)
    assert "gather" in line.text()


def all_exchanges_between_two(world: Any) -> None:
    on_two_ranks(world, partial(check_exchange, tokens=(3, 6)))
    on_two_ranks(world, partial(check_exchange, tokens=(3, 0), exchange="move", experts_of_rank=[5, 3]))
    on_two_ranks(world, partial(check_sum, num_tokens=5))
    on_two_ranks(world, partial(check_invariant, tokens=(0, 9), experts_of_rank=[1, 7]))


def a_mesh_names_the_group(world: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    whole = make_whole((4, 1))
    layer = build_layer(whole.config, mesh["expert"], "cpu")
    assert layer.transport.num_ranks == 2
    assert layer.transport.rank == mesh["expert"].get_local_rank()
    first = sum(whole.tokens_of_rank[: layer.transport.rank])
    output = run_rank(whole, layer)
    torch.testing.assert_close(output, whole.reference()[first : first + len(output)], rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="expected a mesh of one dimension, got 2"):
        build_layer(whole.config, mesh, "cpu")


def tensors_that_are_not_contiguous_never_reach_a_collective(world: Any) -> None:
    transport = transport_of(world)
    wrong = torch.zeros(4, 8).T
    for call in (
        lambda: transport.all_gather("x", wrong),
        lambda: transport.all_to_all("x", wrong),
        lambda: transport.broadcast("x", wrong),
    ):
        with pytest.raises(AssertionError):
            call()


def a_late_rank_is_named(world: Any) -> None:
    group = dist.new_group(timeout=timedelta(seconds=LATE_S))
    whole = make_whole((2, 2, 2, 2))
    layer = build_layer(whole.config, group, "cpu", max_tokens=2)
    if layer.transport.rank == 3:
        time.sleep(LATE_S + 4)  # longer than ranks wait for one another's word
        return
    expect_named(layer, whole)


def a_dead_rank_is_named(world: Any) -> None:
    group = dist.new_group(timeout=timedelta(seconds=LATE_S))
    whole = make_whole((2, 2, 2, 2))
    layer = build_layer(whole.config, group, "cpu", max_tokens=2)
    run_rank(whole, layer)
    if layer.transport.rank == 3:
        raise RankDied
    expect_named(layer, whole)


def expect_named(layer: ParallelLayer, whole: Whole) -> None:
    """Raise unless a call without rank 3 ends in time in an error that names collective, rank, timeout and rank 3."""
    begin = time.monotonic()
    wanted = (
        rf"all_gather of .*: rank {layer.transport.rank} of 4 gave up after \d.*timeout of the group: 1\.5 s\)"
        r"; dead or late: rank 3"
    )
    with pytest.raises(RuntimeError, match=wanted):
        run_rank(whole, layer)
    assert time.monotonic() - begin < 30


CASES = {
    case.__name__: case
    for case in (
        gather_between_four,
        move_between_four,
        sum_between_four,
        rank_invariant_on_four,
        placements_and_weights_agree_after_rebalancing,
        the_bench_times_halves_and_counts_bytes,
        all_exchanges_between_two,
        a_mesh_names_the_group,
        tensors_that_are_not_contiguous_never_reach_a_collective,
        a_late_rank_is_named,
        a_dead_rank_is_named,
    )
}
