"""Which routing configs are refused, and in whose words."""

import pytest

from moe.routing.config import RoutingConfig, RoutingMethod


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k must be between 1 and num_experts"),
        ({"num_experts": (1 << 15) + 1}, "num_experts\n.*less than or equal to 32768"),
        ({"method": True}, "method\n.*Input should be 'Default'"),
        ({"method": 9}, "9 is Unspecified here.*TopKSigmoid in newer flashinfer"),
        ({"method": 42}, "Unimplemented routing method of enum 42"),
        ({"method": "Llama4"}, "For Llama routing method, must have topK == 1"),
        ({"n_group": 2}, "only supports n_group <= 1"),
        ({"topk_group": 2}, "only supports topk_group <= 1"),
        ({"method": 2, "n_group": 2}, "if n_group is given, topk_group must be given"),
        ({"method": 2, "n_group": 3, "topk_group": 1}, "num_experts must be divisible by n_group"),
        ({"method": 2, "n_group": 2, "topk_group": 3}, "n_group must not be smaller than topk_group."),
        ({"method": 2, "n_group": 8, "topk_group": 2}, "a group must have two experts at least"),
        (
            {"method": 2, "n_group": 4, "topk_group": 1, "top_k": 3},
            "top_k must be less than total number of experts in selected groups",
        ),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**{"num_experts": 8, "top_k": 2} | fields)


def test_what_is_left_out_is_renormalised_without_groups_or_scale():
    fields = {"n_group": 0, "topk_group": 0, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
    assert RoutingConfig(num_experts=8, top_k=2) == RoutingConfig(
        num_experts=8, top_k=2, method="Renormalize", **fields
    )


@pytest.mark.parametrize("method", ["DeepSeekV3", "Renormalize"])
@pytest.mark.parametrize("num_groups", [0, 1])
def test_one_group_is_none(num_groups, method):
    groups = {"n_group": num_groups, "topk_group": num_groups}
    assert not RoutingConfig(num_experts=8, top_k=2, method=method, **groups).is_grouped


def test_a_method_goes_by_its_number_or_its_name():
    by_number = RoutingConfig(num_experts=8, top_k=2, method=7)
    assert by_number == RoutingConfig(num_experts=8, top_k=2, method="MiniMax2")
    assert by_number.method is RoutingMethod.MINIMAX2


def test_a_config_survives_json():
    config = RoutingConfig(num_experts=256, top_k=8, method=2, n_group=8, topk_group=4, routed_scaling_factor=2.5)
    assert RoutingConfig.model_validate_json(config.model_dump_json()) == config
