"""bench --training: forward and backward beside torch's own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.__main__ import main
from moe.cli import commands
from moe.cli.text import Unit
from moe.cli.training import TrainingTimes, grouped_experts, training_table
from moe.gemm.config import ActivationType
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.testing.closeness import relative_error
from moe.testing.problems import experts_in_float64, make_problem, random_topk
from moe.tuning.measure import Peaks


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED_SHAPES, "tiny", MoEShape("tiny", 64, 64, 16, 4, "Renormalize", 16))
    monkeypatch.setattr(commands, "measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))


def bench(*more: str) -> int:
    return main(["bench", "--training", "--model", "tiny", "--tokens", "9", "64", "--device", "cpu", *more])


def test_ours_is_timed_beside_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "training.json"
    assert bench("--json", str(file), "--turns", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("floor: ") for line in lines)
    header = next(number for number, line in enumerate(lines) if line.startswith("tokens"))
    assert [line.split()[0] for line in lines[header + 2 : header + 4]] == ["9", "64"]
    results = json.loads(file.read_text())["results"]
    for result in results:
        both, forward = result["forward_and_backward_us"], result["forward_us"]
        assert both.keys() == forward.keys() >= {"ours", "anew"}
        assert all(both[name] > 0 for name in both)
        assert result["kept_bytes"]["anew"] < result["kept_bytes"]["ours"]
    assert results[1]["flops"] == 3 * 2 * 64 * 4 * (128 * 64 + 64 * 64)


def test_a_table_of_a_gpu_fits_80_columns_and_leaves_out_what_was_not_timed():
    ways = {"ours": 22345.6, "anew": 27345.6, "eager": 61234.5, "compiled": 41234.5}
    kept = {"ours": 3634 << 20, "anew": 9 << 20, "eager": 8961 << 20}
    times = TrainingTimes("tiny", 32768, 1e13, ways, ways, kept, 5.8e-3)
    text = training_table([times], Peaks(8e14, "bfloat16", 4e12), Unit("ms", 1e3))
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[2].split() == [
        "32,768",
        "37.5",
        "22.3",
        "22.3",
        "27.3",
        "61.2",
        "41.2",
        "2.74",
        "3,634",
        "41%",
        "5.8e-3",
    ]
    alone = replace(times, both_us={"ours": 1.0, "anew": 2.0}, kept_bytes={"ours": 1}, error=None)
    text = training_table([alone], Peaks(8e14, "bfloat16", 4e12), Unit("ms", 1e3))
    assert text.splitlines()[0].split() == ["tokens", "floor", "forward", "both", "anew", "MiB"]


def test_without_token_counts_a_cpu_times_few(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def measured(named, token_counts, device, **options):
        asked.extend(token_counts)
        return iter(())

    monkeypatch.setattr("moe.cli.training.measure_training", measured)
    assert main(["bench", "--training", "--model", "tiny", "--device", "cpu"]) == 0
    assert asked == [64]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--plot", "x.svg"), "--plot: not with --training"),
        (("--format", "flashinfer"), "tiny: gemm1.weight_format: expected MajorK"),
    ],
    ids=["plot", "format"],
)
def test_what_does_not_go_together_is_said(more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench(*more)
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_torchs_way_computes_the_layer(activation: str):
    from moe import MoEConfig

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 2}
    config = MoEConfig.create(**sizes, activation=activation)
    problem, topk = make_problem(config, 33), random_topk(33, 8, 2)
    exact = experts_in_float64(
        topk, problem.hidden_states, problem.w1, problem.w2, activation=ActivationType[activation]
    )
    try:
        output = grouped_experts(
            topk.weights, problem.hidden_states, problem.w1, problem.w2, topk.expert_ids, ActivationType[activation], 8
        )
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch {torch.__version__} has no grouped_mm here: {error}")
    assert relative_error(output, exact) <= 2e-2
