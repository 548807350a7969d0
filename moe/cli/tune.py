"""python -m moe tune: find what is fastest for a layer on this GPU, and keep it in the user's table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.cli.layer import FORMATS, config_of_shape
from moe.cli.machine import UnfitMachine, expect_free_bytes
from moe.cli.progress import Progress
from moe.cli.text import decimal, table
from moe.config import MoEConfig
from moe.shapes import NAMED_SHAPES
from moe.tuning.gpu import GpuModel
from moe.tuning.search import describe, tune
from moe.tuning.table import LayerKey, TableEntry, load_table, merge_into, user_table_path


@dataclass(frozen=True)
class NamedLayer:
    """A layer to tune, and what to call it."""

    name: str
    config: MoEConfig


def layers_of(models: Sequence[str], file: Path | None, weight_format: str) -> list[NamedLayer]:
    """The layers of named models, and that of a JSON file: a MoEConfig, or a Hugging Face config.json.

    Raises:
        UnfitMachine: a file that cannot be read, or that describes no layer.
    """
    layers = [
        NamedLayer(name, config_of_shape(NAMED_SHAPES[name], FORMATS[weight_format])) for name in dict.fromkeys(models)
    ]
    if file is not None:
        layers.append(NamedLayer(file.name, _read_config(file, weight_format)))
    return layers


def _read_config(file: Path, weight_format: str) -> MoEConfig:
    try:
        fields = json.loads(file.read_text())
        if isinstance(fields, dict) and "routing" in fields:
            return MoEConfig.model_validate(fields)
        return MoEConfig.from_hf_config(fields, weight_format=FORMATS[weight_format])
    except (OSError, ValueError, TypeError) as error:
        raise UnfitMachine(
            f"--config {file}: expected a MoEConfig or a Hugging Face config.json, got one that does not read as either: {error}"
        ) from error


def tune_layers(
    layers: Iterable[NamedLayer],
    token_counts: Sequence[int] | None,
    device: torch.device,
    *,
    max_num_tokens: int,
    seed: int,
    force: bool,
    progress: Progress,
) -> None:
    """Tune one after another, and print a table a layer: each bucket before and after. Weights are made once a layer."""
    for layer in layers:
        gemms = (layer.config.gemm1, layer.config.gemm2)
        expect_free_bytes(layer.name, sum(2 * math.prod(gemm.weight_shape) for gemm in gemms), device)
        progress.step(layer.name)
        entries = tune(
            layer.config,
            token_counts=token_counts,
            device=device,
            max_num_tokens=max_num_tokens,
            seed=seed,
            report=progress.step,
            force=force,
        )
        progress.step(f"{layer.name}: done")
        print(
            f"\n{layer.name}\n{entries_text(entries)}" if entries else f"\n{layer.name}: nothing was left to tune",
            flush=True,
        )


def show_table(layers: Sequence[NamedLayer], device: torch.device) -> None:
    """Print what the user's table holds for this GPU, a layer at a time; those of `layers` by name."""
    gpu = GpuModel.of(device)
    path = user_table_path(gpu)
    entries = _entries_in(path, gpu)
    print(f"{path}: {len(entries)} entries")
    names = {LayerKey.of(layer.config): layer.name for layer in layers}
    for key in dict.fromkeys(entry.key for entry in entries):
        text = ", ".join(f"{name} {value}" for name, value in key.model_dump(mode="json").items())
        print(f"\n{names.get(key, text)}\n{entries_text([entry for entry in entries if entry.key == key])}")


def export_table(file: Path, device: torch.device) -> None:
    """Add the entries of the user's table to `file`, in the format of the tables that are shipped."""
    gpu = GpuModel.of(device)
    entries = _entries_in(user_table_path(gpu), gpu)
    merge_into(file, gpu, entries)
    print(f"{file}: {len(entries)} entries for {gpu.name}")


def entries_text(entries: Sequence[TableEntry]) -> str:
    """A line a bucket: microseconds of the model's choice and of the tuned one, the gain, and what was chosen."""
    rows = [
        (
            f"{entry.bucket:,}",
            decimal(entry.model_us),
            decimal(entry.tuned_us),
            f"{100 * (entry.model_us / entry.tuned_us - 1):.1f}%",
            describe(entry.choice),
        )
        for entry in sorted(entries, key=lambda entry: entry.bucket)
    ]
    return table(("tokens", "model us", "tuned us", "gain", "choice"), rows)


def _entries_in(path: Path, gpu: GpuModel) -> Sequence[TableEntry]:
    found = load_table(path, gpu)
    return () if found is None else found.entries
