"""The experts modules within a model, however it is wrapped, and how transformers is told who runs them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe.integrations.hf_experts import DEQUANTISE, expect_not_quantised
from moe.integrations.hf_own_forward import OwnForward, stand_for

_NOT_LAYERS = ("JetMoeMoA",)  # an attention whose projections are experts: it stays with the model


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every experts module; raises where there is none, or one that is never handed over."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a transformers model, got {type(model).__name__}; pass what from_pretrained returns"
        )
    found = False
    within: list[str] = []  # what stands for a module stands for all within it
    for path, module in model.named_modules():
        name = path or type(module).__name__
        if any(path.startswith(outer) for outer in within):
            continue
        if is_handed_over(module):
            found = True
            yield name, module
        elif stand_for(module) is not None or type(module).__name__ in _NOT_LAYERS:
            found = found or stand_for(module) is not None
            within.append(f"{path}." if path else "")
        elif _looks_like_experts(module):
            _refuse_own_experts(model, name, module)
    if not found:
        raise ValueError(
            f"{type(model).__name__}: expected experts that transformers hands over (@use_experts_implementation), "
            "found none; there is no way to run this model on moe"
        )


def stood_for(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all whose forward one of ours stands for."""
    for path, module in model.named_modules():
        if stand_for(module) is not None:
            yield path or type(module).__name__, module


def hand_over(model: nn.Module, name: str, *, is_batch_invariant: bool) -> None:
    """Have every experts module of a model run by the implementation of this name.

    Models of transformers within it are told whole. Experts outside of them, as of one layer, get a config of their own:
    theirs is shared with layers that are not meant.
    """
    for whole in _whole_models(model):
        cast(Any, whole).set_experts_implementation(name)
    for _, experts in experts_of(model):
        module = cast(Any, experts)
        if getattr(module.config, "_experts_implementation", None) != name:
            module.config = copy.copy(module.config)
            module.config._experts_implementation = name
    for _, module in stood_for(model):
        module.forward = OwnForward(module, name, is_batch_invariant)


def gathered_dtype(model: nn.Module, module: nn.Module, weights: Tensor | None) -> torch.dtype | None:
    """The dtype in which fully_shard gathers the weights of a module for a call; None where it does not."""
    if weights is None or not isinstance(weights, _distributed_tensor()):
        return None
    for outer in _path_to(model, module):
        if hasattr(outer, "_get_fsdp_state"):
            policy = getattr(outer._get_fsdp_state(), "_mp_policy", None)
            return getattr(policy, "param_dtype", None) or weights.dtype
    return None


def is_handed_over(module: nn.Module) -> bool:
    """Whether @use_experts_implementation made this module's class."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias")


def _whole_models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that tell all experts within them."""
    if callable(getattr(model, "set_experts_implementation", None)) and any(map(is_handed_over, model.modules())):
        yield model
        return
    for child in model.children():
        yield from _whole_models(child)


def _path_to(model: nn.Module, wanted: nn.Module) -> list[Any]:
    """The modules from `wanted` up to `model`."""
    path = next(path for path, module in model.named_modules() if module is wanted)
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:count])) for count in range(len(names), -1, -1)]


def _refuse_own_experts(model: nn.Module, path: str, module: nn.Module) -> None:
    expect_not_quantised(module, path)
    if type(module).__module__.startswith("transformers.integrations."):
        raise ValueError(
            f"{path}: expected experts in bfloat16, got {type(module).__name__}, which is quantised; {DEQUANTISE}"
        )
    raise ValueError(
        f"{path}: {type(model).__name__} runs its {type(module).__name__} itself and ignores "
        "experts_implementation (the class has no @use_experts_implementation); "
        "there is no way to run this model on moe"
    )


def _looks_like_experts(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Experts" in name and "Shared" not in name


def _distributed_tensor() -> type | tuple[()]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return DTensor
