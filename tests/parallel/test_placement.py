"""Placements are checked, and tokens spread over the copies of an expert whatever pattern they come in."""

from __future__ import annotations

import pytest
import torch

from moe.flow import TopK
from moe.parallel.placement import Placement, even_placement, placement_of, placement_tables
from moe.parallel.reference import place_slots_reference, token_hash


def test_even_placement_gives_the_first_ranks_one_more():
    assert even_placement(8, 3).experts_of_rank == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert even_placement(2, 4).slots_of_rank == (1, 1, 0, 0)


@pytest.mark.parametrize("num_spares", [1, 3, 8, 11, 24])
def test_spares_are_spread_over_experts_and_ranks(num_spares):
    placement = even_placement(8, 4, num_spares)
    copies = [len(ranks) for ranks in placement.ranks_of_expert]
    assert sum(copies) == 8 + num_spares
    assert max(copies) - min(copies) <= 1
    assert max(placement.slots_of_rank) - min(placement.slots_of_rank) <= 1


def test_placements_that_cannot_be_are_refused():
    for experts_of_rank, message in (
        (((0, 1), (2, 4)), r"experts_of_rank\[1\]: expected ids of 0 to 3, got \[4\]"),
        (((0, 0, 1), (2, 3)), r"at most once on a rank, got \[0\]"),
        (((0, 1), (2,)), r"every expert on a rank, got none with \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Placement(4, experts_of_rank)
    with pytest.raises(ValueError, match="counts of 0 and more that sum to 4"):
        placement_of([3, 2], 4, 2)
    with pytest.raises(ValueError, match="num_spares: expected 0 to 4"):
        even_placement(4, 2, 5)


def test_tables_say_where_each_copy_lies():
    tables = placement_tables(Placement(3, ((2, 0), (1, 2))), "cpu")
    assert tables.num_copies.tolist() == [1, 1, 2]
    assert tables.rank_of_copy.tolist() == [[0, -1], [1, -1], [0, 1]]
    assert tables.local_id.tolist() == [[1, -1, 0], [-1, 0, 1]]


def shares(token: torch.Tensor, source_rank: torch.Tensor, layer: int, num_copies: int) -> torch.Tensor:
    copy = token_hash(token, source_rank, layer) % num_copies
    return torch.bincount(copy, minlength=num_copies) / len(copy)


@pytest.mark.parametrize("num_copies", [2, 3, 4, 8])
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 1000])
def test_tokens_at_any_stride_spread_over_copies(stride, num_copies):
    token = torch.arange(4096) * stride
    for rank in (0, 1, 7):
        share = shares(token, torch.full_like(token, rank), 3, num_copies)
        assert (share * num_copies - 1).abs().max() < 0.15


@pytest.mark.parametrize("num_copies", [2, 3, 4, 8])
def test_one_token_a_rank_takes_all_copies_over_ranks_and_layers(num_copies):
    rank = torch.arange(64)
    of_layers = [token_hash(torch.zeros_like(rank), rank, layer) % num_copies for layer in range(64)]
    copies = torch.stack(of_layers)  # [layers, ranks]
    for share in (torch.bincount(copies.flatten(), minlength=num_copies) / copies.numel(),):
        assert (share * num_copies - 1).abs().max() < 0.1
    # No rank and no layer is tied to one copy.
    assert all(len(row.unique()) == num_copies for row in copies)
    assert all(len(column.unique()) == num_copies for column in copies.T)


def test_all_ranks_choose_the_same_copy():
    placement = even_placement(6, 3, 7)
    tables = placement_tables(placement, "cpu")
    ids = torch.randint(-1, 7, (12, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    topk = TopK(ids, torch.ones(12, 4))
    gathered = TopK(ids.view(3, 4, 4), topk.weights.view(3, 4, 4))
    rank, local = place_slots_reference(gathered, tables, layer=2)
    for source in range(3):
        part = TopK(ids[4 * source : 4 * source + 4], torch.ones(4, 4))
        own_rank, own_local = place_slots_reference(part, tables, layer=2, source_rank=source)
        assert torch.equal(own_rank, rank[4 * source : 4 * source + 4])
        assert torch.equal(own_local.expert_ids, local.expert_ids[4 * source : 4 * source + 4])
    for row, its_ids in enumerate(ids.tolist()):
        for choice, expert in enumerate(its_ids):
            chosen = rank[row, choice].item()
            if not 0 <= expert < 6:
                assert chosen == local.expert_ids[row, choice] == -1
            else:
                assert placement.experts_of_rank[chosen][local.expert_ids[row, choice]] == expert
    for me in range(3):
        _, mine = place_slots_reference(gathered, tables, layer=2, only_rank=me)
        assert torch.equal(mine.expert_ids, torch.where(rank == me, local.expert_ids, -1))
