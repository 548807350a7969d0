"""A GEMM through which a gradient goes back is a GEMM by the transposed weight, which lies in memory as the other layout has it."""

from __future__ import annotations

import functools

from moe.checks import no_case
from moe.gemm.config import GemmConfig, WeightFormat, WeightLayout


@functools.lru_cache(maxsize=1024)
def transposed(config: GemmConfig) -> GemmConfig:
    """The config of rows [P, N] times the stored [N, K] weights of `config`: MajorK is MajorMn there, and the other way round."""
    return GemmConfig(
        num_experts=config.num_experts,
        in_features=config.weight_rows,
        out_features=config.in_features,
        weight_format=WeightFormat(layout=_transposed_layout(config.weight_format.layout)),
    )


def _transposed_layout(layout: WeightLayout) -> WeightLayout:
    match layout:
        case WeightLayout.MajorK:
            return WeightLayout.MajorMn
        case WeightLayout.MajorMn:
            return WeightLayout.MajorK
    raise no_case(layout, "moe/gemm/backward/transposed.py, _transposed_layout")
