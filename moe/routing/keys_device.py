"""Device functions: the total order on scores, as unsigned integers, and bfloat16 from and to float32.

The key of a float32 is the integer image of its bits that grows with the number: -NaN < -inf < ... < -0.0 < +0.0 < ...
< inf < NaN. Key 0 is kept for "no candidate".
"""

from __future__ import annotations

import numpy as np

from moe.runtime.numba_warp_device import (
    bits_of_float,
    computed,
    device_function,
    float_of_bits,
    nearest_bfloat16,
    one_or_more,
)

NO_KEY = np.uint32(0)
_SIGN = np.uint32(0x80000000)
_SIGN_BIT = np.int32(31)
_NAN_BFLOAT16 = np.uint32(0x7FC0)
_HALF_ULP_BFLOAT16 = np.uint32(0x7FFF)  # less one, which the lowest kept bit adds: ties go to even
_SHIFT = np.uint32(16)


@device_function
def _image(bits: np.uint32) -> np.uint32:
    """All bits of a negative number are turned, of others the sign: the shift brings the sign to all."""
    return np.uint32(bits ^ (_SIGN | np.uint32(np.int32(bits) >> _SIGN_BIT)))


@device_function
def key_of_logit(logit: np.float32) -> np.uint32:
    """Key of a number as it came: NaNs keep their sign and payload, but the NaN of all ones, whose image is 0, which takes key 1."""
    return one_or_more(_image(bits_of_float(logit)))


@device_function
def key_of_score(score: np.float32) -> np.uint32:
    """Key of a computed number, or of one that is no NaN. A computed NaN sorts above all."""
    return _image(bits_of_float(computed(score)))


@device_function
def score_of_key(key: np.uint32) -> np.float32:
    """The number that has this key."""
    return float_of_bits(np.uint32(key ^ (_SIGN | ~np.uint32(np.int32(key) >> _SIGN_BIT))))


@device_function
def bfloat16_of_float(value: np.float32) -> np.uint16:
    """float32 -> bits of the nearest bfloat16, ties to even, every NaN to 0x7FC0."""
    bits = bits_of_float(value)
    if value != value:
        return np.uint16(_NAN_BFLOAT16)
    lowest_kept = np.uint32((bits >> _SHIFT) & np.uint32(1))
    return np.uint16(np.uint32(bits + _HALF_ULP_BFLOAT16 + lowest_kept) >> _SHIFT)


@device_function
def float_of_float32(value: np.float32) -> np.float32:
    return value


@device_function
def float_of_bfloat16(bits: np.uint16) -> np.float32:
    """The exact value of a bfloat16 whose bits lie in memory as uint16."""
    return float_of_bits(np.uint32(np.uint32(bits) << _SHIFT))


@device_function
def rounded_to_bfloat16(value: np.float32) -> np.float32:
    """The nearest number that bfloat16 has."""
    return float_of_bits(nearest_bfloat16(value))
