"""The few-token kernels against float64, as a whole: formats, dims, tiles, slices, garbage ids, outputs."""

from __future__ import annotations

import pytest
import torch
from fused.few_tokens.cases import DEFAULT_TILES, FORMATS, GARBAGE_IDS, LARGE, assert_kernels_are_close, make_case
from gemm.cases import format_id

from moe.flow import SwigluParams, TopK
from moe.fused.few_tokens.config import ACTIVATIONS, MatvecTile
from moe.fused.few_tokens.experts import few_token_experts
from moe.fused.few_tokens.reference import few_token_experts_reference
from moe.gemm.config import FLASHINFER, PARAMETERS, WeightFormat


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_every_weight_format_is_read(triton_device, poisoned_memory, activation, weight_format):
    case = make_case(
        hidden_size=192,
        intermediate_size=128,
        activation=activation,
        weight_format=weight_format,
        device=triton_device,
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("parametrised", [False, True], ids=["plain", "parametrised"])
def test_every_activation(triton_device, poisoned_memory, activation, parametrised):
    values = {"alpha": [1.699, 0.502, 3.004], "beta": [1.004, 2.251, 9.0], "clamp_limit": [0.502, 7.015, 1.004]}
    names = PARAMETERS.get(activation, ()) if parametrised else ()
    swiglu = SwigluParams(**{name: torch.tensor(values[name], device=triton_device) for name in names})
    case = make_case(num_experts=3, num_tokens=3, activation=activation, device=triton_device)
    assert_kernels_are_close(case, swiglu if names else None)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_nan_comes_out_of_every_activation_where_it_goes_in(triton_device, activation):
    case = make_case(num_experts=3, num_tokens=3, activation=activation, device=triton_device)
    case.hidden_states[1] = float("nan")
    for function in (few_token_experts, few_token_experts_reference):
        is_nan = case.run(function).isnan()
        assert is_nan[1].all()
        assert not is_nan[[0, 2]].any()


BIASES = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, None),
    (None, torch.bfloat16),
]


@pytest.mark.parametrize("bias_dtypes", BIASES, ids=str)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_biases_are_added_in_fp32(triton_device, poisoned_memory, activation, bias_dtypes, num_tokens):
    ids = torch.randint(5, (num_tokens, 2), generator=torch.Generator().manual_seed(1))
    dims = {"hidden_size": 40, "intermediate_size": 72}
    case = make_case(**dims, activation=activation, expert_ids=ids, bias_dtypes=bias_dtypes, device=triton_device)
    assert_kernels_are_close(case)


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_biases_go_by_row_of_the_weights_and_by_local_expert(triton_device, poisoned_memory, activation, weight_format):
    case = make_case(
        num_experts=8,
        num_local_experts=3,
        local_expert_offset=3,
        expert_ids=[[3, -1], [5, 7], [0, 1], [4, 3]],
        activation=activation,
        weight_format=weight_format,
        bias_dtypes=(torch.bfloat16, torch.bfloat16),
        device=triton_device,
    )
    assert_kernels_are_close(case)
    out = case.run()
    assert torch.equal(out[2], torch.zeros_like(out[2])), "a token without local experts gets no bias"


def test_a_layer_like_gpt_oss(triton_device, poisoned_memory):
    case = make_case(
        num_tokens=3,
        num_experts=4,
        weight_format=WeightFormat(gate_up_order="interleaved"),
        bias_dtypes=(torch.bfloat16, torch.bfloat16),
        **DEFAULT_TILES,
        uses_pdl=True,
        device=triton_device,
    )
    alpha, beta, limit = (torch.full((4,), value, device=triton_device) for value in (1.702, 1.0, 7.0))
    assert_kernels_are_close(case, SwigluParams(alpha, beta, limit))


def test_many_choices_with_biases_run_in_a_loop(triton_device, poisoned_memory):
    arguments = {"num_tokens": 1, "intermediate_size": 192, "num_experts": 30, "top_k": 24}
    assert_kernels_are_close(make_case(**arguments, bias_dtypes=(torch.float32,) * 2, device=triton_device))


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(8, 8), (40, 72), (264, 104)])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_dims_need_only_be_multiples_of_8(triton_device, poisoned_memory, hidden_size, intermediate_size, activation):
    assert_kernels_are_close(
        make_case(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
            device=triton_device,
        )
    )


@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=format_id)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_default_tiles_give_the_layer(triton_device, poisoned_memory, num_tokens, weight_format):
    case = make_case(
        num_tokens=num_tokens, weight_format=weight_format, slot_tile=None, token_tile=None, device=triton_device
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("tile", [(1, 64), (2, 128), (8, 256)], ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_any_tile_gives_the_layer(triton_device, poisoned_memory, tile):
    tile = MatvecTile(block_n=tile[0], block_k=tile[1], num_prefetched=3)
    case = make_case(
        num_tokens=1, intermediate_size=16, slot_tile=tile, token_tile=tile, uses_pdl=True, device=triton_device
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("num_prefetched", [1, 2, 5, 32])
def test_prefetched_weights_change_no_bit(triton_device, poisoned_memory, num_prefetched):
    # 192 = 3 steps a slot and 6 in all: prefetched are part of a slot, more than a slot, and everything.
    plain = make_case(intermediate_size=192, device=triton_device)
    tile = MatvecTile(block_n=64, block_k=64, num_prefetched=num_prefetched)
    ahead = make_case(intermediate_size=192, token_tile=tile, uses_pdl=True, device=triton_device)
    assert torch.equal(ahead.run(), plain.run())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parameters", [("alpha",), ("beta",), ("clamp_limit",), ("alpha", "beta", "clamp_limit")])
def test_swiglu_parameters_go_by_local_expert(triton_device, poisoned_memory, parameters, weight_dtype):
    generator = torch.Generator().manual_seed(3)
    swiglu = SwigluParams(**{name: (torch.rand(3, generator=generator) + 0.3).to(triton_device) for name in parameters})
    case = make_case(
        num_experts=9,
        num_local_experts=3,
        local_expert_offset=4,
        expert_ids=[[4, 5], [6, 8]],
        weight_dtype=weight_dtype,
        device=triton_device,
    )
    assert_kernels_are_close(case, swiglu)


@pytest.mark.parametrize("uses_pdl", [False, True], ids=["plain", "dependent"])
@pytest.mark.parametrize(("first", "count"), [(0, 2), (3, 3), (7, 1), (0, 8)], ids=["E0-1", "E3-5", "E7", "all"])
def test_a_rank_sums_its_own_experts_and_skips_garbage_ids(triton_device, poisoned_memory, first, count, uses_pdl):
    ids = [[first, GARBAGE_IDS[0]], [GARBAGE_IDS[1], 7], [1, GARBAGE_IDS[2]], [4, 3], [GARBAGE_IDS[3], 8]]
    case = make_case(
        num_experts=8,
        num_local_experts=count,
        local_expert_offset=first,
        expert_ids=ids,
        uses_pdl=uses_pdl,
        device=triton_device,
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("count", [2, 8], ids=["a-slice", "all-local"])
def test_tokens_without_local_experts_get_zeros(triton_device, poisoned_memory, count):
    ids = [[-1, 8], [1 << 30, -5], [0, 1]]
    case = make_case(num_experts=8, num_local_experts=count, expert_ids=ids, device=triton_device)
    out = case.run()
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert (out[2] != 0).any()


def test_an_expert_that_comes_twice_in_a_row_counts_twice(triton_device, poisoned_memory):
    once = make_case(expert_ids=[[3]], top_k=1, weight_dtype=torch.float32, device=triton_device)
    twice = make_case(expert_ids=[[3, 3]], weight_dtype=torch.float32, device=triton_device)
    once.topk.weights.fill_(1.0)
    twice.topk.weights.fill_(0.5)
    assert torch.equal(twice.run(), once.run())


def test_many_choices_run_in_a_loop(triton_device, poisoned_memory):
    # 24 slots of 3 steps are more than a program unrolls.
    case = make_case(num_tokens=1, intermediate_size=192, num_experts=30, top_k=24, device=triton_device)
    assert_kernels_are_close(case)


def test_a_token_alone_has_the_bits_that_it_has_in_a_batch(triton_device, poisoned_memory):
    case = make_case(num_tokens=7, slot_tile=None, token_tile=None, device=triton_device)
    batch = case.run()
    for token in (0, 3, 6):
        alone = slice(token, token + 1)
        topk = TopK(case.topk.expert_ids[alone].clone(), case.topk.weights[alone].clone())
        out = few_token_experts(topk, case.hidden_states[alone].clone(), case.w1, case.w2, config=case.config)
        assert torch.equal(out[0], batch[token])


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_the_output_goes_where_it_is_asked_for(triton_device, poisoned_memory, function):
    case = make_case(device=triton_device)
    output = torch.empty(2, 64, dtype=torch.bfloat16, device=triton_device)
    assert case.run(function, output=output) is output
    assert torch.equal(output, case.run(function))


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_an_output_allocated_in_inference_mode_is_written_outside_of_it(triton_device, poisoned_memory, function):
    case = make_case(device=triton_device)
    with torch.inference_mode():
        output = torch.empty(2, 64, dtype=torch.bfloat16, device=triton_device)
    case.run(function, output=output)
    assert torch.equal(output, case.run(function))


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_no_tokens_give_an_empty_output(triton_device, function):
    case = make_case(expert_ids=torch.empty(0, 2), device=triton_device)
    out = case.run(function)
    assert (out.shape, out.dtype) == ((0, 64), torch.bfloat16)


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("local", [32, 8], ids=["all-local", "a-slice"])
@pytest.mark.parametrize("uses_pdl", [False, True], ids=["plain", "dependent"])
def test_real_dims_give_the_layer(cuda, poisoned_memory, uses_pdl, local, weight_format):
    case = make_case(
        **LARGE, **DEFAULT_TILES, num_local_experts=local, weight_format=weight_format, uses_pdl=uses_pdl, device=cuda
    )
    assert_kernels_are_close(case)
    assert torch.equal(case.run(), case.run())
