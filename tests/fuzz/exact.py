"""The experts' part of a call in float64, and how far from it three roundings to bfloat16 can lead."""

from __future__ import annotations

import torch
from fuzz.cases import Case, Tensors
from torch import Tensor

from moe.testing.closeness import BF16_EPSILON

ROUNDINGS = 4  # of the activation, the row of gemm2, the weight and the sum, each of what is at most sum w |W2| |act|
FLOAT32 = 1.1  # what sums in float32 add, at these sizes: far less than a tenth of a rounding


def assert_within_roundings(output: Tensor, ids: Tensor, weights: Tensor, case: Case, tensors: Tensors) -> None:
    """Raise unless each element is as near to float64 as its roundings allow.

    Args:
        ids, weights: [T, K]; the weights without a rounding, or as they were given.
    """
    exact = torch.zeros(output.shape, dtype=torch.float64)
    bound = torch.zeros(output.shape, dtype=torch.float64)
    ids, weights, hidden_states = ids.cpu(), weights.cpu().double(), tensors.hidden_states.cpu().double()
    for local in range(case.num_local):
        token, choice = (ids == local + case.first_local).nonzero(as_tuple=True)
        act = _activation(hidden_states[token] @ tensors.w1[local].double().T, local, case, tensors)
        weight = weights[token, choice, None]
        w2 = tensors.w2[local].double().T
        exact.index_add_(0, token, weight * (act @ w2))
        bound.index_add_(0, token, weight.abs() * (act.abs() @ w2.abs()))
    error = (output.cpu().double() - exact).abs()
    budget = ROUNDINGS * FLOAT32 * BF16_EPSILON * bound
    assert torch.isfinite(output).all()
    assert (error <= budget).all(), f"off by {(error / budget.clamp(min=1e-30)).max():.2f} budgets"


def _activation(product: Tensor, local: int, case: Case, tensors: Tensors) -> Tensor:
    if not case.is_gated:
        return product.clamp(min=0) ** 2
    gate, up = product.chunk(2, dim=1)
    numbers = {name: getattr(tensors.swiglu, name)[local].double().cpu() for name in case.swiglu}
    limit = numbers.get("clamp_limit", torch.tensor(float("inf"), dtype=torch.float64))
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(numbers.get("alpha", 1.0) * gate) * (up + numbers.get("beta", 0.0))
