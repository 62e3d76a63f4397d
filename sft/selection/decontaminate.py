# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Conversations that contain an item of an evaluation set.

An item is found by any run of [`NGRAM`] words that a conversation shares with it; an item with fewer words, but at
least [`MIN_WORDS`], by all of them in a row. Words are those of [`sft.selection.words`]: casing, punctuation, spacing
and the script of digits hide nothing. In an item that is mostly of a script without spaces, such as Chinese, words are
characters, and twice as many count. Items that are shorter still cannot be told from ordinary talk: they are counted,
and said to be too short.

An instruction template is no item. Runs that stand in more than [`MAX_SHARE`] of the rows of an evaluation set, and in
more than [`MAX_ROWS`], do not count; nor do those which, in the conversations, are text that many rows share (see
[`sft.selection.common`]), unless the item is as good as all of it: what leaked into one row of a hundred is found
nevertheless. That is an item at least [`LEAKED_SHARE`] of whose words are common, most of them in no other row of its
file: a template stands in several, a question that leaked in one. What is left of another item is looked for as if it
were the item; one of which too little is left is not looked for, and counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from sft.data.formats import find_turns, read_rows

from .common import MAX_SHARE as COMMON_SHARE
from .common import WHOLE, CommonText, Reading, RunCounter, find_common
from .rows import conversations
from .stages import Kernel, SelectionError, drop_where
from .words import Words, count_unspaced, hash_words, ngrams

NGRAM = 13
MIN_WORDS = 6
MAX_SHARE = 0.01
MAX_ROWS = 20  # one question with ten answers to choose from may be ten rows
LEAKED_SHARE = 0.9
_TABLE_BITS = 22


@dataclass(frozen=True)
class Evaluations:
    """Evaluation sets, as words.

    Args:
        words: of all texts.
        groups: the number of the row that each text is from; rows of all files in a row.
        files: how many rows each file has.
        whole: how many words in a row give each text away.
        least: how many words it needs to be looked for.
    """

    words: Words
    groups: np.ndarray
    files: tuple[int, ...]
    whole: np.ndarray
    least: np.ndarray


@dataclass(frozen=True)
class EvaluationIndex:
    """What to look for.

    Args:
        hashes: number of words -> hashes of runs of so many words, sorted, uint64.
        items: texts looked for.
        too_short: how many are not, for want of words.
        shared: how many are not, since all their runs stand in many rows of their file, or in many conversations.
    """

    hashes: dict[int, np.ndarray]
    items: int
    too_short: int
    shared: int = 0


def read_evaluations(files: Sequence[str], ngram: int = NGRAM, min_words: int = MIN_WORDS) -> Evaluations:
    """Read evaluation sets.

    Args:
        files: see [`sft.data.formats.read_rows`]; also `.txt`, one item a line. The items of a row are the texts of its
            conversation if it is one, without the system's; else all texts it holds, however deep, each on its own.
        ngram, min_words: see above.

    Raises:
        DataError: a file cannot be read.
        SelectionError: a file has no item that is long enough.
    """
    texts: list[str] = []
    groups: list[int] = []
    sizes: list[int] = []
    for file in files:
        before, rows = len(texts), 0
        for rows, items in enumerate(_read_items(file), start=1):
            texts += items
            groups += [sum(sizes) + rows - 1] * len(items)
        sizes.append(rows)
        own = hash_words(texts[before:])
        if not (own.counts >= _lengths(texts[before:], own, ngram, min_words)[1]).any():
            raise SelectionError(
                f"{file}: no text of at least {min_words} words among {len(texts) - before}; is it an evaluation set?"
            )
    words = hash_words(texts)
    return Evaluations(words, np.array(groups, int), tuple(sizes), *_lengths(texts, words, ngram, min_words))


def make_evaluations(rows: Sequence[Sequence[str]], ngram: int = NGRAM, min_words: int = MIN_WORDS) -> Evaluations:
    """An evaluation set of rows that are at hand, each with some items; see [`read_evaluations`]."""
    texts = [text for items in rows for text in items]
    words = hash_words(texts)
    groups = np.repeat(np.arange(len(rows)), [len(items) for items in rows])
    return Evaluations(words, groups, (len(rows),), *_lengths(texts, words, ngram, min_words))


def make_index(evaluations: Evaluations, common: CommonText | None = None) -> EvaluationIndex:
    """What to look for.

    Args:
        evaluations: the sets.
        common: what the conversations share.
    """
    words = evaluations.words
    own = ~_shared_by_items(evaluations)
    if common is not None:
        of_rows = common.covers(words)
        own &= ~of_rows | _leaked(evaluations, of_rows)[words.owners]
    parts, item = _own_parts(evaluations, own)
    whole, least = evaluations.whole[item], evaluations.least[item]
    hashes: dict[int, np.ndarray] = {}
    found = np.zeros(len(words.counts), bool)
    for n, runs, starts in ngrams(parts, int(max(whole, default=0))):
        part = parts.owners[starts]
        wanted = (n == whole[part]) | ((n == parts.counts[part]) & (least[part] <= n) & (n < whole[part]))
        runs, owner = runs[wanted], item[part[wanted]]
        kept = ~_in_many_rows(runs, evaluations.groups[owner], evaluations.files)
        found[owner[kept]] = True
        if kept.any():
            hashes[n] = np.unique(runs[kept])
    long_enough = words.counts >= evaluations.least
    return EvaluationIndex(hashes, int(found.sum()), int((~long_enough).sum()), int((long_enough & ~found).sum()))


def _leaked(evaluations: Evaluations, of_rows: np.ndarray) -> np.ndarray:
    """Which items are as good as all of what many conversations share: bool; `of_rows` says which words are shared."""
    words = evaluations.words

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(words.owners[which], minlength=len(words.counts))

    common, template = count(of_rows), count(of_rows & _shared_by_items(evaluations, 1, 0))
    mostly = (common >= LEAKED_SHARE * words.counts) & (2 * template < common)
    return mostly | (common == words.counts)


def _shared_by_items(evaluations: Evaluations, max_rows: int = MAX_ROWS, max_share: float = MAX_SHARE) -> np.ndarray:
    """Which words lie in a run that many rows of their file have: bool."""
    words, shared = evaluations.words, np.zeros(len(evaluations.words.hashes), bool)
    first = 0
    for rows in evaluations.files:
        texts = np.searchsorted(evaluations.groups, [first, first + rows])
        begin, end = words.offsets[texts]
        own = Words(words.hashes[begin:end], words.offsets[texts[0] : texts[1] + 1] - begin)
        counter = RunCounter()
        counter.add(own, evaluations.groups[texts[0] : texts[1]])
        shared[begin:end] = counter.above(max(max_rows, max_share * rows)).covers(own)
        first += rows
    return shared


def _own_parts(evaluations: Evaluations, own: np.ndarray) -> tuple[Words, np.ndarray]:
    """The parts of items between what is not their own, and the item of each.

    Of an item that has no part of as many words as give it away, the longest counts.
    """
    words = evaluations.words
    places = np.flatnonzero(own)
    owners = words.owners[places]
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(places) != 1) | (np.diff(owners) != 0)])[: len(places)])
    lengths = np.diff(np.append(begins, len(places)))
    item = owners[begins]
    longest = np.zeros(len(words.counts), int)
    np.maximum.at(longest, item, lengths)
    kept = (lengths >= evaluations.whole[item]) | (
        (lengths == longest[item]) & (longest[item] < evaluations.whole[item]) & (lengths >= evaluations.least[item])
    )
    hashes = words.hashes[places[np.repeat(kept, lengths)]]
    return Words(hashes, np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)), item[kept]


def _in_many_rows(runs: np.ndarray, rows: np.ndarray, files: Sequence[int]) -> np.ndarray:
    """Which runs stand in many rows of the file they are from."""
    ends = np.cumsum(files)
    file = np.searchsorted(ends, rows, side="right")
    _, name = np.unique(runs, return_inverse=True)
    name = name * max(len(files), 1) + file
    once = np.unique(np.stack([name, rows]), axis=1)
    counts = np.bincount(once[0].astype(int), minlength=1)
    limits = np.maximum(MAX_ROWS, MAX_SHARE * np.array(files))
    return counts[name] > limits[file] if len(runs) else np.zeros(0, bool)


def index_evaluations(files: Sequence[str]) -> EvaluationIndex:
    """What to look for in conversations that share nothing; see [`read_evaluations`]."""
    return make_index(read_evaluations(files))


def fit_kernel(
    sample: pa.Table,
    evaluations: Evaluations,
    max_share: float = COMMON_SHARE,
    reading: Reading = WHOLE,
    notify: Callable[[str], None] | None = None,
) -> Kernel:
    """A kernel that drops what contains an item, with a sample of the rows to know their templates by.

    Args:
        sample: with `row`.
        evaluations: what to look for.
        max_share: of the rows, from which on text is common.
        reading: where in a conversation.
        notify: is told how many items are not looked for since they are common text, and little else.
    """
    index = make_index(evaluations, find_common(list(conversations(sample)), max_share))
    if notify is not None and (lost := index.shared - make_index(evaluations).shared) > 0:
        texts = index.items + index.too_short + index.shared
        notify(f"decontamination: {lost} of {texts} texts are not looked for: many rows share most of their words")
    return partial(drop_contaminated, index=index, reading=reading)


def _lengths(texts: Sequence[str], words: Words, ngram: int, min_words: int) -> tuple[np.ndarray, np.ndarray]:
    """For each text how many words in a row give it away, and how many it needs to be looked for at all."""
    factor = np.where(2 * np.array([count_unspaced(text) for text in texts], int) > words.counts, 2, 1)
    return ngram * factor, min_words * factor


def _read_items(file: str) -> Iterator[list[str]]:
    """The texts of each row."""
    if file.endswith(".txt"):
        try:
            with open(file, encoding="utf-8") as lines:
                yield from ([line] for line in lines if line.strip())
        except UnicodeDecodeError as error:
            raise SelectionError(f"{file}: not UTF-8 at byte {error.start}; convert the file.") from error
        return
    for row in read_rows(file):
        if row.problem:
            raise SelectionError(f"{row.source}: {row.problem.detail}; correct the evaluation set.")
        turns, problems = find_turns(row.value)
        if turns and not problems and all(isinstance(turn.content, str) for turn in turns):
            yield [turn.content for turn in turns if turn.role != "system"]
        else:
            yield list(_texts_in(row.value))


def _texts_in(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _texts_in(inner)
        case list():
            for inner in value:
                yield from _texts_in(inner)


def drop_contaminated(table: pa.Table, index: EvaluationIndex, reading: Reading = WHOLE) -> pa.Table:
    """Rows that contain an item are dropped.

    Args:
        table: with `row`.
        index: what to look for.
        reading: where in a conversation.
    """
    words = hash_words(reading.texts(table))
    owners = words.owners
    contaminated = np.zeros(len(table), bool)
    for n, hashes, starts in ngrams(words, max(index.hashes, default=0)):
        if n in index.hashes:
            contaminated[owners[starts[_contained(hashes, index.hashes[n])]]] = True
    return pa.table({"drop": drop_where(contaminated, "contaminated")})


def _contained(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where `hashes` has a value of the sorted `known`. A table of bits settles most of them without a search."""
    shift = np.uint64(64 - _TABLE_BITS)
    maybe = np.zeros(1 << _TABLE_BITS, bool)
    maybe[known >> shift] = True
    candidates = np.flatnonzero(maybe[hashes >> shift])
    at = np.minimum(np.searchsorted(known, hashes[candidates]), len(known) - 1)
    return candidates[known[at] == hashes[candidates]]


__all__ = [
    "LEAKED_SHARE",
    "MAX_ROWS",
    "MAX_SHARE",
    "MIN_WORDS",
    "NGRAM",
    "EvaluationIndex",
    "Evaluations",
    "drop_contaminated",
    "fit_kernel",
    "index_evaluations",
    "make_evaluations",
    "make_index",
    "read_evaluations",
]
