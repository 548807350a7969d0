"""The weighted sum of each token's rows, by the kernel and the reference: what is rounded, and when."""

from __future__ import annotations

import pytest
import torch
from fused.few_tokens.cases import make_case

from moe.flow import Added, TopK
from moe.fused.few_tokens.gemm1 import few_token_gemm1
from moe.fused.few_tokens.gemm2_finalize import few_token_gemm2_finalize
from moe.fused.few_tokens.reference import few_token_gemm1_reference, few_token_gemm2_finalize_reference
from moe.testing.closeness import assert_close_to_exact


def test_the_sum_is_of_rows_rounded_to_bf16(triton_device, poisoned_memory):
    # The first row is 1 + 2^-9, which bf16 rounds to 1, the second one is 1; unrounded, their difference is 2^-9.
    case = make_case(num_tokens=1, weight_dtype=torch.float32, device=triton_device)
    activation = torch.zeros(2, 64, dtype=torch.bfloat16, device=triton_device)
    activation[:, 0] = 1
    activation[0, 1] = 2**-9
    topk = TopK(case.topk.expert_ids, torch.tensor([[1.0, -1.0]], device=triton_device))
    out = few_token_gemm2_finalize(activation, torch.ones_like(case.w2), topk, config=case.config)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("function", [few_token_gemm2_finalize, few_token_gemm2_finalize_reference])
@pytest.mark.parametrize("top_k", [2, 65], ids=["unrolled", "in_a_loop"])
def test_float32_weights_are_not_cut_to_bfloat16(triton_device, poisoned_memory, top_k, function):
    case = make_case(num_tokens=1, num_experts=top_k, top_k=top_k, weight_dtype=torch.float32, device=triton_device)
    case.topk.weights[0] = torch.tensor([1 + 2.0**-10, -1.0] + [0.0] * (top_k - 2))
    activation = torch.zeros(top_k, 64, dtype=torch.bfloat16, device=triton_device)
    activation[:, 0] = 1
    out = function(activation, torch.ones_like(case.w2), case.topk, config=case.config)
    assert (out == 2.0**-10).all()


@pytest.mark.parametrize("function", [few_token_gemm2_finalize, few_token_gemm2_finalize_reference])
def test_products_of_a_row_are_summed_in_float32(triton_device, poisoned_memory, function):
    # (1 + 2^-7)^2 has 15 bits; the others leave its last one.
    case = make_case(num_tokens=1, top_k=1, device=triton_device)
    case.topk.weights.fill_(1.0)
    activation, weights = (
        torch.zeros(size, dtype=torch.bfloat16, device=triton_device) for size in ((1, 64), case.w2.shape)
    )
    activation[0, :3] = weights[..., :3] = torch.tensor([1 + 2.0**-7, 1.0, 2.0**-3], device=triton_device).bfloat16()
    weights[..., 1:3] *= -1
    out = function(activation, weights, case.topk, config=case.config)
    assert (out == 2.0**-14).all()


def test_slots_are_the_rows_between_the_kernels(triton_device, poisoned_memory):
    case = make_case(num_experts=8, num_local_experts=4, expert_ids=[[0, 7], [3, 1]], device=triton_device)
    arguments = (case.hidden_states, case.w1, case.topk)
    activation = few_token_gemm1(*arguments, config=case.config)
    reference = few_token_gemm1_reference(*arguments, config=case.config)
    local = [0, 2, 3]
    assert activation.shape == (4, 64)
    torch.testing.assert_close(activation[local], reference[local], rtol=2**-7, atol=1e-3)
    out = few_token_gemm2_finalize(activation, case.w2, case.topk, config=case.config)
    assert_close_to_exact(
        out, few_token_gemm2_finalize_reference(reference, case.w2, case.topk, config=case.config), case.exact()
    )


@pytest.mark.parametrize("function", [few_token_gemm2_finalize, few_token_gemm2_finalize_reference])
@pytest.mark.parametrize("gate", ["none", "number", "bf16", "fp32"])
@pytest.mark.parametrize("hidden_size", [64, 72], ids=["even", "with_a_rest"])
def test_what_is_added_is_summed_last_and_rounded_with_the_rows(
    triton_device, poisoned_memory, hidden_size, gate, function
):
    # Rows are 2 and gates powers of two: float32 holds every sum, of which bf16 has 8 bits.
    ids = [[0, 1], [6, 7], [-1, 5]]
    case = make_case(num_experts=8, num_local_experts=4, hidden_size=hidden_size, expert_ids=ids, device=triton_device)
    case.topk.weights.fill_(1.0)
    activation = torch.zeros(6, 64, dtype=torch.bfloat16, device=triton_device)
    activation[:, 0] = 2
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-300, 300, (3, hidden_size), generator=generator).float().to(triton_device)
    numbers = torch.tensor([0.5, 2.0, 0.125], device=triton_device)
    of_name = {"none": None, "number": 0.25, "bf16": numbers.bfloat16(), "fp32": numbers}
    added = Added(values if gate == "fp32" else values.bfloat16(), of_name[gate])
    output = torch.full((3, hidden_size), float("nan"), dtype=torch.bfloat16, device=triton_device)
    arguments = (activation, torch.ones_like(case.w2), case.topk)
    assert function(*arguments, config=case.config, output=output, added=added) is output
    scale = {"none": 1.0, "number": 0.25}.get(gate, numbers[:, None])
    of_rows = torch.tensor([[4.0], [0.0], [0.0]], device=triton_device)
    assert torch.equal(output, (of_rows + scale * added.values.float()).bfloat16())
