# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How much of a source is selected when 100 of its conversations are the targets.

    python benchmarks/target_selection.py [--share 0.1] [--seeds 3] [--embedder MODEL] [--folder DIR]

From a pool of real conversations of four sources, 100 of one source are held out and are the targets; selected is a
share of the others. Enrichment is the share of that source among the selected rows over its share among those that the
choice had before it; at most it is as large as if all that was selected were of the source, or all of the source were
selected.
"""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

from conversations import POOL
from measure import arguments, console, report, workplace

from sft.selection import SelectionSettings, select_conversations
from sft.selection.pipeline import STAGES
from sft.selection.stages import StageFiles

TARGETS = 100


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--share", type=float, default=0.1, help="of the rows, that is selected")
    parser.add_argument("--seeds", type=int, default=3, help="of what is held out")
    parser.add_argument("--embedder")
    options = parser.parse_args()
    with gzip.open(POOL, "rt", encoding="utf-8") as lines:
        pool = [json.loads(line) for line in lines]
    rows = []
    with workplace(options.folder) as place:
        for source in sorted({row["source"] for row in pool}):
            for seed in range(options.seeds):
                rows.append(_measure(pool, source, seed, options.share, options.embedder, place / f"{source}-{seed}"))
                console.print(" ".join(rows[-1]), style="dim")
    about = f"Conversations of four sources, {TARGETS} of one source held out as targets."
    columns = ("source", "seed", "contain a target", "before the choice", "of the source", "selected", "of the source")
    report("Selection by targets", options.folder, about, (*columns, "enrichment", "at most"), rows)


def _measure(pool: list[dict], source: str, seed: int, share: float, embedder: str | None, place: Path) -> list[str]:
    rows = random.Random(seed).sample(pool, len(pool))
    own = [row for row in rows if row["source"] == source]
    held = {id(row) for row in own[:TARGETS]}
    place.mkdir(parents=True)
    for name, chosen in (("dev.jsonl", True), ("data.jsonl", False)):
        lines = (json.dumps(row) + "\n" for row in rows if (id(row) in held) is chosen)
        (place / name).write_text("".join(lines))
    count = round(share * (len(rows) - TARGETS))
    settings = SelectionSettings(count=count, target=str(place / "dev.jsonl"), embedder=embedder, seed=seed)
    select_conversations(place / "data.jsonl", place / "out", settings)
    stages = StageFiles.open(place / "out" / STAGES)
    dropped = next(result.dropped for result in stages.results if result.name == "target-copies")
    there, taken = (_sources(stages, after) for after in (len(stages.results) - 2, len(stages.results) - 1))
    before, after = there[source] / there.total(), taken[source] / taken.total()
    most = min(1, there[source] / count) / before
    numbers = [f"{dropped.get('contains_target', 0):,}"]
    for counts in (there, taken):
        numbers += [f"{counts.total():,}", f"{counts[source]:,} ({counts[source] / counts.total():.1%})"]
    return [source, str(seed), *numbers, f"{after / before:.2f}", f"{most:.2f}"]


def _sources(stages: StageFiles, after: int) -> Counter[str]:
    return Counter(json.loads(row.as_py())["source"] for row in stages.read(("row",), after)["row"])


if __name__ == "__main__":
    main()
