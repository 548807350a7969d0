"""python -m moe: run a layer of a real model, time many, tune them, or say what is here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from moe.cli.bench import measure_all, print_bench
from moe.cli.beside import TURNS, tuned_layer
from moe.cli.layer import FORMATS, ROUTINGS, NamedLayer, layers_of, make_layer
from moe.cli.machine import (
    UnfitMachine,
    describe_machine,
    expect_memory,
    expect_writable,
    info_json,
    info_text,
    installed_version,
    pick_device,
)
from moe.cli.plot import expect_plot
from moe.cli.progress import Progress
from moe.cli.run import measure_layer, report_json, report_text
from moe.shapes import NAMED_SHAPES
from moe.tuning.buckets import BUCKETS
from moe.tuning.measure import Peaks, measure_peaks

DEFAULT_MODEL = "qwen3-30b-a3b"
CPU_TOKENS, CUDA_TOKENS = 64, 2048
BENCH_TOKENS = (1, 128, 2048, 8192)
LAUNCH_TOKENS = (1, 64)
MAX_TUNED_TOKENS = 8192


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a result is wrong, or a bucket could not be tuned; 2 for arguments that make no sense; 130 where
    the user stopped it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    with torch.inference_mode():
        try:
            options.device = pick_device(options.device)
            return options.command(options)
        except UnfitMachine as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130


def run_command(options: argparse.Namespace) -> int:
    progress = Progress()
    named = _layer_of(options)
    expect_memory(named.shape, options.device)
    num_tokens = options.tokens or (CUDA_TOKENS if options.device.type == "cuda" else CPU_TOKENS)
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
    expect_memory(named.shape, options.device)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe", description=__doc__)
    parser.add_argument("--version", action="version", version=f"moe-stages {installed_version('moe-stages')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    run = commands.add_parser("run", help="one layer of a model: time of each stage, load, error")
    run.set_defaults(command=run_command)
    _add_one_layer(run)
    run.add_argument(
        "--tokens", type=_count, metavar="N", help=f"default: {CPU_TOKENS} on a CPU, {CUDA_TOKENS} on a GPU"
    )
    run.add_argument("--json", action="store_true", help="print values instead of text")
    _add_inputs(run)

    bench = commands.add_parser("bench", help="many models and token counts, a line each, microseconds")
    bench.set_defaults(command=bench_command)
    bench.add_argument(
        "--model", choices=NAMED_SHAPES, nargs="+", metavar="NAME", help="default: all; to be named on a CPU"
    )
    _add_config(bench)
    bench.add_argument(
        "--tokens", type=_count, nargs="+", default=BENCH_TOKENS, metavar="N", help=f"default: {BENCH_TOKENS}"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all values to this file as well")
    bench.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the roofline and time by tokens (needs matplotlib)"
    )
    bench.add_argument(
        "--turns",
        type=int,
        choices=range(9),
        default=TURNS,
        help=f"rounds in which dense, grouped_mm and eager are timed by turns; 0 leaves them out; default: {TURNS}",
    )
    _add_inputs(bench)

    launches = commands.add_parser("launches", help="every kernel launch of a call, and its time")
    launches.set_defaults(command=launches_command)
    _add_one_layer(launches)
    launches.add_argument("--tokens", type=_count, nargs="+", default=LAUNCH_TOKENS, metavar="N", help="default: 1 64")
    _add_inputs(launches)

    _add_tune(commands.add_parser("tune", help="find what is fastest for a layer on this GPU, and keep it"))

    info = commands.add_parser("info", help="device, versions, which stages run kernels here")
    info.set_defaults(command=info_command)
    info.add_argument("--json", action="store_true", help="print values instead of text")
    _add_device(info)
    return parser


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=tune_command)
    parser.add_argument(
        "--model", choices=NAMED_SHAPES, nargs="+", default=[], metavar="NAME", help=", ".join(NAMED_SHAPES)
    )
    _add_config(parser)
    parser.add_argument(
        "--tokens", type=_tunable_count, nargs="+", metavar="N", help="default: all buckets up to --max-tokens"
    )
    parser.add_argument(
        "--max-tokens", type=_count, default=MAX_TUNED_TOKENS, metavar="N", help=f"default: {MAX_TUNED_TOKENS}"
    )
    parser.add_argument("--force", action="store_true", help="tune also what the tables hold")
    parser.add_argument(
        "--stages", action="store_true", help="then time each stage before and after, where a table changes something"
    )
    parser.add_argument("--show", action="store_true", help="tune nothing: print what the user's table holds")
    parser.add_argument("--export", type=Path, metavar="FILE", help="add the entries of the user's table to this one")
    parser.add_argument("--seed", type=_seed, default=0)
    _add_device(parser)


def _add_one_layer(parser: argparse.ArgumentParser) -> None:
    layer = parser.add_mutually_exclusive_group()
    models = ", ".join(NAMED_SHAPES)
    layer.add_argument("--model", choices=NAMED_SHAPES, metavar="NAME", help=f"{models}; default: {DEFAULT_MODEL}")
    _add_config(layer, to_format=parser)


def _add_config(parser: argparse._ActionsContainer, to_format: argparse.ArgumentParser | None = None) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON of a MoEConfig, or a Hugging Face config.json"
    )
    (to_format or parser).add_argument(
        "--format", choices=FORMATS, help="format of the weights in memory; default: hf (MajorK), or what --config says"
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument("--untuned", action="store_true", help="use no tuning table")
    parser.add_argument(
        "--routing", choices=ROUTINGS, default="uniform", help="how the load spreads over experts; default: uniform"
    )
    parser.add_argument("--seed", type=_seed, default=0)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where one is")


def _count(text: str) -> int:
    value = _int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _tunable_count(text: str) -> int:
    value = _count(text)
    if value > BUCKETS[-1]:
        raise argparse.ArgumentTypeError(f"expected {BUCKETS[-1]} or fewer, the last bucket, got {value}")
    return value


def _seed(text: str) -> int:
    value = _int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected 0 to 2^63 - 1, got {value}")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
