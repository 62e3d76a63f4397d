# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Throughput of fine-tuning on the CPU.

    python benchmarks/sft_throughput.py --data CONVERSATIONS.jsonl.gz [--what peers|packing|all]

peers: `sft.train` on a Tele-FLM beside `trl sft` on a stock Llama of the same shape, with the same conversations,
tokenizer, template and settings. A ratio is the tokens a second of the one over those of the other in the same round;
the interval is Student's, of the mean of the logarithms.

packing: the same rows once, in padded batches of 8, grouped by length, and packed. What packing can win is the padding:
its ratio is to be at least 0.9 x the tokens of the padded batches over those of the rows.

The time is the trainer's own (`train_runtime`), from before the first step to after the last; starting and tokenizing
are left out.
"""

import argparse
import io
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import sentencepiece
import yaml
from results import Goal
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(measure.ROOT))
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM, TeleFLMTokenizer
from sft.data.checks import Conversation, check_rows
from sft.training.recipe import Recipe
from sft.training.train import build_trainer

PEERS_GOALS = (
    Goal(
        "fine-tuning is as fast as trl sft on a stock Llama",
        "x the other's throughput",
        1,
        at_least=True,
        rows=r"^teleflm",
    ),
)
PACKING_GOALS = (Goal("packing wins 0.9 of the padding", "of what can be won", 0.9, at_least=True, rows=r"^packed"),)

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONTROL = ["<_system>", "<_user>", "<_bot>"]
BATCH = 8
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = dict(enumerate([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179], 1))
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "max_length": SHAPE["max_position_embeddings"],
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-4,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
}


def make_inputs(data: Path, rows: int, place: Path) -> None:
    """A tokenizer trained on the conversations, both models with random weights, and some valid conversations."""
    valid = [outcome.messages for _, outcome in check_rows(data, CONTROL) if isinstance(outcome, Conversation)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(message["content"].replace("\n", " ") for row in valid for message in row),
        model_writer=model,
        model_type="bpe",
        vocab_size=4000,
        user_defined_symbols=CONTROL,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    for name, (kind, config) in {
        "teleflm": (TeleFLMForCausalLM, TeleFLMConfig(**SHAPE, use_mup=True, output_mult=0.5, mup_scale_factor=16.0)),
        "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    }.items():
        kind(config).save_pretrained(place / name)
        (place / name / "tokenizer.model").write_bytes(model.getvalue())
        TeleFLMTokenizer(str(place / name / "tokenizer.model")).save_pretrained(place / name)
    chosen = random.Random(0).sample(valid, rows)
    (place / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in chosen))


def teleflm(place: Path, **keys: Any) -> list[str]:
    """The command that trains our way."""
    recipe = place / "teleflm.yaml"
    paths = {"model_name_or_path": str(place / "teleflm"), "data_files": str(place / "rows.jsonl")}
    recipe.write_text(yaml.safe_dump({**COMMON, **paths, "output_dir": str(place / "output"), **keys}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    return [*launch, "-m", "sft.train", "--config", str(recipe), "--json"]


def trl(place: Path, **keys: Any) -> list[str]:
    """The command that trains a stock Llama with TRL alone; the tokenizer's code is in the model's folder."""
    config = place / "trl.yaml"
    own = {
        "model_name_or_path": str(place / "llama"),
        "trust_remote_code": True,
        "datasets": [{"path": "json", "data_files": str(place / "rows.jsonl")}],
        "assistant_only_loss": True,
    }
    config.write_text(yaml.safe_dump({**COMMON, **own, "output_dir": str(place / "output"), **keys}))
    return [str(Path(sys.executable).with_name("trl")), "sft", "--config", str(config)]


def run(command: Sequence[str], place: Path) -> measure.Run:
    """Run a training; its seconds are the trainer's own, its processor seconds those of the whole process.

    Raises:
        RuntimeError: it failed, or printed no time.
    """
    used = os.times()
    # accelerate launches both, and gives a process one thread unless told otherwise. So be it: on shared processors two
    # threads wait for each other, and a round measures whoever else is there.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=measure.ROOT, env=environment, capture_output=True, text=True, check=False)
    spent = os.times()
    found = re.findall(r"""["']train_runtime["']: ["']?([\d.]+)""", result.stdout + result.stderr)
    subprocess.run(["rm", "-rf", str(place / "output")], check=True)
    if result.returncode or not found:
        raise RuntimeError(f"{command} exited with {result.returncode}:\n{(result.stdout + result.stderr)[-3000:]}")
    cpu = spent.children_user + spent.children_system - used.children_user - used.children_system
    return measure.Run(float(found[-1]), cpu)


def rounds(commands: Mapping[str, Sequence[str]], pairs: int, place: Path) -> dict[str, list[measure.Run]]:
    """Run every command once a round, in random order."""
    runs: dict[str, list[measure.Run]] = {name: [] for name in commands}
    for number in range(pairs):
        for name in random.sample(list(commands), len(commands)):
            started = time.perf_counter()
            runs[name].append(run(commands[name], place))
            measure.console.print(
                f"{number + 1}/{pairs} {name}: {runs[name][-1].seconds:.2f} s of {time.perf_counter() - started:.0f} "
                f"(load {os.getloadavg()[0]:.1f})",
                style="dim",
            )
    return runs


def interval(quotients: Sequence[float]) -> str:
    """Mean and 95 % interval of some ratios: Student's, of the mean of their logarithms."""
    logs = [math.log(quotient) for quotient in quotients]
    mean = statistics.mean(logs)
    half = STUDENT[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]"


def quotients(runs: Mapping[str, Sequence[measure.Run]], name: str, base: str) -> list[float]:
    """How many times faster one was than another, round by round."""
    return [b.seconds / a.seconds for a, b in zip(runs[name], runs[base], strict=True)]


def tokens(place: Path, **keys: Any) -> tuple[int, int, int]:
    """Of one epoch: tokens that go through the model, those that are no padding, steps."""
    paths = {"model_name_or_path": str(place / "teleflm"), "data_files": str(place / "rows.jsonl")}
    trainer, report, _ = build_trainer(Recipe.from_dict({**COMMON, **paths, "output_dir": str(place / "none"), **keys}))
    batches = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]
    return sum(batches), report.tokens, math.ceil(len(batches) / keys.get("gradient_accumulation_steps", 1))


def peers(place: Path, pairs: int, steps: int) -> None:
    """Beside TRL on a stock Llama."""
    commands = {"teleflm": teleflm(place, max_steps=steps), "trl sft, stock Llama": trl(place, max_steps=steps)}
    runs = rounds(commands, pairs, place)
    rows = [
        [name, measure.seconds(runs[name]), measure.cpu_seconds(runs[name]), interval(quotients(runs, name, other))]
        for name, other in zip(commands, reversed(commands), strict=True)
    ]
    measure.report(
        "Fine-tuning beside trl sft on a stock Llama",
        place,
        f"{describe()}; batches of {BATCH} rows, {steps} steps, float32, one thread; {pairs} rounds. Seconds from the "
        "first step to the last; processor seconds of the whole command. The ratio is of tokens a second, mean and "
        "95 % interval (Student's t on logarithms).",
        ["", "seconds", "processor seconds", "x the other's throughput"],
        rows,
        PEERS_GOALS,
    )


def packing(place: Path, pairs: int) -> None:
    """Packing and length grouping beside padded batches."""
    ways: dict[str, dict[str, Any]] = {
        "padded": {},
        "grouped by length": {"train_sampling_strategy": "group_by_length"},
        # One pack at a time: TRL joins the packs of a batch, and the CPU's attention computes the square of the length.
        "packed": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }
    counted = {name: tokens(place, num_train_epochs=1, **keys) for name, keys in ways.items()}
    runs: dict[str, list[measure.Run]] = {name: [] for name in ways}
    for number in range(pairs):  # the recipe's file is one, so each command is written when its turn comes
        for name in random.sample(list(ways), len(ways)):
            runs[name].append(run(teleflm(place, num_train_epochs=1, **ways[name]), place))
            measure.console.print(f"{number + 1}/{pairs} {name}: {runs[name][-1].seconds:.2f} s", style="dim")
    padding = counted["padded"][0] / counted["padded"][1]
    rows = [
        [
            name,
            f"{counted[name][2]}",
            f"{counted[name][0] / counted[name][1]:.2f}",
            measure.seconds(runs[name]),
            f"{counted[name][1] / statistics.median(run.seconds for run in runs[name]):,.0f}",
            interval(quotients(runs, name, "padded")) if name != "padded" else "1",
            f"{statistics.median(quotients(runs, name, 'padded')) / padding:.2f}" if name != "padded" else "",
        ]
        for name in ways
    ]
    measure.report(
        "Fine-tuning packed, grouped by length, and padded",
        place,
        f"{describe()}; one epoch of the same rows, {counted['padded'][1]:,} tokens, padded batches of {BATCH}, packs "
        f"of {COMMON['max_length']}; float32, sdpa, one thread; {pairs} rounds. Padded batches hold {padding:.2f} x "
        "the tokens of their rows, which is all that can be won. Ratio: mean and 95 % interval (Student's t on "
        "logarithms).",
        ["", "steps", "tokens computed / real", "seconds", "real tokens a second", "x padded", "of what can be won"],
        rows,
        PACKING_GOALS,
    )


def describe() -> str:
    """The model, in words."""
    return f"{SHAPE['num_hidden_layers']} layers of {SHAPE['hidden_size']}, vocabulary {SHAPE['vocab_size']}"


def main() -> None:
    parser = measure.arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--what", choices=["peers", "packing", "all"], default="all")
    parser.add_argument("--rows", type=int, default=192, help="conversations of an epoch")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run beside TRL")
    options: argparse.Namespace = parser.parse_args()
    with measure.workplace(options.folder) as place:
        make_inputs(options.data, options.rows, place)
        if options.what in ("peers", "all"):
            peers(place, options.pairs, options.steps)
        if options.what in ("packing", "all"):
            packing(place, options.pairs)


if __name__ == "__main__":
    main()
