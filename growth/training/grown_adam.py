# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Training on with the moments of Adam that grew with the weights (`growth.moments`), on one process or on many.

The moments are loaded when everything is prepared: before, what prepares a run replaces parameters and leaves their
state behind (accelerate does so under FSDP2, without a word: step 700 becomes step 1). Each process reads what it will
hold from the file, block by block, and nothing else.

Nor is it taken on trust that the state is there when the first step is made: [`check_adam_state`] asks the optimizer.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.numbers import read_count, read_number
from conversion.checkpoint.plan import Box, View
from conversion.checkpoint.reader import FileReader
from conversion.optimizer_state import OPTIMIZER_FILE

from ..moments import AdamState, read_grown_state
from ..spec import lists_state
from .optimizer_layout import Layout, Slot, blocks, innermost, lay_out, local, parameter_shapes

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = 1 << 24  # elements that are read at once
_TRAINED = ("train", "fine-tune")  # beside a checkpoint of a run lies its own optimizer, which names no parameters
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_grown_state(folder: Path) -> Path | None:
    """The optimizer.pt in the folder of a model, or None; every process of a run has to call it.

    Raises:
        CheckpointError: some processes see it, and some do not; or the folder's record knows of none, or of one that is
            not there.
    """
    path = folder / OPTIMIZER_FILE
    seen = _gather(path.is_file())
    if any(seen) != all(seen):
        raise CheckpointError(
            f"{path} is there for {sum(seen)} of the {len(seen)} processes: put it where all of them find the model, "
            "or set fresh_optimizer: true and warm up."
        )
    record = read_manifest(folder)
    if not all(seen):
        if lists_state(record):
            raise CheckpointError(
                f"{path}: is missing, and the folder's record says that it was grown with the weights; restore it, or "
                "set fresh_optimizer: true and warm up."
            )
        return None
    lineage = record["lineage"] if record and record["format"] > 1 else {}
    if lineage and lineage.get("operation") not in _TRAINED and not lists_state(record):
        raise CheckpointError(
            f"{path}: the record of the folder tells of weights without a grown optimizer, so this is another model's; "
            "remove it, or set fresh_optimizer: true and warm up."
        )
    return path


def load_adam_state(optimizer: Any, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give an optimizer the moments of a grown state, whatever its groups are; its own settings stay.

    Every process of a run has to call it, after the run is prepared.

    Args:
        optimizer: Adam or AdamW over parameters of `model`, in whatever wraps it; what state it has is lost.
        model: the grown model, `trainer.model` of a Trainer.
        path: the optimizer.pt of the grown checkpoint.

    Raises:
        CheckpointError: the file does not name its parameters, or is another model's; or the optimizer is not one that
            it can be given to. Raised on every process if on one.
    """
    on_every_process(lambda: _load(lay_out(optimizer, model), read_grown_state(path, parameter_shapes(model))))


def _load(layout: Layout, grown: AdamState) -> None:
    with FileReader() as reader:
        states = {slot.tensor: _state_of(slot, grown, reader) for slot in layout.slots}
    layout.adam.state.clear()
    layout.adam.state.update(states)


def _state_of(slot: Slot, grown: AdamState, reader: FileReader) -> dict[str, torch.Tensor]:
    """What torch's Adam would keep of a tensor, had it come to this point."""
    like = slot.tensor.detach()
    moments = {key: torch.zeros_like(like, memory_format=torch.contiguous_format) for key in _MOMENTS}
    for part in slot.parts:
        for (key, moment), view in zip(moments.items(), grown.moments[part.name], strict=True):
            flat, position = local(moment).view(-1), part.start
            where = f"{grown.file}: {key} of {part.name}"
            for values in _read_blocks(reader, view, part.boxes, like.dtype):
                _refuse_impossible(values, key, where)
                flat[position : position + len(values)].copy_(values)
                position += len(values)
    # On the device of its tensor only where torch's kernels want it there.
    device = like.device if slot.group.get("fused") or slot.group.get("capturable") else "cpu"
    return {"step": torch.tensor(_grown_step(slot, grown), dtype=torch.float32, device=device), **moments}


def _grown_step(slot: Slot, grown: AdamState) -> float:
    """The updates that a stepped tensor has seen; an empty partition of ZeRO steps with the others."""
    steps = {grown.steps[part.name] for part in slot.parts} or set(grown.steps.values())
    if len(steps) > 1:
        raise CheckpointError(
            f"{grown.file}: parameters are at steps {min(steps):g} and {max(steps):g}, but DeepSpeed steps them as one."
        )
    return steps.pop()


def _read_blocks(reader: FileReader, view: View, boxes: tuple[Box, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The elements of some boxes, flat, in order and of a type, as many at once as memory is meant to take."""
    for box in blocks(boxes, _BLOCK):
        values = reader.read(view.window(box)).reshape(-1)
        exact = values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
        yield torch.from_numpy(exact).to(dtype)


# --- the check --------------------------------------------------------------------------------------------------------


def check_adam_state(
    optimizer: Any, model: nn.Module, path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> None:
    """Check that an optimizer holds a grown state, all of it and nothing else, whoever put it there.

    On every process, the step counter of every tensor that it steps; then a checksum of each parameter's moments, over
    all processes, against that of the file. It is a sum of bit patterns: exact, however the elements are spread.

    Every process of a run has to call it. Each reads an equal share of the file.

    Args:
        optimizer, model, path: as of `load_adam_state`.
        device: whose tensors the processes can exchange; `TrainingArguments.device`.

    Raises:
        CheckpointError: the state is another, or lacks parameters. Raised on every process if on one.
    """

    def compare_steps() -> tuple[Layout, AdamState]:
        layout, grown = lay_out(optimizer, model), read_grown_state(path, parameter_shapes(model))
        states = layout.adam.state
        without = [slot for slot in layout.slots if not states.get(slot.tensor, {}).keys() >= {"step", *_MOMENTS}]
        if without:
            raise CheckpointError(
                f"the optimizer has no moments for {len(without)} of the {len(layout.slots)} tensors that it steps, "
                f"expected those of {grown.file}: what prepared the model replaced its parameters after they were "
                "loaded. Set fresh_optimizer: true and warm up."
            )
        for slot in layout.slots:
            found, expected = float(states[slot.tensor]["step"]), _grown_step(slot, grown)
            if found != expected:
                name = slot.parts[0].name if slot.parts else "an empty partition"
                raise CheckpointError(
                    f"the optimizer is at step {found:g} for {name}, expected step {expected:g} of {grown.file}."
                )
        return layout, grown

    layout, grown = on_every_process(compare_steps)
    held, saved = on_every_process(lambda: (_held_checksums(layout), _saved_checksums(layout, grown)))
    everywhere = [_add_up(checksums, device) for checksums in (held, saved)]

    def compare_checksums() -> None:
        for (name, shape), own, all_held, whole in zip(layout.shapes.items(), held, *everywhere, strict=True):
            copies, rest = divmod(all_held[0], whole[0])
            # A process that has all of a parameter answers for itself.
            is_wrong = own[0] == whole[0] and _differ(own, whole, copies=1)
            if rest or not copies or is_wrong or _differ(all_held, whole, copies):
                raise CheckpointError(
                    f"the optimizer's moments of {name}, of shape {shape}, are not those of {grown.file}; set "
                    "fresh_optimizer: true and warm up."
                )

    on_every_process(compare_checksums)


def _held_checksums(layout: Layout) -> list[list[int]]:
    """Elements, and bits of first and of second moments, that this process holds of each parameter."""
    sums = {name: [0, 0, 0] for name in layout.shapes}
    for slot in layout.slots:
        for part in slot.parts:
            sums[part.name][0] += part.numel
            for index, key in enumerate(_MOMENTS, start=1):
                flat = local(layout.adam.state[slot.tensor][key]).reshape(-1)
                sums[part.name][index] += _bits(flat[part.start : part.start + part.numel])
    return list(sums.values())


def _saved_checksums(layout: Layout, grown: AdamState) -> list[list[int]]:
    """The same of the file, for this process's share of the parameters; zeros for the others."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    sums = []
    with FileReader() as reader:
        for index, (name, dtype) in enumerate(layout.dtypes.items()):
            own = [math.prod(layout.shapes[name]), 0, 0] if index % processes == rank else [0, 0, 0]
            for moment, view in enumerate(grown.moments[name] if own[0] else (), start=1):
                blocks_of_it = _read_blocks(reader, view, (Box.whole(view.shape),), dtype)
                own[moment] = sum(map(_bits, blocks_of_it))
            sums.append(own)
    return sums


def _differ(held: list[int], whole: list[int], copies: int) -> bool:
    return any((a - copies * b) % 2**64 for a, b in zip(held, whole, strict=True))


def _bits(values: torch.Tensor) -> int:
    return int(values.contiguous().view(_BITS[values.element_size()]).sum(dtype=torch.int64))


def _add_up(sums: list[list[int]], device: torch.device | str) -> list[list[int]]:
    """Sums over all processes, modulo 2^64."""
    wrapped = [[(value + 2**63) % 2**64 - 2**63 for value in row] for row in sums]
    total = torch.tensor(wrapped, dtype=torch.int64, device=device if _is_distributed() else "cpu")
    if _is_distributed():
        dist.all_reduce(total)
    return total.tolist()


_Result = TypeVar("_Result")


def on_every_process(action: Callable[[], _Result]) -> _Result:
    """Do something on all processes; if it fails on one, fail on all, so that none waits for another that has ended.

    Raises:
        CheckpointError: with the message of the first that failed.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    problems = _gather(None if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None and not isinstance(error, CheckpointError | OSError):
        raise error
    for problem in problems:
        if problem is not None:
            raise CheckpointError(problem) from error
    return cast(_Result, result)


def _gather(value: Any) -> list[Any]:
    """The values of all processes."""
    values = [value]
    if _is_distributed():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


# --- in a Trainer -----------------------------------------------------------------------------------------------------


class AdamStart(TrainerCallback, ExportableState):
    """Keeps in `trainer_state.json` at which of its steps Adam was when the run began: 0, or that of grown moments."""

    def __init__(self) -> None:
        self.first_step: float | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        return {"args": {}, "attributes": {"first_step": self.first_step}}


class LastRate(TrainerCallback, ExportableState):
    """Keeps in `trainer_state.json` the learning rate with which the last step was made: of the first parameter group.

    A schedule that is laid out anew, for a run of another length, says of a step that was made before what it would
    have been.
    """

    def __init__(self) -> None:
        self.rate: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Of a run that is resumed, it is that of its checkpoint until the next step."""
        callbacks: Any = state.stateful_callbacks
        match callbacks:
            case {LastRate.__name__: {"attributes": {"rate": rate}}} if state.global_step and rate is not None:
                self.rate = read_number(rate, "trainer_state.json of the checkpoint: rate of LastRate", least=0.0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note it before the schedule moves on."""
        self.rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        return {"args": {}, "attributes": {"rate": self.rate}}


class GrownAdamCallback(TrainerCallback):
    """Loads grown moments when a run begins, and checks before its first step that they are there.

    A run that is resumed has the state of its checkpoint instead, and its step counters are checked: transformers
    resumes a checkpoint that lacks the optimizer with a fresh one, without a word.

    Args:
        trainer: whose optimizer it is, whenever it is made and whatever wraps it.
        file: optimizer.pt of the grown model; None: the run begins without moments.
    """

    def __init__(self, trainer: Trainer, file: Path | None = None) -> None:
        self.trainer = trainer
        self.file = file
        self.has_begun = False
        self._check: Callable[[], None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the moments, unless a checkpoint's are there.

        Raises:
            CheckpointError: they cannot be loaded.
        """
        optimizer, model = self._trained()
        if state.global_step:
            first_step = _recorded_start(state)
            self._check = partial(_check_resumed, optimizer, first_step, state.global_step, may_skip=args.fp16)
        else:
            steps = held_steps(optimizer)
            if self.file is not None and not steps:
                load_adam_state(optimizer, model, self.file)
                self._check = partial(self._check_grown, args)
                steps = held_steps(optimizer)
            elif self.file is not None and not self.has_begun:
                raise CheckpointError(
                    f"the optimizer is at step {max(steps):g} before the run begins, so the moments of {self.file} "
                    "are not for it; set fresh_optimizer: true."
                )
            first_step = max(steps, default=0.0)
        self.has_begun = True
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, AdamStart):
                callback.first_step = first_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the state before the first step.

        Raises:
            CheckpointError: the optimizer does not hold it.
        """
        if self._check is not None:
            self._check()
            self._check = None

    def _trained(self) -> tuple[Any, Any]:
        return self.trainer.optimizer, self.trainer.model

    def _check_grown(self, args: TrainingArguments) -> None:
        optimizer, model = self._trained()
        check_adam_state(optimizer, model, cast(Path, self.file), args.device)
        logger.info("Adam goes on from step %g, with the moments of %s", max(held_steps(optimizer)), self.file)


def held_steps(optimizer: Any) -> set[float]:
    """The step counters of what a torch optimizer steps, whatever wraps it; none if it has no state for that.

    What it has for other tensors is left over from before they were replaced. Between steps ZeRO 3 names none.
    """
    adam = innermost(optimizer)
    stepped = [tensor for group in adam.param_groups for tensor in group["params"]] or list(adam.state)
    states = (adam.state.get(tensor, {}) for tensor in stepped)
    return {_as_number(state["step"]) for state in states if isinstance(state, dict) and "step" in state}


def _as_number(step: Any) -> float:
    try:
        return float(step)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"the optimizer has a step that is no number: {one_line(error)}.") from None


def _recorded_start(state: TrainerState) -> float | None:
    """At which of its steps Adam was when a run began that is resumed now; None: not known."""
    callbacks: Any = state.stateful_callbacks  # by name, although declared a list
    match callbacks:
        case {AdamStart.__name__: {"attributes": {"first_step": first}}} if first is not None:
            return float(read_count(first, "trainer_state.json of the checkpoint: first_step of AdamStart"))
    return None


def _check_resumed(optimizer: Any, first_step: float | None, global_step: int, *, may_skip: bool) -> None:
    """Check that an Adam goes on where its checkpoint ended.

    Args:
        optimizer: as it is after the checkpoint was loaded.
        first_step: at which the run began; None: not known.
        global_step: the steps that the run had done.
        may_skip: whether some of them may have left the weights as they were, as overflows in float16 do.
    """

    def check() -> None:
        adam = innermost(optimizer)
        if not isinstance(adam, torch.optim.Adam):
            return
        tensors = [tensor for group in adam.param_groups for tensor in group["params"]]
        found = held_steps(optimizer)
        last = None if first_step is None else first_step + global_step
        fits = last is None or found == {last} or (may_skip and max(found, default=0) <= last)
        if not found or any("step" not in adam.state.get(tensor, {}) for tensor in tensors) or not fits:
            expected = "a state" if last is None else f"step {last:g}"
            has = f"is at step {max(found):g}" if found else "has no state"
            raise CheckpointError(
                f"the checkpoint is of step {global_step}, but the optimizer {has} after loading it, expected "
                f"{expected}: the checkpoint lacks its optimizer or is another run's. To begin anew from its weights, "
                "name it as model_name_or_path, without resume_from_checkpoint."
            )

    on_every_process(check)


def check_loaded_moments(optimizer: Any) -> None:
    """Check that what torch loaded as moments of an Adam are such: it takes whatever there is.

    Every process of a run has to call it; each looks at what it holds.

    Args:
        optimizer: whatever wraps it; of another kind than torch's Adam nothing is looked at.

    Raises:
        CheckpointError: one has another shape than its weight, holds a NaN, or is a second one and negative. Raised on
            every process if on one.
    """
    adam = innermost(optimizer)
    stepped = [tensor for group in adam.param_groups for tensor in group["params"]] or list(adam.state)

    def check() -> None:
        for number, tensor in enumerate(stepped):
            state = adam.state.get(tensor) or {}
            for key in (key for key in _MOMENTS if key in state):
                _check_loaded(state[key], tensor, key, number)

    on_every_process(check if isinstance(adam, torch.optim.Adam) else lambda: None)


@torch.no_grad()
def _check_loaded(moment: Any, tensor: torch.Tensor, key: str, number: int) -> None:
    where = f"the checkpoint's optimizer: {key} of parameter {number}, of shape {tuple(tensor.shape)},"
    if not isinstance(moment, torch.Tensor) or moment.shape != tensor.shape or not moment.is_floating_point():
        shape = f"shape {tuple(moment.shape)}" if isinstance(moment, torch.Tensor) else "no shape"
        raise CheckpointError(f"{where} has {shape}: the file is damaged; name another checkpoint.")
    held = local(moment)
    if held.numel():
        _refuse_impossible(held, key, where)


def _refuse_impossible(moment: torch.Tensor, key: str, where: str) -> None:
    """Refuse values that no Adam has: no number, or a mean of squares below zero. In one pass, without a copy."""
    low = float(moment.min())
    if math.isnan(low) or (key == _MOMENTS[1] and low < 0):
        what = "no number" if math.isnan(low) else f"{low:g}, and a mean of squares is not negative"
        raise CheckpointError(f"{where} holds {what}: no optimizer goes on from that; leave that state out.")


__all__ = [
    "AdamStart",
    "GrownAdamCallback",
    "LastRate",
    "check_adam_state",
    "check_loaded_moments",
    "find_grown_state",
    "held_steps",
    "load_adam_state",
    "on_every_process",
]
