"""The bound P on rows, which the host computes without knowing the ids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.flow import TopK
from moe.permute.chunks import NUMBA_CHUNKING, TRITON_CHUNKING, Chunking
from moe.permute.config import MAX_TILE_ROWS, MIN_TILE_ROWS, PermuteConfig


def num_rows_of(counts: list[int], tile_rows: int) -> int:
    return sum(-(-count // tile_rows) * tile_rows for count in counts)


@st.composite
def configs(draw: st.DrawFn) -> PermuteConfig:
    num_experts = draw(st.integers(1, 300))
    num_local = draw(st.integers(1, num_experts))
    return PermuteConfig(
        num_experts=num_experts,
        num_local_experts=num_local,
        local_expert_offset=draw(st.integers(0, num_experts - num_local)),
        top_k=draw(st.integers(1, 32)),
        tile_rows=draw(st.sampled_from([None, 16, 32, 64, 128])),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configs(), st.integers(0, 500), st.randoms(use_true_random=False))
def test_no_choice_of_ids_takes_more_rows_than_the_bound(config, num_tokens, random) -> None:
    num_slots = num_tokens * config.top_k
    num_popular = random.randint(
        1, config.num_local_experts
    )  # duplicates in a row are allowed: any expert may take any slot
    counts = [0] * config.num_local_experts
    for _ in range(random.randint(0, num_slots)):
        counts[random.randrange(num_popular)] += 1
    assert num_rows_of(counts, config.rows_per_tile(num_tokens)) <= config.max_rows(num_tokens)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configs(), st.integers(0, 500))
def test_the_bound_is_reached_by_one_slot_an_expert_and_the_rest_on_one(config, num_tokens) -> None:
    num_slots = num_tokens * config.top_k
    num_active = min(config.num_local_experts, num_slots)
    counts = [1] * num_active
    if counts:
        counts[0] += num_slots - num_active
    assert num_rows_of(counts, config.rows_per_tile(num_tokens)) == config.max_rows(num_tokens)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configs(), st.integers(0, 20000))
def test_a_tile_holds_the_mean_load_of_all_ranks_and_twice_its_root(config, num_tokens) -> None:
    tile_rows = config.rows_per_tile(num_tokens)
    if config.tile_rows is not None:
        assert tile_rows == config.tile_rows
        return
    mean_load = math.ceil(num_tokens * config.top_k / config.num_experts)
    assert tile_rows in (16, 32, 64, 128)
    if mean_load <= 12:
        assert tile_rows == MIN_TILE_ROWS
    else:
        assert tile_rows >= min(mean_load + 2 * mean_load**0.5, MAX_TILE_ROWS)
        assert tile_rows / 2 < mean_load + 2 * mean_load**0.5


@pytest.mark.parametrize("tile_rows", [8, 24, 256])
def test_other_tile_sizes_are_refused(tile_rows) -> None:
    with pytest.raises(ValueError, match="tile_rows"):
        PermuteConfig(num_experts=8, num_local_experts=8, top_k=2, tile_rows=tile_rows)


@pytest.mark.parametrize(
    ("num_tokens", "is_refused"), [((1 << 28) - 128, False), ((1 << 28) - 127, True), (1 << 40, True)]
)
def test_as_many_tokens_are_taken_as_rows_have_numbers_in_int32(num_tokens, is_refused) -> None:
    config = PermuteConfig(num_experts=8, num_local_experts=8, top_k=8)
    ids, weights = (torch.empty(num_tokens, 8, dtype=dtype, device="meta") for dtype in (torch.int32, torch.bfloat16))
    assert (config.max_rows(num_tokens) >= 1 << 31) == is_refused
    if not is_refused:
        config.check(TopK(ids, weights))
        return
    with pytest.raises(ValueError, match=rf"num_tokens: expected fewer than 2\^31 rows, got num_tokens={num_tokens}"):
        config.check(TopK(ids, weights))


def test_scratch_holds_the_counts_of_either_planner() -> None:
    config = PermuteConfig(num_experts=256, num_local_experts=256, top_k=8)
    in_triton = 4 * (256 * 256 + 257 * 256)  # counts and slots_before, of 256 chunks
    assert sum(config.scratch_bytes(8192)) == in_triton


@pytest.mark.parametrize("num_experts", [1, 13, 256, 700, 2048])
@pytest.mark.parametrize("chunking", [TRITON_CHUNKING, NUMBA_CHUNKING], ids=["triton", "numba"])
def test_no_smaller_batch_has_more_counts_than_the_bound_of_a_larger_one(chunking: Chunking, num_experts: int) -> None:
    most = 0
    for num_slots in [*range(1000, 400_000, 997), 1 << 20, 1 << 24]:
        most = max(most, chunking.num_counts(num_slots, num_experts))
        assert most <= chunking.most_counts(num_slots, num_experts)


@pytest.mark.parametrize("num_experts", [1, 13, 256, 700, 2048])
@pytest.mark.parametrize("num_slots", [16385, 1 << 20, 1 << 28])
def test_there_are_no_more_chunks_and_counts_than_a_launch_is_made_for(num_slots, num_experts) -> None:
    assert TRITON_CHUNKING.num_chunks(num_slots, num_experts) <= 512
    assert NUMBA_CHUNKING.num_chunks(num_slots, num_experts) <= 128
    assert NUMBA_CHUNKING.num_counts(num_slots, num_experts) <= 65536
