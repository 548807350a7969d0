"""Which stages build_pipeline puts together for a GPU. No GPU is needed to ask."""

from __future__ import annotations

import pytest
import torch
from small_layer import REFERENCE_OF_STAGE, SMALL

from moe import MoEConfig, WeightFormat, WeightLayout, build_pipeline
from moe.routing.reference import select_experts_reference

pytest.importorskip("triton")


@pytest.mark.parametrize("uses_pdl", [True, False])
def test_all_stages_for_a_gpu_are_asked_alike_for_dependent_launches(uses_pdl: bool) -> None:
    pipeline = build_pipeline(MoEConfig.create(**SMALL), torch.device("cuda", 0), uses_pdl=uses_pdl)
    asked = [getattr(pipeline, stage).run.keywords["uses_pdl"] for stage in REFERENCE_OF_STAGE]
    assert [*asked, pipeline.fused.run.config.uses_pdl] == [uses_pdl] * 6


def test_what_the_kernels_for_a_gpu_do_not_take_is_left_to_what_does() -> None:
    from moe.permute.numba_plan import numba_plan_permutation
    from moe.permute.triton_plan import plan_permutation
    from moe.routing.topk import select_experts

    def stages(**changes: object) -> tuple[object, object, bool]:
        pipeline = build_pipeline(MoEConfig.create(**SMALL | changes), "cuda")
        return pipeline.route.run.func, pipeline.permute.run.func, pipeline.fused is not None

    assert stages() == (select_experts, numba_plan_permutation, True)
    assert stages(num_experts=40, top_k=33)[0] is select_experts_reference
    assert stages(num_experts=2049) == (select_experts_reference, plan_permutation, True)
    assert not stages(weight_format=WeightFormat(layout=WeightLayout.MajorMn))[2]
    assert not stages(is_batch_invariant=True)[2]


def test_planning_for_a_gpu_is_told_what_units_its_gemms_take() -> None:
    config = MoEConfig.create(**SMALL)
    unit_size = build_pipeline(config, "cuda").permute.run.keywords["unit_size"]
    assert unit_size.keywords == {"gemm1": config.gemm1, "gemm2": config.gemm2}
