"""Which routing rule, over how many experts."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from moe.base_config import Count, CountOrZero, Factor, FrozenConfig
from moe.checks import expect, expect_separate, is_as_expected, plain_number


class RoutingMethodType(IntEnum):
    """The numbers of flashinfer's `routing_method_type` argument, as its documentation page of the op has them."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    Unspecified = 9


class RoutingMethod(str, Enum):
    """Routing rules by name: how an expert's key for the top-k and its weight come from its logit x.

    sig(x) = 0.5 tanh(x / 2) + 0.5; s = routed_scaling_factor; sums run over the K chosen experts.
    """

    DEFAULT = "Default"  # key and weight: softmax over all E
    RENORMALIZE = "Renormalize"  # key x; weight: softmax over the K chosen
    DEEPSEEK_V3 = "DeepSeekV3"  # key sig(x) + bias, best groups first; weight s sig / (sum sig + 1e-20)
    LLAMA4 = "Llama4"  # K = 1; key x; weight sig(x), on the expert's output
    RENORMALIZE_NAIVE = "RenormalizeNaive"  # the same as Renormalize
    TOPK = "TopK"  # key and weight: x
    SIGMOID_RENORM = "SigmoidRenorm"  # key sig(x); weight sig / max(sum sig, 1e-20), or sig without norm_topk_prob
    MINIMAX2 = "MiniMax2"  # key sig(x) + bias; weight s sig / (sum sig + 1e-20)
    SIGMOID = "Sigmoid"  # key and weight: sig(x)
    TOPK_SIGMOID = "TopKSigmoid"  # key x; weight sig(x)

    @property
    def uses_bias(self) -> bool:
        return self in (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)


REPLAY_DTYPE = torch.int16
MAX_EXPERTS = 1 << 15  # expert ids are recorded as int16
LOGITS_DTYPES = (torch.float32, torch.bfloat16)
BIAS_DTYPES = (torch.bfloat16, torch.float32)


class RoutingConfig(FrozenConfig):
    """Stage 1: the rule that turns logits [T, E] into K experts a token and their weights.

    `method` also takes a RoutingMethodType or its number.
    """

    num_experts: Count = Field(le=MAX_EXPERTS)
    top_k: Count
    method: RoutingMethod = RoutingMethod.RENORMALIZE
    n_group: CountOrZero = 0  # DeepSeekV3: groups of neighbouring experts; 0 and 1 mean none
    topk_group: CountOrZero = 0  # DeepSeekV3: how many of them a token may use
    routed_scaling_factor: Factor = 1.0  # DeepSeekV3 and MiniMax2
    norm_topk_prob: bool = True  # SigmoidRenorm

    @field_validator("method", mode="before")
    @classmethod
    def _by_name_or_number(cls, value: Any) -> Any:
        value = plain_number(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if value == RoutingMethodType.Unspecified:
            raise ValueError(
                "routing_method_type 9: expected one of 0 to 8; 9 is Unspecified here and in flashinfer's documentation "
                "page, and TopKSigmoid in newer flashinfer (where 10 is Unspecified); for top-k on raw logits followed by "
                "a sigmoid use RoutingConfig(method='TopKSigmoid')"
            )
        try:
            return RoutingMethod(RoutingMethodType(value).name)
        except ValueError:
            known = ", ".join(f"{m.value} {m.name}" for m in RoutingMethodType if m != RoutingMethodType.Unspecified)
            raise ValueError(
                f"Unimplemented routing method of enum {value}: expected one of {known}, got {value}"
            ) from None

    @model_validator(mode="after")
    def _fits(self) -> RoutingConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts: got top_k={self.top_k}, num_experts={self.num_experts}"
            )
        if self.method is RoutingMethod.LLAMA4 and self.top_k != 1:
            raise ValueError(
                f"For Llama routing method, must have topK == 1: got top_k={self.top_k}; only supports top_k=1."
            )
        if self.method is not RoutingMethod.DEEPSEEK_V3:
            for name in ("n_group", "topk_group"):
                if getattr(self, name) > 1:
                    raise ValueError(
                        f"{self.method.value} routing only supports {name} <= 1: got {name}={getattr(self, name)}; "
                        "leave it out, or use method DeepSeekV3"
                    )
        elif self.is_grouped:
            self._check_groups()
        return self

    def _check_groups(self) -> None:
        got = f"got num_experts={self.num_experts}, n_group={self.n_group}, topk_group={self.topk_group}, top_k={self.top_k}"
        if self.topk_group == 0:
            raise ValueError(f"if n_group is given, topk_group must be given: {got}; pass topk_group > 0")
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts must be divisible by n_group: {got}")
        if self.topk_group > self.n_group:
            raise ValueError(f"n_group must not be smaller than topk_group.: {got}")
        if self.num_experts // self.n_group < 2:
            raise ValueError(
                f"a group must have two experts at least, since its score is the sum of its two best: {got}"
            )
        if self.top_k > self.topk_group * (self.num_experts // self.n_group):
            raise ValueError(
                f"top_k must be less than total number of experts in selected groups, or equal to it: {got}; "
                "raise topk_group or lower top_k"
            )

    @property
    def is_grouped(self) -> bool:
        """Whether experts are chosen within the best groups only."""
        return self.n_group > 1

    def check(self, logits: Tensor, bias: Tensor | None, replay_out: Tensor | None) -> None:
        """Raise unless the tensors fit this config: logits [T, E], bias [E] or None, replay_out [>=T, K] int16 or None."""
        dims = {"E": self.num_experts, "K": self.top_k}
        if not self._takes_logits(logits):
            expect("routing_logits", logits, "T E", dims, dtype=LOGITS_DTYPES, words=_LOGITS_WORDS)
        if bias is not None:
            expect("routing_bias", bias, "E", dims, dtype=BIAS_DTYPES, device=logits.device, words=_BIAS_WORDS)
        if replay_out is not None:
            self.check_replay(replay_out, logits.shape[0], logits.device)
            expect_separate("routing_replay_out", replay_out, {"routing_logits": logits, "routing_bias": bias})

    def _takes_logits(self, logits: Tensor) -> bool:
        """Whether logits are as `check` wants them: told without messages, which take time to make."""
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            return False
        dtype = logits.dtype
        return dtype in LOGITS_DTYPES and is_as_expected(logits, (logits.shape[0], self.num_experts), dtype)

    def check_replay(self, replay_out: Tensor, num_tokens: int, device: torch.device) -> None:
        """Raise unless replay_out is [>=num_tokens, K] int16, contiguous, on `device`."""
        words = _REPLAY_WORDS | {"K": f"routing_replay_out dim1 must equal top_k={self.top_k}."}
        dims = {"K": self.top_k}
        expect("routing_replay_out", replay_out, "rows K", dims, dtype=REPLAY_DTYPE, device=device, words=words)
        if replay_out.shape[0] < num_tokens:
            raise ValueError(
                f"routing_replay_out: expected at least num_tokens={num_tokens} rows, got {replay_out.shape[0]}; "
                "allocate it for the largest batch"
            )


_LOGITS_WORDS = {
    "rank": "routing_logits must be 2D.",
    "E": "routing_logits dim1 must match num_experts.",
    "dtype": "routing_logits must be float or bfloat16.",
}
_BIAS_WORDS = {
    "rank": "routing_bias must be 1D.",
    "E": "routing_bias has incorrect shape.",
    "dtype": "routing_bias must be bfloat16 or float.",
}
_REPLAY_WORDS = {
    "rank": "routing_replay_out must be 2D [num_tokens, top_k].",
    "dtype": "routing_replay_out must be int16.",
    "strides": "routing_replay_out must be contiguous (packed row-major).",
}
