"""Which kernel runs a backward stage: by config and device, both known on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moe.gemm.backward.reference import (
    gemm1_dgrad_reference,
    gemm1_keeping_reference,
    gemm1_wgrad_reference,
    gemm2_dgrad_reference,
    gemm2_wgrad_reference,
    swiglu_gradients_reference,
)
from moe.gemm.config import GemmConfig, GemmKernel
from moe.stages import StageKernel, first_to_take, takes_all

# The stages whose config is gemm1's, and those whose is gemm2's, which are told gemm1's too.
OF_GEMM1: dict[str, Callable[..., Any]] = {
    "gemm1_keeping": gemm1_keeping_reference,
    "gemm1_dgrad": gemm1_dgrad_reference,
    "gemm1_wgrad": gemm1_wgrad_reference,
}
OF_BOTH: dict[str, Callable[..., Any]] = {
    "gemm2_dgrad": gemm2_dgrad_reference,
    "swiglu_gradients": swiglu_gradients_reference,
}
OF_GEMM2: dict[str, Callable[..., Any]] = {"gemm2_wgrad": gemm2_wgrad_reference}
STAGES = OF_GEMM1 | OF_BOTH | OF_GEMM2


def kernels_on(stage: str, device: torch.device) -> tuple[StageKernel, ...]:
    """In order: the first that takes the stage's config runs."""
    reference = StageKernel("reference", takes_all, STAGES[stage], STAGES[stage])
    if device.type != "cuda" or stage == "swiglu_gradients":
        return (reference,)
    # Here and not above: on a CPU nobody needs triton.
    from moe.gemm.backward import chosen

    of_stage: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "gemm1_keeping": (chosen.run_gemm1_keeping, chosen.launch_gemm1_keeping),
        "gemm2_dgrad": (chosen.run_gemm2_dgrad, chosen.launch_gemm2_dgrad),
        "gemm1_dgrad": (chosen.run_gemm1_dgrad, chosen.launch_gemm1_dgrad),
        "gemm1_wgrad": (chosen.run_gemm1_wgrad, chosen.launch_gemm1_wgrad),
        "gemm2_wgrad": (chosen.run_gemm2_wgrad, chosen.launch_gemm2_wgrad),
    }
    return (StageKernel("triton", takes_all, *of_stage[stage]),)


def backward_stage_for(
    stage: str, gemm1: GemmConfig, gemm2: GemmConfig, device: torch.device
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """One of STAGES for a layer's GEMMs, with its checks and without."""
    config = gemm1 if stage in OF_GEMM1 else gemm2
    run, launch = first_to_take(kernels_on(stage, device), config).bound_to(config)
    if stage not in OF_BOTH:
        return run, launch
    return partial(run, gemm1=gemm1), partial(launch, gemm1=gemm1)


def keeps_the_bits(gemm1: GemmConfig, tile_rows: int, mean_rows: int, device: torch.device) -> bool:
    """Whether `gemm1_keeping` gives, under such a load, the bits of the gemm1 that runs there: then it can stand in its place.

    Otherwise what it keeps is computed in the backward pass, and the forward one runs the gemm1 of inference.
    """
    if device.type != "cuda":
        return True  # the reference beside its own
    from moe.gemm.kernels import kernel_for

    return keeps_product(kernel_for("gemm1", gemm1, tile_rows, mean_rows, device).family, gemm1)


def keeps_product(family: GemmKernel, gemm1: GemmConfig) -> bool:
    """Whether the gemm1 of a family stores the product too, for a config that has gradients."""
    return family == "portable" or (family == "wide" and gemm1.is_gated)
