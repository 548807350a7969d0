"""Where a model, a state dict or a pair of tensors has the weights of one layer's experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.checks import expect
from moe.config import MoEConfig
from moe.flow import SwigluParams
from moe.gemm.config import GemmConfig, WeightFormat

_BY_PIPELINE = "use moe.build_pipeline"
BY_HAND = "pass (w1, w2) and a MoEConfig with the weight_format in which they lie"

Numbers = tuple[float | None, float | None, float | None]  # alpha, beta, clamp_limit, of all experts alike


class LayerWeights(NamedTuple):
    """One layer's weights, those that lie here, as `config` says."""

    w1: Tensor
    w2: Tensor
    config: MoEConfig
    swiglu: SwigluParams

    @property
    def swiglu_or_none(self) -> SwigluParams | None:
        return None if self.swiglu == SwigluParams() else self.swiglu


def find_layer(source: Any, config: Any, layer: int | None, offset: int | None, count: int | None) -> LayerWeights:
    if not isinstance(config, MoEConfig):
        config = MoEConfig.from_hf_config(config, layer=layer)
    offset = config.permute.local_expert_offset if offset is None else offset
    if count is None:
        count = config.permute.num_local_experts
        count = min(count, config.num_experts - offset)
    config = _sliced(config, offset, count)
    _expect_flat(config)
    numbers_given = config.swiglu
    gate: Numbers = (None, None, None)
    if numbers_given is not None:
        gate = (numbers_given.alpha, numbers_given.beta, numbers_given.clamp_limit)
    if isinstance(source, nn.Module):
        source, config, gate = _of_module(source, config, layer)
    elif isinstance(source, Mapping):
        source = _of_state_dict(source, config, layer)
    elif not isinstance(source, (tuple, list)) or len(source) != 2:
        raise TypeError(f"source: expected a module, a state dict or (w1, w2), got {type(source).__name__}; {BY_HAND}")
    w1, w2 = (_local(*both, config) for both in zip(("w1", "w2"), source, (config.gemm1, config.gemm2)))
    numbers = (
        None if value is None else torch.full((count,), value, dtype=torch.float32, device=w1.device) for value in gate
    )
    return LayerWeights(w1, w2, config, SwigluParams(*numbers))


def _expect_flat(config: MoEConfig) -> None:
    """Raise for what the flat call has no argument for."""
    if config.has_biases:
        raise ValueError(
            f"config: expected experts without biases, got has_biases; the flat call takes none: {_BY_PIPELINE}"
        )
    if config.weighs_input:
        raise ValueError(
            f"config: expected weight_on 'output', got 'input'; the flat call weighs results: {_BY_PIPELINE}"
        )


def _sliced(config: MoEConfig, offset: int, count: int) -> MoEConfig:
    experts = {"num_experts": count}
    return config.model_copy(
        update={
            "permute": config.permute.model_copy(update={"local_expert_offset": offset, "num_local_experts": count}),
            "gemm1": config.gemm1.model_copy(update=experts),
            "gemm2": config.gemm2.model_copy(update=experts),
        }
    )


def _local(name: str, weights: Tensor, gemm: GemmConfig, config: MoEConfig) -> Tensor:
    """The experts that lie here, of those or of all."""
    if isinstance(weights, Tensor) and weights.dim() and weights.shape[0] == config.num_experts:
        first = config.permute.local_expert_offset
        weights = weights[first : first + config.permute.num_local_experts]
    shape = " ".join(map(str, gemm.weight_shape))
    words = {
        "rank": f"{gemm.weight_format.layout.name} weights of {gemm.num_experts} experts, or of all {config.num_experts}."
    }
    expect(name, weights, shape, {}, dtype=torch.bfloat16, words=words)
    return weights.detach()


def _of_module(
    module: nn.Module, config: MoEConfig, layer: int | None
) -> tuple[tuple[Tensor, Tensor], MoEConfig, Numbers]:
    """The weights of the one experts module within, and the config with the format in which it has them."""
    from moe.integrations.hf_experts import form_of, weights_of  # they import what loads triton
    from moe.integrations.hf_models import experts_of

    found = dict(experts_of(module))
    if len(found) > 1:
        found = {path: experts for path, experts in found.items() if layer is not None and f".{layer}." in f".{path}."}
    if len(found) != 1:
        paths = [path for path, _ in experts_of(module)]
        raise ValueError(
            f"source: expected the experts of one layer, got {len(paths)} ({paths[0]} ..), of which layer={layer} names "
            f"{len(found)}; pass layer=, or the experts module of the layer itself"
        )
    ((path, experts),) = found.items()
    form = form_of(experts, path)
    if form.activation is None or form.activation is not config.gemm1.activation:
        computed = "what no kernel computes" if form.activation is None else form.activation.name
        wanted = config.gemm1.activation_name
        raise ValueError(f"{path}: expected experts with {wanted}, got {computed}; the flat call cannot run them")
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"{path}: expected experts without a norm, got one after each; the flat call cannot run them")
    if form.has_bias:
        raise ValueError(f"{path}: expected experts without biases, got some; the flat call takes none: {_BY_PIPELINE}")
    weight_format = WeightFormat(layout=form.layout, gate_up_order="interleaved" if form.is_interleaved else "gate_up")
    gemms = {
        name: getattr(config, name).model_copy(update={"weight_format": weight_format}) for name in ("gemm1", "gemm2")
    }
    return weights_of(experts), config.model_copy(update=gemms), form.gate


_FUSED = re.compile(r"(.*\b)(gate_up_proj|up_proj|down_proj|input_linear|output_linear)(?:\.weight)?")
_APART = re.compile(r"(.*\bexperts\.)(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_BIAS = re.compile(r"(\d+\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|input_linear|output_linear)[._]bias")
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
_W1, _W2 = ("gate_up_proj", "up_proj", "input_linear"), ("down_proj", "output_linear")


def _of_state_dict(state: Mapping[str, Tensor], config: MoEConfig, layer: int | None) -> tuple[Tensor, Tensor]:
    """Both weights from a state dict, by the names of transformers' modules or of checkpoints."""
    of_prefix: dict[str, dict[tuple[str, int | None], Tensor]] = {}
    for name, tensor in state.items():
        if apart := _APART.fullmatch(name):
            prefix, expert, kind = apart.groups()
            of_prefix.setdefault(prefix, {})[kind, int(expert)] = tensor
        elif (fused := _FUSED.fullmatch(name)) and tensor.dim() == 3:
            of_prefix.setdefault(fused[1], {})[fused[2], None] = tensor
    prefixes = [
        prefix for prefix in of_prefix if len(of_prefix) == 1 or (layer is not None and f".{layer}." in f".{prefix}")
    ]
    if len(prefixes) != 1:
        raise ValueError(
            f"source: expected the experts of one layer in the state dict, got {len(of_prefix)} "
            f"({next(iter(of_prefix), 'none')} ..), of which layer={layer} names {len(prefixes)}; pass layer=, or the entries of "
            f"one layer, or {BY_HAND}"
        )
    entries = of_prefix[prefixes[0]]
    biases = [name for name in state if _BIAS.fullmatch(name.removeprefix(prefixes[0]))]
    if biases:
        raise ValueError(
            f"source: expected experts without biases, got {biases[0]}; the flat call takes none: {_BY_PIPELINE}"
        )
    if any(expert is None for _, expert in entries):
        return _entry(entries, _W1, None, prefixes[0]), _entry(entries, _W2, None, prefixes[0])
    return _stacked(entries, config, prefixes[0])


def _entry(
    entries: Mapping[tuple[str, int | None], Tensor], names: tuple[str, ...], expert: int | None, at: str
) -> Tensor:
    for name in names:
        if (name, expert) in entries:
            return entries[name, expert]
    where = at if expert is None else f"{at}{expert}."
    raise ValueError(f"source: expected {' or '.join(where + name for name in names)}, found none; {BY_HAND}")


def _stacked(entries: Mapping[tuple[str, int | None], Tensor], config: MoEConfig, prefix: str) -> tuple[Tensor, Tensor]:
    """The matrices of the experts that lie here, one an expert in the state dict, as MajorK tensors."""
    for gemm in (config.gemm1, config.gemm2):
        if gemm.weight_format != WeightFormat():
            raise ValueError(
                f"source: expected a config with weight_format MajorK and gate first, as {prefix}0. has its matrices, got "
                f"{gemm.weight_format!r}; leave weight_format out"
            )
    first, count = config.permute.local_expert_offset, config.permute.num_local_experts
    w1, w2 = [], []
    for expert in range(first, first + count):
        halves = (_GATE, _UP) if config.gemm1.is_gated else (_UP,)
        w1.append(torch.cat([_entry(entries, names, expert, prefix).detach() for names in halves]))
        w2.append(_entry(entries, _DOWN, expert, prefix).detach())
    return torch.stack(w1), torch.stack(w2)
