"""What the few-token functions refuse, before anything is launched or written."""

from __future__ import annotations

import pytest
import torch
from fused.few_tokens.cases import make_case

from moe.flow import TopK
from moe.fused.few_tokens.experts import few_token_experts
from moe.fused.few_tokens.reference import few_token_experts_reference


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_wrong_tensors_are_named_before_anything_is_written(function):
    case = make_case()
    output = torch.full((2, 64), 7.0, dtype=torch.bfloat16)
    arguments = {"topk": case.topk, "hidden_states": case.hidden_states, "w1": case.w1, "w2": case.w2}
    wrong = [
        ("hidden_states", {"hidden_states": case.hidden_states.float()}),
        ("gemm1_weights", {"w1": case.w1[:4]}),
        ("gemm2_weights", {"w2": case.w2.mT.contiguous()[:, :8]}),
        ("expert_ids", {"topk": TopK(case.topk.expert_ids.long(), case.topk.weights)}),
        ("expert_weights", {"topk": TopK(case.topk.expert_ids, case.topk.weights.half())}),
        ("output", {"output": case.hidden_states}),
    ]
    for name, change in wrong:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            function(**{**arguments, "output": output, **change}, config=case.config)
    assert (output == 7).all()


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_ids_alone_are_no_chosen_experts(function):
    case = make_case()
    with pytest.raises(TypeError, match=r"topk: expected a TopK, got Tensor; moe\.TopK"):
        function(case.topk.expert_ids, case.hidden_states, case.w1, case.w2, config=case.config)
