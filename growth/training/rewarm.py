# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a growth added warms up, and what was there goes on: a factor on the updates of new entries alone.

Old and new entries lie in the same tensors, so no parameter group tells them apart. Over the first N steps an entry w
that is new moves by a share of what the optimizer does to it,

    w <- w + (k + 1) / N (w' - w)        in step k = 0, 1, ..., N - 1, where the optimizer alone would make it w'

and old entries are not touched at all. A share of the update, and not of the gradient: Adam divides by the size of the
gradients, and would undo that. Decoupled weight decay is a part of the update. Moments and step counters are the
optimizer's own, of whole gradients. The schedule of the learning rate multiplies all of it.

Warming up again after a growth is found to help (SPARKLING, arXiv 2602.02472); warming up only what is new is the
asymmetric form of that. While it lasts, each step keeps a copy of the new entries that a process holds, from before the
optimizer's step until after it: their bytes in the dtype of the weights (4 a new entry in float32), spread as the
parameters are; in the last of the N steps and after it nothing.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.plan import Box
from conversion.mapping import weights

from ..new_entries import new_entries, read_growth
from .beginning import check_step, steps_before
from .errors import RunError
from .grown_adam import on_every_process
from .optimizer_layout import Slot, innermost, lay_out, local

logger = logging.getLogger(__name__)

_KEY = "rewarm_new_steps"
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class NewParts:
    """What is new of a model, by the record of its growth.

    Args:
        boxes: of each parameter, the entries that are new, as boxes of its shape that share none.
        shapes: of the parameters.
    """

    boxes: Mapping[str, tuple[Box, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def numel(self) -> int:
        """New entries in all."""
        return sum(box.numel for boxes in self.boxes.values() for box in boxes)


def find_new_parts(folder: Path, shapes: Mapping[str, tuple[int, ...]], checkpoint: str | None = None) -> NewParts:
    """What the growth added with which a model was made that has not been trained since.

    Args:
        folder: of the model.
        shapes: of its parameters, by name.
        checkpoint: the one that the run resumes.

    Raises:
        RunError: no record says what is new, nothing is, or it is not new any more.
        CheckpointError: a record cannot be read, or is of another model.
    """
    before = steps_before(folder, checkpoint)
    steps = [step for step in before if not step.keeps_entries]
    if not steps:
        raise RunError(f"{folder}: no record says what is new in it, as {_KEY} needs; leave that key out.")
    for step in before[: before.index(steps[0]) + 1]:
        check_step(step, folder, _KEY)
    if steps[0].operation != "grow":
        raise RunError(
            f"{folder}: what was done last to it is {steps[0].operation!r}, not a growth, so nothing in it is new, as "
            f"{_KEY} needs; leave that key out."
        )
    if [step.operation for step in steps[1:2]] == ["grow"]:
        raise RunError(
            f"{folder}: grew twice without being trained in between, and {_KEY} knows what the last growth added "
            "alone: grow in one step, or leave that key out."
        )
    growth = read_growth(steps[0].lineage, str(folder))
    expected = {name: weight.shape(growth.target) for name, weight, _ in weights(growth.target)}
    for name, shape in shapes.items():
        if expected.get(name) != shape:
            raise CheckpointError(
                f"{folder}: {name} is of shape {shape}, but of {expected.get(name)} in the model that grew by its "
                "record: the record is another model's."
            )
    boxes = new_entries(growth)
    parts = NewParts({name: boxes[name] for name in shapes}, shapes)
    if not parts.numel:
        raise RunError(f"{folder}: its growth added nothing that it did not copy, so there is nothing for {_KEY}.")
    return parts


def check_optimizer_choice(args: TrainingArguments) -> None:
    """Check what the keys of a run say of its optimizer.

    Raises:
        RunError: it is one whose updates cannot be scaled entry by entry.
    """
    optim = getattr(args.optim, "value", args.optim)
    if args.deepspeed or getattr(args, "deepspeed_plugin", None) is not None:
        raise RunError(
            f"{_KEY} scales what torch's own optimizer does to the parameters, and DeepSpeed steps partitions of its "
            f"own: shard with FSDP 2, or leave {_KEY} out."
        )
    if optim not in _OPTIMIZERS:
        raise RunError(
            f"optim is {optim}, but {_KEY} is for torch's AdamW: set optim: adamw_torch, or leave {_KEY} out."
        )


class RewarmCallback(TrainerCallback):
    """Scales the updates of new entries over the first steps of a run; a run that is resumed goes on in the ramp.

    Args:
        trainer: whose optimizer it is, whenever it is made and whatever wraps it.
        parts: what is new.
        steps: N, after which new entries move as old ones do.
    """

    def __init__(self, trainer: Trainer, parts: NewParts, steps: int) -> None:
        self.trainer = trainer
        self.parts = parts
        self.steps = steps
        self._hooks: list[RemovableHandle] = []
        self._slots: tuple[Slot, ...] = ()
        self._factor = 1.0
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_record(self) -> dict[str, int]:
        """What the record of the run says of it."""
        return {"new_parameters": self.parts.numel, "steps": self.steps}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what of the new entries this process holds.

        Raises:
            RunError: the optimizer is not one whose updates can be scaled entry by entry. Elsewhere than on the process
                that found it, a CheckpointError says so.
        """
        self._leave()
        if state.global_step >= self.steps:
            return
        self._slots = on_every_process(lambda: _find_slots(self.trainer, self.parts))
        optimizer = innermost(self.trainer.optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._keep()),
            optimizer.register_step_post_hook(lambda *_: self._scale()),
        ]
        if state.is_world_process_zero:
            total = sum(math.prod(shape) for shape in self.parts.shapes.values())
            logger.warning(
                "%s of %s parameters are new; their updates rise to whole ones over steps %d to %d",
                f"{self.parts.numel:,}",
                f"{total:,}",
                state.global_step + 1,
                self.steps,
            )
            if state.max_steps < self.steps:
                logger.warning(
                    "training ends at step %d of the %d of %s: a run that begins from its model moves what is new as a "
                    "whole",
                    state.max_steps,
                    self.steps,
                    _KEY,
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the share of the update; from the last step of the ramp on it is all of it."""
        self._factor = (state.global_step + 1) / self.steps
        if self._factor >= 1:
            self._leave()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimizer as it was."""
        self._leave()

    @torch.no_grad()
    def _keep(self) -> None:
        """Copy the new entries. Tensors are looked up now: what shards a model may give its parts another storage."""
        views = (view for slot in self._slots for view in _views(slot, self.parts.boxes))
        self._before = [(view, view.clone()) for view in views]

    @torch.no_grad()
    def _scale(self) -> None:
        for view, before in self._before:
            view.copy_(before.lerp_(view, self._factor))
        self._before = []

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._slots, self._before = [], (), []


def _find_slots(trainer: Trainer, parts: NewParts) -> tuple[Slot, ...]:
    """What torch's optimizer steps here, with where it lies in the parameters."""
    adam = innermost(trainer.optimizer)
    if type(adam) not in (torch.optim.Adam, torch.optim.AdamW):
        raise RunError(
            f"the optimizer is {type(adam).__name__}, but {_KEY} is for torch's AdamW: set optim: adamw_torch, without "
            f"an optimizer in DeepSpeed's configuration, or leave {_KEY} out."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in trainer.model.modules()):  # type: ignore[union-attr]
        raise RunError(f"FSDP 1 steps flat parameters; {_KEY} needs fsdp_version: 2, or leave {_KEY} out.")
    try:
        layout = lay_out(trainer.optimizer, trainer.model)  # type: ignore[arg-type]
    except CheckpointError as error:
        raise RunError(f"{_KEY} needs to know where the entries of each parameter lie: {error}") from error
    for name, shape in layout.shapes.items():
        if parts.shapes.get(name) != shape:
            raise RunError(f"{_KEY}: the optimizer steps {name} in shape {shape}, which is not that of the model.")
    return layout.slots


def _views(slot: Slot, boxes: Mapping[str, Sequence[Box]]) -> list[torch.Tensor]:
    """The new entries of a stepped tensor, as views of what this process holds of it."""
    flat, views = local(slot.tensor.detach()).view(-1), []
    for part in slot.parts:
        position = part.start
        for held in part.boxes:
            block = flat[position : position + held.numel].view(held.size)
            position += held.numel
            shared = (box.intersect(held) for box in boxes[part.name])
            views += [block[box.slices_in(held)] for box in shared if box]
    return views


__all__ = ["NewParts", "RewarmCallback", "check_optimizer_choice", "find_new_parts"]
