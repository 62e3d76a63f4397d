# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Peak memory of `teleflm convert`: it depends neither on the checkpoint nor on its largest tensor.

Bound: 300 MB for the whole process tree, at 3.5 GiB, at 14 GiB, and for one tensor as large as the largest of the 1T;
with two threads, and with more than there are processors. With `--cast`, to float32, whose arrays are the largest.
The sources are written one after the other; the largest needs twice its size on the disk, and thrice with `--cast`.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from bin_to_safetensors import convert
from measure import GIB, arguments, mib, report, seconds, set_cache, workplace
from results import Goal
from synthetic import random_weight, tele_flm_config, write_bin

GOALS = (Goal("convert takes less than 300 MB, whatever the size", "peak RSS, MiB", 286),)

_SHARD_GIB = 3.5  # what torch.save has in memory here while a source is made


def write_one_tensor(folder: Path, shape: tuple[int, ...]) -> list[Path]:
    """A checkpoint of no architecture: one tensor."""
    folder.mkdir()
    torch.save({"weight": random_weight(np.random.SFC64(0), shape)}, folder / "pytorch_model.bin")
    return [folder / "pytorch_model.bin"]


def main() -> None:
    parser = arguments(__doc__, pairs=3)
    parser.add_argument("--sizes", type=float, nargs="+", default=[3.5, 14], help="GiB of weights of each checkpoint")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 32, 128])
    parser.add_argument("--cast", action="store_true", help="to float32, instead of copying with and without digests")
    options = parser.parse_args()
    ways = [("--dtype", "float32")] if options.cast else [(), ("--no-digest",)]
    flags_of_ways = [(*flags, "--workers", str(workers)) for flags in ways for workers in options.workers]
    sources = {
        f"{size:g} GiB": lambda at, size=size: write_bin(at, tele_flm_config(size), max(1, round(size / _SHARD_GIB)))
        for size in options.sizes
    }
    sources["one tensor, 98304 x 20480"] = lambda at: write_one_tensor(at, (98304, 20480))
    rows = []
    with workplace(options.folder) as place:
        for name, write in sources.items():
            files = write(place / "source")
            size = sum(file.stat().st_size for file in files)
            for flags in flags_of_ways:
                runs = []
                for _ in range(options.pairs):
                    set_cache(files, "cold")
                    runs.append(convert(place / "source", place / "output", options=flags))
                    shutil.rmtree(place / "output")
                row = [
                    name,
                    str(len(files)),
                    f"{size / GIB:.2f}",
                    " ".join(["convert", *flags]),
                    seconds(runs),
                    mib(runs),
                ]
                rows.append(row)
            shutil.rmtree(place / "source")
    columns = ["checkpoint", "files", "GiB", "command", "seconds", "peak RSS, MiB"]
    report("Peak memory", options.folder, f"Cold cache, {options.pairs} runs.", columns, rows, GOALS)


if __name__ == "__main__":
    main()
