# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Random fills and casts: GiB of output a second, one thread and two, beside numpy's and torch's own generators.

Bound: 1 GiB/s for each core. Nothing is written; sources are in the page cache.
"""

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from measure import GIB, arguments, console, report, spread, workplace
from results import Goal

from conversion.checkpoint.assemble import BLOCK, blocks, resolve, stream
from conversion.checkpoint.bytes import identify
from conversion.checkpoint.dtypes import BFLOAT16, FLOAT32, DType
from conversion.checkpoint.normal_stream import draw_words, normal_table
from conversion.checkpoint.plan import Box, Copy, Normal, TensorPlan, View
from conversion.checkpoint.reader import FileReader

GOALS = (
    Goal("a core fills and casts 1 GiB a second", "1 thread", 1, at_least=True, rows=r"^(normal fill|bfloat16 x)"),
)

SOURCE_BLOCKS = 8
Job = tuple[int, Callable[[int, int], None]]
"""Bytes of an element of the output, and what makes the elements `start .. stop`."""


def of_plan(tensor: TensorPlan, reader: FileReader) -> Job:
    """Through the executor's own path, up to the write."""
    resolved = resolve([tensor], reader, 1)

    def make(start: int, stop: int) -> None:
        for _ in stream(tensor, start, stop, reader=reader, resolved=resolved, seed=0):
            pass

    return tensor.dtype.itemsize, make


def fill(dtype: DType, numel: int, reader: FileReader) -> Job:
    normal_table(0.02, dtype)  # made once a run, not once a block
    return of_plan(TensorPlan("weight", (numel,), dtype, (Normal(Box.whole((numel,)), 0.02),)), reader)


def scaled(dtype: DType, source: View, numel: int, reader: FileReader) -> Job:
    """A copy of a small source, again and again, times a factor."""
    layout = (numel // source.numel, source.numel)
    pieces = tuple(
        Copy(Box((n, 0), (1, source.numel)), source.unflatten(0, (1, source.numel)), 0.7) for n in range(layout[0])
    )
    return of_plan(TensorPlan("weight", layout, dtype, pieces), reader)


def numpy_fill() -> Job:
    """Its fastest generator, as bfloat16; a generator a block, so that threads share none."""

    def make(start: int, stop: int) -> None:
        values = np.random.Generator(np.random.SFC64(start)).standard_normal(stop - start, np.float32)
        values *= 0.02
        values.astype(BFLOAT16.numpy)

    return BFLOAT16.itemsize, make


def torch_fill(dtype: torch.dtype) -> Job:
    def make(start: int, stop: int) -> None:
        generator = torch.Generator().manual_seed(start)
        torch.empty(stop - start, dtype=dtype).normal_(0, 0.02, generator=generator)

    return dtype.itemsize, make


def speed(job: Job, numel: int, threads: int) -> float:
    """GiB of output a second."""
    itemsize, make = job
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda block: make(*block), blocks(numel)))
    return numel * itemsize / GIB / (time.perf_counter() - started)


def main() -> None:
    options = arguments(__doc__, size=0.5).parse_args()
    torch.set_num_threads(1)
    numel = max(1, round(options.size * GIB / BFLOAT16.itemsize / BLOCK / SOURCE_BLOCKS)) * BLOCK * SOURCE_BLOCKS
    with workplace(options.folder) as place, FileReader() as reader:
        file = place / "source"
        file.write_bytes(normal_table(0.02, BFLOAT16)[draw_words(0, "source", 0, SOURCE_BLOCKS * BLOCK)].tobytes())
        source = View.contiguous(identify(file), 0, (SOURCE_BLOCKS * BLOCK,), BFLOAT16)
        jobs = {
            "normal fill, bfloat16": fill(BFLOAT16, numel, reader),
            "normal fill, float32": fill(FLOAT32, numel, reader),
            "bfloat16 x factor, bfloat16": scaled(BFLOAT16, source, numel, reader),
            "bfloat16 x factor, float32": scaled(FLOAT32, source, numel, reader),
            "numpy standard_normal, to bfloat16": numpy_fill(),
            "torch normal_, bfloat16": torch_fill(torch.bfloat16),
            "torch normal_, float32": torch_fill(torch.float32),
        }
        found: dict[tuple[str, int], list[float]] = {(name, threads): [] for name in jobs for threads in (1, 2)}
        for _ in range(options.pairs):
            for name, threads in random.sample(list(found), len(found)):
                found[name, threads].append(speed(jobs[name], numel, threads))
    console.print(f"{options.pairs} rounds of {numel:,} elements", style="dim")
    rows = [
        [name, spread(found[name, 1]), spread(found[name, 2]), f"{_gain(found[name, 1], found[name, 2]):.2f}"]
        for name in jobs
    ]
    about = f"{numel:,} elements a run, {options.pairs} rounds in random order."
    columns = ["GiB/s of output", "1 thread", "2 threads", "gain"]
    report("Random fills and casts", options.folder, about, columns, rows, GOALS)


def _gain(one: list[float], two: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(one, two, strict=True))


if __name__ == "__main__":
    main()
