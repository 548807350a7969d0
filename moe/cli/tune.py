"""python -m moe tune: find what is fastest for a layer on this GPU, and keep it in the user's table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moe.cli.layer import Layer, NamedLayer, make_inputs, make_layer
from moe.cli.machine import STAGES, UnfitMachine
from moe.cli.memory import expect_memory
from moe.cli.progress import Progress
from moe.cli.run import stage_calls
from moe.cli.text import decimal, table, wrap
from moe.compose import build_pipeline
from moe.runtime.cache_folder import cache_folder, can_write
from moe.tuning.candidates import Candidates, kernels_of_hopper, kernels_on, left_to_the_model
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import is_tuned
from moe.tuning.measure import measure_us
from moe.tuning.problem import sets_for
from moe.tuning.search import buckets_of, describe, tune
from moe.tuning.table import (
    SHIPPED_TABLES,
    LayerKey,
    TableEntry,
    UnusableTable,
    export_into,
    load_table,
    read_gpu,
    shipped_table_path,
    user_table_path,
)
from moe.tuning.tuned import tuned_config

STAGE_S = 0.02  # a timing of a stage
EXPERTS_STAGES = (*STAGES[1:], "experts")


def expect_cache(device: torch.device) -> None:
    """Raise UnfitMachine where what is found could not be kept."""
    folder = user_table_path(GpuModel.of(device)).parent
    if not can_write(folder):
        raise UnfitMachine(
            f"tune: expected a folder to write to, got {folder}; set MOE_CACHE_DIR to one, or nothing would be kept"
        )


def tune_layers(
    layers: Iterable[NamedLayer],
    token_counts: Sequence[int] | None,
    device: torch.device,
    *,
    max_num_tokens: int,
    seed: int,
    force: bool,
    progress: Progress,
) -> bool:
    """Tune one after another, and print a table a layer: each bucket before and after. Weights are made once a layer.

    Returns:
        Whether all buckets of all layers are in a table now.
    """
    is_complete = True
    gpu = GpuModel.of(device)
    for layer in layers:
        buckets = buckets_of(token_counts, max_num_tokens)
        entries: list[TableEntry] = []
        if force or not all(is_tuned(layer.config, bucket, gpu) for bucket in buckets):
            try:
                expect_memory(layer, device, min(buckets))  # a larger one that does not fit is left out by itself
            except UnfitMachine as error:
                progress.note(f"left out: {error}")
                is_complete = False
                continue
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
        left_out = [str(bucket) for bucket in buckets if not is_tuned(layer.config, bucket, gpu)]
        is_complete &= not left_out
        lines = [
            f"\n{layer.name}" + ("" if entries or left_out else ": nothing was left to tune; --force tunes it again")
        ]
        lines += [entries_text(entries)] if entries else []
        lines += [f"left out, see above: {', '.join(left_out)} tokens"] if left_out else []
        progress.result("\n".join(lines))
    return is_complete


def print_stages(
    layers: Iterable[NamedLayer],
    token_counts: Sequence[int] | None,
    device: torch.device,
    *,
    max_num_tokens: int,
    seed: int,
    progress: Progress,
) -> None:
    """Time each stage of the buckets for which a table names another choice, with the model's choice and with that one."""
    gpu = GpuModel.of(device)
    for named in layers:
        tuned = {bucket: tuned_config(named.config, bucket, gpu) for bucket in buckets_of(token_counts, max_num_tokens)}
        changed = {bucket: config for bucket, config in tuned.items() if config != named.config}
        if not changed:
            progress.result(f"\n{named.name}, stages: the model's choice in every bucket")
            continue
        layer = make_layer(named, device, seed=seed, progress=progress)
        rows: list[tuple[str, ...]] = []
        for bucket, config in changed.items():
            progress.step(f"{named.name}, {bucket:,} tokens: stages")
            before = _stage_us(layer, bucket, seed)
            after = _stage_us(replace(layer, config=config, pipeline=build_pipeline(config, device)), bucket, seed)
            for stage in EXPERTS_STAGES:
                model_us, tuned_us = before.get(stage), after.get(stage)
                cells = ("-" if us is None else decimal(us) for us in (model_us, tuned_us))
                gain = "-" if model_us is None or tuned_us is None else f"{100 * (model_us / tuned_us - 1):.1f}%"
                rows.append((f"{bucket:,}" if stage == EXPERTS_STAGES[0] else "", stage, *cells, gain))
        header = ("tokens", "stage", "model us", "tuned us", "gain")
        progress.result(f"\n{named.name}, stages\n{table(header, rows)}")


def _stage_us(layer: Layer, num_tokens: int, seed: int) -> dict[str, float]:
    """Microseconds of each stage but routing, and of all of them; of those alone where the few-token kernels stand for them."""
    sets = make_inputs(layer, num_tokens, sets_for(num_tokens, layer.device), routing="uniform", seed=seed)
    calls = stage_calls(layer, with_experts=True)
    fused = layer.pipeline.fused
    is_fused = fused is not None and num_tokens <= fused.max_tokens
    return {
        name: measure_us(
            [partial(calls[name], inputs) for inputs in sets], device=layer.device, budget_s=STAGE_S
        ).median_us
        for name in (EXPERTS_STAGES[-1:] if is_fused else EXPERTS_STAGES)
    }


def show_tables(layers: Sequence[NamedLayer], device: torch.device) -> None:
    """Print what the user's table holds for this GPU, a layer at a time, those of `layers` by name; and of the shipped one
    how much, and whether it is used. Without a GPU, the same of every table that is here."""
    names = {LayerKey.of(layer.config): layer.name for layer in layers}
    if device.type == "cuda":
        gpu = GpuModel.of(device)
        _show_shipped(shipped_table_path(gpu), gpu)
        _show_users(user_table_path(gpu), gpu, names)
        return
    print("no GPU here: the tables for all GPU models")
    for path in sorted(SHIPPED_TABLES.glob("*.json")):
        _show_shipped(path, read_gpu(path))
    users = [path for path in sorted(cache_folder().glob("*-kernels*.json")) if read_gpu(path)]
    for path in users:
        _show_users(path, read_gpu(path), names)
    if not users:
        print(f"user's: none in {cache_folder()}")


def _show_shipped(path: Path, gpu: GpuModel | None) -> None:
    reasons: list[str] = []
    shipped = load_table(path, gpu, report=reasons.append) if gpu else None
    if shipped is not None and gpu is not None:
        print(f"shipped, for {gpu.name}: {len(shipped.entries)} entries for what the user's table lacks\n  {path}")
    else:
        print(wrap(f"shipped: {reasons[0] if reasons else f'none for {gpu.name}' if gpu else f'no table in {path}'}"))


def _show_users(path: Path, gpu: GpuModel | None, names: dict[LayerKey, str]) -> None:
    entries = _entries_in(path, gpu) if gpu else ()
    print(f"user's: {path}: {len(entries)} entries")
    for key in dict.fromkeys(entry.key for entry in entries):
        text = ", ".join(f"{name} {value}" for name, value in key.model_dump(mode="json").items())
        print(f"\n{names.get(key) or wrap(text)}\n{entries_text([entry for entry in entries if entry.key == key])}")


def show_candidates(
    layers: Iterable[NamedLayer], token_counts: Sequence[int] | None, device: torch.device, *, max_num_tokens: int
) -> None:
    """Print what a search would time, a bucket at a time: without a GPU, what it would on a Hopper GPU."""
    kernels_of = kernels_on(device) if device.type == "cuda" else kernels_of_hopper
    for layer in layers:
        where = device if device.type == "cuda" else "a Hopper GPU"
        print(f"\n{layer.name}, on {where}; nothing is timed")
        for bucket in buckets_of(token_counts, max_num_tokens):
            candidates = Candidates(left_to_the_model(layer.config), bucket, kernels_of)
            model, *others = candidates.compositions()
            print(f"{bucket:,} tokens: {describe(model)}")
            for choice in others:
                print(wrap(f"  or {describe(choice)}", indent=" " * 7))
            for axis in candidates.variants(model):
                for choice in axis(model):
                    print(wrap(f"  then, with the best of these, {describe(choice)}", indent=" " * 7))


def export_table(file: Path, device: torch.device) -> None:
    """Add the entries of the user's table to `file`, in the format of the tables that are shipped; in a folder, to the file
    that is named as they are, by GPU and version of triton.

    Raises:
        UnfitMachine: there is nothing to export, or `file` is something else or cannot be written; it is left as it is.
    """
    gpu = GpuModel.of(device)
    path = user_table_path(gpu)
    entries = _entries_in(path, gpu)
    if not entries:
        raise UnfitMachine(f"--export: expected entries in {path}, got none; tune a layer first")
    if file.is_dir():
        file /= shipped_table_path(gpu).name
    try:
        table = export_into(file, gpu, entries)
    except (UnusableTable, OSError) as error:
        raise UnfitMachine(
            f"--export {file}: expected a new file, or a table for {gpu.name} and the versions here, got {' '.join(str(error).split())}; "
            "name another file"
        ) from error
    print(f"{file}: {len(table.entries)} entries for {gpu.name}, {len(entries)} of them from {path}")


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
    lines = table(("tokens", "model us", "tuned us", "gain", "choice"), rows).splitlines()
    return "\n".join(wrap(line, indent=" " * lines[0].index("choice")) for line in lines)


def _entries_in(path: Path, gpu: GpuModel) -> Sequence[TableEntry]:
    found = load_table(path, gpu)
    return () if found is None else found.entries
