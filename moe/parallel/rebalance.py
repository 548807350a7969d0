"""Placements that follow the load: greedily from nothing, or from the present one by the moves that pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe.parallel.placement import Placement, copies_fit
from moe.parallel.transport import Transport, to_host

MIN_GAIN = 0.02


@dataclass(frozen=True)
class WeightMove:
    """One expert's weights, from a place in a rank's weights to another's."""

    expert: int
    from_rank: int
    from_slot: int
    to_rank: int
    to_slot: int


@dataclass(frozen=True)
class Rebalanced:
    """A placement, and what turns the one before it into this."""

    placement: Placement
    moves: tuple[WeightMove, ...]
    max_load_before: float  # of the most loaded rank, over the mean
    max_load: float


def balanced_placement(
    loads: Tensor | Sequence[float], slots_of_rank: Sequence[int], *, ranks_per_node: int | None = None
) -> Placement:
    """A placement from nothing: spare slots to the experts with most load a copy, then longest first to the least loaded ranks.

    Source: DeepSeek's EPLB states the greedy form, https://github.com/deepseek-ai/EPLB. Here an expert has at most one copy a
    rank, copies spread over nodes first, and equal loads are decided by number, so that every machine finds the same.

    Args:
        loads: [E], as `ParallelLayer.load` counts them, summed over ranks.
        slots_of_rank: how many experts each rank has room for.
        ranks_per_node: neighbouring ranks that share a node; None: all.

    Raises:
        ValueError: a load that is negative or not finite; room for fewer than all experts, or for more than all on a rank.
    """
    load = checked_loads(loads)
    num_experts, num_ranks = len(load), len(slots_of_rank)
    copies = copies_by_load(load, slots_of_rank)
    per_copy = load / copies
    node = np.arange(num_ranks) // (ranks_per_node or num_ranks)
    free, rank_load = list(slots_of_rank), np.zeros(num_ranks)
    experts_of_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    order = sorted(range(num_experts), key=lambda expert: (-per_copy[expert], expert))
    for position, expert in enumerate(order):
        later = [int(copies[other]) for other in order[position + 1 :]]
        ranks = _least_loaded(int(copies[expert]), free, rank_load, node)
        if not copies_fit(later, _without(free, ranks)):
            ranks = sorted(range(num_ranks), key=lambda rank: (-free[rank], rank))[: copies[expert]]
        free = _without(free, ranks)
        for rank in ranks:
            experts_of_rank[rank].append(expert)
            rank_load[rank] += per_copy[expert]
    return Placement(num_experts, tuple(tuple(sorted(experts)) for experts in experts_of_rank))


def copies_by_load(load: np.ndarray, slots_of_rank: Sequence[int]) -> np.ndarray:
    """How many copies of each expert fill the slots: one each, then one by one to the most load a copy; equals to the fewest copies."""
    num_experts = len(load)
    copies = np.ones(num_experts, dtype=np.int64)
    if sum(slots_of_rank) < num_experts or max(slots_of_rank) > num_experts or min(slots_of_rank) < 0:
        raise ValueError(
            f"slots_of_rank: expected room for {num_experts} experts, at most so many on a rank, got {list(slots_of_rank)}; "
            "give ranks as many slots as their weights hold"
        )
    for _ in range(sum(slots_of_rank) - num_experts):
        by_load = sorted(
            range(num_experts), key=lambda expert: (-load[expert] / copies[expert], copies[expert], expert)
        )
        for expert in by_load:
            copies[expert] += 1
            if copies_fit(copies.tolist(), slots_of_rank):
                break
            copies[expert] -= 1
    return copies


def rebalance(
    placement: Placement,
    loads: Tensor | Sequence[float],
    *,
    min_gain: float = MIN_GAIN,
    ranks_per_node: int | None = None,
) -> Rebalanced:
    """The present placement, changed where it pays.

    Again and again the best single change of the most loaded rank: an expert of it changes places with another rank's, or another
    rank's spare copy makes room for a copy of it. A change that takes less than `min_gain` of the mean rank load off the larger of
    the two loads is not made; so equal or no load changes nothing. Each rank keeps as many slots as it has.

    Args:
        loads: [E], as `ParallelLayer.load` counts them, summed over ranks.
        min_gain: least gain of a change, as a share of the mean load of a rank.
        ranks_per_node: weights come from a copy on the same node where there is one; None: all ranks share a node.

    Raises:
        ValueError: a load that is negative or not finite, or another number of loads than experts.
    """
    load = checked_loads(loads)
    if len(load) != placement.num_experts:
        raise ValueError(
            f"loads: expected {placement.num_experts}, one an expert, got {len(load)}; pass all experts' loads"
        )
    state = _Slots.of(placement, load)
    before = state.rank_loads()
    mean = load.sum() / placement.num_ranks
    while change := state.best_change(min_gain * mean):
        state.make(change)
    after = state.rank_loads()
    found = Placement(placement.num_experts, tuple(map(tuple, state.experts_of_rank)))
    moves = weight_moves(placement, found, ranks_per_node=ranks_per_node)
    scale = mean or 1.0
    return Rebalanced(found, moves, float(before.max() / scale), float(after.max() / scale))


def rebalance_together(
    placement: Placement,
    loads: Tensor,
    transport: Transport,
    *,
    min_gain: float = MIN_GAIN,
    ranks_per_node: int | None = None,
) -> Rebalanced:
    """`rebalance` for all ranks: loads [E] are summed over ranks, rank 0 decides, and all have its placement. The host waits."""
    total = transport.all_gather("loads", loads[None].contiguous()).sum(0)
    wanted = placement
    if transport.rank == 0:
        wanted = rebalance(placement, total, min_gain=min_gain, ranks_per_node=ranks_per_node).placement
    flat = [expert for experts in wanted.experts_of_rank for expert in experts]
    numbers = transport.broadcast("placement", torch.tensor(flat, dtype=torch.int64, device=loads.device))
    decided = to_host(transport, "placement", numbers)
    ends = np.cumsum(placement.slots_of_rank).tolist()
    experts = tuple(tuple(decided[end - size : end]) for end, size in zip(ends, placement.slots_of_rank))
    found = Placement(placement.num_experts, experts)
    load = checked_loads(total)
    mean = load.sum() / placement.num_ranks or 1.0
    before, after = (_Slots.of(each, load).rank_loads().max() / mean for each in (placement, found))
    moves = weight_moves(placement, found, ranks_per_node=ranks_per_node)
    return Rebalanced(found, moves, float(before), float(after))


def weight_moves(before: Placement, after: Placement, *, ranks_per_node: int | None = None) -> tuple[WeightMove, ...]:
    """What ranks send one another so that each slot holds its new expert: from the same node, and from whoever sends least so far."""
    node = [rank // (ranks_per_node or before.num_ranks) for rank in range(before.num_ranks)]
    num_sent = [0] * before.num_ranks
    moves = []
    for rank, (old, new) in enumerate(zip(before.experts_of_rank, after.experts_of_rank)):
        for slot, expert in enumerate(new):
            if slot < len(old) and old[slot] == expert:
                continue
            holders = before.ranks_of_expert[expert]
            source = min(holders, key=lambda other: (other != rank, node[other] != node[rank], num_sent[other], other))
            num_sent[source] += source != rank
            moves.append(WeightMove(expert, source, before.experts_of_rank[source].index(expert), rank, slot))
    return tuple(moves)


def move_weights(moves: Sequence[WeightMove], weights: Tensor, transport: Transport) -> Tensor:
    """This rank's weights [E_local, ..] after the moves: a new tensor. All ranks call it, once a weight tensor.

    Sizes follow from the moves, which all ranks know.
    """
    rank = transport.rank
    sent: list[list[int]] = [[] for _ in range(transport.num_ranks)]
    received: list[list[int]] = [[] for _ in range(transport.num_ranks)]
    moved = weights.clone()
    for move in moves:
        if move.from_rank == move.to_rank == rank:
            moved[move.to_slot] = weights[move.from_slot]
        elif move.from_rank == rank:
            sent[move.to_rank].append(move.from_slot)
        elif move.to_rank == rank:
            received[move.from_rank].append(move.to_slot)
    outgoing = weights[[slot for slots in sent for slot in slots]].contiguous()
    arrived = transport.all_to_all("expert weights", outgoing, [len(s) for s in sent], [len(s) for s in received])
    moved[[slot for slots in received for slot in slots]] = arrived
    return moved


def checked_loads(loads: Tensor | Sequence[float]) -> np.ndarray:
    """[E] float64; raises ValueError on a load that is negative or not finite."""
    load = np.asarray(loads.tolist() if isinstance(loads, Tensor) else loads, dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(load) | (load < 0))
    if load.ndim != 1 or not load.size or wrong.size:
        got = {int(expert): float(load[expert]) for expert in wrong[:4]} if load.ndim == 1 else f"shape {load.shape}"
        raise ValueError(f"loads: expected numbers of 0 and more, one an expert, got {got}; pass counts of slots")
    return load


def _least_loaded(count: int, free: list[int], rank_load: np.ndarray, node: np.ndarray) -> list[int]:
    """Ranks for the copies of an expert: other nodes first, then the least loaded."""
    chosen: list[int] = []
    while len(chosen) < count:
        left = [rank for rank in range(len(free)) if free[rank] and rank not in chosen]
        if not left:
            break
        chosen.append(
            min(left, key=lambda rank: (sum(node[rank] == node[other] for other in chosen), rank_load[rank], rank))
        )
    return chosen


def _without(free: list[int], ranks: Sequence[int]) -> list[int]:
    return [slots - (rank in ranks) for rank, slots in enumerate(free)]


@dataclass(frozen=True)
class _Change:
    """Slot `slot` of `rank` gets `expert`; where `gives_back` the expert that was there goes to `from_slot` of `from_rank`."""

    rank: int
    slot: int
    from_rank: int
    from_slot: int
    gives_back: bool


@dataclass
class _Slots:
    """A placement while it is changed."""

    experts_of_rank: list[list[int]]
    load: np.ndarray  # [E]
    copies: np.ndarray  # [E]

    @classmethod
    def of(cls, placement: Placement, load: np.ndarray) -> _Slots:
        copies = np.array([len(ranks) for ranks in placement.ranks_of_expert])
        return cls([list(experts) for experts in placement.experts_of_rank], load, copies)

    def rank_loads(self) -> np.ndarray:
        per_copy = self.load / self.copies
        return np.array([per_copy[experts].sum() for experts in self.experts_of_rank])

    def best_change(self, min_gain: float) -> _Change | None:
        """Of the most loaded rank: the one that takes most off the larger of two ranks' loads, if more than `min_gain`."""
        loads, per_copy = self.rank_loads(), self.load / self.copies
        top = int(loads.argmax())
        best, best_gain = None, max(min_gain, 1e-9 * loads[top])
        for other in range(len(loads)):
            if other == top:
                continue
            for change, larger in self._changes(top, other, loads, per_copy):
                if loads[top] - larger > best_gain:
                    best, best_gain = change, loads[top] - larger
        return best

    def _changes(self, top: int, other: int, loads: np.ndarray, per_copy: np.ndarray) -> list[tuple[_Change, float]]:
        """Each possible change between two ranks, and the largest load, after it, of all ranks whose load it raises or is to lower."""
        held, there = self.experts_of_rank[top], self.experts_of_rank[other]
        found = []
        for slot, expert in enumerate(held):
            if expert in there:
                continue
            for its_slot, its_expert in enumerate(there):
                if its_expert not in held:
                    shift = per_copy[expert] - per_copy[its_expert]
                    larger = max(loads[top] - shift, loads[other] + shift)
                    found.append((_Change(other, its_slot, top, slot, gives_back=True), larger))
                if self.copies[its_expert] > 1:
                    found.append(
                        (
                            _Change(other, its_slot, top, slot, gives_back=False),
                            self._larger_with_copy(expert, its_expert, top, other, loads, per_copy),
                        )
                    )
        return found

    def _larger_with_copy(
        self, expert: int, goes: int, top: int, other: int, loads: np.ndarray, per_copy: np.ndarray
    ) -> float:
        """The largest load of all ranks that change, where rank `other` has a copy of `expert` in the place of one of `goes`."""
        less = per_copy[expert] - self.load[expert] / (self.copies[expert] + 1)
        more = self.load[goes] / (self.copies[goes] - 1) - per_copy[goes]
        after = {rank: loads[rank] + more for rank in self.ranks_with(goes)}
        after[other] = loads[other] - per_copy[goes] + per_copy[expert] - less
        after[top] = after.get(top, loads[top]) - less
        return max(
            load - less * (rank not in (top, other) and rank in self.ranks_with(expert)) for rank, load in after.items()
        )

    def ranks_with(self, expert: int) -> list[int]:
        return [rank for rank, experts in enumerate(self.experts_of_rank) if expert in experts]

    def make(self, change: _Change) -> None:
        expert = self.experts_of_rank[change.from_rank][change.from_slot]
        goes = self.experts_of_rank[change.rank][change.slot]
        self.experts_of_rank[change.rank][change.slot] = expert
        if change.gives_back:
            self.experts_of_rank[change.from_rank][change.from_slot] = goes
        else:
            self.copies[expert] += 1
            self.copies[goes] -= 1
