"""One matrix of experts by itself: what a layer is made of whose activation no kernel has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, library

from moe.expert_ids import as_int32_ids
from moe.flow import Permutation, TopK
from moe.gemm.backward.kernels import backward_stage_for
from moe.gemm.config import GemmConfig, WeightFormat, WeightLayout
from moe.gemm.kernels import gemm2_for
from moe.gemm.reference import grouped_gemm_reference
from moe.gemm.weight_format import matrix_shape
from moe.permute.config import MIN_TILE_ROWS, FinalizeConfig, PermuteConfig
from moe.permute.kernels import finalizer_for, permuter_for
from moe.runtime.device import expect_kernels
from moe.traced import define


def expert_linear(
    rows: Tensor, expert_ids: Tensor, weights: Tensor, weight_layout: int, is_batch_invariant: bool
) -> Tensor:
    """rows[n] @ weights[expert_ids[n]]^T, summed in float32 and rounded to bfloat16 once.

    Args:
        rows: [N, K] bfloat16.
        expert_ids: [N] of any integer dtype; the row of an id outside [0, E) is 0.
        weights: [E, M, K] bfloat16, or [E, K, M] where `weight_layout` is MajorMn.

    Returns:
        [N, M] bfloat16. The operator moe::expert_linear passes gradients to rows and weights; this function does not.
    """
    num_experts = weights.shape[0]
    out_features, in_features = matrix_shape(weights, WeightLayout(weight_layout))
    if not len(rows):
        return rows.new_empty(0, out_features)
    permute, gemm, finalize = _stages(
        num_experts, in_features, out_features, weight_layout, is_batch_invariant, rows.device
    )
    topk = _topk(expert_ids, num_experts)
    permutation: Permutation = permute(topk)
    # Padding rows have the number -1, and rows beyond the last tile any.
    source = permutation.token_of_row.clamp(0, len(rows) - 1).long()
    return finalize(gemm(rows[source], weights, permutation), topk, permutation)


def _topk(expert_ids: Tensor, num_experts: int) -> TopK:
    ids = as_int32_ids(expert_ids[:, None], num_experts)
    return TopK(ids, torch.ones(ids.shape, dtype=torch.bfloat16, device=ids.device))


def _fake_linear(
    rows: Tensor, expert_ids: Tensor, weights: Tensor, weight_layout: int, is_batch_invariant: bool
) -> Tensor:
    return rows.new_empty(rows.shape[0], matrix_shape(weights, WeightLayout(weight_layout))[0])


def _weight_gradient(
    grad: Tensor, rows: Tensor, expert_ids: Tensor, num_experts: int, weight_layout: int, is_batch_invariant: bool
) -> Tensor:
    """For each expert the sum over its rows of grad[n]^T rows[n], in the weights' layout; exactly 0 where it has none."""
    sizes = (num_experts, rows.shape[1], grad.shape[1], weight_layout, is_batch_invariant)
    if not len(rows):
        return _fake_gradient(grad, rows, expert_ids, num_experts, weight_layout, is_batch_invariant).zero_()
    permute, _, _ = _stages(*sizes, rows.device)
    permutation: Permutation = permute(_topk(expert_ids, num_experts))
    token = permutation.token_of_row
    row = torch.arange(len(token), device=rows.device)
    is_row = (token >= 0) & (row < permutation.num_rows)
    gathered = torch.where(is_row[:, None], rows[token.clamp(0, len(rows) - 1).long()], 0.0)
    return _wgrad(*sizes, rows.device)(grad.contiguous(), gathered, permutation)


def _fake_gradient(
    grad: Tensor, rows: Tensor, expert_ids: Tensor, num_experts: int, weight_layout: int, is_batch_invariant: bool
) -> Tensor:
    shape = (grad.shape[1], rows.shape[1])
    return rows.new_empty(num_experts, *(shape if weight_layout == WeightLayout.MajorK else shape[::-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, expert_ids, weights, *ctx.numbers = inputs
    wants_rows, _, wants_weights, *_ = ctx.needs_input_grad
    ctx.num_experts = weights.shape[0]
    ctx.save_for_backward(rows if wants_weights else None, expert_ids, weights if wants_rows else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, expert_ids, weights = ctx.saved_tensors
    weight_layout, is_batch_invariant = ctx.numbers
    grad_rows = grad_weights = None
    if weights is not None:
        other = WeightLayout.MajorMn if weight_layout == WeightLayout.MajorK else WeightLayout.MajorK
        grad_rows = torch.ops.moe.expert_linear(grad.contiguous(), expert_ids, weights, int(other), is_batch_invariant)
    if rows is not None:
        numbers = (ctx.num_experts, weight_layout, is_batch_invariant)
        grad_weights = torch.ops.moe.expert_linear_weight_gradient(grad, rows, expert_ids, *numbers)
    return grad_rows, None, grad_weights, None, None


define(
    "expert_linear_weight_gradient",
    library.infer_schema(_weight_gradient, mutates_args=()),
    _weight_gradient,
    _fake_gradient,
)
define("expert_linear", library.infer_schema(expert_linear, mutates_args=()), expert_linear, _fake_linear)
library.register_autograd("moe::expert_linear", _backward, setup_context=_keep)


@cache
def _stages(
    num_experts: int,
    in_features: int,
    out_features: int,
    weight_layout: int,
    is_batch_invariant: bool,
    device: torch.device,
) -> tuple[Callable[..., Permutation], Callable[..., Tensor], Callable[..., Tensor]]:
    permute = PermuteConfig(
        num_experts=num_experts,
        num_local_experts=num_experts,
        top_k=1,
        tile_rows=MIN_TILE_ROWS if is_batch_invariant else None,
    )
    gemm = _gemm_config(num_experts, in_features, out_features, weight_layout, is_batch_invariant)
    permuter, _ = permuter_for(permute, device, uses_pdl=False, unit_size=None)
    finalizer, _ = finalizer_for(FinalizeConfig(), device, uses_pdl=False)
    if device.type != "cuda":
        return permuter, partial(grouped_gemm_reference, config=gemm), finalizer
    expect_kernels(device)
    return permuter, gemm2_for(gemm, uses_pdl=False)[0], finalizer


@cache
def _wgrad(
    num_experts: int,
    in_features: int,
    out_features: int,
    weight_layout: int,
    is_batch_invariant: bool,
    device: torch.device,
) -> Callable[..., Tensor]:
    gemm = _gemm_config(num_experts, in_features, out_features, weight_layout, is_batch_invariant)
    return backward_stage_for("gemm2_wgrad", gemm, gemm, device)[0]


def _gemm_config(
    num_experts: int, in_features: int, out_features: int, weight_layout: int, is_batch_invariant: bool
) -> GemmConfig:
    return GemmConfig(
        num_experts=num_experts,
        in_features=in_features,
        out_features=out_features,
        weight_format=WeightFormat(layout=WeightLayout(weight_layout)),
        kernel="swapped" if is_batch_invariant else None,  # as a batch-invariant layer
    )
