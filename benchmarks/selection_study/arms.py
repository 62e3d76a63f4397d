# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The arms: which rows of a pool each of them takes.

`sft select` runs once with everything on, and leaves behind what each of its stages let pass. An arm in the middle of
the ladder takes at random from what had passed so far. All of them draw from one random order of the pool, so two arms
differ by what the one adds to the other and not by another draw; `random again` alone has an order of its own.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.selection import SelectionSettings, select_conversations
from sft.selection.rows import content_id
from sft.selection.stages import StageFiles

from .ifd import Scorer
from .pool import Row, allot
from .presets import Preset

# Name -> the arm that it adds something to, and what.
LADDER = {
    "random": (None, "rows at random"),
    "quota": ("random", "each source has its share of the pool"),
    "dedup": ("quota", "no exact and no near duplicates"),
    "heuristics": ("dedup", "no row that a rule calls broken"),
    "ranked": ("heuristics", "of each source the rows of highest IFD"),
    "score": ("ranked", "no row of IFD from 1 on, as `--scorer` drops them; other sources fill up"),
    "choice": ("score", "the same from clusters, outliers last: `teleflm sft select --scorer BASE`"),
    "unscored": ("heuristics", "clusters and outliers, without a score: `teleflm sft select`"),
}
AGAIN = "random again"
BOTH = ("random", "choice")  # those of the second part
ALL = "all"


def key(messages: Sequence[Mapping[str, str]]) -> str:
    """A name for what a conversation says."""
    return content_id(messages).hex()  # type: ignore[arg-type]


def score(chats: Iterable[list[dict[str, str]]], known: dict[str, float | None], scorer: Scorer) -> None:
    """Add the IFD of conversations that have none; None where there is no token to predict."""
    new = {key(messages): messages for messages in chats if key(messages) not in known}
    for name, value in zip(new, scorer.score(list(new.values())), strict=True):
        known[name] = None if value is None else round(value, 6)


def choose(
    pool: Sequence[Row],
    scores: Mapping[str, float | None],
    shares: Mapping[str, float],
    preset: Preset,
    seed: int,
    folder: Path,
    counts: Sequence[int] = (),
) -> dict[str, list[int]]:
    """The rows of every arm, by their number in the pool.

    Args:
        pool: with its faults.
        scores: of every conversation that has one; see [`score`].
        shares: source -> share, for the quota.
        preset: its `count` is how many rows an arm of the ladder takes.
        seed: of everything random.
        folder: to work in.
        counts: more numbers of rows, for the arms of [`BOTH`], and with them [`ALL`].

    Returns:
        arm -> rows; of the second part the arm is named with its count, as in `random 100`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "pool.jsonl"
    data.write_text("".join(_line(number, row, scores) for number, row in enumerate(pool)), encoding="utf-8")

    def select(count: int, name: str, **more: Any) -> list[int]:
        settings = SelectionSettings(
            count=count, domain_column="source", quota=dict(shares), seed=seed, allow_fewer=True, **more
        )
        chosen = select_conversations(data, folder / name, settings, overwrite=True)
        with open(chosen.file, encoding="utf-8") as lines:
            return [json.loads(line)["number"] for line in lines]

    arms = {"choice": select(preset.count, "scored", score_column="ifd"), "unscored": select(preset.count, "unscored")}
    passed = _passed(folder / "scored" / "stages")

    def by_quota(order: Sequence[int], count: int) -> list[int]:
        """In this order so many of each source; what one lacks goes to the others, as in `sft select`."""
        own = {source: [number for number in order if pool[number].source == source] for source in shares}
        limits = {source: len(numbers) for source, numbers in own.items()}
        return [number for source, picks in allot(count, shares, limits).items() for number in own[source][:picks]]

    order, again = (_order(len(pool), f"{name} {seed}") for name in ("draw", "draw again"))
    valid = passed["rows"]
    arms["random"] = _of(order, valid)[: preset.count]
    arms[AGAIN] = _of(again, valid)[: preset.count]
    arms["quota"] = by_quota(_of(order, valid), preset.count)
    arms["dedup"] = by_quota(_of(order, passed["near-duplicates"]), preset.count)
    arms["heuristics"] = by_quota(_of(order, passed["heuristics"]), preset.count)
    best = sorted(range(len(pool)), key=lambda number: -(scores[key(pool[number].messages)] or 0.0))
    arms["ranked"] = by_quota(_of(best, passed["heuristics"]), preset.count)
    arms["score"] = by_quota(_of(best, passed["scores"]), preset.count)
    for count in counts:
        arms[f"random {count}"] = _of(order, valid)[:count]
        arms[f"choice {count}"] = select(count, "scored", score_column="ifd")
    if counts:
        arms[ALL] = _of(order, valid)
    return arms


def _line(number: int, row: Row, scores: Mapping[str, float | None]) -> str:
    ifd = scores[key(row.messages)]
    kept = None if ifd is None or ifd >= 1 else ifd  # a row without a number is dropped, as `--scorer` would
    value = {"messages": row.messages, "source": row.source, "number": number, "ifd": kept}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _passed(stages: Path) -> dict[str, set[int]]:
    """Name of a stage -> numbers of the rows that it and those before it let pass."""
    files = StageFiles.open(stages)
    return {
        result.name: {json.loads(row.as_py())["number"] for row in files.read(("row",), after)["row"]}
        for after, result in enumerate(files.results)
    }


def _order(rows: int, seed: str) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


def _of(order: Sequence[int], rows: set[int]) -> list[int]:
    return [number for number in order if number in rows]
