# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows as 8-bit floats (float8_e4m3fn) with a scale each, and back.

The rule, for a row w of a tensor in bfloat16, float16 or float32, is that of compressed-tensors' FP8_DYNAMIC:

    scale = max |w| / 448, rounded to the tensor's dtype; where that is 0, the dtype's epsilon
    code  = w / scale, computed in float32, limited to +-448, rounded to the nearest float8, ties to even

A float32 quotient of bfloat16 or float16 numbers is never so near to the middle of two float8 that its own rounding
decides, so for these a code is the exact quotient, rounded once. (compressed-tensors divides in the tensor's dtype on a
CPU, which puts some quotients on a middle that they were beside; its kernel for GPUs, by its text, in float32.)

Each step is done for many rows at once. A step that is short costs more than its arithmetic as soon as two threads take
turns between steps: row by row, two took twice as long for everything as one.
"""

import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from .dtypes import FLOAT8, DType
from .errors import Unquantisable
from .normal_stream import look_up
from .plan import TensorPlan
from .rounding import round_once
from .scratch import scratch

LARGEST_CODE = 448.0  # of float8_e4m3fn
KEPT_SCALES_BYTES = 8 * 2**20  # of all threads: the rows of files of 80 GB, if they are 20,480 long
QUANTISING_BYTES = 3 * 2**20  # of arrays that a thread holds to quantise or dequantise, beside rows and codes
_AT_A_TIME = 1 << 17  # elements of a step: half as many stay in a core's cache, and threads wait longer for each other
_WORDS = 1 << 16
_FLOAT32, _UINT8, _UINT16, _UINT32 = map(np.dtype, ("<f4", "u1", "<u2", "<u4"))
_EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}  # from 1 to the next number

Make: TypeAlias = Callable[[int, int], np.ndarray]
"""Makes the elements `start .. stop` of a tensor, which the thread's next call takes away."""


class FoundScales:
    """Scales that were found while rows were quantised, so that those who write them need not read all again.

    No byte depends on what is kept: what is not there is found again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, np.ndarray] = {}  # of a tensor, NaN where it is not known

    def put(self, values: TensorPlan, row: int, scales: np.ndarray) -> None:
        """Keep the scales of rows from `row` on; of the tensors that came first, none where there is no room."""
        with self._lock:
            if values.name not in self._rows:
                self._rows[values.name] = np.full(values.shape[0], np.nan, values.dtype.numpy)
            self._rows[values.name][row : row + len(scales)] = scales
            while len(self._rows) > 1 and sum(rows.nbytes for rows in self._rows.values()) > KEPT_SCALES_BYTES:
                del self._rows[next(iter(self._rows))]

    def get(self, values: TensorPlan, start: int, stop: int) -> np.ndarray:
        """The scales of the rows `start .. stop`, NaN where they are not known."""
        with self._lock:
            found = self._rows.get(values.name)
            return np.full(stop - start, np.nan, values.dtype.numpy) if found is None else found[start:stop].copy()

    def forget(self, values: TensorPlan) -> None:
        """Keep those of a tensor no longer."""
        with self._lock:
            self._rows.pop(values.name, None)


# Tensors, of which a part is made at a time.


def stream_codes(
    values: TensorPlan, start: int, stop: int, stretch: int, make: Make, found: FoundScales
) -> Iterator[memoryview]:
    """The codes of the elements `start .. stop` of a [rows, n] tensor in order, in chunks; each may overwrite the last.

    Args:
        values: the tensor.
        start: first element.
        stop: one past the last element.
        stretch: most elements that are made at a time. A row that is longer, or of which only a part is asked for, is
            read for its scale first, unless that is known.
        make: makes elements of it.
        found: the scales of rows that are known; those that are found are added.

    Raises:
        Unquantisable: an element is NaN or infinite.
    """
    columns, at = values.shape[1], start
    while at < stop:
        row, inside = divmod(at, columns)
        if columns > stretch or inside or at + columns > stop:
            end = min(stop, (row + 1) * columns)
            scale = _scales(values, row, row + 1, stretch, make, found)
            for first in range(at, end, stretch):
                part = make(first, min(first + stretch, end))
                yield _codes(part.reshape(1, -1), scale)
        else:
            end = at + min(stretch, stop - at) // columns * columns
            rows = make(at, end).reshape(-1, columns)
            scale = scales_of(_finite_largest(values, rows, row, 0), values.dtype)
            found.put(values, row, scale)
            yield _codes(rows, scale)
        at = end


def stream_scales(
    values: TensorPlan, start: int, stop: int, stretch: int, make: Make, found: FoundScales
) -> Iterator[memoryview]:
    """The scales of the rows `start .. stop`; the arguments are those of `stream_codes`."""
    scales = _scales(values, start, stop, stretch, make, found)
    found.forget(values)
    yield scales.view(np.uint8).data


def _scales(values: TensorPlan, start: int, stop: int, stretch: int, make: Make, found: FoundScales) -> np.ndarray:
    """The scales of some rows: those that are known, and those of rows that have to be read."""
    columns = values.shape[1]
    scales = found.get(values, start, stop)
    at_a_time = max(1, stretch // columns)
    for first in range(start, stop, at_a_time):
        part = slice(first - start, min(first + at_a_time, stop) - start)
        if np.isnan(scales[part].astype(_FLOAT32)).any():
            scales[part] = _scales_of_rows(values, first, part.stop + start, stretch, make)
            found.put(values, first, scales[part])
    return scales


def _scales_of_rows(values: TensorPlan, start: int, stop: int, stretch: int, make: Make) -> np.ndarray:
    columns = values.shape[1]
    if columns <= stretch:
        rows = make(start * columns, stop * columns).reshape(-1, columns)
        return scales_of(_finite_largest(values, rows, start, 0), values.dtype)
    parts = []  # of one row
    for column in range(0, columns, stretch):
        first = start * columns + column
        part = make(first, first + min(stretch, columns - column)).reshape(1, -1)
        parts.append(_finite_largest(values, part, start, column))
    return scales_of(np.max(parts, axis=0), values.dtype)


def _finite_largest(values: TensorPlan, rows: np.ndarray, row: int, column: int) -> np.ndarray:
    """`largest_of` of some rows of a tensor, of which the first element is at that row and column.

    Raises:
        Unquantisable: an element is NaN or infinite.
    """
    tops = largest_of(rows)
    for index in np.nonzero(~np.isfinite(tops))[0][:1]:
        place = f"{row + index}, {column + int(np.argmax(~np.isfinite(rows[index].astype(_FLOAT32))))}"
        raise Unquantisable(
            f"{values.name}[{place}] is NaN or infinite as {values.dtype}, for which there is no scale; repair it, or "
            "leave --quantize out."
        )
    return tops


def _codes(rows: np.ndarray, scales: np.ndarray) -> memoryview:
    codes = scratch("codes", rows.shape, _UINT8)
    quantise(rows, scales, codes)
    return codes.reshape(-1).data


# Rows in memory.


def largest_of(rows: np.ndarray) -> np.ndarray:
    """The largest absolute value of each row [rows, n] of floats, as float32 [rows]; NaN or infinite if any is.

    Magnitudes are ordered as their bits are, and whatever is not finite is above the rest.
    """
    words = rows.view(f"<u{rows.itemsize}")
    magnitude = words.dtype.type((1 << (8 * rows.itemsize - 1)) - 1)
    tops = np.zeros(len(rows), words.dtype)
    step = max(1, _AT_A_TIME // rows.shape[1])
    for row in range(0, len(rows), step):
        for column in range(0, rows.shape[1], _AT_A_TIME):
            part = words[row : row + step, column : column + _AT_A_TIME]
            magnitudes = scratch("magnitudes", part.shape, words.dtype)
            np.bitwise_and(part, magnitude, out=magnitudes)
            np.maximum(tops[row : row + step], magnitudes.max(axis=1), out=tops[row : row + step])
    return tops.view(rows.dtype).astype(_FLOAT32)


def scales_of(tops: np.ndarray, dtype: DType) -> np.ndarray:
    """The scales [rows], of a dtype, of rows whose largest absolute values are `tops`, float32."""
    with np.errstate(under="ignore"):
        scales = (tops / np.float32(LARGEST_CODE)).astype(dtype.numpy)
    scales[scales == 0] = _EPSILONS[dtype.name]
    return scales


def quantise(rows: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
    """The codes of rows: the quotients in float32, cut to 16 bits, and looked up.

    Fewer bits decide between two float8 than there are in 16; what is cut off is not lost but in the last of them.

    Args:
        rows: [rows, n] of floats, contiguous and finite.
        scales: [rows], of the same dtype.
        codes: [rows, n] of uint8, contiguous, for the bits of the float8.
    """
    table, step = _codes_of_words(), max(1, _AT_A_TIME // rows.shape[1])
    divisors = scales.astype(_FLOAT32)[:, None]
    for row in range(0, len(rows), step):
        for column in range(0, rows.shape[1], _AT_A_TIME):
            part = slice(row, row + step), slice(column, column + _AT_A_TIME)
            quotients = scratch("quotients", rows[part].shape, _FLOAT32)
            quotients[...] = rows[part]
            with np.errstate(over="ignore", under="ignore"):
                quotients /= divisors[part[0]]
            bits, cut = quotients.view(_UINT32), scratch("cut", quotients.shape, _UINT32)
            np.bitwise_and(bits, 0xFFFF, out=cut)
            cut += 0xFFFF  # reaches the 17th bit if any was set
            cut |= bits
            cut >>= 16
            words = scratch("words", cut.shape, _UINT16)
            words[...] = cut
            look_up(table, words, codes[part])


@lru_cache(maxsize=1)
def _codes_of_words() -> np.ndarray:
    """What each bfloat16 is as a float8, by its bits: rounded to the nearest, ties to even, at most 448."""
    values = (np.arange(_WORDS, dtype=_UINT32) << 16).view(_FLOAT32)
    with np.errstate(invalid="ignore"):
        table = np.clip(values, -LARGEST_CODE, LARGEST_CODE).astype(FLOAT8.numpy).view(_UINT8)
    table.setflags(write=False)
    return table


def dequantise(codes: np.ndarray, scales: np.ndarray, dtype: DType, out: np.ndarray) -> np.ndarray:
    """The products of codes and their scales, each rounded once.

    Args:
        codes: bits of float8_e4m3fn.
        scales: bfloat16, float16 or float32, of a shape that broadcasts to that of the codes.
        dtype: of the result.
        out: for the result, of the codes' shape.

    Returns:
        The exact products, which the thread's next call takes away.
    """
    sizes = np.abs(scales.astype(np.float64))
    is_short = scales.dtype.itemsize == 2 and bool(((sizes >= 2.0**-100) & (sizes <= 2.0**100)).all())
    exact = np.dtype(np.float32 if is_short else np.float64)  # of 4 bits times 8, 11 or 24
    products = scratch("products", codes.shape, exact)
    look_up(_values_of_codes(exact), codes, products)
    with np.errstate(all="ignore"):  # infinities are for the caller to find
        products *= scales.astype(exact)
        if is_short:
            out[...] = products
        else:
            round_once(products, dtype, out)
    return products


@lru_cache(maxsize=2)
def _values_of_codes(dtype: np.dtype) -> np.ndarray:
    table = np.arange(256, dtype=_UINT8).view(FLOAT8.numpy).astype(dtype)
    table.setflags(write=False)
    return table
