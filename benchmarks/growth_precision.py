# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What growth leaves as it was, axis by axis and dtype by dtype: logits and first choices of a trained model.

A small TeleFLM is pretrained on Python's own documentation, as the demo does it, written in each dtype and grown along
each axis. Transformers' own Llama runs source and result on held-out text, in the dtype of their weights. Beside what
growth changes stands what rounding alone changes: the source computed in its dtype beside the same weights in float64.

    PYTHONPATH=. python benchmarks/growth_precision.py --folder DIR
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, console, report
from transformers import logging, set_seed

from conversion.checkpoint.sources import open_checkpoint
from demo.__main__ import FULL, QUICK, Run, Text, collect_corpus, pack, pretrain, train_tokenizer
from demo.report import Report
from evaluation.logits import checkpoint_logits
from growth import grow_checkpoint, verify_checkpoints
from growth.method import Tile

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def growths(d: int, heads: int, ffn: int, layers: int, rows: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The target and the further arguments of each growth."""
    dim = d // heads
    wide = {times: {"hidden_size": int(d * times), "num_attention_heads": int(heads * times)} for times in (1.25, 2, 4)}
    return {
        "depth": ({"num_hidden_layers": layers + 2}, {}),
        "feed-forward": ({"intermediate_size": ffn * 3 // 2}, {}),
        "heads": ({"num_attention_heads": 2 * heads, "head_dim": dim}, {}),
        "vocabulary": ({"vocab_size": rows + 512}, {}),
        "width x 1.25": (wide[1.25], {}),
        "width x 2": (wide[2], {}),
        "width x 4": (wide[4], {}),
        "width x 2, tile": (wide[2], {"method": Tile()}),
    }


def logits(folder: Path, blocks: list[np.ndarray], dtype: str) -> np.ndarray:
    """[tokens, vocabulary] of some texts, float64."""
    source = open_checkpoint(folder)
    return np.concatenate([checkpoint_logits(source, block, dtype) for block in blocks])


def compare(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The root mean square difference in units of the first's spread, and the share of other first choices."""
    second = second[:, : first.shape[1]]
    rms = float(np.sqrt(np.square(first - second).mean()) / first.std())
    return rms, float((first.argmax(1) != second.argmax(1)).mean())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, for a try")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that sums are added in one order
    logging.set_verbosity_error()
    set_seed(0)
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        run = Run(Report(console), size, Path(place), 0)
        corpus = collect_corpus(run)
        tokenizer = train_tokenizer(run, corpus)
        text = Text(pack(corpus.texts, tokenizer), pack(corpus.heldout_texts, tokenizer)[:16])
        model, _ = pretrain(run, text)
        blocks = [block["input_ids"].numpy() for block in text.heldout]
        config = model.config
        rows = []
        for name, dtype in DTYPES.items():
            source = Path(place) / name
            model.to(dtype).save_pretrained(source)
            own = logits(source, blocks, name)
            floor = compare(own, logits(source, blocks, "float64"))
            rows.append([name, "rounding alone", *_cells(*floor), ""])
            sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for growth, (target, how) in growths(*sizes, config.num_hidden_layers, config.vocab_size).items():
                out = Path(place) / "grown"
                grow_checkpoint(source, out, target, **how)
                verdict = verify_checkpoints(source, out).verdict
                rows.append([name, growth, *_cells(*compare(own, logits(out, blocks, name))), verdict])
                shutil.rmtree(out)
    tokens = sum(map(len, blocks))
    report(
        "Growth: what stays as it was, by dtype",
        options.folder,
        f"A model of {model.num_parameters() / 1e6:.1f} M parameters, pretrained for {size.pretraining_steps} steps; "
        f"{tokens:,} held-out tokens, transformers' Llama in the dtype of the weights, one thread. Rounding alone: the "
        "source in its dtype beside the same weights in float64. The weights are values of bfloat16 in every dtype.",
        ["dtype", "growth", "rms difference of the logits / their spread", "other first choices", "verify"],
        rows,
    )


def _cells(rms: float, flips: float) -> list[str]:
    return ["0" if rms == 0 else f"{rms:.1e}", f"{flips:.2%}"]


if __name__ == "__main__":
    main()
