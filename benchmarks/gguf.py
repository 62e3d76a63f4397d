# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm export --to gguf` against `cp` of what it writes, and the rate of its arithmetic on one core.

bf16 is the same bytes, of query and key in another order; q8_0 and f16 are computed. The bound is 1.5 times `cp` of the
same files, and the arithmetic: what one core needs for that, over the number of threads. Beside it stands what as many
threads really need for the arithmetic alone, with everything in memory, as they take turns at the interpreter.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from kills import Outcome, digests, kill_and_resume, said_of_kills
from measure import (
    GIB,
    ROOT,
    TELEFLM,
    Run,
    arguments,
    cp,
    cpu_seconds,
    interleave,
    mib,
    ratios,
    report,
    run_processes,
    seconds,
    spread,
    workplace,
)
from results import Goal
from synthetic import tele_flm_config, write_safetensors

sys.path.insert(0, str(ROOT))

from conversion.checkpoint.block_quant import quantise_q8_0
from conversion.checkpoint.dtypes import Q8_0
from tests.fixtures.tiny import tiny_sentencepiece

GOALS = (
    Goal("GGUF of the same bytes takes at most 1.5 x cp", "x cp", 1.5, rows=r"^bf16"),
    Goal("q8_0 takes at most 1.5 x cp, and the arithmetic", "x the bound", 1, rows=r"^q8_0"),
    Goal("GGUF takes less than 300 MiB", "peak RSS, MiB", 300),
)

_BLOCKS = 1 << 15
_OUTTYPES = ("bf16", "q8_0")


def quantising_rate() -> float:
    """GiB of Q8_0 that a core makes of bfloat16 in a second, at its best of several tries."""
    values = np.random.default_rng(0).standard_normal((_BLOCKS, Q8_0.packed)).astype(ml_dtypes.bfloat16)
    out = np.empty(_BLOCKS, Q8_0.numpy)
    best = float("inf")
    for _ in range(30):
        started = time.thread_time()
        quantise_q8_0(values, out)
        best = min(best, time.thread_time() - started)
    return out.nbytes / GIB / best


def rate_of_threads(threads: int) -> float:
    """GiB of Q8_0 that some threads make in a second by the clock, together and at their best of several tries."""
    values = np.random.default_rng(0).standard_normal((_BLOCKS, Q8_0.packed)).astype(ml_dtypes.bfloat16)
    outs = [np.empty(_BLOCKS, Q8_0.numpy) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(30):
            started = time.perf_counter()
            list(pool.map(partial(quantise_q8_0, values), outs))
            best = min(best, time.perf_counter() - started)
    return threads * outs[0].nbytes / GIB / best


def command(source: Path, out: Path, outtype: str, workers: int) -> list[str]:
    options = ["--to", "gguf", "--outtype", outtype, "--workers", str(workers)]
    return [*TELEFLM, "export", str(source), str(out), *options]


def export(source: Path, out: Path, *, outtype: str, workers: int) -> Run:
    return run_processes(command(source, out, outtype, workers))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", choices=["warm", "cold"], nargs="+", default=["warm", "cold"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    rate, together = quantising_rate(), rate_of_threads(options.workers)
    with workplace(options.folder) as place:
        files = write_safetensors(place / "tele", tele_flm_config(options.size))
        (place / "tele/tokenizer.model").write_bytes(tiny_sentencepiece())
        made: dict[str, list[Path]] = {}
        outcomes: dict[str, Outcome] = {}
        for outtype in _OUTTYPES:  # what `cp` copies
            whole = export(place / "tele", place / outtype, outtype=outtype, workers=options.workers)
            made[outtype] = sorted((place / outtype).glob("*.gguf"))
            again = command(place / "tele", place / "killed", outtype, options.workers)
            expected = digests(place / outtype)
            outcomes[outtype] = kill_and_resume(again, place / "killed", options.kills, whole.seconds, expected)
        for cache in options.cache:
            contestants = {}
            for outtype in _OUTTYPES:
                contestants[f"cp of {outtype}"] = partial(cp, made[outtype])
                contestants[outtype] = partial(export, place / "tele", outtype=outtype, workers=options.workers)
            every = [*files, *(file for part in made.values() for file in part)]
            runs = interleave(contestants, options.pairs, place, every, cache)
            rows = []
            for outtype in _OUTTYPES:
                size = sum(file.stat().st_size for file in made[outtype])
                computed = size / GIB if outtype == "q8_0" else 0.0
                arithmetic = computed / rate / options.workers
                copies = runs[f"cp of {outtype}"]
                bounds = [1.5 * run.seconds + arithmetic for run in copies]
                against = [run.seconds / bound for run, bound in zip(runs[outtype], bounds, strict=True)]
                bound = 1.5 * statistics.median(run.seconds for run in copies) + arithmetic
                rows.append(
                    [
                        outtype,
                        f"{size / GIB:.2f}",
                        seconds(runs[f"cp of {outtype}"]),
                        seconds(runs[outtype]),
                        ratios(runs, outtype, f"cp of {outtype}"),
                        f"{arithmetic:.2f}",
                        f"{computed / together:.2f}",
                        f"{bound:.2f}",
                        spread(against),
                        cpu_seconds(runs[outtype]),
                        mib(runs[outtype]),
                    ]
                )
            report(
                f"A bfloat16 model to GGUF, {cache} cache",
                options.folder,
                f"{options.pairs} rounds, {options.workers} threads. A core makes {rate:.2f} GiB of q8_0 in a second, "
                f"{options.workers} threads {together:.2f}. "
                + " ".join(f"{outtype}: {said_of_kills(outcome)}" for outtype, outcome in outcomes.items()),
                [
                    "outtype",
                    "GiB written",
                    "cp, s",
                    "export, s",
                    "x cp",
                    "arithmetic, s",
                    "by threads, s",
                    "bound, s",
                    "x the bound",
                    "processor s",
                    "peak RSS, MiB",
                ],
                rows,
                GOALS,
            )


if __name__ == "__main__":
    main()
