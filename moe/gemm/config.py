"""Shapes, weight formats, activations and tiles of the two grouped GEMMs."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from moe.checks import expect
from moe.flow import Permutation, SwigluParams
from moe.frozen import Count, FrozenConfig, PowerOfTwo


class ActivationType(IntEnum):
    """flashinfer's numbers. Swiglu and Relu2 are implemented."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10

    @property
    def is_gated(self) -> bool:
        return self in _GATED


_GATED = (
    ActivationType.Swiglu,
    ActivationType.Geglu,
    ActivationType.SwigluBias,
    ActivationType.SwigluStep,
    ActivationType.GegluTanh,
    ActivationType.Situ,
)


class WeightLayout(IntEnum):
    """How the [N, K] matrix of one expert lies in memory (K is the contraction). flashinfer's numbers."""

    MajorK = 0  # [E, N, K]
    MajorMn = 1  # [E, K, N]
    BlockMajorK = 2  # [E, K / 64, N, 64]


BLOCK_MAJOR_K = 64  # elements of K in a block: 128 bytes of bf16
SHUFFLE_ROWS = 32  # rows that are permuted among themselves
DIM_MULTIPLE = 8  # elements in a 16-byte load

GateUpOrder = Literal["gate_up", "up_gate"]


class WeightFormat(FrozenConfig):
    """Where element (e, n, k) of an expert weight lies.

    The default is Hugging Face's: MajorK, not shuffled, gate rows before up rows. FLASHINFER is what
    `trtllm_bf16_moe` takes.
    """

    layout: WeightLayout = WeightLayout.MajorK
    is_shuffled: bool = False  # rows permuted within blocks of 32, and the two halves of a gated W1 interleaved
    gate_up_order: GateUpOrder = "gate_up"  # which half of a gated W1 has the first I rows

    @field_validator("layout", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return WeightLayout[value] if isinstance(value, str) and value in WeightLayout.__members__ else value


FLASHINFER = WeightFormat(layout=WeightLayout.BlockMajorK, is_shuffled=True, gate_up_order="up_gate")


class GemmTile(FrozenConfig):
    """What one program computes, and with how much hardware. Its rows are the permutation's tile_rows."""

    block_n: PowerOfTwo = Field(ge=16, le=256)  # output columns
    block_k: PowerOfTwo = Field(ge=64, le=256)  # elements of the contraction a step
    num_warps: PowerOfTwo = Field(le=16)
    num_stages: Count = Field(le=8)
    group_tiles: Count = 8  # row tiles that share a weight tile while it is in L2


class GemmConfig(FrozenConfig):
    """Stages 3 and 4: one [N, K] weight an expert.

    gemm1 has in_features H, out_features I and an activation; gemm2 has in_features I, out_features H and none.
    """

    num_experts: Count  # local ones: the weight's first axis
    in_features: Count = Field(multiple_of=DIM_MULTIPLE)
    out_features: Count = Field(multiple_of=DIM_MULTIPLE)
    activation: ActivationType | None = None
    weight_format: WeightFormat = WeightFormat()
    tile: GemmTile | None = None  # None: default_tile

    @field_validator("activation", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str) and value in ActivationType.__members__:
            return ActivationType[value]
        if isinstance(value, int) and not isinstance(value, bool) and value not in list(ActivationType):
            raise ValueError(f"Invalid activation type: {value}; expected 3 (Swiglu) or 6 (Relu2)")
        return value

    @model_validator(mode="after")
    def _is_implemented(self) -> GemmConfig:
        if self.activation not in (None, ActivationType.Swiglu, ActivationType.Relu2):
            kind = "gated" if self.activation.is_gated else "eltwise"
            raise ValueError(
                f"Unsupported {kind} activation type: got {self.activation.name} ({self.activation.value}); "
                "expected Swiglu (3) or Relu2 (6)"
            )
        if self.weight_format.layout is WeightLayout.BlockMajorK and self.in_features % BLOCK_MAJOR_K:
            raise ValueError(
                f"BlockMajorK: expected in_features to be a multiple of {BLOCK_MAJOR_K}, got {self.in_features}; "
                "use MajorK, or pad the weights"
            )
        if self.weight_format.is_shuffled and self.weight_rows % SHUFFLE_ROWS:
            raise ValueError(
                f"shuffled weights: expected a multiple of {SHUFFLE_ROWS} rows, got {self.weight_rows}; "
                "use is_shuffled=False, or pad the weights"
            )
        return self

    @property
    def is_gated(self) -> bool:
        return self.activation is ActivationType.Swiglu

    @property
    def weight_rows(self) -> int:
        """N: 2I for a gated gemm1, else out_features."""
        return 2 * self.out_features if self.is_gated else self.out_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the whole weight tensor in its format."""
        rows, columns = self.weight_rows, self.in_features
        match self.weight_format.layout:
            case WeightLayout.MajorK:
                return (self.num_experts, rows, columns)
            case WeightLayout.MajorMn:
                return (self.num_experts, columns, rows)
            case WeightLayout.BlockMajorK:
                return (self.num_experts, columns // BLOCK_MAJOR_K, rows, BLOCK_MAJOR_K)
        raise AssertionError(self.weight_format.layout)

    def check_weights(self, name: str, weights: Tensor, device: torch.device | None = None) -> None:
        """Raise unless `weights` is a bf16 tensor of weight_shape."""
        wanted = " ".join(map(str, self.weight_shape))
        expect(name, weights, wanted, {}, dtype=torch.bfloat16, device=device)

    def check_swiglu(self, swiglu: SwigluParams | None, device: torch.device) -> None:
        """Raise unless each parameter is [E_local] fp32, and the activation is SwiGLU."""
        if swiglu is None:
            return
        for name in ("alpha", "beta", "clamp_limit"):
            parameter = getattr(swiglu, name)
            if parameter is None:
                continue
            if not self.is_gated:
                raise ValueError(
                    "gemm1_alpha, gemm1_beta, and gemm1_clamp_limit are only supported for ActivationType.Swiglu.: "
                    f"got gemm1_{name} with activation {self.activation!r}; leave it out"
                )
            dims = {"E_local": self.num_experts}
            expect(f"gemm1_{name}", parameter, "E_local", dims, dtype=torch.float32, device=device)

    def check_gather(
        self, hidden_states: Tensor, weights: Tensor, permutation: Permutation, swiglu: SwigluParams | None
    ) -> None:
        """Raise unless the tensors fit a gemm1 of this config: hidden_states [T, H] bf16 and weights of weight_shape."""
        device = permutation.token_of_row.device
        dims = {"T": permutation.row_of_slot.shape[0], "H": self.in_features}
        expect("hidden_states", hidden_states, "T H", dims, dtype=torch.bfloat16, device=device)
        self.check_weights("gemm1_weights", weights, device)
        self.check_swiglu(swiglu, device)

    def check_grouped(self, rows: Tensor, weights: Tensor, permutation: Permutation) -> None:
        """Raise unless the tensors fit a gemm2 of this config: rows [P, I] bf16 and weights of weight_shape."""
        device = permutation.token_of_row.device
        dims = {"P": permutation.max_rows, "I": self.in_features}
        expect("rows", rows, "P I", dims, dtype=torch.bfloat16, device=device)
        self.check_weights("gemm2_weights", weights, device)
