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
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sft.data.formats import find_turns, read_rows

from .rows import conversations, whole_text
from .stages import SelectionError, drop_where
from .words import Words, count_unspaced, hash_words, ngrams

NGRAM = 13
MIN_WORDS = 6
_TABLE_BITS = 22


@dataclass(frozen=True)
class EvaluationIndex:
    """What to look for.

    Args:
        hashes: number of words -> hashes of runs of so many words, sorted, uint64.
        items: texts looked for.
        too_short: how many are not, for want of words.
    """

    hashes: dict[int, np.ndarray]
    items: int
    too_short: int


def index_evaluations(files: Sequence[str]) -> EvaluationIndex:
    """Read evaluation sets.

    Args:
        files: see [`sft.data.formats.read_rows`]; also `.txt`, one item a line. The items of a row are the texts of its
            conversation if it is one, without the system's; else all texts it holds, however deep, each on its own.

    Raises:
        DataError: a file cannot be read.
        SelectionError: a file has no item that is long enough.
    """
    texts: list[str] = []
    for file in files:
        before = len(texts)
        texts += _read_items(file)
        own = hash_words(texts[before:])
        if not (own.counts >= _lengths(texts[before:], own)[1]).any():
            raise SelectionError(
                f"{file}: no text of at least {MIN_WORDS} words among {len(texts) - before}; is it an evaluation set?"
            )
    words = hash_words(texts)
    whole, least = _lengths(texts, words)
    hashes: dict[int, np.ndarray] = {}
    for n, runs, starts in ngrams(words, 2 * NGRAM):
        item = words.owners[starts]
        wanted = (n == whole[item]) | ((n == words.counts[item]) & (least[item] <= n) & (n < whole[item]))
        if wanted.any():
            hashes[n] = np.unique(runs[wanted])
    too_short = int((words.counts < least).sum())
    return EvaluationIndex(hashes, len(texts) - too_short, too_short)


def _lengths(texts: Sequence[str], words: Words) -> tuple[np.ndarray, np.ndarray]:
    """For each text how many words in a row give it away, and how many it needs to be looked for at all."""
    factor = np.where(2 * np.array([count_unspaced(text) for text in texts], int) > words.counts, 2, 1)
    return NGRAM * factor, MIN_WORDS * factor


def _read_items(file: str) -> Iterator[str]:
    if file.endswith(".txt"):
        try:
            with open(file, encoding="utf-8") as lines:
                yield from (line for line in lines if line.strip())
        except UnicodeDecodeError as error:
            raise SelectionError(f"{file}: not UTF-8 at byte {error.start}; convert the file.") from error
        return
    for row in read_rows(file):
        if row.problem:
            raise SelectionError(f"{row.source}: {row.problem.detail}; correct the evaluation set.")
        turns, problems = find_turns(row.value)
        if turns and not problems and all(isinstance(turn.content, str) for turn in turns):
            yield from (turn.content for turn in turns if turn.role != "system")
        else:
            yield from _texts_in(row.value)


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


def drop_contaminated(table: pa.Table, index: EvaluationIndex) -> pa.Table:
    """Rows that contain an item are dropped."""
    words = hash_words(map(whole_text, conversations(table)))
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


__all__ = ["MIN_WORDS", "NGRAM", "EvaluationIndex", "drop_contaminated", "index_evaluations"]
