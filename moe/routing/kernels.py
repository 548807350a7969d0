"""Which router runs for a config on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe.routing.backward_reference import route_backward_reference
from moe.routing.config import RoutingConfig
from moe.routing.reference import select_experts_reference
from moe.stages import Router, StageKernel, first_to_take, takes_all

_REFERENCE = StageKernel("reference", takes_all, select_experts_reference, select_experts_reference)


def routers_on(device: torch.device) -> tuple[StageKernel, ...]:
    """In order: the first that takes a config runs."""
    if device.type != "cuda":
        return (_REFERENCE,)
    from moe.routing.topk import (
        launch_select_experts,
        select_experts,
        takes,
    )  # needs numba, which `import moe` does not

    return (
        StageKernel("numba", takes, select_experts, launch_select_experts, options=("uses_pdl",)),
        _REFERENCE,  # on the GPU
    )


def backwards_on(device: torch.device) -> tuple[StageKernel, ...]:
    """Of the weights' gradient. In order: the first that takes a config runs."""
    reference = StageKernel("reference", takes_all, route_backward_reference, route_backward_reference)
    if device.type != "cuda":
        return (reference,)
    from moe.routing.backward import launch_route_backward, route_backward, takes  # needs triton

    return (StageKernel("triton", takes, route_backward, launch_route_backward), reference)


def route_backward_for(config: RoutingConfig, device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The backward of a config's router with its checks, and without."""
    return first_to_take(backwards_on(device), config).bound_to(config)


def router_for(config: RoutingConfig, device: torch.device, *, uses_pdl: bool) -> tuple[Router, Router]:
    """The router of a config with its checks, and without: for arguments that `config.check` passed already."""
    return first_to_take(routers_on(device), config).bound_to(config, uses_pdl=uses_pdl)
