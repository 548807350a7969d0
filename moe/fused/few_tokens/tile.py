"""How the few-token kernels are cut into programs where the config names no tile: by the lengths of rows."""

from __future__ import annotations

import functools

from moe.fused.few_tokens.config import MatvecTile
from moe.gemm.config import GemmConfig, WeightLayout

ELEMENTS_A_WARP = 256  # bf16 elements that a warp loads at once, 16 bytes a lane
MAX_BLOCK_K = 1024
LONG_ROW = 4096  # elements: from here on a row has enough of them for a warp, or for many programs
MANY_STEPS = 6  # of a slot's row: two slots' are as many as are loaded ahead


@functools.cache
def default_slot_tile(config: GemmConfig) -> MatvecTile:
    """gemm1: by the length of its rows, a column (gate and up) a program of four warps, or several.

    Many small programs ramp up and drain fastest, which is most of what is lost with one token. Where rows are long, a warp has
    enough to load with a column of its own, and four columns a program spare the programs of absent slots. Registers hold what
    a warp has in flight, which limits the rest. The token count has no part in it, so a token alone has the bits that it has in
    a batch.
    """
    length = config.in_features
    if not config.is_gated or length <= ELEMENTS_A_WARP:
        block_k = _block_k(length, MAX_BLOCK_K)
        block_n = max(1, MAX_BLOCK_K // block_k)
        if not config.is_gated and not _masks_loads(config):
            block_n *= 2  # a column has one row of weights, not two
        return MatvecTile(block_n=block_n, block_k=block_k, num_warps=_num_warps(block_k))
    if length % ELEMENTS_A_WARP:
        return MatvecTile(block_n=2, block_k=512, num_warps=2)  # the last step is masked
    if length >= LONG_ROW:
        return MatvecTile(block_n=4, block_k=256, num_warps=4)
    if length % MAX_BLOCK_K == 0:
        return MatvecTile(block_n=1, block_k=1024, num_warps=4)
    return MatvecTile(block_n=4, block_k=256, num_warps=2)


@functools.cache
def default_token_tile(config: GemmConfig, top_k: int, *, is_slice: bool = False) -> MatvecTile:
    """gemm2: one or two columns a warp, and mostly a warp a program where there are several slots to sum.

    Each slot's row is summed and rounded by itself. Within a warp that takes no barrier, so loads of the next slots go on.
    Besides, dependent programs pile up on the first multiprocessors that gemm1 leaves unless there are enough small ones
    for all. What is loaded before gemm1 has ended comes for nothing, but its registers leave room for fewer warps. Where the
    last step is masked, its predicates take registers too, and where a plain row has many steps, their addresses do. A
    slice loads nothing ahead.
    """
    if config.in_features <= ELEMENTS_A_WARP:  # half a warp a row
        return MatvecTile(block_n=4, block_k=_block_k(config.in_features, ELEMENTS_A_WARP // 2), num_prefetched=8)
    block_k = _block_k(config.in_features, 512 if top_k <= 2 else ELEMENTS_A_WARP)
    if top_k <= 2:
        return MatvecTile(block_n=2, block_k=block_k, num_warps=_num_warps(block_k), num_prefetched=12)
    if is_slice:
        return MatvecTile(block_n=4, block_k=block_k, num_warps=2)
    if config.out_features >= LONG_ROW:
        return MatvecTile(block_n=1, block_k=block_k, num_prefetched=16)
    has_many_steps = config.in_features >= MANY_STEPS * block_k and config.weight_format.layout is WeightLayout.MajorK
    num_prefetched = 11 if _masks_loads(config) else 10 if has_many_steps else 12
    return MatvecTile(block_n=2, block_k=block_k, num_prefetched=num_prefetched)


def _masks_loads(config: GemmConfig) -> bool:
    """Whether the last step of a contraction is cut short."""
    return config.in_features % _block_k(config.in_features, ELEMENTS_A_WARP) != 0


def _num_warps(block_k: int) -> int:
    """As many as load a step of a row at once, so that rows and vector lie in registers alike."""
    return max(1, block_k // ELEMENTS_A_WARP)


def _block_k(in_features: int, widest: int) -> int:
    """The widest step of 16-byte loads that cuts the contraction evenly; 256 elements at most, the last ones masked, if none."""
    for block_k in (1024, 512, 256):
        if block_k <= widest and in_features % block_k == 0:
            return block_k
    return min(ELEMENTS_A_WARP, widest, max(64, 1 << (in_features - 1).bit_length()))
