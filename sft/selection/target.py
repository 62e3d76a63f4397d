# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The rows nearest to examples of what should get better, the targets.

Rows that contain a target are dropped first, as those that contain an item of an evaluation set are: what gets better
is to be told by the targets, and cannot be told by what was trained on. A target is two items, all that is said in it
and all that is asked. Its turns on their own are none: "Is there anything else I can help you with?" gives nothing
away.

The targets take turns, in the order of their file: each takes the row with the largest cosine to it that none has taken
yet, until there are enough. That is the round robin of RDS+ (Ivison et al. 2025, arXiv 2503.01807). No average over
the targets is taken, so a target unlike all others gets as many rows as each of them. Equal cosines are settled by the
rows' ids. With a quota, rows of a domain that has its share are passed over.

Embeddings are float16: multiples of 2^-24, at most 1. A dot product of two of them, of length about 1, is a sum of
multiples of 2^-48 that stays below 2^5, and so exact in float64, in whatever order it is added up. The choice therefore
depends neither on the order of the rows nor on threads, blocks or machines.

A row without a known word has no direction: it comes last, and has no cosine.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft.data.checks import Conversation, check_rows
from sft.tokenizer import family_control_tokens

from .decontaminate import Evaluations, make_evaluations
from .diversity import allot
from .rows import as_text, content_id, conversations, to_json, whole_text
from .stages import Kernel, SelectionError, drop_where, fixed_bytes, make_digest

MARGIN = 4  # candidates kept, as a multiple of what a target takes if all take equally many
CANDIDATES = 1 << 22  # kept at once, for all targets together: 16 bytes each, three times over while they are sorted
_BLOCK = 1 << 21  # cosines computed at once
_NOWHERE = -2.0  # less than any cosine
_COMPARED = 32  # rows of which it is seen whether the embedder is still the same
_APART = 0.1  # of two vectors of length 1; rounding is far below


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Examples of what should get better, in the order of their file.

    Args:
        table: with `row`, the messages as JSON, and `source` (`file:row`).
        digest: of what they say. Where the file lies and when it was written does not matter.
    """

    table: pa.Table
    digest: str


def read_targets(file: str, data: Sequence[str] = (), sanitized: bool = False) -> Targets:
    """Read targets; each has to be a row that could be trained on.

    Args:
        file: see [`sft.data.formats.read_rows`].
        data: the files to select from, none of which it may be.
        sanitized: see [`sft.tokenizer.control_tokens`].

    Raises:
        SelectionError: the file is one of the data, or says the same; it has no rows, or one that is invalid.
        DataError: it cannot be read.
    """
    for other in data:
        if _same_content(file, other):
            raise SelectionError(f"--target {file}: is the data {other}; targets are rows held out from the data.")
    found: list[dict[str, bytes | str]] = []
    ids: list[str] = []
    for row, outcome in check_rows(file, family_control_tokens(sanitized)):
        if not isinstance(outcome, Conversation):
            raise SelectionError(f"--target {row.source}: {outcome.detail}; correct or remove the row.")
        found.append({"row": to_json({"messages": outcome.messages}), "source": row.source})
        ids.append(content_id(list(map(as_text, outcome.messages))).hex())
    if not found:
        raise SelectionError(f"--target {file}: has no rows; give examples of what should get better.")
    schema = pa.schema({"row": pa.large_binary(), "source": pa.string()})
    return Targets(pa.Table.from_pylist(found, schema), make_digest(ids))


def _same_content(file: str, other: str) -> bool:
    one, two = Path(file), Path(other)
    if not one.is_file() or not two.is_file():
        return file == other
    if one.samefile(two):
        return True
    if one.stat().st_size != two.stat().st_size:
        return False
    with one.open("rb") as left, two.open("rb") as right:
        return hashlib.file_digest(left, "sha256").digest() == hashlib.file_digest(right, "sha256").digest()


# --- copies of them ---------------------------------------------------------------------------------------------------


def target_items(targets: Targets, ngram: int, min_words: int) -> Evaluations:
    """What to look for in rows, so that none of them contains a target."""
    items = []
    for messages in conversations(targets.table):
        said = [message for message in messages if message["role"] != "system"]
        items.append([whole_text(said), whole_text([message for message in said if message["role"] == "user"])])
    return make_evaluations(items, ngram, min_words)


def fit_copies(sample: pa.Table, find: Callable[[pa.Table], Kernel]) -> Kernel:
    """A kernel that drops rows that contain a target.

    Args:
        sample: with `row`.
        find: makes of it the kernel that drops what contains one of [`target_items`].
    """
    return partial(drop_copies, find=find(sample))


def drop_copies(table: pa.Table, find: Kernel) -> pa.Table:
    """Rows that contain a target are dropped; `find` says which these are."""
    return pa.table({"drop": drop_where(find(table)["drop"].is_valid().to_numpy(), "contains_target")})


# --- the choice -------------------------------------------------------------------------------------------------------


def select_nearest(table: pa.Table, count: int, quota: Mapping[str, float] | None, targets: np.ndarray) -> pa.Table:
    """Take `count` rows; the others are dropped.

    Args:
        table: with `id`, `domain` and `embedding`.
        count: rows to take, or all there are.
        quota: share of each domain; see [`sft.selection.diversity.allot`]. None: domains are not looked at.
        targets: float16 `[targets, d]`, of the same embedder; none of them 0.

    Returns:
        `drop`; `quality`, null; `target`, the number from 1 of the target that took the row, and `similarity`, their
        cosine (float32): null for rows that are dropped, the cosine also for rows without a known word.

    Raises:
        SelectionError: the quota names an unknown domain.
    """
    names = np.array(table["domain"].to_pylist(), object) if quota else np.full(len(table), "", object)
    limits = allot(names, count, quota)
    domains = np.searchsorted(list(limits), names.astype(str))  # allot sorts its domains
    taken = take_in_turns(table["embedding"], targets, fixed_bytes(table["id"]), domains, np.array([*limits.values()]))
    target, similarity = np.zeros(len(table), np.int32), np.full(len(table), _NOWHERE, np.float32)
    target[taken.rows] = taken.targets + 1
    similarity[taken.rows] = taken.cosines
    return pa.table(
        {
            "drop": drop_where(target == 0, "not_selected"),
            "quality": pa.nulls(len(table), pa.float32()),
            "target": pa.array(target, mask=target == 0),
            "similarity": pa.array(similarity, mask=similarity == _NOWHERE),
        }
    )


def fit_choice(
    sample: pa.Table,
    targets: Targets,
    fit: Callable[[pa.Table], Kernel],
    mark: Callable[[pa.Table], Kernel] | None,
    choose: Callable[..., pa.Table],
) -> Kernel:
    """A kernel that chooses, with the targets embedded as the rows were: fitted to rows alone, never to targets.

    Args:
        sample: rows that the embedder was fitted to, with what it reads, and with their `embedding`.
        targets: to embed.
        fit: makes the kernel that adds `embedding`.
        mark: makes the kernel that adds `common`, if the embedder leaves common text out. Common in targets is what is
            common in rows.
        choose: given the table and `targets`, their embeddings.

    Raises:
        SelectionError: a target's embedding is 0, or the embedder is not the one that embedded the rows.
    """
    kernel = fit(sample)
    _check_embedder(kernel, sample)
    table = targets.table
    if mark is not None:
        table = table.append_column("common", mark(sample)(table)["common"])
    vectors = np.concatenate(list(_blocks(kernel(table)["embedding"], len(table))))
    empty = np.flatnonzero(np.abs(vectors).max(axis=1) == 0)
    if len(empty):
        source = table["source"][empty[0]].as_py()
        raise SelectionError(
            f"--target {source}: none of its words is known to the embedder, so no row is near to it; remove it."
        )
    return partial(choose, targets=vectors)


def _check_embedder(kernel: Kernel, sample: pa.Table) -> None:
    """The rows may have been embedded in an earlier run, before somebody changed the model."""
    some = sample.slice(0, _COMPARED)
    there, here = (
        np.concatenate(list(_blocks(table["embedding"], _COMPARED))).astype(np.float32)
        for table in (some, kernel(some))
    )
    if there.shape != here.shape or (np.linalg.norm(there - here, axis=1) > _APART).any():
        raise SelectionError(
            "the rows were embedded by another model than --embedder is now; give another OUT, or remove its stages."
        )


@dataclass(frozen=True)
class Taken:
    """The rows taken, in the order in which they were.

    Args:
        rows: their numbers, int64.
        targets: the number from 0 of the target that took each, int64.
        cosines: float64; -2 for a row without a direction.
    """

    rows: np.ndarray
    targets: np.ndarray
    cosines: np.ndarray


def take_in_turns(
    embedding: pa.ChunkedArray, targets: np.ndarray, ids: np.ndarray, domains: np.ndarray, limits: np.ndarray
) -> Taken:
    """Each target in turn takes the nearest row that is left.

    Of each target only so many nearest rows are kept as it is likely to need. When one has used them up, they are
    looked for anew among the rows that are left, twice as many: at least as many rows were taken in between as were
    kept, so this happens seldom.

    Args:
        embedding: of the rows, float16 of fixed size; of length 1 or 0.
        targets: float16 `[targets, d]`, none of them 0.
        ids: uint8 `[rows, 16]`.
        domains: number of each row's domain.
        limits: how many rows of each domain to take. Their sum is what is taken.
    """
    rank = np.empty(len(ids), np.int64)
    high, low = ids.view(">u8").T
    rank[np.lexsort((low, high))] = np.arange(len(ids))
    count, left = int(limits.sum()), limits.copy()
    free = left[domains] > 0
    rows, by, cosines = (np.empty(count, kind) for kind in (np.int64, np.int64, np.float64))
    number, kept = 0, MARGIN * -(-count // len(targets))
    while number < count:
        kept = max(1, min(kept, CANDIDATES // len(targets)))
        nearest = find_nearest(embedding, targets, rank, free, kept)
        unseen = [zip(*(part.tolist() for part in found), strict=True) for found in nearest]
        while number < count:
            turn = number % len(targets)
            row, cosine = next(((row, cosine) for row, cosine in unseen[turn] if free[row]), (-1, 0.0))
            if row < 0:
                break
            rows[number], by[number], cosines[number] = row, turn, cosine
            number += 1
            free[row] = False
            left[domains[row]] -= 1
            if not left[domains[row]]:
                free &= domains != domains[row]
        kept *= 2
    return Taken(rows, by, cosines)


def find_nearest(
    embedding: pa.ChunkedArray, targets: np.ndarray, rank: np.ndarray, free: np.ndarray, kept: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each target the numbers and the cosines of the `kept` free rows nearest to it, nearest first.

    Args:
        embedding, targets: see [`take_in_turns`].
        rank: of each row; of equally near ones, that of the smallest comes first.
        free: which rows count.
        kept: how many; all there are if they are fewer.
    """
    floor = np.full(len(targets), -np.inf)
    owner, row, cosine = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0)
    start = 0
    for vectors in _blocks(embedding, max(1, _BLOCK // len(targets))):
        near = cosines_to(vectors, targets)
        near[:, ~free[start : start + len(vectors)]] = -np.inf
        of, at = np.nonzero((near >= floor[:, None]) & (near > -np.inf))
        owner = np.append(owner, of.astype(np.int32))
        row = np.append(row, (at + start).astype(np.int32))
        cosine = np.append(cosine, near[of, at])
        start += len(vectors)
        if len(row) > 2 * kept * len(targets):
            owner, row, cosine, floor = _keep_nearest(owner, row, cosine, rank, len(targets), kept)
    owner, row, cosine, _ = _keep_nearest(owner, row, cosine, rank, len(targets), kept)
    ends = np.searchsorted(owner, np.arange(1, len(targets)))
    return list(zip(np.split(row, ends), np.split(cosine, ends), strict=True))


def _keep_nearest(
    owner: np.ndarray, row: np.ndarray, cosine: np.ndarray, rank: np.ndarray, targets: int, kept: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The best of each target in order, and the least cosine with which another row can still be one of them."""
    order = np.lexsort((rank[row], -cosine, owner))
    owner = owner[order]
    begins = np.searchsorted(owner, np.arange(targets))
    place = np.arange(len(owner)) - begins[owner]
    floor = np.full(targets, -np.inf)
    last = place == kept - 1
    floor[owner[last]] = cosine[order[last]]
    best = place < kept
    return owner[best], row[order[best]], cosine[order[best]], floor


def cosines_to(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Float64 `[targets, rows]`; -2 for rows that are 0. Exactly equal for equal vectors."""
    vectors, targets = vectors.astype(np.float64), targets.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    cosines = targets @ vectors.T
    cosines /= np.where(lengths > 0, lengths, 1)
    cosines /= np.sqrt(np.einsum("ij,ij->i", targets, targets))[:, None]
    cosines[:, lengths == 0] = _NOWHERE
    return cosines


def _blocks(embedding: pa.ChunkedArray, rows: int) -> Iterator[np.ndarray]:
    """Float16 `[at most rows, d]`, without a copy."""
    for chunk in embedding.chunks:
        width = chunk.type.list_size
        for start in range(0, len(chunk), rows):
            part = chunk.slice(start, rows)
            yield part.flatten().to_numpy().reshape(len(part), width)


__all__ = [
    "CANDIDATES",
    "MARGIN",
    "Taken",
    "Targets",
    "cosines_to",
    "drop_copies",
    "find_nearest",
    "fit_choice",
    "fit_copies",
    "read_targets",
    "select_nearest",
    "take_in_turns",
    "target_items",
]
