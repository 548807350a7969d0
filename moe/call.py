"""LayerCall: the tensors of one call of a layer in one value; what they, and results of swapped stages, must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.checks import WIDEST_LOAD_BYTES, expect, expect_separate, is_as_expected
from moe.config import MoEConfig
from moe.flow import Added, SwigluParams
from moe.gemm.checks import check_bias, check_swiglu, check_weights
from moe.permute.added import check_added, tensors_of
from moe.workspace import workspace_of


class LayerCall(NamedTuple):
    """What one call of a layer was given. Shapes and dtypes as `MoEPipeline` says."""

    entry: Any  # logits [T, E], or where `is_chosen` the TopK that the caller chose
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    swiglu: SwigluParams | None = None
    bias: Tensor | None = None
    output: Tensor | None = None
    routing_replay_out: Tensor | None = None
    is_chosen: bool = False
    workspace: Tensor | None = None  # [bytes] uint8 to take scratch from
    added: Added | None = None  # to each token's weighted rows
    w1_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """0 for what has no tokens to count: `check_call` says what is wrong with it."""
        try:
            return (self.entry.expert_ids if self.is_chosen else self.entry).shape[0]
        except (AttributeError, IndexError, TypeError):
            return 0


def check_call(config: MoEConfig, call: LayerCall, *, has_experts: bool = True) -> None:
    """Raise unless all tensors of the call fit the config, and it may be run forward only.

    Args:
        has_experts: False where no expert lies here: the call has neither weights nor biases nor swiglu.
    """
    first_name = "routing_logits"
    first: Tensor
    if call.is_chosen:
        config.permute.check(call.entry)
        first, first_name = call.entry.expert_ids, "expert_indices"
    else:
        config.routing.check(call.entry, call.bias, call.routing_replay_out)
        first = call.entry
    device, num_tokens = first.device, first.shape[0]
    if not is_as_expected(call.hidden_states, (num_tokens, config.hidden_size), torch.bfloat16, device):
        _refuse_hidden_states(config, call, first, first_name)
    config.permute.check_num_tokens(num_tokens)
    matrices = (("gemm1_weights", config.gemm1, call.w1), ("gemm2_weights", config.gemm2, call.w2))
    for name, gemm, weights in matrices if has_experts else ():
        if not is_as_expected(weights, gemm.weight_shape, torch.bfloat16, device):
            check_weights(gemm, name, weights, device)
    if call.swiglu is not None:
        check_swiglu(config.gemm1, call.swiglu, device)
    if call.added is not None:
        check_added(call.added, num_tokens, config.hidden_size, device)
    if config.has_biases and has_experts:
        _expect_biases(call)
    if call.w1_bias is not None:
        check_bias(config.gemm1, "gemm1_bias", call.w1_bias, device)
    if call.w2_bias is not None:
        check_bias(config.gemm2, "gemm2_bias", call.w2_bias, device)
    if call.output is not None or call.routing_replay_out is not None:
        _check_written(config, call, first_name, device)
    if call.workspace is not None:
        _check_workspace(config, call, first_name, device)
    if torch.is_grad_enabled():
        refuse_gradients_of(call)


def _expect_biases(call: LayerCall) -> None:
    for name, argument, bias in (("gemm1_bias", "w1_bias", call.w1_bias), ("gemm2_bias", "w2_bias", call.w2_bias)):
        if bias is None:
            raise ValueError(
                f"{name}: expected a tensor, since the config has_biases, got None; pass the experts' biases as {argument}"
            )


def _refuse_hidden_states(config: MoEConfig, call: LayerCall, first: Tensor, first_name: str) -> None:
    words = {
        "dtype": "BF16 MoE: hidden_states must be bfloat16.",
        "T": f"{first_name} and hidden_states must have the same number of tokens.",
    }
    dims = {"T": first.shape[0], "H": config.hidden_size}
    expect("hidden_states", call.hidden_states, "T H", dims, dtype=torch.bfloat16, device=first.device, words=words)


def _check_written(config: MoEConfig, call: LayerCall, first_name: str, device: torch.device) -> None:
    """Raise unless what the call writes is memory of its own."""
    read, replay_out = read_tensors(call, first_name), call.routing_replay_out
    if call.output is not None:
        dims = {"T": call.num_tokens, "H": config.hidden_size}
        expect("output", call.output, "T H", dims, dtype=torch.bfloat16, device=device)
        expect_separate("output", call.output, read | {"routing_replay_out": replay_out})
    if replay_out is not None:
        expect_separate("routing_replay_out", replay_out, read)


def _check_workspace(config: MoEConfig, call: LayerCall, first_name: str, device: torch.device) -> None:
    """Raise unless the caller's scratch memory is its own, and large enough for what may run."""
    workspace = call.workspace
    assert workspace is not None
    expect("workspace_buffer", workspace, "bytes", {}, dtype=torch.uint8, device=device)
    wanted = workspace_of(config, call.num_tokens).asked_bytes
    if workspace.numel() < wanted:
        raise ValueError(
            f"workspace_buffer: expected at least {wanted} bytes for {call.num_tokens} tokens, got {workspace.numel()}; allocate "
            "what moe.trtllm_fused_moe_workspace_size says for the largest batch, or leave it out"
        )
    if workspace.data_ptr() % WIDEST_LOAD_BYTES:
        raise ValueError(
            f"workspace_buffer: expected memory aligned to {WIDEST_LOAD_BYTES} bytes, got an address "
            f"{workspace.data_ptr() % WIDEST_LOAD_BYTES} bytes past one; pass the whole of an allocation"
        )
    others = {"output": call.output, "routing_replay_out": call.routing_replay_out}
    expect_separate("workspace_buffer", workspace, read_tensors(call, first_name) | others)


def read_tensors(call: LayerCall, first_name: str) -> dict[str, Tensor | None]:
    """By the names that callers know, in the order in which they are looked at."""
    first, weights = (call.entry.expert_ids, call.entry.weights) if call.is_chosen else (call.entry, None)
    tensors = {first_name: first, "routing_bias": call.bias, "expert_weights": weights}
    tensors |= {"hidden_states": call.hidden_states, "gemm1_weights": call.w1, "gemm2_weights": call.w2}
    tensors |= {"gemm1_bias": call.w1_bias, "gemm2_bias": call.w2_bias}
    if call.swiglu is not None:
        tensors |= {f"gemm1_{name}": getattr(call.swiglu, name) for name in ("alpha", "beta", "clamp_limit")}
    return tensors | tensors_of(call.added)


def refuse_gradients_of(call: LayerCall) -> None:
    """Raise ValueError where a tensor of the call asks for a gradient: none is recorded."""
    chosen, swiglu = call.entry if call.is_chosen else None, call.swiglu
    first = chosen.weights if chosen else call.entry
    tensors: tuple[Tensor | None, ...] = (first, call.hidden_states, call.w1, call.w2, call.bias, call.output)
    tensors += (call.w1_bias, call.w2_bias)
    if swiglu is not None:
        tensors += (swiglu.alpha, swiglu.beta, swiglu.clamp_limit)
    if call.added is not None:
        tensors += tuple(tensors_of(call.added).values())
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            break
    else:
        return
    first_name = "expert_indices" if call.is_chosen else "routing_logits"
    refuse_gradients(read_tensors(call, first_name) | {"output": call.output})


def refuse_gradients(tensors: Mapping[str, Tensor | None]) -> None:
    """The same of tensors by the names that callers know."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, got requires_grad=True; the layer is forward only: "
                "call it under torch.no_grad() or torch.inference_mode(), or pass .detach(); to train, call "
                "what moe.build_training_pipeline makes"
            )
