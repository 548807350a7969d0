"""Count the slots of each expert, one chunk a block: the first of two launches that plan for many slots."""
# numba's modules say of thread indices only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from moe.permute.numba_count_device import Slots, build_count_slots, chunk_of_block, clear
from moe.runtime.numba_warp_device import WARP_SIZE, gdc_launch_dependents, gdc_wait


def build_count_kernel(*, num_bins: int, num_warps: int, uses_pdl: bool) -> Callable[..., None]:
    """The kernel that counts the slots of each expert. Arguments as in `build_plan_kernel`."""
    BINS = num_bins
    THREADS = num_warps * WARP_SIZE
    USES_PDL = uses_pdl
    count_slots = build_count_slots(THREADS, 0)

    def count_kernel(
        expert_ids_ptr: Any,  # [T, K] int32
        counts_ptr: Any,  # [num_experts, blocks] int32: blocks beyond the last chunk write zeros
        num_slots: np.int32,
        chunk_slots: np.int32,
        first_expert: np.int32,
        num_experts: np.int32,
    ) -> None:
        slots = Slots(expert_ids_ptr, first_expert, num_experts)
        counts = cuda.shared.array(BINS, np.int32)
        clear(counts, BINS, THREADS)
        if USES_PDL:
            gdc_wait()
            gdc_launch_dependents()
        cuda.syncthreads()
        start, end = chunk_of_block(num_slots, chunk_slots)
        count_slots(slots, start, end, end, counts)
        cuda.syncthreads()
        expert = np.int32(cuda.threadIdx.x)
        while expert < num_experts:
            place = np.int32(expert * np.int32(cuda.gridDim.x) + np.int32(cuda.blockIdx.x))
            counts_ptr[place] = counts[np.uint32(expert)]
            expert = np.int32(expert + THREADS)

    return count_kernel
