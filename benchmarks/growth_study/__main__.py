# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The study of docs/growth-study.md.

    python -m benchmarks.growth_study tune --work DIR                    # learning rates and warm-ups, at half the size
    python -m benchmarks.growth_study run --work DIR [--seeds 0 1]       # all arms
    python -m benchmarks.growth_study page                               # the page and its picture from the results

Every run is a line of runs.jsonl when it is done, and the same command goes on after the last of them; processes may
share the seeds, each with a `--work` of its own. `--preset large` is for a GPU, with `--results` of its own, and with
`--minutes 8` it stops in time, saved in the middle of a run. `page` writes about the results kept beside this file.
"""

import argparse
import logging
import time
from pathlib import Path

import datasets
import torch
from transformers.utils import logging as transformers_logging

from . import report
from .presets import PRESETS
from .runs import Interrupted, Study

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs" / "growth-study.md"


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the study; 75 means that the time was over and there is more to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "run", "page"))
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--work", type=Path, default=Path("out/growth-study"), help="for texts and models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for runs.jsonl, tuning.jsonl and corpus.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page")
    parser.add_argument("--seeds", type=int, nargs="+", help="those to run; all of the preset unless given")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which to stop")
    options = parser.parse_args(arguments)
    if options.command == "page":
        report.write_page(options.results, options.docs)
        return 0
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("growth").setLevel(logging.ERROR)
    preset = PRESETS[options.preset]
    study = Study(options.work, options.results, preset, time.monotonic() + 60 * options.minutes)
    study.prepare()
    try:
        if options.command == "tune":
            study.tune()
        else:
            study.run(tuple(options.seeds or preset.seeds))
    except Interrupted:
        return 75
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
