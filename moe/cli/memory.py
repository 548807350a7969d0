"""Whether a command fits the memory that is free, told before any of it is taken: a machine without any stops answering."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.cli.layer import NamedLayer
from moe.cli.machine import UnfitMachine
from moe.compose import reference_pipeline
from moe.config import MoEConfig
from moe.tuning.problem import MAX_CHECKED_TOKENS, sets_for

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
BF16, FLOAT32, FLOAT64 = 2, 4, 8  # bytes an element
MARGIN_SHARE = 0.05  # of the rest: pages in two places for a moment, an allocator's rounding
MIN_MARGIN = {"cpu": 1 << 28, "cuda": 1 << 30}  # a process's threads; cuBLAS's workspaces and the kernels' code
PEAK_BYTES = {"cpu": 5 << 27, "cuda": 5 << 30}  # the copy whose rate is measured, both sides, and what draws it


@dataclass(frozen=True)
class Need:
    """Bytes of a device's memory that a command takes at once, by what they are for."""

    weights: int
    inputs: int  # input sets, what each stage makes of them, and what one call allocates
    expert: int  # one expert's weights in float32 or float64, for the references and the check
    margin: int

    @property
    def total(self) -> int:
        return self.weights + self.inputs + self.expert + self.margin

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "inputs": self.inputs,
            "one expert in float64": self.expert,
            "margin": self.margin,
        }
        return ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in parts.items())


def expect_memory(named: NamedLayer, device: torch.device, num_tokens: int) -> None:
    """Raise UnfitMachine where the layer, its inputs and the check of its result are larger than what is free."""
    try:
        need = memory_need(named, device, num_tokens)
    except ValueError as error:
        raise UnfitMachine(f"{named.name}, {num_tokens:,} tokens: {error}") from error
    free_bytes = free_device_bytes(device) if device.type == "cuda" else available_bytes()
    if free_bytes is not None and need.total > free_bytes:
        raise UnfitMachine(
            f"{named.name}, {num_tokens:,} tokens: expected {need.total / 1e9:.1f} GB of free memory on {device} ({need}), "
            f"got {free_bytes / 1e9:.1f} GB; pick a smaller model, a shape that holds fewer experts, or fewer tokens"
        )


def memory_need(named: NamedLayer, device: torch.device, num_tokens: int) -> Need:
    """What a layer with its input sets takes, at the most.

    Raises:
        ValueError: more tokens than rows can be numbered for.
    """
    shape, config = named.shape, named.config
    num_sets = sets_for(num_tokens, device)
    inputs = num_sets * _set_bytes(config, num_tokens) + _call_bytes(config, device, num_tokens)
    expert = shape.expert_weights * (FLOAT64 + BF16) + min(num_tokens, MAX_CHECKED_TOKENS) * (
        5 * config.hidden_size * FLOAT64
    )
    rest = max(shape.weight_bytes + inputs + expert, PEAK_BYTES[device.type])
    margin = max(int(MARGIN_SHARE * rest), MIN_MARGIN[device.type])
    return Need(shape.weight_bytes, inputs, expert, margin + rest - (shape.weight_bytes + inputs + expert))


def _set_bytes(config: MoEConfig, num_tokens: int) -> int:
    """Logits, hidden states, output, and what passes between the stages."""
    of_token = config.num_experts * FLOAT32 + 2 * config.hidden_size * BF16
    return num_tokens * of_token + reference_pipeline(config).workspace_bytes(num_tokens)


def _call_bytes(config: MoEConfig, device: torch.device, num_tokens: int) -> int:
    """What one more call holds: the stages' results, the rows of GEMMs of its size beside it, and logits while drawn.

    On a CPU the references also hold an expert's products, which may be of all tokens, and the sum, in float32.
    """
    rows = config.permute.max_rows(num_tokens)
    inner = config.gemm1.weight_rows
    beside = rows * (2 * config.hidden_size + inner + config.intermediate_size) * BF16
    drawn = 2 * num_tokens * config.num_experts * FLOAT32
    in_float32 = 0
    if device.type == "cpu":
        of_token = 2 * inner + 3 * config.intermediate_size + 4 * config.hidden_size
        in_float32 = num_tokens * of_token * FLOAT32
    return _set_bytes(config, num_tokens) + beside + drawn + in_float32


def free_device_bytes(device: torch.device) -> int:
    """What is free on a GPU, and what torch holds of it unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def available_bytes() -> int | None:
    """RAM that is free without swapping, for the machine and for the container or job that this process is in."""
    found = [*_machine_bytes(MEMINFO), *container_bytes(CGROUP, CGROUPS)]
    return min(found) if found else None


def _machine_bytes(meminfo: Path) -> list[int]:
    lines = _lines(meminfo)
    return [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]


def container_bytes(membership: Path, root: Path) -> list[int]:
    """What each control group that this process is in leaves to it: limit less use, cached files taken as free.

    Args:
        membership: /proc/self/cgroup, a line "hierarchy:controllers:path" each.
        root: where control groups are mounted: version 2 right here, version 1 in `memory`.
    """
    found = []
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = (
                root / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        for group in _groups(mount, path):
            limit, used = (_number(group / name) for name in names[:2])
            if limit is not None and used is not None:
                found.append(max(limit - used + _cached_bytes(group, names[2]), 0))
    return found


def _groups(mount: Path, path: str) -> Sequence[Path]:
    """A group and those above it, each of which may set a limit. A container may be told a path that it cannot see."""
    group = Path(os.path.normpath(f"{mount}/{path}"))
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]


def _cached_bytes(group: Path, name: str) -> int:
    counts = (line.split() for line in _lines(group / "memory.stat"))
    return next((int(count[1]) for count in counts if count[0] == name), 0)


def _number(file: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
