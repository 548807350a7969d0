"""GEMM2 on Hopper, for some tens of rows an expert: 256 weight rows times rows that lie together. Persistent, one block an SM.

A block multiplies 256 weight rows by up to 160 rows of tokens (`swapped/tile_device.py`) in steps of 64. Its warps:

    4  consume, ID 0    weight rows 0..127:   two wgmma 64xRx16 for 16 of a step, then 128 columns of the result
    4  consume, ID 1    weight rows 128..255: the same, from the same rows
    1  produce          chooses the work, sends it on, copies rows and weights (TMA) four steps ahead

A stage is filled by bytes alone. Results are written as soon as they are there: the producer fills the stages meanwhile.
"""
# mypy: allow-untyped-defs

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe.gemm.hopper.work_device import (
    END,
    column_block_of,
    expert_of,
    make_barriers,
    make_mail,
    message_of_work,
    next_work,
    receive,
    row_blocks_of,
    row_of,
    send,
)
from moe.gemm.swapped.tile_device import (
    BLOCK_K,
    BOX_ROWS,
    CHUNK_BYTES,
    CHUNK_ROWS,
    MAX_ROWS,
    NUM_STAGES,
    STORE_BUFFERS,
    STORE_N,
    WEIGHT_BYTES,
    copy_weights,
    has_extra_rows,
    multiply,
    multiply_with_extra,
    split_rows,
    split_weight_rows,
    write,
)

BLOCK_N = gl.constexpr(256)  # columns of the result


@gluon.jit(do_not_specialize=["max_units"])
def swapped_gemm2_kernel(
    rows_desc,  # [P, IN_FEATURES] bf16; box [32, 64]
    weights_desc,  # boxes of 128 weight rows, 64 of the contraction: see weight_boxes
    out_desc,  # [P, OUT_FEATURES] bf16; box [16 or 32, 64]
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,  # the first weights before the wait of a dependent launch: the units were ready before gemm1
):
    STORE_ROWS: gl.constexpr = out_desc.block_shape[0]
    row_chunks = gl.allocate_shared_memory(
        gl.bfloat16, [NUM_STAGES * (MAX_ROWS // CHUNK_ROWS), CHUNK_ROWS, BLOCK_K], rows_desc.layout
    )
    extra_rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, CHUNK_ROWS, BLOCK_K], rows_desc.layout)
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, BOX_ROWS, BLOCK_K], rows_desc.layout)
    out = gl.allocate_shared_memory(
        gl.bfloat16, [2 * STORE_BUFFERS * (CHUNK_ROWS // STORE_ROWS), STORE_ROWS, STORE_N], out_desc.layout
    )
    filled, emptied = make_barriers(NUM_STAGES, 1)
    mail = make_mail()
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_desc,
                    out,
                    row_chunks,
                    extra_rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    IN_FEATURES,
                    0,
                ),
            ),
            (
                consume,
                (
                    out_desc,
                    out,
                    row_chunks,
                    extra_rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    IN_FEATURES,
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
                    row_chunks,
                    extra_rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    IN_FEATURES,
                    OUT_FEATURES,
                    IS_BLOCK_MAJOR,
                    IS_SHUFFLED,
                    IS_DYNAMIC,
                    USES_PDL,
                    PREFETCHES,
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
    row_chunks,
    extra_rows,
    weights,
    filled,
    emptied,
    mail,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,  # the first weights before the wait of a dependent launch: the units were ready before gemm1
):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    CHUNKS: gl.constexpr = MAX_ROWS // CHUNK_ROWS
    AHEAD: gl.constexpr = min(NUM_STAGES, NUM_STEPS) if PREFETCHES else 0

    if USES_PDL and not PREFETCHES:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, True)
    if PREFETCHES:
        if message >= 0:
            for k in gl.static_range(AHEAD):
                copy_step_of_weights(
                    message, k, k, weights_desc, weights, filled, IN_FEATURES, OUT_FEATURES, IS_BLOCK_MAJOR, IS_SHUFFLED
                )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    step = 0
    num_sent = 0
    while message >= 0:
        send(message, mail, num_sent)
        num_sent += 1
        row = row_of(message)
        row_blocks = row_blocks_of(message)
        num_chunks = (row_blocks + 1) // 2
        has_extra = has_extra_rows(row_blocks)
        extra_row = row + (num_chunks - 1) * CHUNK_ROWS
        next_message = message
        for k in range(NUM_STEPS):
            stage = step % NUM_STAGES
            mbarrier.wait(emptied.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
            bar = filled.index(stage)
            if step >= AHEAD:
                copy_step_of_weights(
                    message,
                    k,
                    stage,
                    weights_desc,
                    weights,
                    filled,
                    IN_FEATURES,
                    OUT_FEATURES,
                    IS_BLOCK_MAJOR,
                    IS_SHUFFLED,
                )
            for chunk in gl.static_range(CHUNKS):
                is_chunk = num_chunks - has_extra.to(gl.int32) > chunk
                tma.async_copy_global_to_shared(
                    rows_desc,
                    [row + chunk * CHUNK_ROWS, k * BLOCK_K],
                    bar,
                    row_chunks.index(stage * CHUNKS + chunk),
                    pred=is_chunk,
                )
            tma.async_copy_global_to_shared(
                rows_desc, [extra_row, k * BLOCK_K], bar, extra_rows.index(stage), pred=has_extra
            )
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(work, counts_ptr, num_work, IS_DYNAMIC)
                next_message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, True)
        message = next_message
    send(END, mail, num_sent)


@gluon.jit
def copy_step_of_weights(
    message,
    k,
    stage,
    weights_desc,
    weights,
    filled,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
):
    """Start the copy of step k of the weights, and tell the stage's barrier of all its bytes: rows too."""
    bar = filled.index(stage)
    num_chunks = (row_blocks_of(message) + 1) // 2
    for chunks in gl.static_range(1, MAX_ROWS // CHUNK_ROWS + 2):
        mbarrier.expect(bar, WEIGHT_BYTES + chunks * CHUNK_BYTES, pred=num_chunks == chunks)
    copy_weights(
        weights_desc,
        expert_of(message),
        column_block_of(message) * BLOCK_N,
        k,
        bar,
        weights,
        stage,
        IN_FEATURES,
        OUT_FEATURES,
        False,
        IS_BLOCK_MAJOR,
        IS_SHUFFLED,
    )


@gluon.jit
def consume(
    out_desc,
    out,
    row_chunks,
    extra_rows,
    weights,
    filled,
    emptied,
    mail,
    IN_FEATURES: gl.constexpr,
    ID: gl.constexpr,
):
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        row = row_of(message)
        row_blocks = row_blocks_of(message)
        column = column_block_of(message) * BLOCK_N + ID * BOX_ROWS
        if row_blocks <= 2:
            all_rows = multiply(weights, row_chunks, filled, emptied, step, NUM_STEPS, 32, ID)
            write_chunk(all_rows, out_desc, out, row, row_blocks, column, 0, ID)
        elif row_blocks <= 4:
            all_rows = multiply(weights, row_chunks, filled, emptied, step, NUM_STEPS, 64, ID)
            write_64(all_rows, out_desc, out, row, row_blocks, column, 0, ID)
        elif row_blocks <= 6:
            first, extra = multiply_with_extra(
                weights, row_chunks, extra_rows, filled, emptied, step, NUM_STEPS, 64, ID
            )
            write_64(first, out_desc, out, row, row_blocks, column, 0, ID)
            write_chunk(extra, out_desc, out, row, row_blocks, column, 2, ID)
        elif row_blocks <= 8:
            all_rows = multiply(weights, row_chunks, filled, emptied, step, NUM_STEPS, 128, ID)
            write_128(all_rows, out_desc, out, row, row_blocks, column, ID)
        else:
            first, extra = multiply_with_extra(
                weights, row_chunks, extra_rows, filled, emptied, step, NUM_STEPS, 128, ID
            )
            write_128(first, out_desc, out, row, row_blocks, column, ID)
            write_chunk(extra, out_desc, out, row, row_blocks, column, 4, ID)
        step += NUM_STEPS
        message = receive(mail, num_received)
    tma.store_wait(0)


@gluon.jit
def write_128(accumulators, out_desc, out, row, row_blocks, column, ID: gl.constexpr):
    """Write [128, 128]."""
    first, last = split_rows(accumulators, MAX_ROWS)
    write_64(first, out_desc, out, row, row_blocks, column, 0, ID)
    write_64(last, out_desc, out, row, row_blocks, column, 2, ID)


@gluon.jit
def write_64(accumulators, out_desc, out, row, row_blocks, column, CHUNK: gl.constexpr, ID: gl.constexpr):
    """Write [128, 64] to chunks CHUNK and CHUNK + 1."""
    first, last = split_rows(accumulators, 2 * CHUNK_ROWS)
    write_chunk(first, out_desc, out, row, row_blocks, column, CHUNK, ID)
    write_chunk(last, out_desc, out, row, row_blocks, column, CHUNK + 1, ID)


@gluon.jit
def write_chunk(accumulators, out_desc, out, row, row_blocks, column, CHUNK: gl.constexpr, ID: gl.constexpr):
    """Write [128, 32] to chunk CHUNK, 64 columns through either buffer."""
    left, right = split_weight_rows(accumulators.to(gl.bfloat16))
    write(left, out_desc, out, ID * STORE_BUFFERS, row, row_blocks, column, CHUNK, 1)
    write(right, out_desc, out, ID * STORE_BUFFERS + 1, row, row_blocks, column + STORE_N, CHUNK, 1)
