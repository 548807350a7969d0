"""What the tensors of the backward stages must be; each function raises before anything is launched or written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe.checks import expect, expect_separate, expect_type, is_as_expected, no_case
from moe.flow import Permutation, SwigluParams, TopK
from moe.gemm.checks import check_swiglu, check_weights
from moe.gemm.config import ActivationType, GemmConfig, WeightLayout

TRAINED_ACTIVATIONS = (ActivationType.Swiglu, ActivationType.Relu2)
TRAINED_LAYOUTS = (WeightLayout.MajorK, WeightLayout.MajorMn)
BFLOAT16 = torch.bfloat16
WEIGHT_DTYPES = (torch.bfloat16, torch.float32)


def check_trained(*configs: GemmConfig) -> None:
    """Raise unless there are gradients for GEMMs of these configs.

    Raises:
        ValueError: shuffled, blocked or interleaved weights, or an activation without a derivative here.
    """
    for config in configs:
        stage = "gemm2" if config.activation is None else "gemm1"
        weight_format = config.weight_format
        if weight_format.is_shuffled or weight_format.layout not in TRAINED_LAYOUTS:
            shuffled = "shuffled " if weight_format.is_shuffled else ""
            raise ValueError(
                f"{stage}.weight_format: expected MajorK or MajorMn weights that are not shuffled, got {shuffled}"
                f"{weight_format.layout.name}; train in the checkpoint's format, and convert by moe.gemm.weight_format to serve"
            )
        if config.is_interleaved:
            raise ValueError(
                f"{stage}.weight_format: expected gate_up_order 'gate_up' or 'up_gate', got 'interleaved', which has no gradient "
                "here; train with the halves apart, and convert by moe.gemm.weight_format"
            )
        if config.activation is not None and config.activation not in TRAINED_ACTIVATIONS:
            names = " or ".join(activation.name for activation in TRAINED_ACTIVATIONS)
            raise ValueError(
                f"{stage}.activation: expected {names}, got {config.activation.name}, which has no derivative here; "
                "train with torch's own operators"
            )


def check_gemm1_keeping(
    config: GemmConfig,
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    swiglu: SwigluParams | None,
    *,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Raise unless these fit: hidden_states [T, H], weights of weight_shape."""
    check_trained(config)
    device = _device_of(permutation)
    dims = {"T": permutation.row_of_slot.shape[0], "H": config.in_features}
    _expect_rows("hidden_states", hidden_states, "T H", dims, dtype, device)
    check_weights(config, "gemm1_weights", weights, device, dtype=dtype)
    check_swiglu(config, swiglu, device, dtype=parameter_dtype(dtype))


def check_gemm2_dgrad(
    config: GemmConfig,
    gemm1: GemmConfig,
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    swiglu: SwigluParams | None,
    *,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Raise unless these fit: grad_output [T, H], weights of weight_shape, gate_up [P, 2I] or [P, I], topk [T, K]."""
    check_trained(gemm1, config)
    device = _device_of(permutation)
    num_tokens, top_k = permutation.row_of_slot.shape
    dims = {"T": num_tokens, "K": top_k, "P": permutation.max_rows, "H": config.out_features}
    _expect_rows("grad_output", grad_output, "T H", dims, dtype, device)
    check_weights(config, "gemm2_weights", weights, device, dtype=dtype)
    _expect_gate_up("gate_up", gate_up, gemm1, dims, dtype, device)
    expect_type("topk", topk, TopK, "moe.TopK(expert_ids, weights) makes one")
    allowed = WEIGHT_DTYPES if dtype == BFLOAT16 else (dtype,)
    expect("expert_weights", topk.weights, "T K", dims, dtype=allowed, device=device)
    check_swiglu(gemm1, swiglu, device, dtype=parameter_dtype(dtype))


def check_gemm1_dgrad(
    config: GemmConfig,
    grad_gate_up: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Raise unless these fit: grad_gate_up [P, 2I] or [P, I], weights of weight_shape."""
    check_trained(config)
    device = _device_of(permutation)
    _expect_gate_up("grad_gate_up", grad_gate_up, config, {"P": permutation.max_rows}, dtype, device)
    check_weights(config, "gemm1_weights", weights, device, dtype=dtype)


def check_gemm1_wgrad(
    config: GemmConfig,
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    out: Tensor | None,
    *,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Raise unless these fit: grad_gate_up [P, 2I] or [P, I], hidden_states [T, H], out of weight_shape in float32 or None."""
    check_trained(config)
    device = _device_of(permutation)
    dims = {"T": permutation.row_of_slot.shape[0], "P": permutation.max_rows, "H": config.in_features}
    _expect_gate_up("grad_gate_up", grad_gate_up, config, dims, dtype, device)
    _expect_rows("hidden_states", hidden_states, "T H", dims, dtype, device)
    check_accumulated("gemm1", config, out, {"grad_gate_up": grad_gate_up, "hidden_states": hidden_states}, dtype=dtype)


def check_gemm2_wgrad(
    config: GemmConfig,
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    out: Tensor | None,
    *,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Raise unless these fit: grad_output [T, H], weighted_activation [P, I], out of weight_shape in float32 or None."""
    check_trained(config)
    device = _device_of(permutation)
    dims = {"T": permutation.row_of_slot.shape[0], "P": permutation.max_rows}
    dims |= {"H": config.out_features, "I": config.in_features}
    _expect_rows("grad_output", grad_output, "T H", dims, dtype, device)
    _expect_rows("weighted_activation", weighted_activation, "P I", dims, dtype, device)
    read = {"grad_output": grad_output, "weighted_activation": weighted_activation}
    check_accumulated("gemm2", config, out, read, dtype=dtype)


def check_accumulated(
    stage: str,
    config: GemmConfig,
    out: Tensor | None,
    read: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Raise unless `out`, where a weight gradient is added, is memory of its own in float32, of weight_shape."""
    if out is None:
        return
    name, device = f"main_grad of {stage}", next(iter(read.values())).device
    if not is_as_expected(out, config.weight_shape, parameter_dtype(dtype), device):
        axes = " ".join(map(str, config.weight_shape))
        expect(name, out, axes, {}, dtype=parameter_dtype(dtype), device=device)
    expect_separate(name, out, read)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is kept finer than rows of `dtype`: float32 beside bfloat16."""
    return torch.float32 if dtype == BFLOAT16 else dtype


def reference_dtype(tensor: Tensor) -> torch.dtype:
    """What a reference computes a call in: float64 where its first tensor is, so that it can be differentiated by numbers."""
    return torch.float64 if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 else BFLOAT16


def half_columns(config: GemmConfig) -> tuple[slice, slice]:
    """Which columns of gate_up are the gate's, and which up's, of a gated config whose weights are not shuffled."""
    if not config.is_gated:
        raise no_case(config.activation, "moe/gemm/backward/checks.py, half_columns")
    first, second = slice(0, config.out_features), slice(config.out_features, None)
    return (first, second) if config.weight_format.is_gate_first else (second, first)


def _expect_rows(
    name: str, rows: Tensor, shape: str, dims: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    if not is_as_expected(rows, tuple(dims[axis] for axis in shape.split()), dtype, device):
        expect(name, rows, shape, dims, dtype=dtype, device=device)


def _expect_gate_up(
    name: str, rows: Tensor, gemm1: GemmConfig, dims: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    axis = "2I" if gemm1.is_gated else "I"
    _expect_rows(name, rows, f"P {axis}", dims | {axis: gemm1.weight_rows}, dtype, device)


def _device_of(permutation: Permutation) -> torch.device:
    return permutation.token_of_row.device
