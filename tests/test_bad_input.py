"""Everything that the flat calls refuse, in one table: before a launch, with what was wanted, what came and the cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import checks, trtllm_bf16_moe, trtllm_bf16_routed_moe

T, H, I, E, K = 5, 128, 64, 8, 2  # noqa: E741
Arguments = dict[str, Any]
POISON = 7


def flat_arguments(device: torch.device) -> Arguments:
    """A call that is right in every argument."""

    def bf16(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    return {
        "routing_logits": torch.randn(T, E, device=device),
        "routing_bias": None,
        "hidden_states": bf16(T, H),
        "gemm1_weights": bf16(E, H // 64, 2 * I, 64),
        "gemm2_weights": bf16(E, I // 64, H, 64),
        "num_experts": E,
        "top_k": K,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": I,
        "local_expert_offset": 0,
        "local_num_experts": E,
        "routing_method_type": 1,
        "routing_replay_out": torch.full((T, K), POISON, dtype=torch.int16, device=device),
        "output": torch.full((T, H), POISON, dtype=torch.bfloat16, device=device),
    }


def routed_arguments(device: torch.device) -> Arguments:
    arguments = flat_arguments(device)
    for name in ("routing_logits", "routing_bias"):
        del arguments[name]
    ids = torch.arange(T * K, device=device, dtype=torch.int32).view(T, K) % E
    return arguments | {"topk_ids": (ids, torch.full((T, K), 0.5, device=device))}


@dataclass(frozen=True)
class Case:
    """One wrong argument: `change` returns what to replace, given the right arguments."""

    name: str
    change: Callable[[Arguments], Arguments]
    says: tuple[str, ...]
    error: type[Exception] = ValueError


def output_and_replay_in_one(arguments: dict[str, Any]) -> dict[str, Tensor]:
    memory = torch.full((T * H,), POISON, dtype=torch.int16, device=arguments["hidden_states"].device)
    return {"output": memory.view(torch.bfloat16).view(T, H), "routing_replay_out": memory[: T * K].view(T, K)}


def output_around_alpha(arguments: dict[str, Any]) -> dict[str, Tensor]:
    memory = torch.zeros(T * H, dtype=torch.bfloat16, device=arguments["hidden_states"].device)
    return {"output": memory.view(T, H), "gemm1_alpha": memory[: 2 * E].view(torch.float32)}


def replay_around_beta(arguments: dict[str, Any]) -> dict[str, Tensor]:
    memory = torch.zeros(E, device=arguments["hidden_states"].device)
    return {"gemm1_beta": memory, "routing_replay_out": memory.view(torch.int16)[: T * K].view(T, K)}


def case(name: str, change: Callable[[Arguments], Arguments] | Arguments, *says: str, error: Any = ValueError) -> Case:
    return Case(name, change if callable(change) else lambda _: change, says, error)


def tensor_case(name: str, argument: str, change: Callable[[Tensor], Any], *says: str, error: Any = ValueError) -> Case:
    return case(name, lambda a: {argument: change(a[argument])}, *says, error=error)


def gradient_case(name: str) -> Case:
    return tensor_case(f"{name}_need_gradient", name, lambda t: t.clone().requires_grad_(), f"{name}: ", "no_grad")


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, starting two bytes past an aligned address."""
    memory = torch.zeros(tensor.numel() * tensor.element_size() + 16, dtype=torch.uint8, device=tensor.device)
    memory = memory[tensor.element_size() :][: tensor.numel() * tensor.element_size()]
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def grouped(**changes: int | None) -> Arguments:
    return {"routing_method_type": 2, "n_group": 4, "topk_group": 2} | changes


SHARED_CASES = [
    # ranks, shapes, dtypes, strides, alignment
    tensor_case("hidden_states_1d", "hidden_states", lambda t: t[0].clone(), "hidden_states", "2-D", "[128]"),
    tensor_case("hidden_states_fp32", "hidden_states", Tensor.float, "BF16 MoE: hidden_states must be bfloat16.", "float32"),
    tensor_case("hidden_states_strided", "hidden_states", strided, "hidden_states", "contiguous", "strides"),
    tensor_case("hidden_states_misaligned", "hidden_states", misaligned, "hidden_states", "16 bytes", ".clone()"),
    tensor_case("hidden_states_not_a_tensor", "hidden_states", lambda t: t.tolist(), "hidden_states", "list", error=TypeError),
    *map(gradient_case, ("hidden_states", "gemm1_weights", "gemm2_weights")),
    tensor_case("gemm1_fp32", "gemm1_weights", Tensor.float, "gemm1_weights must be bfloat16.", "float32"),
    tensor_case("gemm2_fp32", "gemm2_weights", Tensor.float, "gemm2_weights must be bfloat16.", "float32"),
    tensor_case("gemm1_fp8", "gemm1_weights", lambda t: t.to(torch.float8_e4m3fn), "gemm1_weights", "dequantise it with its scales"),
    tensor_case("gemm2_packed", "gemm2_weights", lambda t: t.flatten(1).byte(), "gemm2_weights", "dequantise it with its scales"),
    tensor_case("gemm1_3d", "gemm1_weights", lambda t: t.flatten(1, 2), "gemm1_weights", "[8, 256, 64]", "2I=128", "pack_weights"),
    tensor_case("gemm1_rows", "gemm1_weights", lambda t: t[:, :, :64].clone(), "intermediate_size has incorrect shape."),
    tensor_case(
        "gemm1_contraction", "gemm1_weights", lambda t: t[:, :1].clone(), "gemm1 weights K dimension must be equal to hidden_size."
    ),
    tensor_case(
        "gemm2_contraction",
        "gemm2_weights",
        lambda t: torch.cat((t, t), 1),
        "gemm2 weights K dimension must be equal to intermediate_size.",
    ),
    tensor_case("gemm2_rows", "gemm2_weights", lambda t: t[:, :, :64].clone(), "gemm2_weights", "I/64=1, H=128, 64]"),
    tensor_case("gemm1_expert_count", "gemm1_weights", lambda t: t[:4].clone(), "gemm1_weights", "8", "4"),
    tensor_case("gemm2_expert_count", "gemm2_weights", lambda t: torch.cat((t, t)), "gemm2_weights", "8", "16"),
    tensor_case("gemm1_block_of_128", "gemm1_weights", lambda t: t.view(E, H // 128, 2 * I, 128), "H/64=2, 2I=128, 64]"),
    case("gemm1_as_the_page_states", lambda a: page_weights(a, "gemm1_weights", E, 2 * I // 128, H // 128, 128), "H/64=2, 2I=128, 64]"),
    case("gemm2_as_the_page_states", lambda a: page_weights(a, "gemm2_weights", E, H // 128, I, 128), "I/64=1, H=128, 64]"),
    tensor_case("gemm1_strided", "gemm1_weights", strided, "gemm1_weights", "contiguous"),
    tensor_case("gemm2_misaligned", "gemm2_weights", misaligned, "gemm2_weights", "16 bytes"),
    tensor_case("gemm1_none", "gemm1_weights", lambda t: None, "gemm1_weights", "NoneType", error=TypeError),
    # counts and slices
    case("more_choices_than_experts", {"top_k": 9}, "top_k must be between 1 and num_experts", "9", "8"),
    case("no_choices", {"top_k": 0}, "top_k must be between 1 and num_experts", "0"),
    case("choices_as_float", {"top_k": 2.0}, "top_k", "float", error=TypeError),
    case("choices_as_bool", {"top_k": True}, "top_k", "bool", error=TypeError),
    case("slice_past_the_end", {"local_expert_offset": 1}, "expert offset and count must be within valid range", "1"),
    case("slice_before_the_start", {"local_expert_offset": -1}, "expert offset and count must be within valid range", "-1"),
    case("no_local_experts", {"local_num_experts": 0}, "local_num_experts must be between 1 and num_experts", "0"),
    case("more_local_than_all", {"local_num_experts": 9}, "local_num_experts must be between 1 and num_experts", "9", "8"),
    case("intermediate_not_of_64", {"intermediate_size": 72}, "the second dimension of weights must be a multiple of 128.", "72"),
    case("intermediate_not_of_a_block", {"intermediate_size": 96}, "the second dimension of weights must be a multiple of 128.", "96"),
    case("intermediate_zero", {"intermediate_size": 0}, "intermediate_size", "0"),
    case("tune_max_zero", {"tune_max_num_tokens": 0}, "tune_max_num_tokens", "0"),
    # enums
    case("method_unspecified", {"routing_method_type": 9}, "Unspecified", "TopKSigmoid", "9"),
    case("method_unknown", {"routing_method_type": 42}, "Unimplemented routing method", "of enum 42"),
    case("method_as_string", {"routing_method_type": "TopK"}, "routing_method_type", "str", error=TypeError),
    case("layout_major_k", {"weight_layout": 0}, "BF16 Moe: weight_layout must be BlockMajorK", "0"),
    case("layout_unknown", {"weight_layout": 5}, "BF16 Moe: weight_layout must be BlockMajorK", "5"),
    case("activation_invalid", {"activation_type": 11}, "Invalid activation type: 11", "4 (Geglu)"),
    case("activation_negative", {"activation_type": -1}, "Invalid activation type: -1", "0 (Gelu)"),
    case("activation_unknown", {"activation_type": 12}, "Invalid activation type: 12"),
    case("invariance_as_int", {"is_batch_invariant": 1}, "is_batch_invariant", "int", error=TypeError),
    case("flag_as_int", {"do_finalize": 1}, "do_finalize", "int", error=TypeError),
    case("scale_nan", {"routed_scaling_factor": float("nan")}, "routed_scaling_factor", "finite", "nan"),
    case("scale_infinite", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor", "finite", "inf"),
    case("scale_as_string", {"routed_scaling_factor": "2.5"}, "routed_scaling_factor", "str", error=TypeError),
    # groups
    case("groups_that_do_not_divide", grouped(n_group=3), "num_experts must be divisible by n_group", "8", "3"),
    case("more_chosen_groups_than_groups", grouped(topk_group=5), "n_group must not be smaller than topk_group.", "5", "4"),
    case("groups_without_choice", grouped(topk_group=None), "if n_group is given, topk_group must be given"),
    case("groups_as_bool", grouped(n_group=False), "n_group", "bool", error=TypeError),
    case("chosen_groups_as_float", grouped(topk_group=0.0), "topk_group", "float", error=TypeError),
    case("groups_negative", grouped(n_group=-2), "n_group", "-2"),
    case("groups_of_one", grouped(n_group=8), "two experts", "8"),
    case(
        "too_few_experts_in_groups",
        grouped(topk_group=1) | {"top_k": 3},
        "top_k must be less than total number of experts in selected groups",
        "3",
    ),
    case("groups_for_another_method", {"n_group": 4, "topk_group": 2}, "only supports n_group <= 1", "4"),
    case("chosen_groups_for_another_method", {"topk_group": 2}, "only supports topk_group <= 1", "2"),
    case("llama4_with_two", {"routing_method_type": 3}, "For Llama routing method, must have topK == 1", "2"),
    # what is written
    tensor_case("output_shape", "output", lambda t: t[:4].clone(), "output", "[T=5, H=128]", "[4, 128]"),
    tensor_case("output_fp32", "output", Tensor.float, "output", "bfloat16", "float32"),
    gradient_case("output"),
    tensor_case("output_not_a_tensor", "output", lambda t: t.tolist(), "output", "list", error=TypeError),
    tensor_case("output_strided", "output", strided, "output", "contiguous"),
    case("output_is_the_input", lambda a: {"output": a["hidden_states"]}, "output", "shares memory with hidden_states"),
    case(
        "output_inside_the_weights",
        lambda a: {"output": a["gemm1_weights"].view(-1)[64 : 64 + T * H].view(T, H)},
        "output",
        "shares memory with gemm1_weights",
    ),
    tensor_case("replay_too_short", "routing_replay_out", lambda t: t[:3].clone(), "routing_replay_out", "5", "3"),
    tensor_case("replay_int32", "routing_replay_out", Tensor.int, "routing_replay_out must be int16", "int32"),
    tensor_case("replay_1d", "routing_replay_out", lambda t: t.view(-1), "must be 2D [num_tokens, top_k]"),
    tensor_case("replay_columns", "routing_replay_out", lambda t: torch.cat((t, t), 1), "dim1 must equal top_k=2", "4"),
    tensor_case("replay_strided", "routing_replay_out", strided, "must be contiguous (packed row-major)"),
    # parameters of the activation
    case("alpha_for_relu2", lambda a: relu2(a) | {"gemm1_alpha": experts_of(a)}, "only supported for ActivationType.Swiglu."),
    case("alpha_bf16", lambda a: {"gemm1_alpha": experts_of(a).bfloat16()}, "gemm1_alpha", "float32", "bfloat16"),
    *(
        case(f"{name}_needs_gradient", lambda a, name=name: {name: experts_of(a).requires_grad_()}, name, "no_grad")
        for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    ),
    case("output_around_alpha", output_around_alpha, "output", "shares memory with gemm1_alpha"),
    case("beta_of_another_count", lambda a: {"gemm1_beta": experts_of(a)[:3].clone()}, "gemm1_beta", "8", "3"),
    case("clamp_2d", lambda a: {"gemm1_clamp_limit": experts_of(a)[None].clone()}, "gemm1_clamp_limit", "1-D", "2-D"),
]  # fmt: skip


def experts_of(arguments: Arguments) -> Tensor:
    return torch.ones(E, device=arguments["hidden_states"].device)


def page_weights(arguments: Arguments, name: str, *shape: int) -> Arguments:
    """Weights in the shape that the documentation page of the original states."""
    return {name: torch.zeros(shape, dtype=torch.bfloat16, device=arguments["hidden_states"].device)}


def relu2(arguments: Arguments) -> Arguments:
    return {"activation_type": 6, "gemm1_weights": arguments["gemm1_weights"][:, :, :I].clone()}


FLAT_CASES = [
    tensor_case("logits_1d", "routing_logits", lambda t: t[0].clone(), "routing_logits must be 2D."),
    tensor_case("logits_fp16", "routing_logits", Tensor.half, "routing_logits must be float or bfloat16.", "float16"),
    tensor_case(
        "logits_columns", "routing_logits", lambda t: t[:, :7].clone(), "routing_logits dim1 must match num_experts."
    ),
    tensor_case(
        "logits_rows",
        "routing_logits",
        lambda t: t[:4].clone(),
        "routing_logits and hidden_states must have the same number of tokens.",
    ),
    tensor_case("logits_strided", "routing_logits", strided, "routing_logits", "contiguous"),
    gradient_case("routing_logits"),
    case(
        "bias_needs_gradient", lambda a: {"routing_bias": experts_of(a).requires_grad_()}, "routing_bias: ", "no_grad"
    ),
    tensor_case("logits_none", "routing_logits", lambda t: None, "routing_logits", "NoneType", error=TypeError),
    case(
        "bias_fp16",
        lambda a: {"routing_bias": experts_of(a).half()},
        "routing_bias must be bfloat16 or float.",
        "float16",
    ),
    case("bias_2d", lambda a: {"routing_bias": experts_of(a)[None].clone()}, "routing_bias must be 1D."),
    case(
        "bias_length",
        lambda a: {"routing_bias": experts_of(a)[:7].clone()},
        "routing_bias has incorrect shape.",
        "7",
        "8",
    ),
    case(
        "replay_is_the_logits",
        lambda a: {"routing_replay_out": a["routing_logits"].view(torch.int16).view(-1, K)},
        "routing_replay_out",
        "shares memory with routing_logits",
    ),
    case("replay_around_beta", replay_around_beta, "routing_replay_out", "shares memory with gemm1_beta"),
    case("output_and_replay_are_one", output_and_replay_in_one, "output", "shares memory with routing_replay_out"),
    case(
        "replay_inside_the_input",
        lambda a: {"routing_replay_out": a["hidden_states"].view(torch.int16).view(-1)[: T * K].view(T, K)},
        "routing_replay_out",
        "shares memory with hidden_states",
    ),
]
ROUTED_CASES = [
    case("ids_1d", lambda a: {"topk_ids": ids_of(a).view(-1)}, "expert_indices must be 2D."),
    case("ids_int64", lambda a: {"topk_ids": ids_of(a).long()}, "expert_indices must be int32.", "int64"),
    case("ids_columns", lambda a: {"topk_ids": ids_of(a)[:, :1].clone()}, "expert_indices dim1 must match top_k."),
    case(
        "ids_rows",
        lambda a: {"topk_ids": ids_of(a)[:4].clone()},
        "expert_indices and hidden_states must have the same number of tokens.",
    ),
    case(
        "weights_fp16",
        lambda a: {"topk_ids": (ids_of(a), ids_of(a).half())},
        "expert_weights must be bfloat16 or float32",
    ),
    case(
        "weights_need_gradient",
        lambda a: {"topk_ids": (ids_of(a), torch.ones(T, K, device=ids_of(a).device).requires_grad_())},
        "expert_weights: ",
        "no_grad",
    ),
    case("weights_shape", lambda a: {"topk_ids": (ids_of(a), ids_of(a)[:4].float())}, "expert_weights", "[4, 2]"),
    case(
        "ids_as_list",
        lambda a: {"topk_ids": (ids_of(a).tolist(), ids_of(a).float())},
        "expert_ids",
        "list",
        error=TypeError,
    ),
    case("ids_0d", lambda a: {"topk_ids": (ids_of(a)[0, 0].clone(), ids_of(a).float())}, "expert_indices must be 2D."),
    case("three_tensors", lambda a: {"topk_ids": (ids_of(a),) * 3}, "topk_ids", "3"),
    case("lora", lambda a: {"gemm1_lora_delta": a["hidden_states"]}, "gemm1_lora_delta", "not supported"),
]


def ids_of(arguments: Arguments) -> Tensor:
    return arguments["topk_ids"][0]


def assert_refused(call: Callable[..., Any], arguments: Arguments, wrong: Case) -> None:
    changed = arguments | wrong.change(arguments)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises((ValueError, TypeError)) as caught:
        call(**changed)
    message = str(caught.value)
    assert type(caught.value) is wrong.error, message
    for words in wrong.says:
        assert words in message, f"{words!r} is missing in: {message}"
    for name, value in before.items():
        assert torch.equal(value, arguments[name]), f"the refused call wrote to {name}"


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose memory must be aligned, as a GPU's: references read it wherever it begins."""
    monkeypatch.setattr(checks, "DEVICES_OF_KERNELS", ("cpu", "cuda"))


def by_name(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("wrong", cases, ids=[c.name for c in cases])


@by_name(SHARED_CASES + FLAT_CASES)
def test_flat_call_refuses(wrong: Case) -> None:
    assert_refused(trtllm_bf16_moe, flat_arguments(torch.device("cpu")), wrong)


@by_name(SHARED_CASES + FLAT_CASES)
def test_flat_call_refuses_on_a_gpu(wrong: Case, cuda: torch.device) -> None:
    assert_refused(trtllm_bf16_moe, flat_arguments(cuda), wrong)


@by_name(SHARED_CASES + ROUTED_CASES)
def test_routed_call_refuses(wrong: Case) -> None:
    assert_refused(trtllm_bf16_routed_moe, routed_arguments(torch.device("cpu")), wrong)


@by_name(SHARED_CASES + ROUTED_CASES)
def test_routed_call_refuses_on_a_gpu(wrong: Case, cuda: torch.device) -> None:
    assert_refused(trtllm_bf16_routed_moe, routed_arguments(cuda), wrong)


@by_name([c for c in SHARED_CASES + FLAT_CASES if not c.name.startswith("output")])
def test_flat_call_that_stops_before_finalize_refuses(wrong: Case) -> None:
    assert_refused(partial(trtllm_bf16_moe, do_finalize=False), flat_arguments(torch.device("cpu")), wrong)


@by_name([c for c in SHARED_CASES + ROUTED_CASES if not c.name.startswith("output")])
def test_routed_call_that_stops_before_finalize_refuses(wrong: Case) -> None:
    assert_refused(partial(trtllm_bf16_routed_moe, do_finalize=False), routed_arguments(torch.device("cpu")), wrong)


PLACED = ["routing_logits", "gemm1_weights", "gemm2_weights", "output", "routing_replay_out"]


@pytest.mark.parametrize("argument", PLACED)
def test_tensors_on_two_devices_are_refused(argument: str, cuda: torch.device) -> None:
    wrong = tensor_case(argument, argument, Tensor.cpu, "cpu", "cuda")
    assert_refused(trtllm_bf16_moe, flat_arguments(cuda), wrong)


@pytest.mark.parametrize("argument", [*PLACED, "hidden_states"])
def test_a_tensor_that_lies_nowhere_is_refused(argument: str) -> None:
    wrong = tensor_case(argument, argument, lambda t: t.to("meta"), "meta", "cpu")
    assert_refused(trtllm_bf16_moe, flat_arguments(torch.device("cpu")), wrong)


def test_a_width_that_no_kernel_takes_goes_by_the_callers_name_for_it() -> None:
    arguments = flat_arguments(torch.device("cpu")) | {"hidden_states": torch.zeros(T, 68, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"^hidden_size: input should be a multiple of 8, got 68$"):
        trtllm_bf16_moe(**arguments)


@pytest.mark.parametrize("arguments", [flat_arguments, routed_arguments])
def test_the_right_arguments_are_accepted(arguments: Callable[[torch.device], Arguments]) -> None:
    right = arguments(torch.device("cpu"))
    call = trtllm_bf16_moe if arguments is flat_arguments else trtllm_bf16_routed_moe
    assert call(**right) is right["output"]
    assert torch.isfinite(right["output"]).all()
