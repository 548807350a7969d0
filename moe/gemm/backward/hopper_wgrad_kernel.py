"""Gradients of weights on Hopper: an expert's gathered rows of tokens, transposed, times its rows. Persistent, one block an SM.

A block takes 128 columns of the gathered operand times 256 of the other one and sums over all rows of an expert, in steps of
64 rows. Its warps:

    4  consume, ID 0    gathered columns 0..63:   wgmma 64x256x64 a step, both operands with their rows as the contraction
    4  consume, ID 1    gathered columns 64..127: the same, from the same other operand
    4  produce          choose the work, send it on, copy rows (cp.async, gathered) and rows (TMA) four steps ahead

A step has a stage of shared memory and two barriers, as in the wide GEMMs. No sum is split between blocks, so bits do not
depend on who takes what. The result stays in registers and is written while the first wgmma of the next one runs; what is
added to fp32 is added at once.
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

from moe.gemm.hopper.epilogue_device import NOWHERE, Output, pin
from moe.gemm.hopper.gather_device import columns, copy_rows, lanes, rows_of_tokens
from moe.gemm.hopper.ring_device import make_ring, release, wait_until_emptied, wait_until_filled
from moe.gemm.hopper.work_device import END, make_mail, receive, send
from moe.runtime.gluon_names_device import load_box, store_box

STEP_ROWS = gl.constexpr(64)
HALF_M = gl.constexpr(64)  # gathered columns of a consumer
BLOCK_N = gl.constexpr(256)  # columns of the other operand
STORE_N = gl.constexpr(128)  # of them that are written at a time
NUM_STAGES = gl.constexpr(4)
ACCUMULATORS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))


class Stages(NamedTuple):
    """Shared memory of the steps ahead."""

    gathered: Any  # [2 NUM_STAGES, 64 rows, 64], the two halves of a stage after one another
    direct: Any  # [NUM_STAGES, 64 rows, 256]
    ring: Any


class Inputs(NamedTuple):
    gathered_ptr: Any  # [T, GATHERED] bf16
    direct_desc: Any  # [P, DIRECT] bf16
    token_of_row_ptr: Any
    rows_of_expert_ptr: Any  # [2, NUM_EXPERTS] int32, and the number of pieces of work taken


@gluon.jit
def hopper_wgrad_kernel(
    gathered_ptr,  # [T, GATHERED] bf16
    direct_desc,  # [P, DIRECT] bf16; box [64, 256]
    out_desc,  # [E GATHERED, DIRECT] bf16, box [64, 128]; IS_TRANSPOSED: [E DIRECT, GATHERED], box [128, 64]
    sum_ptr,  # the same in fp32, which is added to, in place of out_desc; or None
    token_of_row_ptr,  # [P] int32
    rows_of_expert_ptr,  # [2, NUM_EXPERTS] int32: first row, one past the last real row; then 0: work taken
    NUM_EXPERTS: gl.constexpr,
    GATHERED: gl.constexpr,
    DIRECT: gl.constexpr,
    IS_TRANSPOSED: gl.constexpr,
):
    gathered_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP_ROWS, HALF_M], gl.bfloat16)
    gathered = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, STEP_ROWS, HALF_M], gathered_layout)
    direct = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, STEP_ROWS, BLOCK_N], direct_desc.layout)
    stages = Stages(gathered, direct, make_ring(NUM_STAGES, 129))
    mail = make_mail()
    inputs = Inputs(gathered_ptr, direct_desc, token_of_row_ptr, rows_of_expert_ptr)
    if sum_ptr is None:
        OUT_ROWS: gl.constexpr = STORE_N if IS_TRANSPOSED else HALF_M
        OUT_COLUMNS: gl.constexpr = HALF_M if IS_TRANSPOSED else STORE_N
        out = gl.allocate_shared_memory(gl.bfloat16, [2, OUT_ROWS, OUT_COLUMNS], out_desc.layout)
        fence_async_shared()
        first_out, second_out = Output(out_desc, out.index(0)), Output(out_desc, out.index(1))
        gl.warp_specialize(
            [
                (consume, (stages, mail, first_out, GATHERED, DIRECT, IS_TRANSPOSED, 0)),
                (consume, (stages, mail, second_out, GATHERED, DIRECT, IS_TRANSPOSED, 1)),
                (produce, (inputs, stages, mail, NUM_EXPERTS, GATHERED, DIRECT)),
            ],
            [4, 4],
            [216, 72],
        )
    else:
        fence_async_shared()
        gl.warp_specialize(
            [
                (consume_and_add, (stages, mail, sum_ptr, GATHERED, DIRECT, IS_TRANSPOSED, 0)),
                (consume_and_add, (stages, mail, sum_ptr, GATHERED, DIRECT, IS_TRANSPOSED, 1)),
                (produce, (inputs, stages, mail, NUM_EXPERTS, GATHERED, DIRECT)),
            ],
            [4, 4],
            [216, 72],
        )


@gluon.jit
def produce(inputs, stages, mail, NUM_EXPERTS: gl.constexpr, GATHERED: gl.constexpr, DIRECT: gl.constexpr):
    lane = lanes(STEP_ROWS)
    column = columns()
    work = gl.program_id(0)
    message, row = piece_of_work(inputs, work, NUM_EXPERTS, GATHERED, DIRECT)
    while (message >= 0) & (steps_of(message) == 0):
        work = next_work(inputs, NUM_EXPERTS)
        message, row = piece_of_work(inputs, work, NUM_EXPERTS, GATHERED, DIRECT)
    step = 0
    num_sent = 0
    while message >= 0:
        send(mail, message, num_sent)
        num_sent += 1
        num_steps = steps_of(message)
        direct_column = direct_block_of(message) * BLOCK_N
        first_half = gathered_block_of(message) * 2
        token_ptrs = inputs.token_of_row_ptr + row + lane
        token = gl.load(token_ptrs)
        next_message = message
        next_row = row
        for k in range(num_steps):
            # Tokens of the step after this one: their rows cannot be asked for before they are here.
            next_token = gl.load(token_ptrs + (k + 1) * STEP_ROWS, mask=(lane >= 0) & (k + 1 < num_steps), other=-1)
            rows = rows_of_tokens(inputs.gathered_ptr, token, column, GATHERED)
            stage = wait_until_emptied(stages.ring, step)
            bar = stages.ring.filled.index(stage)
            mbarrier.expect(bar, STEP_ROWS * BLOCK_N * 2)
            load_box(inputs.direct_desc, [row + k * STEP_ROWS, direct_column], bar, stages.direct.index(stage))
            copy_rows(rows, first_half, stages.gathered.index(stage * 2), GATHERED)
            copy_rows(rows, first_half + 1, stages.gathered.index(stage * 2 + 1), GATHERED)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
            token = next_token
            if k == 0:
                # Here, so that the wait for it falls into a time when stages ahead are full.
                work = next_work(inputs, NUM_EXPERTS)
                next_message, next_row = piece_of_work(inputs, work, NUM_EXPERTS, GATHERED, DIRECT)
                while (next_message >= 0) & (steps_of(next_message) == 0):
                    work = next_work(inputs, NUM_EXPERTS)
                    next_message, next_row = piece_of_work(inputs, work, NUM_EXPERTS, GATHERED, DIRECT)
        message = next_message
        row = next_row
    send(mail, END, num_sent)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def next_work(inputs, NUM_EXPERTS: gl.constexpr):
    """The next piece of work that no block has taken."""
    return gl.num_programs(0) + gl.atomic_add(inputs.rows_of_expert_ptr + 2 * NUM_EXPERTS, 1, sem="relaxed")


@gluon.jit
def piece_of_work(inputs, work, NUM_EXPERTS: gl.constexpr, GATHERED: gl.constexpr, DIRECT: gl.constexpr):
    """(message, first row) of a piece of work, END from the last one on.

    Blocks of one expert follow one another, so that its rows lie in L2; neighbours have the same columns of the direct operand.
    A message has the expert in bits 0 to 15, the gathered block in 16 to 27, the direct one in 28 to 39, then the steps.
    """
    GATHERED_BLOCKS: gl.constexpr = GATHERED // (2 * HALF_M)
    BLOCKS: gl.constexpr = GATHERED_BLOCKS * ((DIRECT + BLOCK_N - 1) // BLOCK_N)
    is_work = work < NUM_EXPERTS * BLOCKS
    expert = work // BLOCKS
    block = work % BLOCKS
    row = gl.load(inputs.rows_of_expert_ptr + expert, mask=is_work, other=0)
    limit = gl.load(inputs.rows_of_expert_ptr + NUM_EXPERTS + expert, mask=is_work, other=0)
    num_steps = (limit - row + STEP_ROWS - 1) // STEP_ROWS
    blocks = block // GATHERED_BLOCKS * 4096 + block % GATHERED_BLOCKS
    message = (num_steps.to(gl.int64) << 40) | (blocks.to(gl.int64) << 16) | expert.to(gl.int64)
    return gl.where(is_work, message, END), row


@gluon.jit
def steps_of(message):
    return (message >> 40).to(gl.int32)


@gluon.jit
def direct_block_of(message):
    return (message >> 28).to(gl.int32) & 0xFFF


@gluon.jit
def gathered_block_of(message):
    return (message >> 16).to(gl.int32) & 0xFFF


@gluon.jit
def expert_of(message):
    return message.to(gl.int32) & 0xFFFF


@gluon.jit
def consume(
    stages,
    mail,
    output,
    GATHERED: gl.constexpr,
    DIRECT: gl.constexpr,
    IS_TRANSPOSED: gl.constexpr,
    ID: gl.constexpr,
):
    left, right = halves(no_products().to(gl.bfloat16))
    row, column = NOWHERE, 0
    second_row, second_column = NOWHERE, 0
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        accumulators = start_step(no_products(), stages, step, ID)
        step += 1
        write(left, output, row, column, IS_TRANSPOSED)
        write(right, output, second_row, second_column, IS_TRANSPOSED)
        # Waits for nothing: makes a tensor of the accumulators, as the loop carries one.
        accumulators = warpgroup_mma_wait(1, deps=[accumulators])
        accumulators, step = finish_steps(accumulators, stages, step, steps_of(message), ID)
        left, right = halves(accumulators.to(gl.bfloat16))
        left = pin(left)
        right = pin(right)
        gathered = gathered_block_of(message) * (2 * HALF_M) + ID * HALF_M
        direct = direct_block_of(message) * BLOCK_N
        expert = expert_of(message)
        if IS_TRANSPOSED:
            # A block of rows past the expert's last one is the next expert's.
            row, column = expert * DIRECT + direct, gathered
            second_row = gl.where(direct + STORE_N < DIRECT, row + STORE_N, NOWHERE)
            second_column = gathered
        else:
            row, column = expert * GATHERED + gathered, direct
            second_row, second_column = row, direct + STORE_N
        message = receive(mail, num_received)
    write(left, output, row, column, IS_TRANSPOSED)
    write(right, output, second_row, second_column, IS_TRANSPOSED)
    tma.store_wait(0)


@gluon.jit
def consume_and_add(
    stages,
    mail,
    sum_ptr,
    GATHERED: gl.constexpr,
    DIRECT: gl.constexpr,
    IS_TRANSPOSED: gl.constexpr,
    ID: gl.constexpr,
):
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        accumulators = start_step(no_products(), stages, step, ID)
        step += 1
        accumulators = warpgroup_mma_wait(1, deps=[accumulators])
        accumulators, step = finish_steps(accumulators, stages, step, steps_of(message), ID)
        gathered = gathered_block_of(message) * (2 * HALF_M) + ID * HALF_M
        direct = direct_block_of(message) * BLOCK_N
        # int64: gradients of all experts pass 2^31 elements.
        expert_ptr = sum_ptr + expert_of(message).to(gl.int64) * (GATHERED * DIRECT)
        left, right = halves(accumulators)
        add_columns(expert_ptr, left, gathered, direct, GATHERED, DIRECT, IS_TRANSPOSED)
        add_columns(expert_ptr, right, gathered, direct + STORE_N, GATHERED, DIRECT, IS_TRANSPOSED)
        message = receive(mail, num_received)


@gluon.jit
def add_columns(
    expert_ptr, half, gathered, direct, GATHERED: gl.constexpr, DIRECT: gl.constexpr, IS_TRANSPOSED: gl.constexpr
):
    """Add [64, 128] fp32, 64 columns at a time, which is what registers hold beside the rest."""
    first, second = half.reshape([HALF_M, 2, STORE_N // 2]).permute((0, 2, 1)).split()
    add(expert_ptr, first, gathered, direct, GATHERED, DIRECT, IS_TRANSPOSED)
    add(expert_ptr, second, gathered, direct + STORE_N // 2, GATHERED, DIRECT, IS_TRANSPOSED)


@gluon.jit
def add(
    expert_ptr, values, gathered, direct, GATHERED: gl.constexpr, DIRECT: gl.constexpr, IS_TRANSPOSED: gl.constexpr
):
    gathered += gl.arange(0, values.shape[0], gl.SliceLayout(1, values.type.layout))
    direct += gl.arange(0, values.shape[1], gl.SliceLayout(0, values.type.layout))
    if IS_TRANSPOSED:
        ptrs = expert_ptr + (direct * GATHERED)[None, :] + gathered[:, None]
    else:
        ptrs = expert_ptr + (gathered * DIRECT)[:, None] + direct[None, :]
    mask = (gathered >= 0)[:, None] & (direct < DIRECT)[None, :]
    gl.store(ptrs, gl.load(ptrs, mask=mask, other=0.0) + values, mask=mask)


@gluon.jit
def no_products():
    return gl.zeros([HALF_M, BLOCK_N], gl.float32, ACCUMULATORS)


@gluon.jit
def start_step(accumulators, stages, step, ID: gl.constexpr):
    """Start a step's wgmma, once its stage is filled."""
    stage = wait_until_filled(stages.ring, step)
    fence_async_shared()
    gathered = stages.gathered.index(stage * 2 + ID).permute((1, 0))
    return warpgroup_mma(gathered, stages.direct.index(stage), accumulators, is_async=True)


@gluon.jit
def finish_steps(accumulators, stages, step, num_steps, ID: gl.constexpr):
    """Steps 1 .. num_steps of a piece of work; `step` numbers all steps. All of its products, and the step after them."""
    for _ in range(1, num_steps):
        accumulators = start_step(accumulators, stages, step, ID)
        accumulators = warpgroup_mma_wait(1, deps=[accumulators])
        release(stages.ring, step - 1)
        step += 1
    accumulators = warpgroup_mma_wait(0, deps=[accumulators])
    release(stages.ring, step - 1)
    return accumulators, step


@gluon.jit
def halves(values):
    """[64, 256] -> two [64, 128]. Every value stays in its thread."""
    return values.reshape([HALF_M, 2, STORE_N]).permute((0, 2, 1)).split()


@gluon.jit
def write(result, output, row, column, IS_TRANSPOSED: gl.constexpr):
    """Start the copy of [64, 128], or of its transpose, to [row, column], through shared memory that the copy before has left."""
    tma.store_wait(0)
    if IS_TRANSPOSED:
        output.buffers.permute((1, 0)).store(result)
    else:
        output.buffers.store(result)
    fence_async_shared()
    store_box(output.desc, [row, column], output.buffers)
