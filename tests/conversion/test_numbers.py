# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Numbers of files that may come from anyone: what counts as one, and what is said of what does not."""

import math
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import yaml

from conversion.checkpoint import inert_pickle
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.numbers import LARGEST, parse_size, read_count, read_number, shown
from conversion.checkpoint.rounding import first_negative, first_nonfinite
from conversion.checkpoint.sizes import format_bytes
from conversion.checkpoint.strict_json import parse_json_object
from sft.yaml_text import load_yaml

HUGE = 10**400
NO_NUMBER = [None, True, False, "3", [3], {}, math.nan, math.inf, -math.inf, HUGE, -HUGE, 10**9000, object()]


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: shown(value))
def test_what_is_no_number_is_refused_in_one_line(value):
    for read in (read_number, read_count):
        with pytest.raises(
            CheckpointError, match=r"^a\.pt: lr is .*, expected a (whole )?number.*; leave it out\.$"
        ) as e:
            read(value, "a.pt: lr", way_out="leave it out")
        assert len(str(e.value)) < 300


@pytest.mark.parametrize(
    ("value", "range_", "message"),
    [
        (-1e-9, {"least": 0.0}, "x is -1e-09, expected a number at least 0."),
        (1.0, {"least": 0.0, "below": 1.0}, "x is 1.0, expected a number at least 0 and below 1."),
        (0, {"above": 0.0}, "x is 0, expected a number above 0."),
        (2, {"most": 1.5}, "x is 2, expected a number at most 1.5."),
    ],
)
def test_a_number_out_of_its_range_is_refused(value, range_, message):
    with pytest.raises(CheckpointError) as error:
        read_number(value, "x", **range_)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [0, -0.0, 3, 2.5, 5e-324, LARGEST, -LARGEST, int(LARGEST), np.float64(0.5)])
def test_numbers_are_read_as_they_are(value):
    assert read_number(value, "x") == value


@pytest.mark.parametrize("value", [-1, 2.5, 2**53 + 2, -1e-300])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(CheckpointError, match="expected a whole number from 0 on"):
        read_count(value, "x")
    assert read_count(3.0, "x") == 3


@pytest.mark.parametrize(
    "text",
    [
        "1000",
        "5GB",
        "500 MB",
        "2GiB",
        "0.5kb",
        "1.000000001 TB",
        " 3 mib ",
        "01000",
        ".25GB",
        "9223372036854775807",
        "300 B",
        "1TiB",
    ],
)
def test_sizes_are_exact(text):
    number, unit = text.strip().upper().rstrip("KMGTIB").strip(), text.strip().upper().lstrip("0123456789. ")
    base = 1024 if "I" in unit else 1000
    factor = base ** "BKMGT".index(unit[0]) if unit else 1
    assert parse_size(text) == math.floor(Fraction(number) * factor)


@pytest.mark.parametrize(
    "size",
    [
        *("", "0", "0GB", "0.0", "-1", "nan", "inf", "1e9", "GB", ".", "٣GB", "5 apples", "0.4", "1EB"),
        *("1" * 401, "1" * 5000, "0." + "1" * 5000 + "B", "9223372036854775808"),
        *(True, None, math.nan, -5, 0.5, 1e30, math.inf, HUGE, 10**9000),
    ],
    ids=lambda size: shown(size),
)
def test_what_is_no_size_is_refused_in_one_line(size):
    with pytest.raises(ValueError, match=r"^size .* (is not a positive number of bytes|is more than the 9,2)") as error:
        parse_size(size)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("size", ["80", "1", "999", " 256 ", "0001", "80.5"])
def test_a_unit_is_not_forgotten(size):
    """--gpu-memory 80 is no GPU of 80 bytes, and --max-shard-size 5 no file a tensor."""
    with pytest.raises(ValueError, match=r"^size .* has no unit, and so few bytes hold nothing: \d+GB, or \d+MB\?$"):
        parse_size(size)


@pytest.mark.parametrize(("size", "nbytes"), [(80e9, 80 * 10**9), (1e16, 10**16), (7, 7), (1.5, 1)])
def test_numbers_are_sizes_too(size, nbytes):
    assert parse_size(size) == nbytes


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("value", [HUGE, -HUGE, 2**1024])
def test_no_integer_of_a_pickle_is_larger_than_any_float(value, protocol):
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged or hostile: it holds an integer of 1\d+ bits"):
        inert_pickle.load(pickle.dumps({"step": value}, protocol), "a.pt")
    near = {"step": 2**1023 - 1}
    assert float(inert_pickle.load(pickle.dumps(near, protocol), "a.pt")["step"]) == 2.0**1023


def test_no_integer_of_json_is_larger_than_any_float():
    with pytest.raises(CheckpointError, match="a number has 309 digits"):
        parse_json_object(b'{"a": 1' + b"0" * 308 + b"}", "a.json")
    assert float(parse_json_object(b'{"a": -' + b"9" * 308 + b"}", "a.json")["a"]) == -1e308


def test_nan_is_in_the_log_of_a_run_alone():
    text = b'{"a": NaN, "b": -Infinity}'
    assert math.isnan(parse_json_object(text, "a.json", nan=True)["a"])
    for options in ({}, {"infinite": True}):
        with pytest.raises(CheckpointError, match="NaN is no number"):
            parse_json_object(text, "a.json", **options)


def test_an_integer_of_yaml_that_python_cannot_write_out_is_refused():
    with pytest.raises(yaml.YAMLError, match=r"0xfff.* is no int"):
        load_yaml("a: 0x" + "f" * 6000)
    assert load_yaml("a: 0x" + "f" * 100)["a"] == 16**100 - 1


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "bfloat16"])
def test_the_first_negative_number_is_found(dtype):
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    values = np.zeros(300_000, kind)
    values[:5] = [0.0, -0.0, 1.0, 3e-5, -0.0]
    assert first_negative(values.view(np.uint8).data, kind) is None
    tiny = np.nextafter(np.zeros(1, kind), np.full(1, -1, kind))  # the smallest there is
    for at in (299_999, 7):
        values[at] = tiny[0]
        assert first_negative(values.view(np.uint8).data, kind) == at == int(np.argmax(values < 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_first_number_that_is_not_finite_is_found(dtype):
    """Infinities and NaN of both signs, each alone at any place, beside the largest and the smallest finite numbers."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bounds = ml_dtypes.finfo(kind)
    finite = np.array([0.0, -0.0, bounds.max, bounds.min, bounds.tiny, -bounds.tiny], kind)
    values = np.resize(finite, 200_003)  # more than is looked at in a step
    assert first_nonfinite(values.view(np.uint8).data, kind) is None
    words = values.view(f"<u{kind.itemsize}")
    sign, infinity = 1 << (8 * kind.itemsize - 1), int(np.array(np.inf, kind).view(words.dtype))
    for word in (infinity, infinity + 1, sign - 1, sign + infinity, sign + infinity + 1, 2 * sign - 1):
        for at in (200_002, 70_000, 65_535, 0):
            kept = words[at]
            words[at] = word
            assert first_nonfinite(values.view(np.uint8).data, kind) == at
            words[at] = kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_number_of_16_bits_is_finite_or_not(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.arange(1 << 16, dtype=np.uint16).view(kind)
    found = [first_nonfinite(values[i : i + 1].view(np.uint8).data, kind) is None for i in range(1 << 16)]
    assert found == np.isfinite(values.astype(np.float32)).tolist()


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999499, "999 kB"),
        (999500, "1 MB"),
        (999999999, "1 GB"),
        (1234000000.0, "1.23 GB"),
        (999600000000.0, "0.9996 TB"),
        (8700000000000.0, "8.7 TB"),
        (9999600000000000.0, "10,000 TB"),
        (9.2e18, "9,200,000 TB"),
    ],
)
def test_sizes_are_shown_as_people_write_them(count, shown):
    assert format_bytes(count) == shown
