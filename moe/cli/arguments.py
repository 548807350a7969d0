"""The arguments of `python -m moe`, and which command each subcommand runs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from moe.cli.beside import TURNS
from moe.cli.commands import (
    BENCH_TOKENS,
    CPU_TOKENS,
    CUDA_TOKENS,
    DEFAULT_MODEL,
    TRAINING_TOKENS,
    bench_command,
    info_command,
    launches_command,
    replay_command,
    run_command,
    tune_command,
)
from moe.cli.layer import FORMATS, ROUTINGS
from moe.cli.machine import installed_version
from moe.cli.text import wrap
from moe.shapes import NAMED_SHAPES
from moe.tuning.buckets import BUCKETS

LAUNCH_TOKENS = (1, 64)
MAX_TUNED_TOKENS = 8192
DESCRIPTION = "Run a layer of a real model, time many, tune them, or say what is here."
EXAMPLES = """\
examples:
  python -m moe run                                        one layer, explained
  python -m moe run --model deepseek-v3-ep8 --tokens 512 --routing zipf
  python -m moe run --config config.json                   a model's own layer
  python -m moe bench --model olmoe-1b-7b --tokens 1 128 --json bench.json
  python -m moe tune --model qwen3-30b-a3b                 needs a GPU
  python -m moe tune --model qwen3-30b-a3b --dry-run       what it would time
  python -m moe info                                       device and versions
  python -m moe replay FILE                                a failing call again

`python -m moe COMMAND --help` lists what a command takes."""
RUN_EXAMPLES = """\
examples:
  python -m moe run --model olmoe-1b-7b --tokens 256
  python -m moe run --config config.json --routing zipf --seed 1
  python -m moe run --json > run.json"""
BENCH_EXAMPLES = """\
examples:
  python -m moe bench --model sonic-7b olmoe-1b-7b --tokens 1 128 2048
  python -m moe bench --model olmoe-1b-7b --json bench.json --plot bench.svg
  python -m moe bench --stage gemm2=mine.py:my_gemm2 --model sonic-7b
  python -m moe bench --training --model sonic-7b --tokens 8192 32768
  torchrun --nproc-per-node=2 -m moe bench --parallel --json two.json"""
LAUNCHES_EXAMPLES = """\
example:
  python -m moe launches --model qwen3-30b-a3b --tokens 1 64"""
TUNE_EXAMPLES = """\
examples:
  python -m moe tune --model qwen3-30b-a3b --max-tokens 2048
  python -m moe tune --model qwen3-30b-a3b --tokens 1 64 --dry-run
  python -m moe tune --show"""
REPLAY_EXAMPLES = """\
example:
  MOE_KEEP_FAILING_CALLS=failing python serve.py
  python -m moe replay failing/moe-call-20261130-120000-4711-1.safetensors"""
INFO_EXAMPLES = """\
example:
  python -m moe info --json"""
MODELS = "models: " + ", ".join(NAMED_SHAPES)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moe-stages {installed_version('moe-stages')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    run = _add_command(commands, "run", "one layer of a model: time of each stage, load, error", RUN_EXAMPLES)
    run.set_defaults(command=run_command)
    _add_one_layer(run)
    run.add_argument(
        "--tokens", type=_count, metavar="N", help=f"default: {CPU_TOKENS} on a CPU, {CUDA_TOKENS} on a GPU"
    )
    run.add_argument("--json", action="store_true", help="print values instead of text")
    _add_inputs(run)

    bench = _add_command(commands, "bench", "many models and token counts, a line each", BENCH_EXAMPLES)
    bench.set_defaults(command=bench_command)
    bench.add_argument(
        "--model", type=_model, nargs="+", metavar="NAME", help="default: all; to be named on a CPU; see below"
    )
    _add_config(bench)
    bench.add_argument(
        "--tokens",
        type=_count,
        nargs="+",
        metavar="N",
        help=f"default: {_words(BENCH_TOKENS)}; with --training {_words(TRAINING_TOKENS['cuda'])}, on a CPU "
        f"{_words(TRAINING_TOKENS['cpu'])}; with --parallel a rank",
    )
    bench.add_argument(
        "--parallel",
        action="store_true",
        help="under torchrun: the layer over all ranks, exchange and experts apart, as JSON",
    )
    bench.add_argument(
        "--training",
        action="store_true",
        help="forward and backward under autograd, beside torch's grouped_mm, eager and compiled",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all values to this file as well")
    bench.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the roofline and time by tokens (needs matplotlib)"
    )
    bench.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with pictures and all values, which needs only a browser",
    )
    bench.add_argument(
        "--stage",
        metavar="STAGE=MODULE:FUNCTION",
        help="check and time a stage of your own, as gemm2=my.module:my_gemm2, beside ours; MODULE may be a file.py",
    )
    bench.add_argument(
        "--turns",
        type=int,
        choices=range(9),
        default=TURNS,
        help=f"rounds in which dense, grouped_mm and eager are timed by turns; 0 leaves them out; default: {TURNS}",
    )
    _add_inputs(bench)

    launches = _add_command(commands, "launches", "every kernel launch of a call, and its time", LAUNCHES_EXAMPLES)
    launches.set_defaults(command=launches_command)
    _add_one_layer(launches)
    launches.add_argument("--tokens", type=_count, nargs="+", default=LAUNCH_TOKENS, metavar="N", help="default: 1 64")
    _add_inputs(launches)

    _add_tune(
        _add_command(commands, "tune", "find what is fastest for a layer on this GPU, and keep it", TUNE_EXAMPLES)
    )

    replay = _add_command(
        commands, "replay", "a failing call that was kept, again: here, and by the references", REPLAY_EXAMPLES
    )
    replay.set_defaults(command=replay_command)
    replay.add_argument("file", metavar="FILE", help="what a process with $MOE_KEEP_FAILING_CALLS wrote")
    _add_device(replay)

    info = _add_command(commands, "info", "device, versions, which stages run kernels here", INFO_EXAMPLES)
    info.set_defaults(command=info_command)
    info.add_argument("--json", action="store_true", help="print values instead of text")
    _add_device(info)
    return parser


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=tune_command)
    parser.add_argument("--model", type=_model, nargs="+", default=[], metavar="NAME", help="one or more; see below")
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
    parser.add_argument(
        "--show", action="store_true", help="tune nothing: print what the tables hold, also without a GPU"
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="add the entries of the user's table to this one; in a folder, to the file of this GPU and triton",
    )
    parser.add_argument("--dry-run", action="store_true", help="time nothing: list the candidates, also without a GPU")
    _add_seed(parser)
    _add_device(parser)


def _add_one_layer(parser: argparse.ArgumentParser) -> None:
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--model", type=_model, metavar="NAME", help=f"default: {DEFAULT_MODEL}; see below")
    _add_config(layer, to_format=parser)


def _add_config(parser: argparse._ActionsContainer, to_format: argparse.ArgumentParser | None = None) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON of a MoEConfig, or a model's config.json")
    (to_format or parser).add_argument(
        "--layer", type=_layer_number, metavar="N", help="which layer of --config, where its layers differ; from 0"
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
    _add_seed(parser)


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, examples: str
) -> argparse.ArgumentParser:
    """A command whose help ends with examples, and the models' names where it takes one."""
    epilog = examples if name in ("info", "replay") else f"{wrap(MODELS, indent='  ')}\n\n{examples}"
    return commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of random weights, inputs and load; default: 0"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where one is")


def _model(text: str) -> str:
    """A known name, in any case and with or without an organisation before it."""
    name = text.rpartition("/")[2].lower()
    if name in NAMED_SHAPES:
        return name
    close = difflib.get_close_matches(name, NAMED_SHAPES, n=3) or [
        known for known in NAMED_SHAPES if name and name in known
    ]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise argparse.ArgumentTypeError(f"no model is called {text!r}{hint} Known: {', '.join(NAMED_SHAPES)}")


def _words(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts))


def _layer_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return int(text)


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
