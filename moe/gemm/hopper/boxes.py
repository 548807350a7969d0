"""Boxes of bf16 matrices that TMA copies for the Hopper GEMMs."""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental.gluon import language as gl

from moe.runtime.tensor_maps import Boxes


def row_boxes(matrix: Tensor, box_rows: int, box_columns: int) -> Boxes:
    """Boxes of a bf16 matrix, swizzled in shared memory."""
    num_rows, num_columns = matrix.shape
    box = (box_rows, box_columns)
    return Boxes(matrix, (num_rows, num_columns), (num_columns, 1), box, box_layout(*box))


@functools.cache
def box_layout(*box: int) -> gl.NVMMASharedLayout:
    """How a box of bf16 lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)
