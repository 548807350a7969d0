"""Packing and unpacking of expert weights: every format to every other, and the bytes of the original's format."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gemm.cases import ALL_FORMATS, format_id

from moe.gemm.config import FLASHINFER, GemmConfig, WeightFormat, WeightLayout
from moe.gemm.weight_format import (
    convert_weights,
    logical_row_of_stored_row,
    pack_bias,
    pack_weights,
    unpack_bias,
    unpack_expert,
    unpack_weights,
    weight_strides,
)

NUM_EXPERTS, NUM_ROWS, NUM_COLUMNS = 2, 96, 128


def numbered_weights() -> torch.Tensor:
    """Every element has a number of its own."""
    return torch.arange(NUM_EXPERTS * NUM_ROWS * NUM_COLUMNS).view(NUM_EXPERTS, NUM_ROWS, NUM_COLUMNS)


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
def test_every_pair_of_formats_converts_there_and_back(is_gated):
    logical = numbered_weights()
    for format_from, format_to in product(ALL_FORMATS, ALL_FORMATS):
        stored = pack_weights(logical, format_from, is_gated=is_gated)
        converted = convert_weights(stored, format_from, format_to, is_gated=is_gated)
        assert converted.is_contiguous()
        assert torch.equal(converted, pack_weights(logical, format_to, is_gated=is_gated)), (format_from, format_to)
        assert torch.equal(unpack_weights(converted, format_to, is_gated=is_gated), logical), (format_from, format_to)
        assert torch.equal(unpack_expert(converted[1], format_to, is_gated=is_gated), logical[1]), format_to


@pytest.mark.parametrize("weight_format", ALL_FORMATS, ids=format_id)
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
def test_packed_weights_follow_the_definition_element_by_element(weight_format, is_gated):
    logical = numbered_weights()[0]
    wanted = logical
    half = NUM_ROWS // 2
    if is_gated and weight_format.gate_up_order == "up_gate":
        wanted = torch.cat([wanted[half:], wanted[:half]])
    if is_gated and (weight_format.is_shuffled or weight_format.gate_up_order == "interleaved"):
        interleaved = torch.empty_like(wanted)
        for j in range(half):
            interleaved[2 * j], interleaved[2 * j + 1] = wanted[j], wanted[half + j]
        wanted = interleaved
    if weight_format.is_shuffled:
        shuffled = torch.empty_like(wanted)
        for j in range(NUM_ROWS):
            shuffled[32 * (j // 32) + 8 * (j % 4) + (j % 32) // 4] = wanted[j]
        wanted = shuffled
    if weight_format.layout is WeightLayout.MajorMn:
        wanted = wanted.T
    if weight_format.layout is WeightLayout.BlockMajorK:
        wanted = torch.stack([wanted[:, block : block + 64] for block in range(0, NUM_COLUMNS, 64)])
    assert torch.equal(pack_weights(logical[None], weight_format, is_gated=is_gated)[0], wanted)


@pytest.mark.parametrize("weight_format", ALL_FORMATS, ids=format_id)
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
def test_biases_lie_in_the_order_of_the_weights_rows(weight_format, is_gated):
    logical = numbered_weights()[..., 0]
    rows = WeightFormat(is_shuffled=weight_format.is_shuffled, gate_up_order=weight_format.gate_up_order)
    packed = pack_bias(logical, weight_format, is_gated=is_gated)
    assert torch.equal(packed, pack_weights(logical[..., None], rows, is_gated=is_gated)[..., 0])
    assert torch.equal(unpack_bias(packed, weight_format, is_gated=is_gated), logical)


def test_biases_of_rows_that_do_not_fit_the_format_are_refused():
    with pytest.raises(ValueError, match="multiple of 32 rows, got N=48"):
        pack_bias(torch.zeros(1, 48), FLASHINFER, is_gated=False)
    for move in (pack_bias, unpack_bias):
        with pytest.raises(ValueError, match=r"bias: expected \[E, N\], got \[64\]"):
            move(torch.zeros(64), FLASHINFER, is_gated=True)
        with pytest.raises(TypeError, match=r"bias: expected a torch\.Tensor, got list"):
            move([0.5], FLASHINFER, is_gated=True)


@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER])
def test_biases_of_a_parameter_are_moved_without_a_gradient(weight_format):
    bias = torch.nn.Parameter(torch.randn(2, 64))
    packed = pack_bias(bias, weight_format, is_gated=True)
    assert not packed.requires_grad
    assert packed.data_ptr() != bias.data_ptr()
    assert torch.equal(unpack_bias(packed, weight_format, is_gated=True), bias)


def test_interleaved_rows_of_shuffled_weights_are_refused():
    with pytest.raises(ValueError, match=r"'gate_up' or 'up_gate' for shuffled weights, got 'interleaved'"):
        WeightFormat(is_shuffled=True, gate_up_order="interleaved")


def test_rows_of_the_original_format_are_those_of_its_table():
    # 0 to 63 are up rows and 64 to 127 gate rows there; here gate rows come first.
    up, gate = torch.arange(64), torch.arange(64, 128)
    logical = torch.cat([gate, up])[None, :, None].expand(1, 128, 64)
    stored = pack_weights(logical, FLASHINFER, is_gated=True)
    assert stored.shape == (1, 1, 128, 64)
    assert stored[0, 0, :32, 0].tolist() == [
        *range(0, 16, 2), *range(64, 80, 2), *range(1, 17, 2), *range(65, 81, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("weight_format", ALL_FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", None])
def test_strides_find_each_element_of_the_packed_weights(weight_format, activation):
    out_features = NUM_ROWS // 2 if activation else NUM_ROWS
    config = GemmConfig(
        num_experts=NUM_EXPERTS,
        in_features=NUM_COLUMNS,
        out_features=out_features,
        activation=activation,
        weight_format=weight_format,
    )
    logical = numbered_weights()
    stored = pack_weights(logical, weight_format, is_gated=config.is_gated)
    assert stored.shape == config.weight_shape
    row, k = torch.meshgrid(torch.arange(NUM_ROWS), torch.arange(NUM_COLUMNS), indexing="ij")
    strides = weight_strides(config)
    found = stored[1].flatten()[row * strides.row + k // 64 * strides.block + k % 64 * strides.k]
    logical_row = logical_row_of_stored_row(NUM_ROWS, weight_format, is_gated=config.is_gated)
    assert torch.equal(found, logical[1, logical_row])


def test_packing_gives_memory_of_its_own():
    logical = numbered_weights()
    packed = pack_weights(logical, WeightFormat(), is_gated=True)
    packed.zero_()
    assert logical.any()


@pytest.mark.parametrize("convert", [pack_weights, unpack_weights])
def test_weights_of_a_parameter_are_converted_without_a_gradient(convert):
    parameter = torch.nn.Parameter(numbered_weights().float())
    converted = convert(parameter, WeightFormat(gate_up_order="up_gate"), is_gated=True)
    assert torch.equal(converted, convert(parameter.detach(), WeightFormat(gate_up_order="up_gate"), is_gated=True))
    assert not converted.requires_grad


@pytest.mark.parametrize(
    ("shape", "weight_format", "is_gated", "message"),
    [
        ((1, 48, 64), FLASHINFER, False, r"multiple of 32 rows, got N=48"),
        ((1, 64, 72), FLASHINFER, False, r"multiple of 64, got K=72"),
        ((1, 31, 64), WeightFormat(), True, r"even number of rows .* got N=31"),
        ((64, 64), WeightFormat(), False, r"expected \[E, N, K\] for MajorK, got \[64, 64\]"),
    ],
)
def test_dims_that_do_not_fit_a_format_are_refused(shape, weight_format, is_gated, message):
    with pytest.raises(ValueError, match=message):
        pack_weights(torch.zeros(shape), weight_format, is_gated=is_gated)


def test_what_is_no_tensor_is_not_converted():
    for convert in (pack_weights, unpack_weights):
        with pytest.raises(TypeError, match=r"weights: expected a torch\.Tensor, got list"):
            convert([0.5], FLASHINFER, is_gated=True)


def test_blocks_of_128_are_refused():
    with pytest.raises(ValueError, match=r"expected \[E, K/64, N, 64\] for BlockMajorK, got \[1, 1, 64, 128\]"):
        unpack_weights(torch.zeros(1, 1, 64, 128), FLASHINFER, is_gated=False)
