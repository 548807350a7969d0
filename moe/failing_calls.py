"""A failing call kept: $MOE_KEEP_FAILING_CALLS names a folder, where a call that raises, or whose result is not finite, is written.

A file holds the call's tensors (safetensors, no pickle), and as text the config, what went wrong, and what it ran on.
`python -m moe replay FILE` runs it again.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.call import LayerCall
from moe.config import MoEConfig
from moe.flow import Added, SwigluParams, TopK

VARIABLE = "MOE_KEEP_FAILING_CALLS"
FOLDER: str | None = os.environ.get(VARIABLE) or None  # read once: every call asks
MAX_FILES = 8  # of a process: each may hold a layer's weights
FORMAT = 1
PACKAGES = ("moe-stages", "torch", "triton", "numba", "numba-cuda")
_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class KeptCall:
    """A call that was read from a file."""

    config: MoEConfig
    call: LayerCall  # without output, replay and workspace, which it only wrote to
    is_finalized: bool  # False: stopped before finalize
    failure: str
    notes: dict[str, Any]  # versions, device, stages, when


def watched(
    config: MoEConfig, call: LayerCall, stages: dict[str, str], run: Callable[[LayerCall], Any], *, is_finalized: bool
) -> Any:
    """`run(call)`, and a file where that fails. Waits for the device to look at the result, unless a CUDA graph is captured.

    Args:
        stages: who runs each stage, by name.
        is_finalized: False where `run` stops before finalize; rows that no slot names may then hold anything.
    """
    try:
        result = run(call)
    except Exception as error:
        _keep(config, call, stages, f"{type(error).__name__}: {error}", is_finalized=is_finalized)
        raise
    if is_finalized and not _is_captured(result) and not bool(torch.isfinite(result).all()):
        count = int((~torch.isfinite(result)).any(dim=1).sum())
        _keep(config, call, stages, f"{count} of {len(result)} rows of the result are not finite", is_finalized=True)
    return result


def read_call(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> KeptCall:
    """A call that was kept.

    Raises:
        ValueError: no such file of ours.
        ImportError: safetensors is missing.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            notes = json.loads((file.metadata() or {}).get("moe", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: expected a call that moe kept, got a file that cannot be read: {error}") from error
    if not isinstance(notes, dict) or notes.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a call that moe kept, got other tensors; ${VARIABLE} makes such files")
    missing = [name for name in ("hidden_states", "gemm1_weights", "gemm2_weights") if name not in tensors]
    if missing:
        raise ValueError(f"{path}: expected the call's tensors, got none of {', '.join(missing)}: {notes['tensors']}")
    config = MoEConfig.model_validate(notes.pop("config"))
    is_finalized, failure = notes.pop("is_finalized"), notes.pop("failure")
    return KeptCall(config, _call_of(tensors), is_finalized, failure, notes)


def _keep(config: MoEConfig, call: LayerCall, stages: dict[str, str], failure: str, *, is_finalized: bool) -> None:
    """Write the call; what cannot be written is said, and never hides the failure itself."""
    number = next(_NUMBERS)
    if FOLDER is None or number > MAX_FILES:
        return
    try:
        folder = Path(FOLDER).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now().astimezone()
        path = folder / f"moe-call-{now:%Y%m%d-%H%M%S}-{os.getpid()}-{number}.safetensors"
        tensors, state = _readable(call)
        notes = {
            "format": FORMAT,
            "failure": failure,
            "is_finalized": is_finalized,
            "config": config.model_dump(mode="json"),
            "stages": stages,
            "tensors": state,
            "device": _device_name(call),
            "versions": {package: _version(package) for package in PACKAGES},
            "date": now.isoformat(timespec="seconds"),
        }
        _safetensors().torch.save_file(tensors, path, metadata={"moe": json.dumps(notes)})
    except Exception as error:  # a full disk, a device that is gone, no safetensors
        warnings.warn(f"moe: the failing call could not be kept in {FOLDER}: {error}", stacklevel=4)
        return
    warnings.warn(f"moe: the failing call was kept: python -m moe replay {path}", stacklevel=4)


def _readable(call: LayerCall) -> tuple[dict[str, Tensor], str]:
    """The call's tensors on the CPU, and why some are missing."""
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_by_name(call).items():
        if not isinstance(value, Tensor):
            continue
        try:
            # A copy each: safetensors takes no memory that two share.
            tensors[name] = value.detach().cpu().contiguous().clone()
        except RuntimeError as error:  # after an illegal access the device gives nothing back
            return tensors, f"{name} could not be read: {error}"
    return tensors, "all"


def tensors_by_name(call: LayerCall) -> dict[str, Any]:
    """What a call was given, in files' words; what is wrong about it may be that it is no tensor."""
    swiglu = call.swiglu if isinstance(call.swiglu, SwigluParams) else SwigluParams()
    values: dict[str, Any] = {
        "hidden_states": call.hidden_states,
        "gemm1_weights": call.w1,
        "gemm2_weights": call.w2,
        "routing_bias": call.bias,
        "gemm1_alpha": swiglu.alpha,
        "gemm1_beta": swiglu.beta,
        "gemm1_clamp_limit": swiglu.clamp_limit,
        "gemm1_bias": call.w1_bias,
        "gemm2_bias": call.w2_bias,
    }
    if isinstance(call.added, Added):
        gate = call.added.gate
        if isinstance(gate, (int, float)) and abs(gate) <= sys.float_info.max:
            gate = torch.tensor(gate, dtype=torch.float64)
        values |= {"added": call.added.values, "added_gate": gate}
    if isinstance(call.entry, TopK):
        return values | {"expert_ids": call.entry.expert_ids, "expert_weights": call.entry.weights}
    return values | {"routing_logits": call.entry}


def _call_of(tensors: dict[str, Tensor]) -> LayerCall:
    is_chosen = "expert_ids" in tensors
    entry: Any = tensors.get("routing_logits")
    if is_chosen:
        entry = TopK(tensors["expert_ids"], tensors["expert_weights"])
    numbers = [tensors.get(f"gemm1_{name}") for name in ("alpha", "beta", "clamp_limit")]
    swiglu = SwigluParams(*numbers) if any(number is not None for number in numbers) else None
    weights = (tensors["gemm1_weights"], tensors["gemm2_weights"])
    added = None
    if "added" in tensors:
        gate = tensors.get("added_gate")
        added = Added(tensors["added"], gate if gate is None or gate.dim() else gate.item())
    return LayerCall(
        entry,
        tensors["hidden_states"],
        *weights,
        swiglu,
        tensors.get("routing_bias"),
        is_chosen=is_chosen,
        added=added,
        w1_bias=tensors.get("gemm1_bias"),
        w2_bias=tensors.get("gemm2_bias"),
    )


def _is_captured(result: Tensor) -> bool:
    return result.is_cuda and torch.cuda.is_current_stream_capturing()


def _device_name(call: LayerCall) -> str:
    device = getattr(call.hidden_states, "device", None)
    if device is None or device.type != "cuda":
        return str(device)
    return f"{device}, {torch.cuda.get_device_name(device)}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("calls are kept by safetensors; pip install safetensors") from error
    return safetensors
