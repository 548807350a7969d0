"""The sum of the ranks' partial sums, in rank order. One program a block of elements."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def sum_ranks_kernel(
    output_ptr,  # [num_elements] bf16
    partial_ptr,  # NUM_RANKS times `rank_stride` elements bf16
    num_elements,
    rank_stride,
    NUM_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64 first: rows times columns times ranks passes int32.
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_element = element < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    address = element
    for _ in range(NUM_RANKS):
        total += tl.load(partial_ptr + address, mask=is_element, other=0.0).to(tl.float32)
        address += rank_stride
    tl.store(output_ptr + element, total.to(tl.bfloat16), mask=is_element)
