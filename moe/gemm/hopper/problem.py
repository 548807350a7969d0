"""What the host sides of both Hopper GEMMs share: which problems they take, boxes that TMA copies, the grid."""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental.gluon import language as gl

from moe.flow import RowUnits, UnitSize
from moe.gemm.config import BLOCK_MAJOR_K, GemmConfig, WeightLayout
from moe.runtime.device import num_sms
from moe.runtime.tensor_maps import Boxes

# 128 rows are what a block multiplies at a time; 22 units that share a weight tile while it is in L2 were best of 8, 22 and
# all on an H200.
WIDE_UNITS = UnitSize(max_rows=128, multiple=128, max_group=22)
MAX_REGISTERS = 168  # a thread: 65536 over three groups of 128 threads, in steps of 8; partitions then share them out
MAX_MESSAGE = 1 << 16  # experts and column blocks that a message between warps has bits for
MAX_COORDINATE = 1 << 31
# Short units pay while the weights that 132 blocks stream at a time stay in L2: with K = 7168 they cost 5% on an H200, with
# K <= 4096 they gained 2 to 8%.
MAX_SHORT_UNIT_K = 4096


def fits(config: GemmConfig, tile_rows: int, block_n: int, all_tile_rows: tuple[int, ...] = (64, 128)) -> bool:
    """Whether the kernels' tiles and index arithmetic take this problem."""
    rows_of_all_experts = config.num_experts * config.weight_rows * -(-config.in_features // BLOCK_MAJOR_K)
    return (
        tile_rows in all_tile_rows
        and config.weight_format.layout is not WeightLayout.MajorMn
        and config.in_features > BLOCK_MAJOR_K  # two steps at least: the first one covers the store of the last unit
        and config.num_experts <= MAX_MESSAGE
        and -(-config.out_features // block_n) <= MAX_MESSAGE
        and rows_of_all_experts < MAX_COORDINATE
    )


def skips_tails(config: GemmConfig, tile_rows: int) -> bool:
    """Whether a unit of up to 64 real rows computes 64 rows only. With tiles of 64 rows it must: what follows is not its own."""
    return tile_rows == 64 or config.in_features <= MAX_SHORT_UNIT_K


def row_boxes(matrix: Tensor, box_rows: int, box_columns: int) -> Boxes:
    """Boxes of a bf16 matrix, swizzled in shared memory."""
    num_rows, num_columns = matrix.shape
    box = (box_rows, box_columns)
    return Boxes(matrix, (num_rows, num_columns), (num_columns, 1), box, box_layout(*box))


def weight_row_boxes(weights: Tensor, config: GemmConfig, box_rows: int) -> Boxes:
    """Boxes of 64 columns of all experts' weights as one matrix: [E * N, K], or [E * K / 64 * N, 64] where BlockMajorK."""
    is_block_major = config.weight_format.layout is WeightLayout.BlockMajorK
    num_columns = BLOCK_MAJOR_K if is_block_major else config.in_features
    box = (box_rows, BLOCK_MAJOR_K)
    return Boxes(weights, (weights.numel() // num_columns, num_columns), (num_columns, 1), box, box_layout(*box))


@functools.cache
def box_layout(*box: int) -> gl.NVMMASharedLayout:
    """How a box of bf16 lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)


def num_blocks(units: RowUnits, config: GemmConfig, block_n: int) -> int:
    """One block of threads an SM, or one for each piece of work where those are fewer."""
    work = units.max_units * -(-config.out_features // block_n)
    return min(work, num_sms(units.counts.device))
