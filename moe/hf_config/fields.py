"""One layer's fields from a whole model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.hf_config.families import FAMILIES, REFUSED, RUN_BY_NOTHING, Family
from moe.hf_config.keys import ALIASES, BY_HAND, NUM_EXPERTS_KEYS, TOP_K_KEYS, Keys
from moe.hf_config.layers import config_of_layer, configs_by_layer, num_layers_of, why_without_experts
from moe.hf_config.stated import LIMIT_KEYS, expect_nothing_else


def layer_fields(config: Mapping[str, Any] | Any, layer: int | None = None) -> dict[str, Any]:
    """Arguments of `MoEConfig.create` for the MoE layers of the model that `config` describes.

    Args:
        config: the content of config.json, or a transformers config. Where it has a `text_config` (or a `thinker_config`
            that has one), that is read.
        layer: which layer, counted from 0; None for all, where they are alike.

    Returns:
        hidden_size, intermediate_size (of one expert), num_experts, top_k, the routing rule, the activation, and the
        weight format in which transformers holds the experts. All come from `config`: defaults of transformers' classes
        are never used, since released checkpoints differ from them.

    Raises:
        TypeError: not a mapping, or a layer that is no number.
        ValueError: an unknown model_type, a key that is missing or says something that is not computed, layers that
            differ, or a layer without experts.
    """
    model_type, family, config = _model_of(config)
    names = (*family.intermediate_size, *LIMIT_KEYS, *(name for names in ALIASES for name in names))
    if layer is not None:
        _expect_layer(model_type, config, layer)
        return _fields(model_type, family, config_of_layer(config, layer, names))
    configs = configs_by_layer(config, names)
    if not configs:
        return _fields(model_type, family, config)
    fields = {layer: _fields(model_type, family, own) for layer, own in configs.items()}
    _expect_alike(model_type, fields)
    return next(iter(fields.values()))


def _model_of(config: Mapping[str, Any] | Any) -> tuple[str, Family, Mapping[str, Any]]:
    """The type of the text model, its family and its config."""
    if not isinstance(config, Mapping) and callable(to_dict := getattr(config, "to_dict", None)):
        config = to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a mapping, got {type(config).__name__}; "
            "pass json.load(...) of config.json, or the model's config"
        )
    model_type = config.get("model_type")
    for part in ("thinker_config", "text_config"):
        if isinstance(config.get(part), Mapping):
            config = config[part]
            model_type = config.get("model_type") or model_type
    model_type = str(model_type)
    family_name = model_type.removesuffix("_text")
    if family_name in REFUSED:
        otherwise = "; moe.integrations.huggingface.use_moe runs a whole model of it"
        raise ValueError(
            f"model_type {model_type!r}: {REFUSED[family_name]}{'' if family_name in RUN_BY_NOTHING else otherwise}"
        )
    if family_name not in FAMILIES:
        raise ValueError(
            f"model_type: expected one of {', '.join(sorted(FAMILIES))}; got {model_type!r}; "
            f"for another model {BY_HAND}"
        )
    return model_type, FAMILIES[family_name], config


def _fields(model_type: str, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    keys = Keys(model_type, config)
    fields = {
        "hidden_size": _hidden_size(keys),
        "intermediate_size": keys.count(*family.intermediate_size),
        "num_experts": keys.count(*NUM_EXPERTS_KEYS),
        "top_k": keys.count(*TOP_K_KEYS),
        "activation": _activation(keys),
        "weight_format": {"layout": family.weight_layout},
    }
    fields |= family.routing(keys)
    expect_nothing_else(keys, fields, family)
    return fields


def _hidden_size(keys: Keys) -> int:
    # Nemotron-H may project tokens to a narrower space before its experts and back after them.
    return keys.count("moe_latent_size") if keys.config.get("moe_latent_size") else keys.count("hidden_size")


def _activation(keys: Keys) -> str:
    key = next((key for key in ("mlp_hidden_act", "activation_function") if key in keys.config), "hidden_act")
    name = keys.value(key)
    is_gated = keys.model_type != "nemotron_h"
    if is_gated and name in ("silu", "swish"):
        return "Swiglu"
    if not is_gated and name == "relu2":
        return "Relu2"
    wanted = "'silu', of gated experts" if is_gated else "'relu2', of experts without a gate"
    raise keys.refusal(f"expected {key} {wanted}; got {name!r}")


def _expect_layer(model_type: str, config: Mapping[str, Any], layer: int) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer: expected an int, got {type(layer).__name__}; pass the number of a layer, from 0 on")
    num_layers = num_layers_of(config)
    if layer < 0 or (num_layers is not None and layer >= num_layers):
        last = "" if num_layers is None else f" to {num_layers - 1}"
        raise ValueError(
            f"layer: expected 0{last or ' or more'}, got {layer}; layers of a {model_type!r} are counted from 0"
        )
    reason = why_without_experts(config, layer)
    if reason is not None:
        raise ValueError(f"layer: expected one with experts, got {layer}, which has none by {reason}; pass another")


def _expect_alike(model_type: str, fields_of_layer: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise, naming the layers, unless all have the same fields."""
    names = dict.fromkeys(name for fields in fields_of_layer.values() for name in fields)
    found = []
    for name in names:
        layers_of_value: dict[str, list[int]] = {}
        for layer, fields in fields_of_layer.items():
            layers_of_value.setdefault(repr(fields.get(name)), []).append(layer)
        if len(layers_of_value) > 1:
            found.append(f"{name} is " + ", ".join(f"{v} in {_named(layers)}" for v, layers in layers_of_value.items()))
    if found:
        raise ValueError(
            f"config of model_type {model_type!r}: its layers differ: {'; '.join(found)}; "
            "pass layer=... for the config of one of them"
        )


def _named(layers: list[int]) -> str:
    """As "layers 0 to 2 and 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {' and '.join(words)}"
