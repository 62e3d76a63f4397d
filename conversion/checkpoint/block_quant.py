# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Q8_0 of ggml: 32 values of a row share a float16 scale and 34 bytes.

    scale = max |x| / 127, in float32, stored as float16
    code  = x / scale, in float32 and by the scale's reciprocal, rounded to the nearest integer, halves away from zero

The codes are of the float32 scale, the stored one is rounded after that: so does ggml's reference, byte for byte.
"""

import numpy as np

from .dtypes import Q8_0
from .scratch import scratch

BLOCK_QUANTISING_BYTES = 2 * 2**20  # of arrays that a thread holds to quantise, beside what it reads and what it makes
_AT_A_TIME = 1 << 12  # blocks of a step: fewer stay in a core's cache, and two threads wait longer for each other
_BLOCK = np.dtype([("scale", "<f2"), ("codes", "i1", (Q8_0.packed,))])
_FLOAT32, _WORD = np.dtype(np.float32), np.dtype("<u8")
_RECORDS = {n: np.dtype([("scale", "<f2"), ("codes", f"<u{n}", (Q8_0.packed // n,))]) for n in (1, 2, 4)}
_SIGN = np.uint32(1 << 31)
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # rounds what is just below a half down, and a half away


def quantise_q8_0(values: np.ndarray, out: np.ndarray) -> int | None:
    """Quantise blocks of values.

    Args:
        values: contiguous array [blocks, 32] of float16, bfloat16, float32 or float64.
        out: contiguous array [blocks] of `Q8_0.numpy`, for the result.

    Returns:
        The first block that has no scale in float16, as one of its values is NaN, infinite or too large; None if all
        have. The result is of no use then.
    """
    for start in range(0, len(values), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        block = out[part].view(_BLOCK)
        _quantise(values[part], block)
        if not np.isfinite(block["scale"]).all():
            return start + int(np.argmin(np.isfinite(block["scale"])))
    return None


@np.errstate(all="ignore")  # what has no scale is told by who looks for it
def _quantise(values: np.ndarray, out: np.ndarray) -> None:
    """Quantise [blocks, 32] values that are turned around first: steps along 32 of a row would be short ones.

    Words of 8 bytes are turned, and the codes of such a word are turned back as one.
    """
    together = _WORD.itemsize // values.itemsize  # values of a word
    turned = scratch("q8 turned", (Q8_0.packed // together, len(values)), _WORD)
    turned[...] = values.view(_WORD).T
    across = turned.view(values.dtype)  # [32 / together, blocks * together]
    scales = _largest(across, together) / np.float32(127)
    out["scale"] = scales
    factors = np.float32(1) / scales
    # Of a scale of 0, and of one so small that it has no reciprocal, all codes are 0; its float16 is 0 as well.
    factors[~np.isfinite(factors)] = 0
    exact = scratch("q8 values", across.shape, _FLOAT32)
    exact[...] = across
    exact *= np.repeat(factors, together)
    halves = scratch("q8 halves", across.shape, _FLOAT32)
    bits = halves.view(np.uint32)  # of a half with the value's sign: numpy's copysign takes ten times as long
    np.bitwise_and(exact.view(np.uint32), _SIGN, out=bits)
    np.bitwise_or(bits, _BELOW_HALF.view(np.uint32), out=bits)
    exact += halves
    codes = scratch("q8 codes", across.shape, np.dtype(np.int8))
    codes[...] = exact  # cuts off what is behind the point
    words = codes.view(f"<u{together}")
    out.view(_RECORDS[together])["codes"] = words.T


def _largest(across: np.ndarray, together: int) -> np.ndarray:
    """The largest absolute value of each block, as float32. Floats that are not negative are ordered as their bits are.

    Args:
        across: [32 / together, blocks * together] values.
        together: values of a block that lie side by side.
    """
    words = across.view(f"<u{across.itemsize}")
    magnitudes = scratch("q8 magnitudes", words.shape, words.dtype)
    np.bitwise_and(words, words.dtype.type(2 ** (8 * across.itemsize - 1) - 1), out=magnitudes)
    largest: np.ndarray = magnitudes.max(axis=0)
    while len(largest) * together > words.shape[1]:  # a maximum along so short an axis takes ten times as long
        largest = np.maximum(largest[::2], largest[1::2])
    return largest.view(across.dtype).astype(_FLOAT32)
