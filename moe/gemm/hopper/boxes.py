"""Boxes of bf16 matrices that TMA copies for the Hopper GEMMs."""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental.gluon import language as gl

from moe.runtime.tensor_maps import Boxes


def row_boxes(matrix: Tensor, box_rows: int, box_columns: int) -> Boxes:
    """Boxes of a bf16 matrix, swizzled in shared memory. Of more axes, all but the last one are rows."""
    num_columns = matrix.shape[-1]
    box = (box_rows, box_columns)
    return Boxes(matrix, (matrix.numel() // num_columns, num_columns), (num_columns, 1), box, box_layout(*box))


def half_row_boxes(matrix: Tensor, box_rows: int, box_columns: int) -> tuple[Boxes, Boxes]:
    """Boxes of the left and of the right half of a bf16 matrix's columns: one at the end of the left half ends there."""
    num_rows, num_columns = matrix.shape
    half, box = num_columns // 2, (box_rows, box_columns)
    each = (matrix, (num_rows, half), (num_columns, 1), box, box_layout(*box))
    return Boxes(*each), Boxes(*each, half)


@functools.cache
def box_layout(*box: int) -> gl.NVMMASharedLayout:
    """How a box of bf16 lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)
