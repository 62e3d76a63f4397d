# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the losses of a batch cost in memory: the head in chunks, as a scorer takes them, against all logits at once.

    python benchmarks/scorer_memory.py [--vocabulary 10000 80000] [--hidden 512] [--runs 3] [--folder DIR]

A random Llama of four layers scores eight sequences of 1,024 tokens, half of them of answers. All logits at once is
what a loss on `model(input_ids).logits` takes: logits of every place in float32, and cross_entropy on them. Each run is
a process of its own; memory is its peak resident set above that of the loaded model, by the kernel's own count.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import ROOT, arguments, console, report

ROWS, LENGTH = 8, 1024


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[10_000, 80_000])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=3, help="how, vocabulary, width: what a process of its own does")
    options = parser.parse_args()
    if options.child:
        how, vocabulary, hidden = options.child
        print(json.dumps(_measure(how, int(vocabulary), int(hidden))))
        return
    table = []
    for vocabulary in options.vocabulary:
        expected: list[float] = []
        for how in ("at once", "in chunks"):
            runs = [_child(how, vocabulary, options.hidden) for _ in range(options.runs)]
            expected = expected or runs[0]["losses"]
            apart = max(abs(a - b) / b for a, b in zip(runs[0]["losses"], expected, strict=True))
            peak, took = (statistics.median(run[key] for run in runs) for key in ("bytes", "seconds"))
            table.append([f"{vocabulary:,}", how, f"{peak / 2**20:,.0f}", f"{took:.1f}", f"{apart:.0e}"])
            console.print(*table[-1], style="dim")
    about = (
        f"{ROWS} sequences of {LENGTH:,} tokens, half of them labelled; four layers of width {options.hidden}, float32."
    )
    columns = (
        "vocabulary",
        "logits",
        "peak above the model, MiB",
        "seconds",
        "largest relative difference of a sum of losses",
    )
    report("Scorer: memory of the losses", options.folder, about, columns, table)


def _child(how: str, vocabulary: int, hidden: int) -> dict:
    command = [sys.executable, __file__, "--child", how, str(vocabulary), str(hidden)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def _measure(how: str, vocabulary: int, hidden: int) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft.selection import scorers

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 8, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes)).eval()
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH))
    labels = torch.where(torch.arange(LENGTH) < LENGTH // 2, -100, ids)
    scorer = scorers.CausalScorer(model, _Tokenizer())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = _status("VmRSS"), time.perf_counter()
    if how == "in chunks":
        losses = scorer.losses(list(zip(ids.tolist(), labels.tolist(), strict=True)))[:, 0].tolist()
    else:
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            losses = each.sum(1).tolist()
    return {"bytes": _status("VmHWM") - before, "seconds": time.perf_counter() - started, "losses": losses}


class _Tokenizer:
    bos_token_id, eos_token_id = 1, 2


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
