"""The weighted sum of a token's rows: exact where the inputs allow it, else within the rounding that is stated."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.flow import Permutation, TopK
from moe.permute.config import FinalizeConfig, PermuteConfig
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference
from moe.testing.closeness import BF16_EPSILON

FLOAT32_EPSILON = 2.0**-24  # half the gap between neighbours, relative
DEFAULT, SPARSE = FinalizeConfig(), FinalizeConfig(is_sparse=True)
either_config = pytest.mark.parametrize("config", [DEFAULT, SPARSE], ids=["dense", "sparse"])


@pytest.fixture(autouse=True)
def sparse_kernel_from_the_first_token(monkeypatch):
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr("moe.permute.finalize.SPARSE_TOKENS", 0)


def permutation_of(row_of_slot: list[list[int]], max_rows: int, device: torch.device) -> Permutation:
    """A permutation of which finalize needs only row_of_slot and P."""
    unused = torch.zeros(1, dtype=torch.int32, device=device)
    return Permutation(
        row_of_slot=torch.tensor(row_of_slot, dtype=torch.int32, device=device),
        token_of_row=torch.zeros(max_rows, dtype=torch.int32, device=device),
        expert_of_tile=unused,
        row_limit_of_tile=unused,
        num_rows=unused,
        num_tiles=unused,
        tile_rows=16,
    )


def make_case(
    num_tokens: int, top_k: int, hidden_size: int, device: torch.device, *, is_exact: bool, weights: torch.dtype
) -> tuple[Tensor, TopK, Permutation]:
    """Rows, weights and a permutation in which a third of the slots are not local; rows that no slot names are NaN.

    is_exact: small integers and powers of two, whose sums float32 holds in any order, with or without fused multiply-add.
    """
    generator = torch.Generator(device=device).manual_seed(num_tokens * top_k + hidden_size)
    on_device = {"generator": generator, "device": device}
    slots = (num_tokens, top_k)
    expert_ids = torch.randint(0, 12, slots, dtype=torch.int32, **on_device)
    config = PermuteConfig(num_experts=12, num_local_experts=8, local_expert_offset=2, top_k=top_k)
    permutation = plan_permutation_reference(TopK(expert_ids, torch.ones(slots, device=device)), config=config)
    shape = (permutation.max_rows, hidden_size)
    if is_exact:
        rows = torch.randint(-8, 9, shape, dtype=torch.bfloat16, **on_device)
        scale = 2.0 ** torch.randint(-3, 3, slots, **on_device)
    else:
        rows = torch.randn(shape, dtype=torch.bfloat16, **on_device)
        scale = torch.rand(slots, **on_device)
    is_named = torch.zeros(permutation.max_rows, dtype=torch.bool, device=device)
    is_named[permutation.row_of_slot[permutation.row_of_slot >= 0].long()] = True
    rows[~is_named] = float("nan")
    return rows, TopK(expert_ids, scale.to(weights)), permutation


def exact_sum(rows: Tensor, topk: TopK, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """The sum and the sum of magnitudes, in float64."""
    local = (permutation.row_of_slot >= 0)[..., None]
    terms = rows.double()[permutation.row_of_slot.clamp(min=0).long()] * topk.weights.double()[..., None]
    terms = torch.where(local, terms, 0.0)  # [T, K, H]
    return terms.sum(1), terms.abs().sum(1)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16_weights", "fp32_weights"])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden_size"),
    [(1, 8, 512), (7, 2, 8), (7, 32, 64), (5, 1, 2056), (18, 8, 1032), (3, 3, 13), (20, 22, 264), (3, 33, 264)],
    ids=lambda value: str(value),
)
@either_config
def test_result_is_within_one_rounding_of_float64(
    config, num_tokens, top_k, hidden_size, weights, finalize, poisoned_memory
):
    case = make_case(num_tokens, top_k, hidden_size, finalize.device, is_exact=False, weights=weights)
    output = finalize.run(*case, config=config)
    exact, magnitude = exact_sum(*case)
    # A product and a sum a choice, each off by FLOAT32_EPSILON of what it holds at most; then one rounding to bf16.
    in_float32 = 2 * top_k * FLOAT32_EPSILON * magnitude
    assert ((output.double() - exact).abs() <= in_float32 + BF16_EPSILON * (exact.abs() + in_float32)).all()


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("block_h", [None, 64, 256, 1024, 8192])
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(4, 264), (19, 1032)], ids=lambda value: str(value))
def test_kernel_gives_the_bits_of_the_reference(
    num_tokens, hidden_size, block_h, is_sparse, poisoned_memory, triton_device
):
    from moe.permute.finalize import finalize_tokens

    case = make_case(num_tokens, 4, hidden_size, triton_device, is_exact=True, weights=torch.bfloat16)
    output = finalize_tokens(*case, config=FinalizeConfig(block_h=block_h, is_sparse=is_sparse))
    assert torch.equal(output, finalize_tokens_reference(*case, config=DEFAULT))
    assert torch.equal(output.double(), exact_sum(*case)[0].bfloat16().double())


def test_output_is_overwritten_and_returned(finalize) -> None:
    case = make_case(9, 4, 136, finalize.device, is_exact=True, weights=torch.bfloat16)
    output = torch.full((9, 136), float("nan"), dtype=torch.bfloat16, device=finalize.device)
    assert finalize.run(*case, config=DEFAULT, output=output) is output
    assert torch.equal(output, exact_sum(*case)[0].bfloat16())


def test_float32_weights_are_not_cut_to_bfloat16(finalize) -> None:
    rows = torch.ones(2, 8, dtype=torch.bfloat16, device=finalize.device)
    topk = TopK(torch.zeros(1, 2), torch.tensor([[1 + 2.0**-10, -1.0]], device=finalize.device))
    output = finalize.run(rows, topk, permutation_of([[0, 1]], 2, finalize.device), config=DEFAULT)
    assert output.tolist() == [[2.0**-10] * 8]


@pytest.mark.parametrize(
    ("values", "total"),
    [([2.0**24, 1.0, -(2.0**24)], 0.0), ([2.0**24, -(2.0**24), 1.0], 1.0), ([256.0, 1.0, 1.0], 258.0)],
    ids=["the_one_is_absorbed", "the_one_survives", "no_rounding_between"],
)
def test_choices_are_summed_in_order_in_float32(values, total, finalize) -> None:
    rows = torch.tensor(values, device=finalize.device).bfloat16()[:, None].repeat(1, 8)
    topk = TopK(torch.zeros(1, 3), torch.ones(1, 3, device=finalize.device))
    output = finalize.run(rows, topk, permutation_of([[0, 1, 2]], 3, finalize.device), config=DEFAULT)
    assert output.tolist() == [[total] * 8]


@either_config
def test_slots_without_a_row_are_skipped_whatever_their_weight(config, finalize, poisoned_memory) -> None:
    rows = torch.full((3, 16), float("nan"), dtype=torch.bfloat16, device=finalize.device)
    rows[1] = 3.0
    weights = torch.tensor([[float("nan"), 2.0], [float("inf"), float("nan")]], device=finalize.device)
    permutation = permutation_of([[-1, 1], [-1, -1]], 3, finalize.device)
    output = finalize.run(rows, TopK(torch.zeros(2, 2), weights), permutation, config=config)
    assert output.tolist() == [[6.0] * 16, [0.0] * 16]


def test_a_nan_that_a_slot_names_is_not_hidden(finalize) -> None:
    rows = torch.full((1, 8), float("nan"), dtype=torch.bfloat16, device=finalize.device)
    topk = TopK(torch.zeros(1, 1), torch.zeros(1, 1, device=finalize.device))
    output = finalize.run(rows, topk, permutation_of([[0]], 1, finalize.device), config=DEFAULT)
    assert output.isnan().all()


def test_no_tokens_give_an_empty_output(finalize) -> None:
    rows, topk, permutation = make_case(0, 2, 64, finalize.device, is_exact=True, weights=torch.bfloat16)
    output = finalize.run(rows, topk, permutation, config=DEFAULT)
    assert output.shape == (0, 64)
    assert output.dtype == torch.bfloat16
    assert finalize.run(rows, topk, permutation, config=DEFAULT, output=output) is output


def test_wrong_tensors_are_refused_before_anything_is_written(finalize) -> None:
    rows, topk, permutation = make_case(4, 2, 64, finalize.device, is_exact=True, weights=torch.bfloat16)
    output = torch.full((4, 64), 7.0, dtype=torch.bfloat16, device=finalize.device)
    wrong = [
        ("rows: expected bfloat16", {"rows": rows.float()}),
        (r"rows: expected \[P=", {"rows": rows[:-1]}),
        (r"expert_weights: expected \[T=4, K=2\]", {"topk": replace(topk, weights=topk.weights[:3])}),
        (r"output: expected \[T=4, H=64\]", {"output": output[:3]}),
        ("output: expected memory of its own", {"output": rows[:4]}),
        ("shares memory with expert_weights", {"topk": replace(topk, weights=output.view(-1)[:8].view(4, 2))}),
        (
            "row_of_slot: expected int32",
            {"permutation": replace(permutation, row_of_slot=permutation.row_of_slot.long())},
        ),
    ]
    for message, change in wrong:
        arguments = {"rows": rows, "topk": topk, "permutation": permutation, "output": output} | change
        with pytest.raises(ValueError, match=message):
            finalize.run(**arguments, config=DEFAULT)
    assert (output == 7.0).all()


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden_size"),
    [(8192, 8, 2048), (4096, 8, 7168), (70000, 4, 128), (2048, 6, 2880)],
    ids=lambda value: str(value),
)
def test_kernel_gives_the_bits_of_the_reference_at_full_size(num_tokens, top_k, hidden_size, poisoned_memory, cuda):
    from moe.permute.finalize import finalize_tokens

    case = make_case(num_tokens, top_k, hidden_size, cuda, is_exact=True, weights=torch.float32)
    output = finalize_tokens(*case, config=DEFAULT)
    assert torch.equal(output, finalize_tokens_reference(*case, config=DEFAULT))
    for _ in range(19):
        assert torch.equal(finalize_tokens(*case, config=DEFAULT), output)


def test_rows_past_two_billion_elements_are_found(cuda) -> None:
    from moe.permute.finalize import finalize_tokens

    max_rows, hidden_size = 600_000, 4096
    rows = torch.empty(max_rows, hidden_size, dtype=torch.bfloat16, device=cuda)
    last = [0, 524_287, 524_288, max_rows - 1]
    for row in last:
        rows[row] = row % 251
    permutation = permutation_of([[row] for row in last], max_rows, cuda)
    topk = TopK(torch.zeros(4, 1), torch.ones(4, 1, device=cuda))
    output = finalize_tokens(rows, topk, permutation, config=DEFAULT)
    assert output[:, 0].tolist() == output[:, -1].tolist() == [row % 251 for row in last]


def test_outputs_past_two_billion_elements_are_found(cuda) -> None:
    from moe.permute.finalize import finalize_tokens

    num_tokens, hidden_size = 600_000, 4096
    rows = torch.arange(2, device=cuda).bfloat16()[:, None].repeat(1, hidden_size)
    permutation = replace(
        permutation_of([[0]], 2, cuda), row_of_slot=(torch.arange(num_tokens, device=cuda).int() % 2)[:, None]
    )
    topk = TopK(torch.zeros(1, 1), torch.ones(num_tokens, 1, device=cuda))
    output = finalize_tokens(rows, topk, permutation, config=DEFAULT)
    assert torch.equal(output.amin(1), output.amax(1))
    assert torch.equal(output[:, 0].int(), permutation.row_of_slot[:, 0])


def test_a_captured_sum_follows_new_rows_and_maps(cuda) -> None:
    from moe.permute.finalize import finalize_tokens

    rows, topk, permutation = make_case(33, 4, 520, cuda, is_exact=True, weights=torch.bfloat16)
    finalize_tokens(rows, topk, permutation, config=DEFAULT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = finalize_tokens(rows, topk, permutation, config=DEFAULT)
    rows.copy_(torch.randint_like(rows, -8, 9))
    permutation.row_of_slot.copy_(torch.randint_like(permutation.row_of_slot, -1, len(rows)))
    graph.replay()
    assert torch.equal(output, finalize_tokens_reference(rows, topk, permutation, config=DEFAULT))
