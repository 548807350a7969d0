"""Which callables may stand for neighbouring stages of a layer on a GPU."""

from __future__ import annotations

from functools import partial

from moe.fused.few_tokens.config import FewTokenConfig, FewTokenTiles
from moe.fused.few_tokens.experts import few_token_experts, launch_few_token_experts
from moe.gemm.config import GemmConfig
from moe.permute.config import PermuteConfig
from moe.stages import CheckedStage, Finalizer, FusedExperts, Gemm1, Gemm2, Permuter


def fused_experts_for(
    permute: PermuteConfig,
    gemm1: GemmConfig,
    gemm2: GemmConfig,
    tiles: FewTokenTiles,
    stands_for: tuple[Permuter, Gemm1, Gemm2, Finalizer],
    *,
    uses_pdl: bool,
) -> FusedExperts | None:
    """The few-token kernels for the stages that they stand for; None where they do not take the layer, or never run."""
    config = (
        None if tiles.max_tokens == 0 else FewTokenConfig.of_stages(permute, gemm1, gemm2, tiles, uses_pdl=uses_pdl)
    )
    if config is None:
        return None
    run = CheckedStage(
        partial(few_token_experts, config=config), partial(launch_few_token_experts, config=config), config
    )
    return FusedExperts(run, tiles.max_tokens or config.max_tokens, stands_for)
