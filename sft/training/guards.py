# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checks before the first step, of faults that a training loss does not show.

- TRL computes the loss from the hidden states and `lm_head.weight`; the model's own `forward`, and with it a factor on
  the logits, is bypassed. TRL applies the factor itself if the configuration names it `logit_scale`; else the loss is
  wrong, and at initialization differs from the right one in the fourth digit only. [`FusedLossGuard`] compares the two.
- TRL drops rows and cuts tokens without a word. [`check_trained_tokens`] counts what reached the trainer.
- Processes that have other data train on as many batches of it, and wait for each other where they evaluate on fewer.
  [`check_same_data`] compares what they have.

What launchers and wrappers do other than asked is watched for by [`growth.training.launch`].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

from sft import SFTError
from sft.data.labels import IGNORE_INDEX, DataReport

# Standard deviation that the logits are brought to before log-probabilities are compared. A factor k on logits moves
# log-probabilities by (k - 1) times about this; with the 0.001 of an untrained Tele-FLM, no precision would show it.
_LOGIT_STD = 4.0
# Of the spread of the log-probabilities. Rounding to bfloat16 makes a gap of 2e-3, the published factors of 0.03125 and
# 0.025 one of about 100.
_TOLERANCE = 0.02
_PROBE_TOKENS = 32


class GuardError(SFTError):
    """What would be trained is not what was asked for."""


# --- the loss ---------------------------------------------------------------------------------------------------------


class FusedLossGuard(TrainerCallback):
    """Stops a run before its first step if TRL's fused loss is not the loss of the model. See [`fused_loss_gap`].

    A callback, because only when training begins is the model what the steps will call: wrapped for distribution,
    sharded, under autocast.
    """

    def __init__(self, trainer: SFTTrainer | DPOTrainer | KTOTrainer | GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise [`GuardError`] on a mismatch."""
        model: Any = self.trainer.model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        # GRPO's log-probabilities are those of what is sampled from: logits divided by a temperature.
        temperature = self.trainer.temperature if isinstance(self.trainer, GRPOTrainer) else 1.0
        gap = fused_loss_gap(self.trainer.model_wrapped, base, device=args.device, temperature=temperature)
        if not gap <= _TOLERANCE:
            raise GuardError(
                f"TRL's fused loss is not the loss of {type(base).__name__}: log-probabilities differ by {gap:.2g} of "
                f"their spread (at most {_TOLERANCE} is rounding). A factor on the logits must be readable as "
                f"config.logit_scale, which {type(base.config).__name__} gives as "
                f"{getattr(base.config, 'logit_scale', None)}; upgrade teleflm or trl."
            )


@torch.no_grad()
def fused_loss_gap(
    model: nn.Module, base: PreTrainedModel, device: torch.device | str = "cpu", temperature: float = 1.0
) -> float:
    """How far the log-probabilities of TRL's fused head are from those of the model's own logits.

    Both come from `model`, from one short row, with the hidden states scaled so that a factor on the logits is visible
    in any precision. The model is left as it was: mode, gradients, random state.

    Args:
        model: what a training step calls, after `trl.trainer.utils.add_fused_lm_head`: `base` or a wrapper of it.
        base: the causal language model inside.
        device: where `model` expects its inputs.
        temperature: what the fused head was told to divide logits by.

    Returns:
        the root mean square of the differences, divided by the standard deviation of the log-probabilities; 0 is equal.
    """
    length = min(_PROBE_TOKENS, base.config.max_position_embeddings)
    input_ids = (torch.arange(length, device=device) % base.config.vocab_size)[None]
    targets = input_ids[:, 1:, None]

    # Eager, because a graph compiled now would keep the scaling of the hidden states after its hook is gone.
    with _evaluating(base), torch.compiler.set_stance("force_eager"):
        logits = model(input_ids=input_ids, use_cache=False).logits
        with _scaled_hidden_states(base, _LOGIT_STD / logits.float().std()):
            logits = model(input_ids=input_ids, use_cache=False).logits
            fused = model(input_ids=input_ids, labels=input_ids, use_cache=False, fused_lm_head=True).log_probs
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root waits for a backward pass, and shows its parameters whole until then

    native = (logits[:, :-1].float() / temperature).log_softmax(-1).gather(-1, targets).squeeze(-1)
    difference = fused.float() - native
    return (difference.square().mean().sqrt() / native.std()).item()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _scaled_hidden_states(model: PreTrainedModel, factor: torch.Tensor) -> Iterator[None]:
    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    hook = model.base_model.register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()


# --- the labels -------------------------------------------------------------------------------------------------------


def check_trained_tokens(dataset: Dataset, expected: int) -> None:
    """Check that a trainer's prepared dataset trains on as many tokens as were handed to it.

    Args:
        dataset: `trainer.train_dataset`, packed or not, with a column `labels`.
        expected: the number of labels that are not -100 before.

    Raises:
        GuardError: tokens were lost, or masked and unmasked.
    """
    labels = pc.list_flatten(dataset.with_format("arrow")["labels"])
    found = pc.sum(pc.not_equal(labels, IGNORE_INDEX)).as_py() or 0
    if found != expected:
        raise GuardError(
            f"{expected} tokens of the conversations are to be trained on, but {found} reached the trainer: TRL cut or "
            "masked the rest. Check max_length and packing_strategy."
        )


def check_same_data(data: DataReport, eval_data: DataReport | None) -> None:
    """Check that all processes have the same conversations: each reads its own disk, and the Hub at its own time.

    With other rows to train on they would train on something else; with another number of rows to evaluate on, those
    that have more would wait for the others for ever. Every process of a run has to call it.

    Args:
        data: what became of this process's training rows.
        eval_data: of its evaluation rows, if it has some.

    Raises:
        GuardError: they differ. Raised on every process.
    """
    mine = [None if report is None else (report.taken, report.digest) for report in (data, eval_data)]
    everyones = gather_object([mine])
    for what, found in zip(("data", "evaluation data"), zip(*everyones, strict=True), strict=True):
        others = [rank for rank, one in enumerate(found) if one != found[0]]
        if others:
            raise GuardError(
                f"process {others[0]} has other {what} ({_rows(found[others[0]])}) than process 0 "
                f"({_rows(found[0])}). Do all machines see the same files? Name a dataset of the Hub with its commit, "
                "OWNER/NAME@COMMIT."
            )


def _rows(found: tuple[int, str] | None) -> str:
    return "none" if found is None else f"{found[0]} rows, digest {found[1]}"


__all__ = ["FusedLossGuard", "GuardError", "check_same_data", "check_trained_tokens", "fused_loss_gap"]
