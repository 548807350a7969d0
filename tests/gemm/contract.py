"""What every family of GEMMs does, whatever its kernels are: values, loads, what is not read, and what is refused.

A family's test module says `FAMILY = Family(...)`, has the fixtures `gemm_device` (where its kernels run, emulated or not) and
`gemm_gpu` (a GPU), and imports all of this with a star.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm.cases import GemmCase
from gemm.family import Problem, run_reference
from torch import Tensor

from moe.flow import SwigluParams
from moe.gemm.config import PARAMETERS, ActivationType


def test_every_format_is_multiplied_where_it_lies(
    family, gemm_device, poisoned_memory, in_any_format, format_tile_rows
):
    loads = family.loads["edges_of_tiles"]
    family.assert_is_close(family.case(in_any_format, loads=loads, tile_rows=format_tile_rows, device=gemm_device))


def test_dims_need_only_be_multiples_of_8(family, gemm_device, poisoned_memory, awkward, few_tile_rows):
    loads = family.loads["edges_of_tiles"]
    family.assert_is_close(family.case(awkward, loads=loads, tile_rows=few_tile_rows, device=gemm_device))


def test_loads_of_every_kind(family, gemm_device, poisoned_memory, usual, load, tile_rows, option):
    loads, options = family.loads[load], family.options[option]
    case = family.case(usual, loads=loads, tile_rows=tile_rows, device=gemm_device)
    if any(loads):
        family.assert_is_close(case, **options)
    else:
        assert int(case.permutation.num_tiles) == 0
        assert case.permutation.max_rows > 0
        assert family.run(case, **options).isnan().all(), "nothing is written"


def test_one_expert_may_take_every_token(family, gemm_device, poisoned_memory, usual, tile_rows):
    # Two tiles and a bit of the middle expert; its neighbours have no rows.
    ids = torch.ones(2 * tile_rows + 3, 1)
    family.assert_is_close(family.case(usual, expert_ids=ids, tile_rows=tile_rows, device=gemm_device))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_few_tokens_leave_most_experts_without_rows(
    family, gemm_device, poisoned_memory, usual, few_tile_rows, num_tokens
):
    case = family.case(usual, num_tokens=num_tokens, num_experts=11, tile_rows=few_tile_rows, device=gemm_device)
    assert family.run(case).shape == (case.permutation.max_rows, usual.dims[1])
    family.assert_is_close(case)


@pytest.mark.parametrize("local", [slice(0, 2), slice(3, 6), slice(7, 8)], ids=["E0-1", "E3-5", "E7"])
def test_a_rank_computes_the_rows_of_its_own_experts(family, gemm_device, poisoned_memory, usual, few_tile_rows, local):
    case = family.case(usual, num_experts=8, local=local, num_tokens=9, tile_rows=few_tile_rows, device=gemm_device)
    family.assert_is_close(case)


def test_a_rank_without_any_row_computes_nothing(family, gemm_device, poisoned_memory, usual, few_tile_rows):
    case = family.case(
        usual,
        expert_ids=torch.zeros(3, 1),
        num_experts=4,
        local=slice(2, 4),
        tile_rows=few_tile_rows,
        device=gemm_device,
    )
    assert int(case.permutation.num_tiles) == 0
    case.weights.fill_(float("nan"))
    out = family.run(case)
    assert out.shape == (case.permutation.max_rows, usual.dims[1])
    assert out.isnan().all(), "nothing is written"


@pytest.mark.parametrize("parametrised", [False, True], ids=["plain", "parametrised"])
def test_every_activation(
    family, gemm_device, poisoned_memory, any_activation, usual_format, few_tile_rows, parametrised
):
    loads = family.loads["several_tiles"]
    case = family.case(
        Problem(any_activation, family.usual_dims, usual_format),
        loads=loads,
        tile_rows=few_tile_rows,
        device=gemm_device,
    )
    values = {"alpha": [1.699, 0.502, 3.004], "beta": [1.004, 2.251, 9.0], "clamp_limit": [0.502, 7.015, 1.004]}
    names = PARAMETERS.get(ActivationType[any_activation], ()) if parametrised else ()
    swiglu = {name: torch.tensor(values[name] * len(loads))[: len(loads)].to(gemm_device) for name in names}
    family.assert_is_close(case, SwigluParams(**swiglu) if swiglu else None)


def test_nan_comes_out_of_every_activation_where_it_goes_in(
    family, gemm_device, any_activation, usual_format, few_tile_rows
):
    problem = Problem(any_activation, family.usual_dims, usual_format)
    case = family.case(problem, num_tokens=4, tile_rows=few_tile_rows, device=gemm_device)
    case.rows[1] = float("nan")
    for out in (family.run(case), run_reference(case)):
        is_nan = case.by_slot(out).isnan()
        assert is_nan[1].all()
        assert not is_nan[[0, 2, 3]].any()


def test_biases_are_added_in_fp32_by_row_of_the_weights(
    family, gemm_device, poisoned_memory, biased_in_any_format, format_tile_rows, bias_dtype
):
    loads = family.loads["edges_of_tiles"]
    arguments = {"loads": loads, "tile_rows": format_tile_rows, "device": gemm_device}
    family.assert_is_close(family.case(biased_in_any_format, **arguments, bias_dtype=bias_dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_biases_of_few_tokens_and_awkward_dims(
    family, gemm_device, poisoned_memory, awkward, few_tile_rows, bias_dtype, num_tokens
):
    arguments = {"num_tokens": num_tokens, "num_experts": 11, "tile_rows": few_tile_rows, "device": gemm_device}
    family.assert_is_close(family.case(awkward, **arguments, bias_dtype=bias_dtype))


def test_biases_under_every_load(family, gemm_device, poisoned_memory, usual, load, tile_rows, option, bias_dtype):
    arguments = {"loads": family.loads[load], "tile_rows": tile_rows, "device": gemm_device}
    case = family.case(usual, **arguments, bias_dtype=bias_dtype)
    if any(family.loads[load]):
        family.assert_is_close(case, **family.options[option])
    else:
        assert family.run(case, **family.options[option]).isnan().all(), "nothing is written"


def test_a_bias_that_is_nan_spoils_its_experts_column_only(family, gemm_device, usual, few_tile_rows, bias_dtype):
    case = family.case(
        usual,
        expert_ids=torch.tensor([[0], [1], [2]]),
        tile_rows=few_tile_rows,
        device=gemm_device,
        bias_dtype=bias_dtype,
    )
    case.bias[1, 0] = float("nan")
    is_nan = case.by_slot(family.run(case)).isnan()[:, 0]
    assert is_nan[1].sum() == 1
    assert not is_nan[[0, 2]].any()


@pytest.mark.parametrize(
    "names", [(), ("alpha",), ("beta",), ("clamp_limit",), ("alpha", "beta", "clamp_limit")], ids=str
)
def test_swiglu_takes_any_of_its_parameters_by_local_expert(
    family, gemm_device, poisoned_memory, few_tile_rows, usual_format, names
):
    loads = family.loads["several_tiles"]
    # Halfway between two numbers of bf16; the first and the last limit clamp much of unit-scale values.
    parameters = {"alpha": [1.699, 0.502, 1.004], "beta": [1.004, -0.251, 0.0], "clamp_limit": [0.502, 7.015, -1.004]}
    values = {name: torch.tensor(parameters[name] * len(loads))[: len(loads)].to(gemm_device) for name in names}
    problem = Problem("Swiglu", family.usual_dims, usual_format)
    case = family.case(problem, loads=loads, tile_rows=few_tile_rows, device=gemm_device)
    family.assert_is_close(case, SwigluParams(**values))


def test_sums_that_fp32_holds_exactly_equal_the_reference_bit_for_bit(family, gemm_device, usual, few_tile_rows):
    case = family.case(usual, num_tokens=21, is_integer=True, tile_rows=few_tile_rows, device=gemm_device)
    actual, reference = case.by_slot(family.run(case)), case.by_slot(run_reference(case))
    assert torch.equal(actual, reference)
    assert torch.equal(reference, case.exact().to(torch.bfloat16))
    assert actual.unique().numel() > 50


def test_a_token_that_is_nan_spoils_its_own_rows_only(family, gemm_device, usual, few_tile_rows):
    case = family.case(usual, num_tokens=6, tile_rows=few_tile_rows, device=gemm_device)
    is_gathered = usual.activation is not None
    case.rows[2 if is_gathered else case.permutation.row_of_slot[2].long()] = float("nan")
    swiglu = None
    if usual.activation == "Swiglu":
        swiglu = SwigluParams(clamp_limit=torch.ones(case.config.num_experts, device=gemm_device))
    for out in (family.run(case, swiglu), run_reference(case, swiglu)):
        is_nan = case.by_slot(out).isnan()
        assert is_nan[2].all()
        assert not is_nan[[0, 1, 3, 4, 5]].any()


def test_weights_of_experts_that_nobody_chose_are_not_used(family, gemm_device, awkward, few_tile_rows):
    # Steps of the contraction and blocks of columns reach past an expert's weights: into its neighbour's.
    ids = torch.tensor([[0], [2]])
    case = family.case(awkward, expert_ids=ids, tile_rows=few_tile_rows, device=gemm_device)
    case.weights[1] = float("nan")
    assert case.by_slot(family.run(case)).isfinite().all()


@pytest.mark.parametrize("what", ["count of rows", "dtype of rows", "count of experts", "dtype of weights"])
def test_wrong_tensors_are_named_before_anything_is_launched(family, few_tile_rows, usual, what):
    stage, rows = ("gemm2", "rows") if usual.activation is None else ("gemm1", "hidden_states")
    case = family.case(usual, tile_rows=few_tile_rows)
    wrong, says = {
        "count of rows": ({"rows": case.rows[:-1]}, rf"{rows}: expected \[[TP]=\d+, "),
        "dtype of rows": ({"rows": case.rows.float()}, f"{rows}: expected bfloat16, got float32"),
        "count of experts": ({"weights": case.weights[:2]}, rf"{stage}_weights: expected \[E_local=3, "),
        "dtype of weights": ({"weights": case.weights.half()}, rf"{stage}_weights must be bfloat16\."),
    }[what]
    with pytest.raises(ValueError, match=says):
        family.run(replace(case, **wrong))


@pytest.mark.parametrize("name", ["alpha", "beta", "clamp_limit"])
@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(3, dtype=torch.bfloat16)], ids=["four", "bf16"])
def test_swiglu_parameters_are_fp32_by_local_expert(family, few_tile_rows, usual_format, name, wrong):
    case = family.case(Problem("Swiglu", family.usual_dims, usual_format), tile_rows=few_tile_rows)
    with pytest.raises(ValueError, match=f"gemm1_{name}: expected"):
        family.run(case, SwigluParams(**{name: wrong}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda bias: bias[:, 1:], r"expected \[E_local=3, (2I|I|H)="),
        (lambda bias: bias[1:], r"expected \[E_local=3, "),
        (lambda bias: bias[0], "expected 2-D"),
        (lambda bias: bias.half(), "expected bfloat16 or float32, got float16"),
    ],
    ids=["columns", "experts", "axes", "dtype"],
)
def test_wrong_biases_are_named_before_anything_is_launched(family, few_tile_rows, usual, bias_dtype, change, says):
    case = family.case(usual, tile_rows=few_tile_rows, bias_dtype=bias_dtype)
    stage = "gemm2" if usual.activation is None else "gemm1"
    with pytest.raises(ValueError, match=f"{stage}_bias: {says}"):
        family.run(replace(case, bias=change(case.bias)))


# On a GPU only from here on: more work than a GPU does at a time, and graphs.

MANY_STEPS = (2048, 768)


def test_twenty_runs_give_the_same_bits(family, gemm_gpu, poisoned_memory, usual, tile_rows):
    loads = list(family.loads["several_tiles"]) * 4
    case = family.case(replace(usual, dims=MANY_STEPS), loads=loads, tile_rows=tile_rows, device=gemm_gpu)
    first = case.by_slot(family.run(case))
    assert all(torch.equal(case.by_slot(family.run(case)), first) for _ in range(20))


def test_a_captured_chain_follows_new_inputs(family, gemm_gpu, poisoned_memory, usual_format, few_tile_rows):
    loads = list(family.loads["several_tiles"]) * 4
    hidden_size, intermediate_size = MANY_STEPS
    problems = [
        Problem("Swiglu", (hidden_size, intermediate_size), usual_format),
        Problem(None, (intermediate_size, hidden_size), usual_format),
    ]

    def cases(seed: int) -> list[GemmCase]:
        first, second = (
            family.case(problem, loads=loads, tile_rows=few_tile_rows, seed=seed, device=gemm_gpu)
            for problem in problems
        )
        return [first, replace(second, permutation=first.permutation)]

    def chain(cases: list[GemmCase]) -> Tensor:
        return family.run(replace(cases[1], rows=family.run(cases[0])))

    old, new = cases(1), cases(2)
    first = old[0].by_slot(chain(old))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(old)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(old[0].by_slot(captured), first)
    expected = new[0].by_slot(chain(new))
    old[0].rows.copy_(new[0].rows)
    for before, now in zip(old, new):
        before.weights.copy_(now.weights)
    for name in ("token_of_row", "expert_of_tile", "row_limit_of_tile", "num_rows", "num_tiles"):
        getattr(old[0].permutation, name).copy_(getattr(new[0].permutation, name))
    graph.replay()
    assert torch.equal(new[0].by_slot(captured), expected)
    assert not torch.equal(expected, first)
