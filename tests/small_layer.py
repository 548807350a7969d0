"""The small layer of the tests: its numbers, its stages' references, and calls of it over tensors that stay in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moe import MoEConfig, MoEPipeline, build_pipeline
from moe.gemm.reference import gather_gemm_reference, grouped_gemm_reference
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference
from moe.routing.reference import select_experts_reference
from moe.testing.problems import Problem, make_problem

SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 8, "top_k": 2}
REFERENCE_OF_STAGE = {
    "route": lambda c: partial(select_experts_reference, config=c.routing),
    "permute": lambda c: partial(plan_permutation_reference, config=c.permute),
    "gemm1": lambda c: partial(gather_gemm_reference, config=c.gemm1),
    "gemm2": lambda c: partial(grouped_gemm_reference, config=c.gemm2),
    "finalize": lambda c: partial(finalize_tokens_reference, config=c.finalize),
}


def layer_on(
    device: torch.device, num_tokens: int, **changes: object
) -> tuple[MoEPipeline, Callable[[], Tensor], Problem]:
    """A pipeline, a call of it over tensors that stay in place, and those tensors."""
    config = MoEConfig.create(**SMALL | {"num_experts": 32, "top_k": 4} | changes)
    problem = make_problem(config, num_tokens, device=device)
    pipeline = build_pipeline(config, device)

    def call() -> Tensor:
        return pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2)

    return pipeline, call, problem
