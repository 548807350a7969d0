"""Buckets of token counts: what is fastest is found once for each, and holds for every count down to the next bucket."""

from __future__ import annotations

from bisect import bisect_left

# Powers of two, where the rows of a tile change with the load, and from 8 on the half-way counts too: the few-token kernels
# stop at 8 to 24 tokens for most layers, and the grouped kernels change over past 48 rows of an expert, a half-way count where
# E / K is a power of two, and past 160. Past 8192 tokens the kernels are bound by arithmetic and nothing changes.
BUCKETS = (
    *(1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    *(16384, 32768, 65536, 131072),
)


def bucket_of(num_tokens: int) -> int | None:
    """The smallest bucket that holds `num_tokens` tokens, 1 for none at all; None past the last."""
    position = bisect_left(BUCKETS, num_tokens)
    return BUCKETS[position] if position < len(BUCKETS) else None


def buckets_up_to(max_num_tokens: int) -> tuple[int, ...]:
    """The buckets of all counts from 1 to `max_num_tokens`; of those past the last bucket there are none."""
    if max_num_tokens < 1:
        return ()
    return BUCKETS[: bisect_left(BUCKETS, max_num_tokens) + 1]
