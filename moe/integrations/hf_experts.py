"""What an experts module of transformers computes, and whether the layer computes the same from its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from moe.checks import is_integer, is_quantised
from moe.expert_ids import ID_DTYPES
from moe.flow import SwigluParams
from moe.gemm.checks import BIAS_DTYPES
from moe.gemm.config import DIM_MULTIPLE, ActivationType, GemmConfig, WeightLayout
from moe.gemm.reference import activate_reference
from moe.runtime.device import expect_kernels

OTHERWISE = "leave this model on another experts_implementation, such as 'grouped_mm'"
DEQUANTISE = (
    "dequantise the weights with their scales (model.dequantize(), or dequantize=True in the quantization_config that it "
    f"is loaded with), or {OTHERWISE}"
)
_W1 = "weights (gate_up_proj or up_proj)"
_B1 = "biases (gate_up_proj_bias or up_proj_bias)"
_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)  # isinstance would let quantised subclasses through


class Gate(NamedTuple):
    """Parameters of SwiGLU and its like, of all experts alike; None as in SwigluParams."""

    alpha: float | None = None
    beta: float | None = None
    clamp_limit: float | None = None


class Form(NamedTuple):  # a tuple, which torch.compile can follow
    """What the experts compute, by the layer's names."""

    activation: ActivationType | None  # None: their own code, between two matrices that are multiplied apart
    layout: WeightLayout
    gate: Gate = Gate()
    is_interleaved: bool = False  # gate and up rows are neighbours
    has_bias: bool = False


def form_of(experts: nn.Module, path: str) -> Form:
    """What the experts compute.

    Raises:
        ValueError: quantised weights, or a norm that is none.
    """
    has_gate = getattr(experts, "has_gate", True)
    expect_not_quantised(experts, path)
    if getattr(experts, "has_post_expert_norm", False) and not isinstance(
        norm := getattr(experts, "post_expert_norm", None), nn.Module
    ):
        raise ValueError(f"{path}.post_expert_norm: expected a module, got {type(norm).__name__}; {OTHERWISE}")
    layout = WeightLayout.MajorMn if experts.is_transposed else WeightLayout.MajorK
    has_bias = getattr(experts, "has_bias", False)
    if has_bias:
        _expect_tensors_of(experts, path, f"{_first_name(experts)}_bias", "down_proj_bias")
    is_interleaved = has_gate and not getattr(experts, "is_concatenated", True)
    # By module and not by import: this runs each call, compiled ones included.
    if has_gate and cast(Any, type(experts))._apply_gate.__module__ != "transformers.integrations.moe":
        activation, gate = _known_gate_of(experts, path) or (None, Gate())
    else:
        activation, gate = _known_activation(getattr(experts, "act_fn", None), has_gate), Gate()
        if activation is None and not callable(experts.act_fn):
            raise ValueError(f"{path}.act_fn: expected a function, got {type(experts.act_fn).__name__}; {OTHERWISE}")
        if is_interleaved:  # transformers' own gate takes halves, whatever the flag says
            activation = None
    return Form(activation, layout, gate, is_interleaved, has_bias)


def expect_activation(activation: Any, path: str) -> ActivationType:
    """The layer's activation for a function of the gate.

    Raises:
        ValueError: there is none.
    """
    known = _known_activation(activation, True)
    if known is None:
        raise ValueError(f"{path}: expected silu or gelu, got {_name_of(activation)}; {OTHERWISE}")
    return known


def weights_of(experts: nn.Module) -> tuple[Tensor, Tensor]:
    return getattr(experts, _first_name(experts)), cast(Tensor, experts.down_proj)


def biases_of(experts: nn.Module, form: Form) -> tuple[Tensor | None, Tensor | None]:
    """[E, rows of the first matrix] and [E, H], where the form says that there are some."""
    if not form.has_bias:
        return None, None
    return getattr(experts, f"{_first_name(experts)}_bias"), cast(Tensor, experts.down_proj_bias)


def _first_name(experts: nn.Module) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def _expect_tensors_of(experts: nn.Module, path: str, *names: str) -> None:
    for name in names:
        value = getattr(experts, name, None)
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}.{name}: expected a tensor, got {type(value).__name__}; {OTHERWISE}")


def expect_weights(experts: nn.Module, path: str, gathered_dtype: torch.dtype | None = None) -> None:
    """Raise unless the weights will be plain bfloat16 of sizes that the kernels take, when they are called.

    Args:
        gathered_dtype: what fully_shard makes of them for a call; None where they are not sharded by it.

    Of weights that transformers' own expert or tensor parallelism has split, this rank's part is what a call is given.
    """
    _expect_tensors_of(experts, path, _first_name(experts), "down_proj")
    w1, w2 = weights_of(experts)
    if gathered_dtype is None and getattr(experts, "_is_hooked", False):
        w1, w2 = _local_part(w1), _local_part(w2)
    expect_plain_weights(path, w1, w2, gathered_dtype)


def expect_plain_weights(path: str, w1: Tensor, w2: Tensor, gathered_dtype: torch.dtype | None = None) -> None:
    """The same of weights in hand."""
    for name, weights in ((_W1, w1), ("down_proj", w2)):
        if weights.dim() != 3:
            raise ValueError(
                f"{path}: expected {name} [E, rows, columns], got {list(weights.shape)}: sharded or flattened by a wrapper? "
                "Call use_moe before the model is wrapped, or shard it by torch's fully_shard"
            )
    if w2.is_cuda:
        expect_kernels(w2.device)
    if gathered_dtype is None:
        _expect_plain(path, {_W1: w1, "down_proj": w2})
    elif gathered_dtype != torch.bfloat16:
        raise ValueError(
            f"{path}: expected weights that fully_shard gathers in bfloat16, got {gathered_dtype}; pass "
            f"mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16) to it, or {OTHERWISE}"
        )
    if any(size % DIM_MULTIPLE for size in w2.shape[1:]):
        raise ValueError(
            f"{path}: expected hidden and intermediate sizes that are multiples of {DIM_MULTIPLE}, got down_proj "
            f"{list(w2.shape)}; {OTHERWISE}"
        )


def _local_part(weights: Tensor) -> Tensor:
    """This rank's part of a DTensor, without a copy; another tensor as it is."""
    to_local = getattr(weights, "to_local", None)
    return weights if to_local is None else to_local()


def expect_tensors(
    path: str,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Raise unless the tensors are plain, and bfloat16 but for biases."""
    _expect_plain(path, {"hidden_states": hidden_states, _W1: w1, "down_proj": w2})
    for name, bias in zip((_B1, "down_proj_bias"), biases):
        if bias is not None and bias.dtype not in BIAS_DTYPES:
            raise ValueError(f"{path}: expected {name} in bfloat16 or float32, got {bias.dtype}; {OTHERWISE}")


def expect_no_gradients(
    path: str,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Raise where a gradient is wanted of experts that have none: those with biases, interleaved rows or other activations."""
    tensors = {"hidden_states": hidden_states, _W1: w1, "down_proj": w2, _B1: biases[0], "down_proj_bias": biases[1]}
    name = next((name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad), None)
    if name is not None and torch.is_grad_enabled():
        raise ValueError(
            f"{path}: forward only: expected no gradient, but {name} asks for one and gradients are enabled (the "
            "parameters of every freshly loaded model do); run the model under torch.no_grad() or "
            "torch.inference_mode(), and train with experts_implementation='grouped_mm'. Experts of SwiGLU or squared relu, "
            "without biases and with gate rows before up rows, do train here: by moe.build_training_pipeline"
        )


def expect_choice(path: str, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Raise unless ids are whole numbers and weights are not: swapped arguments, masks and one-hot rows are neither."""
    if top_k_index.dtype not in ID_DTYPES:
        raise ValueError(
            f"{path}: expected top_k_index [T, K] of an integer dtype, got {top_k_index.dtype}; pass the ids of the experts"
        )
    if not top_k_weights.is_floating_point():
        raise ValueError(
            f"{path}: expected top_k_weights [T, K] of a floating dtype, got {top_k_weights.dtype}; convert it with .float()"
        )


def expect_not_quantised(experts: nn.Module, path: str) -> None:
    """Raise for weights that mean something with their scales only."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        weights = getattr(experts, name, None)
        if isinstance(weights, Tensor) and (is_quantised(weights.dtype) or is_integer(weights.dtype)):
            raise ValueError(
                f"{path}: expected {name} in bfloat16, got {weights.dtype} ({type(experts).__name__}), whose numbers are "
                f"quantised; {DEQUANTISE}"
            )


def _expect_plain(path: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and autocasts_to_bfloat16(tensor.device):
            continue
        if tensor.dtype != torch.bfloat16:
            raise ValueError(
                f"{path}: expected {name} in bfloat16, got {tensor.dtype}; load the model with dtype=torch.bfloat16, call "
                "it under torch.autocast to bfloat16, shard it first by fully_shard with "
                f"mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), or {OTHERWISE}"
            )
        if type(tensor) not in _PLAIN_TYPES:
            raise ValueError(
                f"{path}: expected {name} to be a plain tensor, got {type(tensor).__name__}; load the model without "
                f"quantisation, shard it by fully_shard and call use_moe on the whole of it, or {OTHERWISE}"
            )


def autocasts_to_bfloat16(device: torch.device) -> bool:
    """Whether matrices are multiplied in bfloat16 by torch.autocast here."""
    if device.type == "meta":  # which autocast does not know
        return False
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


# class, its activation and its numbers -> the gate that it computes; None where the layer has none like it
_OWN_GATES: dict[tuple[object, ...], tuple[ActivationType, Gate] | None] = {}


def own_gate_of(experts: nn.Module, path: str) -> tuple[ActivationType, Gate]:
    """The layer's gate that does what the module's own `_apply_gate` does.

    Raises:
        ValueError: the layer has none.
    """
    gate = _known_gate_of(experts, path)
    if gate is None:
        raise ValueError(
            f"{path}._apply_gate: expected silu or gelu of the gate times up, or SwiGLU with a limit, alpha and up + 1, got a "
            f"gate of its own; {OTHERWISE}"
        )
    return gate


def _known_gate_of(experts: nn.Module, path: str) -> tuple[ActivationType, Gate] | None:
    limit = getattr(experts, "swiglu_limit", getattr(experts, "limit", None))
    alpha = getattr(experts, "swiglu_alpha", getattr(experts, "alpha", None))
    activation = getattr(experts, "act_fn", None)
    caps = [getattr(getattr(activation, name, None), "softcap", None) for name in ("gate_softcap", "up_softcap")]
    key = (type(experts), _name_of(activation), limit, alpha, *caps)
    if key not in _OWN_GATES:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{path}._apply_gate: expected a gate that was tried before; call check_model, then compile"
            )
        _OWN_GATES[key] = next((known for known in _gates(limit, alpha, *caps) if _is_gate_of(experts, *known)), None)
    return _OWN_GATES[key]


def _gates(*known: object) -> Iterator[tuple[ActivationType, Gate]]:
    """What a gate may be that knows these numbers, if it uses them: a limit, alpha, and soft caps of gate and up."""
    numbers = [value if isinstance(value, (int, float)) and not isinstance(value, bool) else None for value in known]
    limit, alpha, gate_cap, up_cap = numbers
    for clamp_limit in dict.fromkeys((None, limit)):
        for factor in dict.fromkeys((None, alpha)):
            for beta in (None, 1.0):
                yield ActivationType.Swiglu, Gate(factor, beta, clamp_limit)
    yield ActivationType.Geglu, Gate()
    yield ActivationType.GegluTanh, Gate()
    if limit is not None:
        yield ActivationType.SwigluStep, Gate(clamp_limit=limit)
    if gate_cap is not None and up_cap is not None:
        yield ActivationType.Situ, Gate(gate_cap, up_cap)


def _is_gate_of(experts: nn.Module, activation: ActivationType, gate: Gate) -> bool:
    """Whether the module's gate does what ours does, tried on numbers of all sizes that matter in float32."""
    line = torch.linspace(-24, 24, 97)
    pairs = torch.cartesian_prod(line, line)  # [N, 2]
    gates, ups = pairs.T.reshape(2, -1, 97)
    rows = torch.cat((gates, ups), dim=-1)
    is_concatenated = getattr(experts, "is_concatenated", True)
    own_rows = rows if is_concatenated else torch.stack((gates, ups), dim=-1).flatten(-2)
    try:
        with torch.no_grad():
            own = cast(Any, experts)._apply_gate(own_rows)
    except Exception:  # whatever code of somebody else raises: it is not the function
        return False
    config = GemmConfig(num_experts=1, in_features=8, out_features=8, activation=activation)
    numbers = (None if number is None else torch.tensor([number], dtype=torch.float64) for number in gate)
    ours = activate_reference(rows.double(), 0, config, SwigluParams(*numbers))
    return own.shape == gates.shape and torch.allclose(own.double(), ours, 1e-4, 1e-5)


# What a class of transformers or torch computes of the gate, times up, and of a product without a gate.
_OF_GATE = {
    "SiLU": ActivationType.Swiglu,
    "SiLUActivation": ActivationType.Swiglu,
    "GELUActivation": ActivationType.Geglu,
    "GELUTanh": ActivationType.GegluTanh,
    "PytorchGELUTanh": ActivationType.GegluTanh,
    "NewGELUActivation": ActivationType.GegluTanh,
}
_OF_PRODUCT = {
    "SiLU": ActivationType.Silu,
    "SiLUActivation": ActivationType.Silu,
    "GELUActivation": ActivationType.Gelu,
    "ReLU": ActivationType.Relu,
    "ReLUSquaredActivation": ActivationType.Relu2,
    "Identity": ActivationType.Identity,
    "LinearActivation": ActivationType.Identity,
}


def _known_activation(activation: Any, has_gate: bool) -> ActivationType | None:
    """The layer's for a module or a function, by its name; None where the layer has none like it."""
    if activation is nn.functional.silu:
        return ActivationType.Swiglu if has_gate else ActivationType.Silu
    name = type(activation).__name__
    if name == "GELU":  # torch's, of two kinds
        name = {"none": "GELUActivation", "tanh": "GELUTanh"}.get(getattr(activation, "approximate", ""), name)
    return (_OF_GATE if has_gate else _OF_PRODUCT).get(name)


def _name_of(function: Callable[..., Any] | None) -> str:
    return getattr(function, "__name__", type(function).__name__)
