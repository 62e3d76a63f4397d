# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the loss of a step costs in memory and time: forward and backward of a model with its labels.

    python benchmarks/loss_memory.py [--length 4096] [--vocabulary 80384] [--hidden 1024] [--runs 5] [--folder DIR]

One layer, one row, float32. `forward(labels)` is a model as transformers makes it, a Llama and a Tele-FLM; `teleflm
train` takes the loss in chunks (`growth.training.chunked_loss`); `sft train` is TRL's head in tiles of 4,096 tokens by
32,768 entries of the vocabulary, of which its code for a CPU, without Triton, makes several copies. Runs take turns,
each in a process of its own; memory is the peak resident set above that of the loaded model, by the kernel's own count.
The gradients of all are compared with the first.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import ROOT, arguments, console, report
from results import Goal

WAYS = ("Llama, forward(labels)", "Tele-FLM, forward(labels)", "teleflm train", "sft train")

GOALS = (
    Goal("labels cost no more memory than in a stock Llama", "times less", 0.99, at_least=True, rows="^Tele-FLM, "),
    Goal("`teleflm train` takes a quarter of a stock loss's memory", "times less", 4, at_least=True, rows="^teleflm"),
    Goal("`sft train` takes a quarter of a stock loss's memory", "times less", 4, at_least=True, rows="^sft"),
    Goal("the loss in parts is the loss", "loss", 1e-5),
    Goal("the gradients of the loss in parts are its gradients", "gradient norm", 1e-4),
)


def main() -> None:
    parser = arguments(__doc__)
    for name, default in (("length", 4096), ("vocabulary", 80384), ("hidden", 1024), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--child", help="which way: what a process of its own does")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.child, options.length, options.vocabulary, options.hidden)))
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("length", "vocabulary", "hidden")]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            command = [sys.executable, __file__, "--child", way, *sizes]
            found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            runs[way].append(json.loads(found))
            console.print(way, runs[way][-1], style="dim")
    first = runs[WAYS[0]]
    table = []
    for way in WAYS:
        peak = statistics.median(run["bytes"] for run in runs[way])
        least = statistics.median(run["bytes"] for run in first)
        paired = [run["seconds"] / other["seconds"] for run, other in zip(runs[way], first, strict=True)]
        apart = max(abs(run["loss"] - first[0]["loss"]) / first[0]["loss"] for run in runs[way])
        norm = max(abs(run["norm"] - first[0]["norm"]) / first[0]["norm"] for run in runs[way])
        table.append(
            [
                way,
                f"{peak / 2**20:,.0f}",
                f"{least / peak:.2f}",
                f"{statistics.median(paired):.2f} [{min(paired):.2f}, {max(paired):.2f}]",
                f"{apart:.0e}",
                f"{norm:.0e}",
            ]
        )
    logits = 4 * options.length * options.vocabulary / 2**20
    about = (
        f"A row of {options.length:,} tokens, vocabulary {options.vocabulary:,}, width {options.hidden:,}, one layer, "
        f"float32: all logits are {logits:,.0f} MiB, the gradients of embedding and head "
        f"{8 * options.vocabulary * options.hidden / 2**20:,.0f}. Factor on the logits 1/32 in all."
    )
    columns = ("loss by", "peak above the model, MiB", "times less", "time against the first", "loss", "gradient norm")
    report("Memory of the loss", options.folder, about, columns, table, GOALS)


def _measure(way: str, length: int, vocabulary: int, hidden: int) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 8, "num_hidden_layers": 1}
    sizes |= {"vocab_size": vocabulary, "max_position_embeddings": length}
    mup = {"use_mup": True, "output_mult": 0.5, "mup_scale_factor": 16.0}
    model: Any = TeleFLMForCausalLM(TeleFLMConfig(**sizes, **mup)).train()
    if way.startswith("Llama"):
        weights = model.state_dict()
        weights["lm_head.weight"] /= 32
        model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=model.config.rms_norm_eps)).train()
        model.load_state_dict(weights)
        del weights
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    if way == "teleflm train":
        from growth.training.chunked_loss import chunk_loss

        chunk_loss(model)
    if way == "sft train":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        given["fused_lm_head"] = True
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = _status("VmRSS"), time.perf_counter()
    outputs = model(**given)
    loss = -outputs.log_probs.mean() if way == "sft train" else outputs.loss
    loss.backward()
    took, peak = time.perf_counter() - started, _status("VmHWM") - before
    norm = model.model.layers[0].mlp.up_proj.weight.grad.double().norm().item()
    return {"bytes": peak, "seconds": took, "loss": loss.item(), "norm": norm}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
