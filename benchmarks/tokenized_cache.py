# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tokenizing once for all processes of a run, beside each process tokenizing all in its own memory.

    python benchmarks/tokenized_cache.py --data CONVERSATIONS.jsonl.gz [--rows 20000] [--processes 2] [--pairs 3]

Each process gets the data as a run does (`load_run_data`, or `prepare_dataset`, which holds them in memory), and then
reads every row once, as an epoch does. `cache, again` is a later run that finds the rows tokenized.

Peak RSS has the pages of mapped files that are in memory, which the system takes back when it needs them, and which the
processes of a machine share; private memory, at the end, has not. Both are of one process, with its imports.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import measure
from results import Goal

GOALS = (Goal("tokenizing once is faster than in each process", "times faster", 1, at_least=True, rows=r"^cache"),)

sys.path.insert(0, str(measure.ROOT))

LENGTH = 2048


def work(how: str, folder: Path) -> None:
    """One process of a run; writes what it took."""
    import torch  # noqa: F401  (a run has it)

    from growth.training.record import digest_examples
    from sft.data.cache import Cache
    from sft.data.dataset import Arrangement, Loader, load_run_data, prepare_dataset
    from sft.data.labels import Labelling
    from sft.data.sources import Source
    from sft.tokenizer import load_tokenizer

    tokenizer, _ = load_tokenizer(str(folder / "tokenizer"))
    started, data = time.perf_counter(), str(folder / "rows.jsonl")
    if how == "memory":
        dataset, _ = prepare_dataset(data, tokenizer, max_length=LENGTH, allow_rejects=True)
    else:
        arrangement = Arrangement(Labelling(LENGTH), None, {})
        loader = Loader(Cache(folder / "cache"), tokenizer, allow_rejects=True)
        dataset, *_ = load_run_data([Source("rows", (data,))], arrangement, None, loader, seed=0)
    seconds = time.perf_counter() - started
    digest = digest_examples(dataset)["data"]
    private = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    found = {
        "seconds": seconds,
        "digest": digest,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "private": int(private.split()[1]) * 1024,
    }
    (folder / f"result-{os.environ['RANK']}.json").write_text(json.dumps(found))


def make_inputs(data: Path, rows: int, folder: Path) -> None:
    """Rows of a pool of conversations, each with a number of its own, and a tokenizer of 8,000 pieces."""
    import io

    import sentencepiece

    from modeling_teleflm import TeleFLMConfig, TeleFLMTokenizer
    from sft.data.checks import Conversation, check_rows

    control = ["<_system>", "<_user>", "<_bot>"]
    valid = [outcome.messages for _, outcome in check_rows(data, control) if isinstance(outcome, Conversation)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(turn["content"].replace("\n", " ") for row in valid[:3000] for turn in row),
        model_writer=model,
        model_type="bpe",
        vocab_size=8000,
        user_defined_symbols=control,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    place = folder / "tokenizer"
    place.mkdir()
    (place / "tokenizer.model").write_bytes(model.getvalue())
    TeleFLMTokenizer(str(place / "tokenizer.model")).save_pretrained(place)
    TeleFLMConfig(vocab_size=8000).save_pretrained(place)
    chosen = random.Random(0).choices(valid, k=rows)
    with (folder / "rows.jsonl").open("w") as file:
        for number, row in enumerate(chosen):
            first = {**row[0], "content": f"{number}: {row[0]['content']}"}
            file.write(json.dumps({"messages": [first, *row[1:]]}) + "\n")


def main() -> None:
    """Run it."""
    parser = measure.arguments(__doc__, pairs=3)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="a pool of real conversations")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", choices=["memory", "cache"], help="internal")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder)
        return
    with measure.workplace(options.folder) as folder:
        make_inputs(options.data, options.rows, folder)
        ways = ("each in its memory", "cache, first", "cache, again")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        runs: dict[str, list[measure.Run]] = {way: [] for way in ways}
        digests = set()
        for number in range(options.pairs):
            # The second opening of the cache comes after the first; which of the two ways begins is by chance.
            order = [ways[:1], ways[1:]]
            random.shuffle(order)
            for way in (way for group in order for way in group):
                if way == "cache, first":
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                how = "memory" if way == ways[0] else "cache"
                command = [sys.executable, __file__, "--worker", how, "--folder", str(folder)]
                environments = [
                    {"RANK": str(rank), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
                    for rank in range(options.processes)
                ]
                run = measure.run_processes(command, environments=environments)
                results = [
                    json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(options.processes)
                ]
                digests |= {json.dumps(result["digest"]) for result in results}
                found[way].append(
                    {key: max(result[key] for result in results) for key in ("seconds", "peak", "private")}
                )
                runs[way].append(measure.Run(found[way][-1]["seconds"], run.cpu_seconds, run.peak_rss))
                measure.console.print(f"{number + 1}/{options.pairs} {way}: {found[way][-1]}", style="dim")
        if len(digests) != 1:
            raise RuntimeError(f"the token ids differ: {digests}")
        tokens = json.loads(digests.pop())["tokens"]
        rows = [
            [
                way,
                measure.seconds(runs[way]),
                measure.ratios(runs, ways[0], way),
                measure.cpu_seconds(runs[way]),
                f"{max(result['peak'] for result in found[way]) / (1 << 20):,.0f}",
                f"{max(result['private'] for result in found[way]) / (1 << 20):,.0f}",
            ]
            for way in ways
        ]
        measure.report(
            "Tokenizing once for all processes",
            folder,
            f"{options.rows:,} conversations, {tokens:,} tokens; {options.processes} processes; "
            f"{options.pairs} rounds. Seconds until the slowest process has its rows; memory of the largest process, "
            "in MiB, imports included; peak RSS has the mapped pages, private memory has not. The token ids were the "
            "same in all.",
            ["", "seconds", "times faster", "processor seconds of all", "peak RSS", "private memory"],
            rows,
            GOALS,
        )


if __name__ == "__main__":
    main()
