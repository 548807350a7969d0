"""Shapes, weight formats, activations and tiles of the two grouped GEMMs."""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from moe.base_config import Count, FrozenConfig, PowerOfTwo
from moe.checks import expect, expect_type, is_as_expected
from moe.flow import Permutation, SwigluParams


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
GemmKernel = Literal["portable", "swapped", "wide"]  # the families: a folder each


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
    kernel: GemmKernel | None = None  # used where it takes the problem; None: by GPU and load (moe/gemm/kernels.py)
    tile: GemmTile | None = None  # of the portable kernel; None: default_tile

    @field_validator("activation", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            of_name = {name.lower(): member for name, member in ActivationType.__members__.items()}
            if value.lower() not in of_name:
                raise ValueError(f"expected 'Swiglu' or 'Relu2', got {value!r}")
            return of_name[value.lower()]
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
        self._check_kernel_limits()
        return self

    def _check_kernel_limits(self) -> None:
        if self.weight_rows * self.in_features >= 1 << 31:
            raise ValueError(
                f"weight of one expert: expected fewer than 2^31 elements, got {self.weight_rows} x {self.in_features}; "
                "split out_features over several GEMMs"
            )
        is_permuted = self.weight_format.is_shuffled and not self.is_gated
        if self.tile is not None and is_permuted and self.tile.block_n < SHUFFLE_ROWS:
            raise ValueError(
                f"tile.block_n: expected at least {SHUFFLE_ROWS} for shuffled weights, got {self.tile.block_n}; widen the tile"
            )

    @property
    def is_gated(self) -> bool:
        return self.activation is ActivationType.Swiglu

    @property
    def weight_rows(self) -> int:
        """N: 2I for a gated gemm1, else out_features."""
        return 2 * self.out_features if self.is_gated else self.out_features

    @functools.cached_property
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
        if is_as_expected(weights, self.weight_shape, torch.bfloat16, device):
            return
        if isinstance(weights, Tensor) and self.weight_format.layout is WeightLayout.BlockMajorK:
            self._check_block(name, weights)
        axes, dims = self._weight_axes()
        words = self._weight_words(weights, axes)
        expect(name, weights, " ".join(axes), dims, dtype=torch.bfloat16, device=device, words=words)

    def _weight_axes(self) -> tuple[list[str], dict[str, int]]:
        """The stored axes' names, and their sizes: N is 2I or I in gemm1 and H in gemm2, K is H and I."""
        if self.activation is None:
            rows, columns = "H", "I"
        else:
            rows, columns = "2I" if self.is_gated else "I", "H"
        blocks = f"{columns}/{BLOCK_MAJOR_K}"
        axes = {
            WeightLayout.MajorK: ["E_local", rows, columns],
            WeightLayout.MajorMn: ["E_local", columns, rows],
            WeightLayout.BlockMajorK: ["E_local", blocks, rows, str(BLOCK_MAJOR_K)],
        }[self.weight_format.layout]
        return axes, dict(zip(axes, self.weight_shape))

    def _weight_words(self, weights: Tensor, axes: list[str]) -> dict[str, str]:
        """The original op's sentences by axis, as `expect` takes them."""
        stage = "gemm2" if self.activation is None else "gemm1"
        k_axis = 2 if self.weight_format.layout is WeightLayout.MajorK else 1
        n_axis = 1 if self.weight_format.layout is WeightLayout.MajorK else 2
        k_size = "intermediate_size" if stage == "gemm2" else "hidden_size"
        words = {
            "E_local": f"{stage} weights dim0 must equal local_num_experts: weights of all experts or of another rank?",
            axes[k_axis]: f"{stage} weights K dimension must be equal to {k_size}.",
            "dtype": f"BF16 MoE: {stage}_weights must be bfloat16.",
        }
        if stage == "gemm1":
            is_odd = (
                self.is_gated and isinstance(weights, Tensor) and weights.dim() > n_axis and weights.shape[n_axis] % 2
            )
            words[axes[n_axis]] = (
                "gemm1 weights Mn dimension must be even." if is_odd else "intermediate_size has incorrect shape."
            )
        return words

    def _check_block(self, name: str, weights: Tensor) -> None:
        """Tell those who followed the original's documentation page, or cut K into other blocks, what is right."""
        if weights.dim() == 4 and weights.shape[3] == BLOCK_MAJOR_K:
            return
        axes, dims = self._weight_axes()
        wanted = ", ".join(axis if axis.isdigit() else f"{axis}={dims[axis]}" for axis in axes)
        got = list(weights.shape)
        if weights.dim() != 4:
            raise ValueError(
                f"{name}: expected 4-D [{wanted}], got {weights.dim()}-D {got}; convert logical weights with "
                "moe.gemm.weight_format.pack_weights (a reshape would put other numbers in their places)"
            )
        rows, columns = self.weight_rows, self.in_features
        page_text, page_shape = "[E, M//128, H//128, 128]", [rows // 128, columns // 128, 128]
        if self.activation is None:
            page_text, page_shape = "[E, H//128, I, 128]", [rows // 128, columns, 128]
        if got[1:] == page_shape:
            raise ValueError(
                f"{name}: expected [{wanted}], got {got}; the shape {page_text} on the original op's documentation page "
                f"is wrong: a block is {BLOCK_MAJOR_K} elements of the contraction, for all rows. "
                "Convert logical weights with moe.gemm.weight_format.pack_weights"
            )
        raise ValueError(
            f"{name}: expected [{wanted}], got {got}; blocks of the contraction are {BLOCK_MAJOR_K} elements (128 bytes), "
            f"not {got[3]}. Convert logical weights with moe.gemm.weight_format.pack_weights"
        )

    def check_swiglu(self, swiglu: SwigluParams | None, device: torch.device) -> None:
        """Raise unless each parameter is [E_local] fp32, and the activation is SwiGLU."""
        if swiglu is None:
            return
        expect_type("swiglu", swiglu, SwigluParams, "moe.SwigluParams(alpha, beta, clamp_limit) makes one")
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
        num_tokens = permutation.row_of_slot.shape[0]
        if not is_as_expected(hidden_states, (num_tokens, self.in_features), torch.bfloat16, device):
            dims = {"T": num_tokens, "H": self.in_features}
            expect("hidden_states", hidden_states, "T H", dims, dtype=torch.bfloat16, device=device)
        self.check_weights("gemm1_weights", weights, device)
        self.check_swiglu(swiglu, device)

    def check_grouped(self, rows: Tensor, weights: Tensor, permutation: Permutation) -> None:
        """Raise unless the tensors fit a gemm2 of this config: rows [P, I] bf16 and weights of weight_shape."""
        device = permutation.token_of_row.device
        if not is_as_expected(rows, (permutation.max_rows, self.in_features), torch.bfloat16, device):
            dims = {"P": permutation.max_rows, "I": self.in_features}
            expect("rows", rows, "P I", dims, dtype=torch.bfloat16, device=device)
        self.check_weights("gemm2_weights", weights, device)
