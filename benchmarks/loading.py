# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What `from_pretrained` costs: a Tele-FLM beside a stock Llama of the very same weight files.

    python benchmarks/loading.py [--size 1] [--pairs 3] [--ranks 2] [--folder DIR]

From a `.bin`, from safetensors as `teleflm convert` writes them, with `device_map="cpu"`, and tensor-parallel over
processes with gloo. The cache is cold, so that the kernel's count of what a process had read from the disk is what it
reads. Seconds are those of the call, and of touching every page of the weights, as they may be mapped only; memory is
the kernel's own high-water mark. Ranks of a machine share its cache, and what is read ahead for one serves another: so
it is all of them together that are to read what they hold and no more, each byte of what is sharded once.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import sample
from typing import Any

from measure import GIB, ROOT, TELEFLM, arguments, console, report, run_processes, set_cache, spread, workplace
from results import Goal
from synthetic import tele_flm_config, write_bin

COLUMNS = (
    "",
    "seconds",
    "x Llama's speed",
    "peak RSS, MiB",
    "read by all, MiB",
    "held by one, MiB",
    "read / held by all",
)
GOALS = (
    Goal("loads as fast as a stock Llama of the same bytes", "x Llama's speed", 1.0, at_least=True, rows="^Tele-FLM"),
    Goal("tensor-parallel ranks read only what they hold", "read / held by all", 1.05, rows="^Tele-FLM.*ranks"),
)
MODELS = ("Tele-FLM", "Llama")
WAYS = (".bin", "safetensors", 'safetensors, device_map="cpu"', "safetensors, {ranks} ranks")
_PAGE = 4096


def make_folders(place: Path, gib: float) -> dict[tuple[str, str], Path]:
    """A folder for each model and format; both models have the same weight files."""
    config = tele_flm_config(gib)
    write_bin(place / "source", config)
    run_processes([*TELEFLM, "convert", str(place / "source"), str(place / "converted"), "--no-digest"])
    llama = {name: value for name, value in config.items() if name not in _OWN_FIELDS}
    configs = {"Tele-FLM": config, "Llama": llama | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}}
    folders = {}
    for model, written in configs.items():
        for kind, origin in ((".bin", "source"), ("safetensors", "converted")):
            folder = folders[model, kind] = place / f"{model}-{kind.lstrip('.')}"
            folder.mkdir()
            for file in weight_files(place / origin):
                os.link(file, folder / file.name)
            for index in (place / origin).glob("*.index.json"):
                shutil.copy(index, folder)
            (folder / "config.json").write_text(json.dumps(written))
    return folders


_OWN_FIELDS = ("use_mup", "input_mult", "output_mult", "mup_scale_factor", "auto_map")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold weights."""
    return [*folder.glob("*.bin"), *folder.glob("*.safetensors")]


def load(folder: Path, way: str) -> dict[str, float]:
    """What a process of its own does: load, touch every page, and say what it took.

    `held` counts the bytes of the weights that are in this process, `read` those that came from the disk for it.
    """
    import torch

    from modeling_teleflm import TeleFLMForCausalLM  # registers the class for the Auto classes too

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "llama":
        from transformers import LlamaForCausalLM as Model
    else:
        Model = TeleFLMForCausalLM
    given: dict[str, Any] = {"dtype": torch.bfloat16, "use_safetensors": not way.startswith(".bin")}
    if "device_map" in way:
        given["device_map"] = "cpu"
    if "ranks" in way:
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        given["tp_plan"] = "auto"
    before, started = read_bytes(), time.perf_counter()
    model = Model.from_pretrained(folder, **given)
    tensors = [local(tensor) for tensor in model.state_dict().values()]
    for tensor in tensors:
        tensor.contiguous().view(-1).view(torch.uint8)[::_PAGE].sum()
    took = time.perf_counter() - started
    found = {"seconds": took, "read": read_bytes() - before, "held": sum(tensor.nbytes for tensor in tensors)}
    found["peak"] = status("VmHWM")
    if "ranks" in way:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return found


def local(tensor: Any) -> Any:
    """The part of a tensor that is in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def read_bytes() -> int:
    """Bytes that this process had read from a disk, by page faults too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def status(name: str) -> int:
    """Bytes of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(folder: Path, way: str, ranks: int) -> list[dict[str, float]]:
    """Load in new processes; what each of them says."""
    launch = [sys.executable]
    if "ranks" in way:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    folder_for_reports = folder.parent / "said"
    folder_for_reports.mkdir()
    command = [*launch, str(Path(__file__)), "--child", str(folder), way, str(folder_for_reports)]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, **variables})
    said = [json.loads(file.read_text()) for file in sorted(folder_for_reports.iterdir())]
    shutil.rmtree(folder_for_reports)
    return said


def row_of(way: str, model: str, runs: dict[str, list[list[dict[str, float]]]]) -> list[str]:
    """The cells of a way to load; of ranks, seconds are the slowest's, memory is of all."""
    made = runs[model]
    slowest = {name: [max(rank["seconds"] for rank in run) for run in found] for name, found in runs.items()}
    quotients = [theirs / own for own, theirs in zip(slowest[model], slowest["Llama"], strict=True)]
    peak = max(sum(rank["peak"] for rank in run) for run in made)
    read, held_by_all = (max(sum(rank[name] for rank in run) for run in made) for name in ("read", "held"))
    held = max(rank["held"] for run in made for rank in run)
    return [
        f"{model}, {way}",
        spread(slowest[model]),
        spread(quotients),
        *(f"{value / 2**20:,.0f}" for value in (peak, read, held)),
        f"{read / held_by_all:.2f}",
    ]


def main() -> None:
    parser = arguments(__doc__, size=1, pairs=3)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the tensor-parallel rows")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "WAY", "REPORTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, way, reports = options.child
        (Path(reports) / os.environ.get("RANK", "0")).write_text(json.dumps(load(Path(folder), way)))
        return
    with workplace(options.folder) as place:
        folders = make_folders(place, options.size)
        size = sum(file.stat().st_size for file in weight_files(folders["Llama", "safetensors"]))
        rows = []
        for way in (way.format(ranks=options.ranks) for way in WAYS):
            runs: dict[str, list[list[dict[str, float]]]] = {model: [] for model in MODELS}
            for _ in range(options.pairs):
                for model in sample(MODELS, len(MODELS)):
                    folder = folders[model, way.partition(",")[0]]
                    set_cache(weight_files(folder), "cold")
                    runs[model].append(run(folder, way, options.ranks))
                    console.print(model, way, runs[model][-1], style="dim")
            rows += [row_of(way, model, runs) for model in MODELS]
    about = f"{size / GIB:.2f} GiB of bfloat16, cold cache, one thread a process; {options.pairs} rounds."
    report("Loading", options.folder, about, COLUMNS, rows, GOALS)


if __name__ == "__main__":
    main()
