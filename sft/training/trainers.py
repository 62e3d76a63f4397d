# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is particular to each `trainer` of a recipe: its data, its class of TRL, and what its record says.

[`TRAINERS`] is the one table; [`sft.training.recipe`] has the other half, the keys that each takes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, SFTConfig

from growth.training.record import digest_examples
from sft import tokenizer as tokenizers
from sft.data.cache import Cache, default_folder
from sft.data.dataset import Arrangement, Evaluation, Loader, load_run_data
from sft.data.examples import prepare_examples
from sft.data.labels import DataError, DataReport, Labelling
from sft.data.preferences import LabelledJudge, PairJudge
from sft.data.prompts import PromptJudge
from sft.data.sources import as_places
from sft.rewards.reward import Reward
from sft.rewards.spec import load_rewards, parse_rewards
from sft.training.grpo import PolicyTrainer
from sft.training.guards import check_trained_tokens
from sft.training.recipe import Recipe
from sft.training.trainer import LikingTrainer, PreferenceTrainer, WeightedSFTTrainer, arrange

AnyTrainer = WeightedSFTTrainer | PreferenceTrainer | LikingTrainer | PolicyTrainer
Prepared = tuple[Dataset, DataReport]
Loaded = tuple[Dataset, DataReport, Dataset | None, DataReport | None]


def _files(
    prepare: Callable[[Recipe, tuple[str, ...], PreTrainedTokenizerBase, bool], Prepared],
) -> Callable[[Recipe, PreTrainedTokenizerBase], Loaded]:
    """Loads data by what prepares some files, those that are evaluated on as well."""

    def load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Loaded:
        tested, eval_report = None, None
        if recipe.data.eval_data_files:
            tested, eval_report = prepare(recipe, as_places(recipe.data.eval_data_files), tokenizer, True)
        return *prepare(recipe, as_places(recipe.data.data_files or []), tokenizer, False), tested, eval_report

    return load


def _describe_length(recipe: Recipe) -> dict[str, Any]:
    args: Any = recipe.training
    return {"max_length": args.max_length}


@dataclasses.dataclass(frozen=True)
class TrainerKind:
    """One of the choices of `trainer`.

    Args:
        load: reads and judges the data of a recipe: what is trained on and what became of its rows, and likewise what
            is evaluated on, if anything is.
        build: makes the trainer: the recipe, what loads its model, the arguments that all of TRL's trainers share, and
            what became of the training rows.
        made_from: what the steps are made from beyond the rows, as digests; of the recipe and its trainer.
        marks_answers: whether the chat template has to mark what the assistant says.
        describe: what the lineage says of the recipe beyond what all trainers say.
    """

    load: Callable[[Recipe, PreTrainedTokenizerBase], Loaded]
    build: Callable[[Recipe, Callable[[], PreTrainedModel], Mapping[str, Any], DataReport], AnyTrainer]
    made_from: Callable[[Recipe, AnyTrainer], dict[str, Any]]
    marks_answers: bool = False
    describe: Callable[[Recipe], dict[str, Any]] = _describe_length


# --- sft --------------------------------------------------------------------------------------------------------------


def _load_conversations(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    args, data = recipe.training, recipe.data
    assert isinstance(args, SFTConfig)
    eval_files = as_places(data.eval_data_files or [])
    evaluation = None
    if eval_files or data.test_split_size:
        packing = args.packing if args.eval_packing is None else args.eval_packing
        evaluation = Evaluation(
            _arrangement(recipe, args, packing), eval_files, data.test_split_size, data.drop_eval_overlap
        )
    cache = Cache(Path(data.dataset_cache_dir) if data.dataset_cache_dir else default_folder())
    return load_run_data(
        data.sources,
        _arrangement(recipe, args, args.packing),
        evaluation,
        Loader(cache, tokenizer, data.allow_rejects, args.dataset_num_proc),
        seed=args.seed if args.data_seed is None else args.data_seed,
    )


def _arrangement(recipe: Recipe, args: SFTConfig, packing: bool) -> Arrangement:
    """How rows are tokenized, shuffled and packed."""
    data = recipe.data
    # The other strategies put what overflows into the next row instead of cutting it.
    whole = packing and args.packing_strategy != "bfd"
    labelling = Labelling(
        None if whole else args.max_length,
        data.assistant_only_loss,
        data.last_turn_only,
        data.sanitize_control_tokens,
    )
    if not packing and not args.shuffle_dataset:
        return Arrangement(labelling, None, {})
    settings: dict[str, Any] = {"shuffle": args.seed} if args.shuffle_dataset else {}
    if packing:
        settings |= {"packing": args.packing_strategy, "max_length": args.max_length}
    return Arrangement(labelling, partial(arrange, args=args, packing=packing), settings)


def _build_sft(
    recipe: Recipe, load: Callable[[], PreTrainedModel], common: Mapping[str, Any], report: DataReport
) -> WeightedSFTTrainer:
    trainer = WeightedSFTTrainer(model=load(), base_width=recipe.run.mup_base_width, **common)
    check_trained_tokens(trainer.train_dataset, expected=report.trained_tokens)
    return trainer


def _token_digest(recipe: Recipe, trainer: AnyTrainer) -> dict[str, Any]:
    return {"token_ids": digest_examples(trainer.train_dataset)["data"]["digest"]}


# --- dpo, kto ---------------------------------------------------------------------------------------------------------


def _prepare_answers(
    recipe: Recipe, files: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, evaluation: bool
) -> Prepared:
    args: Any = recipe.training
    judge = PairJudge() if recipe.run.trainer == "dpo" else LabelledJudge()
    return prepare_examples(
        files, judge, tokenizer, max_length=args.max_length, allow_rejects=recipe.data.allow_rejects
    )


def _build_preferences(
    recipe: Recipe, load: Callable[[], PreTrainedModel], common: Mapping[str, Any], report: DataReport
) -> PreferenceTrainer | LikingTrainer:
    args: Any = recipe.training
    # The model as it was; an adapter has it in the model that is trained.
    has_reference = not recipe.model.use_peft and not args.precompute_ref_log_probs
    kind = PreferenceTrainer if recipe.run.trainer == "dpo" else LikingTrainer
    return kind(load(), load() if has_reference else None, **common)


def _tokenizer_digest(recipe: Recipe, trainer: AnyTrainer) -> dict[str, Any]:
    """Of rows that TRL tokenizes, in columns of its own."""
    tokenizer: Any = trainer.processing_class
    return {"tokenizer": tokenizers.tokenizer_digest(tokenizer), "chat_template": tokenizer.chat_template}


# --- grpo -------------------------------------------------------------------------------------------------------------


def _rewards(recipe: Recipe) -> list[Reward]:
    args = recipe.training
    assert isinstance(args, GRPOConfig)
    rewards = load_rewards(parse_rewards(recipe.run.reward_funcs))
    for reward, weight in zip(rewards, args.reward_weights or [1.0] * len(rewards), strict=True):
        reward.weight = float(weight)
    return rewards


def _prepare_prompts(
    recipe: Recipe, files: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, evaluation: bool
) -> Prepared:
    args, rewards = recipe.training, _rewards(recipe)
    assert isinstance(args, GRPOConfig)
    assert not isinstance(args.chat_template_kwargs, str), "TRL reads it as JSON"
    for reward in rewards:
        reward.check()
    judge = PromptJudge(
        rewards,
        max_completion_length=args.max_completion_length,
        max_positions=tokenizers.max_positions(str(recipe.model.model_name_or_path), recipe.model.model_revision),
        template_kwargs=args.chat_template_kwargs,
    )
    dataset, report = prepare_examples(
        files, judge, tokenizer, max_length=None, allow_rejects=recipe.data.allow_rejects
    )
    # TRL samples whole batches of prompts, and would train on none of what is left over.
    prompts = int(args.generation_batch_size or 0) // int(args.num_generations or 1)
    if not evaluation and len(dataset) < prompts:
        raise DataError(
            f"{len(dataset)} prompts, but {prompts} are sampled from at once (per_device_train_batch_size x processes "
            "x steps_per_generation / num_generations): no batch is full. Lower one of them, or give more prompts."
        )
    return dataset, report


def _build_grpo(
    recipe: Recipe, load: Callable[[], PreTrainedModel], common: Mapping[str, Any], report: DataReport
) -> PolicyTrainer:
    return PolicyTrainer(load=load, rewards=_rewards(recipe), **common)


def _reward_digests(recipe: Recipe, trainer: AnyTrainer) -> dict[str, Any]:
    rewards = [reward.describe() for reward in _rewards(recipe)]
    return {**_tokenizer_digest(recipe, trainer), "reward_funcs": rewards}


def _describe_grpo(recipe: Recipe) -> dict[str, Any]:
    args = recipe.training
    assert isinstance(args, GRPOConfig)
    names = ("max_completion_length", "num_generations", "num_iterations", "temperature", "beta", "loss_type")
    rewards = [reward.describe() for reward in _rewards(recipe)]
    return {
        **{name: getattr(args, name) for name in names},
        "reward_funcs": rewards,
        "reward_weights": args.reward_weights,
    }


TRAINERS = {
    "sft": TrainerKind(_load_conversations, _build_sft, _token_digest, marks_answers=True),
    "dpo": TrainerKind(_files(_prepare_answers), _build_preferences, _tokenizer_digest),
    "kto": TrainerKind(_files(_prepare_answers), _build_preferences, _tokenizer_digest),
    "grpo": TrainerKind(_files(_prepare_prompts), _build_grpo, _reward_digests, describe=_describe_grpo),
}

__all__ = ["TRAINERS", "AnyTrainer", "TrainerKind"]
