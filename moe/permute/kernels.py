"""Which planner and which finalizer run for a config on a device."""

from __future__ import annotations

import torch

from moe.permute.config import FinalizeConfig, PermuteConfig
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference, weigh_tokens_reference
from moe.permute.weigh import launch_weigh_tokens, weigh_tokens
from moe.stages import Finalizer, Permuter, StageKernel, TokenWeigher, UnitSizeOf, first_to_take, takes_all


def planners_on(device: torch.device) -> tuple[StageKernel, ...]:
    """In order: the first that takes a config runs."""
    if device.type != "cuda":
        return (StageKernel("reference", takes_all, plan_permutation_reference, plan_permutation_reference),)
    # Here and not above: `import moe` needs neither numba nor triton.
    from moe.permute.numba_plan import launch_numba_plan_permutation, numba_plan_permutation, takes
    from moe.permute.triton_plan import launch_plan_permutation, plan_permutation

    pdl_and_units = ("uses_pdl", "unit_size")
    return (
        StageKernel("numba", takes, numba_plan_permutation, launch_numba_plan_permutation, options=pdl_and_units),
        StageKernel("triton", takes_all, plan_permutation, launch_plan_permutation),
    )


def finalizers_on(device: torch.device) -> tuple[StageKernel, ...]:
    """In order: the first that takes a config runs."""
    if device.type != "cuda":
        return (StageKernel("reference", takes_all, finalize_tokens_reference, finalize_tokens_reference),)
    from moe.permute.finalize import finalize_tokens, launch_finalize_tokens  # needs triton

    return (StageKernel("triton", takes_all, finalize_tokens, launch_finalize_tokens, options=("uses_pdl",)),)


def weighers_on(device: torch.device) -> tuple[StageKernel, ...]:
    """In order: the first that takes a config runs."""
    if device.type != "cuda":
        return (StageKernel("reference", takes_all, weigh_tokens_reference, weigh_tokens_reference),)
    return (StageKernel("torch", takes_all, weigh_tokens, launch_weigh_tokens),)


def planner_of(config: PermuteConfig, device: torch.device) -> StageKernel:
    return first_to_take(planners_on(device), config)


def permuter_for(
    config: PermuteConfig, device: torch.device, *, uses_pdl: bool, unit_size: UnitSizeOf | None
) -> tuple[Permuter, Permuter]:
    """The planner of a config with its checks, and without: for experts that `config.check` passed already.

    Args:
        unit_size: which units the GEMMs that follow take. A planner that makes none leaves them to the GEMMs.
    """
    return planner_of(config, device).bound_to(config, uses_pdl=uses_pdl, unit_size=unit_size)


def finalizer_for(config: FinalizeConfig, device: torch.device, *, uses_pdl: bool) -> tuple[Finalizer, Finalizer]:
    """The finalizer of a config with its checks, and without: for arguments that `config.check` passed already."""
    return first_to_take(finalizers_on(device), config).bound_to(config, uses_pdl=uses_pdl)


def weigher_for(config: PermuteConfig, device: torch.device) -> tuple[TokenWeigher, TokenWeigher]:
    """What weighs tokens with its checks, and without: for arguments that `config.check_weighed` passed already."""
    return first_to_take(weighers_on(device), config).bound_to(config)
