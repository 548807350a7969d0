"""The gradient through GEMM2, the routing weight and the activation, on Hopper. Persistent, one block an SM.

A block multiplies 128 gathered rows by 256 columns of W2 in steps of 64 rows of W2. Its warps:

    4  consume, ID 0    rows 0..63:   wgmma 64x256x64 a step, then the epilogue, 64 columns at a time
    4  consume, ID 1    rows 64..127: the same, from the same weights; rests where the unit has no such rows
    4  produce          choose the work, send it on, copy rows (cp.async, gathered) and weights (TMA) four steps ahead

Steps are as in the wide GEMMs. After those of a unit come four more, which bring what gemm1 kept, for 64 columns each, into the
memory of the weights: so it is there when the products are. These go, rounded to bf16, into the memory of the rows, which these
steps leave free: so the epilogue is a loop. Unrolled over registers it was 75 KB of code for each consumer, and took longer than
all of a unit's wgmmas. The gradients of gate and up take the places of gate and up, and leave from there; a step's memory is given
back when they have left.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe.gemm.activation_device import Swiglu, clamp, swiglu_of_expert
from moe.gemm.backward.activation_device import differentiate_swiglu, without_clamped
from moe.gemm.hopper.gather_device import columns, copy_rows, lanes, rows_of_tokens
from moe.gemm.hopper.ring_device import make_ring, release, wait_until_emptied, wait_until_filled
from moe.gemm.hopper.work_device import (
    END,
    WorkList,
    column_block_of,
    expert_of,
    make_mail,
    message_of_work,
    next_work,
    receive,
    row_blocks_of,
    row_of,
    send,
)
from moe.runtime.gluon_names_device import load_box, reinterpret, store_box

HALF_ROWS = gl.constexpr(64)  # rows of a consumer
BLOCK_N = gl.constexpr(256)  # columns of the activation
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(4)
PIECE = gl.constexpr(64)  # columns of the epilogue at a time
NUM_PIECES = gl.constexpr(4)
PIECE_BYTES = gl.constexpr(64 * 64 * 2)
ACCUMULATORS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
PIECE_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


class Stages(NamedTuple):
    """Shared memory of the steps ahead."""

    rows: Any  # [2 NUM_STAGES, 64, 64], the two halves of a stage after one another
    weights: Any  # [NUM_STAGES, 64, 256]
    pieces: (
        Any  # the same memory, [4 NUM_STAGES, 64, 64]: for each half of the rows, columns of W1's first and second half
    )
    ring: Any


class Inputs(NamedTuple):
    grad_output_ptr: Any
    weights_desc: Any
    first_desc: Any
    second_desc: Any
    token_of_row_ptr: Any


class Rows(NamedTuple):
    """What a consumer knows of its 64 rows."""

    first: Any
    is_real: Any  # [64] bool: not padding
    weight: Any  # [64] fp32: of the routing


class Outputs(NamedTuple):
    """Where results go, and where what a consumer knows of its rows comes from."""

    first_desc: Any  # [P, OUT_FEATURES] bf16, columns of the gradient of W1's first half
    second_desc: Any
    weighted_desc: Any  # [P, OUT_FEATURES] bf16
    buffers: Any  # [4, 64, 64] bf16, that weighted activations pass through
    row_sums_ptr: Any  # [column blocks, P] fp32
    max_rows: Any
    weight_of_row_ptr: Any  # [P] fp32
    token_of_row_ptr: Any


@gluon.jit(do_not_specialize=["max_units", "max_rows"])
def hopper_gemm2_dgrad_kernel(
    grad_output_ptr,  # [T, IN_FEATURES] bf16
    weights_desc,  # [E IN_FEATURES, OUT_FEATURES] bf16; box [64, 256]
    first_desc,  # [P, OUT_FEATURES] bf16, what gemm1 kept of W1's first half; box [64, 64], as those that follow
    second_desc,  # the same of its second half
    grad_first_desc,  # their gradients
    grad_second_desc,
    weighted_desc,  # [P, OUT_FEATURES] bf16
    row_sums_ptr,  # [column blocks, P] fp32
    weight_of_row_ptr,  # [P] fp32
    token_of_row_ptr,  # [P] int32
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    max_units,
    max_rows,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    FILLS_TAILS: gl.constexpr,  # rows of a unit that a consumer rests in are the unit's, and become zeros
):
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_ROWS, BLOCK_K], gl.bfloat16)
    rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, HALF_ROWS, BLOCK_K], rows_layout)
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BLOCK_K, BLOCK_N], weights_desc.layout)
    pieces = reinterpret(weights, gl.bfloat16, [NUM_STAGES * 4, HALF_ROWS, PIECE], first_desc.layout)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [4, HALF_ROWS, PIECE], weighted_desc.layout)
    stages = Stages(rows, weights, pieces, make_ring(NUM_STAGES, 129))
    mail = make_mail()
    fence_async_shared()
    swiglu = Swiglu(alpha_ptr, beta_ptr, clamp_limit_ptr)
    inputs = Inputs(grad_output_ptr, weights_desc, first_desc, second_desc, token_of_row_ptr)
    works = WorkList(units_ptr, max_units, counts_ptr)
    outputs = Outputs(
        grad_first_desc,
        grad_second_desc,
        weighted_desc,
        buffers,
        row_sums_ptr,
        max_rows,
        weight_of_row_ptr,
        token_of_row_ptr,
    )
    gl.warp_specialize(
        [
            (consume, (stages, mail, outputs, swiglu, IN_FEATURES, IS_GATE_FIRST, FILLS_TAILS, 0)),
            (consume, (stages, mail, outputs, swiglu, IN_FEATURES, IS_GATE_FIRST, FILLS_TAILS, 1)),
            (produce, (inputs, works, stages, mail, IN_FEATURES, OUT_FEATURES)),
        ],
        [4, 4],
        [216, 72],
    )


@gluon.jit
def produce(inputs, works, stages, mail, IN_FEATURES: gl.constexpr, OUT_FEATURES: gl.constexpr):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = IN_FEATURES // BLOCK_K
    lane = lanes(HALF_ROWS)
    column = columns()
    num_work = gl.load(works.counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(works, work, num_work, COLUMN_BLOCKS, True)
    step = 0
    num_sent = 0
    while message >= 0:
        send(mail, message, num_sent)
        num_sent += 1
        row = row_of(message)
        is_full = row_blocks_of(message) > 4
        first_column = column_block_of(message) * BLOCK_N
        weight_row = expert_of(message) * IN_FEATURES
        unit_token_ptr = inputs.token_of_row_ptr + row
        token = gl.load(unit_token_ptr + lane)
        second_token = gl.load(unit_token_ptr + HALF_ROWS + lane, mask=(lane >= 0) & is_full, other=-1)
        first_rows = rows_of_tokens(inputs.grad_output_ptr, token, column, IN_FEATURES)
        second_rows = rows_of_tokens(inputs.grad_output_ptr, second_token, column, IN_FEATURES)
        next_message = message
        for k in range(NUM_STEPS):
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, BLOCK_K * BLOCK_N * 2)
            load_box(inputs.weights_desc, [weight_row + k * BLOCK_K, first_column], bar, stages.weights.index(stage))
            copy_rows(first_rows, k, stages.rows.index(stage * 2), IN_FEATURES)
            if is_full:
                copy_rows(second_rows, k, stages.rows.index(stage * 2 + 1), IN_FEATURES)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(works, work, num_work, True)
                next_message = message_of_work(works, work, num_work, COLUMN_BLOCKS, True)
        for piece in range(NUM_PIECES):
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, 4 * PIECE_BYTES, pred=is_full)
            mbarrier.expect(bar, 2 * PIECE_BYTES, pred=is_full == 0)
            piece_column = first_column + piece * PIECE
            load_box(inputs.first_desc, [row, piece_column], bar, stages.pieces.index(stage * 4))
            load_box(inputs.second_desc, [row, piece_column], bar, stages.pieces.index(stage * 4 + 1))
            second = row + HALF_ROWS
            load_box(inputs.first_desc, [second, piece_column], bar, stages.pieces.index(stage * 4 + 2), pred=is_full)
            load_box(inputs.second_desc, [second, piece_column], bar, stages.pieces.index(stage * 4 + 3), pred=is_full)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
        message = next_message
    send(mail, END, num_sent)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def consume(
    stages,
    mail,
    outputs,
    swiglu,
    IN_FEATURES: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    FILLS_TAILS: gl.constexpr,
    ID: gl.constexpr,
):
    NUM_STEPS: gl.constexpr = IN_FEATURES // BLOCK_K
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        row = row_of(message) + ID * HALF_ROWS
        column_block = column_block_of(message)
        takes_part = row_blocks_of(message) > 4 if ID == 1 else True
        if takes_part:
            lane_row = row + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, PIECE_LAYOUT))
            is_real = gl.load(outputs.token_of_row_ptr + lane_row) >= 0
            weight = gl.load(outputs.weight_of_row_ptr + lane_row, mask=is_real, other=0.0)
            parameters = swiglu_of_expert(swiglu, expert_of(message))
            accumulators = start_step(gl.zeros([HALF_ROWS, BLOCK_N], gl.float32, ACCUMULATORS), stages, step, ID)
            step += 1
            # Waits for nothing: makes a tensor of the accumulators, as the loop carries one.
            accumulators = warpgroup_mma_wait(1, deps=[accumulators])
            for _ in range(1, NUM_STEPS):
                accumulators = start_step(accumulators, stages, step, ID)
                accumulators = warpgroup_mma_wait(1, deps=[accumulators])
                release(stages.ring, step - 1)
                step += 1
            accumulators = warpgroup_mma_wait(0, deps=[accumulators])
            release(stages.ring, step - 1)
            put_products(accumulators, stages, step, ID)
            sums = gl.zeros([HALF_ROWS], gl.float32, gl.SliceLayout(1, PIECE_LAYOUT))
            for piece in range(NUM_PIECES):
                column = column_block * BLOCK_N + piece * PIECE
                sums += finish_piece(
                    Rows(row, is_real, weight),
                    parameters,
                    stages,
                    step,
                    outputs,
                    column,
                    outputs.buffers.index(2 * ID + piece % 2),
                    IS_GATE_FIRST,
                    swiglu.clamp_limit is not None,
                    ID,
                )
                release(stages.ring, step - 1, pred=piece > 0)
                step += 1
            row_sums_ptr = outputs.row_sums_ptr + column_block.to(gl.int64) * outputs.max_rows
            gl.store(row_sums_ptr + lane_row, sums, mask=is_real)
            tma.store_wait(0)
            release(stages.ring, step - 1)
        else:
            if FILLS_TAILS:
                fill(outputs, row, column_block * BLOCK_N, ID)
            for _ in range(NUM_STEPS + NUM_PIECES):
                wait_until_filled(stages.ring, step)
                release(stages.ring, step)
                step += 1
        message = receive(mail, num_received)


@gluon.jit
def start_step(accumulators, stages, step, ID: gl.constexpr):
    """Start a step's wgmma, once its stage is filled."""
    stage = wait_until_filled(stages.ring, step)
    fence_async_shared()
    return warpgroup_mma(stages.rows.index(stage * 2 + ID), stages.weights.index(stage), accumulators, is_async=True)


@gluon.jit
def halves(values, COLUMNS: gl.constexpr):
    """[64, COLUMNS] -> its left and its right half. Every value stays in its thread."""
    return values.reshape([HALF_ROWS, 2, COLUMNS // 2]).permute((0, 2, 1)).split()


@gluon.jit
def put_products(accumulators, stages, step, ID: gl.constexpr):
    """[64, 256] fp32, rounded to bf16, into the memory of a consumer's rows in the four stages from `step` on.

    They are its own since its last wgmma, and until it gives the steps of the epilogue back.
    """
    left, right = halves(accumulators.to(gl.bfloat16), BLOCK_N)
    for half in gl.static_range(2):
        pair = halves(left if half == 0 else right, BLOCK_N // 2)
        for piece in gl.static_range(2):
            stage = (step + 2 * half + piece) % NUM_STAGES
            values = gl.convert_layout(pair[piece], PIECE_LAYOUT, assert_trivial=True)
            stages.rows.index(stage * 2 + ID).store(values)


@gluon.jit
def finish_piece(
    rows,
    parameters,
    stages,
    step,
    outputs,
    column,
    weighted_buffer,
    IS_GATE_FIRST: gl.constexpr,
    IS_CLAMPED: gl.constexpr,
    ID: gl.constexpr,
):
    """Start the copies of 64 columns' results; what the piece before started has then left. [64] fp32: sums over columns."""
    row, is_real, weight = rows
    stage = wait_until_filled(stages.ring, step)
    first_buffer = stages.pieces.index(stage * 4 + 2 * ID)
    second_buffer = stages.pieces.index(stage * 4 + 2 * ID + 1)
    grad = stages.rows.index(stage * 2 + ID).load(PIECE_LAYOUT).to(gl.float32)
    # What lies in padding rows may be NaN. From zeros, and a weight of 0, come zeros.
    mask = gl.where(is_real, -1, 0)[:, None].broadcast_to([HALF_ROWS, PIECE])
    first = masked_floats(first_buffer.load(PIECE_LAYOUT), mask)
    second = masked_floats(second_buffer.load(PIECE_LAYOUT), mask)
    gate = first if IS_GATE_FIRST else second
    up = second if IS_GATE_FIRST else first
    value, by_gate, by_up = differentiate(gate, up, parameters, IS_CLAMPED)
    by_first = by_gate if IS_GATE_FIRST else by_up
    by_second = by_up if IS_GATE_FIRST else by_gate
    weighted_grad = grad * weight[:, None]
    first_buffer.store((weighted_grad * by_first).to(gl.bfloat16))
    second_buffer.store((weighted_grad * by_second).to(gl.bfloat16))
    weighted_buffer.store((value * weight[:, None]).to(gl.bfloat16))
    fence_async_shared()
    store_box(outputs.first_desc, [row, column], first_buffer)
    store_box(outputs.second_desc, [row, column], second_buffer)
    store_box(outputs.weighted_desc, [row, column], weighted_buffer)
    tma.store_wait(3)
    return gl.sum(grad * value, axis=1)


@gluon.jit
def masked_floats(values, mask):
    """bf16 -> fp32, 0 where the int32 mask is 0 and not -1: two at a time, as they lie in a register."""
    bits = gl.inline_asm_elementwise(
        "{ .reg .b32 t; and.b32 t, $2, $3; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
        "=r,=r,r,r,r",
        [values, mask],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def differentiate(gate, up, parameters, IS_CLAMPED: gl.constexpr):
    """SwiGLU, and its derivatives by gate and by up. The reciprocal's and the power's last bits matter to no bf16."""
    gate_in, up_in = gate, up
    if IS_CLAMPED:
        gate, up = clamp(gate, up, parameters.clamp_limit)
    share = sigmoid(gate * parameters.alpha)
    value, by_gate, by_up = differentiate_swiglu(gate, up, share, parameters)
    if IS_CLAMPED:
        by_gate, by_up = without_clamped(gate_in, up_in, by_gate, by_up, parameters.clamp_limit)
    return value, by_gate, by_up


@gluon.jit
def sigmoid(x):
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def fill(outputs, row, column, ID: gl.constexpr):
    """Zeros in all results of 64 rows and 256 columns."""
    buffer = outputs.buffers.index(2 * ID)
    buffer.store(gl.zeros([HALF_ROWS, PIECE], gl.bfloat16, PIECE_LAYOUT))
    fence_async_shared()
    for piece in gl.static_range(NUM_PIECES):
        store_box(outputs.first_desc, [row, column + piece * PIECE], buffer)
        store_box(outputs.second_desc, [row, column + piece * PIECE], buffer)
        store_box(outputs.weighted_desc, [row, column + piece * PIECE], buffer)
    tma.store_wait(0)
