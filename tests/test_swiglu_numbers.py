"""The activation's numbers in the config of a layer: what calls that bring none compute with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_layer import SMALL

from moe import MoEConfig, SwigluNumbers, SwigluParams, build_pipeline, reference_pipeline
from moe.cli.layer import layers_of
from moe.parallel import build_layer
from moe.testing.closeness import relative_error
from moe.testing.problems import make_problem
from moe.tuning.tuned import tuned_pipeline

NUMBERS = SwigluNumbers(alpha=1.702, beta=1.0, clamp_limit=0.5)


def by_expert(device: torch.device, count: int = 8) -> SwigluParams:
    return SwigluParams(*(torch.full((count,), value, device=device) for value in (1.702, 1.0, 0.5)))


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_calls_without_numbers_compute_with_those_of_the_config(num_tokens: int, device: torch.device) -> None:
    plain, config = MoEConfig.create(**SMALL), MoEConfig.create(**SMALL, swiglu=NUMBERS)
    problem = make_problem(plain, num_tokens, device=device)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    topk = reference_pipeline(plain).route(problem.logits)
    for build in (build_pipeline, tuned_pipeline):
        ours, expected = build(config, device), build(plain, device)
        result = ours(problem.logits, *experts)
        assert torch.equal(result, expected(problem.logits, *experts, swiglu=by_expert(device)))
        assert torch.equal(ours.run_experts(topk, *experts), result)
        if num_tokens:
            assert not torch.equal(result, expected(problem.logits, *experts))
            outputs = ours.expert_outputs(problem.logits, *experts)
            wanted = expected.expert_outputs(problem.logits, *experts, swiglu=by_expert(device))
            named = outputs.row_of_slot.flatten().long()
            assert torch.equal(outputs.rows[named], wanted.rows[named])
        limit = SwigluParams(clamp_limit=torch.full((8,), 2.0, device=device))
        own = ours(problem.logits, *experts, swiglu=limit)
        assert torch.equal(own, expected(problem.logits, *experts, swiglu=limit))


def test_numbers_that_an_activation_does_not_take_are_refused() -> None:
    for activation, words in (
        ("SwigluStep", "expected clamp_limit with SwigluStep, got alpha"),
        ("Relu2", "expected none"),
    ):
        with pytest.raises(ValueError, match=f"swiglu: {words}"):
            MoEConfig.create(**SMALL, activation=activation, swiglu=SwigluNumbers(alpha=1.5))
    wrong_kinds = ({"alpha": True}, {"alpha": "1.7"}, {"beta": torch.ones(2)}, {"beta": 1e39}, {"alpha": 10**400})
    for wrong in ({"clamp_limit": 0.0}, {"clamp_limit": -1.0}, {"alpha": float("nan")}, {"limit": 7.0}, *wrong_kinds):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SwigluNumbers(**wrong)
    assert SwigluNumbers(alpha=torch.tensor(1.5), beta=1, clamp_limit=np.float32(7)) == SwigluNumbers(
        alpha=1.5, beta=1.0, clamp_limit=7.0
    )
    config = MoEConfig.create(**SMALL, swiglu=NUMBERS)
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config


def test_a_layer_over_ranks_computes_with_them(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL, swiglu=NUMBERS)
    problem = make_problem(config, 9, device=device)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    layer = build_layer(config, None, device, exchange="local")
    assert relative_error(layer(*arguments), build_pipeline(config, device)(*arguments).double()) < 1e-3


def test_commands_that_run_stages_one_by_one_say_that_they_leave_them_out(tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(MoEConfig.create(**SMALL, swiglu=NUMBERS).model_dump_json())
    (layer,) = layers_of([], file, None)
    assert layer.name == "mine.json, without its alpha and beta and clamp_limit"
    assert layer.config.swiglu is None


def test_the_layer_of_gpt_oss_is_its_class_of_transformers(device: torch.device) -> None:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    configs = pytest.importorskip("transformers.models.gpt_oss.configuration_gpt_oss")
    theirs = configs.GptOssConfig(hidden_size=64, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(0)
    experts = modeling.GptOssExperts(theirs)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).bfloat16()
    config = MoEConfig.from_hf_config(theirs)
    assert config.has_biases
    assert config.swiglu == SwigluNumbers(alpha=1.702, beta=1, clamp_limit=7)
    released = {key: value for key, value in theirs.to_dict().items() if key != "swiglu_alpha"}
    assert MoEConfig.from_hf_config(released) == config
    problem = make_problem(config, 17, device=device)
    topk = reference_pipeline(config).route(problem.logits)
    with torch.no_grad():
        experts = experts.to(device)
        arguments = (experts.gate_up_proj, experts.down_proj)
        biases = {"w1_bias": experts.gate_up_proj_bias, "w2_bias": experts.down_proj_bias}
        output = build_pipeline(config, device).run_experts(topk, problem.hidden_states, *arguments, **biases)
        ids, weights = topk.expert_ids.long(), topk.weights.double()
        for missing in biases:
            left = {name: bias for name, bias in biases.items() if name != missing}
            with pytest.raises(
                ValueError, match=f"{missing.replace('w', 'gemm', 1)}: expected a tensor, since the config"
            ):
                build_pipeline(config, device).run_experts(topk, problem.hidden_states, *arguments, **left)
        exact = experts.double()(problem.hidden_states.double(), ids, weights)
    assert relative_error(output, exact) < 1e-2


def test_a_captured_call_reads_them_from_memory_that_stays(cuda: torch.device) -> None:
    config = MoEConfig.create(**SMALL, swiglu=SwigluNumbers(alpha=1.3125, clamp_limit=0.75))
    problem = make_problem(config, 40, device=cuda)
    pipeline, arguments = build_pipeline(config, cuda), (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    pipeline(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = pipeline(*arguments)
    for _ in range(3):
        problem.logits.copy_(torch.randn_like(problem.logits))
        graph.replay()
        assert torch.equal(output, pipeline(*arguments))
