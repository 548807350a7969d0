"""Which choices are worth timing for a layer and a number of tokens: few, and the model's own among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe.config import MoEConfig
from moe.fused.few_tokens.config import FewTokenConfig, MatvecTile
from moe.fused.few_tokens.tile import default_slot_tile, default_token_tile
from moe.gemm.config import ACTIVATIONS, GemmConfig, GemmKernel, GemmTile, WeightLayout
from moe.gemm.portable.tile import DECODE_ROWS, candidate_tiles
from moe.permute.config import MAX_TILE_ROWS, MIN_TILE_ROWS
from moe.tuning.choice import TuningChoice

# Mean rows of an expert within which a kernel has a chance. On an H200 the model changes over at 48 and 160 rows.
SWAPPED_ROWS = range(16, 513)
MIN_WIDE_ROWS = 64
BORDER = 4  # from a quarter to four times its border, the few-token kernels and the grouped chain are held against each other
BLOCKS_H = (256, 512, 1024, 2048)

KernelsOf = Callable[[GemmConfig, int], tuple[GemmKernel, ...]]  # of a config and tile_rows: kernels that take them


@dataclass(frozen=True)
class Candidates:
    """The choices for one layer and token count, an axis at a time: each axis varies the best that the axes before it found.

    `config` leaves everything to the model (`left_to_the_model`).
    """

    config: MoEConfig
    num_tokens: int
    kernels_of: KernelsOf

    @property
    def runs_grouped(self) -> bool:
        """Whether any choice runs the grouped kernels, after a planner."""
        return BORDER * self.num_tokens > self._few_token_border()

    def compositions(self) -> list[TuningChoice]:
        """The model's choice, then other chains: few-token kernels or not, rows of a tile, kernels of both GEMMs."""
        choices = [TuningChoice()]
        most = self._few_token_border()
        if most and self.num_tokens <= BORDER * most and self.num_tokens > most:
            choices.append(TuningChoice(uses_few_tokens=True))
        if self.runs_grouped:
            if self.num_tokens <= most:
                choices.append(TuningChoice(uses_few_tokens=False))
            choices += self._grouped_chains()
        return choices

    def variants(self, best: TuningChoice) -> list[Callable[[TuningChoice], list[TuningChoice]]]:
        """The axes that are left for the composition `best`: each makes the choices to hold against the best so far."""
        if self._is_few(best):
            return [self._slot_tiles, self._token_tiles]
        return [self._gemm1_variants, self._gemm2_variants, self._finalize_blocks]

    def _few_token_border(self) -> int:
        """Most tokens for which the model runs the few-token kernels; 0 where they do not take the layer."""
        config = self.config
        few = FewTokenConfig.of_stages(config.permute, config.gemm1, config.gemm2)
        return 0 if few is None else few.max_tokens

    def _is_few(self, choice: TuningChoice) -> bool:
        if choice.uses_few_tokens is None:
            return self.num_tokens <= self._few_token_border()
        return choice.uses_few_tokens

    def _grouped_chains(self) -> list[TuningChoice]:
        """tile_rows of half, once and twice the model's with its kernels, and each pair of kernels that has a chance."""
        few: dict[str, Any] = {"uses_few_tokens": False} if self.num_tokens <= self._few_token_border() else {}
        rows = self._model_rows()
        choices = [TuningChoice(**few, tile_rows=other) for other in _neighbours(rows)]
        for kernel in self._plausible_kernels():
            for tile_rows in _unique(rows, max(rows // 2, MIN_TILE_ROWS)):
                if all(kernel in self.kernels_of(gemm, tile_rows) for gemm in (self.config.gemm1, self.config.gemm2)):
                    choices.append(TuningChoice(**few, tile_rows=tile_rows, gemm1_kernel=kernel, gemm2_kernel=kernel))
                    break
        return choices

    def _plausible_kernels(self) -> list[GemmKernel]:
        mean_rows = self.config.permute.mean_rows(self.num_tokens)
        kernels: list[GemmKernel] = []
        if mean_rows < SWAPPED_ROWS.stop:
            kernels.append("portable")
        if mean_rows in SWAPPED_ROWS:
            kernels.append("swapped")
        if mean_rows >= MIN_WIDE_ROWS:
            kernels.append("wide")
        return kernels

    def _model_rows(self) -> int:
        return self.config.permute.rows_per_tile(self.num_tokens)

    def _gemm1_variants(self, best: TuningChoice) -> list[TuningChoice]:
        return self._gemm_variants(best, self.config.gemm1, "gemm1")

    def _gemm2_variants(self, best: TuningChoice) -> list[TuningChoice]:
        return self._gemm_variants(best, self.config.gemm2, "gemm2")

    def _gemm_variants(self, best: TuningChoice, gemm: GemmConfig, stage: str) -> list[TuningChoice]:
        """Each plausible kernel for this GEMM alone, and two more tiles of the portable one."""
        tile_rows = best.tile_rows or self._model_rows()
        taken = self.kernels_of(gemm, tile_rows)
        kernels = [kernel for kernel in self._plausible_kernels() if kernel in taken]
        choices = [_with(best, tile_rows=tile_rows, **{f"{stage}_kernel": kernel}) for kernel in kernels]
        # With more rows the portable kernels have a chance only where no others run, and each tile costs a compilation.
        if tile_rows <= DECODE_ROWS or taken == ("portable",):
            for tile in _other_tiles(gemm, tile_rows):
                fields: dict[str, Any] = {f"{stage}_kernel": "portable", f"{stage}_tile": tile}
                choices.append(_with(best, tile_rows=tile_rows, **fields))
        return _without(choices, best)

    def _finalize_blocks(self, best: TuningChoice) -> list[TuningChoice]:
        """Columns of a program, no more than the next power of two holds them all."""
        widest = 1 << (self.config.hidden_size - 1).bit_length()
        return [_with(best, finalize_block_h=block) for block in BLOCKS_H if block <= max(widest, BLOCKS_H[0])]

    def _slot_tiles(self, best: TuningChoice) -> list[TuningChoice]:
        """Half the contraction a step, and twice the columns a program, with warps of their own."""
        tile = default_slot_tile(self.config.gemm1)
        return [_with(best, slot_tile=other) for other in (_half_steps(tile), _twice_as_wide(tile)) if other != tile]

    def _token_tiles(self, best: TuningChoice) -> list[TuningChoice]:
        """Half the columns a program, and twice, with warps of their own."""
        config = self.config
        is_slice = config.permute.num_local_experts < config.num_experts
        tile = default_token_tile(config.gemm2, config.top_k, is_slice=is_slice)
        return [_with(best, token_tile=other) for other in (_half_as_wide(tile), _twice_as_wide(tile)) if other != tile]


def left_to_the_model(config: MoEConfig) -> MoEConfig:
    """The same layer with nothing of what a tuner chooses named, its weights on the output without biases and numbers of its activation."""
    fields = config.model_dump()
    fields["permute"]["tile_rows"] = None
    for stage in ("gemm1", "gemm2"):
        fields[stage] |= {"kernel": None, "tile": None}
    return MoEConfig(
        **fields | {"finalize": {}, "few_tokens": {}, "weight_on": "output", "swiglu": None, "has_biases": False}
    )


def kernels_of_hopper(gemm: GemmConfig, tile_rows: int) -> tuple[GemmKernel, ...]:
    """Which grouped GEMM kernels may run on a Hopper GPU, told without one: by gemm1's activation, the weights, and the wide ones
    with tiles of 64 rows and more."""
    if gemm.weight_format.layout is WeightLayout.MajorMn and gemm.weight_format.is_shuffled:
        return ("portable",)
    kernels = (kernel for kernel, taken in ACTIVATIONS.items() if gemm.activation is None or gemm.activation in taken)
    return tuple(kernel for kernel in kernels if kernel != "wide" or tile_rows >= MIN_WIDE_ROWS)


def kernels_on(device: torch.device) -> KernelsOf:
    """Which grouped GEMM kernels run on a device, by config and tile_rows; on a CPU the reference stands for "portable"."""
    if device.type != "cuda":
        return lambda gemm, tile_rows: ("portable",)
    from moe.gemm.kernels import kernels_for

    def kernels_of(gemm: GemmConfig, tile_rows: int) -> tuple[GemmKernel, ...]:
        stage = "gemm1" if gemm.activation is not None else "gemm2"
        return tuple(kernel.family for kernel in kernels_for(stage, gemm, tile_rows, device))

    return kernels_of


def _with(choice: TuningChoice, **fields: Any) -> TuningChoice:
    return TuningChoice(**choice.model_dump() | fields)


def _without(choices: list[TuningChoice], best: TuningChoice) -> list[TuningChoice]:
    return [choice for choice in dict.fromkeys(choices) if choice != best]


def _unique(*values: int) -> list[int]:
    return list(dict.fromkeys(values))


def _neighbours(tile_rows: int) -> list[int]:
    return [rows for rows in (tile_rows // 2, 2 * tile_rows) if MIN_TILE_ROWS <= rows <= MAX_TILE_ROWS]


def _other_tiles(gemm: GemmConfig, tile_rows: int) -> list[GemmTile]:
    """The first and the last of `candidate_tiles` after the default one."""
    others = candidate_tiles(gemm, tile_rows)[1:]
    return list(dict.fromkeys((*others[:1], *others[-1:])))


def _half_steps(tile: MatvecTile) -> MatvecTile:
    return _tile_with(tile, block_k=max(tile.block_k // 2, 64), num_warps=max(tile.num_warps // 2, 1))


def _half_as_wide(tile: MatvecTile) -> MatvecTile:
    return _tile_with(tile, block_n=max(tile.block_n // 2, 1))


def _twice_as_wide(tile: MatvecTile) -> MatvecTile:
    """As many columns a warp as before; fewer are loaded ahead, which leaves room for more warps."""
    return _tile_with(
        tile,
        block_n=min(2 * tile.block_n, 64),
        num_warps=min(2 * tile.num_warps, 16),
        num_prefetched=min(tile.num_prefetched, 8),
    )


def _tile_with(tile: MatvecTile, **fields: int) -> MatvecTile:
    return MatvecTile(**tile.model_dump() | fields)
