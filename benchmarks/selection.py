# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a selection costs, and what of the planted faults it finds.

    python benchmarks/selection.py [--rows 10000 100000 1000000] [--runs 3] [--folder DIR]

The corpus is made by conversations.py. Timed is the command `teleflm sft select ... -n 30000 --decontaminate ...`, from
its start to its end, with a worker a core; memory is that of all its processes together. A planted copy counts as found
if it or its original is dropped as a duplicate; a false positive is a unique conversation dropped as one.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from conversations import EDITS, POOL, write_corpus
from measure import TELEFLM, Run, arguments, console, cpu_seconds, mib, report, run_processes, seconds, workplace
from results import Goal

FOUND_GOALS = (
    Goal("selection drops no unique conversation as a copy", "false positives", 0),
    Goal("selection finds every exact copy", "exact", 100, at_least=True),
    Goal("selection finds 95 % of copies with swapped words", "word swaps", 95, at_least=True),
)

SELECTED = 30_000
ROWS_A_FILE = 50_000
DUPLICATE = ("exact_duplicate", "near_duplicate")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--runs", type=int, default=3, help="of each size")
    options = parser.parse_args()
    costs, found = [], []
    with workplace(options.folder) as place:
        for rows in options.rows:
            corpus = place / f"corpus-{rows}"
            files, evaluation = write_corpus(corpus, rows, files=-(-rows // ROWS_A_FILE))
            runs = []
            for number in range(options.runs):
                out = place / f"out-{rows}-{number}"
                runs.append(_select(files, evaluation, min(SELECTED, rows // 4), out))
                console.print(f"{rows:,} rows: {runs[-1].seconds:.1f} s", style="dim")
            costs.append(_cost(rows, runs, files, out))
            found.append([f"{rows:,}", *_found(files, out)])
    source = "a pool of real conversations" if POOL.exists() else "the standard library's documentation"
    about = f"Conversations of 2,000 characters on average, made from {source}; one in four is a planted copy."
    columns = ("rows", "bytes a row", "seconds", "processor seconds", "ms a row", "peak RSS, MiB", "slowest stages, s")
    report("Selection: cost", options.folder, about, columns, costs)
    kinds = ("rows", "exact", *EDITS, "evaluation items", "false positives")
    report(
        "Selection: planted copies and evaluation items that are found",
        options.folder,
        about,
        kinds,
        found,
        FOUND_GOALS,
    )


def _select(files: list[Path], evaluation: Path, count: int, out: Path) -> Run:
    arguments = [*map(str, files), str(out), "-n", str(count), "--decontaminate", str(evaluation)]
    return run_processes([*TELEFLM, "sft", "select", *arguments])


def _cost(rows: int, runs: list[Run], files: list[Path], out: Path) -> list[str]:
    stages = json.loads((out / "selection.json").read_text())["stages"]
    slowest = sorted(stages, key=lambda stage: -stage["seconds"])[:4]
    return [
        f"{rows:,}",
        f"{sum(file.stat().st_size for file in files) / rows:,.0f}",
        seconds(runs),
        cpu_seconds(runs),
        f"{1000 * sorted(run.seconds for run in runs)[len(runs) // 2] / rows:.2f}",
        mib(runs),
        ", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in slowest),
    ]


def _found(files: list[Path], out: Path) -> list[str]:
    """Shares of the planted copies of each kind and of the evaluation items, and of the unique conversations."""
    dropped = {(row["group"], row["planted"]): reason for row, reason in _dropped(out)}
    total, hits = Counter[str](), Counter[str]()
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                kind, group = row["planted"], row["group"]
                total[kind] += 1
                reason = dropped.get((group, kind))
                if kind == "contaminated":
                    hits[kind] += reason == "contaminated"
                elif kind == "unique":
                    hits[kind] += reason in DUPLICATE
                elif kind != "original":
                    hits[kind] += reason in DUPLICATE or dropped.get((group, "original")) in DUPLICATE
    shown = [f"{hits[kind] / total[kind]:.2%}" for kind in ("exact", *EDITS)]
    items = f"{hits['contaminated']:,} of {total['contaminated']:,}"
    return [*shown, items, f"{hits['unique']:,} of {total['unique']:,}"]


def _dropped(out: Path) -> Iterator[tuple[dict, str]]:
    """Rows that a stage before the last dropped, and why."""
    stages = sorted((out / "stages").iterdir())
    for stage in stages[1:-1]:
        for part in sorted(stage.glob("*.parquet")):
            table = pq.read_table(part, columns=["position", "drop"])
            table = table.filter(table["drop"].is_valid())
            rows = pq.read_table(stages[0] / part.name, columns=["row"])["row"].take(table["position"])
            for row, reason in zip(rows.to_pylist(), table["drop"].to_pylist(), strict=True):
                yield json.loads(row), reason


if __name__ == "__main__":
    main()
