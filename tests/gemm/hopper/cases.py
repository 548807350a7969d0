"""Permutations with a given number of rows an expert, for the tests of the Hopper GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe.flow import Permutation

UNDEFINED = 123456789  # what entries past the lists' ends hold


def permutation_of_counts(
    counts: Sequence[int], tile_rows: int, num_tokens: int, *, device: torch.device | str = "cpu", extra_tiles: int = 3
) -> Permutation:
    """Expert e has counts[e] rows of random tokens. `extra_tiles` tiles lie past num_tiles, as those of an upper bound do."""
    generator = torch.Generator().manual_seed(sum(counts) + tile_rows)
    experts, limits, tokens = [], [], []
    for expert, count in enumerate(counts):
        num_tiles = -(-count // tile_rows)
        limits += [len(tokens) + count] * num_tiles
        experts += [expert] * num_tiles
        tokens += torch.randint(max(num_tokens, 1), (count,), generator=generator).tolist()
        tokens += [-1] * (num_tiles * tile_rows - count)
    padding = [UNDEFINED] * extra_tiles

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Permutation(
        row_of_slot=torch.full((num_tokens, 1), -1, dtype=torch.int32, device=device),
        token_of_row=int32(tokens + [-1] * (extra_tiles * tile_rows)),
        expert_of_tile=int32(experts + padding),
        row_limit_of_tile=int32(limits + padding),
        num_rows=int32([len(tokens)]),
        num_tiles=int32([len(experts)]),
        tile_rows=tile_rows,
    )
