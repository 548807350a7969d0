"""Compiled calls: one graph for any number of tokens and for layers alike, the bits of eager ones, under each backend."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import moe
from moe import TopK, trtllm_bf16_moe, trtllm_bf16_routed_moe
from moe.flow import SwigluParams
from moe.tuning.tuned import tuned_pipeline

H, I, E, K = 128, 64, 8, 2  # noqa: E741
COUNTS = range(3, 23)
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
NEEDS_COMPILER = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on a CPU")
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)]
CONFIG = moe.MoEConfig.create(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


FLAT_W1, FLAT_W2 = bf16(E, H // 64, 2 * I, 64) / 11, bf16(E, I // 64, H, 64) / 8
W1, W2 = bf16(E, 2 * I, H) / 11, bf16(E, H, I) / 8
B1, B2 = torch.randn(E, 2 * I), bf16(E, H)
LIMIT = torch.full((E,), 7.0)
NUMBERS: dict[str, Any] = {
    "num_experts": E, "top_k": K, "n_group": None, "topk_group": None, "intermediate_size": I, "local_expert_offset": 0,
    "local_num_experts": E, "routing_method_type": 1, "gemm1_clamp_limit": LIMIT,
}  # fmt: skip


@dataclasses.dataclass
class Inputs:
    """One call's, and what it may write: twice the same numbers for two calls that are compared."""

    logits: Tensor
    x: Tensor
    ids: Tensor
    weights: Tensor
    output: Tensor
    replay_out: Tensor

    @classmethod
    def of(cls, count: int) -> Inputs:
        ids = torch.stack([torch.randperm(E)[:K] for _ in range(count)]).int()
        replay_out = torch.full((count + 1, K), 7, dtype=torch.int16)
        return cls(torch.randn(count, E), bf16(count, H), ids, torch.rand(count, K), bf16(count, H), replay_out)

    @property
    def packed(self) -> Tensor:
        bits = self.weights.bfloat16().view(torch.int16).int() & 0xFFFF
        return self.ids << 16 | bits


def flat(more: dict[str, Any]) -> Callable[[Inputs], Any]:
    def call(given: Inputs) -> Any:
        tensors = (given.logits, None, given.x, FLAT_W1, FLAT_W2)
        return trtllm_bf16_moe(*tensors, **NUMBERS, output=given.output, routing_replay_out=given.replay_out, **more)

    return call


def routed(more: dict[str, Any], *, is_packed: bool) -> Callable[[Inputs], Any]:
    def call(given: Inputs) -> Any:
        ids = given.packed if is_packed else (given.ids, given.weights)
        return trtllm_bf16_routed_moe(ids, given.x, FLAT_W1, FLAT_W2, **NUMBERS, output=given.output, **more)

    return call


def entries(pipeline: Any) -> dict[str, Callable[[Inputs], Any]]:
    swiglu = SwigluParams(clamp_limit=LIMIT)

    def layer(given: Inputs) -> Tensor:
        workspace = torch.empty(1 << 20, dtype=torch.uint8)
        more = {"output": given.output, "routing_replay_out": given.replay_out, "workspace": workspace}
        result: Tensor = pipeline(given.logits, given.x, W1, W2, swiglu=swiglu, **more)
        return result

    def run_experts(given: Inputs) -> Tensor:
        result: Tensor = pipeline.run_experts(TopK(given.ids, given.weights), given.x, W1, W2, output=given.output)
        return result

    def biased(given: Inputs) -> Tensor:
        more = {
            "w1_bias": B1,
            "w2_bias": B2,
            "added": moe.Added(given.output.clone(), given.weights[:, 0].contiguous()),
        }
        result: Tensor = pipeline(given.logits, given.x, W1, W2, **more)
        return result

    def gated(given: Inputs) -> Tensor:
        topk, added = TopK(given.ids, given.weights), moe.Added(given.output.float(), 0.375)
        result: Tensor = pipeline.run_experts(topk, given.x, W1, W2, w2_bias=B2, added=added)
        return result

    def expert_outputs(given: Inputs) -> Any:
        return pipeline.expert_outputs(given.logits, given.x, W1, W2, routing_replay_out=given.replay_out)

    def run_experts_unfinalized(given: Inputs) -> Any:
        return pipeline.run_experts_unfinalized(TopK(given.ids, given.weights), given.x, W1, W2, swiglu=swiglu)

    return {
        call.__name__: call for call in (layer, run_experts, biased, gated, expert_outputs, run_experts_unfinalized)
    }


def _swapped() -> Any:
    plain = moe.build_pipeline(CONFIG, "cpu")

    def route(logits: Tensor, bias: Tensor | None = None, *, replay_out: Tensor | None = None) -> TopK:
        return plain.route(-logits, bias, replay_out=replay_out)

    return dataclasses.replace(plain, route=route)


CALLS: dict[str, Callable[[Inputs], Any]] = {
    "flat": flat({}),
    "flat, unfinalized": flat({"do_finalize": False}),
    "routed": routed({}, is_packed=False),
    "routed, packed": routed({}, is_packed=True),
    "routed, unfinalized": routed({"do_finalize": False}, is_packed=False),
}
WEIGHED = moe.build_pipeline(CONFIG.model_copy(update={"weight_on": "input"}), "cpu")
CALLS |= {f"built, {name}": call for name, call in entries(moe.build_pipeline(CONFIG, "cpu")).items()}
CALLS["weighed input, experts"] = entries(WEIGHED)["run_experts_unfinalized"]
CALLS["weighed input, logits"] = entries(WEIGHED)["expert_outputs"]
CALLS["tuned, layer"] = entries(tuned_pipeline(CONFIG, "cpu"))["layer"]
CALLS["swapped, layer"] = entries(_swapped())["layer"]


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
        return
    parts = [outputs if isinstance(outputs, list) else list(vars(outputs).values()) for outputs in (got, expected)]
    (rows, *maps), (expected_rows, *expected_maps) = parts
    assert [part.shape for part in maps] == [part.shape for part in expected_maps]
    for one, other in zip(maps, expected_maps):
        assert torch.equal(one, other)
    row_of_slot = maps[-1].flatten()
    named = row_of_slot[row_of_slot >= 0].long()
    assert rows.shape == expected_rows.shape
    assert torch.equal(rows[named], expected_rows[named])


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_graph_for_any_number_of_tokens_with_the_bits_of_an_eager_one(backend: str, name: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter, dynamic=True)
    for count in COUNTS:
        given = Inputs.of(count)
        other = copy.deepcopy(given)
        got, expected = compiled(given), CALLS[name](other)
        assert_same(got, expected)
        assert torch.equal(given.output, other.output)
        assert torch.equal(given.replay_out, other.replay_out)
        assert (got is given.output) == (expected is other.output)
    assert counter.frame_count == 1


FLAT_NUMBERS = (E, K, None, None, I, 0, E, None, 1)
DIRECT: dict[str, tuple[Any, Callable[[Any, Inputs], Any]]] = {
    "flat": (trtllm_bf16_moe, lambda f, d: f(d.logits, None, d.x, FLAT_W1, FLAT_W2, *FLAT_NUMBERS)),
    "flat, by name": (
        trtllm_bf16_moe,
        lambda f, d: f(d.logits, None, d.x, FLAT_W1, FLAT_W2, **NUMBERS, enable_pdl=False, tune_max_num_tokens=64),
    ),
    "routed": (trtllm_bf16_routed_moe, lambda f, d: f([d.ids, d.weights], d.x, FLAT_W1, FLAT_W2, *FLAT_NUMBERS)),
    "pipeline": (moe.build_pipeline(CONFIG, "cpu"), lambda f, d: f(d.logits, d.x, W1, W2)),
    "run_experts": (
        tuned_pipeline(CONFIG, "cpu").run_experts,
        lambda f, d: f(TopK(d.ids, d.weights), d.x, W1, W2),
    ),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_call_that_is_compiled_itself_takes_its_numbers_from_the_caller(name: str) -> None:
    function, call = DIRECT[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for count in COUNTS:
        given = Inputs.of(count)
        assert torch.equal(call(compiled, given), call(function, given))
    assert counter.frame_count == 1


def test_a_second_number_of_tokens_makes_the_number_dynamic(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(CALLS["flat"], fullgraph=True, backend=counter)
    for count in COUNTS:
        given = Inputs.of(count)
        assert torch.equal(compiled(given), CALLS["flat"](copy.deepcopy(given)))
    assert counter.frame_count == 2


class FlatLayer(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Buffer(bf16(E, H // 64, 2 * I, 64) / 11), nn.Buffer(bf16(E, I // 64, H, 64) / 8)
        self.router = nn.Buffer(bf16(E, H) / 11)
        self.numbers = NUMBERS | {"routing_method_type": 2, "routed_scaling_factor": scale}

    def forward(self, x: Tensor) -> Tensor:
        logits = (x @ self.router.T).float()
        result: Tensor = trtllm_bf16_moe(logits, None, x, self.w1, self.w2, **self.numbers)
        return x + result


class PipelineLayer(FlatLayer):
    def __init__(self) -> None:
        super().__init__()
        self.pipeline = tuned_pipeline(CONFIG, "cpu")
        self.w1, self.w2 = nn.Buffer(bf16(E, 2 * I, H) / 11), nn.Buffer(bf16(E, H, I) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pipeline((x @ self.router.T).float(), x, self.w1, self.w2)


@pytest.mark.parametrize("kind", [FlatLayer, PipelineLayer])
def test_twelve_layers_alike_that_are_compiled_apart_share_one_graph(kind: type[FlatLayer]) -> None:
    layers = [kind() for _ in range(12)]
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=True, backend=counter)
    layers[0](bf16(4, H))
    num_compiles = counter.frame_count  # dynamo looks twice where it finds a float
    for count in (5, 9, 17):
        x = bf16(count, H)
        for layer in layers:
            assert torch.equal(layer(x), layer.forward(x))
    assert counter.frame_count == num_compiles <= 2


def test_twelve_layers_in_one_program_are_one_graph(backend: str) -> None:
    model = nn.Sequential(*(FlatLayer(1.0 + number / 8) for number in range(12)))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(bf16(4, H))
    num_compiles = counter.frame_count  # as above
    for count in (5, 9, 17):
        x = bf16(count, H) / 8
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == num_compiles <= 2


def test_what_is_copied_between_two_calls_that_write_one_tensor_keeps_the_first_state(backend: str) -> None:
    def step(one: Inputs, other: Inputs, output: Tensor, replay_out: Tensor) -> tuple[Tensor, ...]:
        more = {"output": output, "routing_replay_out": replay_out}
        trtllm_bf16_moe(one.logits, None, one.x, FLAT_W1, FLAT_W2, **NUMBERS, **more)
        first = (output.clone(), replay_out.clone())
        trtllm_bf16_moe(other.logits, None, other.x, FLAT_W1, FLAT_W2, **NUMBERS, **more)
        return *first, output.clone(), replay_out.clone()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    given = (Inputs.of(6), Inputs.of(6))
    written = [(bf16(6, H), torch.full((9, K), 7, dtype=torch.int16)) for _ in range(2)]
    for got, expected in zip(compiled(*given, *written[0]), step(*given, *written[1])):
        assert torch.equal(got, expected)
    for got, expected in zip(*written):
        assert torch.equal(got, expected)
    assert written[0][1][6:].tolist() == [[7, 7]] * 3


def test_a_number_that_changes_compiles_anew_and_is_not_mistaken() -> None:
    def step(given: Inputs, top_k: int, scale: float, norm: bool) -> Any:
        numbers = NUMBERS | {"top_k": top_k, "routing_method_type": 2, "routed_scaling_factor": scale}
        return trtllm_bf16_moe(given.logits, None, given.x, FLAT_W1, FLAT_W2, **numbers, norm_topk_prob=norm)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for numbers in ((2, 1.0, True), (3, 1.0, True), (4, 2.5, True), (4, 1.5, True), (2, 1.0, True), (2, 1.0, False)):
        given = Inputs.of(5)
        assert torch.equal(compiled(given, *numbers), step(given, *numbers))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"top_k": 9}, ValueError, "top_k must be between 1 and num_experts"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int, got float"),
        ({"weight_layout": 0}, ValueError, "weight_layout must be BlockMajorK"),
        ({"intermediate_size": 96}, ValueError, "must be a multiple of 128"),
        ({"gemm1_clamp_limit": LIMIT[:3]}, Exception, r"gemm1_clamp_limit: expected \[8\], got \[3\]"),
    ],
)
def test_a_mistake_is_told_in_the_same_words(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = Inputs.of(4)

    def step(given: Inputs) -> Any:
        return trtllm_bf16_moe(given.logits, None, given.x, FLAT_W1, FLAT_W2, **NUMBERS | change)

    with pytest.raises(Exception, match=words):
        torch.compile(step, fullgraph=True, backend="eager")(given)
    with pytest.raises(error, match=words):
        torch.compile(step, backend="eager")(given)


@pytest.mark.parametrize("name", ["flat", "built, run_experts", "built, expert_outputs"])
def test_gradients_are_refused_when_the_program_is_traced(name: str) -> None:
    given = Inputs.of(4)
    given.x.requires_grad_()
    with torch.enable_grad(), pytest.raises(Exception, match="hidden_states: expected a tensor that needs no gradient"):
        torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(given)


def test_a_number_in_a_tensor_is_refused_as_dynamo_cannot_read_it() -> None:
    def step(given: Inputs, top_k: Tensor) -> Any:
        return trtllm_bf16_moe(given.logits, None, given.x, FLAT_W1, FLAT_W2, **NUMBERS | {"top_k": top_k})

    with pytest.raises(Exception, match=r"top_k: expected a plain number under torch\.compile, got a tensor"):
        torch.compile(step, fullgraph=True, backend="eager")(Inputs.of(4), torch.tensor(2))


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["flat", "built, layer"])
def test_reduce_overhead_gives_the_same_bits(name: str) -> None:
    compiled = torch.compile(CALLS[name], fullgraph=True, mode="reduce-overhead", dynamic=True)
    for count in (3, 17, 5):
        given = Inputs.of(count)
        other = copy.deepcopy(given)
        assert torch.equal(compiled(given), CALLS[name](other))
        assert torch.equal(given.replay_out, other.replay_out)


@NEEDS_COMPILER
def test_a_package_of_a_tiny_model_is_made_ahead_and_run_for_any_number_of_tokens(tmp_path: Path) -> None:
    model = nn.Sequential(FlatLayer(2.5), PipelineLayer())
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(model, (bf16(7, H),), dynamic_shapes={"input": {0: tokens}}, strict=True)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for count in (7, 3, 40):
        x = bf16(count, H)
        assert torch.equal(loaded(x), model(x))


def test_an_eager_call_dispatches_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an eager call went through the operator")

    for name in ("run_layer", "run_layer_unfinalized"):
        monkeypatch.setattr(torch.ops.moe, name, refuse, raising=False)
    for call in CALLS.values():
        call(Inputs.of(4))
