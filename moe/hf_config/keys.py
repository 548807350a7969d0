"""Typed access to the keys of one layer's config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")
NORM_KEYS = ("norm_topk_prob", "moe_renormalize", "route_norm")
SCALE_KEYS = (
    "routed_scaling_factor",
    "router_scaling_factor",
    "moe_router_scaling_factor",
    "moe_routed_scaling_factor",
    "route_scale",
)
N_GROUP_KEYS = ("n_group", "num_expert_group", "num_expert_groups")
TOPK_GROUP_KEYS = ("topk_group", "num_limited_groups")
# Names of one thing: a layer's own value under one of them takes the place of the model's under another.
ALIASES = (NUM_EXPERTS_KEYS, TOP_K_KEYS, NORM_KEYS, SCALE_KEYS, N_GROUP_KEYS, TOPK_GROUP_KEYS)

BY_HAND = (
    "build it by hand: MoEConfig.create(hidden_size=..., intermediate_size=..., num_experts=..., top_k=..., method=...)"
)


@dataclass(frozen=True)
class Keys:
    """An absent key and a null are both missing."""

    model_type: str
    config: Mapping[str, Any]

    def value(self, *names: str) -> Any:
        """The value under the one of these names that is there."""
        found = self.given(names)
        if not found:
            wanted = " or ".join(map(repr, names))
            raise ValueError(f"config of model_type {self.model_type!r}: expected the key {wanted}, got none; add it")
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise ValueError(f"config of model_type {self.model_type!r}: expected one value, got {found}; keep one key")
        return values[0]

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """The keys of these names that have a value."""
        return {name: self.config[name] for name in names if self.config.get(name) is not None}

    def count(self, *names: str) -> int:
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(f"expected one whole number for {' or '.join(names)}, got {value!r}")
        return value

    def flag(self, *names: str) -> bool:
        value = self.value(*names)
        if not isinstance(value, bool):
            raise self.refusal(f"expected true or false for {' or '.join(names)}, got {value!r}")
        return value

    def group_count(self, *names: str) -> int:
        """0 for a null; a key that is absent is an error."""
        return 0 if self._is_null(names) else self.count(*names)

    def scale(self, *names: str) -> float:
        """1 for a null; a key that is absent is an error."""
        return 1.0 if self._is_null(names) else self.positive(*names)

    def positive(self, *names: str) -> float:
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refusal(f"expected a number for {' or '.join(names)}, got {value!r}")
        if not 0 < value < math.inf:
            raise self.refusal(f"expected {' or '.join(names)} above 0, got {value!r}")
        return float(value)

    def _is_null(self, names: Iterable[str]) -> bool:
        return not self.given(names) and any(name in self.config for name in names)

    def refusal(self, what: str) -> ValueError:
        return ValueError(f"config of model_type {self.model_type!r}: {what}; {BY_HAND}")
