"""bench --training: forward and backward beside torch's own."""

import json
from pathlib import Path

import pytest
import torch

from moe.__main__ import main
from moe.cli import commands
from moe.cli.training import grouped_experts
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
    header = next(number for number, line in enumerate(lines) if line.startswith("tokens"))
    assert [line.split()[0] for line in lines[header + 2 : header + 4]] == ["9", "64"]
    results = json.loads(file.read_text())["results"]
    for result in results:
        both, forward = result["forward_and_backward_us"], result["forward_us"]
        assert both.keys() == forward.keys() >= {"ours", "anew"}
        assert all(both[name] > 0 for name in both)
        assert result["kept_bytes"]["anew"] < result["kept_bytes"]["ours"]
    assert results[1]["flops"] == 3 * 2 * 64 * 4 * (128 * 64 + 64 * 64)


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
