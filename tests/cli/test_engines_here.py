"""What `python -m moe info` says of serving engines."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from moe.__main__ import main
from moe.cli import engines
from moe.cli.engines import Engine, describe_engines

POINTS = {
    "vllm.general_plugins": "moe.integrations.plugins.vllm:plugin",
    "sglang.srt.plugins": "moe.integrations.plugins.sglang:plugin",
}


class Installed:
    """Engines as `importlib.metadata` would list them."""

    PackageNotFoundError = metadata.PackageNotFoundError

    def __init__(self, versions: dict[str, str], points: dict[str, str]) -> None:
        self.versions, self.points = versions, points

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise metadata.PackageNotFoundError(name)
        return self.versions[name]

    def entry_points(self, group: str) -> list[SimpleNamespace]:
        others = [SimpleNamespace(name="lora_filesystem_resolver", value="vllm.plugins:other")]
        mine = [SimpleNamespace(name="moe_stages", value=self.points[group])] if group in self.points else []
        return others + mine


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOE_VLLM", "VLLM_PLUGINS", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def described(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], points: dict[str, str] = POINTS
) -> tuple[Engine, Engine]:
    monkeypatch.setattr(engines, "metadata", Installed(versions, points))
    first, second = describe_engines()
    assert (first.name, second.name) == ("vllm", "sglang")
    return first, second


def test_an_engine_that_is_not_here_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, point in zip(described(monkeypatch, {}), POINTS.values()):
        assert engine == Engine(engine.name, "not installed", None, point, "not installed")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "asleep: MOE_VLLM=1"),
        ("0", "asleep: MOE_VLLM=1"),
        ("1", "awake, MOE_VLLM=1: .* leaves others to vLLM"),
        ("only", "awake, MOE_VLLM=only: .* refuses those"),
        ("yes", "MOE_VLLM: expected 1 .* got 'yes'"),
    ],
)
def test_vllm_is_awake_as_its_variable_says(monkeypatch: pytest.MonkeyPatch, value: str | None, words: str) -> None:
    if value is not None:
        monkeypatch.setenv("MOE_VLLM", value)
    engine, _ = described(monkeypatch, {"vllm": "0.33.0"})
    assert (engine.version, engine.is_known, engine.entry_point) == ("0.33.0", True, POINTS["vllm.general_plugins"])
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(engine.state)


def test_releases_that_were_not_tried_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = described(monkeypatch, {"vllm": "0.40.0", "sglang": "0.6.0"})
    assert (first.is_known, second.is_known) == (False, False)
    assert "expected vllm 0.32 or 0.33, got 0.40.0" in first.state
    assert "expected sglang 0.5.21, 0.5.22, 0.5.23, got 0.6.0" in second.state


def test_an_entry_point_that_is_missing_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in described(monkeypatch, {"vllm": "0.33.0", "sglang": "0.5.23"}, points={}):
        assert engine.entry_point is None
        assert engine.state.startswith("not found: ")


@pytest.mark.parametrize("value", ["", "another", "another, more"])
def test_a_list_of_plug_ins_without_ours_is_said_so(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MOE_VLLM", "1")
    monkeypatch.setenv("VLLM_PLUGINS", value)
    monkeypatch.setenv("SGLANG_PLUGINS", value + ",moe_stages")
    first, second = described(monkeypatch, {"vllm": "0.33.0", "sglang": "0.5.23"})
    assert first.state == f"not loaded: VLLM_PLUGINS={value} does not name moe_stages"
    assert second.state == "asleep: --moe-runner-backend moe_stages has it run the MoE layers"


def test_info_prints_engines_and_gives_them_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "metadata", Installed({"vllm": "0.33.0"}, POINTS))
    assert main(["info", "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "engines vllm 0.33.0, asleep: MOE_VLLM=1 has it run the MoE layers that it computes sglang not in" in text
    assert main(["info", "--device", "cpu", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["engines"]
    assert first["name"] == "vllm"
    assert first["is_known"] is True
    assert first["entry_point"] == POINTS["vllm.general_plugins"]
    assert second["version"] == "not installed"
