"""The whole layer against float64: its chain, its entries, and stages that are swapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_layer import REFERENCE_OF_STAGE, SMALL
from torch import Tensor

from moe import (
    FLASHINFER,
    MoEConfig,
    SwigluParams,
    TopK,
    WeightFormat,
    WeightLayout,
    build_pipeline,
    reference_pipeline,
)
from moe.gemm.weight_format import pack_weights
from moe.routing.reference import select_experts_reference
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import Problem, experts_in_float64, make_problem, random_topk

FORMATS = {
    "hugging_face": WeightFormat(),
    "major_mn": WeightFormat(layout=WeightLayout.MajorMn),
    "flashinfer": FLASHINFER,
    "shuffled_major_k": WeightFormat(layout=WeightLayout.MajorK, is_shuffled=True, gate_up_order="up_gate"),
}


def packed(problem: Problem, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """The problem's weights in the formats that the config names."""
    w1 = pack_weights(problem.w1, config.gemm1.weight_format, is_gated=config.gemm1.is_gated)
    return w1, pack_weights(problem.w2, config.gemm2.weight_format, is_gated=False)


def assert_layer_is_right(config: MoEConfig, num_tokens: int, device: torch.device, bias: Tensor | None = None) -> None:
    problem = make_problem(config, num_tokens, device=device)
    w1, w2 = packed(problem, config)
    output = build_pipeline(config, device)(problem.logits, problem.hidden_states, w1, w2, bias=bias)
    topk = select_experts_reference(problem.logits, bias, config=config.routing)
    reference = reference_pipeline(config).run_experts(topk, problem.hidden_states, w1, w2)
    exact = experts_in_float64(
        topk,
        problem.hidden_states,
        problem.w1,
        problem.w2,
        activation=config.gemm1.activation,
        local_expert_offset=config.permute.local_expert_offset,
    )
    assert output.dtype == torch.bfloat16
    assert_close_to_exact(output, reference, exact)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_layer_matches_float64(
    num_tokens: int, weight_format: WeightFormat, activation: str, device: torch.device
) -> None:
    config = MoEConfig.create(**SMALL, weight_format=weight_format, activation=activation)
    assert_layer_is_right(config, num_tokens, device)


@pytest.mark.parametrize(
    "dims",
    [
        {"hidden_size": 72, "intermediate_size": 40, "num_experts": 13, "top_k": 5},
        {"hidden_size": 704, "intermediate_size": 192, "num_experts": 3, "top_k": 3},
        {"hidden_size": 8, "intermediate_size": 8, "num_experts": 1, "top_k": 1},
        {"hidden_size": 264, "intermediate_size": 1856, "num_experts": 5, "top_k": 2},
    ],
    ids=lambda dims: "H{hidden_size}-I{intermediate_size}-E{num_experts}-K{top_k}".format(**dims),
)
def test_awkward_dimensions_match_float64(dims: dict[str, int], device: torch.device) -> None:
    assert_layer_is_right(MoEConfig.create(**dims), 33, device)


@pytest.mark.parametrize(
    "method", ["Default", "RenormalizeNaive", "SigmoidRenorm", "MiniMax2", "Sigmoid", "TopKSigmoid"]
)
def test_every_routing_method_feeds_the_layer(method: str, device: torch.device) -> None:
    config = MoEConfig.create(**SMALL, method=method, routed_scaling_factor=2.5)
    bias = torch.linspace(-1, 1, 8, device=device)
    assert_layer_is_right(config, 17, device, bias=bias)


def test_grouped_routing_feeds_the_layer(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL | {"num_experts": 32, "top_k": 4}, method=2, n_group=8, topk_group=3)
    assert_layer_is_right(config, 17, device, bias=torch.linspace(-1, 1, 32, device=device))


@pytest.mark.parametrize("num_local_experts", [1, 3, 4])
def test_partial_sums_of_the_ranks_add_up_to_the_whole(num_local_experts: int, device: torch.device) -> None:
    whole_config = MoEConfig.create(**SMALL | {"num_experts": 12, "top_k": 4})
    problem = make_problem(whole_config, 19, device=device)
    total = torch.zeros(19, SMALL["hidden_size"], dtype=torch.float64, device=device)
    for offset in range(0, 12, num_local_experts):
        config = MoEConfig.create(
            **SMALL | {"num_experts": 12, "top_k": 4},
            local_expert_offset=offset,
            num_local_experts=num_local_experts,
        )
        mine = slice(offset, offset + num_local_experts)
        part = build_pipeline(config, device)(
            problem.logits, problem.hidden_states, problem.w1[mine].clone(), problem.w2[mine].clone()
        )
        total += part.double()
    topk = select_experts_reference(problem.logits, config=whole_config.routing)
    exact = experts_in_float64(topk, problem.hidden_states, problem.w1, problem.w2)
    error = (total - exact).norm() / exact.norm()
    assert error < 1e-2, f"relative error {error:.2e}"


@pytest.mark.parametrize("offset", range(10))
def test_slice_at_every_offset_matches_float64(offset: int, device: torch.device) -> None:
    config = MoEConfig.create(
        **SMALL | {"num_experts": 12, "top_k": 4}, local_expert_offset=offset, num_local_experts=3
    )
    assert_layer_is_right(config, 11, device)


def test_tokens_without_a_local_expert_come_out_as_exact_zeros(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL, local_expert_offset=6, num_local_experts=2)
    problem = make_problem(config, 9, device=device)
    ids = torch.tensor([[0, 1], [6, 0], [-1, 8]] * 3, dtype=torch.int32, device=device)
    topk = TopK(ids, torch.full((9, 2), 0.5, device=device))
    dirty = torch.full((9, SMALL["hidden_size"]), float("nan"), dtype=torch.bfloat16, device=device)
    output = build_pipeline(config, device).run_experts(
        topk, problem.hidden_states, problem.w1, problem.w2, output=dirty
    )
    assert output is dirty
    has_local = (ids >= 6).logical_and(ids < 8).any(dim=1)
    assert (output[~has_local] == 0).all()
    assert (output[has_local] != 0).any(dim=1).all()


def test_one_expert_takes_all(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL | {"top_k": 1})
    problem = make_problem(config, 200, device=device)
    topk = TopK(torch.full((200, 1), 5, dtype=torch.int32, device=device), torch.ones(200, 1, device=device))
    output = build_pipeline(config, device).run_experts(topk, problem.hidden_states, problem.w1, problem.w2)
    exact = experts_in_float64(topk, problem.hidden_states, problem.w1, problem.w2)
    reference = reference_pipeline(config).run_experts(topk, problem.hidden_states, problem.w1, problem.w2)
    assert_close_to_exact(output, reference, exact)


def test_nan_logits_stay_in_their_token(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 6, device=device)
    pipeline = build_pipeline(config, device)
    clean = pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2)
    problem.logits[2, 3] = float("nan")
    problem.logits[4] = float("-inf")
    output = pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2)
    others = torch.tensor([0, 1, 3, 5], device=device)
    assert torch.equal(output[others], clean[others])
    assert output[2].isnan().all()


@pytest.mark.parametrize("absent", ["alpha", "beta", "clamp_limit", None])
def test_swiglu_parameters_reach_their_experts(absent: str | None, device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 24, device=device)
    swiglu = SwigluParams(
        alpha=torch.linspace(0.5, 2, 8, device=device),
        beta=torch.linspace(-1, 1, 8, device=device),
        clamp_limit=torch.linspace(0.2, 1.5, 8, device=device),
    )
    if absent:
        swiglu = replace(swiglu, **{absent: None})
    topk = random_topk(24, 8, 2, device=device)
    arguments = (topk, problem.hidden_states, problem.w1, problem.w2)
    output = build_pipeline(config, device).run_experts(*arguments, swiglu=swiglu)
    reference = reference_pipeline(config).run_experts(*arguments, swiglu=swiglu)
    assert_close_to_exact(output, reference, experts_in_float64(*arguments, swiglu=swiglu))


@pytest.mark.parametrize("stage", REFERENCE_OF_STAGE)
def test_swapping_one_stage_for_its_reference_changes_nothing(stage: str, device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 50, device=device)
    # Small integers: every product and sum is exact in float32, so that both stages must give the same bits.
    arguments = (
        problem.logits,
        (problem.hidden_states * 2).round(),
        (problem.w1 * 16).round() / 4,
        (problem.w2 * 16).round() / 4,
    )
    pipeline = build_pipeline(config, device)
    calls = []
    swapped_stage = REFERENCE_OF_STAGE[stage](config)

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(stage)
        return swapped_stage(*args, **kwargs)

    swapped = replace(pipeline, **{stage: counted})(*arguments)
    assert calls == [stage]
    torch.testing.assert_close(swapped, pipeline(*arguments), rtol=2**-7, atol=1e-2)


def test_finalizing_the_expert_outputs_by_hand_gives_the_layer(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL, local_expert_offset=2, num_local_experts=5)
    problem = make_problem(config, 21, device=device)
    pipeline = build_pipeline(config, device)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    stopped = pipeline.expert_outputs(*arguments)
    assert stopped.rows.shape == (config.permute.max_rows(21), SMALL["hidden_size"])
    is_local = (stopped.row_of_slot >= 0)[..., None]
    rows = stopped.rows[stopped.row_of_slot.clamp(min=0)].float()  # [T, K, H]
    by_hand = torch.where(is_local, rows * stopped.weights[..., None].float(), 0.0).sum(dim=1)
    torch.testing.assert_close(pipeline(*arguments).float(), by_hand, rtol=2**-8, atol=1e-6)


def test_starting_from_ids_gives_what_starting_from_logits_gives(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 40, device=device)
    pipeline = build_pipeline(config, device)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    topk = pipeline.route(problem.logits)
    from_logits = pipeline(problem.logits, *experts)
    assert torch.equal(pipeline.run_experts(topk, *experts), from_logits)
    unfinalized = pipeline.run_experts_unfinalized(topk, *experts)
    assert torch.equal(unfinalized.row_of_slot, pipeline.expert_outputs(problem.logits, *experts).row_of_slot)
    assert unfinalized.weights is topk.weights


def test_replay_records_the_chosen_ids(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL, local_expert_offset=3, num_local_experts=2)
    problem = make_problem(config, 5, device=device)
    replay = torch.full((9, 2), 77, dtype=torch.int16, device=device)
    pipeline = build_pipeline(config, device)
    pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2, routing_replay_out=replay)
    chosen = select_experts_reference(problem.logits, config=config.routing).expert_ids
    assert torch.equal(replay[:5].int(), chosen)
    assert (replay[5:] == 77).all()


@pytest.mark.parametrize(
    ("stage", "spoilt", "message"),
    [
        ("gemm2", lambda rows: rows[:, :64].clone(), r"result of gemm2: expected \[\d+, 128\], got \[\d+, 64\]"),
        ("gemm2", Tensor.float, "result of gemm2: expected bfloat16, got float32"),
        ("finalize", Tensor.float, "result of finalize: expected bfloat16, got float32"),
        ("finalize", lambda output: output[:3], r"result of finalize: expected \[4, 128\], got \[3, 128\]"),
    ],
    ids=["columns", "rows_in_fp32", "output_in_fp32", "tokens"],
)
def test_results_of_a_swapped_stage_are_checked(stage: str, spoilt: Callable[[Tensor], Tensor], message: str) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    pipeline = reference_pipeline(config)
    original = getattr(pipeline, stage)
    swapped = replace(pipeline, **{stage: lambda *args, **more: spoilt(original(*args, **more))})
    with pytest.raises(ValueError, match=message):
        swapped(problem.logits, problem.hidden_states, problem.w1, problem.w2)


def test_more_weight_elements_than_int32_can_count(cuda: torch.device) -> None:
    config = MoEConfig.create(hidden_size=4096, intermediate_size=2048, num_experts=136, top_k=2)
    w1 = torch.empty(config.gemm1.weight_shape, dtype=torch.bfloat16, device=cuda)
    w2 = torch.empty(config.gemm2.weight_shape, dtype=torch.bfloat16, device=cuda)
    assert w1.numel() > 2**31
    w1.normal_(0, 4096**-0.5)
    w2.normal_(0, 2048**-0.5)
    hidden_states = torch.randn(12, 4096, device=cuda).bfloat16()
    last = torch.arange(136 - 24, 136, dtype=torch.int32, device=cuda).view(12, 2)
    topk = TopK(last, torch.full((12, 2), 0.5, device=cuda))
    output = build_pipeline(config, cuda).run_experts(topk, hidden_states, w1, w2)
    reference = reference_pipeline(config).run_experts(topk, hidden_states, w1, w2)
    assert_close_to_exact(output, reference, experts_in_float64(topk, hidden_states, w1, w2))


@pytest.mark.parametrize("num_tokens", [1, 128, 2048])
def test_a_real_layer_matches_float64(num_tokens: int, cuda: torch.device) -> None:
    config = MoEConfig.create(
        hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8, weight_format=FLASHINFER
    )
    assert_layer_is_right(config, num_tokens, cuda)


@pytest.mark.parametrize(
    "dims", [{"hidden_size": 512, "intermediate_size": 256}, {"hidden_size": 200, "intermediate_size": 72}], ids=str
)
def test_a_batch_invariant_layer_gives_a_token_alone_the_bits_of_any_batch(
    dims: dict[str, int], cuda: torch.device
) -> None:
    config = MoEConfig.create(**dims, num_experts=8, top_k=2, is_batch_invariant=True)
    problem = make_problem(config, 2000, device=cuda)
    pipeline = build_pipeline(config, cuda)
    together = pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2)
    for num_tokens in (1, 7, 33, 300, 900):
        some = slice(0, num_tokens)
        alone = pipeline(problem.logits[some], problem.hidden_states[some], problem.w1, problem.w2)
        assert torch.equal(alone, together[some])
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 1, 1, 33, 900, 2000):  # from anywhere in the batch, in another order
        some = torch.randperm(2000, generator=generator)[:num_tokens].to(cuda)
        alone = pipeline(problem.logits[some], problem.hidden_states[some], problem.w1, problem.w2)
        assert torch.equal(alone, together[some])
