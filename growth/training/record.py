# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The record of what a Trainer trained: what the lineage says of the run, beside the final model and every checkpoint.

A step that trains on text is called `train` in a lineage:

    initial_weights         `random`, of pretraining from nothing; `parent`
    steps, tokens           that were done; all tokens that were read, null if a part of the run did not count them
    data                    examples and their tokens, and a digest of the token ids of all, in order
    sequence_length         tokens of an example
    batch_size              examples of a step, over all processes
    learning_rate           its peak; with `mup_base_width`, of a model of that width
    lr_scheduler            type, settings, warmup_steps, and the steps that it is laid out for
    last_learning_rate      with which the last step was made, which a schedule that was laid out anew after it does not
                            say; null where no step of this run, or of its checkpoint, tells
    continued_schedule      of a run whose rate is that at which the one before stopped: the rate and the steps of that,
                            and the factor on it; null of others
    rewarmed                what is new by the record of the growth, and the steps over which its updates rise; null
                            where all entries move as one
    masks                   alpha of growth's masks before and after; null without masks
    moments                 of Adam when the run began: `grown` with the weights, or `fresh`
    moments_step            the step at which they were: 0 of fresh ones, and of another optimizer than Adam
    dtype, mixed_precision  of the weights while they were trained; what was computed in, `no` if in that
    world_size, distributed_type
    resumed                 whether the run went on from a checkpoint, and whether that was the one of its record
    parent                  see `conversion.checkpoint.parent`
"""

import logging
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType

from conversion.architecture import MODEL_TYPE
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.parent import parent_notes, parent_of, parent_record
from conversion.checkpoint.sources import WEIGHT_FILES, open_checkpoint
from conversion.family import LLAMA
from conversion.hub.saved_model import ADAPTER_WEIGHTS, has_saved_weights, record_saved_model
from conversion.masked import MASKED_MODEL_TYPE

from .grown_adam import AdamStart, LastRate, on_every_process
from .masks import MaskCallback, find_masked_model
from .parallel import data_parallel_size
from .rewarm import RewarmCallback
from .saving import saving

logger = logging.getLogger(__name__)

_ROWS = 1000  # that are digested at once


class RecordCallback(TrainerCallback):
    """Writes the record of every checkpoint that a Trainer saves, and, with `save_model`, that of the final model.

    The record of a checkpoint has samples of its weights, which cost nothing; that of the final model has the digest of
    each tensor. Process 0 writes both, after everything is saved. Where no whole weights were saved there is nothing to
    write one about.

    Args:
        trainer: whose checkpoints they are.
        describe: makes the lineage of the model as it is after some steps; called on process 0.
        origin: folder of the model that is trained, whose licence and language the card keeps.
        base: name of that model, which the card has where it is one of the Hub.
    """

    def __init__(
        self,
        trainer: Trainer,
        describe: Callable[[TrainerState], Mapping[str, Any]],
        *,
        origin: Path | None = None,
        base: str = "",
    ) -> None:
        self.trainer = trainer
        self.origin, self.base = origin, base
        self.describe = describe
        self.counts_all = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out whether the tokens of all steps are counted: an older checkpoint may have none of them."""
        self.counts_all = not state.global_step or state.num_input_tokens_seen > 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record of a checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and has_saved_weights(folder):
            self._write(folder, state, digests=False)

    def save_model(self) -> None:
        """Save the model, and write its record; every process of a run has to call it.

        Raises:
            RunError: it cannot be saved.
        """
        folder = Path(str(self.trainer.args.output_dir))
        before = _written(folder)
        with saving(folder):
            self.trainer.save_model()
            self.trainer.save_state()
        if not self.trainer.is_world_process_zero():
            return
        if _written(folder) == before:
            logger.warning(
                "%s: no weights in the layout of Hugging Face were saved, so there is no record of them; make a model "
                "of its checkpoint with `teleflm convert`",
                folder,
            )
        else:
            self._write(folder, self.trainer.state, digests=True)

    def _write(self, folder: Path, state: TrainerState, *, digests: bool) -> None:
        lineage, seed = dict(self.describe(state)), self.trainer.args.seed
        if "tokens" in lineage and not self.counts_all:
            lineage["tokens"] = None
        try:
            record_saved_model(
                folder,
                lineage,
                seed,
                digests=digests,
                model_types=(MODEL_TYPE, MASKED_MODEL_TYPE, LLAMA.model_type),
                origin=self.origin,
                base=self.base,
            )
        except CheckpointError as error:  # the model is saved, and the other processes go on
            logger.warning("%s is saved, but there is no record of it: %s", folder, error)


def _written(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether the weights of a folder were written again: of a run before, older ones may lie there."""
    paths = (folder / name for name in (*WEIGHT_FILES, ADAPTER_WEIGHTS))
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths if path.is_file()}


def start_record(trainer: Trainer, folder: Path, checkpoint: str | None = None) -> RecordCallback:
    """Give a Trainer of text what writes its records; every process of a run has to call it, before its first step.

    What the records say of the data and of the parent is found out now, so that nothing can fail afterwards, and a
    model that is changed meanwhile is recorded as it was read.

    Args:
        trainer: has its data.
        folder: of the model that it trains.
        checkpoint: the one that is resumed.

    Raises:
        CheckpointError: see [`find_parent`]. Raised on every process if on one.
    """

    def look() -> dict[str, Any]:
        if not trainer.is_world_process_zero():
            return {}
        return {**digest_examples(trainer.train_dataset), **find_parent(folder, checkpoint)}

    made_from = on_every_process(look)
    record = RecordCallback(trainer, lambda state: describe_training(trainer, state, made_from), origin=folder)
    trainer.add_callback(record)
    return record


def find_parent(folder: Path, checkpoint: str | None = None) -> dict[str, Any]:
    """`parent` and `resumed` of the lineage of a run, found out before its first step; process 0 alone needs it.

    A run that is resumed goes on from its checkpoint, so it has the parent that the checkpoint's record names, whatever
    `folder` is; without a record it has the folder's.

    Args:
        folder: of the model.
        checkpoint: the one that is resumed.

    Raises:
        CheckpointError: a checkpoint or its record cannot be read.
    """
    resumed = _find_resumed(Path(checkpoint)) if checkpoint else None
    found: dict[str, Any]
    if resumed is None:
        found = {"parent": parent_of(open_checkpoint(folder)), "resumed": {"record": None} if checkpoint else None}
    else:
        lineage = resumed["lineage"]
        link = {name: resumed[name] for name in ("record", "matches", "mismatch", "edited") if name in resumed}
        found = {"parent": lineage.get("parent"), "resumed": link}
        for note in parent_notes({"parent": resumed}):
            logger.warning("%s: %s", checkpoint, note)
    for note in parent_notes(found):
        logger.warning("%s: %s", folder, note)
    return found


def _find_resumed(checkpoint: Path) -> dict[str, Any] | None:
    """What the record of a checkpoint says of the run, if it has one."""
    record = read_manifest(checkpoint)
    if record is None or record["lineage"].get("operation") != "train":
        return None
    return parent_record(checkpoint, open_checkpoint(checkpoint).tensors if has_saved_weights(checkpoint) else None)


def describe_training(trainer: Trainer, state: TrainerState, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage of a model that a Trainer has trained on blocks of text, see above.

    Args:
        trainer: as it is after the steps.
        state: of it, with the steps.
        made_from: `data`, see [`digest_examples`], and `parent` and `resumed`, see [`find_parent`], or
            `initial_weights`.
    """
    args = trainer.args
    callbacks: Any = trainer.callback_handler.callbacks
    adam = next((callback.first_step for callback in callbacks if isinstance(callback, AdamStart)), None)
    settings = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    continued = getattr(trainer, "continued", None)
    last_rate = next((callback.rate for callback in callbacks if isinstance(callback, LastRate)), None)
    rewarm = next((callback for callback in callbacks if isinstance(callback, RewarmCallback)), None)
    return {
        "operation": "train",
        "steps": state.global_step,
        "tokens": state.num_input_tokens_seen or None,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * data_parallel_size(args),
        "learning_rate": args.learning_rate,
        "mup_base_width": getattr(trainer, "base_width", None),
        "lr_scheduler": {
            "type": SchedulerType(args.lr_scheduler_type).value,
            "settings": settings,
            "warmup_steps": args.get_warmup_steps(state.max_steps),
            "steps": state.max_steps,
        },
        "last_learning_rate": last_rate,
        "continued_schedule": continued.to_record() if continued else None,
        "rewarmed": rewarm.to_record() if rewarm else None,
        "masks": _describe_masks(trainer),
        "moments": "grown" if adam else "fresh",
        "moments_step": adam or 0,
        "dtype": str(next(iter(trainer.model.parameters())).dtype).removeprefix("torch."),  # type: ignore[union-attr]
        "mixed_precision": trainer.accelerator.mixed_precision,
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        **made_from,
    }


def _describe_masks(trainer: Trainer) -> dict[str, Any] | None:
    callbacks: Any = trainer.callback_handler.callbacks
    first = next((callback.first_step for callback in callbacks if isinstance(callback, MaskCallback)), None)
    if first is None:
        return None
    masked = find_masked_model(trainer.model)
    total = masked.config.growth_state["total_steps"]
    return {"start": min(first / total, 1.0), "end": masked.mask_alpha, "steps": total}


def digest_examples(dataset: Any) -> dict[str, Any]:
    """`examples`, `tokens` and `digest` of a dataset, and `sequence_length`, of its longest example.

    Args:
        dataset: rows of `input_ids`: of the library datasets, or a sequence of dictionaries.
    """
    digest, tokens, longest = xxhash.xxh3_128(), 0, 0
    for ids in _rows(dataset):
        row = np.ascontiguousarray(ids, dtype="<i8")
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.data)
        tokens += len(row)
        longest = max(longest, len(row))
    data = {"examples": len(dataset), "tokens": tokens, "digest": digest.hexdigest()}
    return {"data": data, "sequence_length": longest}


def _rows(dataset: Any) -> Any:
    if not hasattr(dataset, "with_format"):
        yield from (row["input_ids"] for row in dataset)
        return
    for batch in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=_ROWS):
        lists = batch.column("input_ids").combine_chunks()
        offsets, values = np.asarray(lists.offsets), np.asarray(lists.values)
        yield from (values[start:end] for start, end in pairwise(offsets))


def count_tokens(args: TrainingArguments) -> None:
    """Have a Trainer count the tokens that all processes read, unless it was told to already."""
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "all"


__all__ = ["RecordCallback", "count_tokens", "describe_training", "digest_examples", "find_parent", "start_record"]
