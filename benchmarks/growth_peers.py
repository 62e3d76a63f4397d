# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Twice the layers and twice the width: mergekit, scripts that load the model, and `teleflm grow`.

Time and memory come from a bfloat16 source of --size GiB, the largest difference of logits from a small float32 one,
run by stock transformers in float64. mergekit's passthrough repeats layers as they are, which is another function; with
`scale: 0` on what a repeated layer adds it is the same. The scripts are as short as anyone would write them, after
LLaMA-Pro (arXiv 2401.02415) and HyperCloning (arXiv 2409.12903). mergekit runs from a virtual environment of its own,
made under --folder at the first run.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from depth_against_mergekit import MERGEKIT, make_llama, mergekit_command
from measure import TELEFLM, Run, arguments, interleave, mib, ratios, report, run_processes, seconds, workplace
from results import Goal
from safetensors.torch import save_file
from synthetic import shapes, tele_flm_config, write_safetensors
from transformers import LlamaForCausalLM

from evaluation.logit_comparison import LogitComparison
from evaluation.logits import compare_logits

GOALS = (
    Goal("growth is faster than its peers", "x the time of teleflm grow", 1, at_least=True, rows=r"mergekit|in memory"),
    Goal("growth keeps the function", "largest difference of a logit", 1e-06, rows=r"teleflm grow"),
)

OURS = "teleflm grow"
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SMALL = dict(zip((*WIDTHS, "num_hidden_layers", "vocab_size"), (256, 688, 8, 8, 4, 1000), strict=True))
PLAIN = {"use_mup": True, "input_mult": 1.0, "output_mult": 1.0, "mup_scale_factor": 1.0}  # a Llama by another name


def llama_pro(source: Path, out: Path) -> None:
    """Each layer, and a copy of it that adds nothing to the stream."""
    model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
    layers = torch.nn.ModuleList()
    for layer in model.model.layers:
        silent = copy.deepcopy(layer)
        torch.nn.init.zeros_(silent.self_attn.o_proj.weight)
        torch.nn.init.zeros_(silent.mlp.down_proj.weight)
        layers += [layer, silent]
    model.model.layers, model.config.num_hidden_layers = layers, len(layers)
    model.save_pretrained(out)


def hyper_cloning(source: Path, out: Path) -> None:
    """Each feature, head and neuron twice; what reads a pair takes half from each."""

    def twice(name: str, weight: torch.Tensor) -> torch.Tensor:
        if "norm" in name:
            return weight.repeat(2)
        if "embed_tokens" in name:
            return weight.repeat(1, 2)
        return weight.repeat(1 if "lm_head" in name else 2, 2) / 2

    model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
    for field in WIDTHS:
        setattr(model.config, field, 2 * getattr(model.config, field))
    model.save_pretrained(out, state_dict={name: twice(name, weight) for name, weight in model.state_dict().items()})


PEERS = {"llama-pro": llama_pro, "hyper-cloning": hyper_cloning}


def write_recipe(file: Path, source: Path, layers: int, dtype: str, repeated: Mapping[str, Any]) -> Path:
    """Each layer and again each layer, for mergekit; `repeated` is what is special about the second."""
    parts = [
        {"sources": [{"model": str(source), "layer_range": [layer, layer + 1], **extra}]}
        for layer in range(layers)
        for extra in ({}, repeated)
    ]
    file.write_text(yaml.safe_dump({"slices": parts, "merge_method": "passthrough", "dtype": dtype}))
    return file


def synced(command: Sequence[str], out: Path) -> Run:
    """The others do not sync what they write, so that time is added."""
    run = run_processes(command)
    flush = run_processes(["sync", *map(str, sorted(out.glob("*.safetensors")))])
    return Run(run.seconds + flush.seconds, run.cpu_seconds + flush.cpu_seconds, run.peak_rss)


def contestants(place: Path, config: Mapping[str, Any], command: Path) -> dict[str, Callable[[Path], Run]]:
    """Name -> what runs it, on the sources `llama` and `teleflm` of a folder."""

    def mergekit(name: str, **repeated: object) -> Callable[[Path], Run]:
        recipe = write_recipe(place / name, llama, config["num_hidden_layers"], config["dtype"], repeated)
        return lambda out: synced([str(command), str(recipe), str(out), "--lazy-unpickle"], out)

    def script(peer: str) -> Callable[[Path], Run]:
        return lambda out: synced([sys.executable, __file__, "--peer", peer, str(llama), str(out)], out)

    def grow(fields: Sequence[str], *options: str) -> Callable[[Path], Run]:
        changes = [word for field in fields for word in ("--set", f"{field}={2 * config[field]}")]
        return lambda out: run_processes([*TELEFLM, "grow", str(place / "teleflm"), str(out), *changes, *options])

    llama = place / "llama"
    mute = [{"filter": name, "value": 0.0} for name in ("o_proj", "down_proj")]
    return {
        f"depth: {MERGEKIT}, passthrough": mergekit("passthrough.yaml"),
        f"depth: {MERGEKIT}, passthrough, scale 0": mergekit(
            "scale.yaml", parameters={"scale": [*mute, {"value": 1.0}]}
        ),
        "depth: in memory, after LLaMA-Pro": script("llama-pro"),
        f"depth: {OURS}": grow(["num_hidden_layers"]),
        "width: in memory, after HyperCloning": script("hyper-cloning"),
        f"width: {OURS} --method tile --noise 0": grow(WIDTHS, "--method", "tile", "--noise", "0"),
        f"width: {OURS}": grow(WIDTHS),
    }


def make_twin(teleflm: Path, config: Mapping[str, Any]) -> list[Path]:
    """The same files as a Llama, beside."""
    llama = teleflm.with_name("llama")
    llama.mkdir()
    files = sorted(teleflm.glob("*.safetensors"))
    for file in files:
        (llama / file.name).hardlink_to(file)
    make_llama(llama, config)
    return files


def compare_all(place: Path, config: dict[str, Any], command: Path) -> dict[str, LogitComparison]:
    """Name -> the logits of a small float32 source beside those of what it became."""

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        draws = torch.randn(shape, generator=generator)
        return 1 + 0.3 * draws if len(shape) == 1 else 0.05 * draws

    generator = torch.Generator().manual_seed(0)
    (place / "teleflm").mkdir(parents=True)
    (place / "teleflm/config.json").write_text(json.dumps(config))
    tensors = {name: weight(shape) for name, shape in shapes(config).items()}
    save_file(tensors, place / "teleflm/model.safetensors", {"format": "pt"})
    make_twin(place / "teleflm", config)
    source = LlamaForCausalLM.from_pretrained(place / "llama", dtype=torch.float64)
    ids = torch.randint(config["vocab_size"], (2, 64), generator=generator)
    found = {}
    for name, run in contestants(place, config, command).items():
        run(place / "output")
        make_llama(place / "output", json.loads((place / "output/config.json").read_bytes()))
        result = LlamaForCausalLM.from_pretrained(place / "output", dtype=torch.float64)
        found[name] = compare_logits(source, result, ids)
        shutil.rmtree(place / "output")
    return found


def main() -> None:
    options = arguments(__doc__, size=1.0).parse_args()
    command = mergekit_command(options.folder)
    with workplace(options.folder) as place:
        config = tele_flm_config(options.size) | PLAIN
        logits = compare_all(place / "small", config | SMALL | {"dtype": "float32"}, command)
        write_safetensors(place / "teleflm", config)
        files = make_twin(place / "teleflm", config)
        runs = interleave(contestants(place, config, command), options.pairs, place, files, "warm")
        size = sum(file.stat().st_size for file in files)
    rows = []
    for name in runs:
        times = ratios(runs, name, f"{name.partition(':')[0]}: {OURS}")
        rows.append([name, seconds(runs[name]), times, mib(runs[name]), f"{logits[name].max_difference:.1e}"])
    about = (
        f"Time and memory: {size:,} bytes of bfloat16, num_hidden_layers {config['num_hidden_layers']}, "
        f"warm; {options.pairs} rounds. Logits: 4 layers of width 256 in float32, 128 tokens, the largest "
        f"{logits[f'depth: {OURS}'].max_logit:.2f}."
    )
    columns = ["twice the", "seconds", "x the time of teleflm grow", "peak RSS, MiB", "largest difference of a logit"]
    report("Growth beside its peers", options.folder, about, columns, rows, GOALS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        PEERS[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
