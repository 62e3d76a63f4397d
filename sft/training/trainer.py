# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""TRL's SFTTrainer with a weight for every token, and the learning rates of muP.

TRL 1.16 has no place for weights: its loss is the mean of the tokens whose label is not -100. Its fused head, though,
returns a log-probability for each token, and everything after it is linear in these. So they are multiplied there
([`weigh_log_probs`]), and what TRL and transformers do with them stays as it is: the number of trained tokens of all
micro-batches and all processes divides their sum. With weights w the loss of a step is

    sum(w * -log_prob) / count(label != -100)

so a weight of 1 is a token as without weights, and of 0.5 half of one. The weights of a batch are not divided by their
sum, as `torch.nn.functional.cross_entropy` would: a row that is alone in its batch would then lose its weight.
"""

import functools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from trl import DPOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from growth.training.mup import MupMixin
from growth.training.parallel import read_parallelism
from growth.training.sharded import ShardedSaveMixin
from sft.training.recipe import RecipeError

WEIGHTS = "weights"


class WeightedSFTTrainer(ShardedSaveMixin, MupMixin, SFTTrainer):
    """An SFTTrainer that honours a column `weights` and, given a `base_width`, trains under muP.

    Args:
        base_width: see [`growth.training.mup.MupMixin`].
        **kwargs: of SFTTrainer. The datasets have `input_ids`, `labels` and, all of them or none, `weights`: lists of
            one length. They are trained on as they are, so `args.dataset_kwargs` says `skip_prepare_dataset`.

    Raises:
        ValueError: there are weights, and `args` asks for a loss that they would not reach.
    """

    def __init__(self, *, base_width: int | None = None, **kwargs: Any) -> None:
        super().__init__(base_width=base_width, **kwargs)
        datasets: list[Any] = [self.train_dataset, self.eval_dataset]
        if not any(WEIGHTS in dataset.column_names for dataset in datasets if dataset is not None):
            return
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor:
            raise ValueError(
                f"messages have weights, and loss_type is {self.args.loss_type} with label_smoothing_factor "
                f"{self.args.label_smoothing_factor}; weights need nll and 0."
            )
        if (whole := read_parallelism(os.environ)).context * whole.sequence > 1:
            raise ValueError(
                "messages have weights, and accelerate's file cuts rows into parts (cp_size or sp_size), of which the "
                "labels are shifted and the weights are not; take tp, fsdp2 or zero3, or leave out the weights."
            )
        # TRL takes no collator where rows are flattened, and makes the right one of its own.
        self.data_collator = WeightCollator(**vars(self.data_collator))
        model: Any = self.model
        weigh_log_probs(model.get_base_model() if isinstance(model, PeftModel) else model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, WEIGHTS]))


class PreferenceTrainer(ShardedSaveMixin, DPOTrainer):
    """A DPOTrainer that saves whole models where they are sharded."""


def arrange(dataset: Dataset, args: SFTConfig, *, packing: bool) -> Dataset:
    """Shuffle and pack tokenized rows as `args` says, with every column there is; SFTTrainer would drop the weights.

    Packing fills rows of `args.max_length` with whole conversations (`packing_strategy: bfd`), and keeps their lengths
    in `seq_lengths`, from which their positions, and by these the borders of attention, are made.

    Raises:
        RecipeError: `args.max_length` is None, and packing needs one.
    """
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    if not packing:
        return dataset
    if args.max_length is None:
        raise RecipeError("packing is True and max_length is null; packed rows need a length.")
    packed = pack_dataset(dataset, args.max_length, args.packing_strategy, {"num_proc": args.dataset_num_proc})
    # The packs of a batch come longest first.
    return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed


@dataclass
class WeightCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with `weights` [batch, length] beside the labels; 0 where there is padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of `input_ids`, `labels` and perhaps `weights`."""
        batch = super().torch_call(examples)
        if WEIGHTS not in examples[0]:
            return batch
        weights = [torch.tensor(example[WEIGHTS], dtype=torch.float32) for example in examples]
        if self.padding_free:
            weights = [torch.cat(weights)]
        batch[WEIGHTS] = pad(weights, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
        return batch


def weigh_log_probs(model: nn.Module) -> None:
    """Let a model with TRL's fused head take `weights` [batch, length] beside `labels`.

    The weight at a position goes with the label there, so the fused head's `log_probs` [batch, length - 1], which are
    those of the labels from the second on, are multiplied by the weights from the second on.
    """
    fused: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, weights: torch.Tensor | None = None, **kwargs: Any) -> Any:
        outputs = fused(*args, **kwargs)
        if weights is not None and kwargs.get("fused_lm_head"):
            outputs.log_probs = outputs.log_probs * weights[:, 1:].to(outputs.log_probs.device)
        return outputs

    model.forward = types.MethodType(forward, model)


__all__ = ["WEIGHTS", "PreferenceTrainer", "WeightCollator", "WeightedSFTTrainer", "arrange", "weigh_log_probs"]
