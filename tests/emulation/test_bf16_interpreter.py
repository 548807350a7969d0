"""bfloat16 in kernels: in the interpreter it checks our patches, on a GPU the compiler, against torch in both."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 32
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0e38, -3.0e38, 1.0e-38, float("inf"), -float("inf"), float("nan")]
TIES = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 257.0, 259.0, -(1 + 2.0**-8)]


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    index = tl.arange(0, SIDE)
    offset = index[:, None] * SIDE + index[None, :]
    tl.store(out_ptr + offset, tl.dot(tl.load(a_ptr + offset), tl.load(b_ptr + offset)))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, sum_ptr, difference_ptr, product_ptr, larger_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + index), tl.load(b_ptr + index)
    tl.store(sum_ptr + index, a + b)
    tl.store(difference_ptr + index, a - b)
    tl.store(product_ptr + index, a * b)
    tl.store(larger_ptr + index, tl.where(a > b, a, b))


@triton.jit
def cast_kernel(in_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, tl.load(in_ptr + index).to(out_ptr.dtype.element_ty))


@triton.jit
def constant_kernel(in_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = tl.load(in_ptr + index, mask=index < 2, other=-2.5)
    tl.store(out_ptr + index, value + tl.full([SIZE], 1.5, tl.bfloat16))


@triton.jit
def reduce_kernel(in_ptr, sum_ptr, largest_ptr, running_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(in_ptr + index)
    tl.store(sum_ptr, tl.sum(values, 0))
    tl.store(largest_ptr, tl.max(values, 0))
    tl.store(running_ptr + index, tl.cumsum(values, 0))


@triton.jit
def extremes_kernel(in_ptr, extremes_ptr, places_ptr, SIZE: tl.constexpr):
    values = tl.load(in_ptr + tl.arange(0, SIZE))
    tl.store(extremes_ptr, tl.max(values, 0))
    tl.store(extremes_ptr + 1, tl.min(values, 0))
    tl.store(places_ptr, tl.argmax(values, 0))
    tl.store(places_ptr + 1, tl.argmin(values, 0))


@triton.jit
def copy_few_kernel(in_ptr, out_ptr, num_values, is_wanted, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    mask = (index < num_values) & (is_wanted > 0)
    tl.store(out_ptr + index, tl.load(in_ptr + index, mask=mask, other=-1.0), mask=mask)


def random_bf16(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def test_dot_of_bf16_is_a_float32_matrix_product(triton_device) -> None:
    a = random_bf16(SIDE, SIDE, device=triton_device)
    b = random_bf16(SIDE, SIDE, device=triton_device, seed=1)
    out = torch.full((SIDE, SIDE), float("nan"), device=triton_device)
    dot_kernel[(1,)](a, b, out, SIDE=SIDE)
    # bf16 products are exact in float32; what is left is the order of SIDE additions.
    budget = SIDE * 2.0**-23 * (a.double().abs() @ b.double().abs())
    assert ((out.double() - a.double() @ b.double()).abs() <= budget).all()


def test_arithmetic_on_bf16_rounds_once(triton_device) -> None:
    a = random_bf16(64, device=triton_device)
    b = random_bf16(64, device=triton_device, seed=1)
    results = [torch.zeros_like(a) for _ in range(4)]
    arithmetic_kernel[(1,)](a, b, *results, SIZE=64)
    for result, expected in zip(results, (a + b, a - b, a * b, torch.maximum(a, b))):
        assert torch.equal(result, expected)


def test_cast_to_bf16_rounds_to_nearest_even(triton_device) -> None:
    values = torch.tensor(SPECIAL + TIES, device=triton_device)
    out = torch.zeros(len(values), dtype=torch.bfloat16, device=triton_device)
    cast_kernel[(1,)](values, out, SIZE=len(values))
    expected = values.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.int32),
        (torch.int32, torch.bfloat16),
    ],
    ids=str,
)
def test_cast_goes_by_value(source, target, triton_device) -> None:
    values = torch.arange(-16, 16, device=triton_device).to(source) * (1 if source == torch.int32 else 1.5)
    out = torch.zeros(32, dtype=target, device=triton_device)
    cast_kernel[(1,)](values, out, SIZE=32)
    assert torch.equal(out, values.to(target))


def test_constants_and_fill_values_are_bf16(triton_device) -> None:
    values = torch.tensor([1.0, 2.0], device=triton_device).bfloat16()
    out = torch.zeros(4, dtype=torch.bfloat16, device=triton_device)
    constant_kernel[(1,)](values, out, SIZE=4)
    assert out.tolist() == [2.5, 3.5, -1.0, -1.0]


def test_reductions_of_bf16_go_by_value(triton_device) -> None:
    values = torch.tensor([1.0, -2.0, 4.5, -0.5, 8.0, 0.25, -16.0, 2.0], device=triton_device).bfloat16()
    total, largest, running = (torch.zeros(size, dtype=torch.bfloat16, device=triton_device) for size in (1, 1, 8))
    reduce_kernel[(1,)](values, total, largest, running, SIZE=8)
    assert (total.item(), largest.item()) == (-2.75, 8.0)
    assert torch.equal(running, values.cumsum(0))


def test_extremes_of_bf16_and_their_places_go_by_value(triton_device) -> None:
    values = torch.tensor([1.0, -2.0, 0.5, -16.0, 8.0, 0.25, -16.0, 8.0], device=triton_device).bfloat16()
    extremes = torch.zeros(2, dtype=torch.bfloat16, device=triton_device)
    places = torch.zeros(2, dtype=torch.int32, device=triton_device)
    extremes_kernel[(1,)](values, extremes, places, SIZE=8)
    assert extremes.tolist() == [8.0, -16.0]
    assert places.tolist() == [4, 3]  # of equal ones the first


@pytest.mark.parametrize("is_wanted", [0, 1])
def test_a_mask_of_a_tensor_and_a_scalar_masks(triton_device, is_wanted) -> None:
    values, out = (torch.full((8,), value, device=triton_device) for value in (3.0, 7.0))
    copy_few_kernel[(1,)](values, out, 5, is_wanted, SIZE=8)
    assert out.tolist() == [3.0 if is_wanted and index < 5 else 7.0 for index in range(8)]
