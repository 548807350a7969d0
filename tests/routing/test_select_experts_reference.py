"""The torch reference against arithmetic in float64, against transformers' routers, and at the edges of the contract."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing.cases import (
    BIAS_DTYPES,
    BY_LOGIT,
    DTYPE_IDS,
    GROUPED,
    METHODS,
    RANKINGS,
    Ranking,
    config_of,
    grouped,
    negative_nan_row,
    saturated_row,
    underflown_row,
)
from routing.oracle import assert_weights_are_exact_but_for_one_rounding, separated_problem

from moe.routing.config import RoutingConfig, RoutingMethod
from moe.routing.reference import select_experts_reference


@pytest.mark.parametrize("bias_dtype", BIAS_DTYPES, ids=DTYPE_IDS.get)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("shape", [(7, 13, 5), (5, 40, 32), (3, 257, 8), (2, 6, 6), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_choices_and_weights_are_those_of_float64(method, shape, logits_dtype, bias_dtype):
    num_tokens, num_experts, top_k = shape
    config = config_of(method, num_experts, top_k)
    logits, bias, exact = separated_problem(config, num_tokens, logits_dtype=logits_dtype, bias_dtype=bias_dtype)
    topk = select_experts_reference(logits, bias, config=config)
    assert topk.expert_ids.dtype is torch.int32
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


@pytest.mark.parametrize("bias_dtype", BIAS_DTYPES, ids=DTYPE_IDS.get)
@pytest.mark.parametrize("config", GROUPED, ids=lambda c: f"E{c.num_experts}-G{c.n_group}-{c.topk_group}")
def test_grouped_choices_and_weights_are_those_of_float64(config, bias_dtype):
    logits, bias, exact = separated_problem(config, 5, bias_dtype=bias_dtype)
    topk = select_experts_reference(logits, bias, config=config)
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


def test_sizes_beyond_the_kernels_are_routed_too():
    config = config_of(RoutingMethod.RENORMALIZE, 2500, 40)
    logits, _, exact = separated_problem(config, 2)
    assert select_experts_reference(logits, config=config).expert_ids.tolist() == exact.expert_ids


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: ranking.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("method", BY_LOGIT, ids=lambda method: method.value)
def test_raw_logits_have_a_total_order(method: RoutingMethod, dtype: torch.dtype, ranking: Ranking):
    config = config_of(method, 5, 5)
    ids = select_experts_reference(ranking.tensor(dtype), config=config).expert_ids
    assert ids.tolist() == [list(ranking.order[: config.top_k])]


def test_negative_nan_is_below_minus_infinity():
    logits, order = negative_nan_row()
    topk = select_experts_reference(logits, config=RoutingConfig(num_experts=6, top_k=6, method="TopK"))
    assert topk.expert_ids.tolist() == [order]


@pytest.mark.parametrize("method", ["SigmoidRenorm", "Sigmoid", "MiniMax2", "DeepSeekV3"])
def test_saturated_sigmoids_tie(method):
    logits, order = saturated_row()
    topk = select_experts_reference(logits, config=RoutingConfig(num_experts=8, top_k=8, method=method))
    assert topk.expert_ids.tolist() == [order]


def test_probabilities_that_underflow_tie():
    logits, order = underflown_row()
    topk = select_experts_reference(logits, config=RoutingConfig(num_experts=5, top_k=5, method="Default"))
    assert topk.expert_ids.tolist() == [order]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_a_row_of_minus_infinity_chooses_the_first_experts(method):
    config = config_of(method, 9, 3)
    topk = select_experts_reference(torch.full((2, 9), -torch.inf), config=config)
    assert topk.expert_ids.tolist() == [list(range(config.top_k))] * 2
    if method in (RoutingMethod.DEFAULT, RoutingMethod.RENORMALIZE, RoutingMethod.RENORMALIZE_NAIVE):
        assert topk.weights.isnan().all()
    else:
        assert (topk.weights == (-torch.inf if method is RoutingMethod.TOPK else 0)).all()


@pytest.mark.parametrize("method", ["Default", "Renormalize", "DeepSeekV3", "SigmoidRenorm"])
def test_one_nan_reaches_all_weights_that_share_its_sum(method):
    logits = torch.tensor([[0.5, torch.nan, 1, 2], [0.5, 0, 1, 2]])
    topk = select_experts_reference(logits, config=RoutingConfig(num_experts=4, top_k=2, method=method))
    assert topk.weights[0].isnan().all()
    assert topk.weights[1].isfinite().all()


@pytest.mark.parametrize("method", ["Sigmoid", "TopK", "TopKSigmoid"])
def test_one_nan_stays_where_nothing_is_summed(method):
    logits = torch.tensor([[0.5, torch.nan, 1, 2]])
    topk = select_experts_reference(logits, config=RoutingConfig(num_experts=4, top_k=2, method=method))
    assert topk.expert_ids.tolist() == [[1, 3]]
    assert topk.weights.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("method", ["DeepSeekV3", "MiniMax2"])
def test_weights_come_from_the_sigmoid_without_its_bias(method):
    config = RoutingConfig(num_experts=40, top_k=6, method=method, routed_scaling_factor=2.5)
    logits = torch.full((3, 40), -15.4)  # a sigmoid of 2e-7, lost beside the bias
    topk = select_experts_reference(logits, torch.full((40,), 12.0), config=config)
    assert torch.allclose(topk.weights.float().sum(dim=1), torch.tensor(2.5), atol=1e-2)


def test_the_smallest_sigmoids_are_normalised_too():
    config = RoutingConfig(num_experts=8, top_k=1, method="SigmoidRenorm")
    assert (select_experts_reference(torch.full((3, 8), -16.0), config=config).weights == 1).all()


def test_experts_of_other_groups_are_out_even_where_all_keys_are_negative():
    config = grouped(8, 2, 4, 1)
    bias = torch.tensor([-9.0, -9, -3, -8, -5, -5, -9, -9])  # sums of groups: about -18, -11, -10, -18
    topk = select_experts_reference(torch.zeros(1, 8), bias, config=config)
    assert topk.expert_ids.tolist() == [[4, 5]]


def test_groups_of_equal_score_go_to_the_lower_group():
    topk = select_experts_reference(torch.zeros(2, 12), config=grouped(12, 4, 4, 2))
    assert topk.expert_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_grouped_routing_rounds_the_bias_to_bf16_and_ungrouped_does_not():
    bias = torch.zeros(8)
    bias[6], bias[1] = 1 + 2**-9, 1  # equal in bfloat16
    assert select_experts_reference(torch.zeros(1, 8), bias, config=grouped(8, 2, 2, 2)).expert_ids[0, 0] == 1
    ungrouped = RoutingConfig(num_experts=8, top_k=2, method="DeepSeekV3")
    assert select_experts_reference(torch.zeros(1, 8), bias, config=ungrouped).expert_ids[0, 0] == 6


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_scale_and_norm_topk_prob_matter_only_where_the_contract_says(method):
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    plain = {"num_experts": 16, "top_k": 1 if method is RoutingMethod.LLAMA4 else 4, "method": method}
    weights = select_experts_reference(logits, config=RoutingConfig(**plain)).weights
    scaled = select_experts_reference(logits, config=RoutingConfig(**plain, routed_scaling_factor=2)).weights
    unnormalized = select_experts_reference(logits, config=RoutingConfig(**plain, norm_topk_prob=False)).weights
    assert torch.equal(scaled, weights * 2 if method.uses_bias else weights)
    assert torch.equal(unnormalized, weights) == (method is not RoutingMethod.SIGMOID_RENORM)


@pytest.mark.parametrize("method", [m for m in METHODS if not m.uses_bias], ids=lambda method: method.value)
def test_methods_without_a_bias_ignore_it(method):
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    config = config_of(method, 16, 4)
    without = select_experts_reference(logits, config=config)
    with_bias = select_experts_reference(logits, torch.linspace(-9, 9, 16), config=config)
    assert torch.equal(with_bias.expert_ids, without.expert_ids)
    assert torch.equal(with_bias.weights, without.weights)


@pytest.mark.parametrize("config", [config_of(RoutingMethod.TOPK, 9, 3), grouped(12, 4, 3, 3)], ids=["TopK", "grouped"])
def test_no_tokens_give_empty_tensors(config):
    topk = select_experts_reference(torch.empty(0, config.num_experts), config=config)
    assert (topk.expert_ids.shape, topk.expert_ids.dtype) == ((0, config.top_k), torch.int32)
    assert (topk.weights.shape, topk.weights.dtype) == ((0, config.top_k), torch.bfloat16)


def test_replay_gets_the_ids_and_its_other_rows_stay():
    config = config_of(RoutingMethod.RENORMALIZE, 40, 6)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    replay = torch.full((9, 6), -77, dtype=torch.int16)
    topk = select_experts_reference(logits, config=config, replay_out=replay)
    assert torch.equal(replay[:5].int(), topk.expert_ids)
    assert (replay[5:] == -77).all()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("logits", torch.zeros(4), "routing_logits must be 2D."),
        ("logits", torch.zeros(4, 7), "routing_logits dim1 must match num_experts."),
        ("logits", torch.zeros(4, 8, dtype=torch.float16), "routing_logits must be float or bfloat16."),
        ("logits", torch.zeros(8, 4).T, "contiguous"),
        ("bias", torch.zeros(2, 4), "routing_bias must be 1D."),
        ("bias", torch.zeros(9), "routing_bias has incorrect shape."),
        ("bias", torch.zeros(8, dtype=torch.float64), "routing_bias must be bfloat16 or float."),
        ("replay_out", torch.zeros(4, 2), "routing_replay_out must be int16"),
        ("replay_out", torch.zeros(8, dtype=torch.int16), "must be 2D"),
        ("replay_out", torch.zeros(4, 3, dtype=torch.int16), "dim1 must equal top_k="),
        ("replay_out", torch.zeros(3, 2, dtype=torch.int16), "at least num_tokens=4 rows, got 3"),
        ("bias", torch.zeros(8, device="meta"), "routing_bias: expected a tensor on cpu, got one on meta"),
        (
            "replay_out",
            torch.zeros(4, 2, dtype=torch.int16, device="meta"),
            "routing_replay_out: expected a tensor on cpu",
        ),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else value,
)
def test_tensors_that_do_not_fit_are_refused(argument, value, message):
    arguments = {"logits": torch.zeros(4, 8)} | {argument: value}
    with pytest.raises(ValueError, match=message):
        select_experts_reference(**arguments, config=RoutingConfig(num_experts=8, top_k=2))


@pytest.mark.parametrize("name", ["logits", "bias"])
def test_a_replay_over_what_is_read_is_refused(name):
    read = {"logits": torch.zeros(4, 8), "bias": torch.zeros(8)}
    replay = read[name].view(torch.int16).flatten()[:8].view(4, 2)
    with pytest.raises(ValueError, match=f"routing_replay_out: .* shares memory with routing_{name}"):
        select_experts_reference(**read, replay_out=replay, config=RoutingConfig(num_experts=8, top_k=2))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 0xFFFFFFFF), min_size=12, max_size=12), max_size=4),
    method=st.sampled_from([m for m in METHODS if m is not RoutingMethod.LLAMA4]),
    n_group=st.sampled_from([0, 2, 3, 6]),
    top_k=st.integers(1, 4),
)
def test_ids_are_distinct_and_in_range_for_any_bits(rows, method, n_group, top_k):
    logits = torch.tensor(rows, dtype=torch.int64).reshape(-1, 12).to(torch.int32).view(torch.float32)
    groups = {"n_group": n_group, "topk_group": 2} if method is RoutingMethod.DEEPSEEK_V3 else {}
    config = RoutingConfig(num_experts=12, top_k=top_k, method=method, **groups)
    ids = select_experts_reference(logits, config=config).expert_ids
    assert all(len({*row}) == top_k for row in ids.tolist())
    assert ((ids >= 0) & (ids < 12)).all()


HF_FIELDS = {
    "hidden_size": 64,
    "num_experts": 64,
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 3,
}


@pytest.mark.parametrize(
    ("module", "router", "fields", "is_normalized"),
    [
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"method": "Default"}, False),
        ("mixtral", "MixtralTopKRouter", {"method": "RenormalizeNaive"}, True),
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"method": "Renormalize"}, True),
        (
            "deepseek_v3",
            "DeepseekV3TopkRouter",
            {"method": "DeepSeekV3", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5},
            True,
        ),
        ("minimax_m2", "MiniMaxM2TopKRouter", {"method": "MiniMax2"}, True),
    ],
    ids=["Qwen3-unnormalized", "Mixtral", "Qwen3", "DeepSeek-V3", "MiniMax-M2"],
)
def test_routing_is_that_of_transformers(module, router, fields, is_normalized):
    models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    if not hasattr(models, router):
        pytest.skip(f"this transformers has no {router}")
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 64, generator=generator)
    bias = torch.rand(64, generator=generator).bfloat16().float()
    theirs = getattr(models, router)(SimpleNamespace(**HF_FIELDS, norm_topk_prob=is_normalized))
    theirs.weight.data = torch.eye(64)  # its logits are then its input
    extra = (bias,) if module == "minimax_m2" else ()
    if module == "deepseek_v3":
        theirs.e_score_correction_bias = bias
    _, weights, ids = theirs(logits, *extra)

    config = RoutingConfig(num_experts=64, top_k=6, **fields)
    topk = select_experts_reference(logits, bias, config=config)
    expected_of_id = torch.zeros(50, 64).scatter(1, ids, weights.detach())
    assert [set(row) for row in topk.expert_ids.tolist()] == [set(row) for row in ids.tolist()]
    torch.testing.assert_close(
        topk.weights.float(), expected_of_id.gather(1, topk.expert_ids.long()), rtol=2**-8 + 1e-5, atol=0
    )
