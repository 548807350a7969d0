"""The flat calls as operators: fake and meta tensors, exported programs, torch's own checks of an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bad_input import flat_arguments, routed_arguments
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe import trtllm_bf16_moe, trtllm_bf16_routed_moe
from moe.call import LayerCall
from moe.flow import SwigluParams, TopK
from moe.operators import _arguments
from moe.trtllm import FlatLayer, _pipeline

CPU = torch.device("cpu")
CALLS = {"flat": (trtllm_bf16_moe, flat_arguments), "routed": (trtllm_bf16_routed_moe, routed_arguments)}


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


@pytest.mark.parametrize("do_finalize", [True, False])
def test_an_exported_layer_gives_the_bits_of_an_eager_one_for_any_number_of_tokens(
    entry: Any, do_finalize: bool
) -> None:
    call, arguments = entry
    layer = Layer(call, arguments, do_finalize)
    ids, weights = routed_arguments(CPU)["topk_ids"]
    first = arguments["routing_logits"] if call is trtllm_bf16_moe else ids
    inputs = (arguments["hidden_states"], first, weights)
    tokens = torch.export.Dim("tokens", min=1, max=512)
    shapes = tuple({0: tokens} for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(layer, inputs, dynamic_shapes=shapes, strict=False)
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


@pytest.mark.parametrize("is_chosen", [False, True], ids=["logits", "chosen"])
@pytest.mark.parametrize("operator", ["run_layer", "run_layer_unfinalized"])
def test_the_operators_are_what_torch_asks_of_one(operator: str, is_chosen: bool) -> None:
    torch.manual_seed(0)
    arguments = flat_arguments(CPU)
    layer = FlatLayer(256, CPU, 8, 2, None, None, 64, 0, 8, None, 1, True, 2, True, True, 8192, 3, True, False)
    layer = layer._replace(hidden_size=arguments["hidden_states"].shape[1])
    entry = TopK(*routed_arguments(CPU)["topk_ids"]) if is_chosen else arguments["routing_logits"]
    tensors = (arguments["hidden_states"], arguments["gemm1_weights"], arguments["gemm2_weights"])
    swiglu = SwigluParams(clamp_limit=torch.full((8,), 7.0))
    replay_out = None if is_chosen else arguments["routing_replay_out"]
    call = LayerCall(entry, *tensors, swiglu, routing_replay_out=replay_out, is_chosen=is_chosen)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        getattr(torch.ops.moe, operator).default, _arguments(_pipeline(layer), call), test_utils=tests
    )


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_the_operator_of_chosen_experts_passes_all_of_torchs_checks(id_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w1, w2 = (torch.randn(6, 96, 64) / 8).bfloat16(), (torch.randn(6, 64, 48) / 7).bfloat16()
    ids = torch.tensor([[0, 5], [-1, 3], [2, 1]], dtype=id_dtype)
    arguments = (torch.randn(3, 64).bfloat16(), ids, torch.rand(3, 2), w1, w2, 3, 0, False, None, None, 7.0)
    result = torch.library.opcheck(torch.ops.moe.run_experts.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
