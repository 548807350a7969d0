"""A Triton gemm2 as somebody else would write it: right in the interpreter, as on a GPU, once moe.testing is imported."""

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from moe.testing import check_gemm2  # noqa: E402


@triton.jit
def my_gemm2_kernel(
    rows_ptr, weights_ptr, out_ptr, expert_of_tile_ptr, num_tiles_ptr, N, K, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    tile, block = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(num_tiles_ptr):
        return
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_of_tile_ptr + tile).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        a = tl.load(rows_ptr + row[:, None] * K + k, mask=(k < K)[None, :], other=0.0)
        where = expert * N * K + column[None, :] * K + k[:, None]
        b = tl.load(weights_ptr + where, mask=(column < N)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + row[:, None] * N + column, total.to(tl.bfloat16), mask=(column < N)[None, :])


def my_gemm2(rows, weights, permutation):
    n, k = weights.shape[1:]
    out = rows.new_empty(rows.shape[0], n)
    grid = (permutation.max_tiles, triton.cdiv(n, 32))
    if grid[0]:
        tensors = rows, weights, out, permutation.expert_of_tile, permutation.num_tiles
        my_gemm2_kernel[grid](*tensors, n, k, ROWS=permutation.tile_rows, BLOCK=32)
    return out


def test_a_triton_gemm2_of_ones_own_passes_the_contract(triton_device):
    check_gemm2(my_gemm2, device=triton_device)


def test_one_that_forgets_the_expert_is_found(triton_device):
    def forgets(rows, weights, permutation):
        return my_gemm2(rows, weights[:1].expand_as(weights).contiguous(), permutation)

    with pytest.raises(AssertionError, match="gemm2, 1 tokens: AssertionError: relative Frobenius error"):
        check_gemm2(forgets, device=triton_device)
