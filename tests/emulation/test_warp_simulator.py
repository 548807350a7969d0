"""The simulated warp does what a warp does, and says so where lanes wait for one another in vain."""

import os

import numpy as np
import pytest
from numba import cuda

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
pytestmark = [pytest.mark.simulator, pytest.mark.skipif(not IS_SIMULATED, reason="set NUMBA_ENABLE_CUDASIM=1")]


def test_shuffles_and_votes_stay_within_their_warp():
    @cuda.jit
    def kernel(sums, votes, ups):
        lane = cuda.laneid
        thread = cuda.threadIdx.x
        total = thread
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(0xFFFFFFFF, total, distance)
        sums[thread] = total
        votes[thread] = cuda.ballot_sync(0xFFFFFFFF, lane % 4 == 1)
        ups[thread] = cuda.shfl_up_sync(0xFFFFFFFF, thread, 1)

    sums, votes, ups = (np.zeros(64, dtype=np.int64) for _ in range(3))
    kernel[1, 64](sums, votes, ups)
    assert sums.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    assert votes.tolist() == [0x22222222] * 64
    assert ups.tolist() == [0, *range(31), 32, *range(32, 63)]


def test_a_block_meets_at_its_barrier():
    @cuda.jit
    def kernel(reversed_values):
        shared = cuda.shared.array(96, np.int32)
        thread = cuda.threadIdx.x
        shared[thread] = thread
        cuda.syncthreads()
        reversed_values[thread] = shared[95 - thread]

    values = np.zeros(96, dtype=np.int32)
    kernel[1, 96](values)
    assert values.tolist() == list(range(95, -1, -1))


def test_lanes_at_different_operations_are_reported():
    from emulation.warp_simulator import DivergentBarrier

    @cuda.jit
    def kernel(out):
        if cuda.laneid < 8:
            out[cuda.laneid] = cuda.shfl_sync(0xFFFFFFFF, 1, 0)
        else:
            out[cuda.laneid] = cuda.shfl_sync(0xFFFFFFFF, 2, 0)

    with pytest.raises(DivergentBarrier, match="different barriers"):
        kernel[1, 32](np.zeros(32))


def test_a_lane_that_left_early_is_reported():
    from emulation.warp_simulator import DivergentBarrier

    @cuda.jit
    def kernel(out):
        if cuda.laneid != 3:
            out[cuda.laneid] = cuda.any_sync(0xFFFFFFFF, True)

    with pytest.raises(DivergentBarrier, match=r"'returned': \[3\]"):
        kernel[1, 32](np.zeros(32))
