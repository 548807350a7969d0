"""GEMM1 on Hopper, for some tens of rows an expert: 256 weight rows times gathered rows, SwiGLU in registers. Persistent.

A block, one an SM, multiplies 128 gate and 128 up rows of the weight by up to 160 rows of tokens (`swapped/tile_device.py`) in
steps of 64. Its warps:

    4  consume, ID 0    gate and up rows of columns 0..63:   two wgmma 64xRx16 for 16 of a step, SwiGLU, 64 columns
    4  consume, ID 1    gate and up rows of columns 64..127: the same, from the same rows
    4  produce          choose the work, send it on, copy rows (cp.async, gathered) and weights (TMA) four steps ahead

A stage is filled by 128 arrivals, one a producing thread once its copies of rows have landed, and one that counts the bytes of
the weights. Results are written as soon as they are there: the producer fills the stages meanwhile.
"""
# mypy: allow-untyped-defs

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
from moe.gemm.prefetch_device import prefetch_weights_by_128
from moe.gemm.swapped.tile_device import (
    BLOCK_K,
    BOX_ROWS,
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

BLOCK_N = gl.constexpr(128)  # columns of the result
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
    max_units,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    IS_DYNAMIC: gl.constexpr,
    USES_PDL: gl.constexpr,
    PREFETCHES: gl.constexpr,  # some weights before the wait of a dependent launch
):
    STORE_ROWS: gl.constexpr = out_desc.block_shape[0]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK_ROWS, BLOCK_K], gl.bfloat16)
    row_halves = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, HALF_ROWS, BLOCK_K], layout)
    extra_rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, CHUNK_ROWS, BLOCK_K], layout)
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, BOX_ROWS, BLOCK_K], layout)
    out = gl.allocate_shared_memory(
        gl.bfloat16, [2 * STORE_BUFFERS * (CHUNK_ROWS // STORE_ROWS), STORE_ROWS, STORE_N], out_desc.layout
    )
    filled, emptied = make_barriers(NUM_STAGES, 129)
    mail = make_mail()
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_desc,
                    out,
                    row_halves,
                    extra_rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    alpha_ptr,
                    beta_ptr,
                    clamp_limit_ptr,
                    IN_FEATURES,
                    IS_GATE_FIRST,
                    0,
                ),
            ),
            (
                consume,
                (
                    out_desc,
                    out,
                    row_halves,
                    extra_rows,
                    weights,
                    filled,
                    emptied,
                    mail,
                    alpha_ptr,
                    beta_ptr,
                    clamp_limit_ptr,
                    IN_FEATURES,
                    IS_GATE_FIRST,
                    1,
                ),
            ),
            (
                produce,
                (
                    hidden_states_ptr,
                    weights_ptr,
                    weights_desc,
                    token_of_row_ptr,
                    units_ptr,
                    counts_ptr,
                    max_units,
                    row_halves,
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
        [4, 4],
        [216, 72],
    )


@gluon.jit
def produce(
    hidden_states_ptr,
    weights_ptr,
    weights_desc,
    token_of_row_ptr,
    units_ptr,
    counts_ptr,
    max_units,
    row_halves,
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
    PREFETCHES: gl.constexpr,
):
    COLUMN_BLOCKS: gl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread, 128 a row
    column = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))

    if PREFETCHES:
        prefetch_weights_by_128(weights_ptr, gl.program_id(0))
    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_work = gl.load(counts_ptr) * COLUMN_BLOCKS
    work = gl.program_id(0)
    message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, True)
    step = 0
    num_sent = 0
    while message >= 0:
        send(message, mail, num_sent)
        num_sent += 1
        row_blocks = row_blocks_of(message)
        has_extra = has_extra_rows(row_blocks)
        has_second = row_blocks > 6
        first_column = column_block_of(message) * BLOCK_N
        expert = expert_of(message)
        unit_token_ptr = token_of_row_ptr + row_of(message)
        first_extra = gl.where(has_second, 2 * HALF_ROWS, HALF_ROWS)
        first_ptrs, in_first = row_ptrs(hidden_states_ptr, unit_token_ptr, 0, row_blocks, IN_FEATURES, HALF_ROWS)
        second_ptrs, in_second = row_ptrs(
            hidden_states_ptr, unit_token_ptr, HALF_ROWS, row_blocks, IN_FEATURES, HALF_ROWS
        )
        extra_ptrs, in_extra = row_ptrs(
            hidden_states_ptr, unit_token_ptr, first_extra, row_blocks, IN_FEATURES, CHUNK_ROWS
        )
        next_message = message
        for k in range(NUM_STEPS):
            stage = step % NUM_STAGES
            mbarrier.wait(emptied.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
            bar = filled.index(stage)
            mbarrier.expect(bar, WEIGHT_BYTES)
            copy_weights(
                weights_desc,
                expert,
                first_column,
                k,
                bar,
                weights,
                stage,
                IN_FEATURES,
                OUT_FEATURES,
                True,
                IS_BLOCK_MAJOR,
                IS_SHUFFLED,
            )
            in_features = (column < IN_FEATURES - k * BLOCK_K)[None, :]
            copy_rows(row_halves.index(stage * 2), first_ptrs, in_first, in_features, k, IN_FEATURES)
            if has_second:
                copy_rows(row_halves.index(stage * 2 + 1), second_ptrs, in_second, in_features, k, IN_FEATURES)
            if has_extra:
                copy_rows(extra_rows.index(stage), extra_ptrs, in_extra, in_features, k, IN_FEATURES)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
            if k == 1:
                # Here, so that the wait for it falls into a time when the stages ahead are full.
                work = next_work(work, counts_ptr, num_work, IS_DYNAMIC)
                next_message = message_of_work(units_ptr, max_units, work, num_work, COLUMN_BLOCKS, True)
        message = next_message
    send(END, mail, num_sent)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def row_ptrs(hidden_states_ptr, unit_token_ptr, first, row_blocks, IN_FEATURES: gl.constexpr, ROWS: gl.constexpr):
    """Rows first .. first + ROWS of the unit: pointers to their 64 first elements [ROWS, 64], and which rows are tokens."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    token = gl.load(unit_token_ptr + row, mask=row < row_blocks * 16, other=-1)
    ptrs = hidden_states_ptr + gl.maximum(token, 0).to(gl.int64)[:, None] * IN_FEATURES + column[None, :]
    return ptrs, (token >= 0)[:, None]


@gluon.jit
def copy_rows(target, ptrs, is_token, in_features, k, IN_FEATURES: gl.constexpr):
    """Start the copy of step k of rows; those without a token become zeros."""
    in_row = is_token
    if IN_FEATURES % BLOCK_K:
        in_row = is_token & in_features
    async_copy.async_copy_global_to_shared(target, ptrs + k * BLOCK_K, mask=in_row)


@gluon.jit
def consume(
    out_desc,
    out,
    row_halves,
    extra_rows,
    weights,
    filled,
    emptied,
    mail,
    alpha_ptr,
    beta_ptr,
    clamp_limit_ptr,
    IN_FEATURES: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ID: gl.constexpr,
):
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    HAS_LIMIT: gl.constexpr = clamp_limit_ptr is not None
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        expert = expert_of(message)
        row = row_of(message)
        row_blocks = row_blocks_of(message)
        column = column_block_of(message) * BLOCK_N + ID * STORE_N
        alpha = 1.0 if alpha_ptr is None else gl.load(alpha_ptr + expert)
        beta = 0.0 if beta_ptr is None else gl.load(beta_ptr + expert)
        limit = 0.0 if clamp_limit_ptr is None else gl.load(clamp_limit_ptr + expert)
        if row_blocks <= 2:
            all_rows = multiply(weights, row_halves, filled, emptied, step, NUM_STEPS, 32, ID)
            write_chunk(
                all_rows,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                0,
                ID,
            )
        elif row_blocks <= 4:
            all_rows = multiply(weights, row_halves, filled, emptied, step, NUM_STEPS, 64, ID)
            write_64(
                all_rows,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                0,
                ID,
            )
        elif row_blocks <= 6:
            first, extra = multiply_with_extra(
                weights, row_halves, extra_rows, filled, emptied, step, NUM_STEPS, 64, ID
            )
            write_64(
                first,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                0,
                ID,
            )
            write_chunk(
                extra,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                2,
                ID,
            )
        elif row_blocks <= 8:
            all_rows = multiply(weights, row_halves, filled, emptied, step, NUM_STEPS, 128, ID)
            write_128(
                all_rows,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                ID,
            )
        else:
            first, extra = multiply_with_extra(
                weights, row_halves, extra_rows, filled, emptied, step, NUM_STEPS, 128, ID
            )
            write_128(
                first,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                ID,
            )
            write_chunk(
                extra,
                out_desc,
                out,
                row,
                row_blocks,
                column,
                alpha,
                beta,
                limit,
                HAS_LIMIT,
                IS_GATE_FIRST,
                4,
                ID,
            )
        step += NUM_STEPS
        message = receive(mail, num_received)
    tma.store_wait(0)


@gluon.jit
def write_128(
    accumulators,
    out_desc,
    out,
    row,
    row_blocks,
    column,
    alpha,
    beta,
    limit,
    HAS_LIMIT: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    ID: gl.constexpr,
):
    """Activate and write [128, 128]."""
    first, last = split_rows(accumulators, MAX_ROWS)
    write_64(
        first,
        out_desc,
        out,
        row,
        row_blocks,
        column,
        alpha,
        beta,
        limit,
        HAS_LIMIT,
        IS_GATE_FIRST,
        0,
        ID,
    )
    write_64(
        last,
        out_desc,
        out,
        row,
        row_blocks,
        column,
        alpha,
        beta,
        limit,
        HAS_LIMIT,
        IS_GATE_FIRST,
        2,
        ID,
    )


@gluon.jit
def write_64(
    accumulators,
    out_desc,
    out,
    row,
    row_blocks,
    column,
    alpha,
    beta,
    limit,
    HAS_LIMIT: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    CHUNK: gl.constexpr,
    ID: gl.constexpr,
):
    """Activate and write [128, 64] to chunks CHUNK and CHUNK + 1."""
    first, last = split_rows(accumulators, 2 * CHUNK_ROWS)
    write_chunk(
        first,
        out_desc,
        out,
        row,
        row_blocks,
        column,
        alpha,
        beta,
        limit,
        HAS_LIMIT,
        IS_GATE_FIRST,
        CHUNK,
        ID,
    )
    write_chunk(
        last,
        out_desc,
        out,
        row,
        row_blocks,
        column,
        alpha,
        beta,
        limit,
        HAS_LIMIT,
        IS_GATE_FIRST,
        CHUNK + 1,
        ID,
    )


@gluon.jit
def write_chunk(
    accumulators,
    out_desc,
    out,
    row,
    row_blocks,
    column,
    alpha,
    beta,
    limit,
    HAS_LIMIT: gl.constexpr,
    IS_GATE_FIRST: gl.constexpr,
    CHUNK: gl.constexpr,
    ID: gl.constexpr,
):
    """Activate and write [128, 32] to chunk CHUNK, 64 columns through one of two buffers in turn."""
    result = activate(accumulators, alpha, beta, limit, HAS_LIMIT, IS_GATE_FIRST)
    PENDING: gl.constexpr = 1 if CHUNK > 0 else 0  # the last unit may have ended with either buffer
    write(result, out_desc, out, ID * STORE_BUFFERS + CHUNK % 2, row, row_blocks, column, CHUNK, PENDING)


@gluon.jit
def activate(accumulators, alpha, beta, limit, HAS_LIMIT: gl.constexpr, IS_GATE_FIRST: gl.constexpr):
    """[128, 32] fp32 -> [64, 32] bf16. Every value stays in its thread."""
    first, second = split_weight_rows(accumulators)
    gate = first if IS_GATE_FIRST else second
    up = second if IS_GATE_FIRST else first
    if HAS_LIMIT:
        # NaN comes out where NaN goes in.
        gate = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = gl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    activated = gate / (1.0 + gl.exp2(gate * (alpha * -1.4426950408889634))) * (up + beta)
    return activated.to(gl.bfloat16)
