"""The local work of exchanges in torch: what is right, and the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.flow import TopK
from moe.parallel.placement import PlacementTables

WORD = 0xFFFFFFFF
# Odd multipliers, and the finisher of MurmurHash3 (32 bits): https://github.com/aappleby/smhasher, public domain.
OF_TOKEN, OF_LAYER, OF_RANK = 0x9E3779B1, 0x27D4EB2F, 0x165667B1
FINISH_1, FINISH_2 = 0x85EBCA6B, 0xC2B2AE35


def mix_words(word: Tensor) -> Tensor:
    """Every bit of a 32-bit word, held in int64, over all bits of another."""
    word = (word ^ (word >> 16)) * FINISH_1 & WORD
    word = (word ^ (word >> 13)) * FINISH_2 & WORD
    return word ^ (word >> 16)


def token_hash(token: Tensor, source_rank: Tensor, layer: int) -> Tensor:
    """What says which copy of an expert a token takes: int64 in [0, 2^32), the same on every rank.

    Args:
        token: int64, a token's number on its rank.
        source_rank: int64, that rank.
        layer: the layer's number in its model.
    """
    place = mix_words(((source_rank + 1) * OF_RANK + (layer + 1) * OF_LAYER) & WORD)
    return mix_words((token * OF_TOKEN + place) & WORD)


def place_slots_reference(
    topk: TopK, tables: PlacementTables, *, layer: int, source_rank: int = 0, only_rank: int | None = None
) -> tuple[Tensor | None, TopK]:
    """The rank that computes each slot, and the expert's place in its weights.

    Args:
        topk: expert_ids [R, K] int32, global, of one source; any id out of [0, E) is an unused slot. Or both tensors [S, M, K], of
            ranks source_rank and on, M tokens each: R is S * M then, and sources need not lie next to one another.
        source_rank: the rank that row 0 is from.
        only_rank: local ids of another rank's slots become -1, and rank_of_slot None.

    Returns:
        rank_of_slot [R, K] int32, -1 for unused, and TopK(local ids [R, K] int32, weights [R, K]).
    """
    top_k = topk.expert_ids.shape[-1]
    size = max(topk.expert_ids.shape[-2], 1)
    ids = topk.expert_ids.reshape(-1, top_k).long()
    is_used = (ids >= 0) & (ids < tables.num_experts)
    ids = ids.clamp(0, tables.num_experts - 1)
    row = torch.arange(ids.shape[0], device=ids.device)
    word = token_hash(row % size, source_rank + row // size, layer)
    copy = word[:, None] % tables.num_copies[ids]
    rank = torch.where(is_used, tables.rank_of_copy[ids, copy], -1)
    local = torch.where(is_used, tables.local_id[rank.clamp(min=0).long(), ids], -1)
    weights = topk.weights.reshape(-1, top_k).contiguous()
    if only_rank is None:
        return rank.int(), TopK(local.int(), weights)
    return None, TopK(torch.where(rank == only_rank, local, -1).int(), weights)


def pack_slots_reference(topk: TopK, num_rows: int) -> Tensor:
    """Ids and weights in one tensor, [2, num_rows, K] int32: ids, -1 from T on, then the bits of float32 weights."""
    num_tokens, top_k = topk.expert_ids.shape
    packed = torch.full((2, num_rows, top_k), -1, dtype=torch.int32, device=topk.expert_ids.device)
    packed[0, :num_tokens] = topk.expert_ids
    packed[1, :num_tokens] = topk.weights.float().view(torch.int32)
    packed[1, num_tokens:] = 0
    return packed


def sum_ranks_reference(partial: Tensor, num_tokens: int, *, output: Tensor | None = None) -> Tensor:
    """[N, M, H] bfloat16, a partial sum a rank -> [num_tokens, H]: in float32, rank after rank, rounded once."""
    total = torch.zeros(num_tokens, partial.shape[2], dtype=torch.float32, device=partial.device)
    for rows in partial:
        total += rows[:num_tokens].float()
    return total.bfloat16() if output is None else output.copy_(total)


def plan_copies_reference(rank_of_slot: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of what each token sends: a copy of its row to each rank that computes a slot of it.

    Args:
        rank_of_slot: [T, K] int32, -1 for unused.

    Returns:
        copy [T, N] int32: how many tokens before this one send to the rank; -1 where it does not.
        slot [T, K] int32: how many slots before this one, by token and choice, go to the same rank; -1 where unused.
        counts [N, 2] int64: copies and slots that each rank is sent.
    """
    ranks = torch.arange(num_ranks, device=rank_of_slot.device)
    goes = rank_of_slot.flatten()[:, None] == ranks  # [T * K, N]
    before = goes.cumsum(0) - goes.long()
    slot = torch.where(goes, before, 0).sum(1).view(rank_of_slot.shape)
    slot = torch.where(rank_of_slot >= 0, slot, -1)
    sends = goes.view(*rank_of_slot.shape, num_ranks).any(1)  # [T, N]
    copy = torch.where(sends, sends.cumsum(0) - sends.long(), -1)
    return copy.int(), slot.int(), torch.stack((sends.sum(0), goes.sum(0)), 1)


def pack_rows_reference(
    hidden_states: Tensor, rank_of_slot: Tensor, local: TopK, copy: Tensor, counts: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by rank that they go to, then by token.

    Args:
        hidden_states: [T, H] bfloat16.
        rank_of_slot, local: [T, K], as `place_slots` gives them.
        copy, counts: as `plan_copies` gives them.
        num_rows: sum of counts[:, 0], as the host knows it.

    Returns:
        rows [num_rows, H]; slots [num_rows, 2, K] int32: local ids there, -1 for another rank's, and the bits of float32 weights;
        row_of_copy [T, N] int32: which row a copy is, -1 for none.
    """
    num_ranks, top_k = copy.shape[1], rank_of_slot.shape[1]
    first = counts[:, 0].cumsum(0) - counts[:, 0]
    row_of_copy = torch.where(copy >= 0, copy + first, -1).int()
    token, rank = (row_of_copy >= 0).nonzero(as_tuple=True)
    row = row_of_copy[token, rank].long()
    rows = hidden_states.new_empty(num_rows, hidden_states.shape[1])
    rows[row] = hidden_states[token]
    slots = torch.empty(num_rows, 2, top_k, dtype=torch.int32, device=rows.device)
    slots[row, 0] = torch.where(rank_of_slot[token] == rank[:, None], local.expert_ids[token], -1)
    slots[row, 1] = local.weights[token].float().view(torch.int32)
    assert num_ranks == counts.shape[0]
    return rows, slots, row_of_copy


def number_slots_reference(rank_of_slot: Tensor, slot: Tensor, counts: Tensor) -> Tensor:
    """[T, K] int32: which of all returned rows is a slot's, where rows come back by rank, token and choice; -1 for unused."""
    first = counts[:, 1].cumsum(0) - counts[:, 1]
    return torch.where(rank_of_slot >= 0, slot + first[rank_of_slot.clamp(min=0).long()], -1).int()
