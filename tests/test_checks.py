"""Checks of tensors by themselves: what passes, what a shared letter binds, and whose memory overlaps."""

import numpy as np
import pytest
import torch

from moe import checks
from moe.checks import as_float, as_int, expect, expect_separate, is_as_expected
from moe.gemm.config import ActivationType

MEMORY = torch.zeros(4096, dtype=torch.bfloat16)
RIGHT = MEMORY[:96].view(12, 8)
WRONG = {
    "rank": (MEMORY[:96], "expected 2-D"),
    "size": (MEMORY[:112].view(14, 8), r"expected \[T=12, 8\]"),
    "fixed_size": (MEMORY[:108].view(12, 9), r"expected \[T=12, 8\]"),
    "dtype": (RIGHT.float(), "expected bfloat16"),
    "device": (RIGHT.to("meta"), "expected a tensor on cpu"),
    "strides": (MEMORY[:192].view(12, 16)[:, ::2], "expected a contiguous tensor"),
    "alignment": (MEMORY[1:97].view(12, 8), "expected memory aligned to 16 bytes"),
}
CPU = torch.device("cpu")


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    """A CPU whose memory must be aligned, as a GPU's."""
    monkeypatch.setattr(checks, "DEVICES_OF_KERNELS", ("cpu",))


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_both_checks(name, kernels_on_the_cpu):
    tensor, says = WRONG[name]
    with pytest.raises(ValueError, match=says):
        expect("rows", tensor, "T 8", {"T": 12}, dtype=torch.bfloat16, device=CPU)
    assert not is_as_expected(tensor, (12, 8), torch.bfloat16, CPU)


def test_what_is_no_tensor_is_refused_by_both_checks():
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got list"):
        expect("rows", [], "T 8", {}, dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert not is_as_expected([], (0,), torch.bfloat16)  # type: ignore[arg-type]


def test_what_fits_passes_and_binds_its_letters():
    dims: dict[str, int] = {}
    expect("rows", RIGHT, "T K", dims, dtype=(torch.float32, torch.bfloat16), device=CPU)
    assert dims == {"T": 12, "K": 8}
    assert is_as_expected(RIGHT, (12, 8), torch.bfloat16, CPU)


def test_an_empty_tensor_may_lie_anywhere():
    empty = MEMORY[1:1].view(0, 8)
    expect("rows", empty, "T 8", {}, dtype=torch.bfloat16)
    assert is_as_expected(empty, (0, 8), torch.bfloat16)


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        (6, torch.int32),
        (10, torch.int32),
        (6, torch.bfloat16),
        (60, torch.bfloat16),
        (2, torch.int16),
        (3, torch.float32),
    ],
    ids=str,
)
def test_rows_of_an_aligned_tensor_pass_whichever_they_are(columns, dtype, kernels_on_the_cpu):
    tensor = torch.zeros(9, columns, dtype=dtype)
    for first in range(9):
        rows = tensor[first:]
        expect("rows", rows, "T K", {}, dtype=dtype)
        assert is_as_expected(rows, (9 - first, columns), dtype)


def test_where_references_run_memory_may_begin_anywhere():
    rows = MEMORY[1:97].view(12, 8)
    expect("rows", rows, "T 8", {}, dtype=torch.bfloat16)
    assert is_as_expected(rows, (12, 8), torch.bfloat16, CPU)


QUANTISED = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.float4_e2m1fn_x2,
    torch.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (12, 4)], ids=["whole", "packed"])
def test_quantised_numbers_are_named_as_such_and_their_scales_too(dtype, shape):
    tensor = torch.zeros(shape, dtype=torch.uint8).view(dtype)
    with pytest.raises(
        ValueError, match=r"rows: expected bfloat16, got .*quantised; dequantise it with its scales"
    ) as error:
        expect("rows", tensor, "T 8", {"T": 12}, dtype=torch.bfloat16)
    assert ".to(" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int64], ids=str)
def test_numbers_without_scales_are_to_be_converted(dtype):
    with pytest.raises(ValueError, match=r"convert it with \.to\(torch\.bfloat16\)"):
        expect("rows", RIGHT.to(dtype), "T 8", {}, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_may_be_packed_codes(dtype):
    with pytest.raises(ValueError, match="unless these are packed codes of quantised numbers: dequantise those"):
        expect("rows", RIGHT.to(dtype), "T 8", {}, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"convert it with \.to\(torch\.int8\)$"):
        expect("ids", RIGHT.to(dtype), "T 8", {}, dtype=torch.int8)


def test_a_row_that_begins_between_rows_is_refused(kernels_on_the_cpu):
    between = torch.zeros(64, dtype=torch.int32)[1:13].view(2, 6)
    with pytest.raises(ValueError, match=r"aligned to 8 bytes, got an address 4 bytes past one .*\.clone\(\)"):
        expect("ids", between, "T K", {}, dtype=torch.int32)
    assert not is_as_expected(between, (2, 6), torch.int32)


OVERLAPPING = {
    "itself": RIGHT,
    "last_element": MEMORY[95:100],
    "around": MEMORY,
    "strided": MEMORY[:192].view(2, 96)[:, :1],  # its last element is 96, its first 0
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_shared_memory_is_refused_from_either_side(name):
    other = OVERLAPPING[name]
    for written, read in ((RIGHT, other), (other, RIGHT)):
        with pytest.raises(ValueError, match=r"output: expected memory of its own.*shares memory with rows"):
            expect_separate("output", written, {"absent": None, "rows": read})


def test_a_strided_tensor_reaches_to_its_last_element_and_no_further():
    strided = MEMORY[:192].view(2, 96)[:, :1]  # elements 0 and 96
    expect_separate("output", MEMORY[97:192], {"rows": strided})
    with pytest.raises(ValueError, match="shares memory with rows"):
        expect_separate("output", MEMORY[96:192], {"rows": strided})


def test_neighbours_and_empty_tensors_share_nothing():
    read = {"before": MEMORY[:96], "after": MEMORY[192:], "empty": MEMORY[100:100], "absent": None}
    expect_separate("output", MEMORY[96:192], read)
    expect_separate("output", MEMORY[4:4], {"around": MEMORY})


INTS = {
    "int": 6,
    "enum": ActivationType.Relu2,
    "numpy": np.int64(6),
    "array": np.array(6, np.int16),
    "tensor": torch.tensor(6),
}
FLOATS = {
    "float": 2.5,
    "numpy": np.float32(2.5),
    "float64": np.float64(2.5),
    "array": np.array(2.5),
    "tensor": torch.tensor(2.5),
    "bf16": torch.tensor(2.5).bfloat16(),
}
BOOLS = {"bool": True, "numpy_bool": np.True_, "bool_tensor": torch.tensor(True)}
NO_NUMBERS = BOOLS | {
    "text": "6",
    "none": None,
    "list": [6],
    "vector": torch.tensor([6]),
    "array": np.array([6]),
    "elsewhere": torch.tensor(6, device="meta"),
}


@pytest.mark.parametrize("name", INTS)
def test_what_holds_one_integer_is_an_int(name):
    found = as_int("top_k", INTS[name])
    assert found == 6
    assert isinstance(found, int)


@pytest.mark.parametrize("name", FLOATS)
def test_what_holds_one_number_is_a_float(name):
    found = as_float("scale", FLOATS[name])
    assert (found, type(found)) == (2.5, float)


@pytest.mark.parametrize("name", INTS)
def test_an_integer_is_a_float_too(name):
    found = as_float("scale", INTS[name])
    assert (found, type(found)) == (6.0, float)


@pytest.mark.parametrize("name", [*NO_NUMBERS, *FLOATS])
def test_what_is_no_integer_is_refused_by_name(name):
    value = {**FLOATS, **NO_NUMBERS}[name]
    with pytest.raises(TypeError, match=r"top_k: expected an int, got .*; pass an int"):
        as_int("top_k", value)


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_name(name):
    with pytest.raises(TypeError, match=r"scale: expected a float, got .*; pass a float"):
        as_float("scale", NO_NUMBERS[name])


def test_a_refused_tensor_is_described():
    with pytest.raises(TypeError, match=r"got a tensor of int64, shape \[1\] on cpu"):
        as_int("top_k", torch.tensor([6]))
