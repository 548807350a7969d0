"""Stage 4: multiply each row by its expert's W2."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.config import GemmConfig
from moe.gemm.grouped_gemm_kernel import grouped_gemm_kernel
from moe.gemm.tile import launch_tile
from moe.gemm.weight_format import weight_strides


def grouped_gemm(rows: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig) -> Tensor:
    """rows @ W2[expert_of_row]^T.

    Args:
        rows: [P, I] bf16; padding rows may hold anything, NaN included.
        weights: bf16, config.weight_shape, as config.weight_format says.
        permutation: where rows lie; a program takes permutation.tile_rows of them.

    Returns:
        [P, H] bf16, rounded once. Padding rows are uninitialised memory.

    Raises:
        ValueError: where a tensor does not fit the config.
    """
    config.check_grouped(rows, weights, permutation)
    out = torch.empty(permutation.max_rows, config.out_features, dtype=torch.bfloat16, device=rows.device)
    if not out.numel():
        return out
    tile = launch_tile(config, permutation.tile_rows, rows.device)
    strides = weight_strides(config)
    grid = (permutation.max_tiles * -(-config.out_features // tile.block_n),)
    with torch.cuda.device_of(rows):
        grouped_gemm_kernel[grid](
            rows,
            weights,
            out,
            permutation.expert_of_tile,
            permutation.row_limit_of_tile,
            permutation.num_tiles,
            IN_FEATURES=config.in_features,
            OUT_FEATURES=config.out_features,
            IS_SHUFFLED=config.weight_format.is_shuffled,
            ROW_STRIDE=strides.row,
            K_STRIDE=strides.k,
            BLOCK_STRIDE=strides.block,
            BLOCK_M=permutation.tile_rows,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_TILES=tile.group_tiles,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
