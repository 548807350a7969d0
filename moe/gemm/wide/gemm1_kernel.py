"""GEMM1 on Hopper: gathered rows times two bands of weight rows, activation in registers. Persistent, one block an SM.

A block multiplies 128 rows by 256 weight rows (128 gate and 128 up rows that belong together, or 256 without a gate) in steps of 64.
Its warps:

    4  consume, ID 0    rows 0..63:   wgmma 64x256x64 a step, then the activation, then 128 columns of the result
    4  consume, ID 1    rows 64..127: the same, from the same weights; rests where the unit has no such rows
    4  produce          choose the work, send it on, copy rows (cp.async, gathered) and weights (TMA) four steps ahead

A step has a stage of shared memory and two barriers. filled: 128 arrivals, one a producing thread once its copies of rows
have landed, and one that counts the bytes of the weights. emptied: one arrival of each consumer, after the wgmma that
read the stage. The result of a unit stays in registers and is written while the first wgmma of the next one runs.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from moe.gemm.activation_device import Swiglu, swiglu_of_expert
from moe.gemm.hopper.bias_device import release_biases
from moe.gemm.hopper.epilogue_device import NOWHERE, Output, activate_halves, pin
from moe.gemm.hopper.gather_device import columns, copy_rows, lanes, rows_of_tokens
from moe.gemm.hopper.ring_device import make_ring, wait_until_emptied
from moe.gemm.hopper.work_device import (
    END,
    WorkList,
    column_block_of,
    expert_of,
    make_mail,
    message_of_work,
    next_work,
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
    biases_of_work,
    consume_columns,
    finish_steps,
    first_sums,
    has_second_half,
    load_weights,
    make_weights,
    no_products,
    skip_steps,
    start_step,
    write,
)
from moe.runtime.gluon_names_device import reinterpret


@gluon.jit(do_not_specialize=["max_units"])
def wide_gemm1_kernel(
    hidden_states_ptr,  # [T, IN_FEATURES] bf16
    weights_desc,  # [rows of all experts, IN_FEATURES], or [.., 64] where BlockMajorK; box [128, 64]
    out_desc,  # [P, OUT_FEATURES] bf16; box [64, 128]
    kept_first_desc,  # the same, for products with the weight's first half, or None
    kept_second_desc,
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
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_ROWS, BLOCK_K], gl.bfloat16)
    rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, HALF_ROWS, BLOCK_K], rows_layout)
    weights = make_weights(rows_layout, IS_MAJOR_MN)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_ROWS, STORE_N], out_desc.layout)
    stages = Stages(rows, weights, make_ring(NUM_STAGES, 129))
    mail = make_mail(0 if bias_ptr is None else BLOCK_W)
    fence_async_shared()
    swiglu = Swiglu(alpha_ptr, beta_ptr, clamp_limit_ptr)
    first_out, second_out = Output(out_desc, out.index(0)), Output(out_desc, out.index(1))
    kept = Kept(kept_first_desc, kept_second_desc)
    inputs = Inputs(hidden_states_ptr, token_of_row_ptr, weights_desc, bias_ptr)
    works = WorkList(units_ptr, max_units, counts_ptr)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    stages,
                    mail,
                    first_out,
                    kept,
                    swiglu,
                    IN_FEATURES,
                    IS_SHUFFLED,
                    IS_INTERLEAVED,
                    IS_GATED,
                    IS_GATE_FIRST,
                    ACTIVATION,
                    0,
                ),
            ),
            (
                consume,
                (
                    stages,
                    mail,
                    second_out,
                    kept,
                    swiglu,
                    IN_FEATURES,
                    IS_SHUFFLED,
                    IS_INTERLEAVED,
                    IS_GATED,
                    IS_GATE_FIRST,
                    ACTIVATION,
                    1,
                ),
            ),
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
                    SKIPS_TAILS,
                    IS_DYNAMIC,
                    USES_PDL,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )


class Kept(NamedTuple):
    """Where products go before their activation, or nowhere."""

    first_desc: Any  # [P, OUT_FEATURES] bf16
    second_desc: Any


class Inputs(NamedTuple):
    hidden_states_ptr: Any
    token_of_row_ptr: Any
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
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_GATED: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    BLOCK_N: gl.constexpr = STORE_N if IS_GATED else BLOCK_W  # columns of the result
    WEIGHT_ROWS: gl.constexpr = 2 * OUT_FEATURES if IS_GATED else OUT_FEATURES
    HAS_BIAS: gl.constexpr = inputs.bias_ptr is not None
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    # Shuffled or interleaved, gate and up rows that belong together are neighbours; else they are halves of the weight.
    HAS_HALVES: gl.constexpr = IS_GATED and not (IS_SHUFFLED or IS_INTERLEAVED)
    FIRST_STRIDE: gl.constexpr = BLOCK_N if HAS_HALVES else BLOCK_W
    SECOND_OFFSET: gl.constexpr = OUT_FEATURES if HAS_HALVES else BLOCK_W // 2
    FIRST_EXTENT: gl.constexpr = BLOCK_K if IS_MAJOR_MN else BLOCK_W // 2
    SECOND_EXTENT: gl.constexpr = BLOCK_W // 2 if IS_MAJOR_MN else BLOCK_K
    lane = lanes(HALF_ROWS)
    column = columns()
    boxes = reinterpret(
        stages.weights, gl.bfloat16, [NUM_STAGES * 2, FIRST_EXTENT, SECOND_EXTENT], stages.weights.layout
    )

    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(works.counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(works, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
    if HAS_BIAS:
        biases = biases_of_work(inputs.bias_ptr, message, OUT_FEATURES, WEIGHT_ROWS, HAS_HALVES)
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
        first_weight_row = column_block_of(message) * FIRST_STRIDE
        expert = expert_of(message)
        unit_token_ptr = inputs.token_of_row_ptr + row
        token = gl.load(unit_token_ptr + lane)
        second_token = gl.load(unit_token_ptr + HALF_ROWS + lane, mask=(lane >= 0) & is_full, other=-1)
        first_rows = rows_of_tokens(inputs.hidden_states_ptr, token, column, IN_FEATURES)
        second_rows = rows_of_tokens(inputs.hidden_states_ptr, second_token, column, IN_FEATURES)
        next_message = message
        for k in range(NUM_STEPS):
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, BLOCK_W * BLOCK_K * 2)
            for half in gl.static_range(2):
                load_weights(
                    inputs.weights_desc,
                    expert,
                    first_weight_row + half * SECOND_OFFSET,
                    k,
                    bar,
                    boxes.index(stage * 2 + half),
                    IN_FEATURES,
                    WEIGHT_ROWS,
                    IS_BLOCK_MAJOR,
                    IS_MAJOR_MN,
                )
            copy_rows(first_rows, k, stages.rows.index(stage * 2), IN_FEATURES)
            if is_full:
                copy_rows(second_rows, k, stages.rows.index(stage * 2 + 1), IN_FEATURES)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(works, work, num_work, IS_DYNAMIC)
                next_message = message_of_work(works, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
                if HAS_BIAS:
                    biases = biases_of_work(inputs.bias_ptr, next_message, OUT_FEATURES, WEIGHT_ROWS, HAS_HALVES)
        message = next_message
    send(mail, END, num_sent)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def consume(
    stages,
    mail,
    output,
    kept,
    swiglu,
    IN_FEATURES: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ID: gl.constexpr,
):
    if IS_GATED:
        consume_gated(
            stages, mail, output, kept, swiglu, IN_FEATURES, IS_SHUFFLED, IS_INTERLEAVED, IS_GATE_FIRST, ACTIVATION, ID
        )
    else:
        gl.static_assert(kept.first_desc is None, "products without a gate are not kept")
        consume_columns(stages, mail, output, IN_FEATURES, IS_SHUFFLED, ACTIVATION, True, ID)


@gluon.jit
def consume_gated(
    stages,
    mail,
    output,
    kept,
    swiglu,
    IN_FEATURES: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ID: gl.constexpr,
):
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    # Zeros, which are written nowhere: the loop carries a result from its first turn on.
    parameters = Swiglu(1.0, 0.0, 0.0)
    result = activate_columns(no_products(), parameters, IS_SHUFFLED, IS_INTERLEAVED, IS_GATE_FIRST, ACTIVATION)
    result_row = NOWHERE
    result_column = 0
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        takes_part = has_second_half(message) if ID == 1 else True
        if takes_part:
            accumulators = start_step(first_sums(mail, num_received - 1), stages, step, True, ID)
            release_biases(mail, num_received - 1)
            step += 1
            write(result, output, result_row, result_column)
            # After the write, whose registers they would take; long before the products are there.
            parameters = swiglu_of_expert(swiglu, expert_of(message), ACTIVATION)
            # Waits for nothing: makes a tensor of the accumulators, as the loop carries one.
            accumulators = warpgroup_mma_wait(1, deps=[accumulators])
            accumulators, step = finish_steps(accumulators, stages, step, 1, NUM_STEPS, True, ID)
            if kept.first_desc is not None:
                gl.static_assert(not (IS_SHUFFLED or IS_INTERLEAVED), "products are kept in halves")
                keep(accumulators, output, kept, row_of(message) + ID * HALF_ROWS, column_block_of(message) * STORE_N)
            result = activate_columns(accumulators, parameters, IS_SHUFFLED, IS_INTERLEAVED, IS_GATE_FIRST, ACTIVATION)
            result = pin(result)
            result_row = row_of(message) + ID * HALF_ROWS
            result_column = column_block_of(message) * STORE_N
        else:
            release_biases(mail, num_received - 1)
            step = skip_steps(stages.ring, step, NUM_STEPS)
        message = receive(mail, num_received)
    write(result, output, result_row, result_column)
    tma.store_wait(0)


@gluon.jit
def keep(accumulators, output, kept, row, column):
    """Start the copies of [64, 256] products of halves that are not shuffled, through the memory that results pass through."""
    first, second = accumulators.to(gl.bfloat16).reshape([HALF_ROWS, 2, STORE_N]).permute((0, 2, 1)).split()
    write(first, Output(kept.first_desc, output.buffers), row, column)
    write(second, Output(kept.second_desc, output.buffers), row, column)


@gluon.jit
def activate_columns(
    accumulators,
    parameters,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """[64, 256] fp32 -> [64, 128] bf16, columns in order. Every value stays in its thread."""
    if IS_SHUFFLED:
        # A block of 32 weight rows holds 8 even rows of each half, then 8 odd ones of each.
        blocks = accumulators.reshape([HALF_ROWS, BLOCK_W // 32, 2, 2, 8]).permute((0, 1, 4, 2, 3))
        first, second = blocks.split()
    elif IS_INTERLEAVED:
        first, second = accumulators.reshape([HALF_ROWS, STORE_N, 2]).split()
    else:
        first, second = accumulators.reshape([HALF_ROWS, 2, STORE_N]).permute((0, 2, 1)).split()
    return activate_halves(first, second, parameters, ACTIVATION, IS_GATE_FIRST).reshape([HALF_ROWS, STORE_N])
