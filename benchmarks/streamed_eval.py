# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Peak memory of `teleflm eval` without `--loaded`: what it states before it starts, whatever the size of the model.

Bound: resident memory of the whole process at most the stated memory and 150 MB for the program. Weights are holes:
zeros, which take as long to compute with as any others.
"""

import sys

import numpy as np
from measure import GIB, ROOT, TELEFLM, arguments, mib, report, run_processes, seconds, workplace
from results import Goal
from synthetic import tele_flm_config, write_safetensors

sys.path.insert(0, str(ROOT))

from conversion.architecture import Architecture
from conversion.checkpoint.numbers import parse_size
from evaluation.passages import document_passages
from evaluation.streamed_scores import memory_need
from tests.fixtures.tiny import tiny_tokenizer

GOALS = (Goal("streamed evaluation takes what it states, and 150 MB", "less what is stated, MiB", 143),)

_WINDOW = 128
_TEXT = "The value of a subscription is the item that the key selects. "


def main() -> None:
    parser = arguments(__doc__, pairs=1)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 2], help="GiB of weights of each model")
    parser.add_argument("--memory", nargs="+", default=["400MB", "800MB"])
    parser.add_argument("--repeats", type=int, default=20, help="sentences of the text, of about 25 tokens")
    options = parser.parse_args()
    rows = []
    with workplace(options.folder) as place:
        (place / "text.txt").write_text(_TEXT * options.repeats)
        for size in options.sizes:
            folder = place / f"{size:g}"
            files = write_safetensors(folder, tele_flm_config(size), sparse=True)
            ids = tiny_tokenizer(folder)(_TEXT * options.repeats)["input_ids"]
            passages = list(document_passages(np.array(ids), _WINDOW, _WINDOW // 2))
            tokens = sum(len(passage.inputs) for passage in passages)
            architecture = Architecture.from_config(tele_flm_config(size))
            for memory in options.memory:
                command = [*TELEFLM, "eval", str(folder), "--text", str(place / "text.txt"), "--window", str(_WINDOW)]
                command += ["--memory", memory, "--work", str(place / "work")]
                runs = [run_processes(command) for _ in range(options.pairs)]
                weights = sum(file.stat().st_size for file in files) / GIB
                stated = memory_need(architecture, tokens, _WINDOW, "float32", parse_size(memory))
                beyond = max(run.peak_rss for run in runs) - stated
                rows.append(
                    [
                        f"{weights:.2f}",
                        memory,
                        f"{stated / 2**20:,.0f}",
                        mib(runs),
                        f"{beyond / 2**20:,.0f}",
                        seconds(runs),
                    ]
                )
    about = (
        f"Sparse weights; {options.repeats} sentences in windows of {_WINDOW} tokens, float32; {options.pairs} runs."
    )
    columns = ["GiB of weights", "--memory", "stated, MiB", "peak RSS, MiB", "less what is stated, MiB", "seconds"]
    report("Streamed evaluation: memory", options.folder, about, columns, rows, GOALS)


if __name__ == "__main__":
    main()
