"""Stages 2 to 5 for few tokens: which experts lie here, both GEMMs, and up to how many tokens they are faster so."""

from __future__ import annotations

import functools

from pydantic import Field, model_validator

from moe.base_config import Count, CountOrZero, FrozenConfig, PowerOfTwo
from moe.gemm.config import ACTIVATIONS as ACTIVATIONS_OF_FAMILIES
from moe.gemm.config import GemmConfig, WeightLayout
from moe.permute.config import PermuteConfig

ACTIVATIONS = ACTIVATIONS_OF_FAMILIES["portable"]  # what the few-token gemm1 computes, by the same functions
LAYOUTS = (WeightLayout.MajorK, WeightLayout.BlockMajorK)  # neighbours in the contraction are neighbours in memory
MAX_COLUMN_BLOCKS = 65535  # the grid's second axis
# A slot streams its expert's weights by itself, so an expert chosen twice is read twice: from L2 in part, at about a fifth of
# the cost of a first read. Up to so many bytes of second reads that is less than what the launches of the grouped chain cost.
MAX_REREAD_BYTES = 240e6
MIN_REREAD_BYTES = 6.4e6  # what a second read of a small expert costs: latency, not bytes
MAX_SLOTS_OF_SLICE = 16  # above, the programs of absent slots have nothing to do and the others too little


class MatvecTile(FrozenConfig):
    """What one program computes of a matrix-vector product, and with how many warps."""

    block_n: PowerOfTwo = Field(le=64)  # output columns
    block_k: PowerOfTwo = Field(ge=64, le=4096)  # elements of the contraction a step
    num_warps: PowerOfTwo = Field(default=1, le=16)
    num_prefetched: int = Field(default=0, ge=0, le=32)  # steps of W2 loaded before a dependent launch waits
    max_registers: int | None = Field(default=None, ge=32, le=255)  # a thread's; None: `streaming_registers` says it


class FewTokenTiles(FrozenConfig):
    """Up to how many tokens the few-token kernels run, and their tiles."""

    max_tokens: int | None = Field(default=None, ge=0, strict=True)  # None: FewTokenConfig.max_tokens; 0: never
    slot_tile: MatvecTile | None = None  # None: default_slot_tile (moe/fused/few_tokens/tile.py)
    token_tile: MatvecTile | None = None  # None: default_token_tile


class FewTokenConfig(FrozenConfig):
    """Experts [local_expert_offset, local_expert_offset + gemm1.num_experts) of num_experts lie here."""

    num_experts: Count
    top_k: Count
    gemm1: GemmConfig
    gemm2: GemmConfig
    local_expert_offset: CountOrZero = 0
    slot_tile: MatvecTile | None = None  # None: default_slot_tile
    token_tile: MatvecTile | None = None  # None: default_token_tile
    uses_pdl: bool = False  # programmatic dependent launches, where the GPU has them (compute capability 9.0 and up)

    @model_validator(mode="after")
    def _stages_agree(self) -> FewTokenConfig:
        pairs = (("num_experts", "num_experts"), ("out_features", "in_features"), ("in_features", "out_features"))
        for first, second in pairs:
            values = getattr(self.gemm1, first), getattr(self.gemm2, second)
            if values[0] != values[1]:
                raise ValueError(f"stages disagree: gemm1.{first}={values[0]} but gemm2.{second}={values[1]}")
        if self.local_expert_offset + self.gemm1.num_experts > self.num_experts:
            raise ValueError(
                f"local_expert_offset: expected at most num_experts - gemm1.num_experts = "
                f"{self.num_experts - self.gemm1.num_experts}, got {self.local_expert_offset}"
            )
        if self.gemm1.activation is None or self.gemm2.activation is not None:
            raise ValueError(
                "activation: expected one in gemm1 and none in gemm2, "
                f"got {self.gemm1.activation!r} and {self.gemm2.activation!r}"
            )
        if self.gemm1.activation not in ACTIVATIONS:
            names = " or ".join(member.name for member in ACTIVATIONS)
            raise ValueError(
                f"gemm1.activation: expected {names}, got {self.gemm1.activation.name}; permute the tokens"
            )
        if not takes(self.gemm1, self.gemm2):
            raise ValueError(
                f"weight_format.layout: expected MajorK or BlockMajorK and at most {MAX_COLUMN_BLOCKS} columns, got "
                f"{self.gemm1.weight_format.layout.name} and {self.gemm2.weight_format.layout.name}; permute the tokens"
            )
        return self

    @classmethod
    def of_stages(
        cls,
        permute: PermuteConfig,
        gemm1: GemmConfig,
        gemm2: GemmConfig,
        tiles: FewTokenTiles = FewTokenTiles(),
        *,
        uses_pdl: bool = False,
    ) -> FewTokenConfig | None:
        """What the few-token kernels make of a layer's stages; None where they do not take it."""
        if not takes(gemm1, gemm2):
            return None
        return cls(
            num_experts=permute.num_experts,
            top_k=permute.top_k,
            gemm1=gemm1,
            gemm2=gemm2,
            local_expert_offset=permute.local_expert_offset,
            slot_tile=tiles.slot_tile,
            token_tile=tiles.token_tile,
            uses_pdl=uses_pdl,
        )

    def is_of_stages(self, permute: PermuteConfig, gemm1: GemmConfig, gemm2: GemmConfig) -> bool:
        """Whether tensors that fit a layer of these stages fit this config too."""
        mine = (self.num_experts, self.top_k, self.local_expert_offset, self.gemm1, self.gemm2)
        return mine == (permute.num_experts, permute.top_k, permute.local_expert_offset, gemm1, gemm2)

    @property
    def is_slice(self) -> bool:
        """Whether some experts lie elsewhere."""
        return self.gemm1.num_experts < self.num_experts

    @property
    def triggers_early(self) -> bool:
        """Whether a dependent launch lets the next kernel's programs start before its own have ended.

        Not with a slice: the next programs would crowd where those of absent slots leave at once.
        """
        return not self.is_slice

    @functools.cached_property
    def max_tokens(self) -> int:
        """Most tokens for which this is faster than permuting them: one at the least."""
        if self.is_slice:
            return max(1, MAX_SLOTS_OF_SLICE // self.top_k)
        num_tokens = 1
        while (
            self._reread_bytes(num_tokens + 1) <= MAX_REREAD_BYTES
            and (num_tokens + 1) * self.top_k <= 2 * self.num_experts
        ):
            num_tokens += 1
        return num_tokens

    def _reread_bytes(self, num_tokens: int) -> float:
        """Bytes of weights read again, where each token chooses evenly among the experts."""
        num_slots = num_tokens * self.top_k
        num_active = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)
        gemms = (self.gemm1, self.gemm2)
        bytes_of_expert = sum(2 * gemm.weight_rows * gemm.in_features for gemm in gemms)
        return (num_slots - num_active) * max(bytes_of_expert, MIN_REREAD_BYTES)


def takes(gemm1: GemmConfig, gemm2: GemmConfig) -> bool:
    """Whether the few-token kernels compute this activation, and read these weights."""
    return gemm1.activation in ACTIVATIONS and all(
        gemm.weight_format.layout in LAYOUTS and gemm.out_features <= MAX_COLUMN_BLOCKS for gemm in (gemm1, gemm2)
    )
