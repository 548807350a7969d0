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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe.gemm.hopper.epilogue_device import Output
from moe.gemm.hopper.ring_device import make_ring, wait_until_emptied
from moe.gemm.hopper.work_device import (
    END,
    WorkList,
    column_block_of,
    expert_of,
    make_mail,
    message_of_work,
    next_work,
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
    biases_of_work,
    consume_columns,
    has_second_half,
    load_weights,
    make_weights,
)
from moe.runtime.gluon_names_device import load_box


@gluon.jit(do_not_specialize=["max_units"])
def wide_gemm2_kernel(
    rows_desc,  # [P, IN_FEATURES] bf16; box [64, 64]
    weights_desc,  # [rows of all experts, IN_FEATURES], or [.., 64] where BlockMajorK; box [256, 64]
    out_desc,  # [P, OUT_FEATURES] bf16; box [64, 128]
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    bias_ptr,  # [E_local, OUT_FEATURES] bf16 or fp32, or None
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    layout: gl.constexpr = rows_desc.layout  # Triton 3.6 passes no attribute on as a constexpr
    rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, HALF_ROWS, BLOCK_K], layout)
    weights = make_weights(layout, IS_MAJOR_MN)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_ROWS, STORE_N], out_desc.layout)
    stages = Stages(rows, weights, make_ring(NUM_STAGES, 1))
    mail = make_mail(0 if bias_ptr is None else BLOCK_W)
    fence_async_shared()
    first_out, second_out = Output(out_desc, out.index(0)), Output(out_desc, out.index(1))
    inputs = Inputs(rows_desc, weights_desc, bias_ptr)
    works = WorkList(units_ptr, max_units, counts_ptr)
    gl.warp_specialize(
        [
            (consume_columns, (stages, mail, first_out, IN_FEATURES, IS_SHUFFLED, None, False, 0)),
            (consume_columns, (stages, mail, second_out, IN_FEATURES, IS_SHUFFLED, None, False, 1)),
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
                    IS_MAJOR_MN,
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
    bias_ptr: Any


@gluon.jit
def produce(
    inputs,
    works,
    stages,
    mail,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_W - 1) // BLOCK_W
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    WEIGHT_BYTES: gl.constexpr = BLOCK_W * BLOCK_K * 2
    HAS_BIAS: gl.constexpr = inputs.bias_ptr is not None
    ROW_BYTES: gl.constexpr = HALF_ROWS * BLOCK_K * 2

    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(works.counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(works, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
    if HAS_BIAS:
        biases = biases_of_work(inputs.bias_ptr, message, OUT_FEATURES, OUT_FEATURES, False)
    step = 0
    num_sent = 0
    while message >= 0:
        if HAS_BIAS:
            send(mail, message, num_sent, biases)
        else:
            send(mail, message, num_sent)
        num_sent += 1
        row = row_of(message)
        is_full = has_second_half(message)
        first_weight_row = column_block_of(message) * BLOCK_W
        expert = expert_of(message)
        next_message = message
        for k in range(NUM_STEPS):
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, WEIGHT_BYTES + 2 * ROW_BYTES, pred=is_full)
            mbarrier.expect(bar, WEIGHT_BYTES + ROW_BYTES, pred=is_full == 0)
            load_weights(
                inputs.weights_desc,
                expert,
                first_weight_row,
                k,
                bar,
                stages.weights.index(stage),
                IN_FEATURES,
                OUT_FEATURES,
                IS_BLOCK_MAJOR,
                IS_MAJOR_MN,
            )
            load_box(inputs.rows_desc, [row, k * BLOCK_K], bar, stages.rows.index(stage * 2))
            second_half = stages.rows.index(stage * 2 + 1)
            load_box(inputs.rows_desc, [row + HALF_ROWS, k * BLOCK_K], bar, second_half, pred=is_full)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(works, work, num_work, IS_DYNAMIC)
                next_message = message_of_work(works, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
                if HAS_BIAS:
                    biases = biases_of_work(inputs.bias_ptr, next_message, OUT_FEATURES, OUT_FEATURES, False)
        message = next_message
    send(mail, END, num_sent)
