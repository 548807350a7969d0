"""The activation of each slot, by the kernel and the reference."""

from __future__ import annotations

import pytest
from fused.few_tokens.cases import make_case

from moe.fused.few_tokens.gemm1 import few_token_gemm1
from moe.fused.few_tokens.reference import few_token_gemm1_reference
from moe.gemm.reference import activate_reference
from moe.testing.closeness import assert_rounded_once


@pytest.mark.parametrize("function", [few_token_gemm1, few_token_gemm1_reference])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_the_activation_is_of_sums_that_were_not_rounded(triton_device, poisoned_memory, activation, function):
    case = make_case(num_tokens=5, hidden_size=192, activation=activation, device=triton_device)
    out = function(case.hidden_states, case.w1, case.topk, config=case.config)
    weights = case.logical[0][case.topk.expert_ids.long()].double()  # [T, K, 2I or I, H]
    products = (weights @ case.hidden_states.double()[:, None, :, None]).flatten(0, 1).squeeze(-1)
    assert_rounded_once(out, activate_reference(products, 0, case.config.gemm1, None))
