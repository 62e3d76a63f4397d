# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growth with Adam's moments at true widths, from the command line: the 52B's to the 102B's, against `dd`.

    python benchmarks/grown_moments.py [--pairs 3] [--vocab-size N] [--cache warm] [--folder DIR]

The source has the 52B's hidden size, heads, feed-forward size and vocabulary, one layer, random bfloat16 weights, and
an optimizer.pt of float32 moments: random first ones, and second ones of one positive number. It grows to the 102B's
width with two layers. Bounds: 0.7 x the rate at which
`dd if=/dev/zero conv=fsync` writes as many bytes, and 300 MiB. `dd` reads nothing, growth reads 21 GB: so a second
baseline moves what growth moves, a `dd` that reads the source beside one that writes as many zeros as growth writes.
Zero by plan, and so never written, is what is zero of the weights and of the first moments; the rate counts all bytes,
and then only those that are written. In the end a growth is killed twice on its way and started again, and the digests
of all tensors are compared.

From a cold cache the disk has to give the source as well, which `dd` does not ask of it. A source that lies in the page
cache, as a run's last checkpoint may, shows what growth itself costs (`--cache warm`); with its whole vocabulary it is
larger than many machines' memory.
"""

import json
import shutil
import signal
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path

from measure import (
    ROOT,
    TELEFLM,
    Run,
    arguments,
    console,
    interleave,
    mib,
    report,
    run_processes,
    seconds,
    spread,
    workplace,
)
from real_widths import GB, dd
from results import Goal
from synthetic import write_safetensors

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.assemble import blocks, is_zero
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.execute import WriteOptions, make_job, run_job
from conversion.checkpoint.plan import Box, CheckpointPlan, Fill, Normal, TensorPlan
from conversion.mapping import weights
from conversion.optimizer_state import MOMENTS, OPTIMIZER_FILE, adam_shard, parameter_names
from growth import grow_checkpoint

GOALS = (
    Goal(
        "growth with moments has 0.7 of the rate of dd",
        "the same, bytes written only",
        0.7,
        at_least=True,
        rows=r"^grow",
    ),
    Goal("growth with moments takes less than 300 MiB", "peak RSS, MiB", 300, rows=r"^grow"),
)

BOTH_WAYS = "dd that reads, dd that writes"
TARGET = ["--to", "tele-flm-102b", "--set", "num_hidden_layers=2"]


def write_source(folder: Path, vocab_size: int) -> None:
    """Weights, and moments of all of them after 1000 steps."""
    config = load_preset("tele-flm-52b") | {"num_hidden_layers": 1, "vocab_size": vocab_size}
    write_safetensors(folder, config)
    architecture = Architecture.from_config(config)
    shapes = {name: weight.shape(architecture) for name, weight, _ in weights(architecture)}
    names, (first, second) = parameter_names(architecture), MOMENTS
    moments = {
        name: {
            first: TensorPlan(f"{first} of {name}", shapes[name], FLOAT32, (Normal(Box.whole(shapes[name]), 1e-4),)),
            second: TensorPlan(f"{second} of {name}", shapes[name], FLOAT32, (Fill(Box.whole(shapes[name]), 1e-8),)),
        }
        for name in names
    }
    shard = adam_shard(
        [({"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}, names)], moments, dict.fromkeys(names, 1000.0)
    )
    plan = CheckpointPlan(tuple(tensor for tensor, _ in shard.tensors), {"model_type": "none"})
    place = folder.with_name("moments")
    options = WriteOptions(digest=False)
    run_job(make_job(plan, options, states=[shard]), place, options)
    (place / OPTIMIZER_FILE).rename(folder / OPTIMIZER_FILE)
    shutil.rmtree(place)


def command(source: Path, out: Path) -> list[str]:
    return [*TELEFLM, "grow", str(source), str(out), *TARGET, "--optimizer", str(source)]


def grow(source: Path, out: Path) -> Run:
    return run_processes(command(source, out))


def dd_both_ways(files: list[Path], written: int, out: Path) -> Run:
    """The files read and thrown away, and beside it zeros written with one fsync at the end."""
    out.mkdir()
    zeros = f"dd if=/dev/zero of={out / 'zeros'} count={written} iflag=count_bytes,fullblock bs=1M conv=fsync"
    reads = "; ".join(f"dd if={file} of=/dev/null bs=1M" for file in files)
    return run_processes(["sh", "-c", f"({reads}) 2>/dev/null & {zeros}; wait"])


def planned_bytes(source: Path) -> tuple[int, int]:
    """Bytes of the growth's tensors, and how many of them are written: whole blocks of zeros are not."""
    changes = {"num_hidden_layers": 2}
    out = source.with_name("unused")
    plan = grow_checkpoint(source, out, "tele-flm-102b", overrides=changes, optimizer=source, dry_run=True).plan
    written = sum(
        (stop - start) * tensor.dtype.itemsize
        for tensor in plan.tensors
        for start, stop in blocks(tensor.numel)
        if not is_zero(tensor, start, stop)
    )
    return plan.nbytes, written


def digests(out: Path) -> dict[str, str]:
    """Of every tensor, by the record."""
    record = json.loads((out / "teleflm_manifest.json").read_bytes())
    parts = [record["tensors"], *(entry.get("tensors", {}) for entry in record["files"].values())]
    return {name: tensor["digest"] for part in parts for name, tensor in part.items()}


def kill_twice(source: Path, out: Path, whole_seconds: float) -> None:
    """Start a growth, kill it after a third of its time, again after another third, and let it finish."""
    for _ in range(2):
        process = subprocess.Popen(command(source, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole_seconds / 3)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            raise SystemExit("the growth was finished before it was killed; nothing was shown.")
    run_processes(command(source, out))


def main() -> None:
    parser = arguments(__doc__, pairs=3)
    parser.add_argument("--vocab-size", type=int, default=load_preset("tele-flm-52b")["vocab_size"])
    parser.add_argument("--cache", choices=["warm", "cold"], default="cold")
    options = parser.parse_args()
    with workplace(options.folder) as place:
        source = place / "52b"
        write_source(source, options.vocab_size)
        nbytes, written = planned_bytes(source)
        files = [*source.glob("*.safetensors"), source / OPTIMIZER_FILE]
        read = sum(file.stat().st_size for file in files)
        seen: list[dict[str, str]] = []

        def grow_and_look(out: Path) -> Run:
            run = grow(source, out)
            seen.append(digests(out))
            return run

        contestants = {
            "dd": partial(dd, nbytes),
            BOTH_WAYS: partial(dd_both_ways, files, written),
            "grow --optimizer": grow_and_look,
        }
        runs = interleave(contestants, options.pairs, place, files, options.cache)
        grown = runs["grow --optimizer"]
        kill_twice(source, place / "killed", statistics.median(run.seconds for run in grown))
        seen.append(digests(place / "killed"))
        same = all(found == seen[0] for found in seen)
        console.print(f"{len(seen[0])} tensors, the same digests after two kills: {same}")
    rates = [zeros.seconds / run.seconds for zeros, run in zip(runs["dd"], grown, strict=True)]
    both = [moved.seconds / run.seconds for moved, run in zip(runs[BOTH_WAYS], grown, strict=True)]
    rows = [
        ["dd", seconds(runs["dd"]), _rate(runs["dd"], nbytes), "1.00", "", "", ""],
        [BOTH_WAYS, seconds(runs[BOTH_WAYS]), _rate(runs[BOTH_WAYS], nbytes), "", "", "1.00", ""],
        [
            "grow --optimizer",
            seconds(grown),
            _rate(grown, nbytes),
            spread(rates),
            spread([rate * written / nbytes for rate in rates]),
            spread(both),
            mib(grown),
        ],
    ]
    about = (
        f"{nbytes / GB:.1f} GB of weights and moments, {written / GB:.1f} GB of them written, from {read / GB:.1f} GB "
        f"that are read; vocabulary {options.vocab_size:,}, {options.cache} cache, {options.pairs} rounds in random "
        f"order. All growths, and one that was killed "
        f"twice and started again, have {'the same' if same else 'OTHER'} digests of {len(seen[0])} tensors."
    )
    columns = [
        "",
        "seconds",
        "GB/s",
        "x the rate of dd",
        "the same, bytes written only",
        "x the rate of both dd",
        "peak RSS, MiB",
    ]
    title = f"Growth with Adam's moments at true widths, {options.cache} cache"
    report(title, options.folder, about, columns, rows, GOALS)


def _rate(runs: list[Run], nbytes: int) -> str:
    return f"{nbytes / GB / statistics.median(run.seconds for run in runs):.2f}"


if __name__ == "__main__":
    main()
