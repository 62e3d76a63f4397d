# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Noise planted among good conversations is taken at most as often as by chance, with the filters and without them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom

from sft.selection import SelectionSettings, embed, select_conversations
from sft.selection.diversity import K_CENTER, select_from_clusters
from sft.selection.domains import tag_domains
from sft.selection.pipeline import STAGES
from sft.selection.rows import content_id
from sft.selection.stages import StageFiles

from .conftest import table, write_rows
from .pools import NOISE, Messages, chinese_pool, english_pool, plant, real_pool

pytestmark = pytest.mark.slow

SHARE = 0.1  # that is selected
ROWS = 4000  # of each pool
SEEDS = (0, 1, 2, 3)
CONFIDENCE = 0.999  # that what is taken with probability SHARE is within the bound


@dataclass(frozen=True)
class Fate:
    """What became of the rows of one kind.

    Args:
        present: rows planted.
        filtered: those a stage before the choice dropped.
        selected: those that were taken.
    """

    present: int
    filtered: int
    selected: int

    @property
    def enrichment(self) -> float:
        """How many times as often as by chance they were taken."""
        return self.selected / self.present / SHARE

    @property
    def bound(self) -> int:
        """As many are taken by chance, or fewer, in [`CONFIDENCE`] of all cases."""
        return int(binom.ppf(CONFIDENCE, self.present, SHARE))


@pytest.fixture(scope="module", params=["real", "english", "chinese"])
def pool(request) -> list[Messages]:
    found = {"real": real_pool, "english": english_pool, "chinese": chinese_pool}[request.param](ROWS)
    if found is None:
        pytest.skip("the real conversations are absent")
    assert len(found) >= ROWS / 2
    return found


@pytest.fixture(scope="module")
def planted(pool) -> list[tuple[pa.Table, list[str]]]:
    """The pool with noise of each seed, as the choice sees it, and the kind of each row's noise: no filter has run."""
    made = []
    for seed in SEEDS:
        rows, kinds = plant(pool, seed)
        unique = {content_id(messages): place for place, messages in enumerate(rows)}
        places = sorted(unique.values())
        chats = [rows[place] for place in places]
        ids = pa.array(map(content_id, chats), pa.binary(16))
        text = table(chats, id=ids)
        encode = embed.fit_kernel(text.slice(0, embed.SAMPLE), None, seed)
        columns = {"domain": tag_domains(text)["domain"], "embedding": encode(text)["embedding"]}
        made.append((pa.table({"id": ids, **columns}), [kinds[place] for place in places]))
    return made


def choose(planted: Sequence[tuple[pa.Table, list[str]]], within: str) -> dict[str, Fate]:
    present, taken = Counter[str](), Counter[str]()
    for seed, (rows, kinds) in zip(SEEDS, planted, strict=True):
        drop = select_from_clusters(rows, round(SHARE * len(rows)), None, seed, within)["drop"]
        present.update(kinds)
        taken.update(kind for kind, reason in zip(kinds, drop.to_pylist(), strict=True) if reason is None)
    return {kind: Fate(present[kind], 0, taken[kind]) for kind in NOISE}


def test_the_choice_alone_takes_noise_at_most_as_often_as_by_chance(planted):
    fates = choose(planted, "random")
    show(fates)
    assert {kind: fate for kind, fate in fates.items() if fate.selected > fate.bound} == {}
    total = [sum(getattr(fate, name) for fate in fates.values()) for name in ("present", "selected")]
    assert total[1] / total[0] < SHARE, "all kinds together"


def test_k_center_seeks_noise(planted):
    """Why it is not the default; and that the bound can fail."""
    fates = choose(planted, K_CENTER)
    show(fates)
    assert any(fate.selected > fate.bound for fate in fates.values())


def test_the_whole_selection_takes_noise_at_most_as_often_as_by_chance(pool, tmp_path):
    rows, kinds = plant(pool, 0)
    fates = select(rows, kinds, tmp_path)
    show(fates)
    assert {kind: fate for kind, fate in fates.items() if fate.selected > fate.bound} == {}
    assert fates["repeated token"].filtered > fates["repeated token"].present / 5
    assert fates["mojibake"].filtered == fates["mojibake"].present


def show(fates: dict[str, Fate]) -> None:
    """The table, for those who run pytest with -rP."""
    print(f"{'':22}  present  filtered  selected  at most  enrichment")
    for kind, fate in fates.items():
        counts = f"{fate.present:7}  {fate.filtered:8}  {fate.selected:8}  {fate.bound:7}"
        print(f"{kind:22}  {counts}  {fate.enrichment:10.2f}")


def select(rows: Sequence[Messages], kinds: Sequence[str], folder: Path) -> dict[str, Fate]:
    """Run all stages; the fate of the rows of each kind."""
    data = write_rows(folder / "data.jsonl", [{"messages": row, "kind": place} for place, row in enumerate(rows)])
    select_conversations(data, folder / "out", SelectionSettings(count=round(SHARE * len(rows))))
    files = StageFiles.open(folder / "out" / STAGES)
    left = []
    for after in (len(files.results) - 2, len(files.results) - 1):
        left.append(Counter(kinds[place] for place in _places(files.read((), after))))
    present = Counter(kinds)
    return {kind: Fate(present[kind], present[kind] - left[0][kind], left[1][kind]) for kind in NOISE}


def _places(table: pa.Table) -> list[int]:
    """Numbers of rows of the one file, which is read in parts of as many rows."""
    from sft.selection.rows import PIECE_ROWS

    parts = [int(part.split("-")[1]) for part in table["part"].to_pylist()]
    return (np.array(parts) * PIECE_ROWS + table["position"].to_numpy()).tolist()
