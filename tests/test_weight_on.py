"""Layers whose routing weights go into the input of experts: Llama 4 and its like."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from small_layer import SMALL
from torch import Tensor

import moe
from moe import FLASHINFER, MoEConfig, SwigluParams, TopK, build_pipeline, reference_pipeline
from moe.flow import WeighedSlots
from moe.gemm.weight_format import pack_weights
from moe.permute.reference import weigh_tokens_reference
from moe.permute.weigh import launch_weigh_tokens, weigh_tokens
from moe.ready_stages import ready_stages
from moe.stages import CheckedStage, FusedExperts
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import experts_in_float64, make_problem
from moe.tuning.choice import TuningChoice
from moe.tuning.tuned import tuned_pipeline
from moe.workspace import workspace_of_any_choice


def exact_of(topk: TopK, x: Tensor, w1: Tensor, w2: Tensor, **more: Any) -> Tensor:
    """Each slot's token times its weight, rounded to bf16 as Hugging Face and vLLM do; the rest in float64."""
    num_tokens, top_k = topk.expert_ids.shape
    weights = topk.weights.float().nan_to_num().view(-1, 1)
    rows = (x.float().repeat_interleave(top_k, dim=0) * weights).bfloat16()
    ones = torch.ones(num_tokens * top_k, 1, device=x.device)
    each = experts_in_float64(TopK(topk.expert_ids.view(-1, 1), ones), rows, w1, w2, **more)
    return each.view(num_tokens, top_k, x.shape[1]).sum(dim=1)


def summed(outputs: moe.ExpertOutputs) -> Tensor:
    is_local = (outputs.row_of_slot >= 0)[..., None]
    rows = outputs.rows[outputs.row_of_slot.clamp(min=0).long()].double()
    return torch.where(is_local, outputs.weights[..., None].double() * rows, 0.0).sum(dim=1)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("weight_format", [moe.WeightFormat(), FLASHINFER], ids=["hugging_face", "flashinfer"])
def test_layer_matches_float64(weight_format: Any, top_k: int, num_tokens: int, device: torch.device) -> None:
    sizes = SMALL | {"top_k": top_k}
    config = MoEConfig.create(**sizes, method="TopKSigmoid", weight_on="input", weight_format=weight_format)
    problem = make_problem(config, num_tokens, device=device)
    w1 = pack_weights(problem.w1, weight_format, is_gated=True)
    w2 = pack_weights(problem.w2, weight_format, is_gated=False)
    arguments = (problem.hidden_states, w1, w2)
    topk = reference_pipeline(config).route(problem.logits)
    reference = reference_pipeline(config).run_experts(topk, *arguments)
    exact = exact_of(topk, problem.hidden_states, problem.w1, problem.w2)
    for pipeline in (build_pipeline(config, device), tuned_pipeline(config, device)):
        assert_close_to_exact(pipeline(problem.logits, *arguments), reference, exact)
        output = torch.full_like(problem.hidden_states, float("nan"))
        assert pipeline.run_experts(topk, *arguments, output=output) is output
        assert_close_to_exact(output, reference, exact)
        if num_tokens:
            outputs = pipeline.run_experts_unfinalized(topk, *arguments)
            assert torch.equal(outputs.weights, torch.ones_like(topk.weights))
            assert_close_to_exact(summed(outputs).bfloat16(), reference, exact)


@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_kernels_take_slots_as_tokens(
    top_k: int, with_added: bool, triton_device: torch.device, poisoned_memory: None
) -> None:
    from moe.fused.few_tokens.config import FewTokenConfig
    from moe.fused.few_tokens.experts import few_token_experts, launch_few_token_experts
    from moe.gemm.portable.gemm1 import portable_gemm1
    from moe.gemm.portable.gemm2 import portable_gemm2
    from moe.permute.finalize import finalize_tokens
    from moe.permute.triton_plan import plan_permutation

    config = MoEConfig.create(**SMALL | {"top_k": top_k}, method="TopKSigmoid", weight_on="input")
    problem, reference = make_problem(config, 5, device=triton_device), reference_pipeline(config)
    chain = {
        "permute": partial(plan_permutation, config=config.planned),
        "gemm1": partial(portable_gemm1, config=config.gemm1),
        "gemm2": partial(portable_gemm2, config=config.gemm2),
        "finalize": partial(finalize_tokens, config=config.finalize),
    }
    few = FewTokenConfig.of_stages(config.permute, config.gemm1, config.gemm2)
    fused = FusedExperts(
        CheckedStage(partial(few_token_experts, config=few), partial(launch_few_token_experts, config=few), few),
        max_tokens=8,
        stands_for=tuple(chain.values()),
    )
    weigh = CheckedStage(
        partial(weigh_tokens, config=config.permute),
        partial(launch_weigh_tokens, config=config.permute),
        config.permute,
    )
    pipeline = replace(reference, **chain, weigh=weigh, fused=fused)
    added = torch.randn_like(problem.hidden_states) if with_added else None
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    exact = exact_of(reference.route(problem.logits), *arguments[1:]) + (0.0 if added is None else added.double())
    expected = reference(*arguments, added=added)
    output = pipeline(*arguments, added=added)
    assert_close_to_exact(output, expected, exact)
    assert_close_to_exact(replace(pipeline, fused=None)(*arguments, added=added), expected, exact)
    assert ready_stages(pipeline).max_fused_tokens == (8 if top_k == 1 else -1)
    workspace = torch.full((pipeline.workspace(5).asked_bytes,), 0x7F, dtype=torch.uint8, device=triton_device)
    assert torch.equal(pipeline(*arguments, added=added, workspace=workspace), output)


@pytest.mark.parametrize("top_k", [1, 2])
def test_it_is_another_function_than_weighing_the_output(top_k: int, device: torch.device) -> None:
    on_output = MoEConfig.create(**SMALL | {"top_k": top_k})
    on_input = on_output.model_copy(update={"weight_on": "input"})
    problem = make_problem(on_output, 9, device=device)
    ids = torch.arange(9 * top_k, dtype=torch.int32, device=device).view(9, top_k) % 8
    arguments = (problem.hidden_states, problem.w1, problem.w2)
    for weight, is_same in ((1.0, True), (0.5, False)):
        topk = TopK(ids, torch.full((9, top_k), weight, device=device))
        results = [build_pipeline(config, device).run_experts(topk, *arguments) for config in (on_output, on_input)]
        assert torch.allclose(*results, rtol=2**-7, atol=1e-3) is is_same


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_absent_slots_may_weigh_nan_and_what_is_added_is_not_weighed(
    weights: torch.dtype, device: torch.device, poisoned_memory: None
) -> None:
    config = MoEConfig.create(**SMALL, weight_on="input", local_expert_offset=4, num_local_experts=3)
    problem = make_problem(config, 6, device=device)
    ids = torch.tensor([[4, 0], [6, 5], [-1, 8]] * 2, dtype=torch.int32, device=device)
    is_local = (ids >= 4) & (ids < 7)
    numbers = torch.where(is_local, 0.75, float("nan")).to(weights)
    added = torch.randn_like(problem.hidden_states)
    gate = torch.ones(3, device=device)
    swiglu = SwigluParams(alpha=1.702 * gate, beta=gate, clamp_limit=7 * gate)
    topk, arguments = TopK(ids, numbers), (problem.hidden_states, problem.w1, problem.w2)
    output = build_pipeline(config, device).run_experts(topk, *arguments, swiglu=swiglu, added=added)
    reference = reference_pipeline(config).run_experts(topk, *arguments, swiglu=swiglu, added=added)
    exact = exact_of(topk, *arguments, local_expert_offset=4, swiglu=swiglu) + added.double()
    assert_close_to_exact(output, reference, exact)


def test_a_batch_invariant_layer_gives_a_token_its_bits_alone(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL | {"top_k": 3}, weight_on="input", is_batch_invariant=True)
    problem = make_problem(config, 5, device=device)
    pipeline, weights = build_pipeline(config, device), (problem.w1, problem.w2)
    together = pipeline(problem.logits, problem.hidden_states, *weights)
    alone = [
        pipeline(problem.logits[t : t + 1].clone(), problem.hidden_states[t : t + 1].clone(), *weights)
        for t in range(5)
    ]
    if device.type == "cuda":
        assert torch.equal(together, torch.cat(alone))
    else:
        torch.testing.assert_close(together, torch.cat(alone), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 3])
def test_scratch_lies_in_the_callers_workspace(top_k: int, device: torch.device) -> None:
    config = MoEConfig.create(**SMALL | {"top_k": top_k}, weight_on="input")
    other = config.model_copy(update={"weight_on": "output"})
    problem, pipeline = make_problem(config, 40, device=device), build_pipeline(config, device)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    grown = pipeline.workspace(40).asked_bytes - build_pipeline(other, device).workspace(40).asked_bytes
    assert grown >= 40 * top_k * SMALL["hidden_size"] * 2
    workspace = torch.empty(pipeline.workspace(40).asked_bytes, dtype=torch.uint8, device=device)
    assert torch.equal(pipeline(*arguments, workspace=workspace), pipeline(*arguments))


def test_a_weigher_of_ones_own_runs_and_its_result_is_checked() -> None:
    config = MoEConfig.create(**SMALL, weight_on="input")
    problem, ours = make_problem(config, 4), reference_pipeline(config)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)

    def halved(hidden_states: Tensor, topk: TopK) -> WeighedSlots:
        return weigh_tokens_reference(hidden_states, TopK(topk.expert_ids, topk.weights / 2), config=config.permute)

    def half_of_the_slots(hidden_states: Tensor, topk: TopK) -> WeighedSlots:
        return WeighedSlots(hidden_states, topk)

    assert not torch.equal(replace(ours, weigh=halved)(*arguments), ours(*arguments))
    with pytest.raises(ValueError, match=r"result of weigh: expected \[slots=8, H=128\], got \[4, 128\]"):
        replace(ours, weigh=half_of_the_slots)(*arguments)
    with pytest.raises(ValueError, match='weigh: expected a stage, since weight_on is "input", got None'):
        replace(ours, weigh=None)(*arguments)


def test_the_config_says_it_by_name_and_keeps_it() -> None:
    config = MoEConfig.create(**SMALL, weight_on="input")
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config
    assert config.weighs_input
    assert TuningChoice(tile_rows=32).apply(config).weighs_input
    assert workspace_of_any_choice(config, 40).asked_bytes >= build_pipeline(config, "cpu").workspace(40).asked_bytes
    assert not MoEConfig.create(**SMALL).weighs_input
    with pytest.raises(ValueError, match="weight_on"):
        MoEConfig.create(**SMALL, weight_on="both")


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_captured_layer_follows_new_logits(top_k: int, cuda: torch.device) -> None:
    config = MoEConfig.create(**SMALL | {"top_k": top_k}, method="TopKSigmoid", weight_on="input")
    for num_tokens in (1, 64):
        problem, pipeline = make_problem(config, num_tokens, device=cuda), build_pipeline(config, cuda)
        arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
        pipeline(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = pipeline(*arguments)
        for _ in range(5):
            problem.logits.copy_(torch.randn_like(problem.logits))
            graph.replay()
            assert torch.equal(output, pipeline(*arguments))


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("num_tokens", [1, 5, 64, 700])
def test_dependent_launches_change_no_bit(num_tokens: int, top_k: int, cuda: torch.device) -> None:
    config = MoEConfig.create(**SMALL | {"top_k": top_k}, method="TopKSigmoid", weight_on="input")
    problem = make_problem(config, num_tokens, device=cuda)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    with_pdl, without = (build_pipeline(config, cuda, uses_pdl=uses_pdl) for uses_pdl in (True, False))
    expected = without(*arguments)
    for _ in range(20):
        assert torch.equal(with_pdl(*arguments), expected)
