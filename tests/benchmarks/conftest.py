"""Which layers the benchmarks time, made once and held against float64 before anything is timed.

pytest tests/benchmarks                                    layers with published peers, four token counts; tiny on a CPU
pytest tests/benchmarks --tokens all --routing uniform,zipf --format flashinfer
pytest tests/benchmarks --benchmark-disable                a tiny layer, each benchmark once: a smoke test
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from moe.cli.exact import check_accuracy
from moe.cli.layer import FORMATS, ROUTINGS, Inputs, Layer, layer_of_shape, make_inputs, make_layer
from moe.cli.machine import UnfitMachine, pick_device
from moe.cli.memory import expect_memory
from moe.cli.progress import Progress
from moe.cli.run import MAX_CHECKED_TOKENS
from moe.cli.text import decimal, table
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.tuning.problem import sets_for

SEED = 0
TINY = MoEShape("tiny", 64, 64, 16, 4, "Renormalize", 16)
SHAPES = {TINY.name: TINY} | NAMED_SHAPES
# The layers that docs/performance.md compares with other libraries.
PEER_SHAPES = (
    "qwen3-30b-a3b",
    "deepseek-v3-ep8",
    "mixtral-8x7b",
    "qwen3-235b-a22b",
    "olmoe-1b-7b",
    "sonic-7b",
    "llama4-scout",
)
ALL_TOKENS = tuple(1 << power for power in range(15))  # 1 to 16384
SOME_TOKENS = (1, 128, 2048, 8192)
TINY_TOKENS = (1, 40)
Record = Callable[[dict[str, object]], None]  # writes a result, and keeps it for a table at the end
NUMBERS = ("device_us", "tflops", "gb_per_s", "share_of_roof", "dense_us", "share_of_dense")
LAYER_NAMES = ("model", "num_tokens", "routing", *NUMBERS, "timed")
ROUTING_NUMBERS = ("route_us", "route_permute_us", "experts_us", "whole_us", "added_us")
ROUTING_NAMES = ("num_tokens", "num_experts", "top_k", *ROUTING_NUMBERS, "rule")
LAYER_RECORDS = pytest.StashKey[list[dict[str, object]]]()
ROUTING_RECORDS = pytest.StashKey[list[dict[str, object]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layers to time")
    group.addoption("--shapes", help=f"names with commas between, or all: {', '.join(SHAPES)}")
    group.addoption("--tokens", help="counts with commas between, or all: 1, 2, 4, .. 16384")
    group.addoption("--routing", default="uniform", help=f"names with commas between: {', '.join(ROUTINGS)}")
    group.addoption("--format", choices=FORMATS, default="hf", help="format of the weights in memory")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LAYER_RECORDS] = []
    config.stash[ROUTING_RECORDS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    is_smoke = option("--benchmark-disable") or not torch.cuda.is_available()
    shapes = _names(option("--shapes"), all_names=tuple(SHAPES), default=(TINY.name,) if is_smoke else PEER_SHAPES)
    tokens = _names(option("--tokens"), all_names=ALL_TOKENS, default=TINY_TOKENS if is_smoke else SOME_TOKENS)
    routings = _names(option("--routing"), all_names=ROUTINGS, default=ROUTINGS[:1])
    for name, known in ((shapes, SHAPES), (routings, ROUTINGS)):
        if unknown := set(name) - set(known):
            raise pytest.UsageError(f"expected some of {', '.join(known)}; got {', '.join(map(str, unknown))}")
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", shapes, indirect=True)
    if "sets" in metafunc.fixturenames:
        loads = [(int(num_tokens), routing) for routing in routings for num_tokens in tokens]
        metafunc.parametrize("sets", loads, indirect=True, ids=[f"T{count}-{routing}" for count, routing in loads])


def _names(text: str | None, *, all_names: tuple, default: tuple) -> tuple:
    if not text:
        return default
    return all_names if text == "all" else tuple(text.split(","))


@pytest.fixture(scope="module")
def layer(request: pytest.FixtureRequest) -> Iterator[Layer]:
    """A layer with random weights, for all benchmarks of its shape; freed before the next one is made."""
    device = pick_device("auto")
    named = layer_of_shape(SHAPES[request.param], FORMATS[request.config.getoption("--format")])
    try:
        expect_memory(named, device, num_tokens=1)
    except UnfitMachine as error:
        pytest.skip(str(error))
    yield make_layer(named, device, seed=SEED, progress=Progress())
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def sets(request: pytest.FixtureRequest, layer: Layer) -> Iterator[list[Inputs]]:
    """Input sets that take turns, whose stages' results end in an output within 1e-2 of float64."""
    num_tokens, routing = request.param
    sets = make_inputs(layer, num_tokens, sets_for(num_tokens, layer.device), routing=routing, seed=SEED)
    accuracy = check_accuracy(layer, sets[0], MAX_CHECKED_TOKENS, Progress())
    assert accuracy.is_good, accuracy
    yield sets
    torch.cuda.empty_cache()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    return _record_of(request.config, LAYER_RECORDS, LAYER_NAMES)


@pytest.fixture
def record_routing(request: pytest.FixtureRequest) -> Record:
    return _record_of(request.config, ROUTING_RECORDS, ROUTING_NAMES)


def _record_of(config: pytest.Config, key: pytest.StashKey[list[dict[str, object]]], names: tuple[str, ...]) -> Record:
    """At once, so that a run that is cut short has shown what it measured."""

    def record(result: dict[str, object]) -> None:
        config.stash[key].append(result)
        reporter, capture = map(config.pluginmanager.get_plugin, ("terminalreporter", "capturemanager"))
        assert reporter is not None
        assert capture is not None
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line("  ".join(f"{name} {text}" for name, text in zip(names, _texts(result, names))))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, key, names in (
        ("on the device", LAYER_RECORDS, LAYER_NAMES),
        ("routing, on the device", ROUTING_RECORDS, ROUTING_NAMES),
    ):
        if records := config.stash[key]:
            terminalreporter.section(title)
            terminalreporter.write_line(table(names, [_texts(result, names) for result in records]))


def _texts(result: dict[str, object], names: tuple[str, ...]) -> list[str]:
    return [_text(result.get(name), is_share=name.startswith("share")) for name in names]


def _text(value: object, *, is_share: bool) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.0f}%" if is_share else decimal(value)
