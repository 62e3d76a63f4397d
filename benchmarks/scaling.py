# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From one worker to two, and from one rank to two: the same output, in how much less time.

A growth (random fills, zeros, copies), a cast and a rewrite of the same source. One worker of one rank is the base;
ranks are processes with torchrun's variables that share the output's shards, of which there are several.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from measure import GIB, TELEFLM, Run, arguments, interleave, mib, ratios, report, run_processes, seconds, workplace
from results import Goal
from synthetic import tele_flm_config, write_safetensors

GOALS = (
    Goal("two workers or ranks are not slower than one", "times as fast", 1, at_least=True, rows=r"2 workers|2 ranks"),
)

SHARDS = 8
WAYS = {"1 rank, 1 worker": (1, 1), "1 rank, 2 workers": (1, 2), "2 ranks, 1 worker each": (2, 1)}
BASE = "1 rank, 1 worker"


def run(command: Sequence[str], ranks: int, workers: int, out: Path) -> Run:
    line = [*TELEFLM, *command[:2], str(out), *command[2:], "--workers", str(workers)]
    world = [{"RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    return run_processes(line, environments=world)


def main() -> None:
    options = arguments(__doc__).parse_args()
    with workplace(options.folder) as place:
        # A growth to 3/2 of the width, feed-forward and heads is a bit more than twice the source.
        config = tele_flm_config(options.size / 2.1)
        files = write_safetensors(place / "source", config)
        source_bytes = sum(file.stat().st_size for file in files)
        wider = {
            name: config[name] * 3 // 2
            for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        }
        growth = ["grow", str(place / "source"), *(word for k, v in wider.items() for word in ("--set", f"{k}={v}"))]
        jobs = {
            "grow": (growth, round(options.size * GIB)),
            "convert": (["convert", str(place / "source"), "--dtype", "float32"], 2 * source_bytes),
            "convert, bytes as they are": (["convert", str(place / "source")], source_bytes),
        }
        rows = []
        for job, (command, size) in jobs.items():
            command = [*command, "--max-shard-size", str(size // SHARDS)]
            contestants = {way: partial(run, command, *WAYS[way]) for way in WAYS}
            runs = interleave(contestants, options.pairs, place, files, "warm")
            rows += [[job, way, seconds(runs[way]), ratios(runs, BASE, way), mib(runs[way])] for way in contestants]
    about = f"Source of {source_bytes:,} bytes, warm; about {SHARDS} shards; {options.pairs} rounds."
    columns = ["job", "way", "seconds", "times as fast", "peak RSS, MiB"]
    report("Workers and ranks", options.folder, about, columns, rows, GOALS)


if __name__ == "__main__":
    main()
