"""What the warps of Hopper's persistent GEMMs tell each other about the work at hand.

The producing warps choose the work and send one int64 for it to both consumers, through two slots of shared memory:
bits 36..62 the first row, a multiple of 16, without its low 4 bits; bits 32..35 the number of rows to compute, in blocks of
16; bits 16..31 the column block; bits 0..15 the expert. A negative message ends the kernel.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe.gemm.hopper.ring_device import make_ring, wait_until_emptied, wait_until_filled

NUM_SLOTS = gl.constexpr(2)
END = gl.constexpr(-1)


class WorkList(NamedTuple):
    """The units of `work_units`, and who has taken what."""

    units_ptr: Any  # [5, max_units] int32
    max_units: Any
    counts_ptr: Any  # [2] int32: units, and work taken


class Mail(NamedTuple):
    """Slots of int64 for messages, and their ring."""

    slots: Any
    ring: Any
    biases: Any  # [NUM_SLOTS, biases of a message] fp32, or the slots where there are none: see `hopper/bias_device.py`


@gluon.jit
def message_of_work(works, work, num_work, COLUMN_BLOCKS: gl.constexpr, SKIPS_TAILS: gl.constexpr):
    """The message for a piece of work in the order of `work_units`, END from num_work on.

    Rows to compute are those of the unit that are real, rounded up to 16, or 128 where not SKIPS_TAILS.
    """
    units_ptr, max_units, _ = works
    is_work = work < num_work
    place = gl.where(is_work, work, 0)
    any_unit = place // COLUMN_BLOCKS
    first_unit = gl.load(units_ptr + 3 * max_units + any_unit, mask=is_work, other=0)
    group_units = gl.load(units_ptr + 4 * max_units + any_unit, mask=is_work, other=1)
    place -= first_unit * COLUMN_BLOCKS
    column_block = place // group_units
    unit = first_unit + place % group_units
    expert = gl.load(units_ptr + unit, mask=is_work, other=0)
    row = gl.load(units_ptr + max_units + unit, mask=is_work, other=0)
    if SKIPS_TAILS:
        num_rows = gl.load(units_ptr + 2 * max_units + unit, mask=is_work, other=0)
        row += (num_rows + 15) // 16
    else:
        row += 8
    message = (row.to(gl.int64) << 32) | (column_block << 16).to(gl.int64) | expert.to(gl.int64)
    return gl.where(is_work, message, END)


@gluon.jit
def next_work(works, work, num_work, IS_DYNAMIC: gl.constexpr):
    """The work after `work`: the next that no block has taken, or every num_programs-th.

    Asked for once for each piece of work, so whoever asks last leaves the counter at 0 for the next kernel.
    """
    if IS_DYNAMIC:
        num_asked = gl.atomic_add(works.counts_ptr + 1, 1, sem="relaxed")
        gl.store(works.counts_ptr + 1, 0, mask=num_asked == num_work - 1)
        return gl.num_programs(0) + num_asked
    else:
        return work + gl.num_programs(0)


@gluon.jit
def make_mail(NUM_BIASES: gl.constexpr = gl.constexpr(0)):
    """NUM_BIASES: that go with a message."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    slots = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], layout)
    if NUM_BIASES:
        biases = gl.allocate_shared_memory(gl.float32, [NUM_SLOTS, NUM_BIASES], layout)
        return Mail(slots, make_ring(NUM_SLOTS, 1), biases)
    else:
        return Mail(slots, make_ring(NUM_SLOTS, 1), slots)  # for None, which Triton 3.6 returns from no function


@gluon.jit
def send(mail, message, count, biases=None):
    """Put message number `count` and its biases into their slot once both consumers have read what was there."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = wait_until_emptied(mail.ring, count)
    mail.slots.index(slot).store(gl.full([1], message, gl.int64, layout))
    if biases is not None:
        mail.biases.index(slot).store(biases)
    mbarrier.arrive(mail.ring.filled.index(slot), count=1)


@gluon.jit
def receive(mail, count):
    """Message number `count`. Where biases go with it, its slot is kept until `release_biases`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = wait_until_filled(mail.ring, count)
    message = gl.max(mail.slots.index(slot).load(layout), axis=0)
    if mail.biases.shape[1] == 1:
        mbarrier.arrive(mail.ring.emptied.index(slot), count=1)
    return message


@gluon.jit
def row_of(message):
    return (message >> 32).to(gl.int32) & -16


@gluon.jit
def row_blocks_of(message):
    """Rows to compute, in blocks of 16."""
    return (message >> 32).to(gl.int32) & 15


@gluon.jit
def column_block_of(message):
    return (message >> 16).to(gl.int32) & 0xFFFF


@gluon.jit
def expert_of(message):
    return message.to(gl.int32) & 0xFFFF


@gluon.jit
def place_of_weights(
    expert,
    row,
    k,
    IN_FEATURES: gl.constexpr,
    WEIGHT_ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    IS_BLOCK_MAJOR: gl.constexpr,
):
    """Row and column of step k of an expert's row, where all experts' weights are one matrix: see `weight_row_boxes`."""
    NUM_STEPS: gl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    if IS_BLOCK_MAJOR:
        return (expert * NUM_STEPS + k) * WEIGHT_ROWS + row, 0
    else:
        return expert * WEIGHT_ROWS + row, k * BLOCK_K
