# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Texts and tasks, measured before the first step and after the last, by the model that is trained.

No second copy of the model is loaded: the one in training is put into evaluation mode, and afterwards it is as it was.
With an adapter the first is the base alone, as its output is zero then, and the second is base and adapter. What is
measured in the end is the model that was saved, whose digests the results have; see [`evaluation.results_file`].
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.results import RESULTS
from conversion.model_identity import model_identity
from evaluation.loaded_scores import score_loaded
from evaluation.measure import Evaluation, describe, evaluate
from evaluation.passages import Passage
from evaluation.results_file import results_of, write_results
from sft import SFTError
from sft.training.run_log import RunLogError, read_history
from sft.training.samples import as_it_was
from sft.training.watch import WatchCallback, WatchMixin

logger = logging.getLogger(__name__)

BASE_RESULTS = "base_eval.json"  # results of the model before training, in the output folder
_DTYPES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}


class MeasureError(SFTError):
    """What is to be measured is refused."""


@dataclass(frozen=True)
class Measured:
    """What texts and tasks are measured.

    Args:
        texts, tasks: files, as `teleflm eval` takes them.
        base: folder of the model before training, with its tokenizer.
        quantized: whether it is trained, and so measured, with other weights than are in that folder.
    """

    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    base: Path
    quantized: bool = False

    def check(self) -> None:
        """Refuse, before a weight is loaded, what could not be measured after hours of training.

        Raises:
            MeasureError: a file cannot be read or cut into passages, or the model has no tokenizer for it.
        """
        try:
            evaluate(self.base, texts=self.texts, tasks=self.tasks, score=_nothing)
        except CheckpointError as error:
            raise MeasureError(f"eval_texts, eval_tasks: {error}") from error


def _nothing(passages: Sequence[Passage]) -> tuple[list[np.ndarray], str]:
    return [np.zeros(passage.scored) for passage in passages], "cpu"


def measure(trainer: Trainer, what: Measured) -> Evaluation:
    """Measure the model of a trainer as it is; every process of a run has to call it.

    Raises:
        CheckpointError: the model gives no finite number, on this process or on another.
    """
    model: Any = trainer.model
    rank, world = trainer.args.process_index, trainer.args.world_size

    def score(passages: Sequence[Passage]) -> tuple[list[np.ndarray], str]:
        mine = range(rank, len(passages), world)
        problem = None
        found: list[np.ndarray] = []
        try:
            with as_it_was(model), torch.no_grad():
                found = score_loaded(model, [passages[index] for index in mine])
        except CheckpointError as error:
            problem = str(error)
        everyones = gather_object([(list(mine), found, problem)]) if world > 1 else [(list(mine), found, problem)]
        for _, _, failed in everyones:
            if failed:
                raise CheckpointError(failed)
        of_all = {index: part for indices, parts, _ in everyones for index, part in zip(indices, parts, strict=True)}
        return [of_all[index] for index in range(len(passages))], model.device.type

    found = evaluate(what.base, texts=what.texts, tasks=what.tasks, dtype=compute_dtype(trainer), score=score)
    if model.dtype != getattr(torch, found.dtype, model.dtype):
        weights = str(model.dtype).removeprefix("torch.")
        note = (
            f"Computed as it was trained, in {found.dtype} with weights in {weights}: `teleflm eval`, which rounds "
            "them to its --dtype, may differ in the last digits."
        )
        found = replace(found, notes=(*found.notes, note))
    return found


class MeasureCallback(TrainerCallback):
    """Measures texts and tasks before the first step and, by [`after`], when the model is saved.

    Attributes:
        found: `before`, `after` -> results. A resumed run has measured `before` in its first session.
    """

    def __init__(self, trainer: WatchMixin, watch: WatchCallback, what: Measured) -> None:
        self.trainer, self.watch, self.what = trainer, watch, what
        self.found: dict[str, dict[str, Any]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the model before training."""
        if state.global_step:
            self.found |= self._earlier()
            return
        with self.trainer.stopwatch.excluded():
            evaluation = measure(self.trainer, self.what)
            self.found["before"] = describe(evaluation)
            self.watch.measured("before", self.found["before"])
            if state.is_world_process_zero:
                with self.watch.harmless("results before training"):
                    write_base_results(evaluation, self.what, self.watch.folder)

    def _earlier(self) -> dict[str, dict[str, Any]]:
        if not self.trainer.is_world_process_zero():
            return {}
        try:
            known = read_history(self.watch.folder).measured
        except RunLogError:
            return {}
        return {"before": known["before"]} if "before" in known else {}

    def after(self) -> None:
        """Measure the model that was just saved; every process has to call it. It is saved: nothing fails any more."""
        with self.watch.harmless("results after training"):
            evaluation = measure(self.trainer, self.what)
            self.found["after"] = describe(evaluation)
            self.watch.measured("after", self.found["after"])
            if self.trainer.is_world_process_zero():
                write_saved_results(evaluation, self.watch.folder, quantized=self.what.quantized)


def compute_dtype(trainer: Trainer) -> str:
    """What the model of a trainer computes in: that of mixed precision, or that of its weights."""
    mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    if mixed:
        return mixed
    model: Any = trainer.model
    return _DTYPES.get(model.dtype, str(model.dtype).removeprefix("torch."))


def check_dtype(dtype: str) -> None:
    """Refuse what results cannot be named after.

    Raises:
        MeasureError: it is none of float64, float32 and bfloat16.
    """
    if dtype not in _DTYPES.values():
        raise MeasureError(
            f"eval_texts, eval_tasks: the model computes in {dtype}, and is measured in "
            f"{', '.join(_DTYPES.values())} only; delete the keys, or train in another dtype."
        )


def write_base_results(evaluation: Evaluation, what: Measured, output: Path) -> None:
    """Write the results before training, with the identity of the base, of which all weights are read for it."""
    identity = None if what.quantized else model_identity(open_checkpoint(what.base))
    output.mkdir(parents=True, exist_ok=True)
    write_results(output / BASE_RESULTS, results_of(replace(evaluation, identity=identity)))


def write_saved_results(evaluation: Evaluation, output: Path, *, quantized: bool = False) -> None:
    """Write the results after training, as `teleflm eval --record` does, with the identity of the saved model.

    A saved adapter is no model, and what was quantized is another one than what is in files: such results name no
    weights, and `teleflm publish` claims them of none.
    """
    identity = None
    if not quantized and (output / "config.json").is_file() and not (output / "adapter_config.json").is_file():
        identity = model_identity(open_checkpoint(output))
    write_results(output / RESULTS, results_of(replace(evaluation, identity=identity)))


__all__ = [
    "BASE_RESULTS",
    "MeasureCallback",
    "MeasureError",
    "Measured",
    "check_dtype",
    "compute_dtype",
    "measure",
    "write_base_results",
    "write_saved_results",
]
