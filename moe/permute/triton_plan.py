"""Stage 2 in Triton: place every (token, choice) slot in a row of its expert."""

from __future__ import annotations

import functools

import torch
import triton

from moe.flow import Permutation, TopK
from moe.permute.chunks import TRITON_CHUNKING
from moe.permute.config import PermuteConfig
from moe.permute.triton_plan_kernel import count_kernel, place_kernel, plan_kernel, scan_kernel
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_versions import COMPILER_OPTIONS

CHUNKING = TRITON_CHUNKING
NUM_WARPS = CHUNKING.block_slots // 32
COUNTED_SLOTS = 1024  # ids that a program of the one launch counts at once, where there are more than one block of them
SCAN_CHUNKS = 128  # chunks scanned at once
SCAN_EXPERTS = 16  # experts of a scanning program: 64 bytes of a chunk's counts
MIN_BINS = 32  # one for each lane of a warp


def plan_permutation(topk: TopK, *, config: PermuteConfig) -> Permutation:
    """Place every (token, choice) slot in a row of its expert.

    One launch for up to 4096 slots, three above. The result is a pure function of the expert ids:
    rows of an expert are in slot order, t * K + k ascending. An id that comes twice in a row of expert_ids gets two rows.

    Args:
        topk: expert_ids [T, K] int32. Ids out of [local_expert_offset, local_expert_offset + num_local_experts),
            negative and garbage ones included, get no row.
        config: the slice of experts that lies here, and the row count that each segment is padded to.
    Returns:
        Permutation over P = config.max_rows(T) rows. Entries from num_rows and num_tiles on are undefined.
    Raises:
        ValueError: naming the tensor, what was wanted and what came.
    Source: flashinfer's trtllm-gen routing has the same maps, with rows of an expert in no promised order.
    """
    config.check(topk)
    return launch_plan_permutation(topk, config=config)


def launch_plan_permutation(topk: TopK, *, config: PermuteConfig) -> Permutation:
    """`plan_permutation` of tensors that were checked."""
    num_tokens, top_k = topk.expert_ids.shape
    permutation = _allocate(topk, config)
    num_slots = num_tokens * top_k
    if not num_slots:
        permutation.num_rows.zero_()
        permutation.num_tiles.zero_()
        return permutation
    with torch.cuda.device_of(topk.expert_ids):
        if num_slots <= CHUNKING.max_slots_in_one_launch:
            _plan_in_one_launch(topk, permutation, config)
        else:
            _plan_in_three_launches(topk, permutation, config)
    return permutation


def _allocate(topk: TopK, config: PermuteConfig) -> Permutation:
    new = functools.partial(new_scratch, topk.expert_ids)  # int32
    num_tokens = topk.expert_ids.shape[0]
    tile_rows = config.rows_per_tile(num_tokens)
    max_rows = config.max_rows(num_tokens)
    max_tiles = max_rows // tile_rows
    return Permutation(
        row_of_slot=new(topk.expert_ids.shape),
        token_of_row=new((max_rows,)),
        expert_of_tile=new((max_tiles,)),
        row_limit_of_tile=new((max_tiles,)),
        num_rows=new((1,)),
        num_tiles=new((1,)),
        tile_rows=tile_rows,
        mean_rows=config.mean_rows(num_tokens),
    )


def _plan_in_one_launch(topk: TopK, permutation: Permutation, config: PermuteConfig) -> None:
    num_slots = topk.expert_ids.numel()
    plan_kernel[(triton.cdiv(num_slots, CHUNKING.block_slots),)](
        topk.expert_ids,
        permutation.row_of_slot,
        permutation.token_of_row,
        permutation.expert_of_tile,
        permutation.row_limit_of_tile,
        permutation.num_rows,
        permutation.num_tiles,
        num_slots,
        config.local_expert_offset,
        config.num_local_experts,
        TOP_K=config.top_k,
        TILE_ROWS=permutation.tile_rows,
        BINS=_num_bins(config),
        BLOCK=CHUNKING.block_slots,
        COUNTED=CHUNKING.block_slots if num_slots <= CHUNKING.block_slots else COUNTED_SLOTS,
        num_warps=NUM_WARPS,
        **COMPILER_OPTIONS,
    )


def _plan_in_three_launches(topk: TopK, permutation: Permutation, config: PermuteConfig) -> None:
    num_slots, num_experts = topk.expert_ids.numel(), config.num_local_experts
    chunk_slots = CHUNKING.chunk_slots(num_slots, num_experts)
    num_chunks = triton.cdiv(num_slots, chunk_slots)
    counts = new_scratch(topk.expert_ids, (num_chunks, num_experts))
    slots_before = new_scratch(topk.expert_ids, (num_chunks + 1, num_experts))
    sizes = (num_slots, chunk_slots, config.local_expert_offset, num_experts)
    count_kernel[(num_chunks,)](
        topk.expert_ids,
        counts,
        *sizes,
        BINS=_num_bins(config),
        BLOCK=CHUNKING.block_slots,
        num_warps=NUM_WARPS,
        **COMPILER_OPTIONS,
    )
    scan_kernel[(triton.cdiv(num_experts, SCAN_EXPERTS),)](
        counts,
        slots_before,
        num_chunks,
        num_experts,
        CHUNKS=SCAN_CHUNKS,
        EXPERTS=SCAN_EXPERTS,
        num_warps=4,
        **COMPILER_OPTIONS,
    )
    place_kernel[(num_chunks,)](
        topk.expert_ids,
        slots_before,
        permutation.row_of_slot,
        permutation.token_of_row,
        permutation.expert_of_tile,
        permutation.row_limit_of_tile,
        permutation.num_rows,
        permutation.num_tiles,
        *sizes,
        num_chunks,
        TOP_K=config.top_k,
        TILE_ROWS=permutation.tile_rows,
        BINS=_num_bins(config),
        BLOCK=CHUNKING.block_slots,
        num_warps=NUM_WARPS,
        **COMPILER_OPTIONS,
    )


def _num_bins(config: PermuteConfig) -> int:
    return max(triton.next_power_of_2(config.num_local_experts), MIN_BINS)
