"""What finalize adds to a token's rows: exact where the inputs allow it, else within the rounding that is stated."""

from __future__ import annotations

import pytest
import torch
from permute.test_finalize import DEFAULT, FLOAT32_EPSILON, exact_sum, make_case, permutation_of
from torch import Tensor

from moe.flow import Added, TopK
from moe.permute.config import FinalizeConfig
from moe.permute.reference import finalize_tokens_reference
from moe.testing.closeness import BF16_EPSILON

GATES = ("none", "number", "bf16", "fp32")


def added_to(num_tokens: int, hidden_size: int, device: torch.device, *, gate: str, values: torch.dtype) -> Added:
    """Small whole numbers, gated by powers of two."""
    generator = torch.Generator().manual_seed(num_tokens + hidden_size)
    matrix = torch.randint(-8, 9, (num_tokens, hidden_size), generator=generator).to(device, values)
    if gate in ("none", "number"):
        return Added(matrix, 0.25 if gate == "number" else None)
    numbers = 2.0 ** torch.randint(-3, 3, (num_tokens,), generator=generator)
    return Added(matrix, numbers.to(device, torch.bfloat16 if gate == "bf16" else torch.float32))


def in_float64(added: Added) -> Tensor:
    gate = added.gate
    if isinstance(gate, Tensor):
        return gate.double()[:, None] * added.values.double()
    return (1.0 if gate is None else gate) * added.values.double()


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32], ids=["bf16_values", "fp32_values"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden_size"), [(1, 8, 512), (7, 2, 8), (3, 3, 13), (18, 33, 1032)], ids=str
)
def test_it_is_summed_with_the_rows_and_rounded_once(
    num_tokens, top_k, hidden_size, gate, values, finalize, poisoned_memory
) -> None:
    case = make_case(num_tokens, top_k, hidden_size, finalize.device, is_exact=True, weights=torch.float32)
    added = added_to(num_tokens, hidden_size, finalize.device, gate=gate, values=values)
    output = torch.full((num_tokens, hidden_size), float("nan"), dtype=torch.bfloat16, device=finalize.device)
    assert finalize.run(*case, config=DEFAULT, output=output, added=added) is output
    assert torch.equal(output, (exact_sum(*case)[0] + in_float64(added)).bfloat16())
    assert torch.equal(finalize.run(*case, config=DEFAULT, added=added), output)


@pytest.mark.parametrize("gate", GATES)
def test_random_numbers_are_within_one_rounding_of_float64(gate, finalize, poisoned_memory) -> None:
    case = make_case(9, 5, 264, finalize.device, is_exact=False, weights=torch.float32)
    values = torch.randn(9, 264, generator=torch.Generator().manual_seed(0)).to(finalize.device)
    numbers = torch.rand(9, generator=torch.Generator().manual_seed(1)).to(finalize.device)
    of_name = {"none": None, "number": 0.3, "bf16": numbers.bfloat16(), "fp32": numbers}
    added = Added(values, of_name[gate])
    output = finalize.run(*case, config=DEFAULT, added=added)
    total, magnitude = exact_sum(*case)
    exact = total + in_float64(added)
    in_float32 = 2 * 6 * FLOAT32_EPSILON * (magnitude + in_float64(added).abs())
    assert ((output.double() - exact).abs() <= in_float32 + BF16_EPSILON * (exact.abs() + in_float32)).all()


def test_it_comes_last(finalize) -> None:
    rows = torch.tensor([2.0**24, -(2.0**24)], device=finalize.device).bfloat16()[:, None].repeat(1, 8)
    topk = TopK(torch.zeros(1, 2), torch.ones(1, 2, device=finalize.device))
    permutation = permutation_of([[0, 1]], 2, finalize.device)
    one = Added(torch.ones(1, 8, dtype=torch.bfloat16, device=finalize.device))
    assert finalize.run(rows, topk, permutation, config=DEFAULT, added=one).tolist() == [[1.0] * 8]


def test_a_token_without_rows_gets_it_alone_and_its_nan_stays_in_its_token(finalize, poisoned_memory) -> None:
    rows = torch.full((1, 16), float("nan"), dtype=torch.bfloat16, device=finalize.device)
    topk = TopK(torch.zeros(3, 1), torch.full((3, 1), float("nan"), device=finalize.device))
    values = torch.tensor([[1.5], [float("nan")], [3.0]], device=finalize.device).repeat(1, 16)
    permutation = permutation_of([[-1], [-1], [-1]], 1, finalize.device)
    output = finalize.run(rows, topk, permutation, config=DEFAULT, added=Added(values.bfloat16(), 2.0))
    assert output[0].tolist() == [3.0] * 16
    assert output[1].isnan().all()
    assert output[2].tolist() == [6.0] * 16


@pytest.mark.parametrize("block_h", [64, 256, 8192])
def test_a_row_is_cut_anyhow(block_h, poisoned_memory, triton_device) -> None:
    from moe.permute.finalize import finalize_tokens

    case = make_case(4, 3, 1032, triton_device, is_exact=True, weights=torch.bfloat16)
    added = added_to(4, 1032, triton_device, gate="fp32", values=torch.bfloat16)
    output = finalize_tokens(*case, config=FinalizeConfig(block_h=block_h), added=added)
    assert torch.equal(output, finalize_tokens_reference(*case, config=DEFAULT, added=added))


def test_no_tokens_give_an_empty_output(finalize) -> None:
    case = make_case(0, 2, 64, finalize.device, is_exact=True, weights=torch.bfloat16)
    added = added_to(0, 64, finalize.device, gate="fp32", values=torch.bfloat16)
    assert finalize.run(*case, config=DEFAULT, added=added).shape == (0, 64)


def test_wrong_tensors_are_refused_before_anything_is_written(finalize) -> None:
    rows, topk, permutation = make_case(4, 2, 64, finalize.device, is_exact=True, weights=torch.bfloat16)
    output = torch.full((4, 64), 7.0, dtype=torch.bfloat16, device=finalize.device)
    values = torch.ones(4, 64, dtype=torch.bfloat16, device=finalize.device)
    memory = torch.full((5, 64), 7.0, dtype=torch.bfloat16, device=finalize.device)
    wrong = [
        (r"added: expected \[T=4, H=64\], got \[3, 64\]", Added(values[:3]), output),
        (r"added: expected 2-D \[T=4, H=64\], got 1-D", Added(values[0]), output),
        ("added: expected bfloat16 or float32, got float16", Added(values.half()), output),
        ("added: expected a contiguous tensor", Added(values.repeat(1, 2)[:, :64]), output),
        (r"added\.gate: expected \[T=4\], got \[1\]", Added(values, torch.ones(1, device=values.device)), output),
        (r"added\.gate: expected 1-D \[T=4\], got 2-D", Added(values, torch.ones(4, 1, device=values.device)), output),
        (r"added\.gate: expected a number that is finite in float32, got inf", Added(values, float("inf")), output),
        ("output: expected memory of its own, got a tensor that shares memory with added;", Added(output), output),
        ("output: expected memory of its own, .* with added;", Added(memory[:4]), memory[1:]),
        (r"output: expected memory of its own, .* with added\.gate;", Added(values, output.view(-1)[:4]), output),
    ]
    for message, added, written in wrong:
        with pytest.raises(ValueError, match=message):
            finalize.run(rows, topk, permutation, config=DEFAULT, output=written, added=added)
    for message, added in (
        (r"added: expected a Added, got Tensor; moe\.Added\(values, gate\)", values),
        (r"added\.gate: expected a tensor \[T\] or a number, got bool", Added(values, True)),
        (r"added\.gate: expected a tensor \[T\] or a number, got str", Added(values, "1")),
    ):
        with pytest.raises(TypeError, match=message):
            finalize.run(rows, topk, permutation, config=DEFAULT, output=output, added=added)
    assert (output == 7.0).all()
    assert (memory == 7.0).all()


@pytest.mark.parametrize("hidden_size", [128, 2880, 7168])
def test_kernel_gives_the_bits_of_the_reference_at_full_size(hidden_size, poisoned_memory, cuda) -> None:
    from moe.permute.finalize import finalize_tokens

    case = make_case(4096, 8, hidden_size, cuda, is_exact=True, weights=torch.float32)
    added = added_to(4096, hidden_size, cuda, gate="fp32", values=torch.bfloat16)
    output = finalize_tokens(*case, config=DEFAULT, added=added)
    assert torch.equal(output, finalize_tokens_reference(*case, config=DEFAULT, added=added))


def test_a_captured_sum_follows_what_is_added(cuda) -> None:
    from moe.permute.finalize import finalize_tokens

    case = make_case(33, 4, 520, cuda, is_exact=True, weights=torch.bfloat16)
    added = added_to(33, 520, cuda, gate="bf16", values=torch.float32)
    finalize_tokens(*case, config=DEFAULT, added=added)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = finalize_tokens(*case, config=DEFAULT, added=added)
    added.values.copy_(torch.randint_like(added.values, -8, 9))
    graph.replay()
    assert torch.equal(output, finalize_tokens_reference(*case, config=DEFAULT, added=added))
