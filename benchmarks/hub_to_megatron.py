# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm export --to megatron --tp 8` of layers as large as the 52B's: memory and time beside `cp` of the source.

Bound: 300 MiB for the whole process tree. Every row of o_proj and down_proj is cut into eight pieces, and the factor on
the logits is folded into the head. The command counts whole, the start of the interpreter included.
"""

from functools import partial
from pathlib import Path

from measure import GIB, TELEFLM, Run, arguments, cp, interleave, mib, ratios, report, run_processes, seconds, workplace
from results import Goal
from synthetic import write_safetensors

from conversion.architecture import load_preset

GOALS = (Goal("a Hub folder to Megatron takes less than 300 MiB", "peak RSS, MiB", 300, rows=r"^--tp"),)


def export(source: Path, out: Path, *, flags: tuple[str, ...]) -> Run:
    return run_processes([*TELEFLM, "export", str(source), str(out), "--to", "megatron", *flags])


def main() -> None:
    parser = arguments(__doc__, pairs=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    options = parser.parse_args()
    commands = ["--tp 8 --no-digest", "--tp 8", "--tp 8 --pp 2 --spec local"]
    with workplace(options.folder) as place:
        files = write_safetensors(place / "source", load_preset("tele-flm-52b") | {"num_hidden_layers": options.layers})
        size = sum(file.stat().st_size for file in files)
        contestants = {
            "cp": partial(cp, files),
            **{flags: partial(export, place / "source", flags=tuple(flags.split())) for flags in commands},
        }
        runs = interleave(contestants, options.pairs, place, files, options.cache)
    rows = [
        [name, seconds(runs[name]), ratios(runs, name, "cp"), mib(runs[name]) if name != "cp" else ""] for name in runs
    ]
    report(
        "A Hub folder to Megatron",
        options.folder,
        f"{options.layers} layers of the 52B, {size / GIB:.2f} GiB, {options.cache} cache, {options.pairs} rounds.",
        ["", "seconds", "x the time of cp", "peak RSS, MiB"],
        rows,
        GOALS,
    )


if __name__ == "__main__":
    main()
