"""Rows of tokens, wherever they lie, to shared memory: asynchronous copies of 16 bytes a thread by 128 threads."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe.runtime.gluon_names_device import copy_elements

BLOCK_K = gl.constexpr(64)  # elements of a row that are copied at a time: 128 bytes
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of a copy: 128 bytes a row


class TokenRows(NamedTuple):
    """Rows of hidden states, [rows, 64]."""

    ptrs: Any  # to their first elements
    is_token: Any  # whether there is one; the others are zeros
    column: Any  # of those elements


@gluon.jit
def lanes(ROWS: gl.constexpr):
    """0 .. ROWS, one for each row of a copy."""
    return gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))


@gluon.jit
def columns():
    """0 .. 64, one for each element of a row."""
    return gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))


@gluon.jit
def rows_of_tokens(hidden_states_ptr, token, column, IN_FEATURES: gl.constexpr):
    """token: of each lane, -1 where there is none."""
    ptrs = hidden_states_ptr + gl.maximum(token, 0).to(gl.int64)[:, None] * IN_FEATURES + column[None, :]
    return TokenRows(ptrs, (token >= 0)[:, None], column)


@gluon.jit
def copy_rows(rows, k, target, IN_FEATURES: gl.constexpr):
    """Start the copy of elements 64 k .. 64 k + 63; those past the row's end become zeros too."""
    in_row = rows.is_token
    if IN_FEATURES % BLOCK_K:
        in_row = rows.is_token & (rows.column < IN_FEATURES - k * BLOCK_K)[None, :]
    copy_elements(target, rows.ptrs + k * BLOCK_K, mask=in_row)
