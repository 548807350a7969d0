"""The commands, on a layer small enough for a test."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.__main__ import main
from moe.cli import commands, exact, layer, load, text
from moe.cli.layer import ROUTINGS, NamedLayer, random_logits
from moe.cli.progress import Progress
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import triton_version
from moe.tuning.measure import Peaks

TINY = MoEShape("tiny", 64, 64, 16, 4, "Renormalize", 16)
TINY_GROUPED = MoEShape("tiny-grouped", 64, 128, 16, 2, "DeepSeekV3", 8, 4, 2, 2.5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny models, and peaks that need no measuring."""
    for shape in (TINY, TINY_GROUPED):
        monkeypatch.setitem(NAMED_SHAPES, shape.name, shape)
    monkeypatch.setattr(commands, "measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))
    monkeypatch.setattr("moe.cli.run.TURN_BUDGET_S", {"cpu": 0.01, "cuda": 0.01})


@pytest.mark.parametrize("weights", ["hf", "flashinfer"])
@pytest.mark.parametrize("model", ["tiny", "tiny-grouped"])
def test_run_reports_every_stage_and_a_good_error(
    model: str, weights: str, device: torch.device, capsys: pytest.CaptureFixture[str]
):
    status = main(["run", "--model", model, "--tokens", "40", "--format", weights, "--device", device.type])
    report = capsys.readouterr().out
    assert status == 0, report
    for stage in ("route", "permute", "gemm1", "gemm2", "finalize", "whole"):
        assert f"\n{stage} " in report
    assert "(good)" in report
    assert "agree with the routing reference: 100.00%" in report
    assert max(map(len, report.splitlines())) <= 80


def test_run_with_json_prints_nothing_but_json(device: torch.device, capsys: pytest.CaptureFixture[str]):
    arguments = ["run", "--model", "tiny", "--tokens", "40", "--json", "--routing", "zipf", "--device", device.type]
    assert main(arguments) == 0
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
    assert main(["run", "--model", "tiny", "--tokens", "8", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_nan_in_the_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    build = layer.build_pipeline

    def build_faulty(config, device):
        pipeline = build(config, device)
        return replace(pipeline, finalize=lambda *args, **kwargs: pipeline.finalize(*args, **kwargs) * float("nan"))

    monkeypatch.setattr(layer, "build_pipeline", build_faulty)
    assert main(["run", "--model", "tiny", "--tokens", "8", "--device", "cpu"]) == 1


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
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [
        line.split()[0].rstrip(",") for line in lines if line.startswith("tiny") or line.split()[:1] in (["1"], ["9"])
    ]
    assert named == ["tiny", "1", "9", "tiny-grouped", "1", "9"]
    assert max(map(len, lines)) <= 80
    results = json.loads(file.read_text())["results"]
    assert [result["num_tokens"] for result in results] == [1, 9, 1, 9]
    assert all("experts" in result["stages"] for result in results)
    assert all({"experts", "dense", "eager", "eager_experts"} <= set(result["beside_us"]) for result in results)
    assert all(microseconds > 0 for result in results for microseconds in result["beside_us"].values())


def test_bench_without_turns_times_nothing_beside(tmp_path):
    file = tmp_path / "bench.json"
    arguments = ["bench", "--model", "tiny", "--tokens", "9", "--device", "cpu", "--json", str(file), "--turns", "0"]
    assert main(arguments) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert result["beside_us"] == {}
    assert result["stages"]["experts"]["median_us"] > 0


@pytest.mark.parametrize("is_untuned", [False, True])
def test_bench_runs_what_the_tables_say_beside_the_models_choice(
    is_untuned: bool, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def tuned_config(config, num_tokens, device):
        return TuningChoice(tile_rows=64).apply(config) if num_tokens == 9 else config

    monkeypatch.setattr("moe.cli.beside.tuned_config", tuned_config)
    file = tmp_path / "bench.json"
    arguments = ["bench", "--model", "tiny", "--tokens", "1", "9", "--device", "cpu", "--json", str(file)]
    assert main([*arguments, "--untuned"] if is_untuned else arguments) == 0
    results = json.loads(file.read_text())["results"]
    assert [result["is_tuned"] for result in results] == [False, not is_untuned]
    assert ["untuned" in result["beside_us"] for result in results] == [False, not is_untuned]
    assert [result["tiles"]["tile_rows"] for result in results] == [None, None if is_untuned else 64]
    first, second = re.findall(r"^ {8}roof .*", capsys.readouterr().out, re.MULTILINE)
    assert "untuned" not in first
    assert ("untuned" in second) != is_untuned


def test_bench_without_matplotlib_names_the_extra_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["bench", "--model", "tiny", "--tokens", "1", "--device", "cpu", "--plot", "bench.svg"])
    streams = capsys.readouterr()
    assert 'pip install "matplotlib>=3.9"' in streams.err
    assert streams.out == ""


@pytest.mark.parametrize("is_untuned", [False, True])
def test_run_runs_what_the_tables_say(
    is_untuned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "moe.cli.beside.tuned_config", lambda config, num_tokens, device: TuningChoice(tile_rows=64).apply(config)
    )
    arguments = ["run", "--model", "tiny", "--tokens", "9", "--device", "cpu", "--json"]
    assert main([*arguments, "--untuned"] if is_untuned else arguments) == 0
    assert json.loads(capsys.readouterr().out)["load"]["tile_rows"] == (16 if is_untuned else 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bench.foo", "expected a name that ends in ."), ("missing/bench.svg", "expected a file in a folder")],
)
def test_bench_refuses_a_picture_that_it_could_not_write(
    name: str, message: str, tmp_path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        main(["bench", "--model", "tiny", "--tokens", "1", "--device", "cpu", "--plot", str(tmp_path / name)])
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""


def test_bench_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.svg"
    arguments = ["bench", "--model", "tiny", "tiny-grouped", "--tokens", "1", "9", "--device", "cpu"]
    assert main([*arguments, "--plot", str(file)]) == 0
    picture = file.read_text()
    assert picture.count('id="legend_') == 2
    assert picture.count('id="axes_') == 2


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("moe-stages ")


def test_stopping_a_command_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "describe_machine", stop)
    assert main(["info", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_wrong_choices_alone_are_said_to_be_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(exact.Accuracy, "chooses_alike", False)
    assert main(["run", "--model", "tiny", "--tokens", "8", "--device", "cpu"]) == 1
    report = " ".join(capsys.readouterr().out.split())
    assert "(good)" in report
    assert report.count("WRONG") == 1
    assert "agree with the routing reference: 100.00% (WRONG, expected more than 99.9%)" in report


def test_info_names_versions_and_stages(capsys: pytest.CaptureFixture[str]):
    assert main(["info", "--device", "cpu"]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in report
    assert "reference moe.gemm.reference.gather_gemm_reference" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "nothing"], "qwen3-30b-a3b"),
        (["run", "--tokens", "0"], "expected 1 or more, got 0"),
        (["run", "--tokens", "abc"], "expected a whole number, got 'abc'"),
        (["run", "--seed", "9" * 20], "expected 0 to 2^63 - 1"),
        (["tune", "--tokens", "200000"], "expected 131072 or fewer"),
        (["bench", "--json", "/nonexistent/bench.json"], "--json /nonexistent/bench.json: expected a file"),
        (["bench", "--json", "/"], "expected a file in a folder that can be written"),
        (["bench", "--device", "cpu"], "name some"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_senseless_arguments_are_refused_with_the_cure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_layer_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("moe.cli.memory.available_bytes", lambda: 1000)
    with pytest.raises(SystemExit):
        main(["run", "--model", "tiny", "--device", "cpu"])
    assert "pick a smaller model" in capsys.readouterr().err


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_draws_experts_by_the_distribution_it_names(routing: str):
    logits = random_logits(20_000, 8, routing, torch.Generator().manual_seed(0))
    share = torch.bincount(logits.argmax(1), minlength=8).sort(descending=True).values / 20_000
    weight = torch.ones(8) if routing == "uniform" else 1 / torch.arange(1.0, 9.0)
    assert (share - weight / weight.sum()).abs().max() < 0.015


def test_input_sets_of_few_tokens_avoid_each_others_experts():
    shape = MoEShape("sparse", 64, 64, 64, 4, "Renormalize", 64)
    made = layer.make_layer(
        layer.layer_of_shape(shape, layer.FORMATS["hf"]), torch.device("cpu"), seed=0, progress=Progress()
    )
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
        layer.layer_of_shape(TINY, layer.FORMATS["flashinfer"]), torch.device("cpu"), seed=0, progress=Progress()
    )
    inputs = layer.make_inputs(made, 30, 1, routing="uniform", seed=0)[0]
    accuracy = exact.check_accuracy(made, inputs, 7, Progress())
    assert accuracy.num_checked == 7
    assert 1e-4 < accuracy.relative_frobenius < 1e-2
    assert accuracy.same_choices == 1.0


@pytest.fixture
def _pretends_to_have_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    """The command believes that the CPU is a GPU, and a clock says that tiles of 16 rows are fastest."""
    from moe.cli import tune
    from moe.tuning.lookup import forget_tables
    from moe.tuning.search import tune as search

    def timer(choice, calls):
        return 80.0 if choice.tile_rows == 16 else 100.0

    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(commands, "tunes_on", lambda device: True)
    monkeypatch.setattr(tune, "tune", lambda *args, **more: search(*args, **more, timer=timer))
    forget_tables()
    yield
    forget_tables()


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_tune_shows_each_bucket_before_and_after(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "--model", "tiny", "--tokens", "40", "70", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "tiny"
    assert lines[2].split() == ["tokens", "model", "us", "tuned", "us", "gain", "choice"]
    (row,) = [line for line in lines if line.split()[:1] == ["48"]]
    assert row.split()[1:4] == ["100.0", "80.0", "25.0%"]
    assert "tile_rows 16" in row
    assert max(map(len, lines)) <= 80

    exported = tmp_path / "exported.json"
    assert main(["tune", "--show", "--model", "tiny", "--device", "cpu", "--export", str(exported)]) == 0
    shown = capsys.readouterr().out
    assert row in shown
    assert "\ntiny\n" in shown
    assert "shipped" in shown
    assert f"{exported}: 2 entries" in shown
    assert len(json.loads(exported.read_text())["entries"]) == 2

    assert main(["tune", "--model", "tiny", "--tokens", "40", "--device", "cpu"]) == 0
    assert "nothing was left to tune" in capsys.readouterr().out


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_tune_times_each_stage_before_and_after_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]):
    assert tune_tiny("--stages") == 0
    report = capsys.readouterr().out
    lines = report[report.index("\ntiny, stages\n") :].splitlines()
    assert lines[2].split() == ["tokens", "stage", "model", "us", "tuned", "us", "gain"]
    rows = [line.split() for line in lines[4:]]
    assert rows[0].pop(0) == "48"
    assert [row[0] for row in rows] == ["permute", "gemm1", "gemm2", "finalize", "experts"]
    assert all(float(us.replace(",", "")) > 0 for row in rows for us in row[1:3])
    assert all(row[3].endswith("%") for row in rows)


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_stages_that_no_table_changes_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from moe.cli import tune

    monkeypatch.setattr(tune, "tuned_config", lambda config, num_tokens, device: config)
    monkeypatch.setattr(tune, "make_layer", lambda *_, **__: pytest.fail("made"))
    assert tune_tiny("--stages") == 0
    assert "tiny, stages: the model's choice in every bucket" in capsys.readouterr().out


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_tune_reads_our_config_and_a_hugging_face_one(tmp_path, capsys: pytest.CaptureFixture[str]):
    ours, theirs = tmp_path / "ours.json", tmp_path / "config.json"
    ours.write_text(layer.layer_of_shape(TINY, layer.FORMATS["hf"]).config.model_dump_json())
    numbers = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
    theirs.write_text(json.dumps({"model_type": "qwen3_moe", "hidden_act": "silu", "norm_topk_prob": True} | numbers))
    assert main(["tune", "--config", str(ours), "--tokens", "40", "--device", "cpu"]) == 0
    assert "\nours.json\n" in capsys.readouterr().out
    assert main(["tune", "--config", str(theirs), "--tokens", "40", "--device", "cpu"]) == 0
    assert "config.json: nothing was left to tune" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_config_in_a_file_is_run_like_a_named_model(command: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    theirs = tmp_path / "mine.json"
    fields = {"model_type": "deepseek_v3", "hidden_size": 64, "moe_intermediate_size": 128, "hidden_act": "silu"}
    fields |= {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 8, "topk_group": 4}
    theirs.write_text(json.dumps(fields | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}))
    more = ["--turns", "0"] if command == "bench" else []
    assert main([command, "--config", str(theirs), "--tokens", "40", "--device", "cpu", *more]) == 0
    report = capsys.readouterr().out
    assert "mine.json" in report
    if command == "run":
        assert "16 experts, top-2, DeepSeekV3 routing" in report


def test_a_layer_that_weighs_inputs_runs_as_one_that_weighs_the_output_and_says_so(
    tmp_path, capsys: pytest.CaptureFixture[str]
):
    theirs = tmp_path / "llama.json"
    fields = {"model_type": "llama4_text", "hidden_size": 64, "intermediate_size": 128, "hidden_act": "silu"}
    theirs.write_text(json.dumps(fields | {"num_local_experts": 16, "num_experts_per_tok": 2}))
    assert main(["run", "--config", str(theirs), "--tokens", "40", "--device", "cpu"]) == 0
    assert "llama.json, weighed on the output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("run", ("--model", "tiny"), "not allowed with argument"),
        ("launches", ("--model", "tiny"), "not allowed with argument"),
        ("run", (), "expected a MoEConfig or a Hugging Face config.json"),
        ("bench", (), "expected a MoEConfig or a Hugging Face config.json"),
    ],
    ids=["run-two-layers", "launches-two-layers", "run-no-file", "bench-no-file"],
)
def test_two_layers_where_one_runs_and_a_file_that_is_missing_are_refused(
    command: str, more: tuple[str, ...], message: str, tmp_path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", str(tmp_path / "none.json"), "--device", "cpu", *more])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def tune_tiny(*more: str) -> int:
    return main(["tune", "--model", "tiny", "--tokens", "40", "--device", "cpu", *more])


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
@pytest.mark.parametrize("target", ["notes.md", "missing/table.json"])
def test_export_leaves_what_is_no_table_alone(target: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    assert tune_tiny() == 0
    (tmp_path / "notes.md").write_text("notes")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--device", "cpu", "--export", str(tmp_path / target)])
    assert stopped.value.code == 2
    assert f"--export {tmp_path / target}: expected a new file, or a table for cpu" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "notes.md").read_text() == "notes"


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_export_into_a_folder_names_the_file_by_gpu_and_triton(tmp_path):
    assert tune_tiny() == 0
    folder = tmp_path / "folder"
    folder.mkdir()
    for _ in range(2):
        assert main(["tune", "--device", "cpu", "--export", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert file.name == f"cpu-triton{'.'.join(triton_version().split('.')[:2])}.json"
    assert len(json.loads(file.read_text())["entries"]) == 1


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_export_of_nothing_is_refused(tmp_path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["tune", "--device", "cpu", "--export", str(tmp_path / "table.json")])
    assert "tune a layer first" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_a_bucket_that_could_not_be_tuned_is_named_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from moe.tuning import search

    def fail(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(search, "make_problem", fail)
    assert tune_tiny() == 1
    report = capsys.readouterr().out
    assert "left out, see above: 48 tokens" in report
    assert "nothing was left" not in report


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_a_layer_that_does_not_fit_fails_the_command_and_the_next_is_tuned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from moe.cli import tune

    def expect_memory(named: NamedLayer, device: torch.device, num_tokens: int) -> None:
        if named.name == "tiny":
            raise tune.UnfitMachine("tiny: expected more memory")

    monkeypatch.setattr(tune, "expect_memory", expect_memory)
    assert tune_tiny("--model", "tiny", "tiny-grouped") == 1
    streams = capsys.readouterr()
    assert "left out: tiny: expected more memory" in streams.err
    assert "\ntiny-grouped\n" in streams.out


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_a_retune_needs_no_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert tune_tiny() == 0
    monkeypatch.setattr("moe.cli.memory.available_bytes", lambda: 1)
    assert tune_tiny() == 0
    assert "tiny: nothing was left to tune; --force tunes it again" in capsys.readouterr().out


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as stopped:
        tune_tiny()
    assert stopped.value.code == 2
    assert "set MOE_CACHE_DIR to one" in capsys.readouterr().err


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
def test_the_format_of_a_file_is_its_own(tmp_path, capsys: pytest.CaptureFixture[str]):
    from moe import MoEConfig
    from moe.tuning import GpuModel, is_tuned

    theirs = tmp_path / "config.json"
    fields = {"model_type": "aria_text", "hidden_size": 64, "intermediate_size": 64, "hidden_act": "silu"}
    fields |= {"moe_num_experts": 8, "moe_topk": 2}
    theirs.write_text(json.dumps(fields))
    assert main(["tune", "--config", str(theirs), "--tokens", "40", "--device", "cpu"]) == 0
    config = MoEConfig.from_hf_config(fields)
    assert config.gemm1.weight_format.layout.name == "MajorMn"
    assert is_tuned(config, 48, GpuModel.of("cpu"))

    ours = tmp_path / "ours.json"
    ours.write_text(config.model_dump_json())
    with pytest.raises(SystemExit):
        main(["tune", "--config", str(ours), "--format", "flashinfer", "--device", "cpu"])
    assert "names its own; leave --format out" in capsys.readouterr().err


def test_tune_refuses_a_machine_without_a_gpu_in_a_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--model", "tiny", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "tune: expected a GPU" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("_pretends_to_have_a_gpu")
@pytest.mark.parametrize("content", ["not json", "[1]", '{"model_type": "unknown"}', '{"routing": 3}', "[" * 100_000])
def test_tune_refuses_a_file_that_describes_no_layer(content: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        main(["tune", "--config", str(file), "--device", "cpu"])
    assert "expected a MoEConfig or a Hugging Face config.json" in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {command} " in printed for command in ("run", "bench", "launches", "tune", "info"))


def test_a_config_that_is_missing_is_named_before_a_missing_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit):
        main(["tune", "--device", "cpu", "--config", str(tmp_path / "absent.json")])
    assert "absent.json" in capsys.readouterr().err
