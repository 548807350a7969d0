"""Permutation and finalize in torch: what is right, and the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.flow import Added, Permutation, TopK, WeighedSlots
from moe.permute.added import add_to
from moe.permute.config import FinalizeConfig, PermuteConfig


def plan_permutation_reference(topk: TopK, *, config: PermuteConfig) -> Permutation:
    """Place every (token, choice) slot in a row of its expert. Same contract as `plan_permutation`."""
    config.check(topk)
    num_tokens, top_k = topk.expert_ids.shape
    device = topk.expert_ids.device
    tile_rows = config.rows_per_tile(num_tokens)
    max_rows = config.max_rows(num_tokens)

    # Slots without a local expert go to one bin past the last, so that a stable sort puts them at the end.
    absent = config.num_local_experts
    expert = topk.expert_ids.flatten().long() - config.local_expert_offset  # [T * K]
    expert = torch.where((expert >= 0) & (expert < absent), expert, absent)
    counts = torch.bincount(expert, minlength=absent + 1)[:absent]  # [E_local]
    padded = (counts + tile_rows - 1) // tile_rows * tile_rows
    segment_end = padded.cumsum(0)
    first_row = segment_end - padded

    slot = expert.argsort(stable=True)[: int(counts.sum())]  # local slots, by expert and then in order
    rank = torch.arange(len(slot), device=device) - (counts.cumsum(0) - counts)[expert[slot]]
    row = first_row[expert[slot]] + rank
    row_of_slot = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=device)
    row_of_slot[slot] = row.int()
    token_of_row = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
    token_of_row[row] = (slot // top_k).int()

    tile = torch.arange(max_rows // tile_rows, device=device)
    expert_of_tile = torch.searchsorted(segment_end // tile_rows, tile, right=True).clamp(max=absent - 1)
    return Permutation(
        row_of_slot=row_of_slot.view(num_tokens, top_k),
        token_of_row=token_of_row,
        expert_of_tile=expert_of_tile.int(),
        row_limit_of_tile=(first_row + counts)[expert_of_tile].int(),
        num_rows=segment_end[-1:].int(),
        num_tiles=(segment_end[-1:] // tile_rows).int(),
        tile_rows=tile_rows,
        mean_rows=config.mean_rows(num_tokens),
    )


def weigh_tokens_reference(hidden_states: Tensor, topk: TopK, *, config: PermuteConfig) -> WeighedSlots:
    """x[t * K + k] = bf16(weights[t, k] * hidden_states[t]). Same contract as `weigh_tokens`; rows of left-out slots are zeros."""
    config.check_weighed(hidden_states, topk)
    expert = topk.expert_ids.flatten().long() - config.local_expert_offset
    is_local = ((expert >= 0) & (expert < config.num_local_experts))[:, None]
    product = hidden_states.float().repeat_interleave(config.top_k, dim=0) * topk.weights.float().view(-1, 1)
    weighed = torch.where(is_local, product, 0.0).bfloat16()
    return WeighedSlots(weighed, TopK(topk.expert_ids, torch.ones_like(topk.weights)))


def finalize_tokens_reference(
    rows: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: FinalizeConfig,
    output: Tensor | None = None,
    added: Added | None = None,
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]]. Same contract as `finalize_tokens`."""
    config.check(rows, topk, permutation, output, added)
    num_tokens, top_k = permutation.row_of_slot.shape
    total = torch.zeros(num_tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    for choice in range(top_k):
        row = permutation.row_of_slot[:, choice]
        token = (row >= 0).nonzero().squeeze(1)
        total[token] += topk.weights[token, choice, None].float() * rows[row[token].long()].float()
    total = add_to(total, added)
    if output is None:
        return total.bfloat16()
    with torch.inference_mode():  # where the caller may have allocated it
        output.copy_(total)
    return output
