"""Where the swapped kernels' boxes of weights come from."""

import pytest
import torch
from gemm.cases import format_id
from gemm.hopper.family import FORMATS

from moe.gemm.config import ActivationType, GemmConfig, WeightLayout
from moe.gemm.weight_format import pack_weights

pytest.importorskip("triton")
from moe.gemm.swapped.tile import weight_boxes

LOGICAL_FORMATS = [form for form in FORMATS if form.layout is not WeightLayout.MajorMn]


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "not_gated"])
@pytest.mark.parametrize("weight_format", LOGICAL_FORMATS, ids=format_id)
def test_boxes_hold_weight_rows_in_logical_order(weight_format, is_gated):
    """Each element that a box names, by the descriptor's shape and strides, is the logical weight's."""
    in_features, out_features = 128, 256
    activation = ActivationType.Swiglu if is_gated else None
    config = GemmConfig(
        num_experts=2,
        in_features=in_features,
        out_features=out_features,
        activation=activation,
        weight_format=weight_format,
    )
    logical = torch.arange(2 * config.weight_rows * in_features, dtype=torch.int32).view(2, -1, in_features)
    packed = pack_weights(logical, weight_format, is_gated=is_gated)
    boxes = weight_boxes(packed.bfloat16(), config)
    expert, first_k, first_column = 1, 64, 64 if is_gated else 128
    rows_of_column = 2 if is_gated and weight_format.is_shuffled else 1
    outer, k = (expert * 2 + 1, 0) if weight_format.layout is WeightLayout.BlockMajorK else (expert, first_k)
    row = outer * (out_features if config.is_interleaved else config.weight_rows) + first_column * rows_of_column
    start = [row // 32, 0, 0] if weight_format.is_shuffled else [row]
    if is_gated:
        start = [0, row // 32, 0, 0] if weight_format.is_shuffled else [0, row]
    start.append(k)
    first = sum(coordinate * stride for coordinate, stride in zip(start, boxes.strides))
    assert all(c + size <= limit for c, size, limit in zip(start, boxes.box, boxes.shape))
    box = packed.flatten().as_strided(boxes.box, boxes.strides, first).reshape(128, 64)
    columns = slice(first_column, first_column + (64 if is_gated else 128))
    expected = [logical[expert, columns, first_k : first_k + 64]]
    if is_gated:
        up = logical[expert, out_features:][columns, first_k : first_k + 64]
        expected = [*expected, up] if weight_format.is_gate_first else [up, *expected]
    assert torch.equal(box, torch.cat(expected))
