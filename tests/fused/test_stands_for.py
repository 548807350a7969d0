"""When one callable runs in place of neighbouring stages, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
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
from moe.stages import CheckedStage, FusedExperts
from moe.testing.problems import make_problem


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


def noting_pipeline(config: MoEConfig) -> tuple[MoEPipeline, list[str]]:
    """A pipeline of stages in two forms that compute nothing, and the forms that ran: "gemm1", or "gemm1 checked"."""
    plain = reference_pipeline(config)
    ran: list[str] = []

    def noting(name: str, stage: Callable[..., object], config: object) -> CheckedStage:
        def note(text: str, *args: object, **more: object) -> object:
            ran.append(text)
            return stage(*args, **more)

        return CheckedStage(partial(note, f"{name} checked"), partial(note, name), config)

    def fused(topk: TopK, hidden_states: Tensor, *weights: Tensor, **more: object) -> Tensor:
        return torch.zeros_like(hidden_states)

    stages = {name: noting(name, getattr(plain, name), getattr(config, name)) for name in STAGES if name != "route"}
    chain = (stages["permute"], stages["gemm1"], stages["gemm2"], stages["finalize"])
    route = noting("route", plain.route, config.routing)
    few = FewTokenConfig.of_stages(config.permute, config.gemm1, config.gemm2)
    return MoEPipeline(config, route, *chain, fused=FusedExperts(noting("fused", fused, few), 2, chain)), ran


def checked(stages: Iterable[str]) -> list[str]:
    return [f"{name} checked" for name in stages]


CHAIN = ["permute", "gemm1", "gemm2", "finalize"]
STAGES = ("route", *CHAIN)


@pytest.mark.parametrize(("num_tokens", "rest"), [(2, ["fused"]), (3, CHAIN)], ids=["few_tokens", "chain"])
def test_our_own_stages_check_again_only_what_the_pipeline_has_not(num_tokens: int, rest: list[str]) -> None:
    config = MoEConfig.create(**SMALL)
    pipeline, ran = noting_pipeline(config)
    problem = make_problem(config, num_tokens)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    topk = reference_pipeline(config).route(problem.logits)
    other_rule = MoEConfig.create(**SMALL | {"norm_topk_prob": False, "method": "RenormalizeNaive"})
    variants = {
        "as_built": (pipeline, ["route", *rest]),
        "unchecked": (replace(pipeline, checks_inputs=False), ["route checked", *checked(rest)]),
        "other_rule": (replace(pipeline, config=other_rule), ["route checked", *checked(rest)]),
        "other_router": (replace(pipeline, route=REFERENCE_OF_STAGE["route"](config)), checked(rest)),
    }
    for name, (variant, expected) in variants.items():
        ran.clear()
        variant(problem.logits, *experts)
        assert ran == expected, name
        ran.clear()
        variant.run_experts(topk, *experts)
        assert ran == [stage for stage in expected if not stage.startswith("route")], name


@pytest.mark.parametrize("stage", CHAIN)
def test_stages_behind_a_swapped_one_keep_their_checks_and_those_before_it_do_not(stage: str) -> None:
    config = MoEConfig.create(**SMALL)
    pipeline, ran = noting_pipeline(config)
    problem = make_problem(config, 2)
    swapped = replace(pipeline, **{stage: REFERENCE_OF_STAGE[stage](config)})
    swapped(problem.logits, problem.hidden_states, problem.w1, problem.w2)
    position = STAGES.index(stage)
    assert ran == [*STAGES[:position], *checked(STAGES[position + 1 :])]


def test_experts_of_a_swapped_router_are_checked_before_the_fused_callable_runs() -> None:
    config = MoEConfig.create(**SMALL)
    pipeline, ran = noting_pipeline(config)
    problem = make_problem(config, 2)
    topk = reference_pipeline(config).route(problem.logits)
    spoilt = {
        "int64": TopK(topk.expert_ids.long(), topk.weights),
        "a token less": TopK(topk.expert_ids[:1], topk.weights[:1]),
        "a choice less": TopK(topk.expert_ids[:, :1].contiguous(), topk.weights[:, :1].contiguous()),
    }
    for wrong in spoilt.values():
        with pytest.raises(ValueError, match="expert_ids: expected"):
            replace(pipeline, route=lambda logits, bias=None, *, replay_out=None, wrong=wrong: wrong)(
                problem.logits, problem.hidden_states, problem.w1, problem.w2
            )
    assert ran == []


def test_the_fused_callable_for_a_gpu_stands_for_the_stages_beside_it() -> None:
    pytest.importorskip("triton")
    config = MoEConfig.create(**SMALL)
    pipeline = build_pipeline(config, "cuda")
    few = pipeline.fused.run.config
    assert few == FewTokenConfig(num_experts=8, top_k=2, gemm1=config.gemm1, gemm2=config.gemm2, uses_pdl=True)
    assert pipeline.fused == FusedExperts(
        pipeline.fused.run,
        few.max_tokens,
        stands_for=(pipeline.permute, pipeline.gemm1, pipeline.gemm2, pipeline.finalize),
    )
    for form in (pipeline.fused.run.run, pipeline.fused.run.launch):
        assert form.keywords["config"] is few


def test_few_tokens_for_a_gpu_get_the_slice_and_what_the_config_names() -> None:
    pytest.importorskip("triton")
    tiles = FewTokenTiles(
        max_tokens=5, slot_tile=MatvecTile(block_n=2, block_k=64), token_tile=MatvecTile(block_n=4, block_k=64)
    )
    config = MoEConfig.create(**SMALL, local_expert_offset=3, num_local_experts=4)
    fused = build_pipeline(MoEConfig(**dict(config) | {"few_tokens": tiles}), "cuda").fused
    few = fused.run.config
    assert (fused.max_tokens, few.slot_tile, few.token_tile) == (5, tiles.slot_tile, tiles.token_tile)
    assert (few.local_expert_offset, few.gemm1.num_experts, few.uses_pdl) == (3, 4, True)
    assert not few.triggers_early


def test_a_pipeline_for_a_gpu_stands_on_kernels_for_few_tokens_too(cuda: torch.device) -> None:
    fused = build_pipeline(MoEConfig.create(**SMALL), cuda).fused
    assert fused is not None
    assert fused.max_tokens >= 1
    assert isinstance(fused.run, CheckedStage)
    major_mn = MoEConfig.create(**SMALL, weight_format=WeightFormat(layout=WeightLayout.MajorMn))
    assert build_pipeline(major_mn, cuda).fused is None
