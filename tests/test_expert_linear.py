"""One matrix of experts by itself: rows of each expert, ids of none, and the operator."""

from __future__ import annotations

import pytest
import torch

from moe.expert_linear import expert_linear
from moe.gemm.config import WeightLayout
from moe.testing.closeness import relative_error


@pytest.mark.parametrize("layout", [WeightLayout.MajorK, WeightLayout.MajorMn], ids=lambda layout: layout.name)
@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_each_row_is_multiplied_by_its_experts_matrix(
    layout: WeightLayout, is_batch_invariant: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 48, 32, generator=generator).bfloat16()
    rows = torch.randn(37, 32, generator=generator).bfloat16()
    ids = torch.randint(-1, 6, (37,), generator=generator)
    exact = torch.stack(
        [weights[e].double() @ row.double() if 0 <= e < 5 else torch.zeros(48).double() for e, row in zip(ids, rows)]
    )
    stored = weights if layout is WeightLayout.MajorK else weights.mT.contiguous()
    result = expert_linear(rows.to(device), ids.to(device), stored.to(device), int(layout), is_batch_invariant).cpu()
    assert result.dtype is torch.bfloat16
    assert ((result.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
    assert not result[(ids < 0) | (ids > 4)].any()


def test_no_rows_give_none() -> None:
    weights = torch.zeros(5, 48, 32, dtype=torch.bfloat16)
    empty = torch.zeros(0, 32, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.int64)
    assert expert_linear(*empty, weights, int(WeightLayout.MajorK), False).shape == (0, 48)
    assert expert_linear(*empty, weights, int(WeightLayout.MajorMn), False).shape == (0, 32)


def test_a_nan_row_stays_a_row(device: torch.device) -> None:
    weights = torch.ones(2, 8, 8, dtype=torch.bfloat16, device=device)
    rows = torch.ones(3, 8, dtype=torch.bfloat16, device=device)
    rows[1] = float("nan")
    result = expert_linear(rows, torch.tensor([0, 0, 1], device=device), weights, int(WeightLayout.MajorK), False)
    assert result.isnan().all(dim=1).tolist() == [False, True, False]


def test_the_operator_is_what_torch_asks_of_one() -> None:
    arguments = (torch.zeros(3, 32).bfloat16(), torch.tensor([0, 1, 7]), torch.zeros(2, 48, 32).bfloat16(), 0, False)
    torch.library.opcheck(torch.ops.moe.expert_linear.default, arguments)


@pytest.mark.parametrize("layout", [WeightLayout.MajorK, WeightLayout.MajorMn], ids=lambda layout: layout.name)
def test_gradients_of_rows_and_weights(layout: WeightLayout, device: torch.device, poisoned_memory: None) -> None:
    generator = torch.Generator().manual_seed(0)
    logical = torch.randn(5, 48, 32, generator=generator).bfloat16()
    ids = torch.randint(-1, 6, (37,), generator=generator)
    ids[ids == 2] = 3  # an expert without rows
    rows, grad = (torch.randn(37, size, generator=generator).bfloat16() for size in (32, 48))
    exact_rows, exact_weights = rows.double().requires_grad_(), logical.double().requires_grad_()
    is_expert = (ids >= 0) & (ids < 5)
    exact = torch.einsum("nmk,nk->nm", exact_weights[ids.clamp(0, 4)], exact_rows) * is_expert[:, None]
    exact.backward(grad.double())
    stored = logical if layout is WeightLayout.MajorK else logical.mT.contiguous()
    leaves = [tensor.to(device).requires_grad_() for tensor in (rows, stored)]
    output = torch.ops.moe.expert_linear(leaves[0], ids.to(device), leaves[1], int(layout), False)
    output.backward(grad.to(device))
    got = leaves[1].grad if layout is WeightLayout.MajorK else leaves[1].grad.mT
    assert relative_error(leaves[0].grad, exact_rows.grad.to(device)) <= 1e-2
    assert relative_error(got, exact_weights.grad.to(device)) <= 1e-2
    assert not leaves[0].grad[~is_expert].any()
    assert not got[2].any()


def test_the_operators_gradient_is_what_torch_asks_of_one() -> None:
    rows, weights = torch.randn(3, 32).bfloat16().requires_grad_(), torch.randn(2, 48, 32).bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.moe.expert_linear.default, (rows, torch.tensor([0, 1, 7]), weights, 0, False))
    arguments = (torch.randn(3, 48).bfloat16(), rows.detach(), torch.tensor([0, 1, 7]), 2, 0, False)
    torch.library.opcheck(torch.ops.moe.expert_linear_weight_gradient.default, arguments)
    empty = torch.zeros(0, 32).bfloat16().requires_grad_()
    torch.ops.moe.expert_linear(empty, torch.zeros(0, dtype=torch.int64), weights, 0, False).sum().backward()
    assert not weights.grad.any()
