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
from trl import DPOTrainer, KTOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from growth.training.mup import MupMixin
from growth.training.parallel import read_parallelism
from growth.training.saving import CheckpointMixin
from sft.training.recipe import RecipeError
from sft.training.watch import WatchMixin

WEIGHTS = "weights"
SOURCES = "sources"


class WeightedSFTTrainer(WatchMixin, CheckpointMixin, MupMixin, SFTTrainer):
    """An SFTTrainer that honours a column `weights` and, given a `base_width`, trains under muP.

    A column `sources` has for each token the index of its source in `source_names`; the loss of each is logged.

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
        columns = {name for dataset in datasets if dataset is not None for name in dataset.column_names}
        if WEIGHTS in columns and _cuts_rows():
            raise ValueError(
                "messages have weights, and accelerate's file cuts rows into parts (cp_size or sp_size), of which the "
                "labels are shifted and the weights are not; take tp, fsdp2 or zero3, or leave out the weights."
            )
        if columns & {WEIGHTS, SOURCES} and not _cuts_rows():
            # TRL takes no collator where rows are flattened, and makes the right one of its own.
            self.data_collator = WeightCollator(**vars(self.data_collator))
            model: Any = self.model
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            weigh_log_probs(base, self._count_sources if SOURCES in columns else None)
        if WEIGHTS in columns and (self.args.loss_type != "nll" or self.args.label_smoothing_factor):
            raise ValueError(
                f"messages have weights, and loss_type is {self.args.loss_type} with label_smoothing_factor "
                f"{self.args.label_smoothing_factor}; weights need nll and 0."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        ours = () if _cuts_rows() else (WEIGHTS, SOURCES)  # of parts of rows the losses of sources are not told
        self._signature_columns: Any = list(dict.fromkeys([*columns, *ours]))

    def _count_sources(self, outputs: Any, sources: torch.Tensor) -> None:
        """Count the losses of a batch to their sources, from the log-probabilities that the loss is made of."""
        if self.model.training:
            self.add_source_losses(-outputs.log_probs.detach(), sources[:, 1:], outputs.label_mask)


def _cuts_rows() -> bool:
    """Whether each process computes with a part of each row."""
    whole = read_parallelism(os.environ)
    return whole.context * whole.sequence > 1


class PreferenceTrainer(WatchMixin, CheckpointMixin, DPOTrainer):
    """A DPOTrainer that saves whole models where they are sharded."""


class LikingTrainer(WatchMixin, CheckpointMixin, KTOTrainer):
    """A KTOTrainer that saves whole models where they are sharded."""


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
    # By one process: where the parts of several meet, other rows would share a pack.
    packed = pack_dataset(dataset, args.max_length, args.packing_strategy)
    # The packs of a batch come longest first.
    return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed


@dataclass
class WeightCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with `weights` and `sources` [batch, length] beside the labels; 0 where there is padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of `input_ids`, `labels`, and perhaps `weights` and `sources`."""
        batch = super().torch_call(examples)
        for column, dtype in ((WEIGHTS, torch.float32), (SOURCES, torch.int64)):
            if column not in examples[0]:
                continue
            rows = [torch.tensor(example[column], dtype=dtype) for example in examples]
            if self.padding_free:
                rows = [torch.cat(rows)]
            batch[column] = pad(rows, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
        return batch


def weigh_log_probs(model: nn.Module, count: Callable[[Any, torch.Tensor], None] | None = None) -> None:
    """Let a model with TRL's fused head take `weights` and `sources`, [batch, length], beside `labels`.

    The weight at a position goes with the label there, so the fused head's `log_probs` [batch, length - 1], which are
    those of the labels from the second on, are multiplied by the weights from the second on.

    Args:
        model: that is patched.
        count: called with the outputs, after that, and the sources. TRL's loss hands no outputs on without computing
            the logits again.
    """
    fused: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: nn.Module,
        *args: Any,
        weights: torch.Tensor | None = None,
        sources: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = fused(*args, **kwargs)
        if weights is not None and kwargs.get("fused_lm_head"):
            outputs.log_probs = outputs.log_probs * weights[:, 1:].to(outputs.log_probs.device)
        if sources is not None and count is not None and kwargs.get("fused_lm_head"):
            count(outputs, sources.to(outputs.log_probs.device))
        return outputs

    model.forward = types.MethodType(forward, model)


__all__ = [
    "SOURCES",
    "WEIGHTS",
    "LikingTrainer",
    "PreferenceTrainer",
    "WeightCollator",
    "WeightedSFTTrainer",
    "arrange",
    "weigh_log_probs",
]
