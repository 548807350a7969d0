"""Routing replayed: weights of recorded experts are those that routing gave them."""

import pytest
import torch
from routing.cases import METHODS, config_of, grouped
from routing.oracle import separated_problem

import moe
from moe.expert_ids import ID_DTYPES
from moe.routing.config import RoutingMethod
from moe.routing.reference import select_experts_reference, weigh_experts

CONFIGS = [
    *(config_of(method, 13, 1 if method is RoutingMethod.LLAMA4 else 4) for method in METHODS),
    grouped(32, 8, 4, 2),
]


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=["fp32_logits", "bf16_logits"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method.value}-{c.n_group}")
def test_recorded_experts_get_the_weights_that_routing_gave_them(config, logits_dtype):
    logits, bias, _ = separated_problem(config, 9, logits_dtype=logits_dtype, bias_dtype=torch.float32)
    recorded = torch.full((12, config.top_k), -7, dtype=torch.int16)
    routed = select_experts_reference(logits, bias, config=config, replay_out=recorded)
    replayed = weigh_experts(logits, recorded[:9], config=config)
    assert torch.equal(replayed.expert_ids, routed.expert_ids)
    assert replayed.expert_ids.dtype is torch.int32
    assert torch.equal(replayed.weights, routed.weights)
    assert replayed.weights.dtype is torch.bfloat16


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method.value}-{c.n_group}")
def test_an_id_of_no_expert_has_no_part(config):
    logits, _, _ = separated_problem(config, 3)
    ids = select_experts_reference(logits, config=config).expert_ids
    ids[0, -1], ids[1, -1], ids[2] = -1, config.num_experts, -1
    topk = weigh_experts(logits, ids, config=config)
    assert (topk.weights[ids < 0] == 0).all()
    assert topk.weights[1, -1] == 0
    if config.top_k > 1:
        fewer = config.model_copy(update={"top_k": config.top_k - 1})
        expected = weigh_experts(logits[:2], ids[:2, :-1].contiguous(), config=fewer).weights
        torch.testing.assert_close(topk.weights[:2, :-1], expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_experts_of_another_pass_are_weighed_by_these_logits(dtype):
    config = config_of(RoutingMethod.SIGMOID, 8, 2)
    logits = torch.linspace(-2, 2, 16).view(2, 8)
    ids = torch.tensor([[5, 0], [7, 3]], dtype=dtype)
    topk = weigh_experts(logits, ids, config=config)
    assert torch.equal(topk.weights, logits.gather(1, ids.long()).sigmoid().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_what_numbers_no_expert_is_refused(dtype):
    with pytest.raises(ValueError, match=f"expert_ids: expected int32 or .*got {str(dtype).removeprefix('torch.')}"):
        weigh_experts(torch.zeros(2, 8), torch.zeros(2, 2, dtype=dtype), config=config_of(RoutingMethod.SIGMOID, 8, 2))


def test_an_id_beyond_int32_is_no_expert_rather_than_another_one():
    ids = torch.tensor([[2**32 + 1, 0]])
    topk = weigh_experts(torch.zeros(1, 8), ids, config=config_of(RoutingMethod.SIGMOID, 8, 2))
    assert not 0 <= topk.expert_ids[0, 0] < 8
    assert topk.weights.tolist() == [[0.0, 0.5]]


def test_a_replayed_layer_has_the_bits_of_the_recorded_one():
    config = moe.MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2)
    pipeline = moe.build_pipeline(config, "cpu")
    logits, hidden_states = torch.randn(5, 8), torch.randn(5, 64).bfloat16()
    w1, w2 = torch.randn(8, 64, 64).bfloat16(), torch.randn(8, 64, 32).bfloat16()
    recorded = torch.empty(5, 2, dtype=torch.int16)
    output = pipeline(logits, hidden_states, w1, w2, routing_replay_out=recorded)
    topk = moe.weigh_experts(logits, recorded, config=config.routing)
    assert torch.equal(pipeline.run_experts(topk, hidden_states, w1, w2), output)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), r"expert_ids: expected \[T=2, K=2\], got \[3, 2\]"),
        (torch.zeros(2, 2), "expert_ids: expected int32 or int64 or .*, got float32"),
        (torch.zeros(4, dtype=torch.int32), "expert_ids: expected 2-D"),
    ],
    ids=["tokens", "dtype", "rank"],
)
def test_ids_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        weigh_experts(torch.zeros(2, 8), ids, config=config_of(RoutingMethod.TOPK, 8, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (moe.MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2), "got MoEConfig; pass config.routing"),
        ({"num_experts": 8}, "got dict; pass RoutingConfig"),
    ],
    ids=["layer", "dict"],
)  # fmt: skip
def test_a_config_of_something_else_is_refused_by_a_sentence(config: object, message: str):
    with pytest.raises(TypeError, match=f"config: expected a RoutingConfig, {message}"):
        weigh_experts(torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.int64), config=config)
