"""From accumulators to the result in global memory."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from moe.gemm.activation_device import activate_gated

NOWHERE = gl.constexpr(1 << 30)  # a row past any tensor's end: a TMA store there writes nothing


class Output(NamedTuple):
    """Where results go."""

    desc: Any  # [P, OUT_FEATURES] bf16
    buffers: Any  # shared memory that they pass through


@gluon.jit
def activate_halves(first, second, parameters, ACTIVATION: gl.constexpr, IS_GATE_FIRST: gl.constexpr):
    """The activation of products with the weight's first and second half -> bf16."""
    gate = first if IS_GATE_FIRST else second
    up = second if IS_GATE_FIRST else first
    return activate_gated(gate, up, parameters, ACTIVATION).to(gl.bfloat16)


@gluon.jit
def pin(result):
    """The same values, computed here: else they may be computed after the next wgmma, which must then wait (C7514)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [result], dtype=gl.bfloat16, is_pure=False, pack=2)


@gluon.jit
def put(result, buffer, PENDING: gl.constexpr):
    """A result into shared memory from which TMA may copy, once no more than PENDING copies to global memory are going on."""
    tma.store_wait(PENDING)
    buffer.store(result)
    fence_async_shared()
