"""Where each slot is computed, host side."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import TopK
from moe.parallel.place_slots_kernel import place_slots_kernel
from moe.parallel.placement import PlacementTables
from moe.runtime.triton_launch import TritonKernel

BLOCK = 256


def place_slots(
    topk: TopK, tables: PlacementTables, *, layer: int, source_rank: int = 0, only_rank: int | None = None
) -> tuple[Tensor | None, TopK]:
    """As `moe.parallel.reference.place_slots_reference`, in one launch."""
    ids, weights = topk.expert_ids, topk.weights
    top_k = ids.shape[-1]
    num_slots = ids.numel()
    shape = (num_slots // top_k, top_k)
    local = torch.empty(shape, dtype=torch.int32, device=ids.device)
    rank_of_slot = torch.empty_like(local) if only_rank is None else None
    moves_weights = ids.dim() == 3
    placed = torch.empty(shape, dtype=weights.dtype, device=ids.device) if moves_weights else weights
    slots_a_source = ids.shape[1] * top_k if moves_weights else num_slots
    if not num_slots:
        return rank_of_slot, TopK(local, placed)
    kernel = _kernel_of(tables.num_experts, top_k, tables.max_copies)
    kernel.launch(
        (-(-num_slots // BLOCK), 1, 1),
        ids,
        weights if moves_weights else None,
        tables.num_copies,
        tables.rank_of_copy,
        tables.local_id,
        rank_of_slot,
        local,
        placed if moves_weights else None,
        numbers=(
            num_slots,
            slots_a_source,
            ids.stride(0) if moves_weights else num_slots,
            source_rank,
            layer,
            -1 if only_rank is None else only_rank,
        ),
    )
    return rank_of_slot, TopK(local, placed)


@functools.cache
def _kernel_of(num_experts: int, top_k: int, max_copies: int) -> TritonKernel:
    return TritonKernel(
        place_slots_kernel, NUM_EXPERTS=num_experts, TOP_K=top_k, MAX_COPIES=max_copies, BLOCK=BLOCK, num_warps=4
    )
