"""Stage 3 for few tokens: each slot's token times its expert's W1, and the activation. A row is a slot."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import SwigluParams, TopK
from moe.fused.few_tokens.checks import check_slots
from moe.fused.few_tokens.config import FewTokenConfig
from moe.fused.few_tokens.gemm1_kernel import few_token_gemm1_kernel
from moe.fused.few_tokens.tile import default_slot_tile
from moe.gemm.weight_format import weight_strides
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel
from moe.runtime.triton_versions import streaming_registers


def few_token_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    topk: TopK,
    *,
    config: FewTokenConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """activation(hidden_states[slot // K] @ W1[expert_ids[slot]]^T + bias), without a permutation.

    Every slot reads its expert's weights by itself: for few tokens, whose experts mostly differ.

    Args:
        hidden_states: [T, H] bf16.
        weights: bf16, config.gemm1.weight_shape.
        topk: expert_ids [T, K] int32; ids that are not local, garbage included, are skipped.
        swiglu: parameters of the activation by local expert, [E_local] fp32 each.
        bias: [E_local, rows of an expert's weight] bf16 or float32, in the order of those rows.

    Returns:
        [T * K, I] bf16, rounded once, from the fp32 activation. Rows of skipped slots are uninitialised memory.

    Raises:
        ValueError: where a tensor does not fit the config.
    """
    check_slots(config, topk, hidden_states, weights, swiglu, bias)
    return launch_few_token_gemm1(hidden_states, weights, topk, config=config, swiglu=swiglu, bias=bias)


def launch_few_token_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    topk: TopK,
    *,
    config: FewTokenConfig,
    swiglu: SwigluParams | None,
    bias: Tensor | None = None,
) -> Tensor:
    """`few_token_gemm1` of tensors that were checked."""
    num_slots = topk.expert_ids.numel()
    out = new_scratch(hidden_states, (num_slots, config.gemm1.out_features))
    if not num_slots:
        return out
    kernel, num_blocks = _kernel_of(config, hidden_states.device)
    alpha, beta, clamp_limit = (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)
    tensors = (hidden_states, weights, topk.expert_ids, out, alpha, beta, clamp_limit, bias)
    kernel.launch((num_slots, num_blocks, 1), *tensors)
    return out


@functools.cache
def _kernel_of(config: FewTokenConfig, device: torch.device) -> tuple[TritonKernel, int]:
    """The kernel of a config on a device, and into how many programs it cuts a row."""
    uses_pdl = config.uses_pdl and launches_dependents(device)
    gemm = config.gemm1
    tile = config.slot_tile or default_slot_tile(gemm)
    strides = weight_strides(gemm)
    kernel = TritonKernel(
        few_token_gemm1_kernel,
        first_expert=config.local_expert_offset,
        num_experts=gemm.num_experts,
        IN_FEATURES=gemm.in_features,
        OUT_FEATURES=gemm.out_features,
        TOP_K=config.top_k,
        ACTIVATION=gemm.activation_name,
        IS_GATED=gemm.is_gated,
        IS_GATE_FIRST=gemm.weight_format.is_gate_first,
        IS_INTERLEAVED=gemm.is_interleaved,
        IS_SHUFFLED=gemm.weight_format.is_shuffled,
        ROW_STRIDE=strides.row,
        BLOCK_STRIDE=strides.block,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        USES_PDL=uses_pdl,
        TRIGGERS=config.triggers_early,
        num_warps=tile.num_warps,
        launch_pdl=uses_pdl,
        maxnreg=tile.max_registers or streaming_registers().gemm1,
    )
    return kernel, -(-gemm.out_features // tile.block_n)
