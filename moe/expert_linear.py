"""One matrix of experts by itself: what a layer is made of whose activation no kernel has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, library

from moe.expert_ids import as_int32_ids
from moe.flow import Permutation, TopK
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
        [N, M] bfloat16.
    """
    num_experts = weights.shape[0]
    out_features, in_features = matrix_shape(weights, WeightLayout(weight_layout))
    if not len(rows):
        return rows.new_empty(0, out_features)
    permute, gemm, finalize = _stages(
        num_experts, in_features, out_features, weight_layout, is_batch_invariant, rows.device
    )
    ids = as_int32_ids(expert_ids[:, None], num_experts)
    topk = TopK(ids, torch.ones(ids.shape, dtype=torch.bfloat16, device=rows.device))
    permutation: Permutation = permute(topk)
    # Padding rows have the number -1, and rows beyond the last tile any.
    source = permutation.token_of_row.clamp(0, len(rows) - 1).long()
    return finalize(gemm(rows[source], weights, permutation), topk, permutation)


def _fake_linear(
    rows: Tensor, expert_ids: Tensor, weights: Tensor, weight_layout: int, is_batch_invariant: bool
) -> Tensor:
    return rows.new_empty(rows.shape[0], matrix_shape(weights, WeightLayout(weight_layout))[0])


define("expert_linear", library.infer_schema(expert_linear, mutates_args=()), expert_linear, _fake_linear)


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
    gemm = GemmConfig(
        num_experts=num_experts,
        in_features=in_features,
        out_features=out_features,
        weight_format=WeightFormat(layout=WeightLayout(weight_layout)),
        kernel="swapped" if is_batch_invariant else None,  # as a batch-invariant layer
    )
    permuter, _ = permuter_for(permute, device, uses_pdl=False, unit_size=None)
    finalizer, _ = finalizer_for(FinalizeConfig(), device, uses_pdl=False)
    if device.type != "cuda":
        return permuter, partial(grouped_gemm_reference, config=gemm), finalizer
    expect_kernels(device)
    return permuter, gemm2_for(gemm, uses_pdl=False)[0], finalizer
