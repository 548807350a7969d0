"""A pipeline's calls as operators: fake and meta tensors, exported programs, torch's own checks of an operator."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import flat_arguments, routed_arguments
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe
from moe import trtllm_bf16_moe, trtllm_bf16_routed_moe
from moe.call import LayerCall
from moe.flow import Added, SwigluParams, TopK
from moe.traced import _arguments_of, pipeline_of
from moe.trtllm import FlatLayer, _pipeline
from moe.tuning.gpu import GpuModel
from moe.tuning.tuned import tuned_pipeline

CPU = torch.device("cpu")
CONFIG = moe.MoEConfig.create(hidden_size=64, intermediate_size=48, num_experts=6, top_k=2)
PIPELINES: dict[str, Callable[[], Any]] = {
    "built": lambda: moe.build_pipeline(CONFIG, "cpu"),
    "tuned": lambda: tuned_pipeline(CONFIG, "cpu"),
    "reference": lambda: moe.reference_pipeline(CONFIG),
}
CALLS = {"flat": (trtllm_bf16_moe, flat_arguments), "routed": (trtllm_bf16_routed_moe, routed_arguments)}


def weights() -> tuple[Tensor, Tensor]:
    return (torch.randn(6, 96, 64) / 8).bfloat16(), (torch.randn(6, 64, 48) / 7).bfloat16()


@pytest.fixture(params=CALLS)
def entry(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    call, arguments = CALLS[request.param]
    return call, arguments(CPU)


def moved(value: Any, move: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(one, move) for one in value)
    return move(value) if isinstance(value, Tensor) else value


def forms(result: Any) -> list[tuple[Any, ...]]:
    return [(tuple(one.shape), one.dtype) for one in (result if isinstance(result, list) else [result])]


@pytest.mark.parametrize("do_finalize", [True, False])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_memory_give_the_form_of_the_result(entry: Any, kind: str, do_finalize: bool) -> None:
    call, arguments = entry
    expected = call(**arguments, do_finalize=do_finalize)
    if kind == "meta":
        result = call(
            **{name: moved(value, lambda t: t.to("meta")) for name, value in arguments.items()}, do_finalize=do_finalize
        )
    else:
        with FakeTensorMode() as mode:
            fake = {name: moved(value, mode.from_tensor) for name, value in arguments.items()}
            result = call(**fake, do_finalize=do_finalize)
    assert forms(result) == forms(expected)
    first = result if do_finalize else result[0]
    assert first.device.type == ("meta" if kind == "meta" else "cpu")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gemm1_weights", lambda t: t[:4], r"gemm1_weights: expected \[8, 2, 128, 64\], got \[4, 2, 128, 64\]"),
        ("gemm2_weights", lambda t: t.float(), r"gemm2_weights: expected torch\.bfloat16 on meta, got torch\.float32"),
        (
            "gemm1_weights",
            lambda t: torch.zeros_like(t, device="cpu"),
            "gemm1_weights: expected .* on meta, got .* on cpu",
        ),
    ],
    ids=["shape", "dtype", "device"],
)
def test_tensors_without_memory_that_do_not_fit_are_refused(entry: Any, name: str, change: Any, words: str) -> None:
    call, arguments = entry
    arguments = {name: moved(value, lambda t: t.to("meta")) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=words):
        call(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Tensor.float, r"output: expected bfloat16 on meta, got torch\.float32"),
        (lambda output: output.expand(2, *output.shape), r"output: expected \[\d+, \d+\], got \[2, \d+, \d+\]"),
    ],
    ids=["dtype", "rank"],
)
def test_an_output_that_a_copy_would_fit_is_refused(entry: Any, change: Any, words: str) -> None:
    call, arguments = entry
    arguments = {name: moved(value, lambda t: t.to("meta")) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=words):
        call(**arguments | {"output": change(torch.empty_like(arguments["hidden_states"]))})


def test_a_buffer_for_rows_that_are_returned_is_refused_without_memory_too(entry: Any) -> None:
    call, arguments = entry
    arguments = {name: moved(value, lambda t: t.to("meta")) for name, value in arguments.items()}
    buffer = torch.empty(1 << 20, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="workspace_buffer: expected None with do_finalize=False"):
        call(**arguments | {"do_finalize": False, "workspace_buffer": buffer})


class Layer(nn.Module):
    def __init__(self, call: Any, arguments: dict[str, Any], do_finalize: bool) -> None:
        super().__init__()
        self.call, self.do_finalize = call, do_finalize
        self.w1, self.w2 = (nn.Buffer(arguments[name]) for name in ("gemm1_weights", "gemm2_weights"))
        names = (
            "hidden_states",
            "gemm1_weights",
            "gemm2_weights",
            "routing_logits",
            "topk_ids",
            "output",
            "routing_replay_out",
        )
        self.numbers = {name: value for name, value in arguments.items() if name not in names}

    def forward(self, hidden_states: Tensor, first: Tensor, weights: Tensor) -> Any:
        entry = {"routing_logits": first} if self.call is trtllm_bf16_moe else {"topk_ids": (first, weights)}
        tensors = {"hidden_states": hidden_states, "gemm1_weights": self.w1, "gemm2_weights": self.w2}
        return self.call(**entry, **tensors, **self.numbers, do_finalize=self.do_finalize)


@pytest.mark.parametrize("is_strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("do_finalize", [True, False])
def test_an_exported_layer_gives_the_bits_of_an_eager_one_for_any_number_of_tokens(
    entry: Any, do_finalize: bool, is_strict: bool
) -> None:
    call, arguments = entry
    layer = Layer(call, arguments, do_finalize)
    ids, weights = routed_arguments(CPU)["topk_ids"]
    first = arguments["routing_logits"] if call is trtllm_bf16_moe else ids
    inputs = (arguments["hidden_states"], first, weights)
    tokens = torch.export.Dim("tokens", min=1, max=512)
    shapes = tuple({0: tokens} for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(layer, inputs, dynamic_shapes=shapes, strict=is_strict)
        for count in (1, len(first)):
            few = tuple(tensor[:count] for tensor in inputs)
            got, expected = program.module()(*few), layer(*few)
            if do_finalize:
                assert torch.equal(got, expected)
            else:
                is_row = expected[2] >= 0
                assert torch.equal(got[2], expected[2])
                assert torch.equal(got[1], expected[1])
                assert torch.equal(got[0][got[2][is_row].long()], expected[0][expected[2][is_row].long()])


@pytest.mark.parametrize(
    ("is_chosen", "wants_chosen"), [(False, False), (False, True), (True, False)], ids=["logits", "replay", "chosen"]
)
@pytest.mark.parametrize("operator", ["run_layer", "run_layer_unfinalized"])
def test_the_operators_pass_all_of_torchs_checks(operator: str, is_chosen: bool, wants_chosen: bool) -> None:
    torch.manual_seed(0)
    arguments = flat_arguments(CPU)
    layer = FlatLayer(256, CPU, 8, 2, None, None, 64, 0, 8, None, 1, True, 2, True, True, 8192, 3, True, False)
    layer = layer._replace(hidden_size=arguments["hidden_states"].shape[1])
    entry = TopK(*routed_arguments(CPU)["topk_ids"]) if is_chosen else arguments["routing_logits"]
    tensors = (arguments["hidden_states"], arguments["gemm1_weights"], arguments["gemm2_weights"])
    swiglu = SwigluParams(clamp_limit=torch.full((8,), 7.0))
    call = LayerCall(entry, *tensors, swiglu, is_chosen=is_chosen)
    arguments = (*_arguments_of(call), _pipeline(layer).recipe, wants_chosen)
    result = torch.library.opcheck(getattr(torch.ops.moe, operator).default, arguments)
    assert set(result.values()) == {"SUCCESS"}


class OfPipeline(nn.Module):
    def __init__(self, pipeline: Any, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.pipeline, self.w1, self.w2 = pipeline, nn.Buffer(w1), nn.Buffer(w2)

    def forward(self, logits: Tensor, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.pipeline(logits, hidden_states, self.w1, self.w2)
        return result


@pytest.mark.parametrize("is_strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("name", PIPELINES)
def test_an_exported_pipeline_is_saved_and_loaded(name: str, is_strict: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = OfPipeline(PIPELINES[name](), *weights())
    inputs = (torch.randn(5, 6), torch.randn(5, 64).bfloat16())
    tokens = torch.export.Dim("tokens", min=1, max=512)
    with torch.no_grad():
        program = torch.export.export(layer, inputs, dynamic_shapes=({0: tokens}, {0: tokens}), strict=is_strict)
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        few = tuple(tensor[:3] for tensor in inputs)
        for some in (inputs, few):
            assert torch.equal(loaded(*some), layer(*some))


def test_a_pipeline_of_ones_own_stages_is_known_while_it_lives() -> None:
    pipeline = PIPELINES["built"]()
    mine = dataclasses.replace(pipeline, route=lambda *arguments, **named: pipeline.route(*arguments, **named))
    assert mine.recipe != pipeline.recipe
    assert pipeline_of(mine.recipe, CPU) is mine
    recipe = mine.recipe
    del mine
    gc.collect()
    with pytest.raises(ValueError, match=r"pipeline: expected one that lives in this process, got 'kept .*keep a pipe"):
        pipeline_of(recipe, CPU)


class Scaled:
    """A gemm2 with a number of its own."""

    def __init__(self, gemm2: Any) -> None:
        self.gemm2, self.scale = gemm2, 1.0

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        return self.gemm2(*arguments, **named) * self.scale


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))])
@pytest.mark.parametrize("name", ["built", "tuned"])
def test_a_copy_of_a_pipeline_runs_its_own_stages_in_an_operator_too(name: str, copied: Any) -> None:
    arguments = (torch.randn(3, 6), torch.randn(3, 64).bfloat16(), *weights())
    plain = PIPELINES[name]()
    wanted = plain(*arguments)
    assert copied(plain).recipe == plain.recipe
    stage = Scaled(PIPELINES["built"]().gemm2)
    mine = plain.replace(gemm2=stage) if name == "tuned" else dataclasses.replace(plain, gemm2=stage)
    assert torch.equal(mine(*arguments), wanted)
    other = copied(mine)
    (dict(other.replaced)["gemm2"] if name == "tuned" else other.gemm2).scale = 2.0
    call = LayerCall(*arguments)
    for pipeline, factor in ((mine, 1), (other, 2)):
        (traced,) = torch.ops.moe.run_layer(*_arguments_of(call), pipeline.recipe, False)
        assert torch.equal(traced, wanted * factor)
        assert torch.equal(pipeline(*arguments), wanted * factor)
    recipe = other.recipe
    del mine, pipeline
    gc.collect()
    assert pipeline_of(recipe, CPU) is other


def test_pipelines_alike_have_one_recipe_and_others_have_others() -> None:
    recipes = [make().recipe for make in PIPELINES.values()]
    assert recipes == [make().recipe for make in PIPELINES.values()]
    assert len(set(recipes)) == len(recipes)
    other = moe.MoEConfig.create(hidden_size=64, intermediate_size=48, num_experts=6, top_k=3)
    assert moe.build_pipeline(other, "cpu").recipe not in recipes


def test_a_pipeline_that_reads_another_gpus_tables_is_kept() -> None:
    assert tuned_pipeline(CONFIG, "cpu").recipe.startswith("{")
    assert tuned_pipeline(CONFIG, "cpu", gpu=GpuModel.of("cpu")).recipe.startswith("kept ")


@pytest.mark.parametrize(
    ("replay_out", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.int16), r"routing_replay_out: expected \[3 or more, 2\], got \[2, 2\]"),
        (torch.zeros(3, 4, dtype=torch.int16), r"routing_replay_out: expected \[3 or more, 2\], got \[3, 4\]"),
        (torch.zeros(3, 2, dtype=torch.int32), r"routing_replay_out: expected torch\.int16 on meta, got torch\.int32"),
    ],
    ids=["few rows", "more choices", "dtype"],
)
def test_a_replay_that_a_copy_would_fit_is_refused(replay_out: Tensor, words: str) -> None:
    w1, w2 = (tensor.to("meta") for tensor in weights())
    logits, x = torch.empty(3, 6, device="meta"), torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=words):
        PIPELINES["built"]()(logits, x, w1, w2, routing_replay_out=replay_out.to("meta"))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"swiglu": [1.702]}, "swiglu: expected a SwigluParams, got list"),
        ({"swiglu": SwigluParams(alpha=1.702)}, "gemm1_alpha: expected a torch.Tensor, got float"),  # type: ignore[arg-type]
        ({"w1_bias": [0.5]}, "gemm1_bias: expected a torch.Tensor, got list"),
        ({"added": Added("values")}, "added: expected a torch.Tensor, got str"),  # type: ignore[arg-type]
        ({"added": Added(torch.ones(3, 64), "half")}, r"added\.gate: expected a tensor \[T\] or a number, got str"),  # type: ignore[arg-type]
    ],
    ids=["swiglu", "alpha", "bias", "added", "gate"],
)
def test_what_is_no_tensor_is_refused_as_by_an_eager_call(named: dict[str, Any], words: str) -> None:
    arguments = (torch.randn(3, 6), torch.randn(3, 64).bfloat16(), *weights())
    pipeline = PIPELINES["built"]()
    for some in (arguments, moved(arguments, lambda tensor: tensor.to("meta"))):
        with pytest.raises(TypeError, match=words):
            pipeline(*some, **named)
    with pytest.raises(TypeError, match=r"hidden_states: expected a torch\.Tensor, got list"):
        pipeline(arguments[0].to("meta"), [1.0], *moved(arguments[2:], lambda tensor: tensor.to("meta")))


def test_a_pipeline_that_checks_nothing_gives_a_form_for_other_tensors() -> None:
    plain = PIPELINES["built"]()
    logits, x = torch.empty(3, 6, device="meta"), torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    others = [torch.empty(6, 5, dtype=torch.uint8, device="meta")] * 2
    with pytest.raises(ValueError, match="gemm1_weights: expected"):
        plain(logits, x, *others)
    for loose in (
        dataclasses.replace(plain, checks_inputs=False),
        tuned_pipeline(CONFIG, "cpu").replace(checks_inputs=False),
    ):
        assert loose(logits, x, *others).shape == (3, 64)


def test_a_saved_program_runs_in_a_process_that_imports_the_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, inputs = OfPipeline(PIPELINES["tuned"](), *weights()), (torch.randn(5, 6), torch.randn(5, 64).bfloat16())
    with torch.no_grad():
        torch.export.save(torch.export.export(layer, inputs), tmp_path / "layer.pt2")
        torch.save((*inputs, layer(*inputs)), tmp_path / "tensors.pt")
    code = (
        "import torch, moe.operators\n"
        "*inputs, expected = torch.load('tensors.pt')\n"
        "assert torch.equal(torch.export.load('layer.pt2').module()(*inputs), expected)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
