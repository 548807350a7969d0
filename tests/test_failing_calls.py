"""A failing call is kept where an environment variable says so, and runs again from its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe
from moe import failing_calls
from moe.__main__ import main
from moe.call import LayerCall
from moe.failing_calls import read_call

safetensors = pytest.importorskip("safetensors.torch")

CONFIG = moe.MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=6, top_k=2, method="DeepSeekV3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failing_calls, "FOLDER", str(tmp_path / "failing"))
    monkeypatch.setattr(failing_calls, "_NUMBERS", iter(range(1, 100)))
    return tmp_path / "failing"


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return normal(5, 6), normal(5, 64).bfloat16(), normal(6, 64, 64).bfloat16(), normal(6, 64, 32).bfloat16()


def broken(fault: str) -> moe.MoEPipeline:
    pipeline = moe.reference_pipeline(CONFIG)

    def gemm2(*args: Any, **more: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        return pipeline.gemm2(*args, **more).fill_(float("nan"))

    return replace(pipeline, gemm2=gemm2)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("moe-call-*.safetensors"))


def warns_that_it_was_kept() -> AbstractContextManager[Any]:
    return pytest.warns(UserWarning, match=r"the failing call was kept: python -m moe replay .*moe-call-")


def raises_if(is_raised: bool) -> AbstractContextManager[Any]:
    return pytest.raises(RuntimeError, match="an illegal memory access") if is_raised else nullcontext()


@pytest.mark.parametrize("is_chosen", [False, True], ids=["logits", "chosen"])
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_call_that_fails_is_kept_whole(fault: str, is_chosen: bool, folder: Path) -> None:
    logits, *rest = tensors()
    bias = torch.linspace(0, 1, 6)
    swiglu = moe.SwigluParams(clamp_limit=torch.full((6,), 7.0))
    entry = moe.reference_pipeline(CONFIG).route(logits, bias) if is_chosen else logits
    call = LayerCall(entry, *rest, swiglu, None if is_chosen else bias, is_chosen=is_chosen)
    with warns_that_it_was_kept(), raises_if(fault == "raises"):
        assert broken(fault).run(call).isnan().all()
    (path,) = kept(folder)
    found = read_call(path)
    assert found.config == CONFIG
    assert (
        found.failure
        == {
            "raises": "RuntimeError: an illegal memory access was encountered",
            "nan": "5 of 5 rows of the result are not finite",
        }[fault]
    )
    assert found.call.is_chosen is is_chosen
    assert found.is_finalized
    assert found.notes["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert torch.equal(moe.reference_pipeline(CONFIG).run(found.call), moe.reference_pipeline(CONFIG).run(call))


def test_a_call_stopped_before_finalize_is_kept_where_it_raises(folder: Path) -> None:
    with pytest.warns(UserWarning, match="was kept"), pytest.raises(RuntimeError, match="illegal"):
        broken("raises").expert_outputs(*tensors())
    (path,) = kept(folder)
    assert not read_call(path).is_finalized


def test_a_refused_call_is_kept_with_the_tensors_that_it_has(folder: Path) -> None:
    logits, hidden_states, w1, w2 = tensors()
    with pytest.warns(UserWarning, match="was kept"), pytest.raises(ValueError, match="gemm1_weights"):
        moe.reference_pipeline(CONFIG)(logits, hidden_states, w1[:3], w2)
    (path,) = kept(folder)
    found = read_call(path)
    assert found.failure.startswith("ValueError: ")
    assert found.call.w1.shape == (3, 64, 64)


def test_a_call_that_is_right_leaves_no_file(folder: Path) -> None:
    moe.reference_pipeline(CONFIG)(*tensors())
    assert not folder.exists()


def test_a_process_keeps_so_many_and_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failing_calls, "MAX_FILES", 2)
    for is_kept in (True, True, False, False):
        with warns_that_it_was_kept() if is_kept else nullcontext():
            broken("nan")(*tensors())
    assert len(kept(folder)) == 2


@pytest.mark.parametrize("fault", ["folder", "safetensors"])
def test_what_cannot_be_kept_is_said_and_the_failure_stays(
    fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "folder":
        folder.write_text("a file")
    else:
        monkeypatch.setitem(sys.modules, "safetensors", None)
    with (
        pytest.warns(UserWarning, match="the failing call could not be kept in"),
        pytest.raises(RuntimeError, match="illegal"),
    ):
        broken("raises")(*tensors())


def test_a_kept_call_runs_again_beside_the_references(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="was kept"):
        broken("nan")(*tensors())
    (path,) = kept(folder)
    assert main(["replay", str(path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "failure   5 of 5 rows of the result are not finite" in text
    assert "5 tokens from logits: H=64 I=32 E=6 K=2, DeepSeekV3" in text
    assert "references on cpu: all finite" in text


def test_a_call_that_still_fails_ends_with_1_and_says_which_inputs_are_not_finite(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, hidden_states, w1, w2 = tensors()
    hidden_states[2, 3] = float("nan")
    with pytest.warns(UserWarning, match="was kept"):
        moe.reference_pipeline(CONFIG)(logits, hidden_states, w1, w2)
    (path,) = kept(folder)
    failing_calls.FOLDER = None
    assert main(["replay", str(path), "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "1 values of hidden_states are not finite" in text
    assert "references on cpu: 1 of 5 rows are not finite" in text


def test_every_tensor_that_is_not_finite_is_named_in_lines_of_80_columns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bias, added = torch.zeros(6), torch.zeros(5, 64)
    bias[1], added[0, :2] = float("inf"), float("nan")
    swiglu = moe.SwigluParams(alpha=torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]))
    with pytest.warns(UserWarning, match="was kept"), pytest.raises(RuntimeError, match="illegal"):
        broken("raises").run(LayerCall(*tensors(), swiglu, bias, added=moe.Added(added)))
    (path,) = kept(folder)
    failing_calls.FOLDER = None
    assert main(["replay", str(path), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for count, name in ((1, "routing_bias"), (1, "gemm1_alpha"), (2, "added")):
        assert f"          {count} values of {name} are not finite" in lines
    assert not any("expert_ids" in line or "gemm1_weights" in line for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "content", [None, b"", b"no tensors", "other"], ids=["missing", "empty", "text", "other tensors"]
)
def test_a_file_that_holds_no_call_is_refused(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    if content == "other":
        safetensors.save_file({"weights": torch.zeros(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a call that moe kept"):
        read_call(path)
    with pytest.raises(SystemExit) as error:
        main(["replay", str(path)])
    assert error.value.code == 2
    assert "replay: " in capsys.readouterr().err


def test_the_variable_is_all_that_a_program_needs(tmp_path: Path) -> None:
    code = (
        "import torch, moe\n"
        "config = moe.MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=4, top_k=2)\n"
        "x = torch.full((3, 64), float('inf')).bfloat16()\n"
        "w1, w2 = torch.ones(4, 64, 64).bfloat16(), torch.ones(4, 64, 32).bfloat16()\n"
        "moe.build_pipeline(config, 'cpu')(torch.zeros(3, 4), x, w1, w2)\n"
    )
    environment = os.environ | {"MOE_KEEP_FAILING_CALLS": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (path,) = kept(tmp_path)
    assert f"python -m moe replay {path}" in result.stderr
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["moe"])["format"] == 1
