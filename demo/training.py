# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Training on text, behind a progress bar of ours: of a new model with transformers' Trainer, of what grew as `teleflm
train` does it.
"""

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

from conversion.optimizer_state import OPTIMIZER_FILE
from growth.training.record import describe_training, digest_examples, start_record
from growth.training.train import GrowthArguments, GrowthTrainer, build_trainer
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
) -> tuple[Log, Lineage]:
    """Train a new model with AdamW, the rate rising linearly and then falling as a cosine to a tenth.

    What AdamW has in the end lies in `output_dir` as optimizer.pt, where a checkpoint of Trainer has it.

    Returns:
        the trainer's log: `step` and `loss` of a batch, or `step` and `eval_loss` of the held-out blocks, from step 0;
        and what the record of the model has to say of it.
    """
    origin = {"initial_weights": "random", "parent": None}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        eval_steps=max(1, steps // 8),
        include_num_input_tokens_seen="all",
        seed=seed,
        **TRAINING,
    )
    trainer = Trainer(model, arguments, train_dataset=blocks, eval_dataset=heldout, callbacks=[BarCallback(step)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    output_dir.mkdir(exist_ok=True)
    assert trainer.optimizer is not None
    torch.save(trainer.optimizer.state_dict(), output_dir / OPTIMIZER_FILE)
    return trainer.state.log_history, describe_training(trainer, trainer.state, {**digest_examples(blocks), **origin})


def train_grown_model(
    model: Path,
    step: Step,
    *,
    training: Path,
    heldout: Path,
    output_dir: Path,
    steps: int,
    learning_rate: float,
    base_width: int,
    seed: int,
) -> tuple[GrowthTrainer, Log]:
    """Train a grown model in a folder as `teleflm train` does: with the moments of Adam that grew with it, if they did,
    the learning rate of each kind of weight by muP, masks that rise if it has any, and a record.

    Args:
        model: its folder.
        step: whose bar moves.
        training, heldout: JSON Lines of texts.
        output_dir: for the trained model.
        steps: of the optimizer; the rate falls as a cosine to a tenth, without a warm-up.
        learning_rate: at `base_width`.
        base_width: hidden_size at which it was found.
        seed: of the order of the text.

    Returns:
        the trainer, and its log from step 0 on.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        eval_steps=max(1, steps // 8),
        seed=seed,
        **TRAINING,
    )
    growth = GrowthArguments(
        model_name_or_path=str(model),
        train_files=[str(training)],
        eval_files=[str(heldout)],
        block_size=BLOCK_LENGTH,
        mup_base_width=base_width,
    )
    trainer = build_trainer(growth, arguments, [BarCallback(step)])
    trainer.remove_callback(PrinterCallback)
    record = start_record(trainer, model)
    trainer.train()
    record.save_model()
    return trainer, trainer.state.log_history


# What every trainer of the demo is told: stay on the CPU, log each step, write nothing, draw no bar of your own.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


TRAINING: dict[str, Any] = {
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "eval_strategy": "steps",
    "eval_on_start": True,
    **QUIET,
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
