# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm convert --quantize fp8` of a `.bin` against `cp` of what it writes, and back; killed again and again.

Bounds: at most 1.5 times the time of cp of what is written, plus the arithmetic at the rate of one core times the
cores there are; less than 300 MiB; the same bytes after 20 kills at random instants.
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
from kills import digests, kill_and_resume, said_of_kills
from measure import (
    TELEFLM,
    Run,
    arguments,
    console,
    cp,
    cpu_seconds,
    interleave,
    mib,
    report,
    run_processes,
    seconds,
    spread,
    workplace,
)
from results import Goal
from synthetic import tele_flm_config, write_bin

from conversion.checkpoint import row_quant
from conversion.checkpoint.dtypes import BFLOAT16

GOALS = (
    Goal(
        "8-bit floats take at most 1.5 x cp, and the arithmetic", "the same, less arithmetic", 1.5, rows=r"--quantize"
    ),
    Goal("8-bit floats take less than 300 MiB", "peak RSS, MiB", 300, rows=r"^convert"),
)

QUANTIZE = "convert --quantize fp8"


def convert(source: Path, out: Path, *, options: tuple[str, ...]) -> Run:
    return run_processes([*TELEFLM, "convert", str(source), str(out), *options])


def arithmetic_rate(columns: int, rounds: int = 15) -> float:
    """Elements a second that one core makes codes of, scales included, of bfloat16 in its cache: the best of some."""
    rows = np.random.default_rng(0).standard_normal(((1 << 19) // columns, columns)).astype(BFLOAT16.numpy)
    codes, best = np.empty(rows.shape, np.uint8), np.inf
    for _ in range(rounds):
        started = time.perf_counter()
        scales = row_quant.scales_of(row_quant.largest_of(rows), BFLOAT16)
        row_quant.quantise(rows, scales, codes)
        best = min(best, time.perf_counter() - started)
    return rows.size / best


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    options: argparse.Namespace = parser.parse_args()
    with workplace(options.folder) as place:
        config = tele_flm_config(options.size)
        files = write_bin(place / "source", config)
        whole = convert(place / "source", place / "fp8", options=("--quantize", "fp8"))
        written = [place / "fp8/model.safetensors"]
        if not written[0].exists():
            written = sorted((place / "fp8").glob("model-*.safetensors"))
        rate = arithmetic_rate(config["hidden_size"])
        elements = sum(file.stat().st_size for file in files) / BFLOAT16.itemsize
        arithmetic = elements / rate / len(os.sched_getaffinity(0))
        contestants = {
            "cp of what is written": partial(cp, written),
            f"{QUANTIZE} --no-digest": partial(convert, place / "source", options=("--quantize", "fp8", "--no-digest")),
            QUANTIZE: partial(convert, place / "source", options=("--quantize", "fp8")),
            "convert --dtype bfloat16, back": partial(convert, place / "fp8", options=("--dtype", "bfloat16")),
        }
        runs = interleave(contestants, options.pairs, place, [*files, *written], options.cache)
        baseline = runs["cp of what is written"]
        rows = []
        for name, made in runs.items():
            times = [a.seconds / b.seconds for a, b in zip(made, baseline, strict=True)]
            rest = [(a.seconds - arithmetic) / b.seconds for a, b in zip(made, baseline, strict=True)]
            is_quantised = name.startswith(QUANTIZE)
            rows.append(
                [name, seconds(made), cpu_seconds(made), spread(times), spread(rest) if is_quantised else "", mib(made)]
            )
        expected = digests(place / "fp8")
        command = [*TELEFLM, "convert", str(place / "source"), str(place / "killed"), "--quantize", "fp8"]
        outcome = kill_and_resume(command, place / "killed", options.kills, whole.seconds, expected)
        read, size = sum(file.stat().st_size for file in files), sum(file.stat().st_size for file in written)
        console.print(f"{outcome}; {statistics.median(run.seconds for run in baseline):.2f} s of cp")
        report(
            "A .bin to 8-bit floats",
            options.folder,
            f"{read:,} bytes read, {size:,} written, {options.cache} cache; {options.pairs} rounds. One core makes "
            f"{rate / 1e9:.2f} G elements a second ({2 * rate / 1e9:.2f} GB/s of bfloat16, rows of "
            f"{config['hidden_size']:,}), which comes to {arithmetic:.2f} s here. {said_of_kills(outcome)}",
            ("", "seconds", "processor seconds", "x the time of cp", "the same, less arithmetic", "peak RSS, MiB"),
            rows,
            GOALS,
        )


if __name__ == "__main__":
    main()
