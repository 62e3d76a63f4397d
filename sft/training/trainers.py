# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is particular to each `trainer` of a recipe: its data, its class of TRL, and what its record says.

[`TRAINERS`] is the one table; [`sft.training.recipe`] has the other half, the keys that each takes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer, SFTConfig

from growth.training.record import digest_examples
from sft import tokenizer as tokenizers
from sft.data.dataset import prepare_dataset
from sft.data.labels import DataReport
from sft.training.dpo import prepare_preferences
from sft.training.guards import check_trained_tokens
from sft.training.recipe import Recipe
from sft.training.trainer import PreferenceTrainer, WeightedSFTTrainer, arrange

AnyTrainer = WeightedSFTTrainer | DPOTrainer
Prepared = tuple[Dataset, DataReport]


@dataclasses.dataclass(frozen=True)
class TrainerKind:
    """One of the choices of `trainer`.

    Args:
        prepare: reads and judges files: the recipe, the files, the tokenizer, and whether they are evaluated on.
        build: makes the trainer: the recipe, what loads its model, the arguments that all of TRL's trainers share, and
            what became of the training rows.
        made_from: digests of what the steps are made from beyond the rows; of a built trainer.
        marks_answers: whether the chat template has to mark what the assistant says.
        describe: what the lineage says of the recipe beyond what all trainers say.
    """

    prepare: Callable[[Recipe, str | list[str], PreTrainedTokenizerBase, bool], Prepared]
    build: Callable[[Recipe, Callable[[], PreTrainedModel], Mapping[str, Any], DataReport], AnyTrainer]
    made_from: Callable[[AnyTrainer], dict[str, Any]]
    marks_answers: bool = False
    describe: Callable[[Recipe], dict[str, Any]] = lambda recipe: {"max_length": recipe.training.max_length}


# --- sft --------------------------------------------------------------------------------------------------------------


def _prepare_conversations(
    recipe: Recipe, files: str | list[str], tokenizer: PreTrainedTokenizerBase, evaluation: bool
) -> Prepared:
    args, data = recipe.training, recipe.data
    assert isinstance(args, SFTConfig)
    packing = args.packing if not evaluation or args.eval_packing is None else args.eval_packing
    # The other strategies put what overflows into the next row instead of cutting it.
    whole = packing and args.packing_strategy != "bfd"
    dataset, report = prepare_dataset(
        files,
        tokenizer,
        max_length=None if whole else args.max_length,
        assistant_only_loss=data.assistant_only_loss,
        last_turn_only=data.last_turn_only,
        allow_rejects=data.allow_rejects,
        num_proc=args.dataset_num_proc,
    )
    return arrange(dataset, args, packing=packing), report


def _build_sft(
    recipe: Recipe, load: Callable[[], PreTrainedModel], common: Mapping[str, Any], report: DataReport
) -> WeightedSFTTrainer:
    trainer = WeightedSFTTrainer(model=load(), base_width=recipe.run.mup_base_width, **common)
    check_trained_tokens(trainer.train_dataset, expected=report.trained_tokens)
    return trainer


def _token_digest(trainer: AnyTrainer) -> dict[str, Any]:
    return {"token_ids": digest_examples(trainer.train_dataset)["data"]["digest"]}


# --- dpo --------------------------------------------------------------------------------------------------------------


def _prepare_pairs(
    recipe: Recipe, files: str | list[str], tokenizer: PreTrainedTokenizerBase, evaluation: bool
) -> Prepared:
    return prepare_preferences(
        files, tokenizer, max_length=recipe.training.max_length, allow_rejects=recipe.data.allow_rejects
    )


def _build_dpo(
    recipe: Recipe, load: Callable[[], PreTrainedModel], common: Mapping[str, Any], report: DataReport
) -> DPOTrainer:
    args: Any = recipe.training
    # The model as it was; an adapter has it in the model that is trained.
    has_reference = not recipe.model.use_peft and not args.precompute_ref_log_probs
    return PreferenceTrainer(load(), load() if has_reference else None, **common)


def _tokenizer_digest(trainer: AnyTrainer) -> dict[str, Any]:
    """Of rows that TRL tokenizes, in columns of its own."""
    tokenizer: Any = trainer.processing_class
    return {"tokenizer": tokenizers.tokenizer_digest(tokenizer), "chat_template": tokenizer.chat_template}


TRAINERS = {
    "sft": TrainerKind(_prepare_conversations, _build_sft, _token_digest, marks_answers=True),
    "dpo": TrainerKind(_prepare_pairs, _build_dpo, _tokenizer_digest),
}

__all__ = ["TRAINERS", "AnyTrainer", "TrainerKind"]
