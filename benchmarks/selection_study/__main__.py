# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The study of docs/selection-study.md.

    python -m benchmarks.selection_study base --work DIR                   # pretrain the base
    python -m benchmarks.selection_study run --work DIR [--seeds 0 1 2]    # pools, selections, runs
    python -m benchmarks.selection_study page                              # the page and its picture from the results

Every run is appended to runs.jsonl when it is done, and the same command goes on after the last of them: several
processes may share the seeds. `--preset large` is for a GPU, with `--results` of its own; `page` writes about the
results that are kept beside this file.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.conversations import POOL

from . import base, report, runs
from .presets import PRESETS

RESULTS = Path(__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "selection-study.md"


def main(arguments: list[str] | None = None) -> None:
    """Run a command of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("base", "run", "page"))
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="another than the preset's")
    parser.add_argument("--data", type=Path, default=POOL, help="JSON Lines with `messages` and `source`")
    parser.add_argument("--work", type=Path, default=Path("out/selection-study"), help="for the base and the pools")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for runs.jsonl, pools.jsonl and base.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page")
    parser.add_argument("--seeds", type=int, nargs="+", help="those to run; all of the preset unless given")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    preset = runs.on_device(PRESETS[options.preset], options.device)
    study = runs.Study(options.data, options.work, options.results, preset)
    if options.command == "base":
        described = base.pretrain(study.base, preset)
        print(json.dumps(described["bits_per_byte"]))
    elif options.command == "run":
        if not (study.base / "base.json").exists():
            parser.error(f"{study.base}: there is no base; run the command `base` first.")
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "base.json").write_text((study.base / "base.json").read_text())
        seeds = options.seeds or preset.seeds
        for share in preset.faults:
            runs.prepare(study, seeds, [share])
            for run in runs.run_all(study, seeds, [share]):
                done = f"{run['arm']}, {share:.0%} faults, seed {run['seed']}: {run['primary']:.4f}"
                print(f"{done}, {run['seconds']} s", flush=True)
    else:
        report.write_page(options.results, options.docs)


if __name__ == "__main__":
    main()
