"""The commands, on a layer small enough for a test."""

import json
from dataclasses import replace

import pytest
import torch

import moe.__main__ as commands
from moe.cli import exact, layer, load, text
from moe.cli.layer import ROUTINGS, random_logits
from moe.cli.progress import Progress
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.tuning.measure import Peaks

TINY = MoEShape("tiny", 64, 64, 16, 4, "Renormalize", 16)
TINY_GROUPED = MoEShape("tiny-grouped", 64, 128, 16, 2, "DeepSeekV3", 8, 4, 2, 2.5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny models, and peaks that need no measuring."""
    for shape in (TINY, TINY_GROUPED):
        monkeypatch.setitem(NAMED_SHAPES, shape.name, shape)
    monkeypatch.setattr(commands, "measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))
    monkeypatch.setattr("moe.cli.run.CPU_BUDGET_S", 0.01)


@pytest.mark.parametrize("weights", ["hf", "flashinfer"])
@pytest.mark.parametrize("model", ["tiny", "tiny-grouped"])
def test_run_reports_every_stage_and_a_good_error(
    model: str, weights: str, device: torch.device, capsys: pytest.CaptureFixture[str]
):
    status = commands.main(["run", "--model", model, "--tokens", "40", "--weights", weights, "--device", device.type])
    report = capsys.readouterr().out
    assert status == 0, report
    for stage in ("route", "permute", "gemm1", "gemm2", "finalize", "whole"):
        assert f"\n{stage} " in report
    assert "(good)" in report
    assert "agree with the routing reference: 100.00%" in report


def test_run_with_json_prints_nothing_but_json(device: torch.device, capsys: pytest.CaptureFixture[str]):
    arguments = ["run", "--model", "tiny", "--tokens", "40", "--json", "--routing", "zipf", "--device", device.type]
    assert commands.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["load"]["rows_of_expert"]) == 40 * TINY.top_k
    assert report["accuracy"]["num_checked"] == 40
    assert report["stages"]["whole"]["median_us"] > 0
    assert set(report["machine"]["stages"]) == {"route", "permute", "gemm1", "gemm2", "finalize"}


def test_wrong_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    build = layer.build_pipeline

    def build_faulty(config, device):
        pipeline = build(config, device)
        return replace(pipeline, finalize=lambda *args, **kwargs: pipeline.finalize(*args, **kwargs) * 1.02)

    monkeypatch.setattr(layer, "build_pipeline", build_faulty)
    assert commands.main(["run", "--model", "tiny", "--tokens", "8", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_nan_in_the_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    build = layer.build_pipeline

    def build_faulty(config, device):
        pipeline = build(config, device)
        return replace(pipeline, finalize=lambda *args, **kwargs: pipeline.finalize(*args, **kwargs) * float("nan"))

    monkeypatch.setattr(layer, "build_pipeline", build_faulty)
    assert commands.main(["run", "--model", "tiny", "--tokens", "8", "--device", "cpu"]) == 1


def test_bench_prints_a_line_a_token_count_and_writes_json(tmp_path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "bench.json"
    arguments = [
        "bench",
        "--model",
        "tiny",
        "tiny-grouped",
        "--tokens",
        "1",
        "9",
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    assert commands.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-4:]] == [
        ["tiny", "1"],
        ["tiny", "9"],
        ["tiny-grouped", "1"],
        ["tiny-grouped", "9"],
    ]
    results = json.loads(file.read_text())["results"]
    assert [result["num_tokens"] for result in results] == [1, 9, 1, 9]
    assert all("experts" in result["stages"] for result in results)


def test_info_names_versions_and_stages(capsys: pytest.CaptureFixture[str]):
    assert commands.main(["info", "--device", "cpu"]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in report
    assert "reference moe.gemm.reference.gather_gemm_reference" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "nothing"], "qwen3-30b-a3b"),
        (["run", "--tokens", "0"], "expected 1 or more, got 0"),
        ([], "COMMAND"),
    ],
    ids=["unknown-model", "no-tokens", "no-command"],
)
def test_senseless_arguments_are_refused_with_the_cure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        commands.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_layer_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("moe.cli.machine._available_bytes", lambda: 1000)
    with pytest.raises(SystemExit):
        commands.main(["run", "--model", "tiny", "--device", "cpu"])
    assert "pick a smaller model" in capsys.readouterr().err


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_draws_experts_by_the_distribution_it_names(routing: str):
    logits = random_logits(20_000, 8, routing, torch.Generator().manual_seed(0))
    share = torch.bincount(logits.argmax(1), minlength=8).sort(descending=True).values / 20_000
    weight = torch.ones(8) if routing == "uniform" else 1 / torch.arange(1.0, 9.0)
    assert (share - weight / weight.sum()).abs().max() < 0.015


def test_input_sets_of_few_tokens_avoid_each_others_experts():
    shape = MoEShape("sparse", 64, 64, 64, 4, "Renormalize", 64)
    made = layer.make_layer(shape, torch.device("cpu"), weight_format=layer.FORMATS["hf"], seed=0, progress=Progress())
    sets = layer.make_inputs(made, 1, 9, routing="uniform", seed=0)
    chosen = torch.cat([inputs.topk.expert_ids.flatten() for inputs in sets[:8]])
    assert len(chosen.unique()) == 8 * 4


def test_costs_of_a_known_load():
    shape = MoEShape("known", 100, 10, 4, 2, "Renormalize", 4)
    costs = load.stage_costs(shape, 3, load.Load([4, 0, 2, 0], num_rows=32, tile_rows=16))
    assert costs["gemm1"].flops == 2 * 6 * 100 * 20
    assert costs["gemm2"].num_bytes == 2 * (2 * 100 * 10 + 6 * (10 + 100))
    assert costs["whole"].flops == costs["gemm1"].flops + costs["gemm2"].flops
    assert costs["whole"].num_bytes == 2 * (2 * 3 * 100 * 10 + 2 * 3 * 100)


def test_histogram_shows_every_expert_once_whatever_the_width(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "shows_blocks", lambda: True)
    values = [expert % 5 for expert in range(128)]
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = text.histogram(values, num_lines=1).splitlines()
        assert max(map(len, lines)) < columns
        assert sum(len(line[6:].replace(" ", "")) for line in lines) == sum(value > 0 for value in values)


def test_accuracy_is_of_the_layer_from_its_own_choices(capsys: pytest.CaptureFixture[str]):
    made = layer.make_layer(
        TINY, torch.device("cpu"), weight_format=layer.FORMATS["flashinfer"], seed=0, progress=Progress()
    )
    inputs = layer.make_inputs(made, 30, 1, routing="uniform", seed=0)[0]
    accuracy = exact.check_accuracy(made, inputs, 7, Progress())
    assert accuracy.num_checked == 7
    assert 1e-4 < accuracy.relative_frobenius < 1e-2
    assert accuracy.same_choices == 1.0
