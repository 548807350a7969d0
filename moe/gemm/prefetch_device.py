"""Bringing weights to L2 ahead of their use."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

# Of a program. 8.6 MB over 132 programs: about what memory delivers while a plan is made (docs/measured_facts.md).
BYTES = tl.constexpr(1 << 16)
PREFETCH = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;")


@triton.jit
def prefetch_weights(weights_ptr, program, PROGRAMS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for the program-th BYTES bytes of weights, in the first PROGRAMS programs; THREADS threads share them."""
    if program < PROGRAMS:
        # Prefetches start at multiples of 16 bytes, which weights in the middle of a storage may not do.
        start = weights_ptr.to(tl.int64) // 16 * 16 + program.to(tl.int64) * BYTES
        address = start + tl.arange(0, THREADS) * (BYTES // THREADS)
        tl.inline_asm_elementwise(
            PREFETCH, "=r,l,r", [address, BYTES // THREADS], dtype=tl.int32, is_pure=False, pack=1
        )
