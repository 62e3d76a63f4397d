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

Of near duplicates the longest is kept. A conversation is dropped only if it resembles one that is kept: a short one
that resembles two different long ones does not make duplicates of them.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from .rows import conversations, whole_text
from .stages import drop_none, drop_where, fixed_bytes
from .words import Words, hash_words, word_pairs

OVERLAP = 0.65
BANDS, BAND_SLOTS = 42, 6
SLOTS = BANDS * BAND_SLOTS
MIN_PAIRS = 8  # distinct word pairs; below, a single word more or less decides
_SKETCH_SEED = 1
_BLOCK = 1 << 16


def drop_exact_duplicates(table: pa.Table) -> pa.Table:
    """Of the rows with equal `id`, all but the first are dropped."""
    ids = fixed_bytes(table["id"]).view("S16").ravel()
    order = np.argsort(ids, kind="stable")
    repeated = np.zeros(len(ids), bool)
    repeated[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    return pa.table({"drop": drop_where(repeated, "exact_duplicate")})


# --- sketches ---------------------------------------------------------------------------------------------------------


def sketch(table: pa.Table) -> pa.Table:
    """`sketch`: [`SLOTS`] bytes; `pairs`: how many distinct word pairs the conversation has."""
    words = hash_words(map(whole_text, conversations(table)))
    pairs = word_pairs(words)
    return pa.table(
        {
            "drop": drop_none(len(table)),
            "sketch": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(SLOTS), len(table), [None, pa.py_buffer(_minhash(words, pairs).tobytes())]
            ),
            "pairs": pa.array([len(np.unique(of)) for of in words.split(pairs)], pa.int32()),
        }
    )


def _minhash(words: Words, pairs: np.ndarray) -> np.ndarray:
    """Sketches, uint8 `[texts, SLOTS]`."""
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        pairs, words.offsets.astype(np.uint64), num_perm=SLOTS, seed=_SKETCH_SEED
    )
    slots = np.array(matrix.to_rows(), np.uint32).reshape(-1, SLOTS)
    return (slots * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


# --- pairs ------------------------------------------------------------------------------------------------------------


def drop_near_duplicates(table: pa.Table) -> pa.Table:
    """Of rows with near `sketch`es, all but the longest are dropped; `duplicate_of` is the id of the kept one."""
    pairs, ids = table["pairs"].to_numpy(), fixed_bytes(table["id"])
    order = np.lexsort((ids.view("S16").ravel(), -pairs))
    order = order[pairs[order] >= MIN_PAIRS]
    original = _find_originals(fixed_bytes(table["sketch"])[order], pairs[order])
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


def _find_originals(sketches: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """For each sketch, best first, the number of the kept one that it is a duplicate of; -1 for those that are kept."""
    edges = [_similar(sketches, pairs, left, right) for left, right in _candidates(sketches)]
    links = np.unique(np.concatenate([np.stack(edge, axis=1) for edge in edges]), axis=0)
    original = np.full(len(sketches), -1)
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
    sketches: np.ndarray, pairs: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Those of some pairs whose estimated overlap is at least [`OVERLAP`]."""
    overlap = np.empty(len(left))
    for start in range(0, len(left), _BLOCK):
        block = slice(start, start + _BLOCK)
        overlap[block] = estimate_overlap(
            sketches[left[block]], sketches[right[block]], pairs[left[block]], pairs[right[block]]
        )
    near = overlap >= OVERLAP
    return left[near], right[near]


def estimate_overlap(a: np.ndarray, b: np.ndarray, pairs_a: np.ndarray, pairs_b: np.ndarray) -> np.ndarray:
    """Overlap coefficients of sets, from their sketches, uint8 `[n, SLOTS]`, and their sizes."""
    agreeing = (a == b).mean(axis=1)
    jaccard = (agreeing - 1 / 256) / (1 - 1 / 256)  # unequal slots have equal bytes once in 256 times
    common = jaccard / (1 + jaccard) * (pairs_a + pairs_b)
    return common / np.minimum(pairs_a, pairs_b)


__all__ = [
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
