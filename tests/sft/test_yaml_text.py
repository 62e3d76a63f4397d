# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""YAML that people write: the scalars of YAML 1.2's core schema, and one line for whatever cannot be read."""

import contextlib
import math
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sft.selection import SelectionError
from sft.selection.declaration import read_file
from sft.training.recipe import RecipeError, read_recipe
from sft.yaml_text import load_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # The examples of YAML 1.2.2, 10.3.2, and of the differences to 1.1.
        ("[null, ~, Null, NULL]", [None] * 4),
        ("null", None),
        ("", None),
        ("a:", {"a": None}),
        ("[true, True, false, FALSE]", [True, True, False, False]),
        ("[yes, no, on, Off, y]", ["yes", "no", "on", "Off", "y"]),
        ("[0, 0o7, 0x3A, -19, +12]", [0, 7, 58, -19, 12]),
        ("[010, 0o10, 1:30, 0b1, 1_000, 08]", [10, 8, "1:30", "0b1", "1_000", 8]),
        ("[0., -0.0, .5, +12e03, -2E+05, 1e-9, 1.]", [0.0, -0.0, 0.5, 12000.0, -200000.0, 1e-9, 1.0]),
        ("[.inf, -.Inf, +.INF]", [math.inf, -math.inf, math.inf]),
        ("[2001-12-14, =, 190:20:30.15]", ["2001-12-14", "=", "190:20:30.15"]),
        ("['10', \"true\", '<<']", ["10", "true", "<<"]),
        ("[!!int 3, !!float 3, !!str 3, !!bool true]", [3, 3.0, "3", True]),
        ("a: &a [1]\nb: *a", {"a": [1], "b": [1]}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = load_yaml(text)
    assert found == value
    if isinstance(value, list):
        assert [type(item) for item in found] == [type(item) for item in value]


def test_not_a_number():
    assert math.isnan(load_yaml(".NaN"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: !!bool maybe", "'maybe' is no bool.*line 1, column 7"),
        ("seed: !!int ''", "'' is no int"),
        ("seed: !!int 1:30", "'1:30' is no int"),
        ("seed: !!float ''", "'' is no float"),
        ("seed: !!null x", "'x' is no null"),
        ("seed: !!timestamp x", "'x' is no timestamp"),
        ("seed: " + "9" * 5000, "'9{40}' is no int"),
        ("seed: !!int [1]", "expected a scalar node"),
        ("seed: !!set [1]", "expected a mapping node"),
        ("base: &base {seed: 1}\n<<: *base", r"merges \(<<\) are not supported; write the keys out.*line 2, column 1"),
        ("? [1]\n: 2", "a list or a mapping is no key"),
        ("1: a\n0x1: b", "0x1 is given twice"),
        (LAUGHS + "seed: *i", "aliases stand for more than 10,000 values; write out what is meant"),
        ("seed: &a [*a]", "it holds an alias of itself"),
        ("seed: " + "[" * 5000, "nested too deep"),
        ("seed: *nowhere", "undefined alias"),
        ("seed: !!python/name:os.system ''", "could not determine a constructor"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text, problem, tmp_path):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
    (tmp_path / "mine.yaml").write_text(text)
    for read, refusal in ((read_file, SelectionError), (read_recipe, RecipeError)):
        began = time.monotonic()
        with pytest.raises(refusal, match=f"mine.yaml.* not valid YAML: .*{problem}") as error:
            read(tmp_path / "mine.yaml")
        assert time.monotonic() - began < 5
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


@given(
    st.text(st.sampled_from("!&*<>:-?[]{},'\"|#~ab01.e+ \n"), max_size=30),
    st.sampled_from(
        ["", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!omap ", "!!pairs ", "!!set "]
    ),
)
def test_whatever_the_text_it_is_read_or_refused(text, tag):
    with contextlib.suppress(yaml.YAMLError):
        load_yaml(f"a: {tag}{text}")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc01:.-~<=é \n'\""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab01", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(_json)
def test_what_another_writer_wrote(value):
    assert load_yaml(yaml.safe_dump(value)) == value


CHOICE = "operators: [{operator: domains, own: false}, {operator: random, count: 1}]"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1" + "0" * 400, "seed is a number of 1,329 bits; it is from 0 to"),
        ("seed: 0x" + "f" * 2500, "seed is a number of 10,000 bits; it is from 0 to"),
        ("seed: -1" + "0" * 30, r"seed is -1e\+30; it is from 0 to"),
        ("seed: [" + "abc, " * 1000 + "]", r"seed is \['abc', 'abc', .*\.\.\.\]; expected a number"),
        ("unique_ids: 0x" + "f" * 2500, "unique_ids is a number of 10,000 bits; expected true or false"),
        ("? 0x" + "f" * 2500 + "\n: 1", "unknown key a number of 10,000 bits; known are seed"),
        (f"{'a' * 1000}: 1", r"unknown key 'a{1,60}\.\.\.; known are seed"),
    ],
)
def test_a_value_in_a_message_is_no_longer_than_a_line(text, problem, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{text}\n{CHOICE}")
    with pytest.raises(SelectionError, match=f"mine.yaml: {problem}") as error:
        read_file(tmp_path / "mine.yaml")
    assert len(str(error.value).removeprefix(str(tmp_path))) < 200


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("count: 1" + "0" * 400, "count is a number of 1,329 bits; it is from 1 to"),
        ("quota: {math: 1" + "0" * 400 + "}", "quota: math is a number of 1,329 bits; a share is from 0 to 1"),
    ],
)
def test_numbers_larger_than_a_float(told, problem, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"operators: [{{operator: random, {told}}}]")
    with pytest.raises(SelectionError, match=problem):
        read_file(tmp_path / "mine.yaml")
