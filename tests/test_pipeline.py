"""The whole layer against float64, and what a pipeline promises beside its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from closeness import assert_close_to_exact
from problems import Problem, experts_in_float64, make_problem, random_topk
from torch import Tensor

from moe import (
    FLASHINFER,
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
from moe.gemm.reference import gather_gemm_reference, grouped_gemm_reference
from moe.gemm.weight_format import pack_weights
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference
from moe.pipeline import FusedExperts
from moe.routing.config import RoutingConfig
from moe.routing.reference import select_experts_reference

SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 8, "top_k": 2}
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
        is_gated=config.gemm1.is_gated,
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


SWAPS = {
    "route": lambda c: partial(select_experts_reference, config=c.routing),
    "permute": lambda c: partial(plan_permutation_reference, config=c.permute),
    "gemm1": lambda c: partial(gather_gemm_reference, config=c.gemm1),
    "gemm2": lambda c: partial(grouped_gemm_reference, config=c.gemm2),
    "finalize": lambda c: partial(finalize_tokens_reference, config=c.finalize),
}


@pytest.mark.parametrize("stage", SWAPS)
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
    swapped_stage = SWAPS[stage](config)

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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 100}, "^hidden_size: input should be a multiple of 8, got 100$"),
        ({"intermediate_size": "64"}, "^intermediate_size: input should be a valid integer, got '64'$"),
        ({"activation": "tanh"}, "^activation: expected 'Swiglu' or 'Relu2', got 'tanh'$"),
        ({"activation": "silu"}, "got Silu"),
        ({"tile_rows": 12}, "^tile_rows: expected a power of two, got 12"),
        ({"num_local_experts": 0}, "num_local_experts: input should be greater than or equal to 1, got 0$"),
        ({"method": "best"}, "^method: input should be .* got 'best'$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_numbers_are_named_as_the_caller_knows_them(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.create(**SMALL | wrong)


def test_activations_go_by_any_case() -> None:
    assert MoEConfig.create(**SMALL, activation="swiglu") == MoEConfig.create(**SMALL, activation="Swiglu")


def test_a_pipeline_without_checks_leaves_them_to_its_stages() -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    pipeline = replace(reference_pipeline(config), checks_inputs=False)
    with pytest.raises(ValueError, match="gemm2_weights"):
        pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2[:3])


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("routing", {"num_experts": 9}, "routing.num_experts=9 but permute.num_experts=8"),
        ("routing", {"top_k": 3}, "routing.top_k=3 but permute.top_k=2"),
        ("gemm1", {"num_experts": 7}, "permute.num_local_experts=8 but gemm1.num_experts=7"),
        ("gemm2", {"num_experts": 7}, "permute.num_local_experts=8 but gemm2.num_experts=7"),
        ("gemm2", {"in_features": 72}, "gemm1.out_features=64 but gemm2.in_features=72"),
        ("gemm2", {"out_features": 136}, "gemm1.in_features=128 but gemm2.out_features=136"),
        ("gemm2", {"activation": "Relu2"}, "gemm2.activation: expected None, got Relu2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stages_that_disagree_are_refused_with_both_values(stage: str, change: dict[str, object], message: str) -> None:
    fields = MoEConfig.create(**SMALL).model_dump()
    with pytest.raises(ValueError, match=message):
        MoEConfig(**fields | {stage: fields[stage] | change})


def test_a_first_gemm_without_activation_is_refused() -> None:
    fields = MoEConfig.create(**SMALL, activation="Relu2").model_dump()
    with pytest.raises(ValueError, match=r"gemm1\.activation: expected Swiglu or Relu2, got None"):
        MoEConfig(**fields | {"gemm1": fields["gemm1"] | {"activation": None}})


def test_a_layer_of_four_numbers_renormalises_and_is_gated() -> None:
    config = MoEConfig.create(**SMALL)
    assert config.routing == RoutingConfig(num_experts=8, top_k=2, method="Renormalize")
    assert config.gemm1.is_gated


def test_config_survives_json() -> None:
    config = MoEConfig.create(**SMALL, method=2, weight_format=FLASHINFER, num_local_experts=4)
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config
    assert hash(config) == hash(MoEConfig.model_validate_json(config.model_dump_json()))


def layer_on(
    device: torch.device, num_tokens: int, **changes: object
) -> tuple[MoEPipeline, Callable[[], Tensor], Problem]:
    """A pipeline, a call of it over tensors that stay in place, and those tensors."""
    config = MoEConfig.create(**SMALL | {"num_experts": 32, "top_k": 4} | changes)
    problem = make_problem(config, num_tokens, device=device)
    pipeline = build_pipeline(config, device)

    def call() -> Tensor:
        return pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2)

    return pipeline, call, problem


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 1000])
def test_captured_call_follows_changed_inputs(num_tokens: int, cuda: torch.device) -> None:
    _, call, problem = layer_on(cuda, num_tokens)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(3):
        fresh = make_problem(
            MoEConfig.create(**SMALL | {"num_experts": 32, "top_k": 4}), num_tokens, seed=seed, device=cuda
        )
        problem.logits.copy_(fresh.logits)
        problem.hidden_states.copy_(fresh.hidden_states)
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, call())


@pytest.mark.parametrize("predecessor", ["copy", "zeros", "another stream"])
@pytest.mark.parametrize("num_tokens", [7, 64, 5000])
def test_a_captured_layer_waits_for_what_is_no_kernel_before_it(
    num_tokens: int, predecessor: str, cuda: torch.device
) -> None:
    """Its first kernel is a dependent launch, which a graph knows of kernels only: not of copies, nor of several streams."""
    pipeline, call, problem = layer_on(cuda, num_tokens)
    generator = torch.Generator(device=cuda).manual_seed(0)
    sources = torch.randn(4, *problem.logits.shape, generator=generator, device=cuda)
    source, large = sources[0].clone(), torch.randn(2, 1 << 24, generator=generator, device=cuda)
    other_stream = torch.cuda.Stream()

    def write_logits() -> None:
        if predecessor == "another stream":
            other_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other_stream):
                large[0].mul_(1.0)
                torch.add(source, 0.0, out=problem.logits)
            torch.cuda.current_stream().wait_stream(other_stream)
        else:
            large[0].copy_(large[1])
            problem.logits.copy_(source) if predecessor == "copy" else problem.logits.zero_()

    write_logits()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_logits()
        captured = call()
    for new_source in sources:
        source.copy_(new_source)
        problem.logits.fill_(float("nan"))
        captured.fill_(float("nan"))
        graph.replay()
        logits = new_source if predecessor != "zeros" else torch.zeros_like(new_source)
        expected = pipeline(logits, problem.hidden_states, problem.w1, problem.w2)
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("num_tokens", [1, 64, 3000])
def test_twenty_runs_give_the_same_bits(num_tokens: int, cuda: torch.device) -> None:
    _, call, _ = layer_on(cuda, num_tokens)
    first = call()
    assert all(torch.equal(call(), first) for _ in range(20))


def test_calls_never_wait_for_the_gpu(cuda: torch.device) -> None:
    _, call, _ = layer_on(cuda, 100)
    expected = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, expected)


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
    assert num_bytes <= pipeline.workspace_bytes(3000) <= 1.02 * num_bytes


def test_more_tokens_than_rows_have_numbers_are_refused() -> None:
    config, num_tokens = MoEConfig.create(**SMALL), 1 << 30
    logits = torch.empty(num_tokens, 8, device="meta")
    hidden_states = torch.empty(num_tokens, SMALL["hidden_size"], dtype=torch.bfloat16, device="meta")
    w1, w2 = (torch.empty(g.weight_shape, dtype=torch.bfloat16, device="meta") for g in (config.gemm1, config.gemm2))
    with pytest.raises(ValueError, match=r"num_tokens: expected fewer than 2\^31 rows"):
        reference_pipeline(config)(logits, hidden_states, w1, w2)


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


@pytest.mark.parametrize("wrong", [{"top_k": "2"}, {"top_k": True}, {"num_experts": 8.0}, {"tile_rows": "16"}], ids=str)
def test_counts_that_are_no_integers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MoEConfig.create(**SMALL | wrong)


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
    swapped = replace(pipeline, **{stage: SWAPS[stage](config)})
    assert torch.equal(swapped(*arguments), plain(*arguments))
    assert calls == []
    assert (replace(pipeline, route=SWAPS["route"](config))(*arguments) == 7).all()


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


def test_a_fused_callable_checks_again_only_what_the_pipeline_has_not() -> None:
    config, other = (MoEConfig.create(**SMALL | fields) for fields in ({}, {"norm_topk_prob": False}))
    plain = reference_pipeline(config)
    calls: list[str] = []

    def note(name: str) -> Callable[..., Tensor]:
        return lambda topk, hidden_states, *weights, **more: calls.append(name) or torch.zeros_like(hidden_states)

    stages = (plain.permute, plain.gemm1, plain.gemm2, plain.finalize)
    fused = FusedExperts(note("run"), 8, stages, launch=note("launch"), checked_by=config, routed_by=plain.route)
    pipeline = replace(plain, fused=fused)
    problem = make_problem(config, 2)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    topk = plain.route(problem.logits)
    variants = {
        "as_built": (pipeline, ["launch", "launch"]),
        "unchecked": (replace(pipeline, checks_inputs=False), ["run", "run"]),
        "other_config": (replace(pipeline, config=other), ["run", "run"]),
        "other_router": (replace(pipeline, route=SWAPS["route"](config)), ["run", "launch"]),
    }
    for name, (variant, expected) in variants.items():
        calls.clear()
        variant(problem.logits, *experts)
        variant.run_experts(topk, *experts)
        assert calls == expected, name


@pytest.mark.parametrize("uses_pdl", [True, False])
def test_all_stages_for_a_gpu_are_asked_alike_for_dependent_launches(uses_pdl: bool) -> None:
    pytest.importorskip("triton")
    pipeline = build_pipeline(MoEConfig.create(**SMALL), torch.device("cuda", 0), uses_pdl=uses_pdl)
    asked = [getattr(pipeline, stage).keywords["uses_pdl"] for stage in SWAPS]
    assert [*asked, pipeline.fused.run.keywords["config"].uses_pdl] == [uses_pdl] * 6


def test_the_fused_callable_for_a_gpu_stands_for_the_stages_beside_it() -> None:
    pytest.importorskip("triton")
    config = MoEConfig.create(**SMALL)
    pipeline = build_pipeline(config, "cuda")
    few = pipeline.fused.run.keywords["config"]
    assert few == FewTokenConfig(num_experts=8, top_k=2, gemm1=config.gemm1, gemm2=config.gemm2, uses_pdl=True)
    assert pipeline.fused == FusedExperts(
        pipeline.fused.run,
        few.max_tokens,
        stands_for=(pipeline.permute, pipeline.gemm1, pipeline.gemm2, pipeline.finalize),
        launch=pipeline.fused.launch,
        checked_by=config,
        routed_by=pipeline.route,
    )
    assert pipeline.fused.launch.keywords["config"] is few


def test_few_tokens_for_a_gpu_get_the_slice_and_what_the_config_names() -> None:
    pytest.importorskip("triton")
    tiles = FewTokenTiles(
        max_tokens=5, slot_tile=MatvecTile(block_n=2, block_k=64), token_tile=MatvecTile(block_n=4, block_k=64)
    )
    config = MoEConfig.create(**SMALL, local_expert_offset=3, num_local_experts=4)
    fused = build_pipeline(MoEConfig(**dict(config) | {"few_tokens": tiles}), "cuda").fused
    few = fused.run.keywords["config"]
    assert (fused.max_tokens, few.slot_tile, few.token_tile) == (5, tiles.slot_tile, tiles.token_tile)
    assert (few.local_expert_offset, few.gemm1.num_experts, few.uses_pdl) == (3, 4, True)
    assert not few.triggers_early


def test_what_the_kernels_for_a_gpu_do_not_take_is_left_to_what_does() -> None:
    pytest.importorskip("triton")
    from moe.permute.numba_plan import numba_plan_permutation
    from moe.permute.triton_plan import plan_permutation
    from moe.routing.topk import select_experts

    def stages(**changes: object) -> tuple[object, object, bool]:
        pipeline = build_pipeline(MoEConfig.create(**SMALL | changes), "cuda")
        return pipeline.route.func, pipeline.permute.func, pipeline.fused is not None

    assert stages() == (select_experts, numba_plan_permutation, True)
    assert stages(num_experts=40, top_k=33)[0] is select_experts_reference
    assert stages(num_experts=2049) == (select_experts_reference, plan_permutation, True)
    assert not stages(weight_format=WeightFormat(layout=WeightLayout.MajorMn))[2]
    assert not stages(is_batch_invariant=True)[2]


def test_planning_for_a_gpu_is_told_what_units_its_gemms_take() -> None:
    pytest.importorskip("triton")
    config = MoEConfig.create(**SMALL)
    unit_size = build_pipeline(config, "cuda").permute.keywords["unit_size"]
    assert unit_size.keywords == {"gemm1": config.gemm1, "gemm2": config.gemm2}


def test_a_pipeline_for_a_gpu_stands_on_kernels_for_few_tokens_too(cuda: torch.device) -> None:
    fused = build_pipeline(MoEConfig.create(**SMALL), cuda).fused
    assert fused is not None
    assert fused.max_tokens >= 1
    assert fused.launch is not None
    major_mn = MoEConfig.create(**SMALL, weight_format=WeightFormat(layout=WeightLayout.MajorMn))
    assert build_pipeline(major_mn, cuda).fused is None


@pytest.mark.parametrize(
    ("num_tokens", "num_local_experts"),
    # few tokens; portable, swapped, wide GEMMs; two launches that plan; a slice, with few tokens and more
    [(5, 16), (24, 16), (300, 16), (1000, 16), (5000, 16), (3, 8), (300, 8)],
)
def test_dependent_launches_of_a_whole_layer_race_with_nothing(
    num_tokens: int, num_local_experts: int, cuda: torch.device
) -> None:
    """A captured chain of dependent layers, replayed over random inputs beside a noisy stream, has the plain chain's bits.

    Layers write into one another's inputs and reuse freed memory, so a kernel that reads or writes too early meets what
    another one is still using.
    """
    num_replays, num_inputs, num_layers = 2_500, 16, 3
    dims = {"hidden_size": 512, "intermediate_size": 320, "num_experts": 16, "top_k": 4}  # W1: enough to prefetch
    config = MoEConfig.create(**dims, num_local_experts=num_local_experts)
    plain, dependent = build_pipeline(config, cuda, uses_pdl=False), build_pipeline(config, cuda)
    generator = torch.Generator(device=cuda).manual_seed(0)
    logits = torch.randn(num_inputs, num_layers, num_tokens, 16, generator=generator, device=cuda)
    hidden = torch.randn(num_inputs, num_tokens, 512, generator=generator, device=cuda).bfloat16()
    problem = make_problem(config, 1, device=cuda)
    w1, w2 = problem.w1, problem.w2 * 4  # so that activations do not vanish over the layers

    def run(pipeline: MoEPipeline, logits: Tensor, buffers: list[Tensor]) -> None:
        for layer in range(num_layers):
            pipeline(logits[layer], buffers[layer % 2], w1, w2, output=buffers[(layer + 1) % 2])

    buffers = [torch.empty_like(hidden[0]) for _ in range(2)]
    expected = []
    for its_logits, its_hidden in zip(logits, hidden):
        buffers[0].copy_(its_hidden)
        run(plain, its_logits, buffers)
        expected.append(buffers[num_layers % 2].clone())
    assert all(value.isfinite().all() for value in expected)
    # Of a slice, tokens that met no local expert in the last layer are zero.
    least = num_inputs if num_local_experts == 16 else num_inputs * 3 // 4
    assert sum(bool(value.any()) for value in expected) >= least

    static_logits = logits[0].clone()
    run(dependent, static_logits, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(dependent, static_logits, buffers)
    noise = torch.cuda.Stream()
    busy = [torch.randn(size, size, device=cuda) for size in (64, 512, 1024)]
    num_wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    order = torch.randint(num_inputs, (num_replays,), generator=torch.Generator().manual_seed(1)).tolist()
    for replay, index in enumerate(order):
        if replay % 8 == 0:
            with torch.cuda.stream(noise):
                torch.mm(busy[index % 3], busy[index % 3])
        static_logits.copy_(logits[index])
        buffers[1].fill_(float("nan"))
        buffers[0].copy_(hidden[index])
        graph.replay()
        num_wrong += (buffers[num_layers % 2] != expected[index]).any()
    assert num_wrong.item() == 0


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


def test_a_batch_invariant_config_leaves_nothing_to_the_number_of_tokens() -> None:
    config = MoEConfig.create(**SMALL, is_batch_invariant=True)
    assert config.permute.tile_rows == 16
    assert MoEConfig.create(**SMALL, tile_rows=64, is_batch_invariant=True).permute.tile_rows == 64
    assert config.gemm1.kernel == config.gemm2.kernel == "swapped"
    assert config.few_tokens.max_tokens == 0
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config
