# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How often an epoch has each row, and which rows are held out, by formulas written out again here."""

import unicodedata
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.checks import Conversation
from sft.data.formats import DATASET_NAME, DataError
from sft.data.holdout import find_overlap, hold_out, is_held, normalize_question
from sft.data.mixture import order_rows, take
from sft.data.sources import Source, parse_sources, pin, read_content


def hashes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 64, count, np.uint64)


def source(**settings):
    return Source("some", ("some.jsonl",), **settings)


def walk(order, lengths, weight, max_rows, max_tokens):
    """One row after another, pass after pass, as long as there is room."""
    wanted = int((Decimal(repr(weight)) * len(order)).to_integral_value(ROUND_HALF_UP))
    wanted = wanted if max_rows is None else min(wanted, max_rows)
    counts, tokens = [0] * len(order), 0
    for step in range(wanted):
        row = order[step % len(order)]
        tokens += lengths[row]
        if max_tokens is not None and tokens > max_tokens:
            break
        counts[row] += 1
    return counts


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    weight=st.one_of(st.integers(1, 5000).map(lambda value: value / 1000), st.floats(0.01, 7)),
    max_rows=st.none() | st.integers(1, 150),
    max_tokens=st.none() | st.integers(1, 3000),
    seed=st.integers(0, 1 << 32),
)
def test_counts_are_those_of_walking(lengths, weight, max_rows, max_tokens, seed):
    rows, tokens = hashes(len(lengths)), np.array(lengths, np.int32)
    # The order of the seed is told by which row comes in with each more.
    firsts = [take(source(max_rows=count + 1), rows, tokens, seed) for count in range(len(rows))]
    steps = np.diff([np.zeros(len(rows), int), *firsts], axis=0)
    assert (steps.sum(axis=1) == 1).all()
    assert (steps >= 0).all()
    expected = walk(steps.argmax(axis=1).tolist(), lengths, weight, max_rows, max_tokens)
    given_source = source(weight=weight, max_rows=max_rows, max_tokens=max_tokens)
    if not any(expected):
        with pytest.raises(DataError, match=r"some: weight .* rows is no row"):
            take(given_source, rows, tokens, seed)
        return
    found = take(given_source, rows, tokens, seed)
    assert found.tolist() == expected
    place = np.random.default_rng(seed).permutation(len(rows))
    assert (
        take(given_source, rows[place], tokens[place], seed).tolist() == found[place].tolist() or max_tokens is not None
    )


def test_a_half_of_the_rows_is_any_half():
    """Of 2,000 seeds each row is in a half about as often as a fair coin says, and so is each pair."""
    rows, tokens = hashes(20), np.ones(20, np.int32)
    drawn = np.array([take(source(weight=0.5), rows, tokens, seed) for seed in range(2000)])
    assert (drawn.sum(axis=1) == 10).all()
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 5 * 0.5 / 2000**0.5
    both = (drawn.T @ drawn) / 2000
    assert np.abs(both[np.triu_indices(20, 1)] - 0.5 * 9 / 19).max() < 5 * 0.5 / 2000**0.5


def test_several_sources_are_mixed_and_one_keeps_its_order():
    counts = [np.array([1, 2, 0, 1]), np.array([0, 3])]
    one = order_rows(counts[:1], seed=0)
    assert one.tolist() == [0, 1, 3, 1]
    both = order_rows(counts, seed=0)
    assert sorted(both.tolist()) == [0, 1, 1, 3, 5, 5, 5]
    assert both.tolist() != sorted(both.tolist())
    assert both.tolist() == order_rows(counts, seed=0).tolist() != order_rows(counts, seed=1).tolist()


def share(size, rows):
    """How many rows of each source: a share rounded up, or a number by the greatest remainders."""
    if size < 1:
        return [int((Decimal(str(size)) * count).to_integral_value(ROUND_CEILING)) for count in rows]
    counts = [size * count // sum(rows) for count in rows]
    remainders = [size * count % sum(rows) for count in rows]
    for index in sorted(range(len(rows)), key=lambda index: (-remainders[index], index))[: size - sum(counts)]:
        counts[index] += 1
    return counts


def lowest(columns, counts):
    """The questions of so many rows of each source with the least hashes."""
    return {int(number) for column, count in zip(columns, counts, strict=True) for number in sorted(column)[:count]}


@settings(max_examples=100, deadline=None)
@given(
    questions=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=60), min_size=1, max_size=4),
    size=st.sampled_from([0.01, 0.02, 0.1, 0.3, 1, 2, 7]),
)
def test_a_question_is_on_one_side_wherever_it_stands(questions, size):
    numbers = hashes(61, seed=1)
    columns = [numbers[column] for column in questions]
    rows = [len(column) for column in questions]
    expected = lowest(columns, share(size, rows))
    if all(int(number) in expected for column in columns for number in column):
        with pytest.raises(DataError, match="rows with one question come on one side"):
            hold_out(columns, size, rows)
        return
    held = hold_out(columns, size, rows)
    assert set(held.tolist()) == expected
    sides = [is_held(column, held) for column in columns]
    asked = {question for column, side in zip(questions, sides, strict=True) for question in np.array(column)[side]}
    trained = {question for column, side in zip(questions, sides, strict=True) for question in np.array(column)[~side]}
    assert asked
    assert trained
    assert not asked & trained
    if size < 1:
        assert all(side.sum() >= -(-Decimal(str(size)) * len(side) // 1) for side in sides)
    else:
        assert sum(side.sum() for side in sides) >= min(size, sum(rows))
    # Another order of rows and of sources is the same split.
    again = hold_out([column[::-1] for column in columns[::-1]], size, rows[::-1])
    assert size >= 1 or again.tolist() == held.tolist()


def test_where_no_question_repeats_the_split_has_just_as_many_rows():
    columns = [hashes(1000, seed=1), hashes(50, seed=2), hashes(1, seed=3)]
    held = hold_out(columns, 0.02, [1000, 50, 1])
    assert [int(is_held(column, held).sum()) for column in columns] == [20, 1, 1]
    held = hold_out(columns, 100, [1000, 50, 1])
    assert [int(is_held(column, held).sum()) for column in columns] == [95, 5, 0]


def test_all_rows_with_one_question_cannot_be_split():
    with pytest.raises(DataError, match="would hold out all 9 rows, which ask 1 different questions"):
        hold_out([np.zeros(9, np.uint64)], 0.1, [9])


def test_a_question_is_the_same_in_other_widths_cases_and_spaces():
    texts = ["What  is\nTHIS?", " what is this? ", "Ｗｈａｔ is this？", "WHAT IS THIS?"]
    found = {normalize_question(Conversation([{"role": "user", "content": text}], "a:1")) for text in texts}
    assert found == {"what is this?"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert normalize_question(Conversation(messages, "a:1")) == "why?"


def test_a_question_is_the_same_in_capitals_of_every_script():
    """Of each letter that has another case, whole or with its marks apart; but ı, whose capital is that of i."""

    def normal(text):
        return normalize_question(Conversation([{"role": "user", "content": text}], "a:1"))

    assert normal("Τι είναι η πρωτεΐνη;") == normal("ΤΙ ΕΊΝΑΙ Η ΠΡΩΤΕΪ́ΝΗ;")
    letters = [letter for letter in map(chr, range(0x1F000)) if letter.upper() != letter or letter.lower() != letter]
    assert len(letters) > 2000
    for letter in letters:
        written = {letter, letter.upper(), letter.lower(), unicodedata.normalize("NFD", letter), normal(letter)}
        assert len({normal(text) for text in written}) == 1 or letter == "ı", letter


def test_overlap_is_counted():
    rows, questions = np.array([1, 2, 3, 4], np.uint64), np.array([10, 20, 30, 40], np.uint64)
    overlap = find_overlap((rows, questions), (np.array([2, 9, 9], np.uint64), np.array([20, 30, 90], np.uint64)))
    assert overlap == (3, 1, 2, 2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "data is an empty list"),
        (["a.jsonl"], r"data\[0\] is 'a.jsonl'; expected a mapping such as"),
        ([{"weight": 1}], r"data\[0\].path is None; expected a file"),
        ([{"path": []}], r"data\[0\].path is \[\]; expected a file"),
        ([{"path": "a.jsonl", "fraction": 0.5}], r"data\[0\]: unknown key fraction; did you mean weight\?"),
        ([{"path": "a.jsonl", "wieght": 0.5}], r"unknown key wieght; did you mean weight\?"),
        ([{"path": "a.jsonl", "weight": 0}], r"data\[0\].weight is 0; expected a number above 0"),
        ([{"path": "a.jsonl", "weight": True}], r"data\[0\].weight is True"),
        ([{"path": "a.jsonl", "weight": float("nan")}], r"data\[0\].weight is nan"),
        ([{"path": "a.jsonl", "max_rows": 1.5}], r"data\[0\].max_rows is 1.5; expected a whole number"),
        ([{"path": "a.jsonl", "max_tokens": -1}], r"data\[0\].max_tokens is -1"),
        (
            [{"path": "a.jsonl", "revision": "main"}],
            r"data\[0\].revision has no effect on a.jsonl, which is no dataset",
        ),
        ([{"path": "a/b@x", "revision": "main"}], r"data\[0\].revision is main, but a/b@x names one too"),
        ([{"path": "a/b", "split": "test[:9%]"}], r"data\[0\]: a/b:test\[:9%\] is no name of a dataset"),
        ([{"path": "a.jsonl"}, {"path": "a.jsonl"}], r"data\[0\] and data\[1\] are both called a.jsonl"),
    ],
)
def test_a_wrong_source_is_named(entries, message):
    with pytest.raises(DataError, match=message):
        parse_sources(entries)


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"path": "a/b"}, "a/b"),
        ({"path": "a/b", "revision": "refs/convert/parquet"}, "a/b@refs/convert/parquet"),
        ({"path": "a/b", "split": "test"}, "a/b:test"),
        ({"path": "a/b", "config": "en"}, "a/b:en:train"),
        ({"path": "a/b@v1", "config": "en", "split": "test"}, "a/b@v1:en:test"),
    ],
)
def test_a_dataset_of_the_hub_is_named_with_its_revision(entry, place):
    (found,) = parse_sources([entry])
    assert found.places == (place,)
    match = DATASET_NAME.fullmatch(place)
    given_revision = entry.get("revision") or ("v1" if "@" in entry["path"] else None)
    assert (match["path"], match["revision"]) == ("a/b", given_revision)


def test_the_commit_that_is_read_is_pinned(monkeypatch):
    """The Hub cannot be asked here; what it is asked, and what is made of its answer, can be seen."""
    import huggingface_hub

    asked = []

    class Answer:
        sha = "c" * 40

    def dataset_info(self, name, revision=None, **kwargs):
        asked.append((name, revision))
        return Answer()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert pin("a/b:en:test") == f"a/b@{'c' * 40}:en:test"
    assert pin("a/b@v1:test") == f"a/b@{'c' * 40}:test"
    assert asked == [("a/b", None), ("a/b", "v1")]
    assert pin("nowhere.jsonl") == "nowhere.jsonl"


def test_without_the_hub_it_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"^a/b: no such file, nor a dataset to be had \("):
        pin("a/b")


def test_the_digest_is_of_content_alone(tmp_path):
    for name, text in {"a.jsonl": "1\n", "b.jsonl": "2\n", "c.jsonl": "1\n", "d.json": "1\n"}.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (read_content([str(tmp_path / name)]).digest for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.json"))
    assert a == c
    assert len({a, b, d}) == 3
    both = [str(tmp_path / name) for name in ("a.jsonl", "c.jsonl")]
    assert read_content(both).digest != read_content([both[0], both[0]]).digest, (
        "ids that repeat in one file are refused"
    )
    with pytest.raises(DataError, match=r"missing\.jsonl: No such file"):
        read_content([str(tmp_path / "missing.jsonl")])
