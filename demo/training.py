# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Training on text with transformers' Trainer, behind a progress bar of ours."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from growth.training.record import describe_training, digest_examples, find_parent
from modeling_teleflm import TeleFLMTokenizer

from .report import Step

BLOCK_LENGTH = 256
BATCH_SIZE = 4

Block = dict[str, torch.Tensor]
Log = list[dict[str, float]]
Lineage = dict[str, Any]


def pack(texts: Iterable[str], tokenizer: TeleFLMTokenizer) -> list[Block]:
    """Join texts, each between `<s>` and `</s>`, and cut the result into blocks; what fills no block is left out."""
    ids = list(chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts))
    blocks = torch.tensor(ids[: len(ids) // BLOCK_LENGTH * BLOCK_LENGTH]).view(-1, BLOCK_LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def stack(blocks: Iterable[Block]) -> torch.Tensor:
    """Token ids of some blocks [blocks, BLOCK_LENGTH]."""
    return torch.stack([block["input_ids"] for block in blocks])


def train_on_text(
    model: PreTrainedModel,
    blocks: list[Block],
    heldout: list[Block],
    step: Step,
    *,
    output_dir: Path,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    seed: int,
    source: Path | None = None,
) -> tuple[Log, Lineage]:
    """Train with a fresh AdamW, the rate rising linearly and then falling as a cosine to a tenth.

    Returns:
        the trainer's log: `step` and `loss` of a batch, or `step` and `eval_loss` of the held-out blocks, from step 0;
        and what the record of the model has to say of it. `source` is the folder it was loaded from; None: it is new.
    """
    origin = find_parent(source) if source else {"initial_weights": "random", "parent": None}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        adam_beta2=0.95,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=max(1, steps // 8),
        eval_on_start=True,
        include_num_input_tokens_seen="all",
        seed=seed,
        **QUIET,
    )
    trainer = Trainer(model, arguments, train_dataset=blocks, eval_dataset=heldout, callbacks=[BarCallback(step)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history, describe_training(trainer, trainer.state, {**digest_examples(blocks), **origin})


# What every trainer of the demo is told: stay on the CPU, log each step, write nothing, draw no bar of your own.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class BarCallback(TrainerCallback):
    """Moves the bar of a step of the demo and shows the loss beside it."""

    def __init__(self, step: Step):
        self.step = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the length of the bar."""
        self.step.start(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.step.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.step.note(f"loss {float(logs['loss']):.2f}")
