"""GEMM1 on Hopper, for some tens of rows an expert: 256 weight rows times gathered rows, activation in registers. Persistent.

A block, one an SM, multiplies 128 gate and 128 up rows of the weight by up to 160 rows of tokens (`swapped/tile_device.py`) in
steps of 64; or 256 rows of a weight without a gate, as in gemm2. Its warps:

    4  consume, ID 0    gate and up rows of columns 0..63:   two wgmma 64xRx16 for 16 of a step, activation, 64 columns
    4  consume, ID 1    gate and up rows of columns 64..127: the same, from the same rows
    4  produce          choose the work, send it on, copy rows (cp.async, gathered) and weights (TMA) four steps ahead

A stage is filled by 128 arrivals, one a producing thread once its copies of rows have landed, and one that counts the bytes of
the weights. Results are written as soon as they are there: the producer fills the stages meanwhile.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe.gemm.activation_device import Swiglu
from moe.gemm.hopper.gather_device import columns, copy_rows, lanes, rows_of_tokens
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
from moe.gemm.swapped.prefetch_device import prefetch_weights_by_128
from moe.gemm.swapped.tile_device import (
    BLOCK_K,
    BLOCK_W,
    CHUNK_ROWS,
    WEIGHT_BYTES,
    biases_of_work,
    consume,
    copy_weights,
    gate_of,
    has_extra_rows,
    make_output,
    make_stages,
)

HALF_ROWS = gl.constexpr(64)  # rows that are copied together


@gluon.jit(do_not_specialize=["max_units"])
def swapped_gemm1_kernel(
    hidden_states_ptr,  # [T, IN_FEATURES] bf16
    weights_ptr,  # bf16, of which the first are prefetched
    weights_desc,  # boxes of 64 gate and 64 up rows, 64 of the contraction: see weight_boxes
    out_desc,  # [P, OUT_FEATURES] bf16; box [16 or 32, 64]
    token_of_row_ptr,  # [P] int32
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    bias_ptr,  # [E_local, weight rows] bf16 or fp32, or None
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,  # some weights before the wait of a dependent launch
):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK_ROWS, BLOCK_K], gl.bfloat16)
    GATE: gl.constexpr = gate_of(IS_GATED, IS_GATE_FIRST, IS_INTERLEAVED and IS_MAJOR_MN)
    stages = make_stages(layout, HALF_ROWS, 129, IS_MAJOR_MN)
    output = make_output(out_desc)
    mail = make_mail(0 if bias_ptr is None else BLOCK_W)
    fence_async_shared()
    swiglu = Swiglu(alpha_ptr, beta_ptr, clamp_limit_ptr)
    inputs = Inputs(hidden_states_ptr, token_of_row_ptr, weights_ptr, weights_desc, bias_ptr)
    works = WorkList(units_ptr, max_units, counts_ptr)
    gl.warp_specialize(
        [
            (consume, (stages, mail, output, swiglu, IN_FEATURES, ACTIVATION, GATE, 0)),
            (consume, (stages, mail, output, swiglu, IN_FEATURES, ACTIVATION, GATE, 1)),
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
                    IS_INTERLEAVED,
                    IS_GATED,
                    IS_DYNAMIC,
                    USES_PDL,
                    PREFETCHES,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )


class Inputs(NamedTuple):
    hidden_states_ptr: Any
    token_of_row_ptr: Any
    weights_ptr: Any
    weights_desc: Any
    bias_ptr: Any


class UnitRows(NamedTuple):
    hidden_states_ptr: Any
    token_ptr: Any  # of the unit's rows
    num_rows: Any
    column: Any  # see `TokenRows`


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
    IS_INTERLEAVED: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,
):
    BLOCK_N: gl.constexpr = BLOCK_W // 2 if IS_GATED else BLOCK_W  # columns of the result
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    HAS_BIAS: gl.constexpr = inputs.bias_ptr is not None
    column = columns()

    if PREFETCHES:
        prefetch_weights_by_128(inputs.weights_ptr, gl.program_id(0))
    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(works.counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(works, work, num_work, COLUMN_BLOCKS, True)
    if HAS_BIAS:
        biases = biases_of_work(
            inputs.bias_ptr, message, OUT_FEATURES, IS_GATED, IS_SHUFFLED, IS_INTERLEAVED, IS_MAJOR_MN
        )
    step = 0
    num_sent = 0
    while message >= 0:
        if HAS_BIAS:
            send(mail, message, num_sent, biases)
        else:
            send(mail, message, num_sent)
        num_sent += 1
        row_blocks = row_blocks_of(message)
        has_extra = has_extra_rows(row_blocks)
        has_second = row_blocks > 6
        first_column = column_block_of(message) * BLOCK_N
        expert = expert_of(message)
        unit_token_ptr = inputs.token_of_row_ptr + row_of(message)
        first_extra = gl.where(has_second, 2 * HALF_ROWS, HALF_ROWS)
        rows = UnitRows(inputs.hidden_states_ptr, unit_token_ptr, row_blocks * 16, column)
        first_rows = rows_from(0, rows, IN_FEATURES, HALF_ROWS)
        second_rows = rows_from(HALF_ROWS, rows, IN_FEATURES, HALF_ROWS)
        extra_rows = rows_from(first_extra, rows, IN_FEATURES, CHUNK_ROWS)
        next_message = message
        for k in range(NUM_STEPS):
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, WEIGHT_BYTES)
            copy_weights(
                inputs.weights_desc,
                expert,
                first_column,
                k,
                stages,
                stage,
                IN_FEATURES,
                OUT_FEATURES,
                IS_GATED,
                IS_BLOCK_MAJOR,
                IS_SHUFFLED,
                IS_INTERLEAVED,
                IS_MAJOR_MN,
            )
            copy_rows(first_rows, k, stages.rows.index(stage * 2), IN_FEATURES)
            if has_second:
                copy_rows(second_rows, k, stages.rows.index(stage * 2 + 1), IN_FEATURES)
            if has_extra:
                copy_rows(extra_rows, k, stages.extra_rows.index(stage), IN_FEATURES)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(works, work, num_work, IS_DYNAMIC)
                next_message = message_of_work(works, work, num_work, COLUMN_BLOCKS, True)
                if HAS_BIAS:
                    biases = biases_of_work(
                        inputs.bias_ptr, next_message, OUT_FEATURES, IS_GATED, IS_SHUFFLED, IS_INTERLEAVED, IS_MAJOR_MN
                    )
        message = next_message
    send(mail, END, num_sent)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def rows_from(first, unit_rows, IN_FEATURES: gl.constexpr, ROWS: gl.constexpr):
    """Rows first .. first + ROWS of the unit."""
    row = first + lanes(ROWS)
    token = gl.load(unit_rows.token_ptr + row, mask=row < unit_rows.num_rows, other=-1)
    return rows_of_tokens(unit_rows.hidden_states_ptr, token, unit_rows.column, IN_FEATURES)
