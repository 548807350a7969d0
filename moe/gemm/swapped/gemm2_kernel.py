"""GEMM2 on Hopper, for some tens of rows an expert: 256 weight rows times rows that lie together. Persistent, one block an SM.

A block multiplies 256 weight rows by up to 160 rows of tokens (`swapped/tile_device.py`) in steps of 64. Its warps:

    4  consume, ID 0    weight rows 0..127:   two wgmma 64xRx16 for 16 of a step, then 128 columns of the result
    4  consume, ID 1    weight rows 128..255: the same, from the same rows
    1  produce          chooses the work, sends it on, copies rows and weights (TMA) four steps ahead

A stage is filled by bytes alone. Results are written as soon as they are there: the producer fills the stages meanwhile.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe.gemm.activation_device import Swiglu
from moe.gemm.hopper.ring_device import wait_until_emptied
from moe.gemm.hopper.work_device import (
    END,
    WorkList,
    column_block_of,
    expert_of,
    make_mail,
    message_of_work,
    next_work,
    row_blocks_of,
    row_of,
    send,
)
from moe.gemm.swapped.tile_device import (
    BLOCK_K,
    BLOCK_W,
    CHUNK_BYTES,
    CHUNK_ROWS,
    MAX_ROWS,
    NUM_STAGES,
    WEIGHT_BYTES,
    biases_of_work,
    consume,
    copy_weights,
    has_extra_rows,
    make_output,
    make_stages,
)
from moe.runtime.gluon_names_device import load_box

BLOCK_N = gl.constexpr(256)  # columns of the result


@gluon.jit(do_not_specialize=["max_units"])
def swapped_gemm2_kernel(
    rows_desc,  # [P, IN_FEATURES] bf16; box [32, 64]
    weights_desc,  # boxes of 128 weight rows, 64 of the contraction: see weight_boxes
    out_desc,  # [P, OUT_FEATURES] bf16; box [16 or 32, 64]
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    bias_ptr,  # [E_local, OUT_FEATURES] bf16 or fp32, or None
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,  # the first weights before the wait of a dependent launch: the units were ready before gemm1
):
    layout: gl.constexpr = rows_desc.layout  # Triton 3.6 passes no attribute on as a constexpr
    stages = make_stages(layout, CHUNK_ROWS, 1, IS_MAJOR_MN)
    output = make_output(out_desc)
    mail = make_mail(0 if bias_ptr is None else BLOCK_W)
    fence_async_shared()
    swiglu = Swiglu(None, None, None)
    inputs = Inputs(rows_desc, weights_desc, bias_ptr)
    works = WorkList(units_ptr, max_units, counts_ptr)
    gl.warp_specialize(
        [
            (consume, (stages, mail, output, swiglu, IN_FEATURES, None, None, 0)),
            (consume, (stages, mail, output, swiglu, IN_FEATURES, None, None, 1)),
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


class Inputs(NamedTuple):
    rows_desc: Any
    weights_desc: Any
    bias_ptr: Any


class Rows(NamedTuple):
    """A unit's rows, in chunks of 32."""

    first: Any
    extra: Any  # first row of the extra ones
    num_chunks: Any  # with the extra ones
    has_extra: Any


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
    IS_SHUFFLED: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,
):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    AHEAD: gl.constexpr = min(NUM_STAGES, NUM_STEPS) if PREFETCHES else 0
    HAS_BIAS: gl.constexpr = inputs.bias_ptr is not None

    if USES_PDL and not PREFETCHES:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(works.counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(works, work, num_work, COLUMN_BLOCKS, True)
    if PREFETCHES:
        if message >= 0:
            for k in gl.static_range(AHEAD):
                start_stage(
                    inputs, message, k, stages, k, IN_FEATURES, OUT_FEATURES, IS_BLOCK_MAJOR, IS_MAJOR_MN, IS_SHUFFLED
                )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_BIAS:
        biases = biases_of_work(inputs.bias_ptr, message, OUT_FEATURES, False, IS_SHUFFLED, False, IS_MAJOR_MN)
    step = 0
    num_sent = 0
    while message >= 0:
        if HAS_BIAS:
            send(mail, message, num_sent, biases)
        else:
            send(mail, message, num_sent)
        num_sent += 1
        rows = rows_of_unit(message)
        next_message = message
        for k in range(NUM_STEPS):
            stage = wait_until_emptied(stages.ring, step)
            if step >= AHEAD:
                start_stage(
                    inputs,
                    message,
                    k,
                    stages,
                    stage,
                    IN_FEATURES,
                    OUT_FEATURES,
                    IS_BLOCK_MAJOR,
                    IS_MAJOR_MN,
                    IS_SHUFFLED,
                )
            copy_rows(inputs.rows_desc, rows, k, stages, stage)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(works, work, num_work, IS_DYNAMIC)
                next_message = message_of_work(works, work, num_work, COLUMN_BLOCKS, True)
                if HAS_BIAS:
                    biases = biases_of_work(
                        inputs.bias_ptr, next_message, OUT_FEATURES, False, IS_SHUFFLED, False, IS_MAJOR_MN
                    )
        message = next_message
    send(mail, END, num_sent)


@gluon.jit
def start_stage(
    inputs,
    message,
    k,
    stages,
    stage,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
):
    """Tell the stage's barrier of all bytes of step k, rows too, and start the copy of the weights."""
    bar = stages.ring.filled.index(stage)
    num_chunks = (row_blocks_of(message) + 1) // 2
    for chunks in gl.static_range(1, MAX_ROWS // CHUNK_ROWS + 2):
        mbarrier.expect(bar, WEIGHT_BYTES + chunks * CHUNK_BYTES, pred=num_chunks == chunks)
    copy_weights(
        inputs.weights_desc,
        expert_of(message),
        column_block_of(message) * BLOCK_N,
        k,
        stages,
        stage,
        IN_FEATURES,
        OUT_FEATURES,
        False,
        IS_BLOCK_MAJOR,
        IS_SHUFFLED,
        False,
        IS_MAJOR_MN,
    )


@gluon.jit
def rows_of_unit(message):
    row = row_of(message)
    row_blocks = row_blocks_of(message)
    num_chunks = (row_blocks + 1) // 2
    return Rows(row, row + (num_chunks - 1) * CHUNK_ROWS, num_chunks, has_extra_rows(row_blocks))


@gluon.jit
def copy_rows(rows_desc, rows, k, stages, stage):
    """Start the copy of step k of a unit's rows."""
    CHUNKS: gl.constexpr = MAX_ROWS // CHUNK_ROWS
    bar = stages.ring.filled.index(stage)
    for chunk in gl.static_range(CHUNKS):
        is_chunk = rows.num_chunks - rows.has_extra.to(gl.int32) > chunk
        target = stages.rows.index(stage * CHUNKS + chunk)
        load_box(rows_desc, [rows.first + chunk * CHUNK_ROWS, k * BLOCK_K], bar, target, pred=is_chunk)
    load_box(rows_desc, [rows.extra, k * BLOCK_K], bar, stages.extra_rows.index(stage), pred=rows.has_extra)
