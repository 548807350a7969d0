"""wide_gemm1 and wide_gemm2 on a Hopper, against float64; what they refuse needs none."""

from __future__ import annotations

import pytest
import torch
from gemm.family import Family, activations_of
from gemm.hopper.family import AWKWARD_DIMS, AWKWARD_FORMATS, BIAS_DIMS, FORMAT_DIMS, FORMATS, LOADS, OPTIONS

from moe.gemm.config import FLASHINFER, WeightFormat

pytest.importorskip("triton")
from gemm.contract import *  # noqa: F403
from gemm.hopper.contract import *  # noqa: F403

from moe.gemm.wide.gemm1 import wide_gemm1
from moe.gemm.wide.gemm2 import wide_gemm2
from moe.gemm.wide.tile import WIDE_UNITS

FAMILY = Family(
    gemm1=wide_gemm1,
    gemm2=wide_gemm2,
    activations=activations_of("wide"),
    few_activations=("Swiglu", "Relu2"),
    bias_dtypes=(torch.bfloat16, torch.float32),
    bias_dims=BIAS_DIMS,
    formats=FORMATS,
    tile_rows=(64, 128),
    few_tile_rows=(128,),
    format_tile_rows=(64, 128),
    format_dims=FORMAT_DIMS,
    awkward_dims=AWKWARD_DIMS,
    awkward_formats=AWKWARD_FORMATS,
    usual_dims=(512, 768),
    usual_formats=(WeightFormat(), FLASHINFER),
    loads=LOADS,
    options=OPTIONS,
)
UNIT_SIZE = WIDE_UNITS
REFUSED_TILE_ROWS = (16, 32)


@pytest.fixture
def gemm_device(hopper: torch.device) -> torch.device:
    return hopper


@pytest.fixture
def gemm_gpu(hopper: torch.device) -> torch.device:
    return hopper
