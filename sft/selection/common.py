# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Text that many rows share: instruction templates, passages, boilerplate. It says nothing about the row it stands in.

A word is common if it lies in a run of [`RUN`] words that more than [`MAX_SHARE`] of the rows have, and at least
[`MIN_ROWS`]. How many rows have a run is counted in a table of 2^24 places by the run's hash, over the [`SAMPLE`] rows
with the smallest ids: memory does not grow with the data, and the outcome is the same for any number of workers.

Near-duplicate removal, domains and embeddings read [`own_conversations`]: without system prompts, and without what is
common in the rest. If more than half of its answers is common, all of a row is left: it is not a template filled in,
but the same row many times over, and its duplicates have to be found.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from .rows import conversations, whole_text
from .stages import Kernel, drop_none
from .words import UNSPACED, Words, hash_runs, hash_words, split_words

RUN = 8  # words
MAX_SHARE = 0.01
MIN_ROWS = 5  # in fewer, copies of a row would count as a template
SAMPLE = 5000
_BITS = 24
_SHIFT = np.uint64(64 - _BITS)
_BLOCK = 256  # rows
_PIECES = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


@dataclass(frozen=True)
class CommonText:
    """What many rows share.

    Args:
        places: of the runs, in a table of 2^24, int32, sorted.
    """

    places: np.ndarray

    def covers(self, words: Words) -> np.ndarray:
        """Which words lie in a run that is common: bool, as many as there are words."""
        edges = np.zeros(len(words.hashes) + 1, np.int32)
        if len(self.places):
            common = np.zeros(1 << _BITS, bool)
            common[self.places] = True
            hashes, starts = hash_runs(words, RUN)
            starts = starts[common[hashes >> _SHIFT]]
            np.add.at(edges, starts, 1)
            np.add.at(edges, starts + RUN, -1)
        return np.cumsum(edges[:-1]) > 0


class RunCounter:
    """Counts in how many rows each run stands. Two counts of different rows may be added."""

    def __init__(self) -> None:
        self.counts = np.zeros(1 << _BITS, np.uint32)

    def add(self, words: Words, rows: np.ndarray) -> None:
        """Count the runs of some texts; `rows` says of each which row it is from, and all of a row come together."""
        hashes, starts = hash_runs(words, RUN)
        # Each run once a row.
        seen = np.unique((hashes >> _SHIFT << _SHIFT) | rows[words.owners[starts]].astype(np.uint64))
        places, times = np.unique(seen >> _SHIFT, return_counts=True)
        self.counts[places] += times.astype(np.uint32)

    def above(self, limit: float) -> CommonText:
        """What stands in more rows."""
        return CommonText(np.flatnonzero(self.counts > limit).astype(np.int32))


def find_common(chats: Sequence[Sequence[dict[str, str]]], max_share: float = MAX_SHARE) -> CommonText:
    """What more than `max_share` of some conversations have in common, system prompts included."""
    counter = RunCounter()
    for start in range(0, len(chats), _BLOCK):
        block = chats[start : start + _BLOCK]
        words = hash_words(message["content"] for messages in block for message in messages)
        counter.add(words, np.repeat(np.arange(len(block)), [len(messages) for messages in block]))
    return counter.above(max(MIN_ROWS, max_share * len(chats)))


# --- marks ------------------------------------------------------------------------------------------------------------


def fit_marks(sample: pa.Table, max_share: float = MAX_SHARE) -> Kernel:
    """A kernel that adds `common`, from a sample of the rows."""
    return partial(mark_common, common=find_common(list(conversations(sample)), max_share))


def mark_common(table: pa.Table, common: CommonText) -> pa.Table:
    """`common`: numbers in threes, a message and the characters from and to which it is common; null if nothing is."""
    marks: list[list[int] | None] = [None] * len(table)
    if len(common.places):
        chats = list(conversations(table))
        places = [
            (row, index)
            for row, messages in enumerate(chats)
            for index, message in enumerate(messages)
            if message["role"] != "system"
        ]
        words = hash_words(chats[row][index]["content"] for row, index in places)
        covered = common.covers(words)
        kept = _mostly_common_answers(chats, places, words, covered)
        for number in np.unique(words.owners[covered]).tolist():
            row, index = places[number]
            message = chats[row][index]
            if row in kept:
                continue
            own = covered[words.offsets[number] : words.offsets[number + 1]].tolist()
            found = [value for span in _spans(message["content"], own) for value in (index, *span)]
            if found:
                marks[row] = [*(marks[row] or []), *found]
    return pa.table({"drop": drop_none(len(table)), "common": pa.array(marks, pa.list_(pa.int32()))})


def _mostly_common_answers(
    chats: Sequence[Sequence[dict[str, str]]], places: Sequence[tuple[int, int]], words: Words, covered: np.ndarray
) -> set[int]:
    """The rows more than half of whose answers' words are common."""
    row = np.array([row for row, _ in places], int)
    answer = np.array([chats[row][index]["role"] == "assistant" for row, index in places], bool)
    total = np.bincount(row, np.where(answer, words.counts, 0), minlength=len(chats))
    common = np.bincount(words.owners[covered], minlength=len(places))
    shared = np.bincount(row, np.where(answer, common, 0), minlength=len(chats))
    return set(np.flatnonzero(2 * shared > total).tolist())


def _spans(text: str, covered: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """From where to where a text is common, by its words that are."""
    pieces = [(piece.start(), piece.end(), _count_words(piece[0])) for piece in _PIECES.finditer(text)]
    if sum(count for _, _, count in pieces) != len(covered):  # a character that joins its neighbours when normalised
        return
    at, begin, until = 0, -1, -1
    for start, end, count in pieces:
        if (covered[at] if count == 1 else count == 0 <= begin) or (count > 1 and all(covered[at : at + count])):
            begin, until = (start if begin < 0 else begin), end
        elif begin >= 0:
            yield begin, until
            begin = -1
        at += count
    if begin >= 0:
        yield begin, until


def _count_words(piece: str) -> int:
    return 1 if piece.isascii() and piece.isalnum() else len(split_words(piece))


def own_conversations(table: pa.Table) -> Iterator[list[dict[str, str]]]:
    """The messages of valid rows without system prompts, and without what `common` marks, if the table has it."""
    marks: Iterable[list[int] | None] = (
        table["common"].to_pylist() if "common" in table.column_names else [None] * len(table)
    )
    for messages, own in zip(conversations(table), marks, strict=True):
        for index, start, end in reversed(list(zip(*[iter(own or [])] * 3, strict=True))):
            content = messages[index]["content"]
            messages[index]["content"] = f"{content[:start]}\n{content[end:]}"
        yield [message for message in messages if message["role"] != "system"]


@dataclass(frozen=True)
class Reading:
    """Which part of conversations an operator reads.

    Args:
        text: one of [`TEXTS`]: `whole`, all messages; `turns`, all but system prompts; `question`, `answer` or
            `system`, those of one role.
        own: without what `common` marks; only of `turns`, `question` and `answer`, since system prompts are not marked.
    """

    text: str = "turns"
    own: bool = True

    def conversations(self, table: pa.Table) -> Iterator[list[dict[str, str]]]:
        """The messages of valid rows that are read.

        Args:
            table: with `row`; if `own`, perhaps with `common`.
        """
        role = {"system": "system", "question": "user", "answer": "assistant"}.get(self.text)
        for messages in own_conversations(table) if self.own else conversations(table):
            yield [
                message
                for message in messages
                if self.text == "whole" or message["role"] == role or (role is None and message["role"] != "system")
            ]

    def texts(self, table: pa.Table) -> Iterator[str]:
        """All that is read of each row, in one text."""
        return map(whole_text, self.conversations(table))


TEXTS = ("whole", "turns", "system", "question", "answer")
OWN_TEXT = Reading()
WHOLE = Reading("whole", own=False)


__all__ = [
    "MAX_SHARE",
    "MIN_ROWS",
    "OWN_TEXT",
    "RUN",
    "SAMPLE",
    "TEXTS",
    "WHOLE",
    "CommonText",
    "Reading",
    "RunCounter",
    "find_common",
    "fit_marks",
    "mark_common",
    "own_conversations",
]
