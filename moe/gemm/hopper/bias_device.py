"""Biases of the weight rows of a piece of work: from global memory by the producer, with the message, to what sums begin with.

The producer loads a piece's biases when it learns of the piece, and sends them when it starts with it, so nobody waits for
them. Consumers begin their sums with them in place of zeros: they take no time of an epilogue, and no registers beside sums.
"""
# mypy: allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe.gemm.hopper.ring_device import release
from moe.gemm.hopper.work_device import NUM_SLOTS, expert_of


@gluon.jit
def lanes_of_biases(NUM_BIASES: gl.constexpr):
    """0 .. NUM_BIASES, in the layout of the biases that a producer sends."""
    return gl.arange(0, NUM_BIASES, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def load_biases(bias_ptr, message, row, in_row, WEIGHT_ROWS: gl.constexpr):
    """fp32 biases of stored rows `row` of the message's expert; zeros where not in_row, and where the message is the end.

    Args:
        bias_ptr: [E_local, WEIGHT_ROWS] bf16 or fp32.
    """
    ptrs = bias_ptr + expert_of(message) * WEIGHT_ROWS + row
    return gl.load(ptrs, mask=in_row & (message >= 0), other=0.0).to(gl.float32)


@gluon.jit
def biases_of(mail, count, FIRST: gl.constexpr, SIZE: gl.constexpr, layout: gl.constexpr):
    """Biases FIRST .. FIRST + SIZE of message number `count`, which must not have been released."""
    biases = mail.biases.index(count % NUM_SLOTS)
    return biases.slice(FIRST, SIZE).load(layout)


@gluon.jit
def pin_sums(sums):
    """The same values, each in a register of its own from here on: else ptxas may copy them between one wgmma and the next."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [sums], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def release_biases(mail, count):
    """A consumer has read the biases of message number `count`, if there are any."""
    if mail.biases.shape[1] > 1:
        release(mail.ring, count)
