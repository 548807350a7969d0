"""Inputs of the few-token tests: one layer's experts and tokens, and their truth in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gemm.cases import ALL_FORMATS
from torch import Tensor

from moe.config import MoEConfig
from moe.flow import SwigluParams, TopK
from moe.fused.few_tokens.config import FewTokenConfig, MatvecTile
from moe.fused.few_tokens.reference import few_token_experts_reference
from moe.gemm.config import WeightLayout
from moe.gemm.weight_format import pack_bias, pack_weights
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import experts_in_float64, make_problem

pytest.importorskip("triton")
from moe.fused.few_tokens.experts import few_token_experts

FORMATS = [weight_format for weight_format in ALL_FORMATS if weight_format.layout is not WeightLayout.MajorMn]
GARBAGE_IDS = (-1, -(2**31), 2**31 - 1, 1 << 30)
WIDE = MatvecTile(block_n=64, block_k=64)  # few programs: the interpreter takes a millisecond a step
DEFAULT_TILES = {"slot_tile": None, "token_tile": None}
LARGE = {"num_tokens": 4, "hidden_size": 2048, "intermediate_size": 768, "num_experts": 32, "top_k": 8}


@dataclass(frozen=True)
class Case:
    """One layer's experts and tokens; weights packed as the config says, and logical."""

    layer: MoEConfig
    config: FewTokenConfig
    topk: TopK
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    logical: tuple[Tensor, Tensor]
    logical_biases: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def biases(self) -> dict[str, Tensor]:
        """Those that there are, in the order of the weights' rows."""
        gemms = (self.config.gemm1, self.config.gemm2)
        return {
            name: pack_bias(bias, gemm.weight_format, is_gated=gemm.is_gated)
            for name, bias, gemm in zip(("w1_bias", "w2_bias"), self.logical_biases, gemms)
            if bias is not None
        }

    def run(self, function=few_token_experts, **arguments) -> Tensor:
        arguments |= self.biases
        return function(self.topk, self.hidden_states, self.w1, self.w2, config=self.config, **arguments)

    def exact(self, swiglu: SwigluParams | None = None) -> Tensor:
        return experts_in_float64(
            self.topk,
            self.hidden_states,
            *self.logical,
            activation=self.layer.gemm1.activation,
            local_expert_offset=self.config.local_expert_offset,
            swiglu=swiglu,
            w1_bias=self.logical_biases[0],
            w2_bias=self.logical_biases[1],
        )


def make_case(
    *,
    num_tokens: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 64,
    num_experts: int = 5,
    top_k: int = 2,
    expert_ids: Tensor | list | None = None,
    weight_dtype: torch.dtype = torch.bfloat16,
    slot_tile: MatvecTile | None = WIDE,
    token_tile: MatvecTile | None = WIDE,
    uses_pdl: bool = False,
    bias_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    device: torch.device | str = "cpu",
    seed: int = 0,
    **layer: object,
) -> Case:
    """Distinct random experts a token, or those of expert_ids; biases as large as the products."""
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        **layer,
    )
    generator = torch.Generator().manual_seed(seed)
    if expert_ids is None:
        expert_ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    ids = torch.as_tensor(expert_ids).to(device=device, dtype=torch.int32).contiguous()
    problem = make_problem(config, len(ids), seed=seed, device=device)
    expert_weights = torch.rand(ids.shape, generator=generator).add(0.1).to(device=device, dtype=weight_dtype)
    weight_format = config.gemm1.weight_format
    biases = tuple(
        None if dtype is None else torch.randn(weights.shape[:2], generator=generator).to(device=device, dtype=dtype)
        for dtype, weights in zip(bias_dtypes, (problem.w1, problem.w2))
    )
    return Case(
        logical_biases=biases,
        layer=config,
        config=few_token_config(config, slot_tile=slot_tile, token_tile=token_tile, uses_pdl=uses_pdl),
        topk=TopK(ids, expert_weights),
        hidden_states=problem.hidden_states,
        w1=pack_weights(problem.w1, weight_format, is_gated=config.gemm1.is_gated),
        w2=pack_weights(problem.w2, weight_format, is_gated=False),
        logical=(problem.w1, problem.w2),
    )


def few_token_config(config: MoEConfig, **more: object) -> FewTokenConfig:
    return FewTokenConfig(
        num_experts=config.num_experts,
        top_k=config.top_k,
        gemm1=config.gemm1,
        gemm2=config.gemm2,
        local_expert_offset=config.permute.local_expert_offset,
        **more,
    )


def assert_kernels_are_close(case: Case, swiglu: SwigluParams | None = None) -> None:
    reference = case.run(few_token_experts_reference, swiglu=swiglu)
    assert_close_to_exact(case.run(swiglu=swiglu), reference, case.exact(swiglu))
