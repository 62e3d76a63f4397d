# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growth at true widths, from the command line: the 52B's to the 102B's, and that to the 1T's, against `dd`.

The source has the 52B's hidden size, heads, feed-forward size and vocabulary, one layer, and random bfloat16 weights.
It grows to the 102B's width with two layers, and the result to the 1T's with as many as the free disk allows. Bounds:
0.7 x the rate at which `dd if=/dev/zero conv=fsync` writes as many bytes, and 300 MiB plus a block a worker. What is
zero by plan is not written to the preallocated file, so the rate counts all bytes, and then only those written.
`teleflm verify --growth` certifies the output of every round.
"""

import shutil
import statistics
from functools import partial
from pathlib import Path

from measure import TELEFLM, Run, arguments, interleave, mib, report, run_processes, seconds, spread, workplace
from results import Goal
from synthetic import write_safetensors

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.assemble import blocks, is_zero
from conversion.checkpoint.dtypes import BFLOAT16
from growth import grow_checkpoint

GOALS = (
    Goal("growth at true widths has 0.7 of the rate of dd", "x the rate of dd", 0.7, at_least=True, rows=r"\| grow"),
    Goal("growth at true widths takes less than 300 MiB", "peak RSS, MiB", 300, rows=r"\| grow"),
)

GB = 10**9


def dd(nbytes: int, out: Path) -> Run:
    """Zeros, as many bytes, and one fsync at the end."""
    out.mkdir()
    size = [f"count={nbytes}", "iflag=count_bytes,fullblock", "bs=1M"]
    return run_processes(["dd", "if=/dev/zero", f"of={out / 'zeros'}", *size, "conv=fsync"])


def grow(source: Path, preset: str, layers: int, out: Path) -> Run:
    return run_processes(
        [*TELEFLM, "grow", str(source), str(out), "--to", preset, "--set", f"num_hidden_layers={layers}"]
    )


def planned_bytes(source: Path, preset: str, layers: int) -> tuple[int, int]:
    """Bytes of a growth's tensors, and how many of them are written: whole blocks of zeros are not."""
    changes = {"num_hidden_layers": layers}
    plan = grow_checkpoint(source, source.with_name("unused"), preset, overrides=changes, dry_run=True).plan
    written = sum(
        (stop - start) * tensor.dtype.itemsize
        for tensor in plan.tensors
        for start, stop in blocks(tensor.numel)
        if not is_zero(tensor, start, stop)
    )
    return plan.nbytes, written


def layers_that_fit(preset: str, nbytes: int) -> int:
    """The most layers with which a model of a preset's width takes no more than so many bytes in bfloat16."""
    one, two = (
        Architecture.from_config(load_preset(preset) | {"num_hidden_layers": layers}).num_parameters
        for layers in (1, 2)
    )
    return 1 + (nbytes // BFLOAT16.itemsize - one) // (two - one)


def measure_hop(source: Path, preset: str, layers: int, rounds: int) -> list[list[str]]:
    """A row for each contestant, and one for the certificate."""
    nbytes, written = planned_bytes(source, preset, layers)
    certified: list[Run] = []

    def grow_and_certify(out: Path) -> Run:
        run = grow(source, preset, layers, out)
        certified.append(run_processes([*TELEFLM, "verify", "--growth", str(source), str(out)]))
        return run

    contestants = {"dd": partial(dd, nbytes), "grow": grow_and_certify}
    runs = interleave(contestants, rounds, source.parent, sorted(source.glob("*.safetensors")), "warm")
    rates = [zeros.seconds / grown.seconds for zeros, grown in zip(runs["dd"], runs["grow"], strict=True)]
    hop = f"{preset}, {layers} layers: {nbytes / GB:.1f} GB, {written / GB:.1f} GB written"
    return [
        [hop, "dd", *_times(runs["dd"], nbytes), "1.00", "", ""],
        [
            "",
            f"grow --to {preset}",
            *_times(runs["grow"], nbytes),
            spread(rates),
            spread([rate * written / nbytes for rate in rates]),
            mib(runs["grow"]),
        ],
        ["", "verify --growth", *_times(certified, nbytes), "", "", mib(certified)],
    ]


def _times(runs: list[Run], nbytes: int) -> list[str]:
    return [str(len(runs)), seconds(runs), f"{nbytes / GB / statistics.median(run.seconds for run in runs):.2f}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs-1t", type=int, default=3, help="rounds of the second hop")
    parser.add_argument("--layers-1t", type=int, help="of the second hop, 2 or more; as many as fit unless given")
    parser.add_argument("--reserve", type=float, default=10, help="GB of the disk to leave free")
    options = parser.parse_args()
    with workplace(options.folder) as place:
        write_safetensors(place / "52b", load_preset("tele-flm-52b") | {"num_hidden_layers": 1})
        grow(place / "52b", "tele-flm-102b", 2, place / "102b")  # the second source, and a round that does not count
        rows = measure_hop(place / "52b", "tele-flm-102b", 2, options.pairs)
        shutil.rmtree(place / "52b")
        free = shutil.disk_usage(place).free - round(options.reserve * GB)
        layers = options.layers_1t or layers_that_fit("tele-flm-1t", free)
        if layers < 2:
            raise SystemExit(f"{options.folder}: {free / GB:.0f} GB are free, two layers of the 1T take 38.")
        rows += measure_hop(place / "102b", "tele-flm-1t", layers, options.pairs_1t)
    about = "Sources of 4.2 and 8.3 GB, warm cache; rounds in random order. The certificate holds in every round."
    columns = [
        "hop",
        "",
        "rounds",
        "seconds",
        "GB/s",
        "x the rate of dd",
        "the same, bytes written only",
        "peak RSS, MiB",
    ]
    report("Growth at true widths", options.folder, about, columns, rows, GOALS)


if __name__ == "__main__":
    main()
