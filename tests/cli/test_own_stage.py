"""bench --stage: a stage of one's own, found, checked and timed."""

import json
from pathlib import Path

import pytest
import torch

from moe.__main__ import main
from moe.cli import commands
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.tuning.measure import Peaks

MINE = """
def my_gemm2(rows, weights, permutation):
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    for tile in range(int(permutation.num_tiles)):
        lines = slice(tile * permutation.tile_rows, (tile + 1) * permutation.tile_rows)
        out[lines] = (rows[lines].float() @ weights[permutation.expert_of_tile[tile]].float().T).bfloat16()
    return out

def wrong_gemm2(rows, weights, permutation):
    return my_gemm2(rows, weights, permutation) * 1.1

number = 3
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(NAMED_SHAPES, "tiny", MoEShape("tiny", 64, 64, 16, 4, "Renormalize", 16))
    monkeypatch.setattr(commands, "measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))
    monkeypatch.setattr("moe.cli.own_stage.BUDGET_S", {"cpu": 0.0})
    (tmp_path / "mine.py").write_text(MINE)


def bench(tmp_path: Path, function: str, *more: str) -> int:
    stage = f"gemm2={tmp_path}/mine.py:{function}"
    return main(["bench", "--stage", stage, "--model", "tiny", "--tokens", "1", "9", "--device", "cpu", *more])


def test_a_stage_of_ones_own_is_timed_beside_ours_and_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "stage.json"
    assert bench(tmp_path, "my_gemm2", "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("tokens"))
    assert lines[header].split() == ["tokens", "mine", "ours", "dense", "roof", "of", "roof", "ours/mine", "error"]
    assert [line.split()[0] for line in lines[header + 2 :]] == ["1", "9"]
    results = json.loads(file.read_text())["results"]
    assert [result["num_tokens"] for result in results] == [1, 9]
    for result in results:
        assert result["stage"] == "gemm2"
        assert all(
            result[name] > 0 for name in ("device_us", "ours_us", "dense_us", "flops", "num_bytes", "share_of_roof")
        )
        assert result["num_samples"] >= 3
        assert result["accuracy"]["is_good"]


def test_a_wrong_stage_is_said_to_be_and_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench(tmp_path, "wrong_gemm2") == 1
    assert capsys.readouterr().out.count("WRONG") == 2


def test_a_module_is_found_where_the_command_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").rename(tmp_path / "stages_of_mine.py")
    arguments = ["bench", "--stage", "gemm2=stages_of_mine:my_gemm2", "--model", "tiny", "--tokens", "3"]
    assert main([*arguments, "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gemm2", "expected STAGE=MODULE:FUNCTION, as gemm2=my.module:my_gemm2"),
        ("gemm3=mine.py:my_gemm2", "a stage out of route, permute, gemm1, gemm2, finalize, got 'gemm3'"),
        ("gemm2=no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("gemm2=no_such_file.py:f", "FileNotFoundError"),
        ("gemm2={mine}:f", "a module without 'f'"),
        ("gemm2={mine}:number", "which cannot be called"),
    ],
)
def test_a_stage_that_is_not_there_is_refused(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["bench", "--stage", text.format(mine=tmp_path / "mine.py"), "--model", "tiny", "--device", "cpu"])
    assert reason in " ".join(capsys.readouterr().err.split())


def test_a_triton_kernel_on_a_cpu_is_said_to_need_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "triton_stage.py"
    file.write_text(
        "import triton\n"
        "import triton.language as tl\n"
        "@triton.jit\n"
        "def nothing_kernel(rows_ptr):\n"
        "    tl.store(rows_ptr, 0.0)\n"
        "def my_gemm2(rows, weights, permutation):\n"
        "    nothing_kernel[(1,)](rows)\n"
        "    return rows\n"
    )
    with pytest.raises(SystemExit):
        main(["bench", "--stage", f"gemm2={file}:my_gemm2", "--model", "tiny", "--tokens", "4", "--device", "cpu"])
    assert "expected a stage that runs on a CPU, got a Triton kernel" in " ".join(capsys.readouterr().err.split())
