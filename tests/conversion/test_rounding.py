# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Values are rounded once: against exact rational arithmetic, where two roundings would show."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from conversion.checkpoint.rounding import (
    first_overflow,
    largest,
    round_once,
    scale_and_shift,
    scaled_table,
    widens,
)
from tests.fixtures.exact_rounding import FORMATS, LARGEST, nearest, round_array

ALL = (BFLOAT16, FLOAT16, FLOAT32, FLOAT64)
NARROW = (BFLOAT16, FLOAT16, FLOAT32)


def rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    out = np.empty(values.shape, dtype.numpy)
    round_once(values, dtype, out)
    return out.astype(np.float64)


def converted(source: np.ndarray, scale: float, offset: float, dtype: DType) -> np.ndarray:
    values = np.empty(source.shape)
    with np.errstate(all="ignore"):
        scale_and_shift(source, scale, offset, dtype, values)
    return rounded(values, dtype)


def near_middles(dtype: DType) -> st.SearchStrategy[float]:
    """Doubles on, and a few steps beside, the middle of two neighbours of a type, from the smallest to the largest."""
    words = st.integers(0, (1 << (8 * dtype.itemsize - 1)) - 1)

    def beside(word: int, steps: int, sign: float) -> float:
        below = float(np.array(word, f"<u{dtype.itemsize}").view(dtype.numpy))
        bits, smallest = FORMATS[dtype.name]
        if not math.isfinite(below):
            below = largest(dtype)
        exponent = math.frexp(below)[1] - 1 if below else -2000
        middle = below + math.ldexp(1.0, max(exponent - bits + 1, smallest) - 1)
        for _ in range(abs(steps)):
            middle = math.nextafter(middle, math.inf if steps > 0 else -math.inf)
        return sign * middle

    return st.builds(beside, words, st.integers(-3, 3), st.sampled_from([1.0, -1.0]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data())
def test_float64_is_rounded_once(dtype, data):
    finite = st.floats(allow_nan=False, allow_infinity=False)
    values = np.array(data.draw(st.lists(near_middles(dtype) | finite, min_size=1, max_size=20)))
    np.testing.assert_array_equal(rounded(values, dtype), round_array(lambda value: value, values, dtype.name))


def test_the_way_by_float32_rounds_twice():
    """What ml_dtypes does, and why there is more to it than a cast."""
    value = np.array([1 + 2**-8 + 2**-40])  # just above the middle of 1 and 1 + 2^-7
    assert value.astype(ml_dtypes.bfloat16).astype(float) == 1.0
    assert rounded(value, BFLOAT16) == 1 + 2**-7 == nearest(Fraction(float(value[0])), "bfloat16")


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_what_is_not_finite_stays_what_it_is(dtype):
    odd = np.array([0x7FF8100000000001, 0xFFF8000010000000], np.uint64).view(np.float64)  # NaN with bits in the middle
    values = np.array([np.inf, -np.inf, np.nan, -0.0, *odd])
    found = rounded(values, dtype)
    np.testing.assert_array_equal(found, [np.inf, -np.inf, np.nan, 0.0, np.nan, np.nan])
    assert np.signbit(found[3])


@pytest.mark.parametrize("target", ALL, ids=str)
@pytest.mark.parametrize("source", ALL, ids=str)
@given(data=st.data())
def test_a_factor_or_an_offset_is_rounded_once(source, target, data):
    """Factors such as 0.9, whose products often are next to short numbers, and those made to hit a middle."""
    width = {BFLOAT16: 32, FLOAT16: 16, FLOAT32: 32, FLOAT64: 64}[source]
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=width) | near_middles(target)
    values = np.array(data.draw(st.lists(numbers, min_size=1, max_size=12)))
    values = np.clip(values, -largest(source), largest(source)).astype(source.numpy)
    middle = data.draw(near_middles(target))
    hits = middle / float(values[0]) if values[0] and 1e-30 < abs(float(values[0])) < 1e30 else 0.7
    factor = data.draw(st.sampled_from([0.9, 0.3, 1 / 3, 1.5, 2.7, -0.7, 2.0**-20, math.sqrt(1.25), hits]))
    offset = data.draw(st.sampled_from([1.0, 0.0, -0.1, 2.0**-30, middle]))
    factor = factor if math.isfinite(factor) and factor else 0.7
    offset = offset if math.isfinite(offset) else 1.0  # the middle above the largest double is no double
    exact_factor, exact_offset = Fraction(factor), Fraction(offset)
    np.testing.assert_array_equal(
        converted(values, factor, 0.0, target), round_array(lambda value: value * exact_factor, values, target.name)
    )
    np.testing.assert_array_equal(
        converted(values, 1.0, offset, target), round_array(lambda value: value + exact_offset, values, target.name)
    )


@pytest.mark.parametrize("source", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("target", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize(("scale", "offset"), [(0.9, 0.0), (2.0**-17, 0.0), (1.0, 1.0), (1e5, 0.0)])
def test_every_number_of_16_bits(source, target, scale, offset):
    numbers = np.arange(1 << 16, dtype="<u2").view(source.numpy)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        finite = np.isfinite(numbers.astype(np.float64))
    found = scaled_table(source, scale, offset, target).astype(np.float64)
    some = np.flatnonzero(finite)[:: 7 if source is FLOAT16 else 11]
    exact = round_array(lambda value: value * Fraction(scale) + Fraction(offset), numbers[some], target.name)
    np.testing.assert_array_equal(found[some], exact)
    assert not np.isfinite(found[~finite]).any()


def test_ranges():
    assert {dtype.name: Fraction(largest(dtype)) for dtype in ALL} == LARGEST
    assert [[widens(a, b) for b in (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)] for a in (FLOAT16, BFLOAT16, FLOAT32)] == [
        [True] * 4,
        [False, True, True, True],
        [False, False, True, True],
    ]


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_an_overflow_is_what_was_finite(dtype):
    source = np.array([1.0, np.nan, np.inf, -np.inf, -2.0, 3.0])
    result = source.astype(dtype.numpy)
    assert first_overflow(source, result) is None
    result[[4, 5]] = [-np.inf, np.inf]
    assert first_overflow(source, result) == 4
    assert first_overflow(source.reshape(3, 2), result.reshape(3, 2)) == 4
    assert first_overflow(source[:0], result[:0]) is None
