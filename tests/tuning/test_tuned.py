"""TunedPipeline: the right MoEPipeline for each count, and else nothing that MoEPipeline does not do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe import ExpertOutputs, GemmTile, MoEConfig, MoEPipeline, TopK, WeightFormat, build_pipeline, reference_pipeline
from moe.testing.problems import make_problem, random_topk
from moe.tuning import lookup, tuned
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import forget_tables, remember
from moe.tuning.table import LayerKey, TableEntry
from moe.tuning.tuned import TunedPipeline, tuned_config, tuned_pipeline

GPU = GpuModel(name="Test GPU", capability=(9, 0), num_sms=132, l2_bytes=50 << 20, memory_bytes=80 << 30)
CONFIG = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
ENTRIES = ("__call__", "expert_outputs", "run_experts", "run_experts_unfinalized", "workspace_bytes")


def know(choices: dict[int, TuningChoice], config: MoEConfig = CONFIG) -> None:
    """Make the tables hold these choices, by bucket."""
    key = LayerKey.of(config)
    remember(
        GPU,
        [TableEntry(key=key, bucket=b, choice=choice, tuned_us=9.0, model_us=10.0) for b, choice in choices.items()],
    )


def fake_gpu_pipeline(config: MoEConfig = CONFIG) -> TunedPipeline:
    """Reference stages, by the tables of a GPU."""
    return tuned_pipeline(config, "cpu", gpu=GPU)


def test_a_config_is_tuned_by_its_bucket():
    know({8: TuningChoice(tile_rows=64), 64: TuningChoice(finalize_block_h=128)})
    assert tuned_config(CONFIG, 7, GPU).permute.tile_rows == 64
    assert tuned_config(CONFIG, 64, GPU).finalize.block_h == 128
    assert tuned_config(CONFIG, 9, GPU) is CONFIG


def test_the_explicit_config_wins_over_the_tables():
    know({8: TuningChoice(tile_rows=64, finalize_block_h=128)})
    config = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2, tile_rows=16)
    result = tuned_config(config, 8, GPU)
    assert (result.permute.tile_rows, result.finalize.block_h) == (16, 128)


def test_a_choice_that_does_not_fit_the_layer_is_left_out_in_a_line():
    config = MoEConfig.create(
        hidden_size=64,
        intermediate_size=64,
        num_experts=8,
        top_k=2,
        activation="Relu2",
        weight_format=WeightFormat(is_shuffled=True),
    )
    narrow = GemmTile(block_n=16, block_k=64, num_warps=4, num_stages=2)
    know({8: TuningChoice(gemm1_tile=narrow)}, config)
    with pytest.warns(UserWarning, match="is not used.*at least 32 for shuffled weights"):
        assert tuned_config(config, 8, GPU) is config


def test_entries_have_the_arguments_of_the_plain_pipeline():
    for name in ENTRIES:
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (TunedPipeline, MoEPipeline))
        assert ours == theirs, name


def test_at_picks_the_pipeline_of_the_bucket():
    know({8: TuningChoice(tile_rows=64), 16: TuningChoice(tile_rows=128)})
    pipeline = fake_gpu_pipeline()
    rows = [
        pipeline.at(num_tokens).config.permute.tile_rows for num_tokens in (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 200_000)
    ]
    assert rows == [None, None, None, 64, 64, None, None, 128, 128, None, None]


def test_at_keeps_what_it_built():
    pipeline = fake_gpu_pipeline()
    assert pipeline.at(5) is pipeline.at(8) is pipeline.at(5)


def test_buckets_of_one_config_share_a_pipeline():
    know({8: TuningChoice(tile_rows=64), 16: TuningChoice(tile_rows=64), 32: TuningChoice(tile_rows=32)})
    pipeline = fake_gpu_pipeline()
    assert pipeline.at(8) is pipeline.at(16)
    assert pipeline.at(8) is not pipeline.at(32)
    assert pipeline.at(1) is pipeline.at(131072) is pipeline.at(131073)


def test_what_is_tuned_later_counts_from_then_on():
    pipeline = fake_gpu_pipeline()
    before = pipeline.at(8)
    know({8: TuningChoice(tile_rows=64)})
    assert pipeline.at(8).config.permute.tile_rows == 64
    assert pipeline.at(9) is before  # another bucket: the same config as before, so nothing is built anew


def test_each_call_runs_in_its_own_bucket():
    know({4: TuningChoice(tile_rows=32), 64: TuningChoice(tile_rows=128)})
    pipeline = fake_gpu_pipeline()
    padded: list[int] = []
    for num_tokens in (3, 50, 4):
        problem = make_problem(CONFIG, num_tokens)
        permutation_rows = pipeline.expert_outputs(problem.logits, problem.hidden_states, problem.w1, problem.w2).rows
        padded.append(permutation_rows.shape[0])
    expected = [pipeline.at(num_tokens).config.permute.max_rows(num_tokens) for num_tokens in (3, 50, 4)]
    assert padded == expected
    assert padded[0] % 32 == 0
    assert padded[1] % 128 == 0


def without_padding(outputs: ExpertOutputs) -> list[torch.Tensor]:
    """The rows of the slots, the weights and the map; rows that pad a tile hold anything."""
    return [outputs.rows[outputs.row_of_slot.long()], outputs.weights, outputs.row_of_slot]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 130])
def test_on_a_cpu_all_entries_are_those_of_the_reference(num_tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lookup, "load_table", None)  # reading a table would raise
    problem = make_problem(CONFIG, num_tokens)
    topk = random_topk(num_tokens, 8, 2)
    tensors = (problem.hidden_states, problem.w1, problem.w2)
    ours, theirs = tuned_pipeline(CONFIG, "cpu"), reference_pipeline(CONFIG)
    calls: list[Callable[[Any], Any]] = [
        lambda pipeline: [pipeline(problem.logits, *tensors)],
        lambda pipeline: [pipeline.run_experts(topk, *tensors)],
        lambda pipeline: without_padding(pipeline.expert_outputs(problem.logits, *tensors)),
        lambda pipeline: without_padding(pipeline.run_experts_unfinalized(topk, *tensors)),
    ]
    for call in calls:
        for got, expected in zip(call(ours), call(theirs), strict=True):
            assert torch.equal(got, expected)
    assert ours.workspace_bytes(num_tokens) == theirs.workspace_bytes(num_tokens)


def test_all_arguments_reach_the_pipeline():
    problem = make_problem(CONFIG, 5)
    tensors = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    bias = torch.zeros(8)
    output = torch.full((5, 64), float("nan"), dtype=torch.bfloat16)
    replay = torch.full((5, 2), -7, dtype=torch.int16)
    result = tuned_pipeline(CONFIG, "cpu")(*tensors, bias=None, output=output, routing_replay_out=replay)
    assert result.data_ptr() == output.data_ptr()
    assert torch.equal(output, reference_pipeline(CONFIG)(*tensors))
    assert replay.min() >= 0
    with pytest.raises(ValueError, match="bias"):
        tuned_pipeline(CONFIG, "cpu")(*tensors, bias=bias[:3])


def test_workspace_is_that_of_the_bucket():
    know({8: TuningChoice(tile_rows=128)})
    pipeline = fake_gpu_pipeline()
    assert pipeline.workspace_bytes(8) == reference_pipeline(tuned_config(CONFIG, 8, GPU)).workspace_bytes(8)
    assert pipeline.workspace_bytes(8) > reference_pipeline(CONFIG).workspace_bytes(8)


PROBLEM = make_problem(CONFIG, 5)
GOOD = (PROBLEM.logits, PROBLEM.hidden_states, PROBLEM.w1, PROBLEM.w2)
IDS = torch.zeros(5, 2, dtype=torch.int32)
BAD_CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "logits is a list": ("__call__", ([1.0], *GOOD[1:])),
    "logits is None": ("__call__", (None, *GOOD[1:])),
    "logits is a number": ("__call__", (torch.tensor(1.0), *GOOD[1:])),
    "logits of other experts": ("__call__", (torch.zeros(5, 9), *GOOD[1:])),
    "hidden_states of other tokens": ("__call__", (GOOD[0], GOOD[1][:3], *GOOD[2:])),
    "hidden_states is None": ("expert_outputs", (GOOD[0], None, *GOOD[2:])),
    "w1 is None": ("__call__", (*GOOD[:2], None, GOOD[3])),
    "w2 of fewer experts": ("__call__", (*GOOD[:3], GOOD[3][:2])),
    "topk is None": ("run_experts", (None, *GOOD[1:])),
    "ids are None": ("run_experts", (TopK(None, torch.ones(5, 2)), *GOOD[1:])),  # type: ignore[arg-type]
    "ids have no axis": ("run_experts_unfinalized", (TopK(IDS[0, 0], torch.ones(5, 2)), *GOOD[1:])),
    "weights of other slots": ("run_experts", (TopK(IDS, torch.ones(5, 3)), *GOOD[1:])),
}


@pytest.mark.parametrize("autotunes", [False, True], ids=["plain", "autotune"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_those_of_the_plain_pipeline(name: str, autotunes: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuned, "active", lambda: autotunes)
    monkeypatch.setattr(tuned, "tune_missing", lambda *arguments, **options: None)
    entry, arguments = BAD_CALLS[name]
    with pytest.raises((TypeError, ValueError, AttributeError)) as expected:
        getattr(reference_pipeline(CONFIG), entry)(*arguments)
    with pytest.raises(type(expected.value)) as got:
        getattr(fake_gpu_pipeline(), entry)(*arguments)
    assert str(got.value) == str(expected.value)


def test_replace_swaps_a_stage_in_every_bucket():
    know({8: TuningChoice(tile_rows=64)})
    pipeline = fake_gpu_pipeline()
    built = pipeline.at(8)
    calls: list[int] = []

    def finalize(rows: torch.Tensor, topk: TopK, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(topk.expert_ids.shape[0])
        return torch.zeros(topk.expert_ids.shape[0], 64, dtype=torch.bfloat16)

    swapped = pipeline.replace(finalize=finalize).replace(checks_inputs=False)
    for num_tokens in (3, 8):
        problem = make_problem(CONFIG, num_tokens)
        result = swapped(problem.logits, problem.hidden_states, problem.w1, problem.w2)
        assert result.count_nonzero() == 0
    assert calls == [3, 8]
    assert swapped.at(8).gemm1.func is built.gemm1.func  # type: ignore[attr-defined]
    assert (swapped.at(8).checks_inputs, swapped.at(8).config) == (False, built.config)
    assert pipeline.at(8) is built
    assert built.finalize is not finalize


@pytest.mark.parametrize("name", ["config", "gem1", "device"])
def test_replace_refuses_what_is_no_stage(name: str):
    with pytest.raises(TypeError, match=rf"expected one of .*gemm1.*, got '{name}'"):
        fake_gpu_pipeline().replace(**{name: None})


def test_autotune_is_asked_before_the_bucket_is_picked(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[MoEConfig, int, int]] = []

    def tune_missing(config: MoEConfig, num_tokens: int, *weights: torch.Tensor, max_num_tokens: int) -> None:
        asked.append((config, num_tokens, max_num_tokens))
        know({8: TuningChoice(tile_rows=128)})

    monkeypatch.setattr(tuned, "tune_missing", tune_missing)
    monkeypatch.setattr(tuned, "active", lambda: True)
    pipeline = tuned_pipeline(CONFIG, "cpu", gpu=GPU, max_num_tokens=512)
    topk = random_topk(5, 8, 2)
    tensors = (PROBLEM.hidden_states, PROBLEM.w1, PROBLEM.w2)
    outputs = pipeline.expert_outputs(PROBLEM.logits, *tensors)
    assert outputs.rows.shape[0] == tuned_config(CONFIG, 5, GPU).permute.max_rows(5)
    pipeline(PROBLEM.logits, *tensors)
    pipeline.run_experts(topk, *tensors)
    pipeline.run_experts_unfinalized(topk, *tensors)
    assert asked == [(CONFIG, 5, 512)] * 4


def test_nothing_is_tuned_outside_of_autotune_or_with_wrong_weights(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr(tuned, "tune_missing", lambda config, num_tokens, *rest, **options: asked.append(num_tokens))
    fake_gpu_pipeline()(*GOOD)
    monkeypatch.setattr(tuned, "active", lambda: True)
    with pytest.raises(ValueError, match="gemm2_weights"):
        fake_gpu_pipeline()(*GOOD[:3], GOOD[3][:2])
    assert asked == []
    fake_gpu_pipeline()(*GOOD)
    assert asked == [5]


def test_a_pipeline_is_built_for_the_device_and_with_the_launches_that_were_asked_for(monkeypatch: pytest.MonkeyPatch):
    built: list[tuple[torch.device, bool]] = []

    def build(config: MoEConfig, device: torch.device, *, uses_pdl: bool) -> MoEPipeline:
        built.append((device, uses_pdl))
        return reference_pipeline(config)

    monkeypatch.setattr(tuned, "build_pipeline", build)
    tuned_pipeline(CONFIG, "cuda:1", uses_pdl=False, gpu=GPU).at(8)
    tuned_pipeline(CONFIG, "cpu").at(8)
    assert built == [(torch.device("cuda:1"), False), (torch.device("cpu"), True)]


def test_equal_pipelines_compare_equal_and_copies_work():
    pipeline = fake_gpu_pipeline()
    pipeline.at(8)
    assert pipeline == fake_gpu_pipeline()
    assert copy.deepcopy(pipeline).at(8).config == CONFIG


def test_forgetting_the_tables_reads_them_anew():
    pipeline = fake_gpu_pipeline()
    know({8: TuningChoice(tile_rows=64)})
    assert pipeline.at(8).config.permute.tile_rows == 64
    lookup.user_table_path(GPU).unlink()
    assert pipeline.at(8).config.permute.tile_rows == 64
    forget_tables()
    assert pipeline.at(8).config is CONFIG


def test_a_gpu_is_described_by_its_driver(cuda: torch.device):
    gpu = GpuModel.of(cuda)
    assert gpu.name == torch.cuda.get_device_name(cuda)
    assert gpu.capability == torch.cuda.get_device_capability(cuda)
    assert min(gpu.num_sms, gpu.l2_bytes, gpu.memory_bytes) > 0
    assert gpu == GpuModel.of(torch.device("cuda", cuda.index)) == GpuModel.of("cuda")


def test_tables_may_be_read_first_while_a_graph_is_captured(cuda: torch.device):
    config = MoEConfig.create(hidden_size=256, intermediate_size=128, num_experts=8, top_k=2)
    choice = TuningChoice(uses_few_tokens=False, tile_rows=64)
    entry = TableEntry(key=LayerKey.of(config), bucket=16, choice=choice, tuned_us=9.0, model_us=10.0)
    remember(GpuModel.of(cuda), [entry])
    problem = make_problem(config, 16, device=cuda)
    tensors = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    expected = build_pipeline(choice.apply(config), cuda)(
        *tensors
    )  # compiles the kernels, which a capture does not allow
    forget_tables()
    pipeline, graph = tuned_pipeline(config, cuda), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = pipeline(*tensors)
    output.fill_(float("nan"))
    graph.replay()
    assert pipeline.at(16).config.permute.tile_rows == 64
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, "cpu"), TypeError, "config: expected a MoEConfig, got NoneType"),
        (({"hidden_size": 8}, "cpu"), TypeError, "MoEConfig.create makes one"),
        ((CONFIG, "cpu", "x"), TypeError, "max_num_tokens: expected an int, got str"),
        ((CONFIG, "cpu", -1), ValueError, "max_num_tokens: expected 1 or more, got -1"),
    ],
    ids=["none", "dict", "text", "negative"],
)
def test_what_makes_no_pipeline_is_refused(arguments: tuple, error: type[Exception], message: str):
    config, device, *limit = arguments
    with pytest.raises(error, match=message):
        tuned_pipeline(config, device, **({"max_num_tokens": limit[0]} if limit else {}))


def test_tables_have_no_say_in_a_batch_invariant_layer():
    config = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2, is_batch_invariant=True)
    know({8: TuningChoice(finalize_block_h=256)}, config)
    assert tuned_config(config, 8, GPU) is config
