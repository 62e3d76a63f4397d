# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Duplicates, exact and near.

Two conversations are near duplicates if one holds at least [`OVERLAP`] of the other's distinct word pairs: that is the
overlap coefficient |A and B| / min(|A|, |B|), which a cut end does not lower, as it does lower the Jaccard similarity.
It is estimated from MinHash sketches (Broder 1997) of 252 slots, of which 8 bits each are kept (b-bit minwise hashing,
Li and Koenig 2010): 252 bytes a conversation. rensa makes the sketches. Pairs are found by locality-sensitive hashing,
[`BANDS`] bands of [`BAND_SLOTS`] slots, so that pairs of Jaccard similarity 0.7 are missed once in 200 times.

Compared is what is the row's own (see [`sft.selection.common`]): no system prompt and no template. Besides, the answers
have to agree by [`ANSWER_OVERLAP`], by sketches of 64 slots: ten questions on one passage have ten answers, and are ten
rows however long the passage is.

Of near duplicates the longest is kept. A conversation is dropped only if it resembles one that is kept: a short one
that resembles two different long ones does not make duplicates of them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .common import OWN_TEXT, Reading
from .rows import MEDIA, answers, read_unread, whole_text
from .stages import drop_none, drop_where, fixed_bytes
from .words import hash_words, word_pairs

OVERLAP = 0.65
ANSWER_OVERLAP = 0.4
BANDS, BAND_SLOTS = 42, 6
SLOTS = BANDS * BAND_SLOTS
ANSWER_SLOTS = 64
MIN_PAIRS = 8  # distinct word pairs; below, a single word more or less decides
_SKETCH_SEED = 1
_BLOCK = 1 << 16


def drop_exact_duplicates(table: pa.Table) -> pa.Table:
    """Of the rows with equal `id`, all but the first are dropped; `duplicate_of` is that id."""
    ids = fixed_bytes(table["id"]).view("S16").ravel()
    order = np.argsort(ids, kind="stable")
    repeated = np.zeros(len(ids), bool)
    repeated[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    # Not of `ids`: numpy takes the zeros at the end of a string for padding.
    originals = pc.if_else(pa.array(repeated), table["id"], pa.scalar(None, pa.binary(16)))
    return pa.table({"drop": drop_where(repeated, "exact_duplicate"), "duplicate_of": originals})


# --- sketches ---------------------------------------------------------------------------------------------------------


def sketch(table: pa.Table, reading: Reading = OWN_TEXT) -> pa.Table:
    """What [`drop_near_duplicates`] compares.

    Args:
        table: with `row`, and perhaps `common` and `unread`.
        reading: what of a conversation is compared. Answers that are not among it do not tell rows apart.

    Returns:
        `sketch`, [`SLOTS`] bytes; `pairs`, how many distinct word pairs are the conversation's own, 0 for one with
        media; `answer_sketch` and `answer_pairs`, the same of its answers.
    """
    unread = read_unread(table)
    own = list(reading.conversations(table))
    # Tools do not count, as system prompts do not: many rows have the same, longer than all that is said.
    beside = [
        "\n".join(json.dumps(value, ensure_ascii=False) for name, value in found.items() if name != "tools")
        for found in unread
    ]
    replies = [
        "\n".join([*answers(messages), *filter(None, [more])]) for messages, more in zip(own, beside, strict=True)
    ]
    texts = [
        "\n".join([whole_text(messages), *filter(None, [more])]) for messages, more in zip(own, beside, strict=True)
    ]
    whole, pairs = _sketch_texts(texts, SLOTS)
    answer, answer_pairs = _sketch_texts(replies, ANSWER_SLOTS)
    pairs[[not MEDIA.isdisjoint(found) for found in unread]] = 0  # two pictures may well have one text
    return pa.table(
        {
            "drop": drop_none(len(table)),
            "sketch": _fixed_column(whole),
            "pairs": pa.array(pairs),
            "answer_sketch": _fixed_column(answer),
            "answer_pairs": pa.array(answer_pairs),
        }
    )


def _sketch_texts(texts: Sequence[str], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Sketches, uint8 `[texts, slots]`, and numbers of distinct word pairs, int32."""
    from rensa import RMinHash

    words = hash_words(texts)
    pairs = word_pairs(words)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        pairs, words.offsets.astype(np.uint64), num_perm=slots, seed=_SKETCH_SEED
    )
    full = np.array(matrix.to_rows(), np.uint32).reshape(-1, slots)
    distinct = np.array([len(np.unique(of)) for of in words.split(pairs)], np.int32)
    return (full * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8), distinct


def _fixed_column(sketches: np.ndarray) -> pa.Array:
    rows, slots = sketches.shape
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(slots), rows, [None, pa.py_buffer(sketches.tobytes())])


# --- pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sketches:
    """Sets of word pairs: their sketches, uint8 `[n, slots]`, and their sizes."""

    slots: np.ndarray
    sizes: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "_Sketches":
        return _Sketches(self.slots[rows], self.sizes[rows])


def drop_near_duplicates(
    table: pa.Table, overlap: float = OVERLAP, answer_overlap: float = ANSWER_OVERLAP, min_pairs: int = MIN_PAIRS
) -> pa.Table:
    """Of rows with near `sketch`es, all but the longest are dropped; `duplicate_of` is the id of the kept one.

    Args:
        table: as [`sketch`] makes it, with `id`.
        overlap, answer_overlap: from which on the whole, and the answers, are near.
        min_pairs: distinct word pairs that a conversation needs to be compared.
    """
    pairs, ids = table["pairs"].to_numpy(), fixed_bytes(table["id"])
    order = np.lexsort((ids.view("S16").ravel(), -pairs))
    order = order[pairs[order] >= min_pairs]
    compared = [
        (_Sketches(fixed_bytes(table[slots]), table[sizes].to_numpy())[order], least)
        for slots, sizes, least in (
            ("sketch", "pairs", overlap),
            ("answer_sketch", "answer_pairs", answer_overlap),
        )
    ]
    original = _find_originals(compared)
    duplicate_of = np.full(len(table), -1)
    duplicate_of[order] = np.where(original >= 0, order[original], -1)
    return pa.table(
        {
            "drop": drop_where(duplicate_of >= 0, "near_duplicate"),
            "duplicate_of": pa.array(
                [ids[of].tobytes() if of >= 0 else None for of in duplicate_of.tolist()], pa.binary(16)
            ),
        }
    )


def _find_originals(compared: Sequence[tuple[_Sketches, float]]) -> np.ndarray:
    """For each row, best first, the number of the kept one that it is a duplicate of; -1 for those that are kept.

    Args:
        compared: sketches, and from which overlap on they are near; candidates are found by the first.
    """
    whole = compared[0][0].slots
    edges = [_similar(compared, left, right) for left, right in _candidates(whole)]
    links = np.unique(np.concatenate([np.stack(edge, axis=1) for edge in edges]), axis=0)
    original = np.full(len(whole), -1)
    # Links are in order of the better one, whose own fate is therefore settled when it decides another's.
    for better, worse in links.tolist():
        if original[better] < 0 and original[worse] < 0:
            original[worse] = better
    return original


def _candidates(sketches: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (better, worse) that agree in a band: each with the best of its bucket, and with its neighbour there."""
    found = np.full(len(sketches), -1)
    for start in range(0, SLOTS, BAND_SLOTS):
        keys = np.zeros((len(sketches), 8), np.uint8)
        keys[:, :BAND_SLOTS] = sketches[:, start : start + BAND_SLOTS]
        flat = keys.view(np.uint64).ravel()
        order = np.argsort(flat, kind="stable")
        same = flat[order[1:]] == flat[order[:-1]]
        heads = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        inside = np.flatnonzero(same) + 1
        best, previous, member = order[heads[inside]], order[inside - 1], order[inside]
        new = found[member] != best
        found[member] = best
        yield best[new], member[new]
        yield previous[new], member[new]


def _similar(
    compared: Sequence[tuple[_Sketches, float]], left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Those of some pairs that are near in all that is compared."""
    for sketches, least in compared:
        near = np.zeros(len(left), bool)
        for start in range(0, len(left), _BLOCK):
            block = slice(start, start + _BLOCK)
            a, b = sketches[left[block]], sketches[right[block]]
            near[block] = estimate_overlap(a.slots, b.slots, a.sizes, b.sizes) >= least
        left, right = left[near], right[near]
    return left, right


def estimate_overlap(a: np.ndarray, b: np.ndarray, pairs_a: np.ndarray, pairs_b: np.ndarray) -> np.ndarray:
    """Overlap coefficients of sets, from their sketches, uint8 `[n, slots]`, and their sizes; 1 of two empty sets."""
    agreeing = (a == b).mean(axis=1)
    jaccard = (agreeing - 1 / 256) / (1 - 1 / 256)  # unequal slots have equal bytes once in 256 times
    common = jaccard / (1 + jaccard) * (pairs_a + pairs_b)
    smaller = np.minimum(pairs_a, pairs_b)
    return np.where(pairs_a + pairs_b == 0, 1.0, common / np.maximum(smaller, 1))


__all__ = [
    "ANSWER_OVERLAP",
    "ANSWER_SLOTS",
    "BANDS",
    "BAND_SLOTS",
    "MIN_PAIRS",
    "OVERLAP",
    "SLOTS",
    "drop_exact_duplicates",
    "drop_near_duplicates",
    "estimate_overlap",
    "sketch",
]
