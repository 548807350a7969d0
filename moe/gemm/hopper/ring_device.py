"""Rings of stages of shared memory: a producer fills one stage after another, two consumers empty them in the same order.

Step s has stage s % stages, in the ring's turn s // stages. A barrier completes a phase each turn, and one waits for a phase by
its parity: what the barrier of a step is waited for with is reckoned here and nowhere else.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

NUM_CONSUMERS = gl.constexpr(2)


class Ring(NamedTuple):
    """Two barriers a stage: filled and emptied, each int64 [stages, 1] in shared memory."""

    filled: Any
    emptied: Any


@gluon.jit
def make_ring(NUM_STAGES: gl.constexpr, FILLED_COUNT: gl.constexpr):
    """A stage is filled after FILLED_COUNT arrivals, emptied after one of each consumer."""
    filled = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(filled.index(stage), count=FILLED_COUNT)
        mbarrier.init(emptied.index(stage), count=NUM_CONSUMERS)
    return Ring(filled, emptied)


@gluon.jit
def wait_until_filled(ring, step):
    """The step's stage, once the producer has filled it."""
    stage = step % ring.filled.shape[0]
    mbarrier.wait(ring.filled.index(stage), parity_of(ring, step))
    return stage


@gluon.jit
def wait_until_emptied(ring, step):
    """The step's stage, once the consumers have emptied it: at once in the first turn, before which all are empty."""
    stage = step % ring.filled.shape[0]
    mbarrier.wait(ring.emptied.index(stage), parity_of(ring, step) ^ 1)
    return stage


@gluon.jit
def release(ring, step, pred=True):
    """A consumer is done with the step's stage."""
    mbarrier.arrive(ring.emptied.index(step % ring.filled.shape[0]), count=1, pred=pred)


@gluon.jit
def parity_of(ring, step):
    """Of the phase in which the step's stage is filled; the phase in which it was emptied before has the other one."""
    return (step // ring.filled.shape[0]) & 1
