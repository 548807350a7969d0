"""The rank of each slot, and its expert's place in that rank's weights. One program a block of slots."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.parallel.copy_device import rank_of_expert, token_word


@triton.jit
def place_slots_kernel(
    ids_ptr,  # [S, M, TOP_K] int32, sources `source_stride` apart
    weights_ptr,  # the same fp32, or None: they stay where they are
    num_copies_ptr,  # [E] int32
    rank_of_copy_ptr,  # [E, MAX_COPIES] int32
    local_id_ptr,  # [N, E] int32
    rank_ptr,  # [S * M, TOP_K] int32, or None
    local_ptr,  # [S * M, TOP_K] int32
    weights_out_ptr,  # [S * M, TOP_K] fp32, or None
    num_slots,
    slots_a_source,  # M * TOP_K
    source_stride,
    source_rank,  # of the first source
    layer,
    only_rank,  # -1: local ids of all ranks
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    MAX_COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_slot = slot < num_slots
    source = slot // slots_a_source
    at = slot % slots_a_source
    address = source * source_stride + at
    expert = tl.load(ids_ptr + address, mask=is_slot, other=-1)
    word = token_word(at // TOP_K, source_rank + source, layer)
    rank = rank_of_expert(expert, word, num_copies_ptr, rank_of_copy_ptr, NUM_EXPERTS, MAX_COPIES)
    is_wanted = (rank >= 0) & ((only_rank < 0) | (rank == only_rank))
    local = tl.load(local_id_ptr + rank * NUM_EXPERTS + expert, mask=is_wanted, other=-1)
    tl.store(local_ptr + slot, local, mask=is_slot)
    if rank_ptr is not None:
        tl.store(rank_ptr + slot, rank, mask=is_slot)
    if weights_out_ptr is not None:
        tl.store(weights_out_ptr + slot, tl.load(weights_ptr + address, mask=is_slot, other=0.0), mask=is_slot)
