"""The backward stages in torch: an expert at a time in fp32, or in float64 where inputs are. Defines what is right; any device.

With g the gradient of the layer's output, e the expert and s the routing weight of row r, and t its token:

    dh = g[t] @ W2[e]                 grad_s = <dh, h>, with h = act(gate_up)
    grad_gate_up = act'(gate_up) s dh
    grad_x[t] = sum over its rows of grad_gate_up @ W1[e]
    grad_W1[e] = sum over its rows of grad_gate_up^T x[t]
    grad_W2[e] = sum over its rows of g[t]^T (s h)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.checks import no_case
from moe.flow import Gemm2Gradients, KeptGemm1, Permutation, SwigluParams, TopK
from moe.gemm.backward.checks import (
    check_gemm1_dgrad,
    check_gemm1_keeping,
    check_gemm1_wgrad,
    check_gemm2_dgrad,
    check_gemm2_wgrad,
    half_columns,
    parameter_dtype,
    reference_dtype,
)
from moe.gemm.config import ActivationType, GemmConfig, WeightLayout
from moe.gemm.reference import rows_of_experts


class ActivationGradients(NamedTuple):
    """Of one expert's rows: what SwiGLU gives, and its derivatives by gate, up and its three parameters, each [rows, I]."""

    value: Tensor
    by_gate: Tensor
    by_up: Tensor | None = None
    by_alpha: Tensor | None = None
    by_beta: Tensor | None = None
    by_clamp_limit: Tensor | None = None


def gemm1_keeping_reference(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """gemm1, and the product before its activation.

    Args:
        hidden_states: [T, H] bf16.
        weights: bf16, config.weight_shape.
        config: gemm1's.
        swiglu: as gemm1 takes it.

    Returns:
        activation [P, I] bf16, computed from the product before it is rounded, as gemm1 does; gate_up [P, 2I] bf16 (or [P, I]
        where not gated). Padding rows are undefined.

    Raises:
        ValueError: naming the tensor, what was wanted and what came; or a config without gradients.
    """
    dtype = reference_dtype(hidden_states)
    check_gemm1_keeping(config, hidden_states, weights, permutation, swiglu, dtype=dtype)
    activation = hidden_states.new_empty(permutation.max_rows, config.out_features)
    gate_up = hidden_states.new_empty(permutation.max_rows, config.weight_rows)
    for expert, rows in rows_of_experts(permutation):
        token = permutation.token_of_row[rows]
        product = _matmul(hidden_states[token], _matrix(weights[expert], config).T)
        gate_up[rows] = product.to(dtype)
        activation[rows] = activation_gradients(product, expert, config, swiglu).value.to(dtype)
    return KeptGemm1(activation, gate_up)


def gemm2_dgrad_reference(
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: GemmConfig,
    gemm1: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Gemm2Gradients:
    """Gradients through gemm2, the routing weight and the activation.

    Args:
        grad_output: [T, H] bf16, of the layer's output; gathered, so neither weighted nor permuted.
        weights: W2, bf16, config.weight_shape.
        gate_up: [P, 2I] or [P, I] bf16, as `gemm1_keeping` gives it. Padding rows may be anything.
        topk: weights [T, K] bf16 or float32; ids are not read.
        config: gemm2's; `gemm1` is the config of the stage that made gate_up, with its activation.
        swiglu: as gemm1 took it.

    Returns:
        grad_gate_up and weighted_activation in bf16, each rounded once, padding rows exactly 0; grad_weights [T, K] float32,
        exactly 0 for slots without a row. The activation in them is computed anew from gate_up.

    Raises:
        ValueError: naming the tensor, what was wanted and what came; or a config without gradients.
    """
    dtype = reference_dtype(grad_output)
    check_gemm2_dgrad(config, gemm1, grad_output, weights, gate_up, topk, permutation, swiglu, dtype=dtype)
    wide = parameter_dtype(dtype)
    grad_gate_up = torch.zeros_like(gate_up)
    weighted = gate_up.new_zeros(permutation.max_rows, gemm1.out_features)
    grad_of_row = gate_up.new_zeros(permutation.max_rows, dtype=wide)
    weight_of_row = _weight_of_row(topk, permutation, wide)
    for expert, rows in rows_of_experts(permutation):
        token, weight = permutation.token_of_row[rows], weight_of_row[rows, None]
        grad_activation = _matmul(grad_output[token], _matrix(weights[expert], config))
        act = activation_gradients(gate_up[rows].to(wide), expert, gemm1, swiglu)
        grad_of_row[rows] = (grad_activation * act.value).sum(dim=1)
        grad_gate_up[rows] = _joined(act, weight * grad_activation, gemm1).to(dtype)
        weighted[rows] = (weight * act.value).to(dtype)
    has_row = permutation.row_of_slot >= 0
    grad_weights = grad_of_row[permutation.row_of_slot.clamp(min=0).long()] if len(grad_of_row) else None
    zeros = torch.zeros(has_row.shape, dtype=wide, device=has_row.device)
    grad_weights = zeros if grad_weights is None else torch.where(has_row, grad_weights, zeros)
    return Gemm2Gradients(grad_gate_up, weighted, grad_weights)


def gemm1_dgrad_reference(
    grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig
) -> Tensor:
    """grad_gate_up @ W1[expert_of_row]: what each row adds to the gradient of its token.

    Args:
        grad_gate_up: [P, 2I] or [P, I] bf16, as `gemm2_dgrad` gives it.
        weights: W1, bf16, config.weight_shape.
        config: gemm1's.

    Returns:
        [P, H] bf16; padding rows are undefined. A sum over a token's rows by finalize, with weights of one, is its gradient.

    Raises:
        ValueError: naming the tensor, what was wanted and what came; or a config without gradients.
    """
    dtype = reference_dtype(grad_gate_up)
    check_gemm1_dgrad(config, grad_gate_up, weights, permutation, dtype=dtype)
    out = grad_gate_up.new_empty(permutation.max_rows, config.in_features)
    for expert, rows in rows_of_experts(permutation):
        out[rows] = _matmul(grad_gate_up[rows], _matrix(weights[expert], config)).to(dtype)
    return out


def gemm1_wgrad_reference(
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of W1: for each expert, grad_gate_up^T times its tokens, which are gathered.

    Args:
        grad_gate_up: [P, 2I] or [P, I] bf16, padding rows 0, as `gemm2_dgrad` gives it.
        hidden_states: [T, H] bf16.
        config: gemm1's.
        out: config.weight_shape float32, memory of its own, that the gradient is added to; None allocates.

    Returns:
        config.weight_shape in bf16, exactly 0 for experts without rows; or `out`, where those were left alone.

    Raises:
        ValueError: naming the tensor, what was wanted and what came; or a config without gradients.
    """
    dtype = reference_dtype(grad_gate_up)
    check_gemm1_wgrad(config, grad_gate_up, hidden_states, permutation, out, dtype=dtype)
    grad = hidden_states.new_zeros(config.weight_shape) if out is None else out
    for expert, rows in rows_of_experts(permutation):
        tokens = hidden_states[permutation.token_of_row[rows]]
        _add_matrix(grad, expert, _matmul(grad_gate_up[rows].T, tokens), config, is_sum=out is not None)
    return grad


def gemm2_wgrad_reference(
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of W2: for each expert, the gradients of its tokens' outputs, gathered, times weighted_activation.

    Args:
        grad_output: [T, H] bf16, of the layer's output.
        weighted_activation: [P, I] bf16, padding rows 0, as `gemm2_dgrad` gives it.
        config: gemm2's.
        out: config.weight_shape float32, memory of its own, that the gradient is added to; None allocates.

    Returns:
        config.weight_shape in bf16, exactly 0 for experts without rows; or `out`, where those were left alone.

    Raises:
        ValueError: naming the tensor, what was wanted and what came; or a config without gradients.
    """
    dtype = reference_dtype(grad_output)
    check_gemm2_wgrad(config, grad_output, weighted_activation, permutation, out, dtype=dtype)
    grad = grad_output.new_zeros(config.weight_shape) if out is None else out
    for expert, rows in rows_of_experts(permutation):
        grads = grad_output[permutation.token_of_row[rows]]
        _add_matrix(grad, expert, _matmul(grads.T, weighted_activation[rows]), config, is_sum=out is not None)
    return grad


def swiglu_gradients_reference(
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: GemmConfig,
    gemm1: GemmConfig,
    swiglu: SwigluParams,
) -> SwigluParams:
    """Gradients of SwiGLU's parameters, each [E_local] float32, None where there is no parameter. Arguments as `gemm2_dgrad`.

    Multiplies by W2 anew, and reads the tile list on the host: parameters are hardly ever trained.

    Raises:
        ValueError: naming the tensor, what was wanted and what came; or a config without gradients.
    """
    dtype = reference_dtype(grad_output)
    check_gemm2_dgrad(config, gemm1, grad_output, weights, gate_up, topk, permutation, swiglu, dtype=dtype)
    wide = parameter_dtype(dtype)
    names = [name for name in ("alpha", "beta", "clamp_limit") if getattr(swiglu, name) is not None]
    grads = {name: torch.zeros_like(getattr(swiglu, name)) for name in names}
    weight_of_row = _weight_of_row(topk, permutation, wide)
    for expert, rows in rows_of_experts(permutation):
        token, weight = permutation.token_of_row[rows], weight_of_row[rows, None]
        grad_activation = weight * _matmul(grad_output[token], _matrix(weights[expert], config))
        act = activation_gradients(gate_up[rows].to(wide), expert, gemm1, swiglu)
        for name in names:
            grads[name][expert] = (grad_activation * getattr(act, f"by_{name}")).sum()
    return SwigluParams(**grads)


def activation_gradients(
    product: Tensor, expert: int, config: GemmConfig, swiglu: SwigluParams | None
) -> ActivationGradients:
    """The activation of one expert's rows, from the product [rows, 2I] (or [rows, I]) as gate_up has its columns."""
    match config.activation:
        case ActivationType.Swiglu:
            gate, up = (product[:, columns] for columns in half_columns(config))
            return _swiglu_gradients(gate, up, expert, swiglu or SwigluParams())
        case ActivationType.Relu2:
            positive = product.clamp(min=0)
            return ActivationGradients(positive.square(), 2 * positive)
    raise no_case(config.activation, "moe/gemm/backward/reference.py, activation_gradients")


def _swiglu_gradients(gate: Tensor, up: Tensor, expert: int, swiglu: SwigluParams) -> ActivationGradients:
    """Where a value lies on its limit, it counts as not clamped, as in torch.clamp."""
    limit = torch.inf if swiglu.clamp_limit is None else swiglu.clamp_limit[expert]
    alpha = 1.0 if swiglu.alpha is None else swiglu.alpha[expert]
    beta = 0.0 if swiglu.beta is None else swiglu.beta[expert]
    clamped_gate, below = gate.clamp(max=limit), up.clamp(max=limit)
    clamped_up = below.clamp(min=-limit)
    is_gate_free, is_up_free, is_above_floor = gate <= limit, up <= limit, below >= -limit
    share = torch.sigmoid(alpha * clamped_gate)
    gated, shifted = clamped_gate * share, clamped_up + beta
    slope = share * (1 - share)
    by_clamped_gate = shifted * (share + alpha * clamped_gate * slope)
    by_clamped_up = gated
    sign = torch.where(is_above_floor, (~is_up_free).to(gate.dtype), -1.0)
    return ActivationGradients(
        value=gated * shifted,
        by_gate=torch.where(is_gate_free, by_clamped_gate, 0.0),
        by_up=torch.where(is_up_free & is_above_floor, by_clamped_up, 0.0),
        by_alpha=clamped_gate.square() * slope * shifted,
        by_beta=gated,
        by_clamp_limit=torch.where(is_gate_free, 0.0, by_clamped_gate) + sign * by_clamped_up,
    )


def _joined(act: ActivationGradients, grad_activation: Tensor, config: GemmConfig) -> Tensor:
    """[rows, I] -> the gradient of the product, columns as gate_up has them."""
    if act.by_up is None:
        return act.by_gate * grad_activation
    joined = grad_activation.new_empty(len(grad_activation), config.weight_rows)
    for columns, slope in zip(half_columns(config), (act.by_gate, act.by_up)):
        joined[:, columns] = slope * grad_activation
    return joined


def _weight_of_row(topk: TopK, permutation: Permutation, dtype: torch.dtype) -> Tensor:
    """[P]: each slot's routing weight at its row; 0 on padding rows."""
    row = permutation.row_of_slot.flatten().long()
    weight_of_row = torch.zeros(permutation.max_rows, dtype=dtype, device=row.device)
    weight_of_row[row[row >= 0]] = topk.weights.flatten()[row >= 0].to(dtype)
    return weight_of_row


def _matmul(first: Tensor, second: Tensor) -> Tensor:
    """first [M, K] @ second [K, N] in fp32, or in float64 where that is what they are; whatever torch.autocast says."""
    wide = parameter_dtype(reference_dtype(first))
    with torch.autocast(first.device.type, enabled=False):
        return first.to(wide) @ second.to(wide)


def _matrix(stored: Tensor, config: GemmConfig) -> Tensor:
    """One expert's stored weight as [N, K], rows as they are stored."""
    return stored.T if config.weight_format.layout is WeightLayout.MajorMn else stored


def _add_matrix(grad: Tensor, expert: int, matrix: Tensor, config: GemmConfig, *, is_sum: bool) -> None:
    stored = _matrix(matrix, config)
    if is_sum:
        grad[expert] += stored
    else:
        grad[expert] = stored  # rounded as it is copied
