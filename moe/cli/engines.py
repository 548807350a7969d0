"""Which serving engines are here, and whether their plug-in of this package is awake."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from moe.integrations import vllm
from moe.integrations.plugins import sglang

NOT_INSTALLED = "not installed"
NAME = "moe_stages"  # of the entry points, on an engine's list of plug-ins


@dataclass(frozen=True)
class Engine:
    name: str
    version: str
    is_known: bool | None  # whether the plug-in was tried with this release; None without one
    entry_point: str | None  # as the engine finds it
    state: str  # a sentence: what a server would do now


def describe_engines() -> list[Engine]:
    """vLLM and SGLang, as a server would find them. Imports neither."""
    return [
        _describe("vllm", "vllm.general_plugins", vllm.expect_known, _state_of_vllm),
        _describe("sglang", "sglang.srt.plugins", sglang.expect_known, _state_of_sglang),
    ]


def _describe(name: str, group: str, expect_known: Callable[[str], None], state: Callable[[], str]) -> Engine:
    points = [point.value for point in metadata.entry_points(group=group) if point.name == NAME]
    entry_point = points[0] if points else None
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Engine(name, NOT_INSTALLED, None, entry_point, NOT_INSTALLED)
    try:
        expect_known(version)
    except RuntimeError as refusal:
        return Engine(name, version, False, entry_point, str(refusal))
    if entry_point is None:
        sentence = f"not found: moe-stages was installed without its entry point in {group}; install it again"
        return Engine(name, version, True, None, sentence)
    listed = os.environ.get(variable := f"{name.upper()}_PLUGINS")
    if listed is not None and NAME not in [one.strip() for one in listed.split(",")]:
        return Engine(name, version, True, entry_point, f"not loaded: {variable}={listed} does not name {NAME}")
    return Engine(name, version, True, entry_point, state())


def _state_of_vllm() -> str:
    try:
        if not vllm.is_asked_for():
            return "asleep: MOE_VLLM=1 has it run the MoE layers that it computes"
    except ValueError as mistake:
        return str(mistake)
    if vllm.refuses_others():
        return "awake, MOE_VLLM=only: runs MoE layers, and refuses those that it does not compute"
    return "awake, MOE_VLLM=1: runs the MoE layers that it computes, and leaves others to vLLM"


def _state_of_sglang() -> str:
    return f"asleep: --moe-runner-backend {sglang.NAME} has it run the MoE layers"


def engines_text(engines: list[Engine]) -> list[str]:
    """A line each, for `python -m moe info`."""
    return [f"  {engine.name:<8} {_line(engine)}" for engine in engines]


def _line(engine: Engine) -> str:
    return NOT_INSTALLED if engine.version == NOT_INSTALLED else f"{engine.version}, {engine.state}"
