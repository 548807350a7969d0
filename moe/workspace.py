"""How much memory a call takes beside its output."""

from __future__ import annotations

from moe.config import MoEConfig

ALLOCATION_BYTES = 512  # torch's CUDA allocator rounds every tensor up to a multiple of this


def workspace_bytes(config: MoEConfig, num_tokens: int) -> int:
    """Upper bound in bytes on what a call over `num_tokens` tokens allocates beside its [T, H] output.

    Scratch of both GEMMs (P rows of I and of H), the top-k, the index arrays and the permutation's counts, each
    rounded up as torch's CUDA allocator does. Nothing grows with the weights. For the pipeline of our kernels; the
    references on a CPU also hold one expert's weights in float32 at a time.

    Raises:
        ValueError: a negative number, or more tokens than rows can be numbered for.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected 0 or more, got {num_tokens}; pass the largest batch's")
    config.permute.check_num_tokens(num_tokens)
    rows = config.permute.max_rows(num_tokens)
    slots = num_tokens * config.top_k
    tiles = rows // config.permute.rows_per_tile(num_tokens)
    sizes = [
        rows * config.intermediate_size * 2,
        rows * config.hidden_size * 2,
        slots * 4,  # expert_ids
        slots * 4,  # weights, float32 at most
        slots * 4,  # row_of_slot
        rows * 4,  # token_of_row
        tiles * 4,  # expert_of_tile
        tiles * 4,  # row_limit_of_tile
        4,  # num_rows
        4,  # num_tiles
        *(tiles * 20, 8) * 2,  # what Hopper's GEMMs make of the tiles: five numbers each, and two counts
        config.permute.scratch_bytes(num_tokens) + ALLOCATION_BYTES,  # two tensors
    ]
    return sum(-(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES for size in sizes)
