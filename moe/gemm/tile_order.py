"""Which row tile and which columns a program of a grouped GEMM takes."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def tile_of_program(program, num_tiles, NUM_COLUMN_BLOCKS: tl.constexpr, GROUP_TILES: tl.constexpr):
    """(row tile, column block) of a program, given that program < num_tiles * NUM_COLUMN_BLOCKS.

    GROUP_TILES neighbouring row tiles take the same columns one after another, then the next columns. Row tiles of an
    expert are neighbours, so they read a block of its weights while it lies in L2, and the group's rows stay there too.
    """
    programs_of_group = GROUP_TILES * NUM_COLUMN_BLOCKS
    first_tile = program // programs_of_group * GROUP_TILES
    tiles_of_group = tl.minimum(num_tiles - first_tile, GROUP_TILES)
    program_in_group = program % programs_of_group
    return first_tile + program_in_group % tiles_of_group, program_in_group // tiles_of_group
