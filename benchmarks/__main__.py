# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Run the benchmarks that a CPU does in minutes, at small sizes, and make RESULTS.md anew.

    python benchmarks [NAME ...] [--folder DIR] [--list] [--render]

Each is a process of its own, one after the other. What they measure is kept as `..., small`, so that it replaces the
small run before, and not what was measured at full size.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import results

ROOT = Path(__file__).resolve().parents[1]
LABEL = "TELEFLM_BENCHMARK_LABEL"


@dataclass(frozen=True)
class Small:
    """A script at the size that `make bench` gives it, and the minutes after which it is ended."""

    script: str
    options: Sequence[str]
    minutes: float = 5


# In the order in which they run; together about 20 minutes of two cores.
RUN = (
    Small("planning.py", ["--pairs", "3"]),
    Small("bin_to_safetensors.py", ["--size", "1", "--pairs", "3"]),
    Small("megatron_to_hub.py", ["--size", "1", "--pairs", "3", "--cache", "warm"]),
    Small("hub_to_megatron.py", ["--layers", "1", "--pairs", "3"]),
    Small("gguf.py", ["--size", "1", "--pairs", "3", "--kills", "0", "--cache", "warm"]),
    Small("fp8.py", ["--size", "1", "--pairs", "3", "--kills", "4"]),
    Small("peak_memory.py", ["--sizes", "1", "--pairs", "1"]),
    Small("export_moments.py", ["--size", "0.5", "--pairs", "1", "--presets"]),
    Small("random_fill.py", ["--pairs", "2"]),
    Small("scaling.py", ["--size", "1", "--pairs", "3"]),
    Small("against_llama.py", ["--shapes", "1b", "52b", "--seconds", "200"], minutes=10),
    Small("loading.py", ["--size", "1", "--pairs", "3"], minutes=8),
    Small("loss_memory.py", ["--length", "512", "--vocabulary", "20000", "--hidden", "256", "--runs", "3"]),
    Small("scorer_memory.py", ["--vocabulary", "10000", "--runs", "1"]),
    Small("streamed_eval.py", ["--sizes", "0.5", "--memory", "250MB", "--repeats", "2", "--pairs", "1"]),
    Small("selection.py", ["--rows", "2000", "--runs", "1"]),
    Small("selection_faults.py", ["--rows", "5000"]),
    Small("embedders.py", ["--rows", "200"]),
    Small("publishing_faults.py", ["--points", "20", "--kills", "4"]),
    Small("remote_sources.py", ["--size", "0.2", "--pairs", "2"]),
    Small("growth_precision.py", ["--quick"]),
    Small("tokenized_cache.py", ["--rows", "500", "--pairs", "1"]),
)

# What else lies here, and why it is not run.
NOT_RUN = {
    "real_widths.py": "writes 60 GB",
    "grown_moments.py": "writes 42 GB a round",
    "lora_1t_width.py": "a checkpoint of 38 GB, and a quarter of an hour",
    "growth_peers.py": "installs mergekit from the network",
    "depth_against_mergekit.py": "installs mergekit from the network",
    "sft_throughput.py": "needs conversations to train on, and an hour",
    "target_selection.py": "needs a pool of real conversations",
    "growth_study": "a study of hours; its page is docs/growth-study.md",
    "selection_study": "a study of days; its page is docs/selection-study.md",
    "measure.py": "what the scripts share",
    "results.py": "what the scripts share",
    "synthetic.py": "makes checkpoints",
    "conversations.py": "makes conversations",
    "kills.py": "kills and resumes, for others",
    "load_all.py": "a contestant of others",
    "__main__.py": "this",
}


def run(small: Small, folder: Path) -> str:
    """Run one script; what went wrong, if anything did."""
    command = [sys.executable, str(ROOT / "benchmarks" / small.script), *small.options, "--folder", str(folder)]
    variables = {LABEL: "small", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, start_new_session=True)
    try:
        code = process.wait(60 * small.minutes)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGTERM)  # the processes that it started, too
        process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"not finished after {small.minutes:g} minutes"
    return f"exited with {code}" if code else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts, without .py; all unless given")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work, on a disk")
    parser.add_argument("--list", action="store_true", help="say what is run, how, and what is not, and why")
    parser.add_argument("--render", action="store_true", help="make RESULTS.md of results.json, and run nothing")
    options = parser.parse_args()
    unknown = set(options.names) - {Path(small.script).stem for small in RUN}
    if unknown:
        parser.error(f"not among those that are run: {', '.join(sorted(unknown))}; see --list")
    if options.list:
        for small in RUN:
            print(f"python benchmarks/{small.script} {' '.join(small.options)}")
        for name, why in NOT_RUN.items():
            print(f"not run: {name} ({why})")
        return 0
    failed = []
    for small in () if options.render else RUN:
        if options.names and Path(small.script).stem not in options.names:
            continue
        started = time.monotonic()
        wrong = run(small, options.folder)
        print(f"{small.script}: {time.monotonic() - started:.0f} s {wrong}", flush=True)
        failed += [f"{small.script} {wrong}"] if wrong else []
    results.write(results.read())
    print(f"made {results.PAGE.relative_to(ROOT)}", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
