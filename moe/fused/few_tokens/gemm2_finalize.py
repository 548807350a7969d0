"""Stages 4 and 5 for few tokens: each slot's row times its expert's W2, and the weighted sum of a token's K rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Added, TopK
from moe.fused.few_tokens.checks import check_tokens
from moe.fused.few_tokens.config import FewTokenConfig
from moe.fused.few_tokens.gemm2_finalize_kernel import few_token_gemm2_finalize_kernel
from moe.fused.few_tokens.tile import default_token_tile
from moe.gemm.weight_format import weight_strides
from moe.permute.added import operands_of
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.triton_launch import TritonKernel
from moe.runtime.triton_versions import streaming_registers

MAX_UNROLLED_STEPS = 64  # of a program, up to which its K slots are unrolled: their loads overlap, code stays small


def few_token_gemm2_finalize(
    activation: Tensor,
    weights: Tensor,
    topk: TopK,
    *,
    config: FewTokenConfig,
    output: Tensor | None = None,
    added: Added | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """out[t] = sum over k of topk.weights[t, k] * bf16(activation[t * K + k] @ W2[expert_ids[t, k]]^T + bias).

    Replaces gemm2 and finalize and rounds where they do: each row to bf16, then the sum, in float32 over k ascending.

    Args:
        activation: [T * K, I] bf16, as `few_token_gemm1` returns it; rows of slots without a local expert may hold anything.
        weights: bf16, config.gemm2.weight_shape.
        topk: expert_ids [T, K] int32, of which those not local are skipped; weights [T, K] bf16 or float32.
        config: where uses_pdl, the launch right before this one must be `few_token_gemm1` of the same config and topk.
        output: [T, H] bf16 to write to, with memory of its own; None allocates.
        added: what a token gets beside its rows, after them in the float32 sum. Each number that is its gate compiles a kernel.
        bias: [E_local, H] bf16 or float32, in the order of the weights' rows.

    Returns:
        [T, H] bf16: `output` itself where given. A token without local experts gets zeros.

    Raises:
        ValueError: where a tensor does not fit the config.
    """
    check_tokens(config, topk, activation, weights, output, added, bias)
    return launch_few_token_gemm2_finalize(
        activation, weights, topk, config=config, output=output, added=added, bias=bias
    )


def launch_few_token_gemm2_finalize(
    activation: Tensor,
    weights: Tensor,
    topk: TopK,
    *,
    config: FewTokenConfig,
    output: Tensor | None,
    added: Added | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`few_token_gemm2_finalize` of tensors that were checked."""
    num_tokens = topk.expert_ids.shape[0]
    if output is None:
        output = activation.new_empty((num_tokens, config.gemm2.out_features))
    if not num_tokens:
        return output
    values, gate, scale = operands_of(added)
    kernel, num_blocks = _kernel_of(config, activation.device, scale)
    tensors = (activation, weights, topk.expert_ids, topk.weights, output, values, gate, bias)
    kernel.launch((num_tokens, num_blocks, 1), *tensors)
    return output


@functools.cache
def _kernel_of(config: FewTokenConfig, device: torch.device, scale: float) -> tuple[TritonKernel, int]:
    """The kernel of a config on a device, and into how many programs it cuts a row; `scale` is a number that gates what is added."""
    uses_pdl = config.uses_pdl and launches_dependents(device)
    gemm = config.gemm2
    tile = config.token_tile or default_token_tile(gemm, config.top_k, is_slice=config.is_slice)
    strides = weight_strides(gemm)
    num_steps = config.top_k * -(-gemm.in_features // tile.block_k)
    is_unrolled = num_steps <= MAX_UNROLLED_STEPS
    prefetches = uses_pdl and is_unrolled and not config.is_slice
    kernel = TritonKernel(
        few_token_gemm2_finalize_kernel,
        first_expert=config.local_expert_offset,
        num_experts=gemm.num_experts,
        IN_FEATURES=gemm.in_features,
        OUT_FEATURES=gemm.out_features,
        TOP_K=config.top_k,
        IS_SHUFFLED=gemm.weight_format.is_shuffled,
        ROW_STRIDE=strides.row,
        BLOCK_STRIDE=strides.block,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_PREFETCHED=min(tile.num_prefetched, num_steps) if prefetches else 0,
        SKIPS_ABSENT=config.is_slice,
        IS_UNROLLED=is_unrolled,
        ADDED_SCALE=scale,
        USES_PDL=uses_pdl,
        TRIGGERS=config.triggers_early,
        num_warps=tile.num_warps,
        launch_pdl=uses_pdl,
        maxnreg=tile.max_registers or streaming_registers().gemm2_finalize,
    )
    return kernel, -(-gemm.out_features // tile.block_n)
