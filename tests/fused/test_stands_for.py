"""When one callable runs in place of neighbouring stages, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import make_problem
from small_layer import REFERENCE_OF_STAGE, SMALL
from torch import Tensor

from moe import (
    MoEConfig,
    MoEPipeline,
    SwigluParams,
    TopK,
    WeightFormat,
    WeightLayout,
    build_pipeline,
    reference_pipeline,
)
from moe.fused.few_tokens.config import FewTokenConfig, FewTokenTiles, MatvecTile
from moe.fused.few_tokens.reference import few_token_experts_reference
from moe.pipeline import FusedExperts


def with_fused(pipeline: MoEPipeline, max_tokens: int) -> tuple[MoEPipeline, list[int]]:
    """The pipeline with a fused callable that gives sevens, and the token counts that it was called with."""
    calls: list[int] = []

    def sevens(topk: TopK, hidden_states: Tensor, w1: Tensor, w2: Tensor, *, swiglu: object, output: object) -> Tensor:
        calls.append(hidden_states.shape[0])
        return torch.full_like(hidden_states, 7)

    stages = (pipeline.permute, pipeline.gemm1, pipeline.gemm2, pipeline.finalize)
    return replace(pipeline, fused=FusedExperts(sevens, max_tokens, stages)), calls


def test_few_tokens_take_the_fused_callable_and_more_the_chain() -> None:
    config = MoEConfig.create(**SMALL)
    plain = reference_pipeline(config)
    pipeline, calls = with_fused(plain, max_tokens=3)
    for num_tokens in (3, 4):
        problem = make_problem(config, num_tokens)
        experts = (problem.hidden_states, problem.w1, problem.w2)
        topk = plain.route(problem.logits)
        for run, entry in ((pipeline, problem.logits), (pipeline.run_experts, topk)):
            output = run(entry, *experts)
            assert (output == 7).all() if num_tokens == 3 else torch.equal(output, plain(problem.logits, *experts))
        rows = pipeline.expert_outputs(problem.logits, *experts).rows
        assert rows.shape[0] == config.permute.max_rows(num_tokens)
    assert calls == [3, 3]


@pytest.mark.parametrize("stage", ["permute", "gemm1", "gemm2", "finalize"])
def test_the_fused_callable_steps_aside_for_a_swapped_stage(stage: str) -> None:
    config = MoEConfig.create(**SMALL)
    plain = reference_pipeline(config)
    pipeline, calls = with_fused(plain, max_tokens=8)
    problem = make_problem(config, 2)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    swapped = replace(pipeline, **{stage: REFERENCE_OF_STAGE[stage](config)})
    assert torch.equal(swapped(*arguments), plain(*arguments))
    assert calls == []
    assert (replace(pipeline, route=REFERENCE_OF_STAGE["route"](config))(*arguments) == 7).all()


def test_the_fused_callable_gets_parameters_and_output_of_the_call() -> None:
    config = MoEConfig.create(**SMALL)
    plain = reference_pipeline(config)
    few = FewTokenConfig(num_experts=8, top_k=2, gemm1=config.gemm1, gemm2=config.gemm2)
    stages = (plain.permute, plain.gemm1, plain.gemm2, plain.finalize)
    pipeline = replace(plain, fused=FusedExperts(partial(few_token_experts_reference, config=few), 8, stages))
    problem = make_problem(config, 5)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    swiglu = SwigluParams(alpha=torch.linspace(0.5, 2, 8), beta=torch.ones(8))
    expected = plain(problem.logits, *experts, swiglu=swiglu)
    for run, entry in ((pipeline, problem.logits), (pipeline.run_experts, plain.route(problem.logits))):
        output = torch.empty_like(problem.hidden_states)
        assert run(entry, *experts, swiglu=swiglu, output=output) is output
        assert torch.equal(output, expected)


def test_a_fused_callable_checks_again_only_what_the_pipeline_has_not() -> None:
    config, other = (MoEConfig.create(**SMALL | fields) for fields in ({}, {"norm_topk_prob": False}))
    plain = reference_pipeline(config)
    calls: list[str] = []

    def note(name: str) -> Callable[..., Tensor]:
        return lambda topk, hidden_states, *weights, **more: calls.append(name) or torch.zeros_like(hidden_states)

    stages = (plain.permute, plain.gemm1, plain.gemm2, plain.finalize)
    fused = FusedExperts(note("run"), 8, stages, launch=note("launch"), checked_by=config, routed_by=plain.route)
    pipeline = replace(plain, fused=fused)
    problem = make_problem(config, 2)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    topk = plain.route(problem.logits)
    variants = {
        "as_built": (pipeline, ["launch", "launch"]),
        "unchecked": (replace(pipeline, checks_inputs=False), ["run", "run"]),
        "other_config": (replace(pipeline, config=other), ["run", "run"]),
        "other_router": (replace(pipeline, route=REFERENCE_OF_STAGE["route"](config)), ["run", "launch"]),
    }
    for name, (variant, expected) in variants.items():
        calls.clear()
        variant(problem.logits, *experts)
        variant.run_experts(topk, *experts)
        assert calls == expected, name


def test_the_fused_callable_for_a_gpu_stands_for_the_stages_beside_it() -> None:
    pytest.importorskip("triton")
    config = MoEConfig.create(**SMALL)
    pipeline = build_pipeline(config, "cuda")
    few = pipeline.fused.run.keywords["config"]
    assert few == FewTokenConfig(num_experts=8, top_k=2, gemm1=config.gemm1, gemm2=config.gemm2, uses_pdl=True)
    assert pipeline.fused == FusedExperts(
        pipeline.fused.run,
        few.max_tokens,
        stands_for=(pipeline.permute, pipeline.gemm1, pipeline.gemm2, pipeline.finalize),
        launch=pipeline.fused.launch,
        checked_by=config,
        routed_by=pipeline.route,
    )
    assert pipeline.fused.launch.keywords["config"] is few


def test_few_tokens_for_a_gpu_get_the_slice_and_what_the_config_names() -> None:
    pytest.importorskip("triton")
    tiles = FewTokenTiles(
        max_tokens=5, slot_tile=MatvecTile(block_n=2, block_k=64), token_tile=MatvecTile(block_n=4, block_k=64)
    )
    config = MoEConfig.create(**SMALL, local_expert_offset=3, num_local_experts=4)
    fused = build_pipeline(MoEConfig(**dict(config) | {"few_tokens": tiles}), "cuda").fused
    few = fused.run.keywords["config"]
    assert (fused.max_tokens, few.slot_tile, few.token_tile) == (5, tiles.slot_tile, tiles.token_tile)
    assert (few.local_expert_offset, few.gemm1.num_experts, few.uses_pdl) == (3, 4, True)
    assert not few.triggers_early


def test_a_pipeline_for_a_gpu_stands_on_kernels_for_few_tokens_too(cuda: torch.device) -> None:
    fused = build_pipeline(MoEConfig.create(**SMALL), cuda).fused
    assert fused is not None
    assert fused.max_tokens >= 1
    assert fused.launch is not None
    major_mn = MoEConfig.create(**SMALL, weight_format=WeightFormat(layout=WeightLayout.MajorMn))
    assert build_pipeline(major_mn, cuda).fused is None
