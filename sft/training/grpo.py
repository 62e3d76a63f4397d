# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""TRL's GRPOTrainer for a model that is built here.

GRPO samples `num_generations` completions of each prompt, has reward functions judge them ([`sft.rewards`]), and makes
those more likely that were judged better than the others of their prompt. Completions are sampled by the model's own
forward pass; log-probabilities come from TRL's fused head, as in the other trainers, at the temperature that is sampled
with, and are guarded likewise ([`sft.training.guards`]). Rows of the vocabulary that the tokenizer has no piece for are
never sampled, though log-probabilities count them.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler

from growth.training.saving import CheckpointMixin
from sft.rewards.reward import Reward
from sft.training.watch import WatchMixin

logger = logging.getLogger(__name__)


class PolicyTrainer(WatchMixin, CheckpointMixin, GRPOTrainer):
    """A GRPOTrainer that saves whole models where they are sharded, and is told its reference model.

    Args:
        load: loads the model that is trained; called again for the reference, which `beta` pulls towards.
        rewards: its reward functions.
        **kwargs: of GRPOTrainer.
    """

    def __init__(self, *, load: Callable[[], PreTrainedModel], rewards: Sequence[Reward], **kwargs: Any) -> None:
        with _loading_references_by(load):
            super().__init__(load(), list(rewards), **kwargs)
        self._sample_only_what_decodes()
        self.add_callback(_RoundGuard())

    def _sample_only_what_decodes(self) -> None:
        """A published model has more embeddings than its tokenizer has pieces, and any of them may be sampled."""
        model: Any = self.model
        asked = self.generation_kwargs.get("suppress_tokens") or []
        tokenizer: Any = self.processing_class
        suppressed = sorted({*asked, *range(len(tokenizer), model.config.vocab_size)})
        if suppressed:
            self.generation_kwargs["suppress_tokens"] = suppressed
            self.generation_config.suppress_tokens = suppressed

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        trls = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return _EpochSampler(**{name: getattr(trls, name) for name in names})


class _EpochSampler(RepeatSampler):
    """TRL's sampler, whose order of prompts follows from the seed and the epoch.

    TRL's own follows from the seed and how many epochs this process has begun, so that a run that is resumed in its
    second epoch would go through the first one's order again. The first epoch is as TRL's.
    """

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer as an epoch begins."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


@contextmanager
def _loading_references_by(load: Callable[[], PreTrainedModel]) -> Iterator[None]:
    """TRL loads a reference by name, without revision or kernels, and of a class that only transformers knows."""
    original = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *args, **kwargs: load()
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original


class _RoundGuard(TrainerCallback):
    """Says when a resumed run begins amid completions that its checkpoint does not hold."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if so."""
        assert isinstance(args, GRPOConfig)
        round_steps = steps_of_round(args)
        if state.global_step % round_steps:
            logger.warning(
                "step %d is amid a round of %g steps that share their completions, which no checkpoint holds: they are "
                "sampled anew, and the run is not the one that would have gone on. Let save_steps be a multiple of %g.",
                state.global_step,
                round_steps,
                round_steps,
            )


def steps_of_round(args: GRPOConfig) -> float:
    """Optimizer steps that learn from the same sampled completions; 1 unless asked otherwise."""
    return int(args.steps_per_generation or 1) * args.num_iterations / args.gradient_accumulation_steps


__all__ = ["PolicyTrainer", "steps_of_round"]
