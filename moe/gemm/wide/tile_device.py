"""The tile of the wide Hopper GEMMs: 128 rows, 64 a consumer, times 256 rows of the weight, in steps of 64."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from moe.gemm.hopper.epilogue_device import put
from moe.gemm.hopper.ring_device import release, wait_until_filled
from moe.gemm.hopper.work_device import row_blocks_of
from moe.runtime.gluon_names_device import store_box

HALF_ROWS = gl.constexpr(64)  # rows of a consumer
BLOCK_W = gl.constexpr(256)  # weight rows
STORE_N = gl.constexpr(128)  # columns that are written at a time
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(4)


class Stages(NamedTuple):
    """Shared memory of the steps ahead."""

    rows: Any  # [2 NUM_STAGES, 64, 64], the two halves of a stage after one another
    weights: Any  # [NUM_STAGES, 256, 64]
    ring: Any


@gluon.jit
def has_second_half(message):
    """Whether rows from 64 on are to be computed."""
    return row_blocks_of(message) > 4


@gluon.jit
def no_products():
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_W, 16])
    return gl.zeros([HALF_ROWS, BLOCK_W], gl.float32, layout)


@gluon.jit
def start_step(accumulators, stages, step, FENCES: gl.constexpr, ID: gl.constexpr):
    """Start a step's wgmma, once its stage is filled. FENCES: its rows did not come by TMA."""
    stage = wait_until_filled(stages.ring, step)
    if FENCES:
        fence_async_shared()
    rows, weights = stages.rows.index(stage * 2 + ID), stages.weights.index(stage)
    return warpgroup_mma(rows, weights.permute((1, 0)), accumulators, is_async=True)


@gluon.jit
def finish_steps(
    accumulators, stages, step, FIRST: gl.constexpr, NUM_STEPS: gl.constexpr, FENCES: gl.constexpr, ID: gl.constexpr
):
    """Steps FIRST .. NUM_STEPS of a unit; `step` numbers all units' steps. All of the unit's products, and the step after them."""
    for _ in range(FIRST, NUM_STEPS):
        accumulators = start_step(accumulators, stages, step, FENCES, ID)
        accumulators = warpgroup_mma_wait(1, deps=[accumulators])
        release(stages.ring, step - 1)
        step += 1
    accumulators = warpgroup_mma_wait(0, deps=[accumulators])
    release(stages.ring, step - 1)
    return accumulators, step


@gluon.jit
def skip_steps(ring, step, NUM_STEPS: gl.constexpr):
    """A unit that this consumer takes no part in. The step after it."""
    for _ in range(NUM_STEPS):
        wait_until_filled(ring, step)
        release(ring, step)
        step += 1
    return step


@gluon.jit
def write(result, output, row, column):
    """Start the copy of [64, 128] to [row, column], through shared memory that the copy before has left."""
    put(result, output.buffers, 0)
    store_box(output.desc, [row, column], output.buffers)
