"""The operator of chosen experts: torch's own checks of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moe.operators  # noqa: F401 - registers it
from moe import MoEConfig, SwigluParams, TopK, WeightFormat, WeightLayout, reference_pipeline


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_the_operator_of_chosen_experts_passes_all_of_torchs_checks(id_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w1, w2 = (torch.randn(6, 96, 64) / 8).bfloat16(), (torch.randn(6, 64, 48) / 7).bfloat16()
    ids = torch.tensor([[0, 5], [-1, 3], [2, 1]], dtype=id_dtype)
    arguments = (torch.randn(3, 64).bfloat16(), ids, torch.rand(3, 2), w1, w2, 3, 0, False, None, None, 7.0)
    result = torch.library.opcheck(torch.ops.moe.run_experts.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("weighs_input", [False, True])
def test_experts_with_all_that_they_may_have_are_one_operator_that_passes_torchs_checks(weighs_input: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / 4).bfloat16()

    ids = torch.randint(-1, 6, (7, 2), generator=generator)
    weights = torch.rand(7, 2, generator=generator)
    layer = (3, 1, False, 1.702, 1.0, 7.0)  # SwiGLU, MajorMn
    more = (normal(5, 48), normal(5, 32), True, weighs_input, normal(7, 32))
    arguments = (normal(7, 32), ids, weights, normal(5, 32, 48), normal(5, 24, 32), *layer, *more)
    result = torch.library.opcheck(torch.ops.moe.run_experts.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
    config = MoEConfig.create(
        hidden_size=32,
        intermediate_size=24,
        num_experts=5,
        top_k=2,
        weight_format=WeightFormat(layout=WeightLayout.MajorMn, gate_up_order="interleaved"),
        weight_on="input" if weighs_input else "output",
    )
    x, _, _, w1, w2 = arguments[:5]
    numbers = SwigluParams(*(torch.full((5,), value) for value in (1.702, 1.0, 7.0)))
    topk = TopK(ids.int(), weights)
    expected = reference_pipeline(config).run_experts(
        topk, x, w1, w2, swiglu=numbers, added=more[4], w1_bias=more[0], w2_bias=more[1]
    )
    assert torch.equal(torch.ops.moe.run_experts(*arguments), expected)
