"""Shapes, weight formats, activations and tiles of the two grouped GEMMs."""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moe.base_config import Count, Float32, FrozenConfig, PowerOfTwo
from moe.checks import no_case, plain_number

GemmKernel = Literal["portable", "swapped", "wide"]  # the families: a folder each


class ActivationType(IntEnum):
    """flashinfer's numbers. `ACTIVATIONS` has those that are implemented."""

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
        """Whether W1 has rows of a gate beside those of up. Says nothing of what is computed from them."""
        if self in _GATED:
            return True
        if self in _NOT_GATED:
            return False
        raise no_case(self, "moe/gemm/config.py, _GATED or _NOT_GATED")


_GATED = (
    ActivationType.Swiglu,
    ActivationType.Geglu,
    ActivationType.SwigluBias,
    ActivationType.SwigluStep,
    ActivationType.GegluTanh,
    ActivationType.Situ,
)
_NOT_GATED = (
    ActivationType.Gelu,
    ActivationType.Relu,
    ActivationType.Silu,
    ActivationType.Relu2,
    ActivationType.Identity,
)


_COMPUTED = (
    ActivationType.Gelu,
    ActivationType.Relu,
    ActivationType.Silu,
    ActivationType.Swiglu,
    ActivationType.Geglu,
    ActivationType.SwigluBias,
    ActivationType.Relu2,
    ActivationType.SwigluStep,
    ActivationType.GegluTanh,
    ActivationType.Identity,
    ActivationType.Situ,
)
# What gemm1 computes in each family. Whatever runs must run on every GPU, so the portable kernels compute all that there are.
# Situ's two tanh are more than the registers of Hopper's consumers hold beside their sums.
_ON_HOPPER = tuple(activation for activation in _COMPUTED if activation is not ActivationType.Situ)
ACTIVATIONS: dict[GemmKernel, tuple[ActivationType, ...]] = {
    "portable": _COMPUTED,
    "swapped": _ON_HOPPER,
    "wide": _ON_HOPPER,
}
# Which of SwigluParams' numbers by expert an activation takes; those that are absent here take none.
PARAMETERS: dict[ActivationType, tuple[str, ...]] = {
    ActivationType.Swiglu: ("alpha", "beta", "clamp_limit"),
    ActivationType.SwigluBias: ("alpha", "beta", "clamp_limit"),
    ActivationType.SwigluStep: ("clamp_limit",),
    ActivationType.Situ: ("alpha", "beta"),
}


class SwigluNumbers(FrozenConfig):
    """`moe.SwigluParams` of all experts alike; None as there."""

    alpha: Float32 | None = None
    beta: Float32 | None = None
    clamp_limit: Annotated[Float32, Field(gt=0)] | None = None

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(name for name in ("alpha", "beta", "clamp_limit") if getattr(self, name) is not None)


def named_activations(form: str = "{name}", family: GemmKernel = "portable") -> str:
    """Those of a family, each written as `form` with its name and value: "Swiglu or Relu2"."""
    return " or ".join(form.format(name=member.name, value=member.value) for member in ACTIVATIONS[family])


class WeightLayout(IntEnum):
    """How the [N, K] matrix of one expert lies in memory (K is the contraction). flashinfer's numbers."""

    MajorK = 0  # [E, N, K]
    MajorMn = 1  # [E, K, N]
    BlockMajorK = 2  # [E, K / 64, N, 64]


BLOCK_MAJOR_K = 64  # elements of K in a block: 128 bytes of bf16
SHUFFLE_ROWS = 32  # rows that are permuted among themselves
DIM_MULTIPLE = 8  # elements in a 16-byte load

GateUpOrder = Literal["gate_up", "up_gate", "interleaved"]


class WeightFormat(FrozenConfig):
    """Where element (e, n, k) of an expert weight lies.

    The default is Hugging Face's: MajorK, not shuffled, gate rows before up rows. FLASHINFER is what
    `trtllm_bf16_moe` takes.
    """

    layout: WeightLayout = WeightLayout.MajorK
    is_shuffled: bool = False  # rows permuted within blocks of 32, and the two halves of a gated W1 interleaved
    gate_up_order: GateUpOrder = "gate_up"  # which half of a gated W1 has the first I rows; or gate, up, gate, up ..

    @property
    def is_gate_first(self) -> bool:
        """Whether a gated W1 has its gate rows before its up rows, or each of them before its up row."""
        if self.gate_up_order in ("gate_up", "interleaved"):
            return True
        if self.gate_up_order == "up_gate":
            return False
        raise no_case(self.gate_up_order, "moe/gemm/config.py, WeightFormat.is_gate_first")

    @field_validator("layout", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        value = plain_number(value)
        return WeightLayout[value] if isinstance(value, str) and value in WeightLayout.__members__ else value

    @model_validator(mode="after")
    def _is_one_order(self) -> WeightFormat:
        if self.is_shuffled and self.gate_up_order == "interleaved":
            raise ValueError(
                "gate_up_order: expected 'gate_up' or 'up_gate' for shuffled weights, got 'interleaved'; shuffling interleaves "
                "the halves itself: 'gate_up' puts each gate row first"
            )
        return self


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
        value = plain_number(value)
        if isinstance(value, str):
            of_name = {name.lower(): member for name, member in ActivationType.__members__.items()}
            if value.lower() not in of_name:
                names = named_activations("'{name}'")
                raise ValueError(f"expected {names}, got {value!r}")
            return of_name[value.lower()]
        if isinstance(value, bool):  # which equals a number
            raise ValueError(f"expected {named_activations()}, got {value!r}")
        if isinstance(value, int) and value not in list(ActivationType):
            raise ValueError(f"Invalid activation type: {value}; expected {named_activations('{value} ({name})')}")
        return value

    @model_validator(mode="after")
    def _is_implemented(self) -> GemmConfig:
        if self.activation is not None and self.activation not in ACTIVATIONS["portable"]:
            kind = "gated" if self.activation.is_gated else "eltwise"
            raise ValueError(
                f"Unsupported {kind} activation type: got {self.activation.name} ({self.activation.value}); "
                f"expected {named_activations('{name} ({value})')}"
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
        return self.activation is not None and self.activation.is_gated

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up rows of a column are neighbours in W1: rows 2j and 2j + 1."""
        return self.is_gated and self.weight_format.gate_up_order == "interleaved"

    @property
    def activation_name(self) -> str | None:
        """How kernels are told which one (`moe/gemm/activation_device.py`)."""
        return None if self.activation is None else self.activation.name

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
        raise no_case(self.weight_format.layout, "moe/gemm/config.py, weight_shape")
