# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Peak memory of `teleflm export --optimizer`: Adam's moments for FSDP2 and for megatron-core, and of planning it.

The source has its true size and shapes, and holes where the bytes of weights and moments would be, which read as zeros;
the output is written in full. Planning (`--dry-run`) is of the presets, where the moments of the 1T have 8.7 TB.
"""

import shutil
from pathlib import Path

import numpy as np
from measure import GIB, TELEFLM, arguments, mib, report, run_processes, seconds, workplace
from results import Goal
from synthetic import shapes, tele_flm_config, write_bin

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.plan import TensorPlan
from conversion.optimizer_state import MOMENTS, OPTIMIZER_FILE, adam_shard, parameter_names

GOALS = (Goal("moments in parts take less than 300 MiB", "peak RSS, MiB", 300, rows=r"^[\d.]+ GiB"),)

_STEP = 700.0


def write_source(folder: Path, config: dict) -> None:
    """A model and its optimizer.pt, with holes."""
    write_bin(folder, config, shards=4, sparse=True)
    sizes, names = shapes(config), parameter_names(Architecture.from_config(config))
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
    norms = [name for name in names if "norm" in name]
    matrices = [name for name in names if "norm" not in name]
    moments = {name: {key: TensorPlan("", sizes[name], FLOAT32, ()) for key in MOMENTS} for name in names}
    groups = [({**settings, "weight_decay": 0.1}, matrices), ({**settings, "weight_decay": 0.0}, norms)]
    shard = adam_shard(groups, moments, dict.fromkeys(names, _STEP))
    with (folder / OPTIMIZER_FILE).open("wb") as file:
        file.truncate(shard.nbytes)
        for position, content in shard.fixed:
            file.seek(position)
            file.write(content)
        for tensor, position in shard.tensors:
            if tensor.name.endswith(".step"):
                file.seek(position)
                file.write(np.float32(_STEP).tobytes())


def main() -> None:
    parser = arguments(__doc__, size=2.0, pairs=3)
    parser.add_argument("--presets", nargs="*", default=["tele-flm-52b", "tele-flm-1t"], help="that are planned")
    options = parser.parse_args()
    rows = []
    with workplace(options.folder) as place:
        sources = {f"{options.size:g} GiB": (tele_flm_config(options.size), [])}
        sources |= {name: (load_preset(name), ["--dry-run"]) for name in options.presets}
        for name, (config, flags) in sources.items():
            write_source(place / "source", config)
            size = (place / "source" / OPTIMIZER_FILE).stat().st_size / GIB
            for to in ("dcp", "torch_dist"):
                command = ["export", str(place / "source"), str(place / "output"), "--to", to, "--optimizer", *flags]
                runs = []
                for _ in range(options.pairs):
                    runs.append(run_processes([*TELEFLM, *command, "--workers", "2", "--json"]))
                    shutil.rmtree(place / "output", ignore_errors=True)
                how = " ".join(["export --optimizer --to", to, *flags])
                rows.append([name, f"{size:.1f}", how, seconds(runs), mib(runs)])
            shutil.rmtree(place / "source")
    columns = ["checkpoint", "GiB of moments", "command", "seconds", "peak RSS, MiB"]
    report(
        "Moments in parts: peak memory", options.folder, f"Rounds: {options.pairs}. Warm cache.", columns, rows, GOALS
    )


if __name__ == "__main__":
    main()
