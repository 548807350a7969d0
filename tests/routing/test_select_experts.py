"""The routing kernels against the torch reference, and in CUDA graphs, on streams and on stale memory."""

import pytest
import torch
from routing.cases import (
    BIAS_DTYPES,
    BY_LOGIT,
    DTYPE_IDS,
    GROUPED,
    METHODS,
    RANKINGS,
    config_of,
    grouped,
    negative_nan_row,
    saturated_row,
    underflown_row,
)
from routing.oracle import assert_weights_are_exact_but_for_one_rounding, separated_problem
from torch import Tensor

from moe.flow import TopK
from moe.routing.config import RoutingConfig, RoutingMethod
from moe.routing.reference import select_experts_reference

SHAPES = [(1, 1, 1), (7, 13, 5), (2, 40, 32), (3, 257, 8), (2, 330, 9), (1, 600, 4), (2, 6, 6)]  # T, E, K
LARGE_SHAPES = [(1025, 128, 8), (300, 2048, 32), (513, 384, 6), (257, 896, 16)]
LARGE_GROUPED = [
    grouped(256, 8, 8, 4),
    grouped(64, 1, 4, 2),
    grouped(128, 4, 4, 2),
    grouped(2048, 32, 64, 5),
    grouped(1024, 7, 512, 9),
]


def run(
    logits: Tensor,
    bias: Tensor | None,
    config: RoutingConfig,
    device: torch.device,
    *,
    replay_out: Tensor | None = None,
) -> TopK:
    from moe.routing.topk import select_experts

    bias = None if bias is None else bias.to(device)
    return select_experts(logits.to(device), bias, config=config, replay_out=replay_out)


def assert_same(actual: TopK, reference: TopK) -> None:
    """Ids exactly; weights to one bf16 value, since a tanh or exp may differ by an ulp of float32."""
    assert actual.expert_ids.dtype is torch.int32
    assert actual.weights.dtype is torch.bfloat16
    assert torch.equal(actual.expert_ids.cpu(), reference.expert_ids)
    torch.testing.assert_close(
        actual.weights.cpu().float(), reference.weights.float(), rtol=2**-7, atol=1e-30, equal_nan=True
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}-E{}-K{}".format(*shape))
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_choices_and_weights_are_those_of_float64(numba_device, method, shape):
    num_tokens, num_experts, top_k = shape
    config = config_of(method, num_experts, top_k)
    logits, bias, exact = separated_problem(config, num_tokens, bias_dtype=torch.float32)
    topk = run(logits, bias, config, numba_device)
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


@pytest.mark.parametrize("num_experts", [128, 384, 600], ids="E{}".format)  # lanes of 4, of 12 and of 20 slots
def test_of_equal_logits_in_all_lanes_the_lowest_ids_come_first(numba_device, num_experts):
    config = config_of(RoutingMethod.TOPK, num_experts, 32)
    logits = torch.zeros(2, num_experts)
    logits[1, ::3] = 1.0
    expected = [list(range(32)), list(range(0, 96, 3))]
    assert run(logits, None, config, numba_device).expert_ids.tolist() == expected


def test_weights_are_rounded_to_the_nearest_bfloat16_and_ties_to_even(numba_device):
    """The rule whose weights are the logits themselves, so that nothing but their rounding is left."""
    numbers = [1 + number * 2.0**-10 for number in range(32)]  # bfloat16 has every eighth of them
    logits = torch.tensor([numbers, [-number for number in numbers], [number * 2.0**-130 for number in numbers]])
    topk = run(logits, None, config_of(RoutingMethod.TOPK, 32, 32), numba_device)
    expected = logits.gather(1, topk.expert_ids.cpu().long()).bfloat16()
    assert torch.equal(topk.weights.cpu(), expected)


@pytest.mark.parametrize("top_k", [1, 3, 8, 13, 32], ids="K{}".format)
@pytest.mark.parametrize("num_experts", [32, 33, 100, 256, 384, 777, 1024, 2048], ids="E{}".format)
def test_equal_logits_within_and_across_lanes_go_by_id(numba_device, num_experts, top_k):
    """Of 2, 3 and 9 different values, so that lanes hold many equals, and several choices come from one lane."""
    config = config_of(RoutingMethod.TOPK, num_experts, top_k)
    generator = torch.Generator().manual_seed(num_experts + top_k)
    logits = torch.stack([torch.randint(most, (num_experts,), generator=generator).float() for most in (2, 3, 9)])
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert run(logits, None, config, numba_device).expert_ids.tolist() == expected.tolist()


def rows_with_many_of_the_best_in_one_lane(num_experts: int, top_k: int) -> Tensor:
    """[2 S + 2, E], all numbers of a row different: 1 to S of the best K in one lane of S slots; one row that rises, one that falls."""
    generator = torch.Generator().manual_seed(num_experts + top_k)
    num_slots = -(-num_experts // 128) * 4
    numbers = torch.linspace(4, -4, num_experts)  # sigmoids are different too
    rows = [numbers, numbers.flip(0)]
    for count in [*range(1, num_slots + 1)] * 2:
        first = num_slots * int(torch.randint(num_experts // num_slots, (1,), generator=generator))
        experts = torch.randperm(num_experts, generator=generator)
        in_lane = (experts >= first) & (experts < first + num_slots)
        mine, others = experts[in_lane], experts[~in_lane]
        best = torch.cat([mine[:count], others[: max(top_k - count, 0)]])
        best = best[torch.randperm(len(best), generator=generator)]
        order = torch.cat([best, mine[count:], others[max(top_k - count, 0) :]])
        rows.append(torch.empty(num_experts).index_copy_(0, order, numbers))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config",
    [
        config_of(RoutingMethod.TOPK, 256, 8),  # a lane has sorted all its keys
        config_of(RoutingMethod.TOPK, 512, 10),
        config_of(RoutingMethod.TOPK, 512, 24),
        config_of(RoutingMethod.DEEPSEEK_V3, 384, 9),
        grouped(512, 16, 8, 4),  # lanes are ruled out
        grouped(512, 12, 8, 3),
        grouped(384, 12, 12, 6),  # experts are
    ],
    ids=lambda c: f"E{c.num_experts}-K{c.top_k}-G{c.n_group}-{c.topk_group}",
)
def test_one_lane_may_hold_more_of_the_best_than_it_has_sorted(numba_device, config):
    logits = rows_with_many_of_the_best_in_one_lane(config.num_experts, config.top_k)
    assert_same(run(logits, None, config, numba_device), select_experts_reference(logits, config=config))


def test_as_many_nans_as_choices_are_chosen_by_id(numba_device):
    """The key of a computed NaN is the one that stands for "has more"."""
    config = config_of(RoutingMethod.SIGMOID, 512, 10)
    logits = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    nans = torch.tensor([[3, 9, 10, 11, 12, 13, 14, 250, 300, 511], list(range(10))])
    logits.scatter_(1, nans, torch.nan)
    assert run(logits, None, config, numba_device).expert_ids.tolist() == nans.tolist()


@pytest.mark.parametrize("bias_dtype", BIAS_DTYPES, ids=DTYPE_IDS.get)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_every_dtype_of_logits_and_bias_is_read_right(numba_device, method, logits_dtype, bias_dtype):
    config = config_of(method, 45, 3)
    logits, bias, exact = separated_problem(config, 2, logits_dtype=logits_dtype, bias_dtype=bias_dtype)
    topk = run(logits, bias, config, numba_device)
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


def test_sigmoids_are_weights_as_they_are_where_the_config_does_not_normalise(numba_device):
    config = config_of(RoutingMethod.SIGMOID_RENORM, 45, 3, norm_topk_prob=False)
    logits, bias, exact = separated_problem(config, 2)
    topk = run(logits, bias, config, numba_device)
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


@pytest.mark.parametrize("bias_dtype", BIAS_DTYPES, ids=DTYPE_IDS.get)
@pytest.mark.parametrize("config", GROUPED, ids=lambda c: f"E{c.num_experts}-G{c.n_group}-{c.topk_group}")
def test_grouped_choices_and_weights_are_those_of_float64(numba_device, config, bias_dtype):
    logits, bias, exact = separated_problem(config, 2, bias_dtype=bias_dtype)
    topk = run(logits, bias, config, numba_device)
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


def test_as_many_experts_and_choices_as_the_kernel_holds(numba_device):
    config = config_of(RoutingMethod.RENORMALIZE, 2048, 32)
    logits, bias, exact = separated_problem(config, 1)
    topk = run(logits, bias, config, numba_device)
    assert topk.expert_ids.tolist() == exact.expert_ids
    assert_weights_are_exact_but_for_one_rounding(topk.weights, exact)


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: ranking.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPE_IDS.get)
def test_raw_logits_have_a_total_order(numba_device, dtype, ranking):
    config = RoutingConfig(num_experts=5, top_k=5, method="TopK")
    assert run(ranking.tensor(dtype), None, config, numba_device).expert_ids.tolist() == [list(ranking.order)]


def test_negative_nan_is_below_minus_infinity(numba_device):
    logits, order = negative_nan_row()
    config = RoutingConfig(num_experts=6, top_k=6, method="TopK")
    assert run(logits, None, config, numba_device).expert_ids.tolist() == [order]


def test_the_weight_of_a_nan_is_nan_whatever_its_bits(numba_device):
    bits = torch.tensor(
        [[0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF, 0, 1]], dtype=torch.int32
    )  # rounded as numbers: -0, inf, 0, -inf
    topk = run(bits.view(torch.float32), None, RoutingConfig(num_experts=6, top_k=6, method="TopK"), numba_device)
    assert topk.weights[topk.expert_ids < 4].isnan().all()
    assert (topk.weights[topk.expert_ids >= 4] == 0).all()


@pytest.mark.parametrize("method", ["SigmoidRenorm", "Sigmoid", "MiniMax2", "DeepSeekV3"])
def test_saturated_sigmoids_tie(numba_device, method):
    logits, order = saturated_row()
    config = RoutingConfig(num_experts=8, top_k=8, method=method)
    assert run(logits, None, config, numba_device).expert_ids.tolist() == [order]


def test_probabilities_that_underflow_tie(numba_device):
    logits, order = underflown_row()
    config = RoutingConfig(num_experts=5, top_k=5, method="Default")
    assert run(logits, None, config, numba_device).expert_ids.tolist() == [order]


@pytest.mark.parametrize("method", BY_LOGIT, ids=lambda method: method.value)
def test_ties_of_coarse_logits_go_to_the_lower_id(numba_device, method):
    config = config_of(method, 70, 9)
    logits = torch.randint(-2, 3, (5, 70), generator=torch.Generator().manual_seed(4)).bfloat16()
    assert_same(run(logits, None, config, numba_device), select_experts_reference(logits, config=config))


def edge_rows() -> Tensor:
    """NaNs, infinities, zeros of both signs and saturating values in rows of 12."""
    inf, nan = torch.inf, torch.nan
    rows = [
        [0.0] * 12,
        [-inf] * 12,
        [inf] * 12,
        [nan] * 12,
        [nan, 1, 2, -1, inf, -inf, 0, -0.0, nan, 3, -2, 0.5],
        [-inf, -inf, 1, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf],
        [30, 40, -30, -40, 20, 25, -25, 0, 1, 50, -50, 60],
        [300, 299, 298, 297, -300, 296, 200, 0, 1, 295, -299, 100],  # an exp of these is infinite
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_values_at_the_edge_are_treated_as_the_reference_does(numba_device, method):
    config = config_of(method, 12, 4)
    assert_same(run(edge_rows(), None, config, numba_device), select_experts_reference(edge_rows(), config=config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_whichever_logits_are_nan_the_choice_is_that_of_the_reference(numba_device, method, dtype):
    is_nan = (torch.arange(64)[:, None] >> torch.arange(6)) % 2 == 1  # all there are of six
    order = torch.rand(64, 6, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    logits = torch.linspace(-4, 4, 6)[order].to(dtype).masked_fill(is_nan, torch.nan)
    config = config_of(method, 6, 4)
    assert_same(run(logits, None, config, numba_device), select_experts_reference(logits, config=config))


def test_values_at_the_edge_are_treated_in_groups_as_the_reference_does(numba_device):
    config = grouped(12, 4, 3, 2)
    bias = torch.tensor([0, -1, 0, 0, torch.nan, 0, 0, torch.inf, -torch.inf, 0, 0, -1])
    for given in (None, bias):
        reference = select_experts_reference(edge_rows(), given, config=config)
        assert_same(run(edge_rows(), given, config, numba_device), reference)


@pytest.mark.parametrize(
    "config", [config_of(RoutingMethod.MINIMAX2, 40, 6), grouped(40, 6, 4, 2)], ids=["one", "groups"]
)
def test_weights_come_from_the_sigmoid_without_its_bias(numba_device, config):
    topk = run(torch.full((3, 40), -15.4), torch.full((40,), 12.0), config, numba_device)
    assert torch.allclose(topk.weights.float().sum(dim=1).cpu(), torch.tensor(2.5), atol=1e-2)


def test_the_smallest_sigmoids_are_normalised_too(numba_device):
    config = RoutingConfig(num_experts=8, top_k=1, method="SigmoidRenorm")
    assert (run(torch.full((3, 8), -16.0), None, config, numba_device).weights == 1).all()


@pytest.mark.parametrize("config", [grouped(16, 4, 4, 2), grouped(12, 4, 4, 2)], ids=["of_4_lanes", "of_3_lanes"])
def test_groups_of_equal_score_go_to_the_lower_group(numba_device, config):
    assert run(torch.zeros(2, config.num_experts), None, config, numba_device).expert_ids.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("config", [grouped(16, 2, 4, 1), grouped(12, 2, 4, 1)], ids=["of_4_lanes", "of_3_lanes"])
def test_two_equal_keys_of_a_group_are_both_in_its_score(numba_device, config):
    logits = torch.zeros(1, 4, config.num_experts // 4)
    logits[0, 0, :2] = torch.tensor([1.0, 0.9])
    logits[0, 2, 1:3] = 1
    first = 2 * config.num_experts // 4
    assert run(logits.flatten(1), None, config, numba_device).expert_ids.tolist() == [[first + 1, first + 2]]


def test_experts_of_other_groups_are_out_even_where_all_keys_are_negative(numba_device):
    bias = torch.tensor([-9.0, -9, -3, -8, -5, -5, -9, -9])
    assert run(torch.zeros(1, 8), bias, grouped(8, 2, 4, 1), numba_device).expert_ids.tolist() == [[4, 5]]


@pytest.mark.parametrize(
    "config", [config_of(RoutingMethod.RENORMALIZE, 40, 6), grouped(40, 6, 4, 2)], ids=["one", "groups"]
)
def test_replay_gets_the_ids_and_its_other_rows_stay(numba_device, config):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    replay = torch.full((9, 6), -77, dtype=torch.int16, device=numba_device)
    topk = run(logits, None, config, numba_device, replay_out=replay)
    assert torch.equal(replay[:5].int(), topk.expert_ids)
    assert (replay[5:] == -77).all()


def test_grouped_routing_rounds_the_bias_to_bf16_and_ungrouped_does_not(numba_device):
    bias = torch.zeros(8)
    bias[6], bias[1] = 1 + 2**-9, 1  # equal in bfloat16
    ungrouped = RoutingConfig(num_experts=8, top_k=2, method="DeepSeekV3")
    assert run(torch.zeros(1, 8), bias, grouped(8, 2, 2, 2), numba_device).expert_ids.tolist() == [[1, 6]]
    assert run(torch.zeros(1, 8), bias, ungrouped, numba_device).expert_ids.tolist() == [[6, 1]]


def test_no_tokens_launch_nothing(numba_device, monkeypatch):
    from moe.runtime.numba_launch import NumbaKernel

    monkeypatch.setattr(NumbaKernel, "launch", lambda *_: pytest.fail("launched"))
    replay = torch.full((2, 3), -77, dtype=torch.int16, device=numba_device)
    topk = run(torch.empty(0, 9), None, config_of(RoutingMethod.TOPK, 9, 3), numba_device, replay_out=replay)
    assert (topk.expert_ids.shape, topk.expert_ids.dtype) == ((0, 3), torch.int32)
    assert (topk.weights.shape, topk.weights.dtype) == ((0, 3), torch.bfloat16)
    assert (replay == -77).all()


def test_every_element_of_the_outputs_is_written(numba_device, monkeypatch):
    config = config_of(RoutingMethod.SIGMOID_RENORM, 33, 7)
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(5)).to(numba_device)
    expected = select_experts_reference(logits.cpu(), config=config)
    new_empty, num_poisoned = Tensor.new_empty, 0

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        nonlocal num_poisoned
        num_poisoned += 1
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(1 << 30))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert_same(run(logits, None, config, numba_device), expected)
    assert num_poisoned == 2


def test_configs_beyond_the_kernels_are_refused(numba_device):
    from moe.routing.topk import takes

    for config in (config_of(RoutingMethod.TOPK, 2049, 2), config_of(RoutingMethod.TOPK, 64, 33)):
        assert not takes(config)
        with pytest.raises(ValueError, match="use select_experts_reference"):
            run(torch.zeros(1, config.num_experts), None, config, numba_device)


def test_tensors_that_do_not_fit_are_refused(numba_device):
    with pytest.raises(ValueError, match=r"routing_logits dim1 must match num_experts\."):
        run(torch.zeros(4, 7), None, RoutingConfig(num_experts=8, top_k=2), numba_device)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=lambda shape: "T{}-E{}-K{}".format(*shape))
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_many_tokens_are_routed_as_by_the_reference(cuda, method, shape, logits_dtype):
    num_tokens, num_experts, top_k = shape
    config = config_of(method, num_experts, top_k)
    generator = torch.Generator().manual_seed(6)
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)
    logits = torch.linspace(-4, 4, num_experts)[order].to(logits_dtype)
    assert_same(run(logits, None, config, cuda), select_experts_reference(logits, config=config))


@pytest.mark.parametrize("config", LARGE_GROUPED, ids=lambda c: f"E{c.num_experts}-G{c.n_group}-{c.topk_group}")
def test_many_tokens_are_routed_in_groups_as_by_the_reference(cuda, config):
    # sigmoids of one grid and its multiples: sums tie exactly or are far apart
    logits = torch.randint(0, 5, (513, config.num_experts), generator=torch.Generator().manual_seed(7)).float()
    assert_same(run(logits, None, config, cuda), select_experts_reference(logits, config=config))


def test_rows_beyond_2_to_the_31_elements_are_reached(cuda):
    num_tokens, num_experts = (1 << 20) + 3, 2048
    logits = torch.zeros(num_tokens, num_experts, dtype=torch.bfloat16, device=cuda)
    logits[-1, 1234] = 1
    logits[-1, 77] = 2
    topk = run(logits, None, RoutingConfig(num_experts=num_experts, top_k=2, method="TopK"), cuda)
    assert topk.expert_ids[-1].tolist() == [77, 1234]
    assert (topk.expert_ids[:-1].cpu() == torch.tensor([0, 1])).all()


@pytest.mark.parametrize(
    "config", [config_of(RoutingMethod.DEFAULT, 256, 8), grouped(256, 8, 8, 4)], ids=["one", "groups"]
)
def test_twenty_runs_have_the_same_bits(cuda, config):
    logits = torch.randn(777, 256, generator=torch.Generator().manual_seed(8)).to(cuda)
    first = run(logits, None, config, cuda)
    for _ in range(19):
        again = run(logits, None, config, cuda)
        assert torch.equal(again.expert_ids, first.expert_ids)
        assert torch.equal(again.weights, first.weights)


@pytest.mark.parametrize("is_reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("config", [config_of(RoutingMethod.TOPK, 96, 5), grouped(96, 5, 8, 3)], ids=["one", "groups"])
def test_a_captured_graph_routes_whatever_the_logits_hold_by_then(cuda, config, is_reference):
    from moe.routing.topk import select_experts

    route = select_experts_reference if is_reference else select_experts
    generator = torch.Generator().manual_seed(9)
    logits = torch.randint(0, 9, (33, 96), generator=generator).float().to(cuda)
    replay = torch.full((40, 5), -77, dtype=torch.int16, device=cuda)
    route(logits, config=config, replay_out=replay)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk = route(logits, config=config, replay_out=replay)
    for _ in range(3):
        logits.copy_(torch.randint(0, 9, (33, 96), generator=generator).float())
        topk.weights.fill_(torch.nan)
        graph.replay()
        expected = select_experts_reference(logits.cpu(), config=config)
        assert_same(topk, expected)
        assert torch.equal(replay[:33].cpu().int(), expected.expert_ids)
        assert (replay[33:] == -77).all()


def test_the_current_stream_is_used(cuda):
    config = config_of(RoutingMethod.TOPK, 128, 4)
    logits = torch.zeros(4096, 128, device=cuda)
    run(logits, None, config, cuda)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        logits[:, 9] = 1
        topk = run(logits, None, config, cuda)
        assert not stream.query()
    stream.synchronize()
    assert (topk.expert_ids[:, 0] == 9).all()


@pytest.mark.gpu
def test_tensors_on_another_gpu_than_the_current_are_routed_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = config_of(RoutingMethod.TOPK, 128, 4)
    logits = torch.randn(65, 128, generator=torch.Generator().manual_seed(10))
    for index in (1, 0, 1):
        topk = run(logits, None, config, torch.device("cuda", index))
        assert topk.expert_ids.device.index == index
        assert_same(topk, select_experts_reference(logits, config=config))
    assert torch.cuda.current_device() == 0
