"""How the slots of a plan are cut among the programs of a launch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunking:
    """Up to max_slots_in_one_launch, every program counts all slots itself, which costs less than further launches.

    Above, chunks are counted first: long enough that there are at most max_chunks of them and max_counts counts.
    """

    block_slots: int  # slots placed at once, one a thread
    max_slots_in_one_launch: int
    max_chunks: int
    max_counts: int | None = None
    columns_a_load: int = 1  # counts of an expert, one a chunk, are made up to a multiple of it

    def chunk_slots(self, num_slots: int, num_experts: int) -> int:
        """Slots of a chunk, a multiple of block_slots."""
        max_chunks = self.max_chunks
        if self.max_counts is not None:
            max_columns = self.max_counts // num_experts
            max_chunks = min(max_chunks, max(max_columns - max_columns % self.columns_a_load, 1))
        num_blocks = -(-num_slots // self.block_slots)
        return -(-num_blocks // max_chunks) * self.block_slots

    def num_chunks(self, num_slots: int, num_experts: int) -> int:
        return -(-num_slots // self.chunk_slots(num_slots, num_experts))

    def num_columns(self, num_slots: int, num_experts: int) -> int:
        """Counts of an expert: one a chunk, and zeros."""
        return -(-self.num_chunks(num_slots, num_experts) // self.columns_a_load) * self.columns_a_load

    def num_counts(self, num_slots: int, num_experts: int) -> int:
        """Counts that pass between launches, `num_columns` an expert."""
        is_one_launch = num_slots <= self.max_slots_in_one_launch
        return 0 if is_one_launch else self.num_columns(num_slots, num_experts) * num_experts

    def most_counts(self, max_slots: int, num_experts: int) -> int:
        """The most that `num_counts` says for up to so many slots: chunks are fewest where they have just grown."""
        if max_slots <= self.max_slots_in_one_launch:
            return 0
        num_chunks = min(-(-max_slots // self.block_slots), self.max_chunks)
        num_counts = (num_chunks + self.columns_a_load - 1) * num_experts
        return min(num_counts, self.max_counts or num_counts)


# About four programs for each multiprocessor of a large GPU; the counts are 4 MB at most, with 2048 experts.
TRITON_CHUNKING = Chunking(block_slots=256, max_slots_in_one_launch=4096, max_chunks=512)
# About one block of 1024 threads for each multiprocessor; every block reads all counts.
NUMBA_CHUNKING = Chunking(
    block_slots=1024, max_slots_in_one_launch=16384, max_chunks=128, max_counts=65536, columns_a_load=4
)
