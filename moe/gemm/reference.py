"""Stages 3 and 4 in torch: fp32 maths an expert at a time, one rounding to bf16. Defines what is right; any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.checks import no_case
from moe.flow import Permutation, SwigluParams
from moe.gemm.checks import check_gather, check_grouped
from moe.gemm.config import ActivationType, GemmConfig
from moe.gemm.weight_format import unpack_bias, unpack_expert


def gather_gemm_reference(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """activation(hidden_states[token_of_row] @ W1[expert_of_row]^T + bias); arguments and result as `portable_gemm1`."""
    check_gather(config, hidden_states, weights, permutation, swiglu, bias)
    out = hidden_states.new_empty(permutation.max_rows, config.out_features)
    for expert, rows in rows_of_experts(permutation):
        token = permutation.token_of_row[rows]
        weight = unpack_expert(weights[expert], config.weight_format, is_gated=config.is_gated)
        product = product_in_fp32(hidden_states[token], weight) + bias_of_expert(bias, expert, config)
        out[rows] = activate_reference(product, expert, config, swiglu).bfloat16()
    return out


def grouped_gemm_reference(
    rows: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig, bias: Tensor | None = None
) -> Tensor:
    """rows @ W2[expert_of_row]^T + bias; arguments and result as `portable_gemm2`."""
    check_grouped(config, rows, weights, permutation, bias)
    out = rows.new_empty(permutation.max_rows, config.out_features)
    for expert, rows_of_expert in rows_of_experts(permutation):
        weight = unpack_expert(weights[expert], config.weight_format, is_gated=False)
        product = product_in_fp32(rows[rows_of_expert], weight) + bias_of_expert(bias, expert, config)
        out[rows_of_expert] = product.bfloat16()
    return out


def product_in_fp32(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, K] @ weight [N, K]^T in fp32, whatever torch.autocast says."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ weight.float().T


def bias_of_expert(bias: Tensor | None, expert: int, config: GemmConfig) -> Tensor | float:
    """An expert's bias [N] in fp32, in the order of logical rows; 0 where there is none."""
    if bias is None:
        return 0.0
    return unpack_bias(bias[expert, None], config.weight_format, is_gated=config.is_gated)[0].float()


def activate_reference(product: Tensor, expert: int, config: GemmConfig, swiglu: SwigluParams | None) -> Tensor:
    """[rows, 2I] fp32, gate columns first, -> [rows, I] where gated; else [rows, I] -> [rows, I]."""
    swiglu = swiglu or SwigluParams()
    gate, up = product.chunk(2, dim=1) if config.is_gated else (product, product)
    match config.activation:
        case ActivationType.Gelu:
            return F.gelu(product)
        case ActivationType.Relu:
            return F.relu(product)
        case ActivationType.Silu:
            return F.silu(product)
        case ActivationType.Relu2:
            return product.clamp(min=0).square()
        case ActivationType.Identity:
            return product
        case ActivationType.Swiglu | ActivationType.SwigluBias:
            return _swiglu(gate, up, expert, swiglu)
        case ActivationType.SwigluStep:
            limit = 7.0 if swiglu.clamp_limit is None else swiglu.clamp_limit[expert]
            return F.silu(gate).clamp(max=limit) * up.clamp(max=limit).clamp(min=-limit)
        case ActivationType.Geglu:
            return F.gelu(gate) * up
        case ActivationType.GegluTanh:
            return F.gelu(gate, approximate="tanh") * up
        case ActivationType.Situ:
            alpha = 4.0 if swiglu.alpha is None else swiglu.alpha[expert]
            beta = 25.0 if swiglu.beta is None else swiglu.beta[expert]
            return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * (beta * torch.tanh(up / beta))
    raise no_case(config.activation, "moe/gemm/reference.py, activate_reference")


def _swiglu(gate: Tensor, up: Tensor, expert: int, swiglu: SwigluParams) -> Tensor:
    if swiglu.clamp_limit is not None:
        limit = swiglu.clamp_limit[expert]
        gate, up = gate.clamp(max=limit), up.clamp(max=limit).clamp(min=-limit)
    alpha = 1.0 if swiglu.alpha is None else swiglu.alpha[expert]
    beta = 0.0 if swiglu.beta is None else swiglu.beta[expert]
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def rows_of_experts(permutation: Permutation) -> Iterator[tuple[int, slice]]:
    """Each local expert that has rows, and which they are, padding left out. Reads the tile list on the host."""
    num_tiles = int(permutation.num_tiles)
    experts = permutation.expert_of_tile[:num_tiles].tolist()
    limits = permutation.row_limit_of_tile[:num_tiles].tolist()
    for tile, expert in enumerate(experts):
        if tile == 0 or experts[tile - 1] != expert:
            yield expert, slice(tile * permutation.tile_rows, limits[tile])
