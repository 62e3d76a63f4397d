# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Duplicates: sketches against exact sets, edits the threshold was not chosen on, and who is kept."""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.conversations import EDITS
from sft.selection.dedup import MIN_PAIRS, drop_exact_duplicates, drop_near_duplicates, estimate_overlap, sketch
from sft.selection.rows import content_id, whole_text
from sft.selection.stages import fixed_bytes
from sft.selection.words import hash_words, ngrams, split_words

from .conftest import chat, table


def near_duplicates(chats) -> pa.Table:
    sketches = sketch(table(chats))
    ids = pa.array([content_id(messages) for messages in chats], pa.binary(16))
    return drop_near_duplicates(sketches.append_column("id", ids))


SPELLED_OUT = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def pairs_of(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    digits = [str(SPELLED_OUT.index(word)) if word in SPELLED_OUT else word for word in words]
    return set(pairwise([*digits, "<end>"]))


@pytest.fixture(scope="module")
def fates(corpus) -> list[str | None]:
    return near_duplicates([row["messages"] for row in corpus])["drop"].to_pylist()


def test_overlap_is_estimated(corpus):
    """Against the sets themselves: of 252 slots, the standard deviation of the Jaccard similarity is at most 0.032."""
    texts = [text for text in (whole_text(row["messages"]) for row in corpus) if text.isascii()][:60]
    pairs = [(f"{a[: len(a) * part // 10]} {b}", a) for part in range(11) for a, b in pairwise(texts[: part + 5])]
    sketches = [sketch(table([chat(pair[side]) for pair in pairs])) for side in (0, 1)]
    sets = [[pairs_of(pair[side]) for pair in pairs] for side in (0, 1)]
    sizes = [made["pairs"].to_numpy() for made in sketches]
    assert [size.tolist() for size in sizes] == [list(map(len, side)) for side in sets]
    exact = np.array([len(a & b) / min(len(a), len(b)) for a, b in zip(*sets, strict=True)])
    found = estimate_overlap(*(fixed_bytes(made["sketch"]) for made in sketches), *sizes)
    assert exact.min() < 0.2 < 0.9 < exact.max()
    np.testing.assert_allclose(found, exact, atol=0.25)
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.07


@pytest.mark.parametrize("last", [b"\0", b"a"])
def test_an_id_is_named_whole_whatever_it_ends_with(last):
    ids = [b"x" * 15 + last, b"y" * 16, b"x" * 15 + last]
    dropped = drop_exact_duplicates(pa.table({"id": pa.array(ids, pa.binary(16))}))
    assert dropped["duplicate_of"].to_pylist() == [None, None, ids[0]]


def test_exact_duplicates_keep_the_first():
    ids = [b"%016d" % number for number in (3, 1, 3, 2, 1, 3)]
    made = drop_exact_duplicates(pa.table({"id": pa.array(ids, pa.binary(16))}))
    assert made["drop"].to_pylist() == [None, None, "exact_duplicate", None, "exact_duplicate", "exact_duplicate"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (chat("Hi", "Ho"), chat(" Hi\n", "Ho"), True),
        (chat("ﬁne １", "Ho"), chat("fine 1", "Ho"), True),
        (chat("ＡＢＣ！\u3000ｶﾞ", "Ho"), chat("ABC! ガ", "Ho"), True),
        (chat("cafe\u0301\xa0!", "Ho"), chat("café !", "Ho"), True),
        (chat("What is x²?", "Ho"), chat("What is x2?", "Ho"), False),
        (chat("①", "Ho"), chat("1", "Ho"), False),
        (chat("½ cup", "Ho"), chat("1⁄2 cup", "Ho"), False),
        (chat("H₂O", "Ho"), chat("H2O", "Ho"), False),
        (chat("10 ㎡", "Ho"), chat("10 m2", "Ho"), False),
        (chat("Hi", "Ho"), chat("Hi", "ho"), False),
        (chat("Hi", "Ho"), [{"role": "system", "content": "Hi"}, *chat("Hi", "Ho")[1:]], False),
        (chat("a", "b", "c", "d"), chat("a", "b\x00user", "c", "d"), False),
    ],
)
def test_identity_is_roles_and_normalised_texts(a, b, same):
    assert (content_id(a) == content_id(b)) is same


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found(edit, corpus, fates):
    """The threshold was chosen on distances between distinct real conversations, before any of these edits."""
    dropped = {row["group"] for row, fate in zip(corpus, fates, strict=True) if fate and row["planted"] != "unique"}
    copies = [row["group"] for row in corpus if row["planted"] == edit]
    assert len(copies) > 30
    assert sum(group in dropped for group in copies) >= 0.95 * len(copies)


def test_distinct_conversations_stay(corpus, fates):
    unique = [fate for row, fate in zip(corpus, fates, strict=True) if row["planted"] == "unique"]
    assert len(unique) > 400
    assert Counter(unique)["near_duplicate"] <= 0.005 * len(unique)
    groups = {row["group"] for row, fate in zip(corpus, fates, strict=True) if fate is None}
    assert {row["group"] for row in corpus if row["planted"] == "original"} <= groups, "a row went with its copy"


def test_a_part_of_two_does_not_make_them_duplicates():
    """Both long ones hold all of the short one, which is 0.57 of them: of these three, two are distinct."""

    def words(count: int, prefix: str) -> str:
        return " ".join(f"{prefix}{number}" for number in range(count))

    short = words(120, "common")
    chats = [chat(f"{short} {words(90, own)}") for own in ("first", "second")]
    assert near_duplicates([*chats, chat(short)])["drop"].to_pylist() == [None, None, "near_duplicate"]


def test_the_longest_is_kept_and_named(corpus):
    text = whole_text(corpus[0]["messages"])
    chats = [chat(text[: len(text) * part // 10]) for part in (8, 10, 9)]
    made = near_duplicates(chats)
    assert made["drop"].to_pylist() == ["near_duplicate", None, "near_duplicate"]
    assert made["duplicate_of"].to_pylist() == [content_id(chats[1]), None, content_id(chats[1])]


@pytest.mark.parametrize("text", ["", "👍", "one two three", " ".join("abcdefg"[: MIN_PAIRS - 1])])
def test_very_short_conversations_are_compared_exactly_only(text):
    assert near_duplicates([chat(text, ""), chat(text, "."), chat(text, "!")])["drop"].null_count == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, WORLD! x2", "hello world x2"),
        ("in 1999 or ١٩٩٩ or １９９９ or 一九九九", "in 1999 or 1999 or 1999 or 1999"),
        ("把三个苹果给我。", "把 3 个 苹 果 给 我"),
        ("Straße don’t _under_score", "strasse don t under score"),
        ("ﬁ\tCAFÉ", "fi café"),
    ],
)
def test_words_do_not_see_how_they_are_written(text, words):
    assert b" ".join(split_words(text)).decode() == words


def test_spelled_out_digits_are_digits():
    assert hash_words(["three apples"]).hashes.tolist() == hash_words(["3 Apples"]).hashes.tolist()


def test_ngrams_stay_within_their_text():
    texts = ["a b c d", "", "b c", "x a b c"]
    words = hash_words(texts)
    for n, hashes, starts in ngrams(words, 3):
        expected = [tuple(t.split()[i : i + n]) for t in texts for i in range(len(t.split()) - n + 1)]
        assert len(hashes) == len(starts) == len(expected)
        by_hash = {}
        for value, run in zip(hashes.tolist(), expected, strict=True):
            assert by_hash.setdefault(value, run) == run
        assert len(by_hash) == len(set(expected))


def test_a_text_has_the_words_of_its_capitals_and_of_its_letters_taken_apart():
    """Of every character that has capitals, in whichever normal form it is written."""
    cased = [chr(code) for code in range(0x80, 0x1F000) if chr(code).upper() != chr(code)]
    assert len(cased) > 1000
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        for letter in cased:
            text = f"a{letter}b"
            assert split_words(unicodedata.normalize(form, text)) == split_words(text), (form, letter)
            capitals = unicodedata.normalize(form, text.upper())
            assert split_words(capitals) == split_words(text) or letter in "\u0131\u0345", (form, letter)
