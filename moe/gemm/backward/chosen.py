"""The backward stages by the kernel that is fastest for the GPU, the problem and the load."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from moe.flow import Gemm2Gradients, KeptGemm1, Permutation, SwigluParams, TopK
from moe.gemm.backward.checks import (
    check_gemm1_dgrad,
    check_gemm1_keeping,
    check_gemm1_wgrad,
    check_gemm2_dgrad,
    check_gemm2_wgrad,
)
from moe.gemm.backward.dgrad import launch_portable_gemm2_dgrad
from moe.gemm.backward.keeping import launch_portable_gemm1_keeping
from moe.gemm.backward.kernels import keeps_product
from moe.gemm.backward.transposed import transposed
from moe.gemm.backward.wgrad import launch_portable_gemm1_wgrad, launch_portable_gemm2_wgrad
from moe.gemm.config import GemmConfig
from moe.gemm.kernels import kernel_for, launch_gemm2
from moe.runtime import triton_versions
from moe.runtime.scratch import new_scratch


class Hopper(NamedTuple):
    """The modules of the kernels in Gluon."""

    dgrad: ModuleType
    wgrad: ModuleType


@functools.cache
def _hopper() -> Hopper | None:
    """None where this Triton's Gluon is not one that they were written in."""
    if not triton_versions.has_known_gluon():
        return None
    try:
        from moe.gemm.backward import hopper_dgrad, hopper_wgrad
    except (ImportError, AttributeError) as error:
        triton_versions.warn_that_hopper_steps_aside(missing=str(error))
        return None
    return Hopper(hopper_dgrad, hopper_wgrad)


def run_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """gemm1, and the product before its activation; arguments, result and errors as `gemm1_keeping_reference`.

    The activation has the bits of `run_gemm1` of the same call where `keeps_the_bits` says so.
    """
    check_gemm1_keeping(config, hidden_states, weights, permutation, swiglu)
    return launch_gemm1_keeping(hidden_states, weights, permutation, config=config, swiglu=swiglu)


def launch_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """`run_gemm1_keeping` of tensors that were checked."""
    kernel = kernel_for("gemm1", config, permutation.tile_rows, permutation.mean_rows, hidden_states.device)
    arguments = (hidden_states, weights, permutation)
    if not keeps_product(kernel.family, config):
        return launch_portable_gemm1_keeping(*arguments, config=config, swiglu=swiglu)
    kept = new_scratch(hidden_states, (permutation.max_rows, config.weight_rows))
    return KeptGemm1(kernel.launch(*arguments, config=config, swiglu=swiglu, uses_pdl=False, kept=kept), kept)


def run_gemm2_dgrad(
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: GemmConfig,
    gemm1: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Gemm2Gradients:
    """Gradients through gemm2, the routing weight and the activation; arguments, result and errors as `gemm2_dgrad_reference`."""
    check_gemm2_dgrad(config, gemm1, grad_output, weights, gate_up, topk, permutation, swiglu)
    tensors = (grad_output, weights, gate_up, topk, permutation)
    return launch_gemm2_dgrad(*tensors, config=config, gemm1=gemm1, swiglu=swiglu)


def launch_gemm2_dgrad(
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: GemmConfig,
    gemm1: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Gemm2Gradients:
    """`run_gemm2_dgrad` of tensors that were checked."""
    hopper = _hopper()
    if hopper is not None and hopper.dgrad.takes(config, gemm1, permutation.tile_rows, grad_output.device):
        launch = hopper.dgrad.launch_hopper_gemm2_dgrad
    else:
        launch = launch_portable_gemm2_dgrad
    tensors = (grad_output, weights, gate_up, topk, permutation)
    return launch(*tensors, config=config, gemm1=gemm1, swiglu=swiglu)


def run_gemm1_dgrad(grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig) -> Tensor:
    """grad_gate_up @ W1[expert_of_row]; arguments, result and errors as `gemm1_dgrad_reference`. Padding rows are not written."""
    check_gemm1_dgrad(config, grad_gate_up, weights, permutation)
    return launch_gemm1_dgrad(grad_gate_up, weights, permutation, config=config)


def launch_gemm1_dgrad(
    grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig
) -> Tensor:
    """`run_gemm1_dgrad` of tensors that were checked: a gemm2 by the transposed weight."""
    return launch_gemm2(grad_gate_up, weights, permutation, config=transposed(config))


def run_gemm1_wgrad(
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of W1; arguments, result and errors as `gemm1_wgrad_reference`."""
    check_gemm1_wgrad(config, grad_gate_up, hidden_states, permutation, out)
    return launch_gemm1_wgrad(grad_gate_up, hidden_states, permutation, config=config, out=out)


def launch_gemm1_wgrad(
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """`run_gemm1_wgrad` of tensors that were checked."""
    hopper = _hopper()
    if hopper is not None and hopper.wgrad.takes(config, permutation.tile_rows, grad_gate_up.device):
        launch = hopper.wgrad.launch_hopper_gemm1_wgrad
    else:
        launch = launch_portable_gemm1_wgrad
    return launch(grad_gate_up, hidden_states, permutation, config=config, out=out)


def run_gemm2_wgrad(
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of W2; arguments, result and errors as `gemm2_wgrad_reference`."""
    check_gemm2_wgrad(config, grad_output, weighted_activation, permutation, out)
    return launch_gemm2_wgrad(grad_output, weighted_activation, permutation, config=config, out=out)


def launch_gemm2_wgrad(
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """`run_gemm2_wgrad` of tensors that were checked."""
    hopper = _hopper()
    if hopper is not None and hopper.wgrad.takes(config, permutation.tile_rows, grad_output.device):
        launch = hopper.wgrad.launch_hopper_gemm2_wgrad
    else:
        launch = launch_portable_gemm2_wgrad
    return launch(grad_output, weighted_activation, permutation, config=config, out=out)
