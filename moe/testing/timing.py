"""The time of a stage of one's own, from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe.cli.layer import NamedLayer, make_layer
from moe.cli.machine import STAGES
from moe.cli.own_stage import OwnStage, StageTimes
from moe.cli.own_stage import measure_stage as measure_own_stage
from moe.cli.progress import Progress
from moe.config import MoEConfig


def measure_stage(
    stage: str,
    function: Callable[..., Any],
    *,
    config: MoEConfig,
    num_tokens: int,
    device: torch.device | str = "cuda",
    routing: str = "uniform",
    seed: int = 0,
    num_turns: int = 4,
) -> StageTimes:
    """Check a layer with the stage in it against float64, then time the stage, ours and dense GEMMs of its size by turns.

    On a GPU calls are replayed from CUDA graphs, over input sets that are together larger than the L2 cache; on a CPU by the clock.

    Args:
        stage: "route", "permute", "gemm1", "gemm2" or "finalize".
        function: called as the stage's Protocol in `moe.stages` says.
        config: the layer's; its weights are drawn in its formats.
        num_turns: at least 3 are taken.

    Raises:
        ValueError: no such stage, or on a GPU a function that cannot be captured in a CUDA graph.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    device = torch.device(device)
    quiet = Progress(shows_details=False, is_silent=True)
    with torch.inference_mode():
        layer = make_layer(NamedLayer("layer", config), device, seed=seed, progress=quiet)
        own = OwnStage(stage, function, f"{stage}={getattr(function, '__qualname__', function)}")
        return measure_own_stage(
            own, layer, num_tokens, routing=routing, seed=seed, num_turns=num_turns, progress=quiet
        )
