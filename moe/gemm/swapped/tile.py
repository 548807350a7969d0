"""What the host sides of the swapped Hopper GEMMs share: their problems, their schedule, boxes of weight rows in order."""

from __future__ import annotations

import functools

from torch import Tensor

from moe.flow import UnitSize
from moe.gemm.config import BLOCK_MAJOR_K, SHUFFLE_ROWS, GemmConfig, WeightLayout
from moe.gemm.hopper.boxes import box_layout
from moe.gemm.hopper.problem import MAX_GROUP_UNITS, fits
from moe.runtime.tensor_maps import Boxes

TILE_ROWS = (16, 32, 64, 128)
ROW_MULTIPLE = 32  # rows that the kernels' branches count in
# 128 + 32 rows: the most whose accumulators, 160 registers a thread, leave room for the rest. At a mean of 128 rows an expert
# under uniform routing hardly any has more, so that its weights are read once.
SWAPPED_UNITS = UnitSize(max_rows=160, multiple=ROW_MULTIPLE, max_group=MAX_GROUP_UNITS)
BOX_ROWS = 128  # weight rows of a consumer


def fits_swapped(config: GemmConfig, tile_rows: int, block_n: int) -> bool:
    """Whether the swapped kernels' tiles and index arithmetic take this problem."""
    return fits(config, tile_rows, block_n, TILE_ROWS)


def store_rows(tile_rows: int) -> int:
    """Rows that are written at a time: no more than an expert's rows are padded to, or the next expert's would be hit."""
    return min(tile_rows, ROW_MULTIPLE)


def weight_boxes(weights: Tensor, config: GemmConfig) -> Boxes:
    """Boxes of 128 weight rows of 64 elements in logical order, whatever the format; where MajorMn, of 64 rows as they lie.

    A gated box has 64 rows of the weight's first half, then the same 64 of its second. The axes that they are cut from, with
    `outer` = expert (MajorK) or expert * K / 64 + k / 64 (BlockMajorK), and their box:

        not gated                 outer * N + row,                                       k      128        64
        not gated, shuffled       (outer * N + row) / 32, row / 4 % 8, row % 4,          k      4 8 4      64
        gated                     half, outer * 2I + row,                                k      2 64       64
        gated, interleaved        half, outer * I + row,                                 k      2 64       64
        gated, shuffled           half, (outer * 2I + 2 row) / 32, row / 2 % 8, row % 2, k      2 4 8 2    64

    which undoes the shuffle of `weight_format` (row r of a block of 32 lies at 8 (r % 4) + r / 4, halves interleaved before)
    by strides alone. MajorMn: expert, k, row of the weight; box 1 64 64.
    """
    shape, strides, box = _boxes(config, weights.numel())
    return Boxes(weights, shape, strides, box, box_layout(*box))


@functools.lru_cache(maxsize=1024)
def _boxes(config: GemmConfig, num_elements: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, strides and box."""
    if config.weight_format.layout is WeightLayout.MajorMn:
        column_strides = (config.in_features * config.weight_rows, config.weight_rows, 1)
        return config.weight_shape, column_strides, (1, BLOCK_MAJOR_K, BOX_ROWS // 2)
    is_block_major = config.weight_format.layout is WeightLayout.BlockMajorK
    width = BLOCK_MAJOR_K if is_block_major else config.in_features
    num_rows = num_elements // width
    match config.is_gated, config.weight_format.is_shuffled:
        case False, False:
            shape, strides, box = [num_rows], [1], [BOX_ROWS]
        case False, True:
            shape, strides, box = (
                [num_rows // SHUFFLE_ROWS, 8, 4],
                [SHUFFLE_ROWS, 1, 8],
                [BOX_ROWS // SHUFFLE_ROWS, 8, 4],
            )
        case True, False if config.is_interleaved:
            shape, strides, box = [2, num_rows // 2], [1, 2], [2, BOX_ROWS // 2]
        case True, False:
            # Both halves lie within the tensor for rows up to that number.
            shape, strides, box = [2, num_rows - config.out_features], [config.out_features, 1], [2, BOX_ROWS // 2]
        case _:
            shape = [2, num_rows // SHUFFLE_ROWS, 8, 2]
            strides, box = [8, SHUFFLE_ROWS, 1, 16], [2, BOX_ROWS // SHUFFLE_ROWS, 8, 2]
    return (*shape, width), (*(stride * width for stride in strides), 1), (*box, BLOCK_MAJOR_K)
