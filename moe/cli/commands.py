"""What each command of `python -m moe` does with its arguments."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from moe.cli.bench import measure_all, print_bench
from moe.cli.beside import tuned_layer
from moe.cli.layer import NamedLayer, layers_of, make_layer
from moe.cli.machine import (
    UnfitMachine,
    describe_machine,
    expect_writable,
    info_json,
    info_text,
)
from moe.cli.memory import expect_memory
from moe.cli.plot import expect_plot
from moe.cli.progress import Progress
from moe.cli.run import measure_layer, report_json, report_text
from moe.shapes import NAMED_SHAPES
from moe.tuning.measure import Peaks, measure_peaks

DEFAULT_MODEL = "qwen3-30b-a3b"
CPU_TOKENS, CUDA_TOKENS = 64, 2048


def run_command(options: argparse.Namespace) -> int:
    progress = Progress()
    named = _layer_of(options)
    num_tokens = options.tokens or (CUDA_TOKENS if options.device.type == "cuda" else CPU_TOKENS)
    expect_memory(named, options.device, num_tokens)
    peaks = _measure_peaks(options, progress)
    layer = make_layer(named, options.device, seed=options.seed, progress=progress)
    if not options.untuned:
        layer = tuned_layer(layer, num_tokens)
    measurement = measure_layer(layer, num_tokens, routing=options.routing, seed=options.seed, progress=progress)
    progress.step("done")
    machine = describe_machine(options.device)
    if options.json:
        print(json.dumps(report_json(measurement, peaks) | {"machine": info_json(machine)}, indent=1))
    else:
        print(file=sys.stderr)
        print(f"{machine.device}: {machine.name}, {machine.details}\n\n{report_text(measurement, peaks)}")
    return 0 if measurement.accuracy.is_good else 1


def bench_command(options: argparse.Namespace) -> int:
    if options.plot is not None:
        expect_plot(options.plot)
    if options.json is not None:
        expect_writable("--json", options.json)
    layers = layers_of(options.model or [], options.config, options.format)
    if not layers and options.device.type != "cuda":
        raise UnfitMachine(
            "bench: expected --model or --config on a CPU, got none; all models would take hours, so name some"
        )
    progress = Progress(shows_details=False)
    peaks = _measure_peaks(options, progress)
    lines = measure_all(
        layers or layers_of(list(NAMED_SHAPES), None, options.format),
        options.tokens,
        options.device,
        routing=options.routing,
        seed=options.seed,
        progress=progress,
        uses_tables=not options.untuned,
        num_turns=options.turns,
    )
    return 0 if print_bench(lines, peaks, options.device, options.json, options.plot) else 1


def launches_command(options: argparse.Namespace) -> int:
    if options.device.type != "cuda":
        raise UnfitMachine("launches: expected a GPU that torch can use, got none; see `python -m moe info`")
    from moe.cli.launches import launches_text, measure_launches

    named = _layer_of(options)
    expect_memory(named, options.device, max(options.tokens))
    layer = make_layer(named, options.device, seed=options.seed, progress=Progress())
    for num_tokens in options.tokens:
        chosen = layer if options.untuned else tuned_layer(layer, num_tokens)
        report = measure_launches(chosen, num_tokens, routing=options.routing, seed=options.seed)
        print(f"\n{launches_text(named.name, report)}", flush=True)
    return 0


def info_command(options: argparse.Namespace) -> int:
    machine = describe_machine(options.device)
    print(json.dumps(info_json(machine), indent=1) if options.json else info_text(machine))
    return 0


def tune_command(options: argparse.Namespace) -> int:
    # Here and not above: the other commands need no tables.
    from moe.cli.tune import expect_cache, export_table, print_stages, show_table, tune_layers

    layers = layers_of(options.model, options.config, options.format)
    if not tunes_on(options.device):
        raise UnfitMachine("tune: expected a GPU that torch can use, got none; see `python -m moe info`")
    if not (layers or options.show or options.export):
        raise UnfitMachine("tune: expected --model or --config, or --show or --export, got none; name a layer")
    is_complete = True
    if options.show:
        show_table(layers, options.device)
    elif layers:
        expect_cache(options.device)
        is_complete = tune_layers(
            layers,
            options.tokens,
            options.device,
            max_num_tokens=options.max_tokens,
            seed=options.seed,
            force=options.force,
            progress=Progress(),
        )
        if options.stages:
            print_stages(
                layers,
                options.tokens,
                options.device,
                max_num_tokens=options.max_tokens,
                seed=options.seed,
                progress=Progress(),
            )
    if options.export:
        export_table(options.export, options.device)
    return 0 if is_complete else 1


def _layer_of(options: argparse.Namespace) -> NamedLayer:
    (layer,) = layers_of([] if options.config else [options.model or DEFAULT_MODEL], options.config, options.format)
    return layer


def tunes_on(device: torch.device) -> bool:
    """Whether there is anything to choose: the references of a CPU have no tiles."""
    return device.type == "cuda"


def _measure_peaks(options: argparse.Namespace, progress: Progress) -> Peaks:
    progress.step(f"measuring the peak matmul and copy rates of {options.device}")
    return measure_peaks(options.device)
