# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is held out, the pool to choose from, and the faults that are planted in it. All of it depends on the seed."""

import gzip
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

from benchmarks.conversations import EDITS
from sft.selection.rows import content_id
from tests.sft.selection.pools import NOISE

from .presets import Preset

Messages = list[dict[str, str]]
OVERLAP = 0.65  # of the word pairs of the shorter of two conversations; from here on they are near duplicates
REFUSALS = (
    "I'm sorry, but I can't assist with that.",
    "I'm sorry, I cannot provide that information.",
    "As an AI language model, I cannot answer this question.",
    "I am unable to help with this request.",
)
KINDS = (*NOISE, "exact duplicate", "near duplicate", "refusal")
_ALL_MESSAGES = ("word salad", "base64", "keyboard mash", "mojibake")  # questions too; of the others the last answer


@dataclass(frozen=True)
class Row:
    """A conversation of a pool.

    Args:
        messages: with `role` and `content`.
        source: where it is from.
        fault: the kind of its fault, one of [`KINDS`], or "".
    """

    messages: Messages
    source: str
    fault: str = ""


@dataclass(frozen=True)
class Split:
    """What a seed makes of the conversations.

    Args:
        pool: in a random order, without faults.
        held_out: source -> conversations.
        near: source -> conversations left out of the pool, because they are near duplicates of held-out ones.
        dropped: sources that are not used -> conversations that were left of them for the pool.
    """

    pool: list[Row]
    held_out: dict[str, list[Messages]]
    near: dict[str, int]
    dropped: dict[str, int]

    @property
    def shares(self) -> dict[str, float]:
        """Source -> its share of the pool."""
        return {source: sum(row.source == source for row in self.pool) / len(self.pool) for source in self.held_out}


class Conversations:
    """All conversations without exact duplicates, by source, and their word pairs."""

    def __init__(self, rows: Sequence[tuple[str, Messages]]) -> None:
        unique = {content_id(messages): (source, messages) for source, messages in reversed(rows)}
        self.rows = list(unique.values())[::-1]
        self.sources = np.array([source for source, _ in self.rows])
        texts = ["\n".join(message["content"] for message in messages) for _, messages in self.rows]
        counter = CountVectorizer(ngram_range=(2, 2), binary=True, token_pattern=r"\w+", dtype=np.float32)
        self.pairs: csr_matrix = counter.fit_transform(texts)

    @classmethod
    def read(cls, file: Path) -> "Conversations":
        """From JSON Lines, perhaps compressed: `messages` and `source`."""
        opener: Any = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return cls([(row["source"], row["messages"]) for row in rows])

    def split(self, preset: Preset, seed: int) -> Split:
        """Held-out conversations and the pool of a seed. No row of the pool is a near duplicate of a held-out one."""
        draw = random.Random(f"split {seed}")
        held: dict[str, list[int]] = {}
        rest: dict[str, list[int]] = {}
        for source in sorted(set(self.sources.tolist())):
            own = np.flatnonzero(self.sources == source).tolist()
            draw.shuffle(own)
            count = min(preset.held_out, len(own) // 5)
            held[source], rest[source] = own[:count], own[count:]
        judged = [number for numbers in held.values() for number in numbers]
        near, dropped, pool = {}, {}, []
        for source, own in rest.items():
            apart = [number for number, close in zip(own, self._near(own, judged), strict=True) if not close]
            near[source] = len(own) - len(apart)
            if len(apart) < preset.least_rows:
                dropped[source] = len(apart)
                continue
            pool += [Row(self.rows[number][1], source) for number in apart[: preset.per_source]]
        draw.shuffle(pool)
        kept = {
            source: [self.rows[number][1] for number in own] for source, own in held.items() if source not in dropped
        }
        return Split(pool, kept, near, dropped)

    def _near(self, rows: Sequence[int], others: Sequence[int]) -> np.ndarray:
        """Which rows share [`OVERLAP`] of the distinct word pairs, theirs or the other's, with one of the others."""
        left, right = self.pairs[rows], self.pairs[others]
        smaller = np.minimum.outer(*(np.diff(side.indptr) for side in (left, right)))
        return ((left @ right.T).toarray() >= OVERLAP * np.maximum(smaller, 1)).any(axis=1)


def plant(pool: Sequence[Row], share: float, most: float, seed: int) -> list[Row]:
    """The pool with a share of its rows replaced by faults, of each kind alike. Less is a part of more.

    Args:
        pool: without faults.
        share: of the rows that are replaced.
        most: the greatest share of the study; duplicates are of rows that none of its pools replaces.
        seed: of the places and of the faults.
    """
    order = list(range(len(pool)))
    random.Random(f"places {seed}").shuffle(order)
    spared = order[round(most * len(pool)) :]
    texts = [row.messages for row in pool]
    rows = list(pool)
    for number, place in enumerate(order[: round(share * len(pool))]):
        kind = KINDS[number % len(KINDS)]
        draw = random.Random(f"fault {seed} {place}")
        if kind.endswith("duplicate"):
            row = pool[draw.choice(spared)]
            edit = EDITS[draw.choice(list(EDITS))] if kind.startswith("near") else _same
            rows[place] = Row(edit(row.messages, draw), row.source, kind)
        else:
            rows[place] = Row(_damage(pool[place].messages, kind, texts, draw), pool[place].source, kind)
    return rows


def _same(messages: Messages, draw: random.Random) -> Messages:
    return messages


def _damage(messages: Messages, kind: str, pool: Sequence[Messages], draw: random.Random) -> Messages:
    if kind == "refusal":
        return [*messages[:-1], {**messages[-1], "content": draw.choice(REFUSALS)}]
    first = 0 if kind in _ALL_MESSAGES else len(messages) - 1
    damaged = [{**message, "content": NOISE[kind](message["content"], pool, draw)} for message in messages[first:]]
    return [*messages[:first], *damaged]


def allot(count: int, shares: Mapping[str, float], limits: Mapping[str, int] | None = None) -> dict[str, int]:
    """`count` in proportion to the shares, none above its limit: what one lacks goes to the others in proportion.

    Rounded down, and the rest to the largest remainders.
    """
    limits = limits or dict.fromkeys(shares, count)
    full: dict[str, int] = {}
    while True:
        left = {name: share for name, share in shares.items() if name not in full}
        rest = count - sum(full.values())
        exact = {name: rest * share / math.fsum(left.values()) for name, share in left.items()}
        if not (over := {name: limits[name] for name in left if exact[name] > limits[name]}):
            break
        full |= over
    whole = {name: int(value + 1e-9) for name, value in exact.items()}
    wanting = sorted((name for name in exact if whole[name] < limits[name]), key=lambda name: whole[name] - exact[name])
    for name in wanting[: rest - sum(whole.values())]:
        whole[name] += 1
    return {name: whole.get(name, full.get(name, 0)) for name in shares}
