"""Stages 2 to 5 for few tokens: which experts lie here, both GEMMs, and how they are cut into programs."""

from __future__ import annotations

import functools

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe.base_config import Count, FrozenConfig, PowerOfTwo
from moe.checks import expect, expect_separate, expect_type, is_as_expected
from moe.flow import SwigluParams, TopK
from moe.gemm.checks import check_swiglu, check_weights
from moe.gemm.config import GemmConfig, WeightLayout

ELEMENTS_A_WARP = 256  # bf16 elements that a warp loads at once, 16 bytes a lane
MAX_BLOCK_K = 1024
LONG_ROW = 4096  # elements: from here on a row has enough of them for a warp, or for many programs
WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
MAX_COLUMN_BLOCKS = 65535  # the grid's second axis
# A slot streams its expert's weights by itself, so an expert chosen twice is read twice: from L2 in part, at about a fifth of
# the cost of a first read. Up to so many bytes of second reads that is less than what the launches of the grouped chain cost
# (12 us); on an H200 this told the faster way at T = 1 to 16 for six real layers.
MAX_REREAD_BYTES = 240e6
# A second read of a small expert costs as much as one of so many bytes: with experts of 2.4 MB (sonic-7b) the chain was 4 to 7%
# faster at 16 tokens and 23% at 24, where the rule above alone goes on to 25; at 12 it was slower.
MIN_REREAD_BYTES = 6.4e6
# With a slice of the experts, programs of absent slots have nothing to do and the others too little: at 32 slots the chain was
# 6 to 37% faster (deepseek-v3-ep8), at 16 as fast.
MAX_SLOTS_OF_SLICE = 16


class MatvecTile(FrozenConfig):
    """What one program computes of a matrix-vector product, and with how many warps."""

    block_n: PowerOfTwo = Field(le=64)  # output columns
    block_k: PowerOfTwo = Field(ge=64, le=4096)  # elements of the contraction a step
    num_warps: PowerOfTwo = Field(default=1, le=16)
    num_prefetched: int = Field(default=0, ge=0, le=32)  # steps of W2 loaded before a dependent launch waits


class FewTokenTiles(FrozenConfig):
    """Up to how many tokens the few-token kernels run, and their tiles."""

    max_tokens: int | None = Field(default=None, ge=0, strict=True)  # None: FewTokenConfig.max_tokens; 0: never
    slot_tile: MatvecTile | None = None  # None: default_slot_tile
    token_tile: MatvecTile | None = None  # None: default_token_tile


class FewTokenConfig(FrozenConfig):
    """Experts [local_expert_offset, local_expert_offset + gemm1.num_experts) of num_experts lie here."""

    num_experts: Count
    top_k: Count
    gemm1: GemmConfig
    gemm2: GemmConfig
    local_expert_offset: int = Field(default=0, ge=0)
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
        if not takes(self.gemm1, self.gemm2):
            raise ValueError(
                f"weight_format.layout: expected MajorK or BlockMajorK and at most {MAX_COLUMN_BLOCKS} columns, got "
                f"{self.gemm1.weight_format.layout.name} and {self.gemm2.weight_format.layout.name}; permute the tokens"
            )
        return self

    @property
    def is_slice(self) -> bool:
        """Whether some experts lie elsewhere."""
        return self.gemm1.num_experts < self.num_experts

    @property
    def triggers_early(self) -> bool:
        """Whether a dependent launch lets the next kernel's programs start before its own have ended.

        Not with a slice: the next programs would crowd where those of absent slots leave at once. On an H200 that took 1 to 2%
        longer in deepseek-v3-ep8 at one and at four tokens, and 10 to 20% with a column a program.
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

    def check(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        swiglu: SwigluParams | None,
        output: Tensor | None,
    ) -> None:
        """Raise unless all tensors fit: hidden_states [T, H], weights of weight_shape, output [T, H] of its own."""
        if swiglu is not None or not self._fit(topk, hidden_states, w1, w2):
            self.check_slots(topk, hidden_states, w1, swiglu)
            check_weights(self.gemm2, "gemm2_weights", w2, topk.expert_ids.device)
        if output is not None:
            read = {"hidden_states": hidden_states, "gemm1_weights": w1, "gemm2_weights": w2}
            self._check_output(topk, output, read)

    def _fit(self, topk: TopK, hidden_states: Tensor, w1: Tensor, w2: Tensor) -> bool:
        """Whether all of these pass their checks: told without messages, which take time to make."""
        if not isinstance(topk, TopK):
            return False
        ids, weights = topk.expert_ids, topk.weights
        if not isinstance(ids, Tensor) or not isinstance(weights, Tensor) or ids.dim() != 2:
            return False
        num_tokens, device = ids.shape[0], ids.device
        slots = (num_tokens, self.top_k)
        return (
            is_as_expected(ids, slots, torch.int32)
            and weights.dtype in WEIGHT_DTYPES
            and is_as_expected(weights, slots, weights.dtype, device)
            and is_as_expected(hidden_states, (num_tokens, self.gemm1.in_features), torch.bfloat16, device)
            and is_as_expected(w1, self.gemm1.weight_shape, torch.bfloat16, device)
            and is_as_expected(w2, self.gemm2.weight_shape, torch.bfloat16, device)
        )

    def check_slots(self, topk: TopK, hidden_states: Tensor, w1: Tensor, swiglu: SwigluParams | None) -> None:
        """Raise unless the tensors fit gemm1 of these slots."""
        dims = self._check_topk(topk) | {"H": self.gemm1.in_features}
        device = topk.expert_ids.device
        expect("hidden_states", hidden_states, "T H", dims, dtype=torch.bfloat16, device=device)
        check_weights(self.gemm1, "gemm1_weights", w1, device)
        check_swiglu(self.gemm1, swiglu, device)

    def check_tokens(self, topk: TopK, activation: Tensor, w2: Tensor, output: Tensor | None) -> None:
        """Raise unless the tensors fit gemm2 of these slots and the sum of its rows: activation [T * K, I] bf16."""
        dims = self._check_topk(topk)
        dims = {"slots": dims["T"] * self.top_k, "I": self.gemm2.in_features}
        device = topk.expert_ids.device
        expect("activation", activation, "slots I", dims, dtype=torch.bfloat16, device=device)
        check_weights(self.gemm2, "gemm2_weights", w2, device)
        self._check_output(topk, output, {"activation": activation, "gemm2_weights": w2})

    def _check_topk(self, topk: TopK) -> dict[str, int]:
        expect_type("topk", topk, TopK, "moe.TopK(expert_ids, weights) makes one")
        dims = {"K": self.top_k}
        expect("expert_ids", topk.expert_ids, "T K", dims, dtype=torch.int32)
        expect("expert_weights", topk.weights, "T K", dims, dtype=WEIGHT_DTYPES, device=topk.expert_ids.device)
        return dims

    def _check_output(self, topk: TopK, output: Tensor | None, read: dict[str, Tensor]) -> None:
        if output is None:
            return
        dims = {"T": topk.expert_ids.shape[0], "H": self.gemm2.out_features}
        expect("output", output, "T H", dims, dtype=torch.bfloat16, device=topk.expert_ids.device)
        expect_separate("output", output, {**read, "expert_ids": topk.expert_ids, "expert_weights": topk.weights})


def takes(gemm1: GemmConfig, gemm2: GemmConfig) -> bool:
    """Whether the few-token kernels read these weights: neighbours in the contraction must be neighbours in memory."""
    return all(
        gemm.weight_format.layout is not WeightLayout.MajorMn and gemm.out_features <= MAX_COLUMN_BLOCKS
        for gemm in (gemm1, gemm2)
    )


@functools.cache
def default_slot_tile(config: GemmConfig) -> MatvecTile:
    """gemm1: by the length of its rows, a column (gate and up) a program of four warps, or several.

    Many small programs ramp up and drain fastest, which is most of what is lost with one token. Where rows are long, a warp has
    enough to load with a column of its own, and four columns a program spare the programs of absent slots: a slice of the
    experts took 27.6 us so and 30.4 with a column a program. Registers hold what a warp has in flight, which limits the rest.
    The token count has no part in it, so a token alone has the bits that it has in a batch. Fastest of some fifteen tiles on an
    H200, or within 6% of it, in twelve layers at 1 to 8 tokens.
    """
    length = config.in_features
    if not config.is_gated or length <= ELEMENTS_A_WARP:
        block_k = _block_k(length, MAX_BLOCK_K)
        block_n = max(1, MAX_BLOCK_K // block_k)
        if not config.is_gated and not _masks_loads(config):
            block_n *= 2  # a column has one row of weights, not two
        return MatvecTile(block_n=block_n, block_k=block_k, num_warps=_num_warps(block_k))
    if length % ELEMENTS_A_WARP:
        return MatvecTile(block_n=2, block_k=512, num_warps=2)  # the last step is masked
    if length >= LONG_ROW:
        return MatvecTile(block_n=4, block_k=256, num_warps=4)
    if length % MAX_BLOCK_K == 0:
        return MatvecTile(block_n=1, block_k=1024, num_warps=4)
    return MatvecTile(block_n=4, block_k=256, num_warps=2)


@functools.cache
def default_token_tile(config: GemmConfig, top_k: int, *, is_slice: bool = False) -> MatvecTile:
    """gemm2: one or two columns a warp, and mostly a warp a program where there are several slots to sum.

    Each slot's row is summed and rounded by itself. Within a warp that takes no barrier, so loads of the next slots go on.
    Besides, dependent programs pile up on the first multiprocessors that gemm1 leaves unless there are enough small ones
    for all: in trials before these kernels, wider blocks lost 3 to 9 us of qwen3-30b's 22 on an H200. What is loaded before
    gemm1 has ended comes for nothing, 12 to 16 steps in place of 8 saved 1 to 5% at one token, but more registers
    leave room for fewer warps: 16 steps of two columns cost as much at 8 tokens. Where the last step is masked, its predicates
    take registers too, and 12 steps spill with Triton 3.7. A slice loads nothing ahead.
    """
    if config.in_features <= ELEMENTS_A_WARP:  # half a warp a row
        return MatvecTile(block_n=4, block_k=_block_k(config.in_features, ELEMENTS_A_WARP // 2), num_prefetched=8)
    block_k = _block_k(config.in_features, 512 if top_k <= 2 else ELEMENTS_A_WARP)
    if top_k <= 2:
        return MatvecTile(block_n=2, block_k=block_k, num_warps=_num_warps(block_k), num_prefetched=12)
    if is_slice:
        return MatvecTile(block_n=4, block_k=block_k, num_warps=2)
    if config.out_features >= LONG_ROW:
        return MatvecTile(block_n=1, block_k=block_k, num_prefetched=16)
    return MatvecTile(block_n=2, block_k=block_k, num_prefetched=11 if _masks_loads(config) else 12)


def _masks_loads(config: GemmConfig) -> bool:
    """Whether the last step of a contraction is cut short."""
    return config.in_features % _block_k(config.in_features, ELEMENTS_A_WARP) != 0


def _num_warps(block_k: int) -> int:
    """As many as load a step of a row at once, so that rows and vector lie in registers alike."""
    return max(1, block_k // ELEMENTS_A_WARP)


def _block_k(in_features: int, widest: int) -> int:
    """The widest step of 16-byte loads that cuts the contraction evenly; 256 elements at most, the last ones masked, if none."""
    for block_k in (1024, 512, 256):
        if block_k <= widest and in_features % block_k == 0:
            return block_k
    return min(ELEMENTS_A_WARP, widest, max(64, 1 << (in_features - 1).bit_length()))
