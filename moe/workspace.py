"""How much memory a call takes beside its output."""

from __future__ import annotations

import functools
from typing import NamedTuple

from moe.config import MoEConfig
from moe.permute.config import MAX_TILE_ROWS, MIN_TILE_ROWS, PermuteConfig

ALLOCATION_BYTES = 512  # torch's CUDA allocator rounds every tensor up to a multiple of this
# Tensors of more than so many bytes come from blocks that the allocator splits only where more than as many would be left.
# What is left unsplit it counts as allocated.
UNSPLIT_BYTES = 1 << 20


class Workspace(NamedTuple):
    """Upper bounds in bytes on what a call allocates beside its [T, H] output."""

    asked_bytes: int  # of all tensors, each rounded up to 512: what a buffer for them must hold
    counted_bytes: int  # what torch.cuda.memory_allocated may grow by: blocks that stayed whole are counted whole


@functools.lru_cache(maxsize=1024)
def workspace_of(config: MoEConfig, num_tokens: int) -> Workspace:
    """What a call over `num_tokens` tokens may allocate beside its output, whichever planner and GEMMs run it.

    Scratch of both GEMMs (P rows of I and of H), the top-k, the index arrays and the permutation's counts. Nothing grows
    with the weights. For the pipeline of our kernels; the references on a CPU also hold one expert's weights in float32 at
    a time.

    Raises:
        ValueError: a negative number, or more tokens than rows can be numbered for.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected 0 or more, got {num_tokens}; pass the largest batch's")
    config.permute.check_num_tokens(num_tokens)
    rows = config.permute.max_rows(num_tokens)
    return _sum(config, num_tokens, rows, rows // config.permute.rows_per_tile(num_tokens))


@functools.lru_cache(maxsize=1024)
def workspace_of_any_choice(config: MoEConfig, max_num_tokens: int) -> Workspace:
    """What no call over up to `max_num_tokens` tokens exceeds, whatever tile_rows a table holds or comes to hold.

    Raises:
        ValueError: as `workspace_of`.
    """
    rows, tiles = 0, 0
    for tile_rows in (MIN_TILE_ROWS, MAX_TILE_ROWS):  # most tiles; most rows
        permute = PermuteConfig(**config.permute.model_dump() | {"tile_rows": tile_rows})
        workspace_of(
            MoEConfig(**dict(config) | {"permute": permute}), max_num_tokens
        )  # refuses what is no number of tokens
        rows = max(rows, permute.max_rows(max_num_tokens))
        tiles = max(tiles, permute.max_rows(max_num_tokens) // tile_rows)
    return _sum(config, max_num_tokens, rows, tiles)


def _sum(config: MoEConfig, num_tokens: int, rows: int, tiles: int) -> Workspace:
    slots = num_tokens * config.top_k
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
        *config.permute.scratch_bytes(num_tokens),
        *((slots * config.hidden_size * 2, slots * 4) if config.weighs_input else ()),  # weighed inputs, and ones
    ]
    rounded = [-(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES for size in sizes]
    unsplit = sum(size > UNSPLIT_BYTES for size in rounded) * UNSPLIT_BYTES
    return Workspace(sum(rounded), sum(rounded) + unsplit)
