"""GEMM1 on Hopper: gathered rows times two bands of weight rows, SwiGLU in registers. Persistent, one block an SM.

A block multiplies 128 rows by 256 weight rows (128 gate and 128 up rows that belong together) in steps of 64. Its warps:

    4  consume, ID 0    rows 0..63:   wgmma 64x256x64 a step, then SwiGLU, then 128 columns of the result
    4  consume, ID 1    rows 64..127: the same, from the same weights; rests where the unit has no such rows
    4  produce          choose the work, send it on, copy rows (cp.async, gathered) and weights (TMA) four steps ahead

A step has a stage of shared memory and two barriers. filled: 128 arrivals, one a producing thread once its copies of rows
have landed, and one that counts the bytes of the weights. emptied: one arrival of each consumer, after the wgmma that
read the stage. The result of a unit stays in registers and is written while the first wgmma of the next one runs.
"""
# mypy: allow-untyped-defs

import triton.language as tl
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
BLOCK_W = gl.constexpr(256)  # weight rows
BLOCK_N = gl.constexpr(128)  # columns of the result
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(4)
NOWHERE = gl.constexpr(1 << 30)  # a row past any tensor's end: a TMA store there writes nothing


@gluon.jit(do_not_specialize=["max_units"])
def wide_gemm1_kernel(
    hidden_states_ptr,  # [T, IN_FEATURES] bf16
    weights_desc,  # [rows of all experts, IN_FEATURES], or [.., 64] where BlockMajorK; box [128, 64]
    out_desc,  # [P, OUT_FEATURES] bf16; box [64, 128]
    token_of_row_ptr,  # [P] int32
    units_ptr,  # [5, max_units] int32
    counts_ptr,  # [2] int32: units, and 0: work taken
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    rows = gl.allocate_shared_memory(
        gl.bfloat16,
        [NUM_STAGES * 2, HALF_ROWS, BLOCK_K],
        gl.NVMMASharedLayout.get_default_for([HALF_ROWS, BLOCK_K], gl.bfloat16),
    )
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, BLOCK_W // 2, BLOCK_K], weights_desc.layout)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, HALF_ROWS, BLOCK_N], out_desc.layout)
    filled, emptied = make_barriers(NUM_STAGES, 129)
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
                    alpha_ptr,
                    beta_ptr,
                    clamp_limit_ptr,
                    IN_FEATURES,
                    IS_SHUFFLED,
                    IS_GATE_FIRST,
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
                    alpha_ptr,
                    beta_ptr,
                    clamp_limit_ptr,
                    IN_FEATURES,
                    IS_SHUFFLED,
                    IS_GATE_FIRST,
                    1,
                ),
            ),
            (
                produce,
                (
                    hidden_states_ptr,
                    weights_desc,
                    token_of_row_ptr,
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
                    IS_SHUFFLED,
                    SKIPS_TAILS,
                    IS_DYNAMIC,
                    USES_PDL,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )


@gluon.jit
def produce(
    hidden_states_ptr,
    weights_desc,
    token_of_row_ptr,
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
    IS_SHUFFLED: gl.constexpr,
    SKIPS_TAILS: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    WEIGHT_ROWS: gl.constexpr = 2 * OUT_FEATURES
    # Shuffled, gate and up rows that belong together are neighbours; else they are halves of the weight.
    FIRST_STRIDE: gl.constexpr = BLOCK_W if IS_SHUFFLED else BLOCK_N
    SECOND_OFFSET: gl.constexpr = BLOCK_W // 2 if IS_SHUFFLED else OUT_FEATURES
    WEIGHT_BYTES: gl.constexpr = BLOCK_W * BLOCK_K * 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread, 128 a row
    lane = gl.arange(0, HALF_ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))

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
        first_weight_row = column_block_of(message) * FIRST_STRIDE
        expert = expert_of(message)
        token = gl.load(token_of_row_ptr + row + lane)
        second_token = gl.load(token_of_row_ptr + row + HALF_ROWS + lane, mask=(lane >= 0) & is_full, other=-1)
        # Padding rows have no token: their mask writes zeros.
        row_ptrs = hidden_states_ptr + gl.maximum(token, 0).to(gl.int64)[:, None] * IN_FEATURES + column[None, :]
        second_ptrs = (
            hidden_states_ptr + gl.maximum(second_token, 0).to(gl.int64)[:, None] * IN_FEATURES + column[None, :]
        )
        is_token = (token >= 0)[:, None]
        is_second_token = (second_token >= 0)[:, None]
        next_message = message
        for k in range(NUM_STEPS):
            stage = step % NUM_STAGES
            mbarrier.wait(emptied.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
            bar = filled.index(stage)
            mbarrier.expect(bar, WEIGHT_BYTES)
            if IS_BLOCK_MAJOR:
                weight_row = (expert * NUM_STEPS + k) * WEIGHT_ROWS + first_weight_row
                weight_column = 0
            else:
                weight_row = expert * WEIGHT_ROWS + first_weight_row
                weight_column = k * BLOCK_K
            tma.async_copy_global_to_shared(weights_desc, [weight_row, weight_column], bar, weights.index(stage * 2))
            tma.async_copy_global_to_shared(
                weights_desc, [weight_row + SECOND_OFFSET, weight_column], bar, weights.index(stage * 2 + 1)
            )
            in_row = is_token
            in_second_row = is_second_token
            if IN_FEATURES % BLOCK_K:
                in_features = (column < IN_FEATURES - k * BLOCK_K)[None, :]
                in_row = is_token & in_features
                in_second_row = is_second_token & in_features
            async_copy.async_copy_global_to_shared(rows.index(stage * 2), row_ptrs + k * BLOCK_K, mask=in_row)
            if is_full:
                async_copy.async_copy_global_to_shared(
                    rows.index(stage * 2 + 1), second_ptrs + k * BLOCK_K, mask=in_second_row
                )
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(work, counts_ptr, num_work, IS_DYNAMIC)
                next_message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, SKIPS_TAILS)
        message = next_message
    send(END, mail, num_sent)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def consume(
    out_desc,
    out_tile,
    rows,
    weights,
    filled,
    emptied,
    mail,
    alpha_ptr,
    beta_ptr,
    clamp_limit_ptr,
    IN_FEATURES: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ID: gl.constexpr,
):
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_W, 16])
    both_halves = weights._reinterpret(gl.bfloat16, [NUM_STAGES, BLOCK_W, BLOCK_K], weights.layout)
    result = activate(
        gl.zeros([HALF_ROWS, BLOCK_W], gl.float32, layout), 1.0, 0.0, 0.0, False, IS_SHUFFLED, IS_GATE_FIRST
    )
    result_row = NOWHERE
    result_column = 0
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        takes_part = has_second_half(message) if ID == 1 else True
        if takes_part:
            expert = expert_of(message)
            alpha = 1.0 if alpha_ptr is None else gl.load(alpha_ptr + expert)
            beta = 0.0 if beta_ptr is None else gl.load(beta_ptr + expert)
            limit = 0.0 if clamp_limit_ptr is None else gl.load(clamp_limit_ptr + expert)
            accumulators = gl.zeros([HALF_ROWS, BLOCK_W], gl.float32, layout)
            stage = step % NUM_STAGES
            mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
            fence_async_shared()
            accumulators = warpgroup_mma(
                rows.index(stage * 2 + ID), both_halves.index(stage).permute((1, 0)), accumulators, is_async=True
            )
            step += 1
            write(result, out_desc, out_tile, result_row, result_column)
            # Waits for nothing: makes a tensor of the accumulators, as the loop carries one.
            accumulators = warpgroup_mma_wait(1, deps=[accumulators])
            for _ in range(1, NUM_STEPS):
                stage = step % NUM_STAGES
                mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
                fence_async_shared()
                accumulators = warpgroup_mma(
                    rows.index(stage * 2 + ID), both_halves.index(stage).permute((1, 0)), accumulators, is_async=True
                )
                accumulators = warpgroup_mma_wait(1, deps=[accumulators])
                mbarrier.arrive(emptied.index((step - 1) % NUM_STAGES), count=1)
                step += 1
            accumulators = warpgroup_mma_wait(0, deps=[accumulators])
            mbarrier.arrive(emptied.index((step - 1) % NUM_STAGES), count=1)
            result = pin(
                activate(accumulators, alpha, beta, limit, clamp_limit_ptr is not None, IS_SHUFFLED, IS_GATE_FIRST)
            )
            result_row = row_of(message) + ID * HALF_ROWS
            result_column = column_block_of(message) * BLOCK_N
        else:
            for _ in range(NUM_STEPS):
                stage = step % NUM_STAGES
                mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
                mbarrier.arrive(emptied.index(stage), count=1)
                step += 1
        message = receive(mail, num_received)
    write(result, out_desc, out_tile, result_row, result_column)
    tma.store_wait(0)


@gluon.jit
def activate(
    accumulators,
    alpha,
    beta,
    limit,
    HAS_LIMIT: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
):
    """[64, 256] fp32 -> [64, 128] bf16, columns in order. Every value stays in its thread."""
    if IS_SHUFFLED:
        # A block of 32 weight rows holds 8 even rows of each half, then 8 odd ones of each.
        blocks = accumulators.reshape([HALF_ROWS, BLOCK_W // 32, 2, 2, 8]).permute((0, 1, 4, 2, 3))
        first, second = blocks.split()
    else:
        first, second = accumulators.reshape([HALF_ROWS, 2, BLOCK_N]).permute((0, 2, 1)).split()
    gate = first if IS_GATE_FIRST else second
    up = second if IS_GATE_FIRST else first
    if HAS_LIMIT:
        # NaN comes out where NaN goes in.
        gate = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = gl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    activated = gate / (1.0 + gl.exp2(gate * (alpha * -1.4426950408889634))) * (up + beta)
    return activated.to(gl.bfloat16).reshape([HALF_ROWS, BLOCK_N])


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
