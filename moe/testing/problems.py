"""Inputs of tests and benchmarks, and the layer in float64 that results are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.checks import no_case
from moe.config import MoEConfig
from moe.flow import SwigluParams, TopK
from moe.gemm.config import ActivationType


@dataclass(frozen=True)
class Problem:
    """One layer's inputs. Weights are logical: w1 [E_local, N, H] with gate rows first, w2 [E_local, H, I]."""

    logits: Tensor  # [T, E] float32
    hidden_states: Tensor  # [T, H] bfloat16
    w1: Tensor  # [E_local, 2I or I, H] bfloat16
    w2: Tensor  # [E_local, H, I] bfloat16


def make_problem(config: MoEConfig, num_tokens: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """Random inputs of unit-scale activations: hidden states and logits normal, weights normal over sqrt(fan-in)."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    hidden, inner, local = config.hidden_size, config.intermediate_size, config.gemm1.num_experts
    return Problem(
        logits=normal(num_tokens, config.num_experts, dtype=torch.float32),
        hidden_states=normal(num_tokens, hidden),
        w1=normal(local, config.gemm1.weight_rows, hidden, scale=hidden**-0.5),
        w2=normal(local, hidden, inner, scale=inner**-0.5),
    )


def random_topk(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> TopK:
    """Distinct experts a token, uniform, with weights that sum to one."""
    generator = torch.Generator(device=device).manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    ids = scores.argsort(dim=1)[:, :top_k].to(torch.int32)
    weights = torch.rand(num_tokens, top_k, generator=generator, device=device) + 0.1
    return TopK(ids.contiguous(), (weights / weights.sum(1, keepdim=True)).to(torch.bfloat16))


def experts_in_float64(
    topk: TopK,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    activation: ActivationType = ActivationType.Swiglu,
    local_expert_offset: int = 0,
    swiglu: SwigluParams | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """The experts' part of the layer without any rounding: [T, H] float64. Weights, and biases by row of them, as in `Problem`."""
    output = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    for local_id in range(w1.shape[0]):
        token, choice = (topk.expert_ids == local_id + local_expert_offset).nonzero(as_tuple=True)
        if not len(token):
            continue
        product = hidden_states[token].double() @ w1[local_id].double().T
        if w1_bias is not None:
            product += w1_bias[local_id].double()
        act = activated_in_float64(product, activation, local_id, swiglu)
        rows = act @ w2[local_id].double().T
        if w2_bias is not None:
            rows += w2_bias[local_id].double()
        output.index_add_(0, token, rows * topk.weights[token, choice, None].double())
    return output


def activated_in_float64(
    product: Tensor, activation: ActivationType, local_id: int | Tensor, swiglu: SwigluParams | None = None
) -> Tensor:
    """[rows, 2I] float64, gate columns first, or [rows, I] -> [rows, I], of one expert, or with local_id [rows] of each row's.

    Raises:
        ValueError: an activation whose formula is not written here.
    """
    swiglu = swiglu or SwigluParams()

    def number(name: str, default: float) -> float | Tensor:
        values: Tensor | None = getattr(swiglu, name)
        return default if values is None else values.double()[local_id, None]

    gate, up = product.chunk(2, dim=1) if activation.is_gated else (product, product)
    match activation:
        case ActivationType.Gelu:
            return _gelu(product)
        case ActivationType.Relu:
            return product.clamp(min=0)
        case ActivationType.Silu:
            return product * torch.sigmoid(product)
        case ActivationType.Relu2:
            return product.clamp(min=0) ** 2
        case ActivationType.Identity:
            return product
        case ActivationType.Swiglu | ActivationType.SwigluBias:
            limit = number("clamp_limit", float("inf"))
            gate, up = gate.clamp(max=limit), _clamped(up, limit)
            return gate * torch.sigmoid(number("alpha", 1.0) * gate) * (up + number("beta", 0.0))
        case ActivationType.SwigluStep:
            limit = number("clamp_limit", 7.0)
            return (gate * torch.sigmoid(gate)).clamp(max=limit) * _clamped(up, limit)
        case ActivationType.Geglu:
            return _gelu(gate) * up
        case ActivationType.GegluTanh:
            return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
        case ActivationType.Situ:
            alpha, beta = number("alpha", 4.0), number("beta", 25.0)
            return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * (beta * torch.tanh(up / beta))
    raise no_case(activation, "moe/testing/problems.py, activated_in_float64")


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x * 0.5**0.5)


def _clamped(x: Tensor, limit: float | Tensor) -> Tensor:
    return x.clamp(max=limit).clamp(min=-limit)  # in this order where a limit is negative
