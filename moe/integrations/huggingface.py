"""Runs the experts of Hugging Face models on our pipeline: `experts_implementation="moe"`. Forward only, bfloat16.

transformers calls an experts function with the experts module as its first argument, the tokens, and the chosen experts
(`transformers.integrations.moe.ExpertsInterface`); routing, shared experts and expert parallelism stay with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, library, nn

from moe.config import MoEConfig
from moe.expert_ids import ID_DTYPES, as_int32_ids
from moe.flow import TopK
from moe.gemm.config import DIM_MULTIPLE, ActivationType, WeightFormat, WeightLayout
from moe.tuning.tuned import TunedPipeline, tuned_pipeline

OLDEST_TRANSFORMERS = (5, 7)  # the first that takes the name of an experts function that it did not bring itself
INSTALL = 'pip install "moe-stages[hf]"'
_W1 = "weights (gate_up_proj or up_proj)"
OTHERWISE = "leave this model on another experts_implementation, such as 'grouped_mm'"


def register(name: str = "moe", *, is_batch_invariant: bool = False) -> None:
    """Make `experts_implementation=name` known to transformers, for the whole process. May be called again.

    Args:
        is_batch_invariant: on a GPU, a token has the bits that it has in any batch, at a cost; see `moe.MoEConfig.create`. A name
            stands for layers of one kind.

    transformers cannot be told here to refuse a model whose experts it never hands over (Llama 4, DBRX, ...): with
    `from_pretrained(..., experts_implementation=name)` such a model runs on its own code without a word. Use `use_moe`,
    or `check_model` after loading.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: transformers has another implementation of that name, or it stands for layers of the other kind.
    """
    functions = _transformers_moe().ALL_EXPERTS_FUNCTIONS
    kinds = {False: run_hf_experts, True: run_hf_experts_batch_invariant}
    ours, other = kinds[is_batch_invariant], kinds[not is_batch_invariant]
    if name == "eager" or (name in functions and functions[name] not in (ours, other)):
        raise ValueError(
            f"name: expected one that transformers does not use, got {name!r}; pass another, such as 'moe'"
        )
    if name in functions and functions[name] is other:
        raise ValueError(
            f"name: expected one that does not stand for layers with is_batch_invariant={not is_batch_invariant}, got "
            f"{name!r}; pass another, such as 'moe_{'invariant' if is_batch_invariant else 'fast'}'"
        )
    _transformers_moe().ExpertsInterface.register(name, ours)


def use_moe(model: nn.Module, name: str = "moe", *, is_batch_invariant: bool = False) -> nn.Module:
    """Run all experts of a transformers model on our pipeline from now on; returns the model.

    Args:
        name, is_batch_invariant: as in `register`.

    Raises:
        ImportError: transformers is missing or too old.
        TypeError: not a module.
        ValueError: an experts module that this package cannot run, with the reason; the model is then as before.
    """
    register(name, is_batch_invariant=is_batch_invariant)
    for path, experts in _experts_of(model):
        _expect_supported(experts, path)
        _expect_weights(experts, path)
    cast(Any, model).set_experts_implementation(name)
    check_model(model, name)
    return model


def check_model(model: nn.Module, name: str = "moe") -> None:
    """Raise unless every experts module of a transformers model runs on our pipeline.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: naming the module, and why it does not.
    """
    for path, experts in _experts_of(model):
        _expect_supported(experts, path)
        _expect_weights(experts, path)
        chosen = getattr(experts.config, "_experts_implementation", None)
        ours = (run_hf_experts, run_hf_experts_batch_invariant)
        if chosen != name or _transformers_moe().ALL_EXPERTS_FUNCTIONS.get(name) not in ours:
            raise ValueError(
                f"{path}: expected experts_implementation {name!r}, got {chosen!r}; call use_moe(model) to set it"
            )


def run_hf_experts(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    is_batch_invariant: bool = False,
) -> Tensor:
    """The experts function that `register` hands to transformers.

    Args:
        experts: the experts module. Its weights are read where they lie: gate_up_proj [E, 2I, H] and
            down_proj [E, H, I], the last two axes swapped where `experts.is_transposed`; up_proj [E, I, H] in place of
            gate_up_proj where the experts have no gate. E counts the experts that lie here.
        hidden_states: [..., H] bfloat16, T tokens.
        top_k_index: [T, K] of any integer dtype, ids of experts that lie here. Any other id is skipped: expert
            parallelism marks slots of other ranks by E.
        top_k_weights: [T, K] of any floating dtype.

    Returns:
        [..., H] bfloat16: sum over a token's experts of weight times expert(token).

    Raises:
        ValueError: a module or a tensor that this package does not take, and what to do instead.
    """
    _expect_supported(experts, type(experts).__name__)
    w1, w2 = _weights_of(experts)
    _expect_tensors(type(experts).__name__, hidden_states, w1, w2)
    _expect_choice(type(experts).__name__, top_k_index, top_k_weights)
    activation = ActivationType.Swiglu if getattr(experts, "has_gate", True) else ActivationType.Relu2
    layout = WeightLayout.MajorMn if experts.is_transposed else WeightLayout.MajorK
    run = torch.ops.moe.run_experts if torch.compiler.is_compiling() else _run_experts
    return run(hidden_states, top_k_index, top_k_weights, w1, w2, int(activation), int(layout), is_batch_invariant)


def run_hf_experts_batch_invariant(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`run_hf_experts` with the bits, on a GPU, that a token has in any batch."""
    return run_hf_experts(experts, hidden_states, top_k_index, top_k_weights, is_batch_invariant=True)


def _run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
) -> Tensor:
    num_local_experts, hidden_size, intermediate_size = w2.shape
    if weight_layout == WeightLayout.MajorMn:
        hidden_size, intermediate_size = intermediate_size, hidden_size
    pipeline = _pipeline(
        hidden_size,
        intermediate_size,
        num_local_experts,
        top_k_index.shape[-1],
        activation,
        weight_layout,
        is_batch_invariant,
        hidden_states.device,
    )
    if top_k_weights.dtype not in (torch.bfloat16, torch.float32):
        top_k_weights = top_k_weights.float()
    topk = TopK(as_int32_ids(top_k_index, num_local_experts), top_k_weights.contiguous())
    output = pipeline.run_experts(topk, hidden_states.reshape(-1, hidden_size).contiguous(), w1, w2)
    return output.view(hidden_states.shape)


# What a compiled model calls, so that dynamo need not look into the pipeline.
_run_experts_op = library.custom_op("moe::run_experts", _run_experts, mutates_args=())


@_run_experts_op.register_fake
def _(hidden_states: Tensor, *_others: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@cache
def _pipeline(
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    top_k: int,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    device: torch.device,
) -> TunedPipeline:
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        # A rank may hold fewer experts than a token chooses; the ids beyond its own are then experts elsewhere.
        num_experts=max(num_local_experts, top_k),
        num_local_experts=num_local_experts,
        top_k=top_k,
        activation=activation,
        weight_format=WeightFormat(layout=WeightLayout(weight_layout)),
        is_batch_invariant=is_batch_invariant,
    )
    return tuned_pipeline(config, device)


def _expect_supported(experts: nn.Module, path: str) -> None:
    """Raise unless the experts compute W2 silu(gate) * up, or W2 relu(up)^2 without a gate, and nothing else."""
    has_gate = getattr(experts, "has_gate", True)
    wanted = {"has_bias": False, "has_post_expert_norm": False}
    if has_gate:
        wanted["is_concatenated"] = True
    for name, value in wanted.items():
        if getattr(experts, name, value) != value:
            raise ValueError(f"{path}.{name}: expected {value}, got {not value}; {OTHERWISE}")
    is_known = _is_silu if has_gate else _is_squared_relu
    activation = getattr(experts, "act_fn", None)
    if not is_known(activation):
        raise ValueError(
            f"{path}.act_fn: expected {'silu' if has_gate else 'squared relu'}, got {_name_of(activation)}; {OTHERWISE}"
        )
    # By module and not by import: this runs each call, compiled ones included.
    if has_gate and cast(Any, type(experts))._apply_gate.__module__ != "transformers.integrations.moe":
        raise ValueError(f"{path}._apply_gate: expected silu(gate) * up, got a gate of its own; {OTHERWISE}")


def _weights_of(experts: nn.Module) -> tuple[Tensor, Tensor]:
    w1 = experts.gate_up_proj if getattr(experts, "has_gate", True) else experts.up_proj
    return cast(Tensor, w1), cast(Tensor, experts.down_proj)


def _expect_weights(experts: nn.Module, path: str) -> None:
    """Raise unless the weights are plain, bfloat16, and of sizes that the kernels take."""
    w1, w2 = _weights_of(experts)
    _expect_plain(path, {_W1: w1, "down_proj": w2})
    if any(size % DIM_MULTIPLE for size in w2.shape[1:]):
        raise ValueError(
            f"{path}: expected hidden and intermediate sizes that are multiples of {DIM_MULTIPLE}, got down_proj "
            f"{list(w2.shape)}; {OTHERWISE}"
        )


def _expect_tensors(path: str, hidden_states: Tensor, w1: Tensor, w2: Tensor) -> None:
    """Raise unless the tensors are plain, bfloat16, and need no gradient."""
    tensors = {"hidden_states": hidden_states, _W1: w1, "down_proj": w2}
    _expect_plain(path, tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        name = next(name for name, tensor in tensors.items() if tensor.requires_grad)
        raise ValueError(
            f"{path}: forward only: expected no gradient, but {name} asks for one and gradients are enabled (the "
            "parameters of every freshly loaded model do); run the model under torch.no_grad() or "
            "torch.inference_mode(), and train with experts_implementation='grouped_mm'"
        )


def _expect_choice(path: str, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Raise unless ids are whole numbers and weights are not: swapped arguments, masks and one-hot rows are neither."""
    if top_k_index.dtype not in ID_DTYPES:
        raise ValueError(
            f"{path}: expected top_k_index [T, K] of an integer dtype, got {top_k_index.dtype}; pass the ids of the experts"
        )
    if not top_k_weights.is_floating_point():
        raise ValueError(
            f"{path}: expected top_k_weights [T, K] of a floating dtype, got {top_k_weights.dtype}; convert it with .float()"
        )


def _expect_plain(path: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise ValueError(
                f"{path}: expected {name} in bfloat16, got {tensor.dtype}; load the model with dtype=torch.bfloat16 "
                f"and without quantisation, or {OTHERWISE}"
            )
        if type(tensor) not in (Tensor, nn.Parameter):  # isinstance would let a quantised nn.Parameter through
            raise ValueError(
                f"{path}: expected {name} to be a plain tensor, got {type(tensor).__name__}; load the model without "
                f"quantisation and without tensor parallelism of its experts, or {OTHERWISE}"
            )


def _is_silu(activation: Any) -> bool:
    return activation is nn.functional.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


def _is_squared_relu(activation: Any) -> bool:
    return type(activation).__name__ == "ReLUSquaredActivation"


def _name_of(function: Callable[..., Any] | None) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every experts module; raises where there is none, or one that is never handed over."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a transformers model, got {type(model).__name__}; pass what from_pretrained returns"
        )
    found = False
    for path, module in model.named_modules():
        if _is_handed_over(module):
            found = True
            yield path, module
        elif _looks_like_experts(module):
            raise ValueError(
                f"{path}: {type(model).__name__} runs its {type(module).__name__} itself and ignores "
                "experts_implementation (the class has no @use_experts_implementation); "
                "there is no way to run this model on moe"
            )
    if not found:
        raise ValueError(
            f"{type(model).__name__}: expected experts that transformers hands over (@use_experts_implementation), "
            "found none; there is no way to run this model on moe"
        )


def _is_handed_over(module: nn.Module) -> bool:
    """Whether @use_experts_implementation made this module's class."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias")


def _looks_like_experts(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Experts" in name and "Shared" not in name


def _transformers_moe() -> Any:
    try:
        from transformers import __version__ as version
        from transformers.integrations import moe
    except ImportError as error:
        raise ImportError(f"moe.integrations.huggingface needs transformers; {INSTALL}") from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRANSFORMERS:
        raise ImportError(f"moe.integrations.huggingface: expected transformers 5.7 or newer, got {version}; {INSTALL}")
    return moe
