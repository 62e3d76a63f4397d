# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The runs of a study, each a line of JSON that is appended when it is done; what is there is not done again."""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import arms, pool
from .ifd import Scorer
from .presets import Preset
from .training import Encoded, Trainer

UNTRAINED = "base"  # the arm without fine-tuning


@dataclass(frozen=True)
class Study:
    """Where everything is.

    Args:
        data: the conversations.
        work: folder for the base, the pools and the selections.
        results: folder with `runs.jsonl`, `pools.jsonl` and `base.json`.
        preset: how large it is.
    """

    data: Path
    work: Path
    results: Path
    preset: Preset

    @property
    def base(self) -> Path:
        """The pretrained model."""
        return self.work / "base"

    def prepared(self, seed: int, share: float) -> Path:
        """The pool of a seed with so many faults, and the rows of its arms."""
        return self.work / "pools" / f"seed-{seed}-faults-{share:g}.json"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The values of JSON Lines; none if there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _append(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(value, ensure_ascii=False) + "\n")


# --- pools ------------------------------------------------------------------------------------------------------------


def prepare(study: Study, seeds: Sequence[int], faults: Sequence[float]) -> None:
    """Make the pools of some seeds and shares of faults, and choose the rows of every arm."""
    preset = study.preset
    there = {(row["seed"], row["faults"]) for row in read_lines(study.results / "pools.jsonl")}
    todo = [
        (seed, share)
        for seed in seeds
        for share in faults
        if not study.prepared(seed, share).exists() or (seed, share) not in there
    ]
    if not todo:
        return
    conversations, scorer = pool.Conversations.read(study.data), Scorer(study.base, preset.device)
    for seed in sorted({seed for seed, _ in todo}):
        split = conversations.split(preset, seed)
        scores = _scores(study, seed, [row.messages for row in split.pool], scorer)
        for share in [share for own, share in todo if own == seed]:
            rows = pool.plant(split.pool, share, max(preset.faults), seed)
            arms.score((row.messages for row in rows), scores, scorer)
            counts = preset.counts if share == preset.counted_at else ()
            place = study.work / "selections" / f"seed-{seed}-faults-{share:g}"
            chosen = arms.choose(rows, scores, split.shares, preset, seed, place, counts)
            _write(
                study.prepared(seed, share),
                {
                    "shares": split.shares,
                    "held_out": split.held_out,
                    "rows": [asdict(row) for row in rows],
                    "arms": chosen,
                },
            )
            if (seed, share) not in there:
                described = _describe_pool(split, rows, place)
                _append(study.results / "pools.jsonl", {"seed": seed, "faults": share, **described})
            shutil.rmtree(place)
            print(f"pool: seed {seed}, {share:.0%} faults, {len(rows)} rows", flush=True)


def _scores(study: Study, seed: int, chats: list[pool.Messages], scorer: Scorer) -> dict[str, float | None]:
    """The IFD of the pool's conversations, which those of other seeds may have had scored before."""
    folder = study.work / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, float | None] = {}
    for file in sorted(folder.glob("*.json")):
        known |= json.loads(file.read_text())
    before = set(known)
    arms.score(chats, known, scorer)
    _write(folder / f"seed-{seed}.json", {name: known[name] for name in known.keys() - before})
    return known


def _describe_pool(split: pool.Split, rows: Sequence[pool.Row], place: Path) -> dict[str, Any]:
    """What the page says of a pool: its rows, and what the stages of the selection dropped of them."""
    stages = json.loads((place / "scored" / "selection.json").read_text())["stages"]
    return {
        "rows": Counter(row.source for row in rows),
        "held_out": {source: len(own) for source, own in split.held_out.items()},
        "near_held_out": split.near,
        "sources_dropped": split.dropped,
        "planted": Counter(row.fault for row in rows if row.fault),
        "stages": {stage["name"]: stage["dropped"] for stage in stages if stage["dropped"]},
    }


def _write(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    partial.replace(file)


# --- runs -------------------------------------------------------------------------------------------------------------


def run_all(study: Study, seeds: Sequence[int], faults: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The runs of some seeds and shares of faults that are not done yet."""
    file = study.results / "runs.jsonl"
    known = {(row["seed"], row["faults"], row["arm"]) for row in read_lines(file)}
    trainer = Trainer(study.base, study.preset)
    for share in faults:
        for seed in seeds:
            made = json.loads(study.prepared(seed, share).read_text(encoding="utf-8"))
            names = [UNTRAINED, *made["arms"]] if not share else [*made["arms"]]
            left = [name for name in names if (seed, share, name) not in known]
            if left:
                runner = _Runner(trainer, made, seed)
                for name in left:
                    found = {"seed": seed, "faults": share, "arm": name, **runner.run(name)}
                    _append(file, found)
                    yield found


class _Runner:
    """The runs on one pool."""

    def __init__(self, trainer: Trainer, made: dict[str, Any], seed: int) -> None:
        self.trainer, self.made, self.seed = trainer, made, seed
        self.encoded: dict[int, Encoded | None] = {}
        self.held_out = {
            source: [row for row in map(trainer.encode, chats) if row] for source, chats in made["held_out"].items()
        }

    def run(self, name: str) -> dict[str, Any]:
        """Fine-tune on the rows of an arm, and judge."""
        started = time.perf_counter()
        numbers = [] if name == UNTRAINED else self.made["arms"][name]
        rows = [row for row in map(self._encode, numbers) if row]
        self.trainer.reset()
        # Two draws of the same arm differ in their order too.
        order = self.seed + 1_000_000 * (name == arms.AGAIN)
        learned = self.trainer.train(rows, order) if rows else 0
        losses = self.trainer.judge(self.held_out)
        primary = math.fsum(self.made["shares"][source] * loss for source, loss in losses.items())
        chosen = [self.made["rows"][number] for number in numbers]
        return {
            "primary": round(primary, 6),
            "losses": {source: round(loss, 6) for source, loss in losses.items()},
            "chosen": len(numbers),
            "trained_rows": len(rows),
            "row_tokens": sum(len(row.ids) for row in rows),
            "learned_tokens": learned,
            "sources": Counter(row["source"] for row in chosen),
            "planted": Counter(row["fault"] for row in chosen if row["fault"]),
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _encode(self, number: int) -> Encoded | None:
        if number not in self.encoded:
            self.encoded[number] = self.trainer.encode(self.made["rows"][number]["messages"])
        return self.encoded[number]


def on_device(preset: Preset, device: str | None) -> Preset:
    """The preset on another device than its own."""
    return preset if device is None else replace(preset, device=device)
