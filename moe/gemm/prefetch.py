"""Whether gemm1 asks for weights while the planner still runs, which hardly uses memory."""

from __future__ import annotations

import math

from moe.flow import Permutation
from moe.gemm.config import GemmConfig
from moe.gemm.prefetch_device import BYTES

MIN_MEAN_ROWS = 2  # with fewer, an expert may have no rows, and its weights would be brought for nothing


def prefetches(config: GemmConfig, permutation: Permutation, num_programs: int, *, uses_pdl: bool) -> bool:
    """Whether `num_programs` programs bring the start of W1 to L2 (`prefetch_weights`) before they wait for the plan."""
    weight_bytes = 2 * math.prod(config.weight_shape)
    return uses_pdl and permutation.mean_rows >= MIN_MEAN_ROWS and num_programs * BYTES.value <= weight_bytes
