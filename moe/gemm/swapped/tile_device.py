"""The tile of the swapped Hopper GEMMs: 256 weight rows times up to 160 rows of tokens.

wgmma multiplies 64 rows by any multiple of 8 columns. Here the 64 are rows of the weight and the columns are tokens: 32, 64,
64 + 32, 128 or 128 + 32 of them, by the unit's real rows, so that few tokens cost few operations and the weights of an expert
with up to 160 are read once. A consumer has 128 weight rows. Its accumulators are the transposed result.

A stage of shared memory holds [2, 128, 64] weights, one box a consumer, or [2, 64, 128] where they are MajorMn, [128, 64] rows and
[32, 64] extra rows, which follow the first 64 or 128. Two barriers go with it, filled and emptied (one arrival of each consumer).

GATE says where a consumer's 128 weight rows have the gate: "first" or "last" 64, up in the others; "alternating", gate and up of a
column next to each other; None where there is none.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from moe.gemm.activation_device import activate, swiglu_of_expert
from moe.gemm.hopper.bias_device import biases_of, lanes_of_biases, load_biases, pin_sums, release_biases
from moe.gemm.hopper.epilogue_device import NOWHERE, Output, activate_halves, put
from moe.gemm.hopper.ring_device import make_ring, release, wait_until_filled
from moe.gemm.hopper.work_device import (
    column_block_of,
    expert_of,
    place_of_weights,
    receive,
    row_blocks_of,
    row_of,
)
from moe.runtime.gluon_names_device import load_box, reinterpret, store_box

BOX_ROWS = gl.constexpr(128)  # weight rows of a consumer
BLOCK_W = gl.constexpr(256)  # weight rows
MAX_ROWS = gl.constexpr(128)  # rows of tokens, without the extra ones
CHUNK_ROWS = gl.constexpr(32)  # extra rows; rows that are written at a time
STORE_N = gl.constexpr(64)  # columns of the result that are written at a time
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(4)
STORE_BUFFERS = gl.constexpr(2)  # of a consumer
WEIGHT_BYTES = gl.constexpr(BLOCK_W.value * BLOCK_K.value * 2)
CHUNK_BYTES = gl.constexpr(CHUNK_ROWS.value * BLOCK_K.value * 2)


# Of [128, 32] accumulators where rows 2j and 2j + 1 are in one thread; else as wgmma leaves them.
NEIGHBOURS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], [0, 8], [0, 16], [64, 0]],
        lane_bases=[[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[BOX_ROWS.value, CHUNK_ROWS.value],
    )
)


class Stages(NamedTuple):
    """Shared memory of the steps ahead."""

    rows: Any  # [NUM_STAGES * n, 128 / n, 64]
    extra_rows: Any  # [NUM_STAGES, 32, 64]
    weights: (
        Any  # [2 NUM_STAGES, 128, 64], the boxes of a stage after one another; [2 NUM_STAGES, 64, 128] where MajorMn
    )
    ring: Any


class Unit(NamedTuple):
    """Where a unit's results go, and the activation's parameters."""

    output: Any
    row: Any  # the first one
    row_blocks: Any  # rows in blocks of 16
    column: Any  # the consumer's first one
    swiglu: Any


@gluon.jit
def make_stages(layout: gl.constexpr, ROWS: gl.constexpr, FILLED_COUNT: gl.constexpr, IS_MAJOR_MN: gl.constexpr):
    """layout: of a box of 64 elements of any number of rows. ROWS: that are copied at a time. FILLED_COUNT: see `make_ring`."""
    FIRST_EXTENT: gl.constexpr = BLOCK_K if IS_MAJOR_MN else BOX_ROWS
    SECOND_EXTENT: gl.constexpr = BOX_ROWS if IS_MAJOR_MN else BLOCK_K
    PARTS: gl.constexpr = MAX_ROWS // ROWS
    rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * PARTS, ROWS, BLOCK_K], layout)
    extra_rows = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, CHUNK_ROWS, BLOCK_K], layout)
    weights = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES * 2, FIRST_EXTENT, SECOND_EXTENT], layout)
    return Stages(rows, extra_rows, weights, make_ring(NUM_STAGES, FILLED_COUNT))


@gluon.jit
def make_output(out_desc):
    """Buffers of [STORE_ROWS, 64], as many as make STORE_BUFFERS chunks a consumer."""
    STORE_ROWS: gl.constexpr = out_desc.block_shape[0]
    NUM_BUFFERS: gl.constexpr = 2 * STORE_BUFFERS * (CHUNK_ROWS // STORE_ROWS)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [NUM_BUFFERS, STORE_ROWS, STORE_N], out_desc.layout)
    return Output(out_desc, buffers)


@gluon.jit
def has_extra_rows(row_blocks):
    """Whether a unit of so many blocks of 16 rows is computed as 64 + 32 or 128 + 32."""
    return ((row_blocks > 4) & (row_blocks <= 6)) | (row_blocks > 8)


@gluon.jit
def copy_weights(
    weights_desc,
    expert,
    column,
    k,
    stages,
    stage,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
):
    """Start the copy of both consumers' boxes of weights for the columns of the result from `column` on, step k."""
    if IS_MAJOR_MN:
        copy_weight_columns(weights_desc, expert, column, k, stages, stage, OUT_FEATURES, IS_GATED, IS_INTERLEAVED)
    else:
        copy_weight_rows(
            weights_desc,
            expert,
            column,
            k,
            stages,
            stage,
            IN_FEATURES,
            OUT_FEATURES,
            IS_GATED,
            IS_BLOCK_MAJOR,
            IS_SHUFFLED,
            IS_INTERLEAVED,
        )


@gluon.jit
def copy_weight_rows(
    weights_desc,
    expert,
    column,
    k,
    stages,
    stage,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
):
    """MajorK and BlockMajorK. Interleaved rows are counted in pairs."""
    WEIGHT_ROWS: gl.constexpr = 2 * OUT_FEATURES if IS_GATED and not IS_INTERLEAVED else OUT_FEATURES
    ROWS_OF_COLUMN: gl.constexpr = 2 if IS_GATED and IS_SHUFFLED else 1
    COLUMNS: gl.constexpr = columns_of_consumer(IS_GATED)
    first_row, first_k = place_of_weights(
        expert, column * ROWS_OF_COLUMN, k, IN_FEATURES, WEIGHT_ROWS, BLOCK_K, IS_BLOCK_MAJOR
    )
    bar = stages.ring.filled.index(stage)
    for box in gl.static_range(2):
        row = first_row + box * COLUMNS * ROWS_OF_COLUMN
        memory = stages.weights.index(stage * 2 + box)
        target = reinterpret(memory, gl.bfloat16, weights_desc.block_shape, weights_desc.layout)
        if IS_GATED:
            if IS_SHUFFLED:
                load_box(weights_desc, [0, row // 32, 0, 0, first_k], bar, target)
            else:
                load_box(weights_desc, [0, row, first_k], bar, target)
        else:
            if IS_SHUFFLED:
                load_box(weights_desc, [row // 32, 0, 0, first_k], bar, target)
            else:
                load_box(weights_desc, [row, first_k], bar, target)


@gluon.jit
def copy_weight_columns(
    weights_desc,
    expert,
    column,
    k,
    stages,
    stage,
    OUT_FEATURES: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
):
    """MajorMn: two boxes of 64 columns a consumer, which are rows of the weight."""
    HAS_HALVES: gl.constexpr = IS_GATED and not IS_INTERLEAVED
    COLUMNS: gl.constexpr = BOX_ROWS // 2 if HAS_HALVES else BOX_ROWS
    SECOND: gl.constexpr = OUT_FEATURES if HAS_HALVES else BOX_ROWS // 2
    first = column * 2 if IS_INTERLEAVED else column
    bar = stages.ring.filled.index(stage)
    for box in gl.static_range(2):
        memory = stages.weights.index(stage * 2 + box)
        halves = reinterpret(memory, gl.bfloat16, [2, 1, BLOCK_K, BOX_ROWS // 2], weights_desc.layout)
        for half in gl.static_range(2):
            row = first + box * COLUMNS + half * SECOND
            load_box(weights_desc, [expert, k * BLOCK_K, row], bar, halves.index(half))


@gluon.jit
def biases_of_work(
    bias_ptr,
    message,
    OUT_FEATURES: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
    IS_INTERLEAVED: gl.constexpr,
    IS_MAJOR_MN: gl.constexpr,
):
    """[256] fp32: the biases of both consumers' weight rows, in the order of their accumulators."""
    WEIGHT_ROWS: gl.constexpr = 2 * OUT_FEATURES if IS_GATED else OUT_FEATURES
    lane = lanes_of_biases(BLOCK_W)
    column = column_block_of(message) * (BLOCK_W // 2 if IS_GATED else BLOCK_W)
    if IS_GATED and not (IS_INTERLEAVED and IS_MAJOR_MN):
        half = lane // 64 % 2
        column += lane // BOX_ROWS * 64 + lane % 64
        in_row = column < OUT_FEATURES
        if IS_SHUFFLED:
            row = shuffled(2 * column + half)
        else:
            row = 2 * column + half if IS_INTERLEAVED else half * OUT_FEATURES + column
    else:
        row = (column * 2 if IS_GATED else column) + lane
        in_row = row < WEIGHT_ROWS
        if IS_SHUFFLED:
            row = shuffled(row)
    return load_biases(bias_ptr, message, row, in_row, WEIGHT_ROWS)


@gluon.jit
def shuffled(row):
    """Where a row lies after its block of 32 was shuffled: see `weight_format`."""
    return row // 32 * 32 + row % 4 * 8 + row % 32 // 4


@gluon.constexpr_function
def gate_of(is_gated, is_gate_first, alternates):
    """GATE."""
    if not is_gated:
        return None
    if alternates:
        return "alternating"
    return "first" if is_gate_first else "last"


@gluon.constexpr_function
def columns_of_consumer(is_gated):
    """Of the result, for the BOX_ROWS rows of a box of weights."""
    return 64 if is_gated else 128


@gluon.jit
def consume(
    stages,
    mail,
    output,
    swiglu,
    IN_FEATURES: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATE: gl.constexpr,
    ID: gl.constexpr,
):
    """A consumer of either GEMM: as many products as the unit's rows need, and their results as soon as they are there.

    ACTIVATION: None in gemm2.
    """
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    COLUMNS: gl.constexpr = columns_of_consumer(GATE is not None)
    step = 0
    num_received = 0
    message = receive(mail, num_received)
    while message >= 0:
        num_received += 1
        expert = expert_of(message)
        row = row_of(message)
        row_blocks = row_blocks_of(message)
        column = column_block_of(message) * (2 * COLUMNS) + ID * COLUMNS
        unit = Unit(output, row, row_blocks, column, swiglu_of_expert(swiglu, expert, ACTIVATION))
        if row_blocks <= 2:
            all_rows = multiply(stages, mail, num_received - 1, step, NUM_STEPS, 32, ID)
            write_chunk(all_rows, unit, 0, ACTIVATION, GATE, ID)
        elif row_blocks <= 4:
            all_rows = multiply(stages, mail, num_received - 1, step, NUM_STEPS, 64, ID)
            write_64(all_rows, unit, 0, ACTIVATION, GATE, ID)
        elif row_blocks <= 6:
            first, extra = multiply_with_extra(stages, mail, num_received - 1, step, NUM_STEPS, 64, ID)
            write_64(first, unit, 0, ACTIVATION, GATE, ID)
            write_chunk(extra, unit, 2, ACTIVATION, GATE, ID)
        elif row_blocks <= 8:
            all_rows = multiply(stages, mail, num_received - 1, step, NUM_STEPS, 128, ID)
            write_128(all_rows, unit, ACTIVATION, GATE, ID)
        else:
            first, extra = multiply_with_extra(stages, mail, num_received - 1, step, NUM_STEPS, 128, ID)
            write_128(first, unit, ACTIVATION, GATE, ID)
            write_chunk(extra, unit, 4, ACTIVATION, GATE, ID)
        step += NUM_STEPS
        message = receive(mail, num_received)
    tma.store_wait(0)


@gluon.jit
def multiply(stages, mail, count, first_step, NUM_STEPS: gl.constexpr, ROWS: gl.constexpr, ID: gl.constexpr):
    """[128, ROWS] fp32: this consumer's weight rows times the unit's first ROWS rows, and biases if message `count` has any."""
    PARTS: gl.constexpr = MAX_ROWS // ROWS
    accumulators = first_sums(mail, count, ROWS, ID)
    release_biases(mail, count)
    rows = reinterpret(stages.rows, gl.bfloat16, [NUM_STAGES * PARTS, ROWS, BLOCK_K], stages.rows.layout)
    for k in range(NUM_STEPS):
        step = first_step + k
        stage = wait_until_filled(stages.ring, step)
        fence_async_shared()
        box = weights_of(stages, stage, ID)
        accumulators = warpgroup_mma(box, rows.index(stage * PARTS).permute((1, 0)), accumulators, is_async=True)
        accumulators = warpgroup_mma_wait(1, deps=[accumulators])
        release(stages.ring, step + NUM_STAGES - 1, pred=k > 0)  # the step before, by a number that is not negative
    accumulators = warpgroup_mma_wait(0, deps=[accumulators])
    release(stages.ring, first_step + NUM_STEPS - 1)
    return accumulators


@gluon.jit
def multiply_with_extra(stages, mail, count, first_step, NUM_STEPS: gl.constexpr, ROWS: gl.constexpr, ID: gl.constexpr):
    """[128, ROWS] and [128, 32] fp32: this consumer's weight rows times the unit's first ROWS rows, and the 32 that follow."""
    PARTS: gl.constexpr = MAX_ROWS // ROWS
    accumulators = first_sums(mail, count, ROWS, ID)
    extra = first_sums(mail, count, CHUNK_ROWS, ID)
    release_biases(mail, count)
    rows = reinterpret(stages.rows, gl.bfloat16, [NUM_STAGES * PARTS, ROWS, BLOCK_K], stages.rows.layout)
    for k in range(NUM_STEPS):
        step = first_step + k
        stage = wait_until_filled(stages.ring, step)
        fence_async_shared()
        box = weights_of(stages, stage, ID)
        accumulators = warpgroup_mma(box, rows.index(stage * PARTS).permute((1, 0)), accumulators, is_async=True)
        extra = warpgroup_mma(box, stages.extra_rows.index(stage).permute((1, 0)), extra, is_async=True)
        accumulators, extra = warpgroup_mma_wait(2, deps=[accumulators, extra])
        release(stages.ring, step + NUM_STAGES - 1, pred=k > 0)  # the step before, by a number that is not negative
    accumulators, extra = warpgroup_mma_wait(0, deps=[accumulators, extra])
    release(stages.ring, first_step + NUM_STEPS - 1)
    return accumulators, extra


@gluon.jit
def weights_of(stages, stage, ID: gl.constexpr):
    """[128, 64]: this consumer's."""
    box = stages.weights.index(stage * 2 + ID)
    if stages.weights.shape[1] == BOX_ROWS:
        return box
    else:
        return box.permute((1, 0))


@gluon.jit
def first_sums(mail, count, ROWS: gl.constexpr, ID: gl.constexpr):
    """[128, ROWS] fp32: what sums begin with, each weight row's bias, or zero."""
    layout: gl.constexpr = accumulator_layout(ROWS)
    if mail.biases.shape[1] == 1:
        return gl.zeros([BOX_ROWS, ROWS], gl.float32, layout)
    else:
        biases = biases_of(mail, count, ID * BOX_ROWS, BOX_ROWS, gl.SliceLayout(1, layout))
        return pin_sums(biases[:, None].broadcast_to([BOX_ROWS, ROWS]))


@gluon.constexpr_function
def accumulator_layout(rows):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.jit
def write_128(accumulators, unit, ACTIVATION: gl.constexpr, GATE: gl.constexpr, ID: gl.constexpr):
    """Write the results of [128, 128]."""
    first, last = split_rows(accumulators, MAX_ROWS)
    write_64(first, unit, 0, ACTIVATION, GATE, ID)
    write_64(last, unit, 2, ACTIVATION, GATE, ID)


@gluon.jit
def write_64(accumulators, unit, CHUNK: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr, ID: gl.constexpr):
    """Write the results of [128, 64] to chunks CHUNK and CHUNK + 1."""
    first, last = split_rows(accumulators, 2 * CHUNK_ROWS)
    write_chunk(first, unit, CHUNK, ACTIVATION, GATE, ID)
    write_chunk(last, unit, CHUNK + 1, ACTIVATION, GATE, ID)


@gluon.jit
def write_chunk(
    accumulators, unit, CHUNK: gl.constexpr, ACTIVATION: gl.constexpr, GATE: gl.constexpr, ID: gl.constexpr
):
    """Write the results of [128, 32] to chunk CHUNK: 64 columns through one of two buffers in turn, or 128 through both."""
    if GATE is not None:
        first, second = split_neighbours(accumulators) if GATE == "alternating" else split_weight_rows(accumulators)
        result = activate_halves(first, second, unit.swiglu, ACTIVATION, GATE != "last")
        PENDING: gl.constexpr = 1 if CHUNK > 0 else 0  # the last unit may have ended with either buffer
        write(result, unit, unit.column, ID * STORE_BUFFERS + CHUNK % 2, CHUNK, PENDING)
    else:
        results = accumulators if ACTIVATION is None else activate(accumulators, ACTIVATION)
        left, right = split_weight_rows(results.to(gl.bfloat16))
        write(left, unit, unit.column, ID * STORE_BUFFERS, CHUNK, 1)
        write(right, unit, unit.column + STORE_N, ID * STORE_BUFFERS + 1, CHUNK, 1)


@gluon.jit
def split_rows(accumulators, ROWS: gl.constexpr):
    """[128, ROWS] -> the first and the last half of its columns, which are rows of tokens. Every value stays in its thread."""
    return accumulators.reshape([BOX_ROWS, 2, ROWS // 2]).permute((0, 2, 1)).split()


@gluon.jit
def split_weight_rows(accumulators):
    """[128, 32] -> its first and last 64 rows. Every value stays in its thread."""
    return accumulators.reshape([2, BOX_ROWS // 2, CHUNK_ROWS]).permute((1, 2, 0)).split()


@gluon.jit
def split_neighbours(accumulators):
    """[128, 32] -> its even and odd rows, which are in neighbouring lanes: a shuffle for every two values."""
    return (
        gl.convert_layout(accumulators, NEIGHBOURS).reshape([BOX_ROWS // 2, 2, CHUNK_ROWS]).permute((0, 2, 1)).split()
    )


@gluon.jit
def write(result, unit, column, buffer, CHUNK: gl.constexpr, PENDING: gl.constexpr):
    """Start the copy of [64 columns, 32 rows] to rows 32 * CHUNK on of the unit; pieces past its rows are not written.

    Args:
        buffer: through which it goes; free once no more than PENDING other writes are going on.
    """
    desc, buffers = unit.output
    STORE_ROWS: gl.constexpr = desc.block_shape[0]
    PIECES: gl.constexpr = CHUNK_ROWS // STORE_ROWS
    chunks = reinterpret(buffers, gl.bfloat16, [2 * STORE_BUFFERS, CHUNK_ROWS, STORE_N], buffers.layout)
    put(result, chunks.index(buffer).permute((1, 0)), PENDING * PIECES)
    for piece in gl.static_range(PIECES):
        first = CHUNK * CHUNK_ROWS + piece * STORE_ROWS
        row = gl.where(unit.row_blocks * 16 > first, unit.row + first, NOWHERE)
        store_box(desc, [row, column], buffers.index(buffer * PIECES + piece))
