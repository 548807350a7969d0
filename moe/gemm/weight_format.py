"""Weights from any WeightFormat to any other, an expert at a time.

Logical weights are [E, N, K], rows in their own order; a gated W1 has its gate rows first, then its up rows. A bias has a number for
each row, in the order of the rows. Packing

    1. puts the halves of a gated W1 in gate_up_order; "interleaved": R[2j] = gate j, R[2j + 1] = up j
    2. if shuffled, interleaves the halves of a gated W1: R[2j] = W[j], R[2j + 1] = W[N/2 + j]
    3. if shuffled, moves row j of R to row 32 * (j // 32) + 8 * (j % 4) + (j % 32) // 4
    4. lays the [N, K] matrix out as MajorK [N, K], MajorMn [K, N] or BlockMajorK [K / 64, N, 64]

For FLASHINFER that gives, of a W1 with I = 64 and halves [up; gate], rows 0 2 .. 14, 64 66 .. 78, 1 3 .. 15, 65 67 .. 79
and so on. Source of the shuffled format: flashinfer/utils.py and fused_moe/core.py (shuffle for epilogue_tile_m = 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.checks import no_case
from moe.gemm.config import BLOCK_MAJOR_K, SHUFFLE_ROWS, GemmConfig, WeightFormat, WeightLayout


class WeightStrides(NamedTuple):
    """Element (row, k) of an expert's weight lies at row * row + k // 64 * block + k % 64 * k."""

    row: int
    k: int
    block: int


def weight_strides(config: GemmConfig) -> WeightStrides:
    """Strides in elements of the stored weight that `config` describes."""
    match config.weight_format.layout:
        case WeightLayout.MajorK:
            return WeightStrides(row=config.in_features, k=1, block=BLOCK_MAJOR_K)
        case WeightLayout.MajorMn:
            return WeightStrides(row=1, k=config.weight_rows, block=BLOCK_MAJOR_K * config.weight_rows)
        case WeightLayout.BlockMajorK:
            return WeightStrides(row=BLOCK_MAJOR_K, k=1, block=BLOCK_MAJOR_K * config.weight_rows)
    raise no_case(config.weight_format.layout, "moe/gemm/weight_format.py, weight_strides")


def pack_weights(logical: Tensor, weight_format: WeightFormat, *, is_gated: bool) -> Tensor:
    """Logical weights [E, N, K] (gate rows first where gated) -> the same in `weight_format`, a tensor of its own.

    Args:
        is_gated: whether this is the W1 of a gated activation; False for a W2 and for the W1 of Relu2.

    Raises:
        ValueError: where N or K do not fit the format.
    """
    return convert_weights(logical, WeightFormat(), weight_format, is_gated=is_gated)


def unpack_weights(weights: Tensor, weight_format: WeightFormat, *, is_gated: bool) -> Tensor:
    """Weights in `weight_format` -> logical weights [E, N, K] (gate rows first where gated), a tensor of its own.

    Raises:
        ValueError: where the shape does not fit the format.
    """
    return convert_weights(weights, weight_format, WeightFormat(), is_gated=is_gated)


def convert_weights(weights: Tensor, format_from: WeightFormat, format_to: WeightFormat, *, is_gated: bool) -> Tensor:
    """Weights of all experts from one format to another, on the device where they lie.

    Besides the result it takes memory for one expert at a time. No gradient is recorded, also of a parameter's weights.

    Args:
        weights: [E, N, K], [E, K, N] or [E, K / 64, N, 64] of any dtype, as format_from says.
        is_gated: whether this is the W1 of a gated activation.

    Raises:
        ValueError: where the shape does not fit one of the formats.
    """
    num_rows, num_columns = matrix_shape(weights, format_from.layout)
    for weight_format in (format_from, format_to):
        _expect_fits(num_rows, num_columns, weight_format, is_gated)
    row_of_row = _row_map(num_rows, format_from, format_to, is_gated, weights.device)
    converted = weights.new_empty(weights.shape[0], *_stored_shape(num_rows, num_columns, format_to.layout))
    for expert_from, expert_to in zip(weights.detach(), converted):
        matrix = _as_matrix(expert_from, format_from.layout)
        if row_of_row is not None:
            matrix = matrix.index_select(0, row_of_row)
        expert_to.copy_(_laid_out(matrix, format_to.layout))
    return converted


def pack_bias(logical: Tensor, weight_format: WeightFormat, *, is_gated: bool) -> Tensor:
    """Biases [E, N] of logical weights (gate first where gated) -> the same in the order of rows of `weight_format`.

    A tensor of its own, without a gradient, as `pack_weights` gives.

    Raises:
        TypeError: no tensor.
        ValueError: no two axes, or where N does not fit the format.
    """
    return _reordered(logical, _logical_rows(logical, weight_format, is_gated))


def unpack_bias(bias: Tensor, weight_format: WeightFormat, *, is_gated: bool) -> Tensor:
    """Biases [E, N] in the order of rows of `weight_format` -> those of logical weights.

    Raises:
        TypeError, ValueError: as `pack_bias`.
    """
    return _reordered(bias, _logical_rows(bias, weight_format, is_gated).argsort())


def _reordered(bias: Tensor, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return bias[:, rows]


def _logical_rows(bias: Tensor, weight_format: WeightFormat, is_gated: bool) -> Tensor:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a torch.Tensor, got {type(bias).__name__}; pass a tensor")
    if bias.dim() != 2:
        raise ValueError(f"bias: expected [E, N], got {list(bias.shape)}; reshape it")
    num_rows = bias.shape[1]
    _expect_rows_fit(num_rows, weight_format, is_gated)
    return logical_row_of_stored_row(num_rows, weight_format, is_gated=is_gated, device=bias.device)


def unpack_expert(stored: Tensor, weight_format: WeightFormat, *, is_gated: bool) -> Tensor:
    """One expert's stored weight -> its logical [N, K] (gate rows first where gated); a view where no row moves.

    Raises:
        ValueError: where the shape does not fit the format.
    """
    num_rows, num_columns = matrix_shape(stored[None], weight_format.layout)
    _expect_fits(num_rows, num_columns, weight_format, is_gated)
    matrix = _as_matrix(stored, weight_format.layout)
    row_of_row = _row_map(num_rows, weight_format, WeightFormat(), is_gated, stored.device)
    return matrix if row_of_row is None else matrix.index_select(0, row_of_row)


def logical_row_of_stored_row(
    num_rows: int, weight_format: WeightFormat, *, is_gated: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """[N] int64: which row of the logical weight (gate rows first) each stored row is."""
    row = torch.arange(num_rows, device=device)
    if weight_format.is_shuffled:
        row = SHUFFLE_ROWS * (row // SHUFFLE_ROWS) + 4 * (row % 8) + row % SHUFFLE_ROWS // 8
        if is_gated:
            row = row // 2 + row % 2 * (num_rows // 2)
    elif is_gated and weight_format.gate_up_order == "interleaved":
        row = row // 2 + row % 2 * (num_rows // 2)
    if is_gated and not weight_format.is_gate_first:
        row = (row + num_rows // 2) % num_rows
    return row


def _row_map(
    num_rows: int, format_from: WeightFormat, format_to: WeightFormat, is_gated: bool, device: torch.device
) -> Tensor | None:
    """[N]: the stored row of `format_from` that each stored row of `format_to` comes from; None where all stay."""
    if format_from.is_shuffled == format_to.is_shuffled and (
        not is_gated or format_from.gate_up_order == format_to.gate_up_order
    ):
        return None
    logical_from = logical_row_of_stored_row(num_rows, format_from, is_gated=is_gated, device=device)
    logical_to = logical_row_of_stored_row(num_rows, format_to, is_gated=is_gated, device=device)
    return logical_from.argsort()[logical_to]


def matrix_shape(weights: Tensor, layout: WeightLayout) -> tuple[int, int]:
    """N and K of weights [E, ..] in this layout.

    Raises:
        TypeError: no tensor.
        ValueError: where the shape does not fit the layout.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a torch.Tensor, got {type(weights).__name__}; pass a tensor")
    shape = list(weights.shape)
    match layout:
        case WeightLayout.MajorK:
            if len(shape) == 3:
                return shape[1], shape[2]
            wanted = "[E, N, K]"
        case WeightLayout.MajorMn:
            if len(shape) == 3:
                return shape[2], shape[1]
            wanted = "[E, K, N]"
        case WeightLayout.BlockMajorK:
            if len(shape) == 4 and shape[3] == BLOCK_MAJOR_K:
                return shape[2], shape[1] * BLOCK_MAJOR_K
            wanted = f"[E, K/{BLOCK_MAJOR_K}, N, {BLOCK_MAJOR_K}]"
        case _:
            raise no_case(layout, "moe/gemm/weight_format.py, matrix_shape")
    raise ValueError(f"weights: expected {wanted} for {layout.name}, got {shape}; reshape them or name their format")


def _expect_fits(num_rows: int, num_columns: int, weight_format: WeightFormat, is_gated: bool) -> None:
    if weight_format.layout is WeightLayout.BlockMajorK and num_columns % BLOCK_MAJOR_K:
        raise ValueError(
            f"BlockMajorK: expected K to be a multiple of {BLOCK_MAJOR_K}, got K={num_columns}; "
            "use MajorK, or pad the weights"
        )
    _expect_rows_fit(num_rows, weight_format, is_gated)


def _expect_rows_fit(num_rows: int, weight_format: WeightFormat, is_gated: bool) -> None:
    if weight_format.is_shuffled and num_rows % SHUFFLE_ROWS:
        raise ValueError(
            f"shuffled weights: expected a multiple of {SHUFFLE_ROWS} rows, got N={num_rows}; "
            "use is_shuffled=False, or pad the weights"
        )
    if is_gated and num_rows % 2:
        raise ValueError(f"gated weights: expected an even number of rows (gate and up), got N={num_rows}")


def _stored_shape(num_rows: int, num_columns: int, layout: WeightLayout) -> tuple[int, ...]:
    match layout:
        case WeightLayout.MajorK:
            return (num_rows, num_columns)
        case WeightLayout.MajorMn:
            return (num_columns, num_rows)
        case WeightLayout.BlockMajorK:
            return (num_columns // BLOCK_MAJOR_K, num_rows, BLOCK_MAJOR_K)
    raise no_case(layout, "moe/gemm/weight_format.py, _stored_shape")


def _as_matrix(stored: Tensor, layout: WeightLayout) -> Tensor:
    """One expert's stored weight as [N, K], rows as they are stored."""
    match layout:
        case WeightLayout.MajorK:
            return stored
        case WeightLayout.MajorMn:
            return stored.T
        case WeightLayout.BlockMajorK:
            return stored.transpose(0, 1).flatten(1)
    raise no_case(layout, "moe/gemm/weight_format.py, _as_matrix")


def _laid_out(matrix: Tensor, layout: WeightLayout) -> Tensor:
    """[N, K] as a view in the shape that the layout stores."""
    match layout:
        case WeightLayout.MajorK:
            return matrix
        case WeightLayout.MajorMn:
            return matrix.T
        case WeightLayout.BlockMajorK:
            return matrix.unflatten(1, (-1, BLOCK_MAJOR_K)).transpose(0, 1)
    raise no_case(layout, "moe/gemm/weight_format.py, _laid_out")
