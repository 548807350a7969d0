"""The tile of the swapped Hopper GEMMs: 256 weight rows times up to 160 rows of tokens.

wgmma multiplies 64 rows by any multiple of 8 columns. Here the 64 are rows of the weight and the columns are tokens: 32, 64,
64 + 32, 128 or 128 + 32 of them, by the unit's real rows, so that few tokens cost few operations and the weights of an expert
with up to 160 are read once. A consumer has 128 weight rows. Its accumulators are the transposed result.

A stage of shared memory holds [2, 128, 64] weights, one box a consumer, [128, 64] rows and [32, 64] extra rows, which follow
the first 64 or 128. Two barriers go with it, filled and emptied (one arrival of each consumer).
"""
# mypy: allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
NOWHERE = gl.constexpr(1 << 30)  # a row past any tensor's end: a TMA store there writes nothing


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
    bar,
    weights,
    stage,
    IN_FEATURES: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
    IS_SHUFFLED: gl.constexpr,
):
    """Start the copy of both consumers' boxes of weights for the columns of the result from `column` on, step k."""
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    WEIGHT_ROWS: gl.constexpr = 2 * OUT_FEATURES if IS_GATED else OUT_FEATURES
    ROWS_OF_COLUMN: gl.constexpr = 2 if IS_GATED and IS_SHUFFLED else 1
    COLUMNS: gl.constexpr = BOX_ROWS // 2 if IS_GATED else BOX_ROWS
    if IS_BLOCK_MAJOR:
        first_row = (expert * NUM_STEPS + k) * WEIGHT_ROWS + column * ROWS_OF_COLUMN
        first_k = 0
    else:
        first_row = expert * WEIGHT_ROWS + column * ROWS_OF_COLUMN
        first_k = k * BLOCK_K
    for box in gl.static_range(2):
        row = first_row + box * COLUMNS * ROWS_OF_COLUMN
        target = weights.index(stage * 2 + box)._reinterpret(gl.bfloat16, weights_desc.block_shape, weights_desc.layout)
        if IS_GATED:
            if IS_SHUFFLED:
                tma.async_copy_global_to_shared(weights_desc, [0, row // 32, 0, 0, first_k], bar, target)
            else:
                tma.async_copy_global_to_shared(weights_desc, [0, row, first_k], bar, target)
        else:
            if IS_SHUFFLED:
                tma.async_copy_global_to_shared(weights_desc, [row // 32, 0, 0, first_k], bar, target)
            else:
                tma.async_copy_global_to_shared(weights_desc, [row, first_k], bar, target)


@gluon.jit
def multiply(
    weights,
    rows,
    filled,
    emptied,
    first_step,
    NUM_STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    ID: gl.constexpr,
):
    """[128, ROWS] fp32: this consumer's weight rows times the unit's first ROWS rows."""
    accumulators = gl.zeros([BOX_ROWS, ROWS], gl.float32, accumulator_layout(ROWS))
    views = rows._reinterpret(gl.bfloat16, [NUM_STAGES * (MAX_ROWS // ROWS), ROWS, BLOCK_K], rows.layout)
    for k in range(NUM_STEPS):
        step = first_step + k
        stage = step % NUM_STAGES
        mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
        fence_async_shared()
        accumulators = warpgroup_mma(
            weights.index(stage * 2 + ID),
            views.index(stage * (MAX_ROWS // ROWS)).permute((1, 0)),
            accumulators,
            is_async=True,
        )
        accumulators = warpgroup_mma_wait(1, deps=[accumulators])
        mbarrier.arrive(emptied.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)
    accumulators = warpgroup_mma_wait(0, deps=[accumulators])
    mbarrier.arrive(emptied.index((first_step + NUM_STEPS - 1) % NUM_STAGES), count=1)
    return accumulators


@gluon.jit
def multiply_with_extra(
    weights,
    rows,
    extra_rows,
    filled,
    emptied,
    first_step,
    NUM_STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    ID: gl.constexpr,
):
    """[128, ROWS] and [128, 32] fp32: this consumer's weight rows times the unit's first ROWS rows, and the 32 that follow."""
    accumulators = gl.zeros([BOX_ROWS, ROWS], gl.float32, accumulator_layout(ROWS))
    extra = gl.zeros([BOX_ROWS, CHUNK_ROWS], gl.float32, accumulator_layout(CHUNK_ROWS))
    views = rows._reinterpret(gl.bfloat16, [NUM_STAGES * (MAX_ROWS // ROWS), ROWS, BLOCK_K], rows.layout)
    for k in range(NUM_STEPS):
        step = first_step + k
        stage = step % NUM_STAGES
        mbarrier.wait(filled.index(stage), (step // NUM_STAGES) & 1)
        fence_async_shared()
        box = weights.index(stage * 2 + ID)
        accumulators = warpgroup_mma(
            box, views.index(stage * (MAX_ROWS // ROWS)).permute((1, 0)), accumulators, is_async=True
        )
        extra = warpgroup_mma(box, extra_rows.index(stage).permute((1, 0)), extra, is_async=True)
        accumulators, extra = warpgroup_mma_wait(2, deps=[accumulators, extra])
        mbarrier.arrive(emptied.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)
    accumulators, extra = warpgroup_mma_wait(0, deps=[accumulators, extra])
    mbarrier.arrive(emptied.index((first_step + NUM_STEPS - 1) % NUM_STAGES), count=1)
    return accumulators, extra


@gluon.constexpr_function
def accumulator_layout(rows):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.jit
def split_rows(accumulators, ROWS: gl.constexpr):
    """[128, ROWS] -> the first and the last half of its columns, which are rows of tokens. Every value stays in its thread."""
    return accumulators.reshape([BOX_ROWS, 2, ROWS // 2]).permute((0, 2, 1)).split()


@gluon.jit
def split_weight_rows(accumulators):
    """[128, 32] -> its first and last 64 rows. Every value stays in its thread."""
    return accumulators.reshape([2, BOX_ROWS // 2, CHUNK_ROWS]).permute((1, 2, 0)).split()


@gluon.jit
def write(result, out_desc, out, buffer, row, row_blocks, column, CHUNK: gl.constexpr, PENDING: gl.constexpr):
    """Start the copy of [64 columns, 32 rows] to rows 32 * CHUNK on of the unit, through shared memory.

    Args:
        out: [buffers * pieces, rows of a piece, 64]; `buffer` is free once no more than PENDING other writes are going on.
        row, row_blocks: the unit's first row, and its rows in blocks of 16. Pieces past them are not written.
    """
    STORE_ROWS: gl.constexpr = out_desc.block_shape[0]
    PIECES: gl.constexpr = CHUNK_ROWS // STORE_ROWS
    NUM_BUFFERS: gl.constexpr = 2 * STORE_BUFFERS
    chunks = out._reinterpret(gl.bfloat16, [NUM_BUFFERS, CHUNK_ROWS, STORE_N], out.layout)
    tma.store_wait(PENDING * PIECES)
    chunks.index(buffer).permute((1, 0)).store(result)
    fence_async_shared()
    for piece in gl.static_range(PIECES):
        first = CHUNK * CHUNK_ROWS + piece * STORE_ROWS
        target = gl.where(row_blocks * 16 > first, row + first, NOWHERE)
        tma.async_copy_shared_to_global(out_desc, [target, column], out.index(buffer * PIECES + piece))
