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

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe.gemm.hopper.work_device import (
    END,
    column_block_of,
    expert_of,
    has_second_half,
    make_barriers,
    make_mail,
    message_of_work,
    next_work,
    receive,
    row_of,
    send,
)

HALF_ROWS = gl.constexpr(64)  # rows of a consumer
BLOCK_N = gl.constexpr(256)  # weight rows, columns of the result
STORE_N = gl.constexpr(128)  # columns that are written at a time
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(4)
NOWHERE = gl.constexpr(1 << 30)  # a row past any tensor's end: a TMA store there writes nothing


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
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BLOCK_N, BLOCK_K], weights_desc.layout)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_ROWS, STORE_N], out_desc.layout)
    filled, emptied = make_barriers(NUM_STAGES, 1)
    mail = make_mail()
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_desc,
                    out.index(0),
                    rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    IN_FEATURES,
                    IS_SHUFFLED,
                    0,
                ),
            ),
            (
                consume,
                (
                    out_desc,
                    out.index(1),
                    rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    IN_FEATURES,
                    IS_SHUFFLED,
                    1,
                ),
            ),
            (
                produce,
                (
                    rows_desc,
                    weights_desc,
                    units_ptr,
                    counts_ptr,
                    max_units,
                    rows,
                    weights,
                    filled,
                    emptied,
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


@gluon.jit
def produce(
    rows_desc,
    weights_desc,
    units_ptr,
    counts_ptr,
    max_units,
    rows,
    weights,
    filled,
    emptied,
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
    WEIGHT_BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    ROW_BYTES: gl.constexpr = HALF_ROWS * BLOCK_K * 2

    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
    step = 0
    num_sent = 0
    while message >= 0:
        send(message, mail, num_sent)
        num_sent += 1
        row = row_of(message)
        is_full = has_second_half(message)
        first_weight_row = column_block_of(message) * BLOCK_N
        expert = expert_of(message)
        next_message = message
        for k in range(NUM_STEPS):
            stage = step % NUM_STAGES
            mbarrier.wait(emptied.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
            bar = filled.index(stage)
            mbarrier.expect(bar, WEIGHT_BYTES + 2 * ROW_BYTES, pred=is_full)
            mbarrier.expect(bar, WEIGHT_BYTES + ROW_BYTES, pred=is_full == 0)
            if IS_BLOCK_MAJOR:
                weight_row = (expert * NUM_STEPS + k) * OUT_FEATURES + first_weight_row
                weight_column = 0
            else:
                weight_row = expert * OUT_FEATURES + first_weight_row
                weight_column = k * BLOCK_K
            tma.async_copy_global_to_shared(weights_desc, [weight_row, weight_column], bar, weights.index(stage))
            tma.async_copy_global_to_shared(rows_desc, [row, k * BLOCK_K], bar, rows.index(stage * 2))
            tma.async_copy_global_to_shared(
                rows_desc, [row + HALF_ROWS, k * BLOCK_K], bar, rows.index(stage * 2 + 1), pred=is_full
            )
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(work, counts_ptr, num_work, IS_DYNAMIC)
                next_message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
        message = next_message
    send(END, mail, num_sent)


@gluon.jit
def consume(
    out_desc,
    out_tile,
    rows,
    weights,
    filled,
    emptied,
    mail,
    IN_FEATURES: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    ID: gl.constexpr,
):
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    left, right = round_halves(gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, layout), IS_SHUFFLED)
    result_row = NOWHERE
    result_column = 0
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        takes_part = has_second_half(message) if ID == 1 else True
        if takes_part:
            accumulators = gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, layout)
            stage = step % NUM_STAGES
            mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
            accumulators = warpgroup_mma(
                rows.index(stage * 2 + ID), weights.index(stage).permute((1, 0)), accumulators, is_async=True
            )
            step += 1
            write(left, out_desc, out_tile, result_row, result_column)
            stage = step % NUM_STAGES
            mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
            accumulators = warpgroup_mma(
                rows.index(stage * 2 + ID), weights.index(stage).permute((1, 0)), accumulators, is_async=True
            )
            accumulators = warpgroup_mma_wait(1, deps=[accumulators])
            mbarrier.arrive(emptied.index((step - 1) % NUM_STAGES), count=1)
            step += 1
            write(right, out_desc, out_tile, result_row, result_column + STORE_N)
            for _ in range(2, NUM_STEPS):
                stage = step % NUM_STAGES
                mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
                accumulators = warpgroup_mma(
                    rows.index(stage * 2 + ID), weights.index(stage).permute((1, 0)), accumulators, is_async=True
                )
                accumulators = warpgroup_mma_wait(1, deps=[accumulators])
                mbarrier.arrive(emptied.index((step - 1) % NUM_STAGES), count=1)
                step += 1
            accumulators = warpgroup_mma_wait(0, deps=[accumulators])
            mbarrier.arrive(emptied.index((step - 1) % NUM_STAGES), count=1)
            left, right = round_halves(accumulators, IS_SHUFFLED)
            left = pin(left)
            right = pin(right)
            result_row = row_of(message) + ID * HALF_ROWS
            result_column = column_block_of(message) * BLOCK_N
        else:
            for _ in range(NUM_STEPS):
                stage = step % NUM_STAGES
                mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
                mbarrier.arrive(emptied.index(stage), count=1)
                step += 1
        message = receive(mail, num_received)
    write(left, out_desc, out_tile, result_row, result_column)
    write(right, out_desc, out_tile, result_row, result_column + STORE_N)
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


@gluon.jit
def pin(result):
    """The same values, computed here: else they may be computed after the next wgmma, which must then wait (C7514)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [result], dtype=gl.bfloat16, is_pure=False, pack=2)


@gluon.jit
def write(result, out_desc, out_tile, row, column):
    """Start the copy of a result to [row, column], through shared memory that the copy before has left."""
    tma.store_wait(0)
    out_tile.store(result)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_tile)
