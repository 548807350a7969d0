"""Buckets of token counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.tuning.buckets import BUCKETS, bucket_of, buckets_up_to


def test_buckets_rise_and_hold_every_power_of_two():
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert {1 << power for power in range(18)} <= set(BUCKETS)


@given(st.integers(1, BUCKETS[-1]))
def test_a_bucket_is_the_smallest_that_holds_the_count(num_tokens: int):
    assert bucket_of(num_tokens) == min(bucket for bucket in BUCKETS if bucket >= num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "bucket"), [(0, 1), (1, 1), (9, 12), (13, 16), (131072, 131072), (131073, None)]
)
def test_ends_and_half_way_counts(num_tokens: int, bucket: int | None):
    assert bucket_of(num_tokens) == bucket


@given(st.integers(0, 2 * BUCKETS[-1]))
def test_buckets_up_to_are_those_that_the_counts_fall_in(max_num_tokens: int):
    counts = {1, *(bucket + 1 for bucket in BUCKETS), *BUCKETS, max_num_tokens}
    reached = {bucket_of(count) for count in counts if 1 <= count <= max_num_tokens} - {None}
    assert buckets_up_to(max_num_tokens) == tuple(sorted(reached))
