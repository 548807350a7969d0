"""What holds in which layer of a model: overrides and lists by layer, and layers without experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe.hf_config.keys import ALIASES

OVERRIDES = "per_layer_config"  # transformers 5.24: layer -> the keys that differ there
_ALIASES_OF = {name: names for names in ALIASES for name in names}


def num_layers_of(config: Mapping[str, Any]) -> int | None:
    """How many layers the model has; None where the config does not say."""
    number = config.get("num_hidden_layers")
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    return len(_kinds_of_layers(config)) or None


def config_of_layer(config: Mapping[str, Any], layer: int, names: Sequence[str]) -> dict[str, Any]:
    """`config` as it holds in one layer.

    Args:
        names: keys that may hold a list, one value a layer.

    Raises:
        ValueError: a list that is not of one value a layer.
    """
    own = _overrides(config).get(layer, {})
    replaced = {alias for name in own for alias in _ALIASES_OF.get(name, (name,))}
    result = {name: value for name, value in config.items() if name not in replaced and name != OVERRIDES} | dict(own)
    num_layers = num_layers_of(config)
    for name in names:
        values = result.get(name)
        if not isinstance(values, (list, tuple)):
            continue
        if layer >= len(values) or len(values) != (num_layers or len(values)):
            wanted = "" if num_layers is None else f" ({num_layers})"
            raise ValueError(
                f"{name}: expected one value, or one a layer{wanted}, got {len(values)}: {list(values)[:8]}; "
                "give each layer its own"
            )
        result[name] = values[layer]
    return result


def configs_by_layer(config: Mapping[str, Any], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """`config_of_layer` of all layers with experts; empty where no key says that layers differ.

    Where the config does not say how many there are: up to the last that it names, and one that is as the rest are.
    """
    overrides = _overrides(config)
    lengths = [len(values) for name in names if isinstance(values := config.get(name), (list, tuple))]
    if not overrides and not lengths:
        return {}
    num_layers = num_layers_of(config) or max([*lengths, *(layer + 2 for layer in overrides)])
    return {
        layer: config_of_layer(config, layer, names)
        for layer in range(num_layers)
        if why_without_experts(config, layer) is None
    }


def why_without_experts(config: Mapping[str, Any], layer: int) -> str | None:
    """The key by which a layer has no routed experts, and its value; None where no key says so."""
    return next((f"{name}={value!r}" for name, value in _dense_by(config, layer)), None)


def _dense_by(config: Mapping[str, Any], layer: int) -> Iterator[tuple[str, Any]]:
    own = _overrides(config).get(layer, {})
    config = {**config, **own}
    skipped = own.get("skip") or ()
    if not all("att" in str(name) for name in skipped):  # attention may be skipped beside experts
        yield f"skip of layer {layer}", skipped
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(first := config.get(name), int) and layer < first:
            yield name, first
    if layer in (config.get("mlp_only_layers") or ()):
        yield "mlp_only_layers", config["mlp_only_layers"]
    for name, dense in (("mlp_layer_types", "dense"), ("moe_layer_freq", 0)):
        kinds = config.get(name)
        if isinstance(kinds, (list, tuple)) and layer < len(kinds) and kinds[layer] == dense:
            yield f"{name}[{layer}]", dense
    if isinstance(sparse := config.get("moe_layers"), (list, tuple)) and layer not in sparse:
        yield "moe_layers", sparse
    kinds = _kinds_of_layers(config)
    if "moe" in kinds and layer < len(kinds) and kinds[layer] != "moe":
        yield f"layers_block_type[{layer}]", kinds[layer]
    for name, number, remainder in (
        ("decoder_sparse_step", layer + 1, 0),
        *([] if config.get("moe_layers") else [("interleave_moe_layer_step", layer + 1, 0)]),
        ("moe_layer_freq", layer, 0),
        ("expert_layer_period", layer, config.get("expert_layer_offset", 0)),
    ):
        period = config.get(name)
        if isinstance(period, int) and period > 0 and number % period != remainder:
            yield name, period


def _kinds_of_layers(config: Mapping[str, Any]) -> Sequence[str]:
    kinds = config.get("layers_block_type")
    return kinds if isinstance(kinds, (list, tuple)) else ()


def _overrides(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    overrides = config.get(OVERRIDES) or {}
    try:
        return {int(layer): {**keys} for layer, keys in overrides.items() if keys}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{OVERRIDES}: expected a mapping of layer numbers to keys, got {str(overrides)[:80]}; mend the config"
        ) from error
