"""GEMM2 on Hopper: rows that lie together times 256 weight rows. Persistent, one block an SM.

A block multiplies 128 rows by 256 weight rows in steps of 64. Its warps:

    4  consume, ID 0    rows 0..63:   wgmma 64x256x64 a step, 256 columns of the result
    4  consume, ID 1    rows 64..127: the same, from the same weights; rests where the unit has no such rows
    1  produce          chooses the work, sends it on, copies rows and weights (TMA) four steps ahead

A step has a stage of shared memory and two barriers. filled: counts the bytes of rows and weights. emptied: one arrival of
each consumer, after the wgmma that read the stage. The result of a unit stays in registers and is written, 128 columns at
a time, while the first two wgmmas of the next one run.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from moe.gemm.hopper.epilogue_device import NOWHERE, Output, pin
from moe.gemm.hopper.ring_device import make_ring, release, wait_until_emptied
from moe.gemm.hopper.work_device import (
    END,
    WorkList,
    column_block_of,
    expert_of,
    make_mail,
    message_of_work,
    next_work,
    place_of_weights,
    receive,
    row_of,
    send,
)
from moe.gemm.wide.tile_device import (
    BLOCK_K,
    BLOCK_W,
    HALF_ROWS,
    NUM_STAGES,
    STORE_N,
    Stages,
    finish_steps,
    has_second_half,
    no_products,
    skip_steps,
    start_step,
    write,
)
from moe.runtime.gluon_names_device import load_box

BLOCK_N = gl.constexpr(256)  # columns of the result


@gluon.jit(do_not_specialize=["max_units"])
def wide_gemm2_kernel(
    rows_desc,  # [P, IN_FEATURES] bf16; box [64, 64]
    weights_desc,  # [rows of all experts, IN_FEATURES], or [.., 64] where BlockMajorK; box [256, 64]
    out_desc,  # [P, OUT_FEATURES] bf16; box [64, 128]
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, HALF_ROWS, BLOCK_K], rows_desc.layout)
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BLOCK_W, BLOCK_K], weights_desc.layout)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_ROWS, STORE_N], out_desc.layout)
    stages = Stages(rows, weights, make_ring(NUM_STAGES, 1))
    mail = make_mail()
    fence_async_shared()
    first_out, second_out = Output(out_desc, out.index(0)), Output(out_desc, out.index(1))
    inputs = Inputs(rows_desc, weights_desc)
    works = WorkList(units_ptr, max_units, counts_ptr)
    gl.warp_specialize(
        [
            (consume, (stages, mail, first_out, IN_FEATURES, IS_SHUFFLED, 0)),
            (consume, (stages, mail, second_out, IN_FEATURES, IS_SHUFFLED, 1)),
            (
                produce,
                (
                    inputs,
                    works,
                    stages,
                    mail,
                    IN_FEATURES,
                    OUT_FEATURES,
                    IS_BLOCK_MAJOR,
                    SKIPS_TAILS,
                    IS_DYNAMIC,
                    USES_PDL,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


class Inputs(NamedTuple):
    rows_desc: Any
    weights_desc: Any


@gluon.jit
def produce(
    inputs,
    works,
    stages,
    mail,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    WEIGHT_BYTES: gl.constexpr = BLOCK_W * BLOCK_K * 2
    ROW_BYTES: gl.constexpr = HALF_ROWS * BLOCK_K * 2

    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(works.counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(works, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
    step = 0
    num_sent = 0
    while message >= 0:
        send(mail, message, num_sent)
        num_sent += 1
        row = row_of(message)
        is_full = has_second_half(message)
        first_weight_row = column_block_of(message) * BLOCK_N
        expert = expert_of(message)
        next_message = message
        for k in range(NUM_STEPS):
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, WEIGHT_BYTES + 2 * ROW_BYTES, pred=is_full)
            mbarrier.expect(bar, WEIGHT_BYTES + ROW_BYTES, pred=is_full == 0)
            weight_row, weight_column = place_of_weights(
                expert, first_weight_row, k, IN_FEATURES, OUT_FEATURES, BLOCK_K, IS_BLOCK_MAJOR
            )
            load_box(inputs.weights_desc, [weight_row, weight_column], bar, stages.weights.index(stage))
            load_box(inputs.rows_desc, [row, k * BLOCK_K], bar, stages.rows.index(stage * 2))
            second_half = stages.rows.index(stage * 2 + 1)
            load_box(inputs.rows_desc, [row + HALF_ROWS, k * BLOCK_K], bar, second_half, pred=is_full)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(works, work, num_work, IS_DYNAMIC)
                next_message = message_of_work(works, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
        message = next_message
    send(mail, END, num_sent)


@gluon.jit
def consume(stages, mail, output, IN_FEATURES: gl.constexpr, IS_SHUFFLED: gl.constexpr, ID: gl.constexpr):
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    left, right = round_halves(no_products(), IS_SHUFFLED)
    result_row = NOWHERE
    result_column = 0
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        takes_part = has_second_half(message) if ID == 1 else True
        if takes_part:
            accumulators = start_step(no_products(), stages, step, False, ID)
            step += 1
            write(left, output, result_row, result_column)
            accumulators = start_step(accumulators, stages, step, False, ID)
            accumulators = warpgroup_mma_wait(1, deps=[accumulators])
            release(stages.ring, step - 1)
            step += 1
            write(right, output, result_row, result_column + STORE_N)
            accumulators, step = finish_steps(accumulators, stages, step, 2, NUM_STEPS, False, ID)
            left, right = round_halves(accumulators, IS_SHUFFLED)
            left = pin(left)
            right = pin(right)
            result_row = row_of(message) + ID * HALF_ROWS
            result_column = column_block_of(message) * BLOCK_N
        else:
            step = skip_steps(stages.ring, step, NUM_STEPS)
        message = receive(mail, num_received)
    write(left, output, result_row, result_column)
    write(right, output, result_row, result_column + STORE_N)
    tma.store_wait(0)


@gluon.jit
def round_halves(accumulators, IS_SHUFFLED: gl.constexpr):
    """[64, 256] fp32 -> two [64, 128] bf16, columns in order. Every value stays in its thread."""
    result = accumulators.to(gl.bfloat16)
    if IS_SHUFFLED:
        # Row 8p + i of a block of 32 weight rows is column 4i + p.
        blocks = result.reshape([HALF_ROWS, BLOCK_N // 32, 4, 8]).permute((0, 1, 3, 2))
        result = blocks.reshape([HALF_ROWS, BLOCK_N])
    return result.reshape([HALF_ROWS, 2, STORE_N]).permute((0, 2, 1)).split()
