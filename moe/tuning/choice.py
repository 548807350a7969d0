"""What a tuner may choose for a layer and a bucket of token counts."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field

from moe.base_config import FrozenConfig, PowerOfTwo
from moe.config import MoEConfig
from moe.fused.few_tokens.config import MatvecTile
from moe.gemm.config import GemmKernel, GemmTile
from moe.permute.config import MAX_TILE_ROWS, MIN_TILE_ROWS
from moe.tuning.buckets import BUCKETS

Config = TypeVar("Config", bound=FrozenConfig)


class TuningChoice(FrozenConfig):
    """None leaves it to the model: the rules that the stages follow where nothing is named."""

    uses_few_tokens: bool | None = Field(default=None, strict=True)  # whether the few-token kernels run
    slot_tile: MatvecTile | None = None
    token_tile: MatvecTile | None = None
    tile_rows: PowerOfTwo | None = Field(default=None, ge=MIN_TILE_ROWS, le=MAX_TILE_ROWS)
    gemm1_kernel: GemmKernel | None = None
    gemm1_tile: GemmTile | None = None
    gemm2_kernel: GemmKernel | None = None
    gemm2_tile: GemmTile | None = None
    finalize_block_h: PowerOfTwo | None = Field(default=None, ge=64, le=8192)

    def apply(self, config: MoEConfig) -> MoEConfig:
        """`config` with this choice in the place of what it leaves to the model; what it names explicitly stays.

        tile_rows, kernels and tiles of both GEMMs were timed together, and a tile that runs with 16 rows may not fit with
        128. Where the config names one of them otherwise, the others are left to the model too.

        Raises:
            ValueError: the choice does not fit the layer, as a tile that shuffled weights do not take.
        """
        few = config.few_tokens
        max_tokens = None if self.uses_few_tokens is None else BUCKETS[-1] if self.uses_few_tokens else 0
        few = _fill(few, max_tokens=max_tokens, slot_tile=self.slot_tile, token_tile=self.token_tile)
        finalize = _fill(config.finalize, block_h=self.finalize_block_h)
        permute, gemm1, gemm2 = config.permute, config.gemm1, config.gemm2
        if self._agrees_on_the_chain(config):
            permute = _fill(permute, tile_rows=self.tile_rows)
            gemm1 = _fill(gemm1, kernel=self.gemm1_kernel, tile=self.gemm1_tile)
            gemm2 = _fill(gemm2, kernel=self.gemm2_kernel, tile=self.gemm2_tile)
        stages = {"permute": permute, "gemm1": gemm1, "gemm2": gemm2, "finalize": finalize, "few_tokens": few}
        return config.model_copy(update=stages)

    def _agrees_on_the_chain(self, config: MoEConfig) -> bool:
        pairs = (
            (config.permute.tile_rows, self.tile_rows),
            (config.gemm1.kernel, self.gemm1_kernel),
            (config.gemm1.tile, self.gemm1_tile),
            (config.gemm2.kernel, self.gemm2_kernel),
            (config.gemm2.tile, self.gemm2_tile),
        )
        return all(explicit is None or explicit == chosen for explicit, chosen in pairs)


def names_the_chain(config: MoEConfig) -> bool:
    """Whether a config leaves neither kernels nor tile_rows open, as a batch-invariant one: tables have no say in it."""
    kernels = config.few_tokens.max_tokens, config.gemm1.kernel, config.gemm2.kernel
    return None not in (config.permute.tile_rows, *kernels)


def _fill(config: Config, **fields: Any) -> Config:
    """The config with `fields` where it has None, built anew so that validators run."""
    missing = {name: value for name, value in fields.items() if value is not None and getattr(config, name) is None}
    if not missing:
        return config
    # Its fields and no more: what a cached property has computed lies beside them.
    present = {name: getattr(config, name) for name in type(config).model_fields}
    return type(config)(**present | missing)
