"""Which experts lie on which rank: any map, uneven, with copies of an expert on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """The experts of each rank, in the order in which its weights hold them.

    Example: `Placement(4, ((0, 1), (2, 3, 0)))` has expert 0 on both ranks; the weights of rank 1 begin with expert 2.

    Raises:
        ValueError: an expert that lies nowhere, or twice on one rank, or an id that is none.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.experts_of_rank):
            wrong = [expert for expert in experts if not 0 <= expert < self.num_experts]
            if wrong:
                raise ValueError(
                    f"experts_of_rank[{rank}]: expected ids of 0 to {self.num_experts - 1}, got {wrong}; name experts that exist"
                )
            if len(set(experts)) < len(experts):
                twice = sorted({expert for expert in experts if experts.count(expert) > 1})
                raise ValueError(
                    f"experts_of_rank[{rank}]: expected an expert at most once on a rank, got {twice} more often; "
                    "copies of an expert go to other ranks"
                )
        nowhere = [expert for expert, ranks in enumerate(self.ranks_of_expert) if not ranks]
        if nowhere:
            raise ValueError(
                f"experts_of_rank: expected every expert on a rank, got none with {nowhere}; give them one"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.experts_of_rank)

    @cached_property
    def ranks_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """Of each expert, the ranks that hold it, ascending."""
        ranks: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in experts:
                ranks[expert].append(rank)
        return tuple(map(tuple, ranks))

    @property
    def max_copies(self) -> int:
        """Ranks that hold the same expert, at the most."""
        return max(map(len, self.ranks_of_expert))

    @property
    def slots_of_rank(self) -> tuple[int, ...]:
        """How many experts each rank has room for."""
        return tuple(map(len, self.experts_of_rank))


@dataclass(frozen=True)
class PlacementTables:
    """A placement on a device, for kernels."""

    num_copies: Tensor  # [E] int32
    rank_of_copy: Tensor  # [E, max_copies] int32, ascending; -1 from num_copies on
    local_id: Tensor  # [num_ranks, E] int32: place of an expert in a rank's weights, -1 where it is not there

    @property
    def num_ranks(self) -> int:
        return self.local_id.shape[0]

    @property
    def num_experts(self) -> int:
        return self.local_id.shape[1]

    @property
    def max_copies(self) -> int:
        return self.rank_of_copy.shape[1]


def even_placement(num_experts: int, num_ranks: int, num_spares: int = 0) -> Placement:
    """Neighbouring experts together, the first ranks one more where it does not divide; spare copies spread over experts and ranks.

    Args:
        num_spares: copies beyond one of each expert, as many of each as it goes.

    Raises:
        ValueError: more spares than there are ranks without a copy.
    """
    if not 0 <= num_spares <= num_experts * (num_ranks - 1):
        raise ValueError(
            f"num_spares: expected 0 to {num_experts * (num_ranks - 1)}, one copy of an expert a rank, got {num_spares}; ask for fewer"
        )
    least, num_larger = divmod(num_experts + num_spares, num_ranks)
    slots = [least + (rank < num_larger) for rank in range(num_ranks)]
    if not num_spares:
        return Placement(num_experts, tuple(map(tuple, _ranges(slots))))
    each, num_more = divmod(num_spares, num_experts)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in range(num_experts):
        # To where most is left, those with most copies first: this finds a way wherever there is one.
        for rank in sorted(range(num_ranks), key=lambda rank: len(ranks[rank]) - slots[rank])[
            : 1 + each + (expert < num_more)
        ]:
            ranks[rank].append(expert)
    return Placement(num_experts, tuple(map(tuple, ranks)))


def copies_fit(copies: Sequence[int], slots_of_rank: Sequence[int]) -> bool:
    """Whether so many copies of each expert find slots with at most one copy a rank (Gale and Ryser's condition)."""
    total = 0
    for count, most in enumerate(sorted(copies, reverse=True), 1):
        total += most
        if total > sum(min(slots, count) for slots in slots_of_rank):
            return False
    return True


def placement_of(
    experts_of_rank: Placement | Sequence[int] | Sequence[Sequence[int]] | None, num_experts: int, num_ranks: int
) -> Placement:
    """What `build_layer` is given, as a placement of `num_experts` experts on `num_ranks` ranks.

    Args:
        experts_of_rank: a placement; or each rank's ids; or how many neighbouring experts each rank has; None: as even as it goes.

    Raises:
        ValueError: for another number of ranks or experts.
    """
    if experts_of_rank is None:
        return even_placement(num_experts, num_ranks)
    if isinstance(experts_of_rank, Placement):
        placement = experts_of_rank
    elif all(isinstance(count, int) for count in experts_of_rank):
        counts = [count for count in experts_of_rank if isinstance(count, int)]
        if sum(counts) != num_experts or min(counts, default=0) < 0:
            raise ValueError(
                f"experts_of_rank: expected counts of 0 and more that sum to {num_experts}, got {counts}; "
                "copies need a Placement"
            )
        placement = Placement(num_experts, tuple(map(tuple, _ranges(counts))))
    else:
        ids = tuple(tuple(experts) for experts in experts_of_rank if not isinstance(experts, int))
        placement = Placement(num_experts, ids)
    if (placement.num_experts, placement.num_ranks) != (num_experts, num_ranks):
        raise ValueError(
            f"experts_of_rank: expected {num_experts} experts on {num_ranks} ranks, got {placement.num_experts} on "
            f"{placement.num_ranks}; pass one entry a rank of the group"
        )
    return placement


def _ranges(counts: Sequence[int]) -> list[list[int]]:
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    return [list(range(end - count, end)) for count, end in zip(counts, ends)]


def placement_tables(placement: Placement, device: torch.device | str) -> PlacementTables:
    ranks = placement.ranks_of_expert
    rank_of_copy = [[*copies, *[-1] * (placement.max_copies - len(copies))] for copies in ranks]
    local_id = torch.full((placement.num_ranks, placement.num_experts), -1, dtype=torch.int32)
    for rank, experts in enumerate(placement.experts_of_rank):
        local_id[rank, list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return PlacementTables(
        torch.tensor([len(copies) for copies in ranks], dtype=torch.int32, device=device),
        torch.tensor(rank_of_copy, dtype=torch.int32, device=device),
        local_id.to(device),
    )
