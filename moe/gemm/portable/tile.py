"""How much of the output one program computes, by shape and by the GPU's shared memory."""

from __future__ import annotations

import functools

import torch

from moe.gemm.config import BLOCK_MAJOR_K, SHUFFLE_ROWS, GemmConfig, GemmTile
from moe.runtime.device import HOPPER_SHARED_BYTES, num_sms, shared_memory_limit

BARRIER_BYTES = 1024  # what the pipeline's barriers take at the most
BYTES_PER_ELEMENT = 2
DECODE_ROWS = 32  # tiles of up to so many rows stream weights and hardly compute
MIN_DEEP_FEATURES = 1024  # of a contraction: shorter ones were not timed in steps of 128 bytes


def default_tile(config: GemmConfig, tile_rows: int, shared_bytes: int = HOPPER_SHARED_BYTES) -> GemmTile:
    """The tile for row tiles of `tile_rows` rows on a GPU where a block may ask for `shared_bytes`.

    Few rows: weights are streamed by programs that are small enough for two on a multiprocessor, 256 bytes of a row at a
    time, or, where those do not divide it, 128 bytes of twice the rows. Many rows: the widest accumulators that registers
    hold. The sizes did best on an H200, over seven real layers.
    """
    weight_rows, block_k, num_warps, num_stages = _sizes(config, tile_rows, shared_bytes)
    return GemmTile(
        block_n=_block_n(config, weight_rows),
        block_k=block_k if config.in_features % block_k == 0 else BLOCK_MAJOR_K,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def candidate_tiles(config: GemmConfig, tile_rows: int) -> tuple[GemmTile, ...]:
    """Tiles worth measuring for row tiles of `tile_rows` rows; the default comes first."""
    if tile_rows <= DECODE_ROWS:
        sizes = [(128, 128, 4, 4), (128, 64, 8, 3), (64, 256, 4, 3), (64, 128, 4, 4)]
        if config.in_features % 128:
            sizes += [(64, 64, 4, 4), (64, 64, 4, 8)]
    elif tile_rows == 64:
        sizes = [(128, 64, 4, 4), (256, 64, 4, 4), (128, 128, 4, 4)]
    else:
        sizes = [(128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4)]
    tiles = [default_tile(config, tile_rows)]
    for weight_rows, block_k, num_warps, num_stages in sizes:
        if config.in_features % block_k == 0:
            block_n = _block_n(config, weight_rows)
            tiles.append(GemmTile(block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages))
    return tuple(dict.fromkeys(tiles))


def launch_tile(config: GemmConfig, tile_rows: int, device: torch.device) -> GemmTile:
    """The config's tile, or the default one, with as many stages as the GPU's shared memory holds."""
    return _launch_tile(config, tile_rows, shared_memory_limit(device))


def fit_stages(config: GemmConfig, tile: GemmTile, tile_rows: int, shared_bytes: int) -> GemmTile:
    """The tile with its stages lowered until their rows and weights fit in `shared_bytes`, 1 at the least."""
    num_buffers = (shared_bytes - BARRIER_BYTES) // _stage_bytes(config, tile, tile_rows)
    # Without wgmma the operands of a stage pass through registers, and Triton keeps a buffer fewer than stages.
    most_stages = num_buffers if _has_wide_mma(shared_bytes) else num_buffers + 1
    num_stages = max(1, min(tile.num_stages, most_stages))
    return GemmTile(**tile.model_dump() | {"num_stages": num_stages})


@functools.lru_cache(maxsize=1024)
def programs_at_once(config: GemmConfig, tile_rows: int, device: torch.device) -> int:
    """How many programs the GPU's multiprocessors hold at once, by their shared memory."""
    tile = launch_tile(config, tile_rows, device)
    shared_bytes = tile.num_stages * _stage_bytes(config, tile, tile_rows) + BARRIER_BYTES
    return num_sms(device) * max(1, shared_memory_limit(device) // shared_bytes)


@functools.lru_cache(maxsize=1024)
def _launch_tile(config: GemmConfig, tile_rows: int, shared_bytes: int) -> GemmTile:
    tile = config.tile or default_tile(config, tile_rows, shared_bytes)
    return fit_stages(config, tile, tile_rows, shared_bytes)


def _stage_bytes(config: GemmConfig, tile: GemmTile, tile_rows: int) -> int:
    """Shared memory for the rows and weights of a step of the contraction."""
    weight_rows = 2 * tile.block_n if config.is_gated else tile.block_n
    return (tile_rows + weight_rows) * tile.block_k * BYTES_PER_ELEMENT


def _has_wide_mma(shared_bytes: int) -> bool:
    """Whether the GPU's tensor cores read operands from shared memory (wgmma, tcgen05): those have the most of it."""
    return shared_bytes >= HOPPER_SHARED_BYTES


def _sizes(config: GemmConfig, tile_rows: int, shared_bytes: int) -> tuple[int, int, int, int]:
    """Rows of the weight, elements of the contraction, warps, stages."""
    if tile_rows <= DECODE_ROWS:
        if _is_deep(config.in_features) and _has_wide_mma(shared_bytes):
            return 128, 64, 4, 6
        return (64, 128, 4, 4) if config.is_gated else _decode_sizes(config.in_features)
    if tile_rows == 64:
        is_long = config.in_features >= (4096 if config.is_gated else 1024)
        return (128, 128 if is_long and _has_wide_mma(shared_bytes) else 64, 4, 4)
    return (256, 64, 8, 3)


def _decode_sizes(in_features: int) -> tuple[int, int, int, int]:
    """Of gemm2: wide where the contraction is over before a deep pipeline is full, deeper where it is long."""
    if in_features <= 256:
        return 128, 64, 8, 3
    return (64, 128, 4, 4) if in_features < 4096 or in_features % 256 else (64, 256, 4, 3)


def _is_deep(in_features: int) -> bool:
    """Whether a long contraction goes in steps of 128 bytes: as many are on their way as otherwise, in more stages."""
    return in_features >= MIN_DEEP_FEATURES and in_features % 128 != 0


def _block_n(config: GemmConfig, weight_rows: int) -> int:
    """Output columns of a block with so many rows of the weight, no wider than the output needs."""
    columns = weight_rows // 2 if config.is_gated else weight_rows
    fewest = 16 if config.is_gated or not config.weight_format.is_shuffled else SHUFFLE_ROWS
    return max(fewest, min(columns, 1 << (config.out_features - 1).bit_length()))
