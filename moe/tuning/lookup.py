"""What the tables say about a layer: the user's first, then the shipped one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping

import torch

from moe.config import MoEConfig
from moe.tuning.buckets import bucket_of
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.table import (
    Entries,
    LayerKey,
    TableEntry,
    by_layer,
    load_table,
    merge_into,
    shipped_table_path,
    user_table_path,
)

Choices = Mapping[tuple[LayerKey, int], TuningChoice]  # of a layer and bucket

_LOGGER = logging.getLogger("moe.tuning")


class Tables:
    """The tables of this process: each read once a GPU model, and kept.

    `generation` grows whenever they change: what was made of them before is out of date.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._choices_of_gpu: dict[GpuModel, Choices] = {}
        self._lock = threading.RLock()

    def of(self, gpu: GpuModel) -> Choices:
        choices = self._choices_of_gpu.get(gpu)
        if choices is None:
            with self._lock:
                choices = self._choices_of_gpu.get(gpu)
                if choices is None:
                    choices = self._choices_of_gpu[gpu] = _load(gpu)
        return choices

    def add(self, gpu: GpuModel, entries: Iterable[TableEntry]) -> None:
        with self._lock:
            self._choices_of_gpu[gpu] = {**self.of(gpu), **_choices_by_layer(entries)}
            self.generation += 1

    def refresh(self, gpu: GpuModel) -> None:
        """See what other processes have added to the files."""
        with self._lock:
            known = self.of(gpu)
            if (choices := {**known, **_load(gpu)}) != known:
                self._choices_of_gpu[gpu] = choices
                self.generation += 1

    def clear(self) -> None:
        with self._lock:
            self._choices_of_gpu.clear()
            self.generation += 1


TABLES = Tables()


def look_up(config: MoEConfig, num_tokens: int, device: torch.device | str | GpuModel) -> TuningChoice | None:
    """The tuned choice for a layer and token count, or None where no table has one: then the model decides.

    Args:
        device: for which GPU; a CPU has nothing to choose, and no table is read.
    """
    if not isinstance(device, GpuModel) and torch.device(device).type != "cuda":
        return None
    bucket = bucket_of(num_tokens)
    return None if bucket is None else TABLES.of(_gpu_of(device)).get((LayerKey.of(config), bucket))


def is_tuned(config: MoEConfig, bucket: int, device: torch.device | str | GpuModel) -> bool:
    """Whether a table has an entry for the layer in this bucket."""
    return (LayerKey.of(config), bucket) in TABLES.of(_gpu_of(device))


def remember(gpu: GpuModel, entries: Iterable[TableEntry], *, seen: Entries | None = None) -> list[TableEntry]:
    """Add entries to the user's table, and use it in this process from now on, even where the file cannot be written.

    Args:
        seen: as in `merge_into`.

    Returns:
        What counts for the layers and buckets of these entries now: other processes' entries where those were first.
    """
    entries = list(entries)
    table = merge_into(user_table_path(gpu), gpu, entries, seen=seen)
    TABLES.add(gpu, table.entries)
    stands = by_layer(table.entries)
    return [stands[entry.key, entry.bucket] for entry in entries]


def users_entries(gpu: GpuModel) -> Entries:
    """What the user's table holds at this moment."""
    table = load_table(user_table_path(gpu), gpu, report=_LOGGER.debug)
    return by_layer(table.entries) if table else {}


def forget_tables() -> None:
    """Read the tables anew when they are next needed."""
    TABLES.clear()


def _gpu_of(device: torch.device | str | GpuModel) -> GpuModel:
    return device if isinstance(device, GpuModel) else GpuModel.of(device)


def _load(gpu: GpuModel) -> Choices:
    shipped = load_table(shipped_table_path(gpu), gpu, report=_LOGGER.debug)
    users = load_table(user_table_path(gpu), gpu)
    choices: dict[tuple[LayerKey, int], TuningChoice] = {}
    for table in (shipped, users):
        if table is not None:
            choices |= _choices_by_layer(table.entries)
    return choices


def _choices_by_layer(entries: Iterable[TableEntry]) -> dict[tuple[LayerKey, int], TuningChoice]:
    return {(entry.key, entry.bucket): entry.choice for entry in entries}
