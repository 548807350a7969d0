"""What each command of `python -m moe` does with its arguments."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from moe.cli.bench import bench_unit, fitting_tokens, measure_all, print_bench
from moe.cli.beside import tuned_layer
from moe.cli.layer import NamedLayer, layers_of, make_layer
from moe.cli.machine import (
    UnfitMachine,
    describe_machine,
    info_json,
    info_text,
    pick_device,
)
from moe.cli.memory import expect_memory
from moe.cli.own_stage import OwnStage, measure_stage, read_stage, stage_table
from moe.cli.plot import expect_plot
from moe.cli.progress import Progress
from moe.cli.replay import INDENT, read_kept, replay
from moe.cli.result_file import ResultFile, expect_apart, today
from moe.cli.run import measure_layer, report_json, report_text
from moe.cli.text import Unit, wrap
from moe.shapes import NAMED_SHAPES
from moe.tuning.measure import Peaks, measure_peaks

DEFAULT_MODEL = "qwen3-30b-a3b"
CPU_TOKENS, CUDA_TOKENS = 64, 2048
BENCH_TOKENS = (1, 128, 2048, 8192)
TRAINING_TOKENS = {"cuda": (8192, 32768), "cpu": (64,)}  # more would take a CPU hours


def run_command(options: argparse.Namespace) -> int:
    named = _layer_of(options)
    device = pick_device(options.device)
    num_tokens = options.tokens or (CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS)
    expect_memory(named, device, num_tokens)
    with Progress() as progress:
        peaks = _measure_peaks(device, progress)
        layer = make_layer(named, device, seed=options.seed, progress=progress)
        if not options.untuned:
            layer = tuned_layer(layer, num_tokens)
        measurement = measure_layer(layer, num_tokens, routing=options.routing, seed=options.seed, progress=progress)
        progress.step("done")
    machine = describe_machine(device)
    if options.json:
        print(json.dumps(report_json(measurement, peaks) | {"machine": info_json(machine)}, indent=1))
    else:
        print(file=sys.stderr)
        print(wrap(f"{machine.device}: {machine.name}\n{machine.details}"))
        print(f"\n{report_text(measurement, peaks)}")
    return 0 if measurement.accuracy.is_good else 1


def bench_command(options: argparse.Namespace) -> int:
    if options.training:
        return _bench_training(options)
    if options.parallel:
        return _bench_parallel(options)
    layers = layers_of(options.model or [], options.config, options.format, options.layer)
    own = None if options.stage is None else read_stage(options.stage)
    if own is not None and (options.plot or options.html):
        raise UnfitMachine("--plot and --html show whole layers; with --stage, write --json instead")
    expect_apart({"--json": options.json, "--html": options.html, "--plot": options.plot})
    html_file = None if options.html is None else ResultFile("--html", options.html)
    if options.plot is not None:
        expect_plot(options.plot)
    json_file = None if options.json is None else ResultFile("--json", options.json)
    device = pick_device(options.device)
    if not (layers or own) and device.type != "cuda":
        raise UnfitMachine(
            "bench: expected --model or --config on a CPU, got none; all models would take hours, so name some"
        )
    with Progress(shows_details=False) as progress:
        peaks = _measure_peaks(device, progress)
        if own is not None:
            return _bench_stage(own, layers, device, peaks, json_file, options, progress)
        lines = measure_all(
            layers or layers_of(list(NAMED_SHAPES), None, options.format),
            options.tokens or BENCH_TOKENS,
            device,
            routing=options.routing,
            seed=options.seed,
            progress=progress,
            uses_tables=not options.untuned,
            num_turns=options.turns,
        )
        return 0 if print_bench(lines, peaks, device, progress, json_file, options.plot, html_file) else 1


def _bench_parallel(options: argparse.Namespace) -> int:
    """All ranks measure, rank 0 writes: lines as they come to stderr, in the end all values to stdout."""
    # Here and not above: the other commands need no torch.distributed.
    from moe.cli.parallel import (
        ERROR_LIMIT,
        PARALLEL_MODELS,
        PARALLEL_TOKENS,
        link_bytes_per_s,
        measure_parallel,
        start_ranks,
    )

    for name in ("stage", "plot"):
        if getattr(options, name) is not None:
            raise UnfitMachine(f"--{name}: not with --parallel; leave one of them out")
    layers = layers_of(options.model or [], options.config, options.format, options.layer)
    layers = layers or layers_of(PARALLEL_MODELS, None, options.format)
    device = start_ranks()
    is_first = torch.distributed.get_rank() == 0
    json_file = ResultFile("--json", options.json) if is_first and options.json is not None else None
    link = link_bytes_per_s(device)
    report: dict[str, object] = {"machine": info_json(describe_machine(device)), "date": today()}
    results: list[dict[str, object]] = []
    report |= {"link_bytes_per_s": link, "results": results}
    is_good = True
    progress = Progress() if is_first else None
    for line in measure_parallel(
        layers, options.tokens or PARALLEL_TOKENS, None, device, seed=options.seed, progress=progress
    ):
        results.append(line.report(link))
        is_good &= all((parts.error or 0.0) <= ERROR_LIMIT for parts in line.parts.values())
        if progress is not None:
            progress.note(line.text())
        if json_file is not None:
            json_file.write(report)
    torch.distributed.destroy_process_group()
    if progress is not None:
        print(json.dumps(report, indent=1))
        is_good &= json_file is None or json_file.is_written(progress)
    return 0 if is_good else 1


def _bench_training(options: argparse.Namespace) -> int:
    """A table a layer, forward and backward."""
    from moe.cli.training import measure_training, training_table  # the other commands need no autograd

    for name in ("stage", "plot", "html", "parallel"):
        if getattr(options, name):
            raise UnfitMachine(f"--{name}: not with --training; leave one of them out")
    layers = layers_of(options.model or [], options.config, options.format, options.layer)
    json_file = None if options.json is None else ResultFile("--json", options.json)
    device, results, is_good = pick_device(options.device), [], True
    machine = info_json(describe_machine(device))
    unit = Unit("ms", 1e3)
    with Progress(shows_details=False) as progress:
        peaks = _measure_peaks(device, progress)
        for named in layers or layers_of([DEFAULT_MODEL], None, options.format):
            token_counts = fitting_tokens(named, options.tokens or TRAINING_TOKENS[device.type], device, progress)
            chance = {"routing": options.routing, "seed": options.seed}
            lines = []
            with torch.inference_mode(False):
                for line in measure_training(
                    named, token_counts, device, **chance, num_turns=options.turns, progress=progress
                ):
                    lines.append(line)
                    is_good &= line.is_good
                    results.append(line.report(peaks))
                    if json_file is not None:
                        json_file.write({"machine": machine, "date": today(), "results": results})
            progress.result(f"\n{named.name}, forward and backward of its experts, {unit.name}")
            progress.result(training_table(lines, peaks, unit))
    is_written = json_file is None or json_file.is_written(progress)
    return 0 if is_good and is_written else 1


def _bench_stage(
    own: OwnStage,
    layers: list[NamedLayer],
    device: torch.device,
    peaks: Peaks,
    json_file: ResultFile | None,
    options: argparse.Namespace,
    progress: Progress,
) -> int:
    unit = bench_unit(device)
    results: list[dict[str, object]] = []
    machine = info_json(describe_machine(device))
    is_good = True
    for named in layers or layers_of([DEFAULT_MODEL], None, options.format):
        token_counts = fitting_tokens(named, options.tokens or BENCH_TOKENS, device, progress)
        if not token_counts:
            continue
        layer = make_layer(named, device, seed=options.seed, progress=progress)
        lines = []
        for num_tokens in token_counts:
            chosen = layer if options.untuned else tuned_layer(layer, num_tokens)
            chance = {"routing": options.routing, "seed": options.seed}
            lines.append(measure_stage(own, chosen, num_tokens, **chance, num_turns=options.turns, progress=progress))
            is_good &= lines[-1].accuracy.is_good
            results.append(lines[-1].report(peaks))
            if json_file is not None:
                json_file.write({"machine": machine, "date": today(), "results": results})
        head = f"{named.name}, {own.name} by {own.source.partition('=')[2]}, {unit.name}"
        progress.result(f"\n{head}\n{stage_table(lines, peaks, unit)}")
    is_written = json_file is None or json_file.is_written(progress)
    return 0 if is_good and is_written else 1


def launches_command(options: argparse.Namespace) -> int:
    named = _layer_of(options)
    device = pick_device(options.device)
    if device.type != "cuda":
        raise UnfitMachine("launches: expected a GPU that torch can use, got none; see `python -m moe info`")
    from moe.cli.launches import launches_text, measure_launches

    expect_memory(named, device, max(options.tokens))
    with Progress() as progress:
        layer = make_layer(named, device, seed=options.seed, progress=progress)
        for num_tokens in dict.fromkeys(options.tokens):
            chosen = layer if options.untuned else tuned_layer(layer, num_tokens)
            report = measure_launches(chosen, num_tokens, routing=options.routing, seed=options.seed)
            progress.result(f"\n{launches_text(named.name, report)}")
    return 0


def info_command(options: argparse.Namespace) -> int:
    machine = describe_machine(pick_device(options.device))
    print(json.dumps(info_json(machine), indent=1) if options.json else info_text(machine))
    return 0


def tune_command(options: argparse.Namespace) -> int:
    # Here and not above: the other commands need no tables.
    from moe.cli.tune import expect_cache, export_table, print_stages, show_candidates, show_tables, tune_layers

    layers = layers_of(options.model, options.config, options.format, options.layer)
    device = pick_device(options.device)
    if not (layers or options.show or options.export):
        raise UnfitMachine("tune: expected --model or --config, or --show or --export, got none; name a layer")
    if options.dry_run:
        show_candidates(layers, options.tokens, device, max_num_tokens=options.max_tokens)
        return 0
    if options.show:
        show_tables(layers, device)
    elif not tunes_on(device):
        raise UnfitMachine(
            "tune: expected a GPU that torch can use, got none; see `python -m moe info`, or list with --dry-run what would be timed"
        )
    elif layers:
        expect_cache(device)
    is_complete = True
    if layers and not options.show:
        bounds = {"max_num_tokens": options.max_tokens, "seed": options.seed}
        with Progress() as progress:
            is_complete = tune_layers(layers, options.tokens, device, **bounds, force=options.force, progress=progress)
            if options.stages:
                print_stages(layers, options.tokens, device, **bounds, progress=progress)
    if options.export:
        export_table(options.export, device)
    return 0 if is_complete else 1


def _layer_of(options: argparse.Namespace) -> NamedLayer:
    (layer,) = layers_of(
        [] if options.config else [options.model or DEFAULT_MODEL], options.config, options.format, options.layer
    )
    return layer


def tunes_on(device: torch.device) -> bool:
    """Whether there is anything to choose: the references of a CPU have no tiles."""
    return device.type == "cuda"


def _measure_peaks(device: torch.device, progress: Progress) -> Peaks:
    progress.step(f"measuring the peak matmul and copy rates of {device}")
    return measure_peaks(device)


def replay_command(options: argparse.Namespace) -> int:
    kept = read_kept(options.file)
    lines, is_right = replay(kept, pick_device(options.device))
    print(wrap("\n".join(lines), indent=" " * INDENT))
    return 0 if is_right else 1
