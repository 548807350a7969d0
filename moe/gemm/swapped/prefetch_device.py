"""Bringing weights to L2 ahead of their use, in Gluon: apart from Triton's, so that the portable kernels import no Gluon."""
# mypy: allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe.gemm.prefetch_device import BYTES, PREFETCH


@gluon.jit
def prefetch_weights_by_128(weights_ptr, program):
    """`prefetch_weights` in every program, by a partition of 128 threads."""
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    address = weights_ptr.to(gl.int64) // 16 * 16 + program.to(gl.int64) * BYTES + thread * (BYTES // 128)
    gl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, BYTES // 128], dtype=gl.int32, is_pure=False, pack=1)
