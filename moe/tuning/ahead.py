"""What a search is going to need of the planner, so that it is compiled while the search begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from moe.config import MoEConfig
from moe.gemm.kernels import unit_size
from moe.permute.compile_ahead import PlanningJob
from moe.tuning.candidates import Candidates


def planning_jobs(config: MoEConfig, all_candidates: Iterable[Candidates], device: torch.device) -> list[PlanningJob]:
    """One for each bucket and size of units that its choices want of the planner, or of the GEMMs themselves.

    Args:
        config: leaves everything to the model, as that of the candidates.
    """
    capability = torch.cuda.get_device_capability(device)
    return [
        PlanningJob(
            config=config.permute,
            num_tokens=candidates.num_tokens,
            unit_size=size,
            uses_pdl=capability >= (9, 0),
            capability=capability,
        )
        for candidates in all_candidates
        if candidates.runs_grouped
        for size in sorted(set(_unit_sizes(candidates, device)), key=str)
    ]


def _unit_sizes(candidates: Candidates, device: torch.device) -> Iterator[tuple[int, int, int] | None]:
    yield None  # two GEMMs of different kernels
    for choice in candidates.compositions():
        config = choice.apply(candidates.config)
        tile_rows = config.permute.rows_per_tile(candidates.num_tokens)
        mean_rows = config.permute.mean_rows(candidates.num_tokens)
        size = unit_size(device, tile_rows, mean_rows, gemm1=config.gemm1, gemm2=config.gemm2)
        yield None if size is None else (size.max_rows, size.multiple, size.max_group)
