"""How the threads of a planning block share slots, marks and experts: the numbers that its kernel is built for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moe.flow import UnitSize
from moe.runtime.numba_warp_device import WARP_SIZE

SHARED_BYTES = 48 * 1024 - 256  # a block, without asking for more, beside the sums of each warp


class Totals(Enum):
    """Where a block learns how many slots each expert has."""

    CHUNK = "chunk"  # its chunk has all slots, and is placed in one round
    SLOTS = "slots"  # it counts all slots itself
    COUNTS = "counts"  # it sums what `count_kernel` counted of each chunk


@dataclass(frozen=True)
class PlanBlock:
    """A block of the kernel that places slots, a round of them at a time.

    In a round each warp sets bits in a row of marks of its own, a word an expert. Then each thread counts the bits of its
    experts in its part of the rows: with fewer experts than threads, neighbouring lanes share an expert and have a part each.
    """

    num_bins: int  # experts that have a word, a power of two, at least 32
    num_warps: int  # a power of two
    totals: Totals
    unit_size: UnitSize | None = None  # of the units that it makes too

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    @property
    def is_whole(self) -> bool:
        """Whether it is the only block, of one round."""
        return self.totals is Totals.CHUNK

    @property
    def mark_rows(self) -> int:
        """Warps that mark at once, a power of two: all, or as many as have room in shared memory for a word of each expert."""
        num_rows = self.num_warps
        while 4 * num_rows * self._words_of(num_rows) + 12 * self.num_bins > SHARED_BYTES:
            num_rows //= 2
        return num_rows

    @property
    def row_words(self) -> int:
        """Words from a warp's marks to the next one's."""
        return self._words_of(self.mark_rows)

    def _words_of(self, num_rows: int) -> int:
        """So many that lanes that share an expert read from different banks."""
        return self.num_bins + WARP_SIZE // num_rows

    @property
    def num_marks(self) -> int:
        return self.mark_rows * self.row_words

    @property
    def round_slots(self) -> int:
        """Slots placed at once."""
        return self.mark_rows * WARP_SIZE

    @property
    def bins_a_thread(self) -> int:
        return max(self.num_bins // self.num_threads, 1)

    @property
    def num_parts(self) -> int:
        """Neighbouring lanes that share an expert, a power of two."""
        return max(self.num_threads // self.num_bins, 1)

    @property
    def part_steps(self) -> int:
        """Of a reduction over the parts."""
        return self.num_parts.bit_length() - 1

    @property
    def rows_a_part(self) -> int:
        return self.mark_rows // self.num_parts

    @property
    def num_writers(self) -> int:
        """Threads that write around an expert's slots: one block has all experts' rows to write, and many blocks a few each."""
        return self.num_parts if self.is_whole else WARP_SIZE // 2

    @property
    def num_records(self) -> int:
        """Experts of which a block keeps first tile, slots and first unit in shared memory, for others to write around."""
        return 1 if self.is_whole else self.num_bins
