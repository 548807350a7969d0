"""The experts' part of a call in float64, and how far from it its roundings to bfloat16 can lead."""

from __future__ import annotations

import torch
from fuzz.cases import Case, Tensors
from torch import Tensor

from moe.flow import Added, SwigluParams
from moe.gemm.config import ActivationType
from moe.testing.closeness import BF16_EPSILON
from moe.testing.problems import activated_in_float64

ROUNDINGS = 4  # of the activation, the row of gemm2, the weight and the sum, each of what is at most sum w |W2| |act|
FLOAT32 = 1.1  # what sums in float32 add, at these sizes: far less than a tenth of a rounding
# But where a product is small beside its terms, its error in float32 is of their size: of a sum, times the slope of the activation.
FLOAT32_OF_TERMS = 2.0**-20


def assert_within_roundings(
    output: Tensor, ids: Tensor, weights: Tensor, case: Case, tensors: Tensors, *, is_finalized: bool = True
) -> None:
    """Raise unless each element is as near to float64 as its roundings allow.

    Args:
        ids, weights: [T, K]; the weights without a rounding, or as they were given; those of an input as they were used.
        is_finalized: False where nothing was added yet.
    """
    exact = torch.zeros(output.shape, dtype=torch.float64)
    bound = torch.zeros(output.shape, dtype=torch.float64)
    ids, weights, hidden_states = ids.cpu(), weights.cpu(), tensors.hidden_states.cpu()
    swiglu = SwigluParams(**{name: getattr(tensors.swiglu, name).cpu() for name in case.swiglu})
    if is_finalized and tensors.added is not None:
        exact += _gated(tensors.added)
        bound += exact.abs()
    for local in range(case.num_local):
        token, choice = (ids == local + case.first_local).nonzero(as_tuple=True)
        rows, weight = hidden_states[token].double(), weights[token, choice, None].double()
        if case.weight_on == "input":
            rows = (hidden_states[token].float() * weights[token, choice, None].float()).bfloat16().double()
            weight = torch.ones_like(weight)
        first, second = (
            tensors.biases[name][local].double() if name in case.biases else torch.zeros(()).double()
            for name in ("w1", "w2")
        )
        w1, w2 = tensors.w1[local].double().T, tensors.w2[local].double().T
        product, terms = rows @ w1 + first, rows.abs() @ w1.abs() + first.abs()
        act = activated_in_float64(product, ActivationType[case.activation], local, swiglu)
        inner = act.abs() + FLOAT32_OF_TERMS / (ROUNDINGS * FLOAT32 * BF16_EPSILON) * _slope(product, terms, case)
        exact.index_add_(0, token, weight * (act @ w2 + second))
        bound.index_add_(0, token, weight.abs() * (inner @ w2.abs() + second.abs()))
    error = (output.cpu().double() - exact).abs()
    budget = ROUNDINGS * FLOAT32 * BF16_EPSILON * bound
    assert torch.isfinite(output).all()
    assert (error <= budget).all(), f"off by {(error / budget.clamp(min=1e-30)).max():.2f} budgets"


def _gated(added: Added) -> Tensor:
    values, gate = added.values.cpu().double(), added.gate
    if isinstance(gate, Tensor):
        return gate.cpu().double()[:, None] * values
    return values * (1.0 if gate is None else gate)


def _slope(product: Tensor, terms: Tensor, case: Case) -> Tensor:
    """How much an activation moves, at most, where its input moves by `terms`: no slope is above 2, but that of a square or factor."""
    if not case.is_gated:
        return 2 * terms * (1 + product.abs())
    gate, up = product.abs().chunk(2, dim=1)
    of_gate, of_up = terms.chunk(2, dim=1)
    return 2 * (of_gate * (2 + up) + of_up * (1 + gate))
