"""The flat calls: flashinfer's signature, and each of its parameters honoured."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe
from moe import FLASHINFER, MoEConfig, TopK, reference_pipeline, trtllm_bf16_moe, trtllm_bf16_routed_moe
from moe.gemm.config import PARAMETERS
from moe.gemm.weight_format import pack_weights
from moe.routing.reference import select_experts_reference
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import Problem, experts_in_float64, make_problem

T, H, I, E, K = 21, 128, 64, 16, 4  # noqa: E741
REQUIRED = inspect.Parameter.empty
SIGNATURE = {
    "routing_logits": REQUIRED,
    "routing_bias": REQUIRED,
    "hidden_states": REQUIRED,
    "gemm1_weights": REQUIRED,
    "gemm2_weights": REQUIRED,
    "num_experts": REQUIRED,
    "top_k": REQUIRED,
    "n_group": REQUIRED,
    "topk_group": REQUIRED,
    "intermediate_size": REQUIRED,
    "local_expert_offset": REQUIRED,
    "local_num_experts": REQUIRED,
    "routed_scaling_factor": None,
    "routing_method_type": 0,
    "use_shuffled_weight": True,
    "weight_layout": 2,
    "do_finalize": True,
    "enable_pdl": True,
    "tune_max_num_tokens": 8192,
    "activation_type": 3,
    "norm_topk_prob": True,
    "routing_replay_out": None,
    "gemm1_alpha": None,
    "gemm1_beta": None,
    "gemm1_clamp_limit": None,
    "output": None,
    "workspace_buffer": None,
}


def layer(**changes: Any) -> MoEConfig:
    fields = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K, "weight_format": FLASHINFER}
    return MoEConfig.create(**fields | changes)


def flat_arguments(config: MoEConfig, problem: Problem) -> dict[str, Any]:
    """The flat call's arguments for a layer in flashinfer's weight format."""
    routing = config.routing
    return {
        "routing_logits": problem.logits,
        "routing_bias": None,
        "hidden_states": problem.hidden_states,
        "gemm1_weights": pack_weights(problem.w1, config.gemm1.weight_format, is_gated=config.gemm1.is_gated),
        "gemm2_weights": pack_weights(problem.w2, config.gemm2.weight_format, is_gated=False),
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "n_group": routing.n_group or None,
        "topk_group": routing.topk_group or None,
        "intermediate_size": config.intermediate_size,
        "local_expert_offset": config.permute.local_expert_offset,
        "local_num_experts": config.permute.num_local_experts,
        "routed_scaling_factor": routing.routed_scaling_factor,
        "routing_method_type": moe.RoutingMethodType[routing.method.value],
        "activation_type": config.gemm1.activation,
        "norm_topk_prob": routing.norm_topk_prob,
    }


def assert_output_is_right(
    output: Tensor, config: MoEConfig, problem: Problem, arguments: dict[str, Any], topk: TopK | None = None
) -> None:
    topk = topk or select_experts_reference(problem.logits, arguments["routing_bias"], config=config.routing)
    reference = reference_pipeline(config).run_experts(
        topk, problem.hidden_states, arguments["gemm1_weights"], arguments["gemm2_weights"]
    )
    exact = experts_in_float64(
        topk,
        problem.hidden_states,
        problem.w1,
        problem.w2,
        activation=config.gemm1.activation,
        local_expert_offset=config.permute.local_expert_offset,
    )
    assert_close_to_exact(output, reference, exact)


@pytest.mark.parametrize("activation", moe.ActivationType, ids=lambda activation: activation.name)
def test_every_number_of_an_activation_is_computed(device: torch.device, activation: moe.ActivationType) -> None:
    config = layer(activation=activation)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    for number in (activation, int(activation), np.int64(activation)):
        output = trtllm_bf16_moe(**arguments | {"activation_type": number})
        assert_output_is_right(output, config, problem, arguments)
    for name in ("alpha", "beta", "clamp_limit"):
        values = torch.linspace(0.5, 1.5, E, device=device)
        given = {f"gemm1_{name}": values}
        if name not in PARAMETERS.get(activation, ()):
            with pytest.raises(ValueError, match=rf"gemm1_{name} with activation .*{activation.name}"):
                trtllm_bf16_moe(**arguments | given)
            continue
        swiglu = moe.SwigluParams(**{name: values})
        weights = (arguments["gemm1_weights"], arguments["gemm2_weights"])
        topk = select_experts_reference(problem.logits, None, config=config.routing)
        tensors = (topk, problem.hidden_states)
        exact = experts_in_float64(*tensors, problem.w1, problem.w2, activation=activation, swiglu=swiglu)
        reference = reference_pipeline(config).run_experts(*tensors, *weights, swiglu=swiglu)
        assert_close_to_exact(trtllm_bf16_moe(**arguments | given), reference, exact)


def test_signature_is_flashinfers() -> None:
    parameters = inspect.signature(trtllm_bf16_moe).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(SIGNATURE.items())
    extras = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert extras == ["is_batch_invariant"]


def test_signature_of_the_routed_call_is_flashinfers() -> None:
    parameters = inspect.signature(trtllm_bf16_routed_moe).parameters
    shared = {n: d for n, d in SIGNATURE.items() if n not in ("routing_logits", "routing_bias", "norm_topk_prob")}
    names = ["topk_ids", *shared]
    names.insert(names.index("tune_max_num_tokens"), "gemm1_lora_delta")
    assert list(parameters) == [*names, "is_batch_invariant"]
    assert parameters["is_batch_invariant"].kind is inspect.Parameter.KEYWORD_ONLY
    defaults = dict.fromkeys(names) | shared | {"topk_ids": REQUIRED, "is_batch_invariant": False}
    assert {n: p.default for n, p in parameters.items()} == defaults


def test_enums_have_flashinfers_numbers() -> None:
    assert {m.name: int(m) for m in moe.RoutingMethodType} == {
        "Default": 0,
        "Renormalize": 1,
        "DeepSeekV3": 2,
        "Llama4": 3,
        "RenormalizeNaive": 4,
        "TopK": 5,
        "SigmoidRenorm": 6,
        "MiniMax2": 7,
        "Sigmoid": 8,
        "Unspecified": 9,
    }
    assert {m.name: int(m) for m in moe.WeightLayout} == {"MajorK": 0, "MajorMn": 1, "BlockMajorK": 2}
    assert (moe.ActivationType.Swiglu, moe.ActivationType.Relu2) == (3, 6)


@pytest.mark.parametrize("method", [0, 1, 2, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, T])
def test_every_method_gives_its_layer(method: int, num_tokens: int, device: torch.device) -> None:
    config = layer(method=method, routed_scaling_factor=2.5)
    problem = make_problem(config, num_tokens, device=device)
    arguments = flat_arguments(config, problem) | {"routing_bias": torch.linspace(-1, 1, E, device=device)}
    assert_output_is_right(trtllm_bf16_moe(**arguments), config, problem, arguments)


def test_llama4_weighs_the_experts_output(device: torch.device) -> None:
    config = layer(method=3, top_k=1)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    assert_output_is_right(trtllm_bf16_moe(**arguments), config, problem, arguments)


def test_groups_and_scale_are_honoured(device: torch.device) -> None:
    config = layer(method=2, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem) | {
        "routing_bias": torch.linspace(-0.1, 0.1, E, device=device).bfloat16()
    }
    output = trtllm_bf16_moe(**arguments)
    assert_output_is_right(output, config, problem, arguments)
    ungrouped = trtllm_bf16_moe(**arguments | {"n_group": None, "topk_group": None})
    assert not torch.equal(output, ungrouped)
    unscaled = trtllm_bf16_moe(**arguments | {"routed_scaling_factor": None})
    torch.testing.assert_close(unscaled.float() * 2.5, output.float(), rtol=0.03, atol=0.02)
    assert not trtllm_bf16_moe(**arguments | {"routed_scaling_factor": 0.0}).any()


def test_norm_topk_prob_is_honoured_by_method_6_alone(device: torch.device) -> None:
    problem = make_problem(layer(), T, device=device)
    for method, is_honoured in ((6, True), (8, False), (1, False), (0, False)):
        config = layer(method=method, norm_topk_prob=False)
        arguments = flat_arguments(config, problem)
        output = trtllm_bf16_moe(**arguments)
        assert_output_is_right(output, config, problem, arguments)
        assert torch.equal(output, trtllm_bf16_moe(**arguments | {"norm_topk_prob": True})) is not is_honoured


def test_relu2_layer_has_one_matrix_of_rows(device: torch.device) -> None:
    config = layer(activation=6)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    assert arguments["gemm1_weights"].shape == (E, H // 64, I, 64)
    assert_output_is_right(trtllm_bf16_moe(**arguments), config, problem, arguments)


def test_unshuffled_blocks_are_read_in_their_natural_order(device: torch.device) -> None:
    config = layer(weight_format=FLASHINFER.model_dump() | {"is_shuffled": False})
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    output = trtllm_bf16_moe(**arguments, use_shuffled_weight=False)
    assert_output_is_right(output, config, problem, arguments)


def test_slice_of_experts_gives_its_partial_sum(device: torch.device) -> None:
    config = layer(local_expert_offset=5, num_local_experts=7)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    assert_output_is_right(trtllm_bf16_moe(**arguments), config, problem, arguments)


def test_unfinalized_list_sums_to_the_output(device: torch.device) -> None:
    config = layer(local_expert_offset=4, num_local_experts=8)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    unfinalized = trtllm_bf16_moe(**arguments, do_finalize=False)
    assert isinstance(unfinalized, list)
    rows, weights, row_of_slot = unfinalized
    assert (rows.dtype, weights.dtype, row_of_slot.dtype) == (torch.bfloat16, torch.bfloat16, torch.int32)
    assert rows.shape[1] == H
    assert weights.shape == (T, K)
    assert row_of_slot.shape == (T * K,)
    terms = rows[row_of_slot.clamp(min=0).long()].float() * weights.view(-1, 1).float()
    by_hand = torch.where(row_of_slot[:, None] >= 0, terms, 0.0).view(T, K, H).sum(dim=1)
    torch.testing.assert_close(trtllm_bf16_moe(**arguments).float(), by_hand, rtol=2**-8, atol=1e-6)
    chosen = select_experts_reference(problem.logits, config=config.routing)
    assert torch.equal(weights, chosen.weights)
    is_local = (chosen.expert_ids >= 4) & (chosen.expert_ids < 12)
    assert torch.equal(row_of_slot.view(T, K) >= 0, is_local)


def test_output_and_replay_are_written_in_place(device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    output = torch.full((T, H), float("nan"), dtype=torch.bfloat16, device=device)
    replay = torch.full((T + 3, K), -5, dtype=torch.int16, device=device)
    result = trtllm_bf16_moe(**arguments, output=output, routing_replay_out=replay)
    assert result is output
    assert torch.equal(output, trtllm_bf16_moe(**arguments))
    assert torch.equal(replay[:T].int(), select_experts_reference(problem.logits, config=config.routing).expert_ids)
    assert (replay[T:] == -5).all()


def test_buffers_allocated_in_inference_mode_are_written_outside_of_it(device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    with torch.inference_mode():
        output = torch.full((T, H), float("nan"), dtype=torch.bfloat16, device=device)
        replay = torch.full((T, K), -5, dtype=torch.int16, device=device)
    assert trtllm_bf16_moe(**arguments, output=output, routing_replay_out=replay) is output
    assert torch.equal(output, trtllm_bf16_moe(**arguments))
    assert torch.equal(replay.int(), select_experts_reference(problem.logits, config=config.routing).expert_ids)


@pytest.mark.parametrize("changes", [{"enable_pdl": False}, {"enable_pdl": None}, {"tune_max_num_tokens": 1}])
def test_arguments_without_effect_change_no_bit(changes: dict[str, Any], device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    assert torch.equal(trtllm_bf16_moe(**arguments | changes), trtllm_bf16_moe(**arguments))


def test_swiglu_parameters_are_honoured(device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    parameters = {
        "gemm1_alpha": torch.full((E,), 1.702, device=device),
        "gemm1_beta": torch.ones(E, device=device),
        "gemm1_clamp_limit": torch.full((E,), 0.5, device=device),
    }
    output = trtllm_bf16_moe(**arguments, **parameters)
    swiglu = moe.SwigluParams(*parameters.values())
    topk = select_experts_reference(problem.logits, config=config.routing)
    packed = (arguments["gemm1_weights"], arguments["gemm2_weights"])
    reference = reference_pipeline(config).run_experts(topk, problem.hidden_states, *packed, swiglu=swiglu)
    exact = experts_in_float64(topk, problem.hidden_states, problem.w1, problem.w2, swiglu=swiglu)
    assert_close_to_exact(output, reference, exact)


def routed(arguments: dict[str, Any], topk_ids: Tensor | tuple[Tensor, Tensor], **changes: Any) -> Any:
    kept = {n: v for n, v in arguments.items() if n not in ("routing_logits", "routing_bias", "norm_topk_prob")}
    return trtllm_bf16_routed_moe(topk_ids, **kept | changes)


def pack_topk(topk: TopK) -> Tensor:
    bits = topk.weights.view(torch.int16).int() & 0xFFFF
    return (topk.expert_ids << 16) | bits


def test_four_ways_to_name_the_experts_agree(device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    topk = select_experts_reference(problem.logits, config=config.routing)
    from_logits = trtllm_bf16_moe(**arguments)
    assert torch.equal(routed(arguments, pack_topk(topk)), from_logits)
    assert torch.equal(routed(arguments, (topk.expert_ids, topk.weights)), from_logits)
    assert torch.equal(routed(arguments, [topk.expert_ids, topk.weights]), from_logits)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_chunk_of_a_batch_may_begin_at_any_token(first: int, device: torch.device) -> None:
    """Rows of 3 choices have 12 bytes of ids and 6 of weights, those of 10 logits have 40: few begin at a multiple of 16."""
    config = layer(num_experts=10, top_k=3)
    problem = make_problem(config, T, device=device)
    topk = select_experts_reference(problem.logits, config=config.routing)
    replay = torch.full((T, 3), -5, dtype=torch.int16, device=device)
    arguments = flat_arguments(config, problem) | {"hidden_states": problem.hidden_states[first:]}
    arguments["routing_logits"] = problem.logits[first:]
    expected = trtllm_bf16_moe(**arguments | {"routing_logits": problem.logits[first:].clone()})
    assert torch.equal(trtllm_bf16_moe(**arguments, routing_replay_out=replay[first:]), expected)
    assert torch.equal(replay[first:].int(), topk.expert_ids[first:])
    assert torch.equal(routed(arguments, (topk.expert_ids[first:], topk.weights[first:])), expected)
    assert torch.equal(routed(arguments, pack_topk(topk)[first:]), expected)


def test_float32_weights_are_not_rounded(device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    ids = select_experts_reference(problem.logits, config=config.routing).expert_ids
    weights = torch.full((T, K), 1 + 2**-9, device=device)  # rounds to 1 in bfloat16
    rows, returned, row_of_slot = routed(arguments, (ids, weights), do_finalize=False)
    assert returned is weights
    exact = (rows[row_of_slot.view(T, K).long()].double() * weights.double()[..., None]).sum(dim=1)
    output = routed(arguments, (ids, weights))
    assert torch.equal(output, exact.to(torch.bfloat16))


@pytest.mark.parametrize("is_packed", [True, False])
def test_ids_that_are_no_experts_are_skipped(is_packed: bool, device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    topk = select_experts_reference(problem.logits, config=config.routing)
    bad = torch.tensor([-1, E, 32767, -32768], dtype=torch.int32, device=device)
    ids = topk.expert_ids.clone()
    ids[:, 1] = bad[torch.arange(T, device=device) % 4]
    ids[3] = -1
    skipping = TopK(ids, topk.weights)
    output = routed(arguments, pack_topk(skipping) if is_packed else (ids, topk.weights))
    assert_output_is_right(output, config, problem, arguments, skipping)
    assert (output[3] == 0).all()


def test_an_expert_named_twice_counts_twice(device: torch.device) -> None:
    config = layer(top_k=2)
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    ids = torch.full((T, 2), 3, dtype=torch.int32, device=device)
    halves = torch.full((T, 2), 0.5, device=device)
    twice = routed(arguments, (ids, halves))
    ids_once = torch.tensor([[3, -1]], dtype=torch.int32, device=device).expand(T, 2).contiguous()
    once = routed(arguments, (ids_once, halves * 2))
    assert torch.equal(twice, once)


def test_replay_of_the_routed_call_is_left_alone(device: torch.device) -> None:
    config = layer()
    problem = make_problem(config, T, device=device)
    arguments = flat_arguments(config, problem)
    topk = select_experts_reference(problem.logits, config=config.routing)
    replay = torch.full((T, K), -5, dtype=torch.int16, device=device)
    routed(arguments, (topk.expert_ids, topk.weights), routing_replay_out=replay)
    assert (replay == -5).all()


def test_flat_call_captures_and_replays(cuda: torch.device) -> None:
    config = layer(method=2, n_group=4, topk_group=2)
    problem = make_problem(config, T, device=cuda)
    arguments = flat_arguments(config, problem)
    trtllm_bf16_moe(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trtllm_bf16_moe(**arguments)
    fresh = make_problem(config, T, seed=5, device=cuda)
    problem.logits.copy_(fresh.logits)
    problem.hidden_states.copy_(fresh.hidden_states)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, trtllm_bf16_moe(**arguments))


@pytest.fixture
def unfinalized_cases(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a layer with a bias, and everything that stopping before finalize must not lose."""
    config = layer(method="DeepSeekV3", n_group=4, topk_group=2, routed_scaling_factor=2.5)
    problem = make_problem(config, T, device=device)
    generator = torch.Generator().manual_seed(3)
    swiglu = {name: torch.rand(E, generator=generator).to(device) + 0.5 for name in ("alpha", "beta", "clamp_limit")}
    arguments = flat_arguments(config, problem) | {"routing_bias": torch.randn(E, generator=generator).to(device)}
    return arguments, {f"gemm1_{name}": value for name, value in swiglu.items()}


def sum_of(outputs: list[Tensor]) -> Tensor:
    """What finalize makes of an unfinalized list, in float32."""
    rows, weights, row_of_slot = outputs
    return (rows[row_of_slot.view(T, -1).long()].float() * weights.float()[..., None]).sum(1)


def test_stopping_before_finalize_keeps_bias_swiglu_and_replay(unfinalized_cases):
    arguments, swiglu = unfinalized_cases
    replays = [torch.full((T, K), -7, dtype=torch.int16, device=arguments["hidden_states"].device) for _ in range(2)]
    whole = trtllm_bf16_moe(**arguments, **swiglu, routing_replay_out=replays[0]).float()
    outputs = trtllm_bf16_moe(**arguments, **swiglu, routing_replay_out=replays[1], do_finalize=False)
    assert torch.equal(*replays)
    assert (sum_of(outputs) - whole).norm() <= 5e-3 * whole.norm()
    for without in ({**arguments, "routing_bias": None, **swiglu}, arguments):  # each of them matters here
        other = sum_of(trtllm_bf16_moe(**without, do_finalize=False))
        assert (other - whole).norm() > 0.1 * whole.norm()


def test_stopping_the_routed_call_before_finalize_keeps_swiglu(unfinalized_cases):
    arguments, swiglu = unfinalized_cases
    ids = torch.rand(T, E, device=arguments["hidden_states"].device).topk(K).indices.int()
    topk_ids = ids, torch.full((T, K), 0.25, dtype=torch.bfloat16, device=ids.device)
    whole = routed(arguments, topk_ids, **swiglu).float()
    assert (sum_of(routed(arguments, topk_ids, **swiglu, do_finalize=False)) - whole).norm() <= 5e-3 * whole.norm()
    assert (sum_of(routed(arguments, topk_ids, do_finalize=False)) - whole).norm() > 0.1 * whole.norm()


def test_batch_invariance_reaches_the_config(monkeypatch: pytest.MonkeyPatch):
    from moe import trtllm

    built: list[MoEConfig] = []
    build = trtllm.tuned_pipeline

    def tuned_pipeline(config: MoEConfig, *args: Any, **more: Any) -> Any:
        built.append(config)
        return build(config, *args, **more)

    monkeypatch.setattr(trtllm, "tuned_pipeline", tuned_pipeline)
    trtllm._pipeline_of.cache_clear()
    config = layer()
    problem = make_problem(config, 3, device=torch.device("cpu"))
    arguments = flat_arguments(config, problem)
    topk = select_experts_reference(problem.logits, config=config.routing)
    plain = trtllm_bf16_moe(**arguments)
    assert torch.equal(trtllm_bf16_moe(**arguments, is_batch_invariant=True), plain)
    trtllm._pipeline_of.cache_clear()  # both calls share a layer's pipeline
    assert torch.equal(routed(arguments, (topk.expert_ids, topk.weights), is_batch_invariant=True), plain)
    trtllm._pipeline_of.cache_clear()
    assert [c.few_tokens.max_tokens for c in built] == [None, 0, 0]


@pytest.mark.parametrize(("enable_pdl", "uses_pdl"), [(True, True), (None, True), (False, False)])
def test_enable_pdl_reaches_the_pipeline(enable_pdl: bool | None, uses_pdl: bool, monkeypatch: pytest.MonkeyPatch):
    from moe import trtllm

    asked: list[bool] = []
    build = trtllm.tuned_pipeline

    def tuned_pipeline(*args: Any, uses_pdl: bool, **more: Any) -> Any:
        asked.append(uses_pdl)
        return build(*args, uses_pdl=uses_pdl, **more)

    monkeypatch.setattr(trtllm, "tuned_pipeline", tuned_pipeline)
    trtllm._pipeline_of.cache_clear()
    config = layer()
    trtllm_bf16_moe(
        **flat_arguments(config, make_problem(config, 3, device=torch.device("cpu"))), enable_pdl=enable_pdl
    )
    trtllm._pipeline_of.cache_clear()
    assert asked == [uses_pdl]


def test_a_pipeline_is_built_where_the_hidden_states_lie(monkeypatch: pytest.MonkeyPatch):
    from moe import trtllm

    asked: list[tuple[torch.device, int]] = []

    def tuned_pipeline(config: MoEConfig, device: torch.device, *, max_num_tokens: int, **more: Any) -> Any:
        asked.append((device, max_num_tokens))
        return SimpleNamespace(run=lambda call: None, recipe="")

    monkeypatch.setattr(trtllm, "tuned_pipeline", tuned_pipeline)
    monkeypatch.setattr(trtllm, "run_traced", lambda recipe, call: None)
    arguments = flat_arguments(layer(), make_problem(layer(), 3))
    for device in ("cpu", "meta"):
        on_device = arguments | {"hidden_states": arguments["hidden_states"].to(device)}
        trtllm_bf16_moe(**on_device, tune_max_num_tokens=77)
    trtllm._pipeline_of.cache_clear()
    assert asked == [(torch.device("cpu"), 77), (torch.device("meta"), 77)]


def as_engines_pass_them(value: Any, kind: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if kind == "numpy":
        return np.int64(value) if isinstance(value, int) else np.float32(value)
    return torch.tensor(value) if kind == "tensors" else np.array(value)


@pytest.mark.parametrize("kind", ["numpy", "arrays", "tensors"])
def test_numbers_may_be_numpys_or_tensors_of_one_number(kind: str):
    config = layer(method="DeepSeekV3", n_group=2, topk_group=1, routed_scaling_factor=2.5)
    problem = make_problem(config, 5)
    arguments = flat_arguments(config, problem)
    arguments |= {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "routing_method_type": 2}
    expected = trtllm_bf16_moe(**arguments)
    numbers = {name: as_engines_pass_them(value, kind) for name, value in arguments.items()}
    assert torch.equal(trtllm_bf16_moe(**numbers), expected)


@pytest.mark.parametrize(
    "top_k",
    [torch.tensor(1), torch.nn.Parameter(torch.tensor(1), requires_grad=False), np.array(1)],
    ids=["tensor", "Parameter", "array"],
)
def test_what_holds_another_number_than_before_is_read_again(top_k: Any):
    config = layer()
    problem = make_problem(config, 5)
    arguments = flat_arguments(config, problem)
    one = trtllm_bf16_moe(**arguments | {"top_k": top_k})
    top_k[...] = 2
    two = trtllm_bf16_moe(**arguments | {"top_k": top_k})
    assert torch.equal(two, trtllm_bf16_moe(**arguments | {"top_k": 2}))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("top_k", np.bool_(True), "top_k: expected an int"),
        ("top_k", torch.tensor([2]), "top_k: expected an int"),
        ("num_experts", np.float64(8), "num_experts: expected an int"),
        ("routed_scaling_factor", torch.tensor(True), "routed_scaling_factor: expected a float or None"),
        ("do_finalize", 1, "do_finalize: expected a bool, got int"),
        ("top_k", [2], "top_k: expected an int, got list"),
    ],
    ids=["numpy bool", "a tensor with an axis", "numpy float", "tensor of a bool", "int for a bool", "list"],
)
def test_what_is_no_number_is_refused_by_its_name(name: str, value: Any, words: str):
    config = layer()
    arguments = flat_arguments(config, make_problem(config, 5)) | {name: value}
    with pytest.raises(TypeError, match=words):
        trtllm_bf16_moe(**arguments)


def workspace_for(config: MoEConfig, num_tokens: int, device: torch.device) -> Tensor:
    """A buffer of the size that is said, full of NaN whatever it is read as."""
    size = moe.trtllm_fused_moe_workspace_size(
        num_tokens,
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.top_k,
        local_num_experts=config.permute.num_local_experts,
    )
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300, 3000])
def test_both_calls_take_scratch_from_a_buffer_with_the_same_result(num_tokens: int, device: torch.device):
    config = layer(local_expert_offset=3, num_local_experts=9)
    problem = make_problem(config, num_tokens, device=device)
    arguments = flat_arguments(config, problem)
    workspace = workspace_for(config, 3000, device)
    expected = trtllm_bf16_moe(**arguments)
    for _ in range(2):
        assert torch.equal(trtllm_bf16_moe(**arguments, workspace_buffer=workspace), expected)
        workspace.fill_(0xFF)
    topk = select_experts_reference(problem.logits, config=config.routing)
    chosen = (topk.expert_ids, topk.weights)
    expected = routed(arguments, chosen)
    assert torch.equal(routed(arguments, chosen, workspace_buffer=workspace), expected)


@pytest.mark.parametrize("num_tokens", [1, 300, 3000])
def test_a_call_with_a_buffer_allocates_its_output_alone(num_tokens: int, cuda: torch.device):
    config = layer()
    problem = make_problem(config, num_tokens, device=cuda)
    arguments, workspace = flat_arguments(config, problem), workspace_for(config, num_tokens, cuda)
    output = torch.empty_like(problem.hidden_states)
    trtllm_bf16_moe(**arguments, workspace_buffer=workspace, output=output)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trtllm_bf16_moe(**arguments, workspace_buffer=workspace, output=output)
    assert torch.cuda.max_memory_allocated() == before


def test_a_buffer_that_cannot_be_used_is_refused_with_the_size():
    config = layer()
    problem = make_problem(config, 5)
    arguments = flat_arguments(config, problem)
    workspace = workspace_for(config, 5, problem.logits.device)
    needed = reference_pipeline(config).workspace(5).asked_bytes
    assert needed <= len(workspace)
    wrong = {
        rf"at least {needed} bytes for 5 tokens, got {needed - 1}": workspace[: needed - 1],
        "workspace_buffer: expected uint8": workspace.view(torch.int8),
        "workspace_buffer: expected 1-D": workspace[None],
        "aligned to 16 bytes": torch.zeros(len(workspace) + 16, dtype=torch.uint8)[1:],
    }
    for words, buffer in wrong.items():
        with pytest.raises(ValueError, match=words):
            trtllm_bf16_moe(**arguments, workspace_buffer=buffer)
    shared = torch.zeros(needed * 2, dtype=torch.uint8)
    inside = shared[: problem.hidden_states.nbytes].view(torch.bfloat16).view(problem.hidden_states.shape)
    inside.copy_(problem.hidden_states)
    with pytest.raises(ValueError, match="shares memory with hidden_states"):
        trtllm_bf16_moe(**arguments | {"hidden_states": inside}, workspace_buffer=shared)
    with pytest.raises(ValueError, match="workspace_buffer: expected None with do_finalize=False"):
        trtllm_bf16_moe(**arguments, do_finalize=False, workspace_buffer=workspace)


@pytest.mark.parametrize(
    ("change", "error"),
    [({"quant_mode": "nvfp4"}, ValueError), ({"top_k": 1.5}, TypeError), ({"max_num_tokens": -1}, ValueError)],
    ids=["quant_mode", "top_k", "max_num_tokens"],
)
def test_the_size_of_no_layer_is_refused(change: dict[str, Any], error: type[Exception]):
    numbers = {"max_num_tokens": 8, "hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K}
    with pytest.raises(error, match=next(iter(change)).removeprefix("max_")):
        moe.trtllm_fused_moe_workspace_size(**numbers | change)
