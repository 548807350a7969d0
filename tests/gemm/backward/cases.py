"""Layers' inputs for the backward stages, and their gradients in float64 by torch's own autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.flow import Permutation, SwigluParams, TopK
from moe.gemm.config import GemmConfig, WeightFormat
from moe.gemm.weight_format import pack_weights, unpack_weights
from moe.permute.reference import plan_permutation_reference
from moe.testing.problems import experts_in_float64, make_problem, random_topk


class BackwardCase(NamedTuple):
    """One layer's tensors as a backward pass has them; weights packed in the config's format."""

    config: MoEConfig
    topk: TopK
    permutation: Permutation
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    grad_output: Tensor
    swiglu: SwigluParams | None

    def grad_arguments(self, gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor, TopK, Permutation]:
        """What gemm2_dgrad takes."""
        return self.grad_output, self.w2, gate_up, self.topk, self.permutation

    def both_configs(self) -> dict[str, GemmConfig]:
        """By which it is told of the layer's GEMMs."""
        return {"config": self.config.gemm2, "gemm1": self.config.gemm1}


class ExactGradients(NamedTuple):
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    weights: Tensor
    swiglu: SwigluParams


def make_backward_case(
    *,
    num_tokens: int = 7,
    hidden_size: int = 40,
    intermediate_size: int = 24,
    num_experts: int = 5,
    top_k: int = 2,
    tile_rows: int = 16,
    activation: str = "Swiglu",
    weight_format: WeightFormat = WeightFormat(),
    swiglu: SwigluParams | None = None,
    expert_ids: Tensor | None = None,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    weight_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BackwardCase:
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        tile_rows=tile_rows,
        activation=activation,
        weight_format=weight_format,
        num_local_experts=num_local_experts,
        local_expert_offset=local_expert_offset,
    )
    problem = make_problem(config, num_tokens, seed=seed, device=device)
    topk = random_topk(num_tokens, num_experts, top_k, seed=seed, device=device)
    ids = topk.expert_ids if expert_ids is None else expert_ids.to(topk.expert_ids)
    topk = TopK(ids, topk.weights.to(weight_dtype))
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    grad_output = torch.randn(num_tokens, hidden_size, generator=generator, device=device).bfloat16()
    return BackwardCase(
        config=config,
        topk=topk,
        permutation=plan_permutation_reference(topk, config=config.permute),
        hidden_states=problem.hidden_states,
        w1=pack_weights(problem.w1, weight_format, is_gated=config.gemm1.is_gated),
        w2=pack_weights(problem.w2, weight_format, is_gated=False),
        grad_output=grad_output,
        swiglu=swiglu,
    )


def exact_gradients(case: BackwardCase) -> ExactGradients:
    """All gradients of sum(output * grad_output) in float64; those of the weights in the case's format."""
    config = case.config
    x, weights = (tensor.double().requires_grad_() for tensor in (case.hidden_states, case.topk.weights))
    formats = config.gemm1.weight_format, config.gemm2.weight_format
    is_gated = config.gemm1.is_gated
    w1 = unpack_weights(case.w1, formats[0], is_gated=is_gated).double().requires_grad_()
    w2 = unpack_weights(case.w2, formats[1], is_gated=False).double().requires_grad_()
    swiglu = case.swiglu or SwigluParams()
    names = [name for name in ("alpha", "beta", "clamp_limit") if getattr(swiglu, name) is not None]
    parameters = {name: getattr(swiglu, name).double().requires_grad_() for name in names}
    output = differentiable_experts(case, TopK(case.topk.expert_ids, weights), x, w1, w2, SwigluParams(**parameters))
    inputs = [x, w1, w2, weights, *parameters.values()]
    grads = torch.autograd.grad(output, inputs, case.grad_output.double(), materialize_grads=True)
    return ExactGradients(
        grads[0],
        pack_weights(grads[1], formats[0], is_gated=is_gated),
        pack_weights(grads[2], formats[1], is_gated=False),
        grads[3],
        SwigluParams(**dict(zip(names, grads[4:]))),
    )


def differentiable_experts(
    case: BackwardCase, topk: TopK, x: Tensor, w1: Tensor, w2: Tensor, swiglu: SwigluParams
) -> Tensor:
    """The experts' part in float64 under torch's autograd, parameters of the activation too; weights are logical."""
    config = case.config
    if not config.gemm1.is_gated:
        offset = config.permute.local_expert_offset
        return experts_in_float64(
            topk, x, w1, w2, activation=config.gemm1.activation, local_expert_offset=offset
        ) + 0.0 * (x.sum() + w1.sum() + w2.sum() + topk.weights.sum())
    output = torch.zeros_like(x)
    for local_id in range(len(w1)):
        token, choice = (topk.expert_ids == local_id + config.permute.local_expert_offset).nonzero(as_tuple=True)
        gate, up = (x[token] @ w1[local_id].T).chunk(2, dim=1)
        if swiglu.clamp_limit is not None:
            limit = swiglu.clamp_limit[local_id]
            gate, up = gate.clamp(max=limit), up.clamp(max=limit).clamp(min=-limit)
        alpha = 1.0 if swiglu.alpha is None else swiglu.alpha[local_id]
        beta = 0.0 if swiglu.beta is None else swiglu.beta[local_id]
        rows = (gate * torch.sigmoid(alpha * gate) * (up + beta)) @ w2[local_id].T
        output = output.index_add(0, token, rows * topk.weights[token, choice, None])
    return output + 0.0 * (x.sum() + w1.sum() + w2.sum() + topk.weights.sum())
