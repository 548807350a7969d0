"""The tile of the wide Hopper GEMMs: 128 rows, 64 a consumer, times 256 rows of the weight, in steps of 64."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe.gemm.activation_device import activate
from moe.gemm.hopper.bias_device import biases_of, lanes_of_biases, load_biases, pin_sums, release_biases
from moe.gemm.hopper.epilogue_device import NOWHERE, pin, put
from moe.gemm.hopper.ring_device import release, wait_until_filled
from moe.gemm.hopper.work_device import column_block_of, place_of_weights, receive, row_blocks_of, row_of
from moe.runtime.gluon_names_device import load_box, reinterpret, store_box

HALF_ROWS = gl.constexpr(64)  # rows of a consumer
BLOCK_W = gl.constexpr(256)  # weight rows
STORE_N = gl.constexpr(128)  # columns that are written at a time
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(4)


class Stages(NamedTuple):
    """Shared memory of the steps ahead."""

    rows: Any  # [2 NUM_STAGES, 64, 64], the two halves of a stage after one another
    weights: Any  # [NUM_STAGES, 256, 64], or [NUM_STAGES, 64, 256] where MajorMn
    ring: Any


@gluon.jit
def make_weights(layout: gl.constexpr, IS_MAJOR_MN: gl.constexpr):
    if IS_MAJOR_MN:
        return gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BLOCK_K, BLOCK_W], layout)
    else:
        return gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BLOCK_W, BLOCK_K], layout)


@gluon.jit
def load_weights(
    weights_desc,
    expert,
    row,
    k,
    bar,
    target,
    IN_FEATURES: gl.constexpr,
    WEIGHT_ROWS: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
):
    """Start the copy of a box of an expert's weight from `row` on, step k."""
    if IS_MAJOR_MN:
        memory = reinterpret(target, gl.bfloat16, weights_desc.block_shape, weights_desc.layout)
        load_box(weights_desc, [expert, k * BLOCK_K, row], bar, memory)
    else:
        place = place_of_weights(expert, row, k, IN_FEATURES, WEIGHT_ROWS, BLOCK_K, IS_BLOCK_MAJOR)
        load_box(weights_desc, [place[0], place[1]], bar, target)


@gluon.jit
def biases_of_work(bias_ptr, message, OUT_FEATURES: gl.constexpr, WEIGHT_ROWS: gl.constexpr, HAS_HALVES: gl.constexpr):
    """[256] fp32: the biases of a piece's weight rows. HAS_HALVES: 128 rows of each half of the weight."""
    lane = lanes_of_biases(BLOCK_W)
    if HAS_HALVES:
        column = column_block_of(message) * STORE_N + lane % STORE_N
        row = lane // STORE_N * OUT_FEATURES + column
        return load_biases(bias_ptr, message, row, column < OUT_FEATURES, WEIGHT_ROWS)
    else:
        row = column_block_of(message) * BLOCK_W + lane
        return load_biases(bias_ptr, message, row, row < WEIGHT_ROWS, WEIGHT_ROWS)


@gluon.jit
def has_second_half(message):
    """Whether rows from 64 on are to be computed."""
    return row_blocks_of(message) > 4


@gluon.jit
def no_products():
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_W, 16])
    return gl.zeros([HALF_ROWS, BLOCK_W], gl.float32, layout)


@gluon.jit
def first_sums(mail, count):
    """[64, 256] fp32: what the sums of message number `count` begin with, each weight row's bias, or zero."""
    if mail.biases.shape[1] == 1:
        return no_products()
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_W, 16])
        biases = biases_of(mail, count, 0, BLOCK_W, gl.SliceLayout(0, layout))
        return pin_sums(biases[None, :].broadcast_to([HALF_ROWS, BLOCK_W]))


@gluon.jit
def start_step(accumulators, stages, step, FENCES: gl.constexpr, ID: gl.constexpr):
    """Start a step's wgmma, once its stage is filled. FENCES: its rows did not come by TMA."""
    stage = wait_until_filled(stages.ring, step)
    if FENCES:
        fence_async_shared()
    rows, weights = stages.rows.index(stage * 2 + ID), stages.weights.index(stage)
    if stages.weights.shape[1] == BLOCK_W:
        return warpgroup_mma(rows, weights.permute((1, 0)), accumulators, is_async=True)
    else:
        return warpgroup_mma(rows, weights, accumulators, is_async=True)


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


@gluon.jit
def consume_columns(
    stages,
    mail,
    output,
    IN_FEATURES: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    FENCES: gl.constexpr,
    ID: gl.constexpr,
):
    """A consumer without a gate: a column of the result for each weight row. ACTIVATION: None in gemm2."""
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    left, right = round_halves(no_products(), IS_SHUFFLED, ACTIVATION)
    result_row = NOWHERE
    result_column = 0
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        takes_part = has_second_half(message) if ID == 1 else True
        if takes_part:
            accumulators = start_step(first_sums(mail, num_received - 1), stages, step, FENCES, ID)
            release_biases(mail, num_received - 1)
            step += 1
            write(left, output, result_row, result_column)
            accumulators = start_step(accumulators, stages, step, FENCES, ID)
            accumulators = warpgroup_mma_wait(1, deps=[accumulators])
            release(stages.ring, step - 1)
            step += 1
            write(right, output, result_row, result_column + STORE_N)
            accumulators, step = finish_steps(accumulators, stages, step, 2, NUM_STEPS, FENCES, ID)
            left, right = round_halves(accumulators, IS_SHUFFLED, ACTIVATION)
            left = pin(left)
            right = pin(right)
            result_row = row_of(message) + ID * HALF_ROWS
            result_column = column_block_of(message) * BLOCK_W
        else:
            release_biases(mail, num_received - 1)
            step = skip_steps(stages.ring, step, NUM_STEPS)
        message = receive(mail, num_received)
    write(left, output, result_row, result_column)
    write(right, output, result_row, result_column + STORE_N)
    tma.store_wait(0)


@gluon.jit
def round_halves(accumulators, IS_SHUFFLED: gl.constexpr, ACTIVATION: gl.constexpr):
    """[64, 256] fp32 -> two [64, 128] bf16, activated, columns in order. Every value stays in its thread."""
    result = accumulators if ACTIVATION is None else activate(accumulators, ACTIVATION)
    result = result.to(gl.bfloat16)
    if IS_SHUFFLED:
        # Row 8p + i of a block of 32 weight rows is column 4i + p.
        blocks = result.reshape([HALF_ROWS, BLOCK_W // 32, 4, 8]).permute((0, 1, 3, 2))
        result = blocks.reshape([HALF_ROWS, BLOCK_W])
    return result.reshape([HALF_ROWS, 2, STORE_N]).permute((0, 2, 1)).split()
