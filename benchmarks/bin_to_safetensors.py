# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm convert` of a `.bin` against `cp` of the same bytes and against loading it all.

Bounds: at most 1.25 times the time of cp without digests (aim: 1.0), at most 1.5 times with them, 4 times faster than
torch.load of every shard and safetensors' save_file. The command counts whole, the start of the interpreter included.
"""

import sys
from functools import partial
from pathlib import Path

from measure import (
    AGAINST_CP,
    ROOT,
    TELEFLM,
    Run,
    against_cp,
    arguments,
    cp,
    interleave,
    report,
    run_processes,
    workplace,
)
from results import Goal
from synthetic import tele_flm_config, write_bin

GOALS = (
    Goal("convert takes at most 1.25 x cp without digests", "x the time of cp", 1.25, rows=r"^convert --no-digest"),
    Goal("convert takes at most 1.5 x cp with digests", "x the time of cp", 1.5, rows=r"^convert \|"),
    Goal(
        "convert is 4 times faster than loading all",
        "times faster than loading all",
        4,
        at_least=True,
        rows=r"^convert",
    ),
    Goal("convert takes less than 300 MiB", "peak RSS, MiB", 300, rows=r"^convert"),
)

LOAD_ALL = "load all, save_file"


def convert(source: Path, out: Path, *, options: tuple[str, ...] = ()) -> Run:
    return run_processes([*TELEFLM, "convert", str(source), str(out), *options])


def load_all(source: Path, out: Path) -> Run:
    return run_processes([sys.executable, str(ROOT / "benchmarks/load_all.py"), str(source), str(out)])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", choices=["warm", "cold"], nargs="+", default=["warm", "cold"])
    options = parser.parse_args()
    with workplace(options.folder) as place:
        files = write_bin(place / "source", tele_flm_config(options.size))
        size = sum(file.stat().st_size for file in files)
        for cache in options.cache:
            contestants = {
                "cp": partial(cp, files),
                "convert --no-digest": partial(convert, place / "source", options=("--no-digest",)),
                "convert": partial(convert, place / "source"),
                LOAD_ALL: partial(load_all, place / "source"),
            }
            runs = interleave(contestants, options.pairs, place, files, cache)
            report(
                f"A .bin to safetensors, {cache} cache",
                options.folder,
                f"One file of {size:,} bytes, {cache}; {options.pairs} rounds.",
                AGAINST_CP,
                against_cp(runs, LOAD_ALL),
                GOALS,
            )


if __name__ == "__main__":
    main()
