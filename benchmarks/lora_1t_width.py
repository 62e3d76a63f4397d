# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The shipped LoRA recipe of the 1T on layers of its true width, on a CPU, up to its first optimizer step.

    python benchmarks/lora_1t_width.py --layers 2 --folder DIR

The checkpoint has the 1T's hidden size, heads, feed-forward size and vocabulary, fewer layers, and random bfloat16
weights: 37.6 GB with two. It is made by the engine, and deleted. The weights stay in their files, which are mapped, so
the run needs less memory than they take, and reads them from the disk as often as they do not fit the cache.

Replaced of the recipe: the number of processes and what spreads them, the device, rows of 128 tokens, one step without
warm-up. Anonymous memory is what the process has that no file backs; the run is ended if it exceeds `--most`.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import measure
from measure import ROOT, arguments, report, workplace

sys.path.insert(0, str(ROOT))
from safetensors.torch import load_file

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.dtypes import BFLOAT16
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.plan import Box, CheckpointPlan, Fill, Normal, TensorPlan
from conversion.mapping import weights
from sft.plan import Setup, estimate_memory
from tests.fixtures.tiny import tiny_tokenizer

GB = 10**9
STD = 0.004
TOKENS = 128
REPLACED = {
    "use_cpu": True,
    "num_processes": 1,
    "distributed_type": "'NO'",
    "max_length": TOKENS,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "warmup_steps": 0,  # of one step, all would be
    "save_strategy": "'no'",
    "report_to": "none",
}


def make_checkpoint(layers: int, folder: Path) -> Architecture:
    """Random matrices, and norms that are one."""
    config = load_preset("tele-flm-1t") | {"num_hidden_layers": layers}
    architecture = Architecture.from_config(config)
    tensors = [
        TensorPlan(name, shape := weight.shape(architecture), BFLOAT16, (_values(shape),))
        for name, weight, _ in weights(architecture)
    ]
    write_checkpoint(CheckpointPlan(tuple(tensors), config), folder, WriteOptions(workers=2))
    tiny_tokenizer(folder).save_pretrained(folder)
    return architecture


def _values(shape: tuple[int, ...]) -> Fill | Normal:
    return Fill(Box.whole(shape), 1.0) if len(shape) == 1 else Normal(Box.whole(shape), STD)


def write_rows(path: Path) -> None:
    """Conversations that packing fills rows of `TOKENS` with."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [[("user", f"Count to {count}."), ("assistant", ", ".join(words[:count]))] for count in range(1, 11)]
    messages = [[{"role": role, "content": content} for role, content in row] for row in rows]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages * 4))


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process that no file backs, and those of files that are mapped, both as resident now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"Rss(Anon|File):\s*(\d+) kB", status)}


def train(model: Path, place: Path, most: float) -> dict[str, object]:
    """The run: its exit status, what it printed, its times and its peaks."""
    write_rows(place / "rows.jsonl")
    keys = {"model_name_or_path": model, "data_files": place / "rows.jsonl", "output_dir": place / "run", **REPLACED}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = [*measure.TELEFLM, "sft", "train", "--config", "tele-flm-1t-lora", "--json", *words]
    started, peaks, log = time.monotonic(), {"Anon": 0, "File": 0}, place / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        while process.poll() is None:
            for name, size in memory_of(process.pid).items():
                peaks[name] = max(peaks[name], size)
            if peaks["Anon"] > most:
                process.kill()
            time.sleep(0.2)
        printed = process.stdout.read() if process.stdout else ""
    return {
        "status": process.returncode,
        "printed": json.loads(printed) if process.returncode == 0 else None,
        "seconds": time.monotonic() - started,
        "peaks": peaks,
        "log": log.read_text()[-3000:],
    }


def main() -> None:
    """Make the checkpoint, train, print and keep the numbers."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--most", type=float, default=18, help="GB of anonymous memory")
    options = parser.parse_args()
    with workplace(options.folder) as place:
        started = time.monotonic()
        architecture = make_checkpoint(options.layers, place / "model")
        made = time.monotonic() - started
        run = train(place / "model", place, options.most * GB)
        if run["status"]:
            print(run["log"], run["peaks"], run["seconds"], file=sys.stderr)
            sys.exit(1)
        adapter = load_file(place / "run/adapter_model.safetensors")
        moved = sum(bool(weight.any()) for name, weight in adapter.items() if ".lora_B." in name)
        of = sum(".lora_B." in name for name in adapter)
    setup = Setup(method="lora", gpus=1, strategy="ddp", max_length=TOKENS, lora_rank=16, on_gpu=False)
    plan = estimate_memory(architecture, setup, overhead=False)
    printed, peaks = run["printed"], run["peaks"]
    (step,) = (entry for entry in printed["log_history"] if "loss" in entry)  # type: ignore[index]
    row = [
        str(options.layers),
        f"{architecture.num_parameters / 1e9:.2f}e9",
        f"{2 * architecture.num_parameters / GB:.1f}",
        f"{made:.0f}",
        f"{run['seconds']:.0f}",
        f"{printed['metrics']['train_runtime']:.0f}",  # type: ignore[index]
        f"{step['loss']:.4f}, {step['grad_norm']:.4f}",
        f"{moved} of {of}",
        f"{peaks['Anon'] / GB:.2f}",  # type: ignore[index]
        f"{(plan.total - plan.weights) / GB:.2f}",
        f"{peaks['File'] / GB:.1f}",  # type: ignore[index]
    ]
    report(
        "The 1T's LoRA recipe at its true width, to the first optimizer step",
        options.folder,
        f"One process, rows of {TOKENS} tokens; what else is replaced of the recipe, the script says.",
        [
            "layers",
            "parameters",
            "weights, GB",
            "made in, s",
            "run, s",
            "of it the step and the check of the loss, s",
            "loss, gradient norm",
            "adapters that moved from 0",
            "anonymous memory, peak GB",
            "by the plan, without frozen weights, GB",
            "mapped files, peak GB",
        ],
        [row],
    )


if __name__ == "__main__":
    main()
