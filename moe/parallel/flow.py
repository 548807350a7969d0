"""The value between the two halves of an exchange, and what the halves look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe.flow import TopK


@dataclass(frozen=True)
class WayBack:
    """Where the rows that come back to the tokens' own rank belong, where the exchange moved single rows."""

    num_sent: tuple[int, ...]  # rows that go back to each rank
    num_returned: tuple[int, ...]  # rows that each rank gives back
    row_of_choice: Tensor  # [T, C] int32, among all rows that are returned; -1 for none
    weights: Tensor | None  # [T, C]: what a returned row counts; None: its weight is in it


@dataclass(frozen=True)
class Dispatched:
    """What lies on this rank once tokens have come from all ranks: input of its experts."""

    hidden_states: Tensor  # [R, H] bfloat16; rows without a local expert may be uninitialised
    topk: TopK  # [R, K]: an expert's place in this rank's weights, -1 where it is another's or none
    num_tokens: int  # T, that this rank brought and gets back
    output: Tensor | None = None  # [R, H] bfloat16, where the sums are to be written; None: anywhere
    slots: Tensor | None = (
        None  # [S] int64, numbers r * K + k: `combine` wants their rows, unweighted; None: sums [R, H]
    )
    way_back: WayBack | None = None
    sent: TopK | None = None  # what was dispatched, where `combine` asks it which ranks have a sum


class Dispatch(Protocol):
    """First half: this rank's tokens go where their experts lie."""

    def __call__(self, hidden_states: Tensor, topk: TopK) -> Dispatched:
        """hidden_states [T, H] bfloat16; topk [T, K] with global ids, anything out of [0, E) for an unused slot."""
        ...


class Combine(Protocol):
    """Second half: results go back to the tokens' rank, which sums them in an order that is always the same."""

    def __call__(self, rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        """rows [R, H], or [S, H] where `dispatched.slots` is given -> [T, H] bfloat16, in `output` where given."""
        ...


@dataclass(frozen=True)
class Exchange:
    """Two callables. `dataclasses.replace` swaps either."""

    dispatch: Dispatch
    combine: Combine
