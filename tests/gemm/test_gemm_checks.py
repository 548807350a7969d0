"""Which tensors gemm1 and gemm2 refuse, and in which words. The original op's own sentences are kept."""

from __future__ import annotations

import pytest
import torch
from gemm.cases import make_case

from moe.flow import SwigluParams
from moe.gemm.checks import check_weights
from moe.gemm.config import FLASHINFER, GemmConfig, WeightFormat
from moe.gemm.reference import gather_gemm_reference

H, I, E = 256, 128, 4  # noqa: E741
GEMM1 = GemmConfig(num_experts=E, in_features=H, out_features=I, activation="Swiglu", weight_format=FLASHINFER)
GEMM2 = GemmConfig(num_experts=E, in_features=I, out_features=H, weight_format=FLASHINFER)


def check1(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    check_weights(GEMM1, "gemm1_weights", torch.empty(shape, dtype=dtype))


def check2(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    check_weights(GEMM2, "gemm2_weights", torch.empty(shape, dtype=dtype))


def test_right_weights_pass():
    check1((E, H // 64, 2 * I, 64))
    check2((E, I // 64, H, 64))


@pytest.mark.parametrize(
    ("check", "shape", "message"),
    [
        (check1, (E, H // 64, I, 64), r"^intermediate_size has incorrect shape\. gemm1_weights: expected \[E_local=4, H/64=4, 2I=256, 64\]"),
        (check1, (E, H // 64, 2 * I + 1, 64), r"^gemm1 weights Mn dimension must be even\."),
        (check1, (E, H // 64 + 1, 2 * I, 64), r"^gemm1 weights K dimension must be equal to hidden_size\."),
        (check2, (E, I // 64 + 1, H, 64), r"^gemm2 weights K dimension must be equal to intermediate_size\."),
        (check2, (E, I // 64, H + 32, 64), r"^gemm2_weights: expected \[E_local=4, I/64=2, H=256, 64\]"),
        (check1, (2 * E, H // 64, 2 * I, 64), r"local_num_experts: weights of all experts or of another rank\?"),
        (check2, (2 * E, I // 64, H, 64), r"local_num_experts: weights of all experts or of another rank\?"),
        (check1, (E, 2 * I, H), r"expected 4-D \[E_local=4, H/64=4, 2I=256, 64\]"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_named_in_the_original_words(check, shape, message):
    with pytest.raises(ValueError, match=message):
        check(shape)


@pytest.mark.parametrize(("check", "stage"), [(check1, "gemm1"), (check2, "gemm2")])
def test_wrong_dtypes_are_named_in_the_original_words(check, stage):
    shape = GEMM1.weight_shape if stage == "gemm1" else GEMM2.weight_shape
    with pytest.raises(ValueError, match=rf"BF16 MoE: {stage}_weights must be bfloat16\."):
        check(shape, torch.float16)


def test_shapes_of_the_documentation_page_get_the_right_ones_shown():
    with pytest.raises(
        ValueError, match=r"expected \[E_local=4, H/64=4, 2I=256, 64\], got .* \[E, M//128, H//128, 128\] .* is wrong"
    ):
        check1((E, 2 * I // 128, H // 128, 128))
    with pytest.raises(
        ValueError, match=r"expected \[E_local=4, I/64=2, H=256, 64\], got .* \[E, H//128, I, 128\] .* is wrong"
    ):
        check2((E, H // 128, I, 128))


def test_blocks_of_128_elements_get_the_right_size_shown():
    with pytest.raises(
        ValueError, match=r"expected \[E_local=4, H/64=4, 2I=256, 64\].*64 elements \(128 bytes\), not 128"
    ):
        check1((E, H // 128, 2 * I, 128))
    with pytest.raises(ValueError, match=r"64 elements \(128 bytes\), not 128"):
        check2((E, I // 128, H, 128))


def test_something_that_is_not_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"gemm1_weights: expected a torch\.Tensor, got list"):
        check_weights(GEMM1, "gemm1_weights", [1.0])


@pytest.mark.parametrize("layout", ["MajorK", "MajorMn"])
def test_other_layouts_name_the_same_dims(layout):
    config = GemmConfig(
        num_experts=E, in_features=H, out_features=I, activation="Relu2", weight_format=WeightFormat(layout=layout)
    )
    shape = list(config.weight_shape)
    check_weights(config, "gemm1_weights", torch.empty(shape, dtype=torch.bfloat16))
    n_axis = 1 if layout == "MajorK" else 2
    shape[n_axis] += 8
    with pytest.raises(ValueError, match=r"^intermediate_size has incorrect shape\."):
        check_weights(config, "gemm1_weights", torch.empty(shape, dtype=torch.bfloat16))


def test_wrong_rows_are_refused_before_anything_is_written():
    case = make_case(in_features=64, out_features=32, activation="Swiglu")
    with pytest.raises(ValueError, match=r"hidden_states: expected \[T=7, H=64\], got \[6, 64\]"):
        gather_gemm_reference(case.rows[:6], case.weights, case.permutation, config=case.config)


def test_swiglu_parameters_are_fp32_by_local_expert_and_for_swiglu_only():
    case = make_case(in_features=64, out_features=32, activation="Swiglu")
    for wrong in (torch.ones(4), torch.ones(3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"gemm1_alpha: expected"):
            gather_gemm_reference(
                case.rows, case.weights, case.permutation, config=case.config, swiglu=SwigluParams(alpha=wrong)
            )
    relu2 = make_case(in_features=64, out_features=32, activation="Relu2")
    with pytest.raises(ValueError, match=r"are only supported for ActivationType\.Swiglu\."):
        gather_gemm_reference(
            relu2.rows, relu2.weights, relu2.permutation, config=relu2.config, swiglu=SwigluParams(beta=torch.ones(3))
        )
