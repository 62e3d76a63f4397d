# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One rounding from exact values to an element type, and what no element of it can hold.

ml_dtypes rounds float64 to bfloat16 by way of float32, so that what lies just beside the middle of two neighbours
lands on it first, and on the wrong neighbour then. And a product in float64 is rounded itself, which can do the same.
Both are mended where they happen: values on a middle are moved to the side of it that the exact value is on.
"""

import math
import threading
from functools import lru_cache

import ml_dtypes
import numpy as np

from .dtypes import DType
from .scratch import scratch

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_FRACTION = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}  # bits after the point of each type
_SIGNIFICANT = {np.dtype(np.float32): 24, np.dtype(np.float64): 53}
KEPT_TABLES = 16  # of all threads
_making_tables = threading.Lock()
_AT_A_TIME = 1 << 16  # elements, which stay in a core's cache
_MIDDLE = 0x8000  # of the bits that float32 has and bfloat16 has not


def largest(dtype: DType) -> float:
    """The largest finite number of a type."""
    return float(ml_dtypes.finfo(dtype.numpy).max)


def round_once(values: np.ndarray, dtype: DType, out: np.ndarray) -> None:
    """Round float64 values to the nearest of a type, ties to even; what is too large becomes infinite.

    Args:
        values: float64 array.
        dtype: what they are rounded to.
        out: array of that type and of as many dimensions, for the result.
    """
    with np.errstate(all="ignore"):  # whoever calls looks for infinities
        if dtype.name != "bfloat16":
            out[...] = values
            return
        single = scratch("single", values.shape, _FLOAT32)
        single[...] = values
        _leave_middles(single, values)
        out[...] = single


def _leave_middles(single: np.ndarray, values: np.ndarray) -> None:
    """Move float32 numbers that lie halfway between two of bfloat16 to the side on which their float64 values are."""
    bits = single.reshape(-1).view("<u4")
    middles = np.nonzero(bits.view("<u2")[::2] == _MIDDLE)[0]
    if middles.size:
        exact = values.reshape(-1)[middles]
        outside = np.sign(np.abs(exact) - np.abs(bits[middles].view("<f4").astype(_FLOAT64)))
        moves = np.nan_to_num(outside).astype(np.int64)  # a NaN stays where it is
        bits[middles] = (bits[middles].astype(np.int64) + moves).astype(np.uint32)


def scale_and_shift(source: np.ndarray, scale: float, offset: float, dtype: DType, out: np.ndarray) -> None:
    """`source * scale + offset` in float64, so that `round_once` to `dtype` gives what the exact value would.

    Where there are both, the product is a float64 number, and the sum with that is exact.

    Args:
        source: values of any floating type.
        scale: factor.
        offset: added to the product.
        dtype: what the result will be rounded to.
        out: float64 array of the source's shape, for the result.
    """
    out[...] = source
    if scale != 1.0:
        out *= scale
    if offset != 0.0:
        out += offset
    if dtype.name == "float64" or (offset == 0.0 and _is_exact_product(source.dtype, scale)):
        return
    # An inexact result that ends in so many zeros is a middle, or one of the type's own numbers.
    zeros = (1 << (_FRACTION["float64"] - _FRACTION[dtype.name] - 1)) - 1
    low = scratch("low", out.shape, np.dtype(np.uint64))
    np.bitwise_and(out.view(np.uint64), zeros, out=low)
    middles = np.nonzero(low == 0)
    if middles[0].size:
        _move_off(out, middles, source, scale, offset)


def _is_exact_product(dtype: np.dtype, factor: float) -> bool:
    """Whether products with a factor need no rounding to float64, whatever the other number of a type is."""
    digits, _ = math.frexp(factor)
    factor_bits = 53 - _trailing_zeros(int(abs(digits) * 2**53))
    return factor_bits <= 1 or _SIGNIFICANT.get(dtype, 11) + factor_bits <= 53


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() - 1 if number else 53


def _move_off(out: np.ndarray, places: tuple[np.ndarray, ...], source: np.ndarray, scale: float, offset: float) -> None:
    """Move some float64 results to the side of them on which their exact values are, if they are not those."""
    values, results = source[places].astype(_FLOAT64), out[places]
    error = _error_of_sum(values * scale, offset, results) if offset else _error_of_product(values, scale)
    moves = (error != 0.0) & np.isfinite(error) & (results != 0.0)  # what is infinite or too small to see stays so
    out[places] = np.where(moves, np.nextafter(results, np.copysign(np.inf, error)), results)


def _error_of_product(values: np.ndarray, factor: float) -> np.ndarray:
    """What rounding took from products, but for their powers of two (Dekker 1971, on digits that cannot overflow)."""
    a, b = np.frexp(values)[0], math.frexp(factor)[0]
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(np.asarray(b))
    return ((a_high * b_high - a * b) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers of 26 bits that add up to each (Veltkamp)."""
    shifted = numbers * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - numbers)
    return high, numbers - high


def _error_of_sum(values: np.ndarray, offset: float, sums: np.ndarray) -> np.ndarray:
    """What rounding took from sums (Knuth's TwoSum)."""
    added = sums - values
    return (values - (sums - added)) + (offset - added)


def scaled_table(source: DType, scale: float, offset: float, dtype: DType) -> np.ndarray:
    """What each of the 65,536 numbers of a 16-bit type becomes, times a factor, plus an offset, rounded once.

    Args:
        source: the type, whose bits are the table's index.
        scale: factor.
        offset: added to the product.
        dtype: of the result.
    """
    with _making_tables:  # one thread makes it, where all would at the first block of a tensor
        return _scaled_table(source, scale, offset, dtype)


@lru_cache(maxsize=KEPT_TABLES)
def _scaled_table(source: DType, scale: float, offset: float, dtype: DType) -> np.ndarray:
    numbers = np.arange(1 << 16, dtype="<u2").view(source.numpy)
    values, table = np.empty(numbers.shape, _FLOAT64), np.empty(numbers.shape, dtype.numpy)
    with np.errstate(all="ignore"):
        scale_and_shift(numbers, scale, offset, dtype, values)
    round_once(values, dtype, table)
    table.setflags(write=False)
    return table


def widens(source: DType, dtype: DType) -> bool:
    """Whether every finite number of a type is finite in another."""
    return largest(source) <= largest(dtype)


def first_overflow(source: np.ndarray, result: np.ndarray) -> int | None:
    """Place of the first finite number that became infinite in a result of 16-bit floats or wider, or None."""
    at = first_nonfinite(result.reshape(-1).view(np.uint8).data, result.dtype)
    values, results = source.reshape(-1), result.reshape(-1)
    for start in range(at // _AT_A_TIME * _AT_A_TIME if at is not None else values.size, values.size, _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        over = np.isfinite(values[part].astype(_FLOAT64)) & ~np.isfinite(results[part].astype(_FLOAT64))
        if over.any():
            return start + int(np.argmax(over))
    return None


def first_nonfinite(data: memoryview, dtype: np.dtype) -> int | None:
    """Index of the first NaN or infinity among little-endian elements of a floating type of IEEE's, or None.

    Looks at bits: whatever has every exponent bit set is one of the two. As whole numbers with a sign, all that are
    negative are below the rest, and as numbers without one above it; in both, a larger magnitude is above a smaller.
    """
    all_words = np.frombuffer(data, f"<u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    infinity = int(np.asarray(np.inf, dtype).view(all_words.dtype))
    for start in range(0, all_words.size, _AT_A_TIME):
        words = all_words[start : start + _AT_A_TIME]
        if int(words.max()) >= sign + infinity or int(words.view(f"<i{dtype.itemsize}").max()) >= infinity:
            return start + int(np.argmax((words & (sign - 1)) >= infinity))
    return None


def first_negative(data: memoryview, dtype: np.dtype) -> int | None:
    """Index of the first number below zero among finite little-endian elements of a floating type of IEEE's, or None.

    Minus zero is not below it.
    """
    all_words = np.frombuffer(data, f"<u{dtype.itemsize}")
    minus_zero = 1 << (8 * dtype.itemsize - 1)
    for start in range(0, all_words.size, _AT_A_TIME):
        words = all_words[start : start + _AT_A_TIME]
        if int(words.max()) > minus_zero:
            return start + int(np.argmax(words > minus_zero))
    return None
