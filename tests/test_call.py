"""What one call of the layer refuses, and how much memory it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_layer import SMALL, layer_on
from torch import Tensor

from moe import MoEConfig, build_pipeline, reference_pipeline
from moe.testing.problems import make_problem
from moe.workspace import workspace_of, workspace_of_any_choice


def test_logits_in_the_place_of_chosen_experts_are_refused_and_the_other_way_round() -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    pipeline, experts = reference_pipeline(config), (problem.hidden_states, problem.w1, problem.w2)
    topk = pipeline.route(problem.logits)
    for call in (pipeline.run_experts, pipeline.run_experts_unfinalized):
        for wrong in (problem.logits, (topk.expert_ids, topk.weights)):
            with pytest.raises(TypeError, match=r"topk: expected a TopK, got .*; moe\.TopK\(expert_ids, weights\)"):
                call(wrong, *experts)
    for call in (pipeline, pipeline.expert_outputs):
        with pytest.raises(TypeError, match=r"routing_logits: expected a torch\.Tensor, got TopK"):
            call(topk, *experts)


def test_parameters_of_the_activation_that_are_none_of_ours_are_refused() -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    with pytest.raises(TypeError, match=r"swiglu: expected a SwigluParams, got dict; moe\.SwigluParams"):
        reference_pipeline(config)(
            problem.logits, problem.hidden_states, problem.w1, problem.w2, swiglu={"alpha": torch.ones(8)}
        )


def test_a_pipeline_without_checks_leaves_them_to_its_stages() -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    pipeline = replace(reference_pipeline(config), checks_inputs=False)
    with pytest.raises(ValueError, match="gemm2_weights"):
        pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2[:3])


def test_more_tokens_than_rows_have_numbers_are_refused() -> None:
    config, num_tokens = MoEConfig.create(**SMALL), 1 << 30
    logits = torch.empty(num_tokens, 8, device="meta")
    hidden_states = torch.empty(num_tokens, SMALL["hidden_size"], dtype=torch.bfloat16, device="meta")
    w1, w2 = (torch.empty(g.weight_shape, dtype=torch.bfloat16, device="meta") for g in (config.gemm1, config.gemm2))
    with pytest.raises(ValueError, match=r"num_tokens: expected fewer than 2\^31 rows"):
        reference_pipeline(config)(logits, hidden_states, w1, w2)


@pytest.mark.parametrize("num_tokens", [-1, 1 << 31])
def test_workspace_of_no_possible_batch_is_refused(num_tokens: int):
    config = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
    with pytest.raises(ValueError, match=f"num_tokens: expected .* got .*{num_tokens}"):
        build_pipeline(config, "cpu").workspace_bytes(num_tokens)


def test_workspace_holds_what_passes_between_the_stages() -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 3000)
    pipeline = reference_pipeline(config)
    topk = pipeline.route(problem.logits)
    permutation = pipeline.permute(topk)
    activation = pipeline.gemm1(problem.hidden_states, problem.w1, permutation)
    rows = pipeline.gemm2(activation, problem.w2, permutation)
    passed = [activation, rows, *vars(topk).values(), *vars(permutation).values()]
    num_bytes = sum(value.nbytes for value in passed if isinstance(value, Tensor))
    assert num_bytes <= pipeline.workspace(3000).asked_bytes <= 1.02 * num_bytes
    assert pipeline.workspace_bytes(3000) == pipeline.workspace(3000).counted_bytes


def test_blocks_that_the_allocator_leaves_whole_are_counted() -> None:
    config = MoEConfig.create(
        hidden_size=448, intermediate_size=136, num_experts=60, top_k=32, local_expert_offset=27, num_local_experts=30
    )
    most = reference_pipeline(config).workspace_bytes(384)
    assert most >= 19_224_064  # what an H200 allocated for it: 18,919,936 were asked for
    assert reference_pipeline(config).workspace(384).asked_bytes < most


@pytest.mark.parametrize("num_local_experts", [1, 5, 32])
def test_a_workspace_for_any_choice_holds_every_tile_and_every_smaller_batch(num_local_experts: int) -> None:
    fields = SMALL | {"num_experts": 32, "num_local_experts": num_local_experts}
    for max_num_tokens in (1, 7, 100, 5000):
        most = workspace_of_any_choice(MoEConfig.create(**fields), max_num_tokens)
        for num_tokens in {0, 1, max_num_tokens // 3, max_num_tokens - 1, max_num_tokens}:
            for tile_rows in (16, 32, 64, 128, None):
                one = workspace_of(MoEConfig.create(**fields, tile_rows=tile_rows), num_tokens)
                assert one.asked_bytes <= most.asked_bytes
                assert one.counted_bytes <= most.counted_bytes


@pytest.mark.parametrize("num_tokens", [1, 7, 300, 5000])
@pytest.mark.parametrize("num_local_experts", [5, 32])
def test_memory_stays_within_what_workspace_bytes_says(
    num_tokens: int, num_local_experts: int, cuda: torch.device
) -> None:
    pipeline, call, _ = layer_on(cuda, num_tokens, num_local_experts=num_local_experts)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call()
    used = torch.cuda.max_memory_allocated() - before
    output_bytes = -(-output.numel() * 2 // 512) * 512
    assert used - output_bytes <= pipeline.workspace_bytes(num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_garbage_in_fresh_memory_never_reaches_the_output(num_tokens: int, cuda: torch.device) -> None:
    _, call, _ = layer_on(cuda, num_tokens)
    expected = call()
    for pattern in (0xFF, 0x7F):  # NaN in bfloat16, and large numbers; -1 and huge in int32
        memory = [torch.empty(1 << 20, dtype=torch.uint8, device=cuda).fill_(pattern) for _ in range(64)]
        memory += [torch.empty(512, dtype=torch.uint8, device=cuda).fill_(pattern) for _ in range(256)]
        del memory
        assert torch.equal(call(), expected)
