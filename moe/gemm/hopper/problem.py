"""What the host sides of both Hopper families share: which problems they take, how many blocks of threads they start."""

from __future__ import annotations

from moe.flow import RowUnits
from moe.gemm.config import BLOCK_MAJOR_K, GemmConfig, WeightLayout
from moe.runtime.device import num_sms

MAX_GROUP_UNITS = 22  # that share a weight tile while it is in L2: best of 8, 22 and all on an H200
MAX_REGISTERS = 168  # a thread: 65536 over three groups of 128 threads, in steps of 8; partitions then share them out
MAX_MESSAGE = 1 << 16  # experts and column blocks that a message between warps has bits for
MAX_COORDINATE = 1 << 31
LAYOUTS = (WeightLayout.MajorK, WeightLayout.MajorMn, WeightLayout.BlockMajorK)


def fits(config: GemmConfig, tile_rows: int, block_n: int, all_tile_rows: tuple[int, ...]) -> bool:
    """Whether a family's tiles, for tile_rows of `all_tile_rows`, and its index arithmetic take this problem."""
    rows_of_all_experts = config.num_experts * config.weight_rows * -(-config.in_features // BLOCK_MAJOR_K)
    return (
        tile_rows in all_tile_rows
        and config.weight_format.layout in LAYOUTS
        and not (config.weight_format.layout is WeightLayout.MajorMn and config.weight_format.is_shuffled)
        and config.in_features > BLOCK_MAJOR_K  # two steps at least: the first one covers the store of the last unit
        and config.num_experts <= MAX_MESSAGE
        and -(-config.out_features // block_n) <= MAX_MESSAGE
        and rows_of_all_experts < MAX_COORDINATE
    )


def num_blocks(units: RowUnits, config: GemmConfig, block_n: int) -> int:
    """One block of threads an SM, or one for each piece of work where those are fewer."""
    work = units.max_units * -(-config.out_features // block_n)
    return min(work, num_sms(units.counts.device))
