# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Doubling the depth of a model: `teleflm grow` and our executor against mergekit's passthrough.

The source is a Llama-shaped model, its layers stacked twice in the output: once as a Tele-FLM that `teleflm grow
--layers stack` grows (which keeps the function, so the second half writes zeros), once as the plain copy that
mergekit makes, with the same plan given to our executor. Bounds: 4 times faster than mergekit, a twentieth of its
memory. mergekit runs from a virtual environment of its own, made under --folder at the first run.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measure import TELEFLM, Run, arguments, interleave, mib, ratios, report, run_processes, seconds, workplace
from results import Goal

from conversion.architecture import MODEL_TYPE, Architecture
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.manifest import block_digest
from conversion.checkpoint.plan import CheckpointPlan, TensorPlan
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import open_checkpoint
from conversion.mapping import weights

GOALS = (
    Goal(
        "twice the depth is 4 times faster than mergekit",
        "times faster than mergekit",
        4,
        at_least=True,
        rows=r"^(teleflm|our)",
    ),
    Goal("twice the depth takes a twentieth of mergekit's memory", "of mergekit's", 0.05, rows=r"^(teleflm|our)"),
)

MERGEKIT = "mergekit==0.1.5"
OURS = "our executor, passthrough"
TORCH = "torch==2.13.0"  # first and pinned: what depends on it would choose one with CUDA


def mergekit_command(folder: Path) -> Path:
    """`mergekit-yaml` in a virtual environment, made if it is not there."""
    command = folder / "mergekit-venv/bin/mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "mergekit-venv")], check=True)
        for requirement in (TORCH, MERGEKIT):
            subprocess.run([str(command.with_name("pip")), "install", "-q", requirement], check=True)
    return command


def write_recipe(file: Path, source: Path, layers: int) -> Path:
    """The same layers twice, for mergekit."""
    part = {"sources": [{"model": str(source), "layer_range": [0, layers]}]}
    file.write_text(yaml.safe_dump({"slices": [part, part], "merge_method": "passthrough", "dtype": "bfloat16"}))
    return file


def make_llama(folder: Path, config: Mapping[str, Any]) -> None:
    """Call a Tele-FLM a Llama, which mergekit knows."""
    llama = {k: v for k, v in config.items() if k not in ("use_mup", "input_mult", "output_mult", "mup_scale_factor")}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(llama))


def depth_plan(source: Path) -> CheckpointPlan:
    """The passthrough: every layer copied, and copied again above."""
    checkpoint = open_checkpoint(source)
    config = checkpoint.config or {}
    layers = config["num_hidden_layers"]
    deeper = config | {"num_hidden_layers": 2 * layers}
    tensors = [
        TensorPlan.copy_of(name, checkpoint.tensors[weight.name.format(None if layer is None else layer % layers)])
        for name, weight, layer in weights(Architecture.from_config(deeper | {"model_type": MODEL_TYPE}))
    ]
    return CheckpointPlan(tuple(tensors), deeper)


def passthrough(source: Path, out: Path) -> Run:
    return run_processes([sys.executable, __file__, str(source), str(out)])


def grow(source: Path, layers: int, out: Path) -> Run:
    options = ["--set", f"num_hidden_layers={2 * layers}", "--layers", "stack"]
    return run_processes([*TELEFLM, "grow", str(source), str(out), *options])


def mergekit(command: Path, recipe: Path, out: Path) -> Run:
    """mergekit does not sync what it writes, so that time is added."""
    run = run_processes([str(command), str(recipe), str(out), "--lazy-unpickle"])
    synced = run_processes(["sync", *map(str, sorted(out.glob("*.safetensors")))])
    return Run(run.seconds + synced.seconds, run.cpu_seconds + synced.cpu_seconds, run.peak_rss)


def require_equal(place: Path, contestants: Mapping[str, Callable[[Path], Run]]) -> None:
    """Some ways give the same tensors. A round that does not count: afterwards every module is compiled."""
    digests = []
    for number, run in enumerate(contestants.values()):
        run(place / f"equal-{number}")
        tensors = open_checkpoint(place / f"equal-{number}").tensors
        with FileReader() as reader:
            digests.append({name: block_digest(reader.chunks(view)) for name, view in tensors.items()})
        shutil.rmtree(place / f"equal-{number}")
    if any(digest != digests[0] for digest in digests):
        raise RuntimeError(f"{', '.join(contestants)} give different tensors")


def main() -> None:
    from synthetic import tele_flm_config, write_safetensors

    parser = arguments(__doc__)
    options = parser.parse_args()
    command = mergekit_command(options.folder)
    with workplace(options.folder) as place:
        config = tele_flm_config(options.size / 2)
        layers = config["num_hidden_layers"]
        files = write_safetensors(place / "llama", config)
        make_llama(place / "llama", config)
        (place / "teleflm").mkdir()
        for file in files:
            (place / "teleflm" / file.name).hardlink_to(file)
        (place / "teleflm/config.json").write_text(json.dumps(config))
        recipe = write_recipe(place / "recipe.yaml", place / "llama", layers)
        contestants = {
            "teleflm grow": partial(grow, place / "teleflm", layers),
            OURS: partial(passthrough, place / "llama"),
            MERGEKIT: partial(mergekit, command, recipe),
        }
        require_equal(place, {name: contestants[name] for name in (OURS, MERGEKIT)})
        runs = interleave(contestants, options.pairs, place, files, "warm")
        size = depth_plan(place / "llama").nbytes
    peak = max(run.peak_rss for run in runs[MERGEKIT])
    rows = [
        [
            name,
            seconds(runs[name]),
            ratios(runs, MERGEKIT, name),
            mib(runs[name]),
            f"1/{peak / max(run.peak_rss for run in runs[name]):.0f}",
        ]
        for name in contestants
    ]
    about = f"{layers} to {2 * layers} layers, {size:,} bytes written, warm cache; {options.pairs} rounds."
    columns = ["", "seconds", "times faster than mergekit", "peak RSS, MiB", "of mergekit's"]
    report("Depth duplication against mergekit", options.folder, about, columns, rows, GOALS)


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].startswith("-"):
        write_checkpoint(depth_plan(Path(sys.argv[1])), Path(sys.argv[2]), WriteOptions())
    else:
        main()
