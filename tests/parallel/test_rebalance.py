"""What a rebalancer may do, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.parallel import Placement, balanced_placement, even_placement, move_weights, rebalance, rebalance_together
from moe.parallel.placement import copies_fit
from moe.parallel.simulated import simulate


def rank_loads(placement: Placement, loads: list[float]) -> np.ndarray:
    copies = [len(ranks) for ranks in placement.ranks_of_expert]
    return np.array([sum(loads[e] / copies[e] for e in experts) for experts in placement.experts_of_rank])


def zipf(num_experts: int, seed: int = 0) -> list[float]:
    order = np.random.default_rng(seed).permutation(num_experts)
    return (1000.0 / (order + 1.0)).round().tolist()


@pytest.mark.parametrize("load", [0.0, 7.0], ids=["idle", "even"])
@pytest.mark.parametrize("num_spares", [0, 4, 16])
def test_no_load_and_an_even_load_move_nothing(num_spares, load):
    placement = even_placement(64, 8, num_spares)
    # With spares an even load is not even over experts that have two copies and those that have one.
    loads = [load * len(ranks) for ranks in placement.ranks_of_expert]
    found = rebalance(placement, loads)
    assert found.placement == placement
    assert found.moves == ()


@pytest.mark.parametrize("load", [0.0, 7.0], ids=["idle", "even"])
def test_spares_of_equal_experts_are_spread(load):
    placement = balanced_placement([load] * 16, [6, 6, 6, 6])
    copies = [len(ranks) for ranks in placement.ranks_of_expert]
    assert sorted(copies) == [1] * 8 + [2] * 8


def test_a_hot_expert_has_one_copy_on_each_rank_at_the_most():
    loads = [1000.0] + [1.0] * 7
    placement = balanced_placement(loads, [4, 4, 4])
    assert placement.ranks_of_expert[0] == (0, 1, 2)
    found = rebalance(even_placement(8, 3, 4), loads).placement
    assert found.ranks_of_expert[0] == (0, 1, 2)


def test_only_what_gains_more_than_the_threshold_moves():
    placement = Placement(4, ((0, 1), (2, 3)))
    loads = [54.0, 50.0, 46.0, 46.0]  # 104 and 92, 98 in the mean: a change takes 4 off, another one nothing more
    assert rebalance(placement, loads, min_gain=0.05).moves == ()
    found = rebalance(placement, loads, min_gain=0.03)
    assert found.max_load_before == pytest.approx(104 / 98)
    assert found.max_load == pytest.approx(100 / 98)
    assert len(found.moves) == 2
    assert all(
        placement.experts_of_rank[move.from_rank][move.from_slot] == move.expert
        and found.placement.experts_of_rank[move.to_rank][move.to_slot] == move.expert
        for move in found.moves
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_spares", [0, 8, 32])
def test_skewed_loads_end_near_the_greedy_placement_with_fewer_moves(num_spares, seed):
    loads = zipf(64, seed)
    before = even_placement(64, 8, num_spares)
    greedy = balanced_placement(loads, before.slots_of_rank)
    found = rebalance(before, loads)
    mean = sum(loads) / 8
    assert rank_loads(found.placement, loads).max() <= 1.1 * rank_loads(greedy, loads).max()
    assert found.max_load == pytest.approx(rank_loads(found.placement, loads).max() / mean)
    assert found.placement.slots_of_rank == before.slots_of_rank
    assert 0 < len(found.moves) < 64


@pytest.mark.parametrize("wrong", [float("nan"), -1.0, float("inf")])
def test_loads_that_are_none_are_refused(wrong):
    loads = torch.tensor([1.0, wrong, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"loads: expected numbers of 0 and more, one an expert, got \{1: "):
        rebalance(even_placement(4, 2), loads)
    with pytest.raises(ValueError, match="loads: expected numbers of 0 and more"):
        balanced_placement(loads, [2, 2])
    with pytest.raises(ValueError, match="loads: expected 4, one an expert, got 2"):
        rebalance(even_placement(4, 2), [1.0, 2.0])
    with pytest.raises(ValueError, match="slots_of_rank: expected room for 4 experts"):
        balanced_placement([1.0] * 4, [2, 1])


def test_copies_go_to_other_nodes_first():
    placement = balanced_placement([100.0, 1.0, 1.0, 1.0, 1.0, 1.0], [2, 2, 2, 1], ranks_per_node=2)
    nodes = [{rank // 2 for rank in ranks} for ranks in placement.ranks_of_expert]
    assert nodes[0] == {0, 1}


def test_weights_come_from_the_same_node_and_from_several_senders():
    before = Placement(4, ((0, 1), (1, 2), (2, 3), (3, 0)))
    after = Placement(4, ((0, 2), (1, 3), (2, 3), (1, 0)))
    found = {(move.to_rank, move.expert): move.from_rank for move in _moves(before, after)}
    assert found == {(0, 2): 1, (1, 3): 2, (3, 1): 0}
    near = {(m.to_rank, m.expert): m.from_rank for m in _moves(before, after, ranks_per_node=2)}
    assert near[0, 2] == 1


def _moves(before: Placement, after: Placement, **options: int):
    from moe.parallel.rebalance import weight_moves

    return weight_moves(before, after, **options)


def test_all_ranks_take_the_placement_of_rank_0():
    loads = [torch.tensor(zipf(16, seed)).long() for seed in range(4)]
    before = even_placement(16, 4, 4)
    found = simulate(4, lambda t: rebalance_together(before, loads[t.rank], t))
    assert all(each == found[0] for each in found)
    assert found[0].placement == rebalance(before, torch.stack(loads).sum(0)).placement
    assert found[0].max_load < found[0].max_load_before


def test_moved_weights_are_those_of_the_new_placement():
    loads = zipf(16)
    before = even_placement(16, 4, 4)
    found = rebalance(before, loads)
    weights = torch.arange(16.0)[:, None].repeat(1, 3)

    def one_rank(transport):
        mine = weights[list(before.experts_of_rank[transport.rank])]
        return move_weights(found.moves, mine, transport)

    for moved, experts in zip(simulate(4, one_rank), found.placement.experts_of_rank):
        assert moved[:, 0].tolist() == list(experts)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_room_is_filled_with_one_copy_a_rank(data):
    num_experts = data.draw(st.integers(1, 7))
    num_ranks = data.draw(st.integers(1, 5))
    slots = data.draw(
        st.lists(st.integers(0, num_experts), min_size=num_ranks, max_size=num_ranks).filter(
            lambda slots: sum(slots) >= num_experts
        )
    )
    loads = data.draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    placement = balanced_placement([float(load) for load in loads], slots)  # a Placement checks itself
    assert placement.slots_of_rank == tuple(slots)
    again = rebalance(placement, [float(load) for load in loads])
    assert again.placement.slots_of_rank == tuple(slots)
    assert again.max_load <= again.max_load_before + 1e-9


def test_copies_fit_where_each_finds_a_rank_of_its_own():
    assert copies_fit([3, 1, 1], [3, 1, 1])
    assert not copies_fit([4, 1], [3, 2])
    assert not copies_fit([2, 2, 2], [3, 2])
    assert copies_fit([], [0, 0])
