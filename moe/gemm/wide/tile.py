"""What the host sides of the wide Hopper GEMMs share: their problems, their schedule, boxes of weight rows."""

from __future__ import annotations

from torch import Tensor

from moe.flow import UnitSize
from moe.gemm.config import BLOCK_MAJOR_K, GemmConfig, WeightLayout
from moe.gemm.hopper.boxes import box_layout
from moe.gemm.hopper.problem import MAX_GROUP_UNITS, fits
from moe.runtime.tensor_maps import Boxes

TILE_ROWS = (64, 128)
HALF_ROWS = 64  # rows that are written, and read in gemm2, at a time
# 128 rows are what a block multiplies at a time.
WIDE_UNITS = UnitSize(max_rows=128, multiple=128, max_group=MAX_GROUP_UNITS)
# Short units pay while the weights that 132 blocks stream at a time stay in an H200's L2 (docs/measured_facts.md).
MAX_SHORT_UNIT_K = 4096


def fits_wide(config: GemmConfig, tile_rows: int, block_n: int) -> bool:
    """Whether the wide kernels' tiles and index arithmetic take this problem."""
    return fits(config, tile_rows, block_n, TILE_ROWS)


def skips_tails(config: GemmConfig, tile_rows: int) -> bool:
    """Whether a unit of up to 64 real rows computes 64 rows only. With tiles of 64 rows it must: what follows is not its own."""
    return tile_rows == 64 or config.in_features <= MAX_SHORT_UNIT_K


def weight_row_boxes(weights: Tensor, config: GemmConfig, box_rows: int) -> Boxes:
    """Boxes of 64 columns of all experts' weights as one matrix: [E * N, K], or [E * K / 64 * N, 64] where BlockMajorK.

    Where MajorMn, boxes of 64 rows of each expert's [K, N].
    """
    if config.weight_format.layout is WeightLayout.MajorMn:
        strides = (config.in_features * config.weight_rows, config.weight_rows, 1)
        column_box = (1, BLOCK_MAJOR_K, box_rows)
        return Boxes(weights, config.weight_shape, strides, column_box, box_layout(*column_box))
    is_block_major = config.weight_format.layout is WeightLayout.BlockMajorK
    num_columns = BLOCK_MAJOR_K if is_block_major else config.in_features
    box = (box_rows, BLOCK_MAJOR_K)
    return Boxes(weights, (weights.numel() // num_columns, num_columns), (num_columns, 1), box, box_layout(*box))
