"""What is typed: names that are nearly right, files that are not there, helps that fit a terminal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe.__main__ import main
from moe.cli import commands
from moe.cli.layer import layers_of
from moe.shapes import NAMED_SHAPES
from moe.tuning.measure import Peaks

COMMANDS = ("run", "bench", "launches", "tune", "replay", "info")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_fits_80_columns_and_ends_with_examples(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert f"python -m moe {command}" in text.partition("example")[2]
    if command not in ("info", "replay"):
        assert all(name in text for name in NAMED_SHAPES)
        assert "of random weights, inputs and load" in " ".join(text.split())


def test_the_help_names_every_command_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("qwen3-30b-a3", "qwen3-30b-a3b"), ("deepseek", "deepseek-v3"), ("mixtral", "mixtral-8x7b"), ("kimi", "kimi-k2")],
)
def test_a_name_that_is_nearly_a_models_is_answered_with_the_models(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
):
    message = refusal(["run", "--model", typed], capsys)
    assert f"no model is called '{typed}'; did you mean " in message
    assert meant in message.partition("did you mean")[2].partition("?")[0]


def test_a_name_like_nothing_is_answered_with_all_names(capsys: pytest.CaptureFixture[str]):
    message = refusal(["bench", "--model", "zzz"], capsys)
    assert "did you mean" not in message
    assert all(name in message for name in NAMED_SHAPES)


def test_a_models_name_may_have_capitals_and_an_organisation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(named: commands.NamedLayer, *_: object) -> None:
        raise commands.UnfitMachine(f"stopped at {named.name}")

    monkeypatch.setattr(commands, "expect_memory", stop)
    assert "stopped at qwen3-30b-a3b" in refusal(["run", "--model", "Qwen/Qwen3-30B-A3B"], capsys)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("{", "no JSON: Expecting property name"),
        ('{"model_type": "unknown"}', "unknown"),
        ('{"routing": {}}', "routing.num_experts: Field required (and "),
        ('{"model_type": "qwen3_moe", "hidden_act": "silu"}', "expected the key"),
    ],
    ids=["missing", "no-json", "unknown-model", "fields-missing", "key-missing"],
)
def test_the_reason_why_a_config_cannot_be_read_comes_first(
    content: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    message = refusal(["run", "--config", str(file), "--device", "cpu"], capsys)
    assert 0 < message.index(f"--config {file}: ") < message.index(reason)
    assert message.index(reason) < message.index("expected a MoEConfig or a Hugging Face config.json")


def test_a_config_that_is_missing_comes_before_a_gpu_that_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = refusal(["bench", "--config", str(tmp_path / "none.json"), "--device", "cuda"], capsys)
    assert "none.json: No such file" in message


def test_a_full_disk_is_found_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(commands, "measure_peaks", lambda device: pytest.fail("timed"))
    message = refusal(["bench", "--model", "sonic-7b", "--device", "cpu", "--json", "/dev/full"], capsys)
    assert "--json /dev/full: expected a file in a folder that can be written, got No space left" in message


def test_two_results_in_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = ["--json", str(tmp_path / "both"), "--html", str(tmp_path / ".." / tmp_path.name / "both")]
    message = refusal(["bench", "--model", "sonic-7b", "--device", "cpu", *files], capsys)
    assert "both: expected another file than --json, got the same; name another" in message


@pytest.mark.parametrize(
    ("place", "words"),
    [("/dev/full", "stdout: expected a place for the result, got No space left on device\n"), ("| true", "")],
    ids=["full-disk", "reader-that-left"],
)
def test_a_result_that_cannot_be_printed_is_a_sentence_at_most(place: str, words: str):
    if place.startswith("/dev") and not Path(place).exists():
        pytest.skip(f"no {place} here")
    script = f"'{sys.executable}' -m moe info {place if place[0] == '|' else '> ' + place}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.stderr == words


def test_a_file_that_cannot_be_written_in_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from moe.cli.progress import Progress
    from moe.cli.result_file import ResultFile

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    file = ResultFile("--json", folder / "bench.json")
    folder.rmdir()
    file.write({"results": [1, 2]})
    assert not file.is_written(Progress())
    (kept,) = tmp_path.glob("moe-*.json")
    assert json.loads(kept.read_text()) == {"results": [1, 2]}
    assert str(kept) in capsys.readouterr().err
    folder.mkdir()
    file.write({"results": [1, 2, 3]})
    assert file.is_written(Progress())
    assert json.loads((folder / "bench.json").read_text()) == {"results": [1, 2, 3]}


def test_a_probe_leaves_what_was_in_the_file(tmp_path: Path):
    from moe.cli.result_file import expect_writable

    (tmp_path / "bench.json").write_text("before")
    expect_writable("--json", tmp_path / "bench.json")
    expect_writable("--json", tmp_path / "new.json")
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
    assert (tmp_path / "bench.json").read_text() == "before"


def test_tokens_that_are_named_twice_are_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(commands, "measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))
    monkeypatch.setattr("moe.cli.run.TURN_BUDGET_S", {"cpu": 0.0})
    monkeypatch.setitem(
        NAMED_SHAPES, "tiny", commands.NAMED_SHAPES["sonic-7b"].__class__("tiny", 64, 64, 16, 4, "Renormalize", 16)
    )
    file = tmp_path / "bench.json"
    arguments = ["bench", "--model", "tiny", "tiny", "--tokens", "3", "3", "2", "3", "--turns", "0", "--device", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [result["num_tokens"] for result in report["results"]] == [3, 2]
    assert all(timing["num_samples"] >= 3 for result in report["results"] for timing in result["stages"].values())
    assert "0.0 TFLOP/s" not in capsys.readouterr().out


def test_a_dry_run_lists_what_would_be_timed_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "--model", "qwen3-30b-a3b", "--tokens", "1", "2048", "--dry-run", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "qwen3-30b-a3b, on a Hopper GPU; nothing is timed" in lines
    assert {"1 tokens: the model's choice", "2,048 tokens: the model's choice"} <= set(lines)
    text = " ".join(lines)
    assert "gemm1_kernel swapped" in text
    assert "gemm1_kernel wide" in text


def test_tables_are_shown_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path))
    assert main(["tune", "--show", "--device", "cpu"]) == 0
    report = capsys.readouterr().out
    assert report.startswith("no GPU here: the tables for all GPU models\nshipped")
    assert f"user's: none in {tmp_path}" in report


def test_a_picture_needs_no_backend_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    import os
    import subprocess
    import sys

    code = "from pathlib import Path; from moe.cli.plot import expect_plot; expect_plot(Path('bench.svg')); import os; print(os.environ['MPLBACKEND'])"
    environment = os.environ | {"MPLBACKEND": "module://not_installed"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (run.stdout, run.returncode) == ("module://not_installed\n", 0), run.stderr


def test_one_layer_of_a_model_whose_layers_differ_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fields = {"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 64, "moe_intermediate_size": 32}
    fields |= {"num_experts": [8, 4], "num_experts_per_tok": 2, "norm_topk_prob": True, "num_hidden_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    run = ["run", "--config", str(file), "--device", "cpu", "--tokens", "4"]
    assert "its layers differ: num_experts is 8 in layer 0, 4 in layer 1" in refusal(run, capsys)
    assert main([*run, "--layer", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "config.json layer 1"
    assert [layers_of([], file, None, number)[0].config.num_experts for number in (0, 1)] == [8, 4]
    assert "expected 0 to 1, got 2" in refusal([*run, "--layer", "2"], capsys)
    assert "expected --config FILE" in refusal(["run", "--layer", "1"], capsys)
    assert "expected a number of 0 or more, got '-1'" in refusal([*run, "--layer=-1"], capsys)
