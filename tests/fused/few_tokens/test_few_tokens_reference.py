"""The few-token experts in plain torch."""

from __future__ import annotations

import pytest
import torch
from fused.few_tokens.cases import FORMATS, make_case
from gemm.cases import format_id

from moe.compose import reference_pipeline
from moe.fused.few_tokens.reference import few_token_experts_reference


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_the_reference_is_the_chain_that_it_replaces(poisoned_memory, activation, weight_format):
    case = make_case(
        num_tokens=7,
        hidden_size=128,
        num_experts=8,
        num_local_experts=5,
        local_expert_offset=2,
        activation=activation,
        weight_format=weight_format,
    )
    chain = reference_pipeline(case.layer)
    assert torch.equal(
        case.run(few_token_experts_reference), chain.run_experts(case.topk, case.hidden_states, case.w1, case.w2)
    )


def test_the_reference_follows_neither_the_default_dtype_nor_autocast():
    case = make_case(device="cpu")
    expected = case.run(few_token_experts_reference)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(case.run(few_token_experts_reference), expected)
    finally:
        torch.set_default_dtype(torch.float32)
