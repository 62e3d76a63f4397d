# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Schedules of the learning rate where transformers' own fail: under DeepSpeed, in runs that only warm up, where the
phases of a schedule are not as long as the run, and where a run goes on with another length.

Schedules with a floor ask the optimizer for its `defaults`, which DeepSpeed's does not have: a run with the polynomial
decay of the shipped recipes ended with an AttributeError before its first step (transformers 5.23, deepspeed 0.19).

A rate is set after a step, for the next one, and saved with the optimizer. So a run that went on with another length
made its first step at the rate of the old one. [`follow_schedule`] sets it from the schedule that there is now.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import SchedulerType

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.numbers import plain_value, read_count, read_number, shown
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.torch_file import read_torch_file

from .errors import RunError
from .optimizer_layout import innermost

SCHEDULER = "scheduler.pt"


class ScheduleMixin:
    """Gives a Trainer schedules that can be had under DeepSpeed, and refuses one that would divide by zero."""

    args: Any
    lr_scheduler: Any
    optimizer: Any

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As Trainer.create_scheduler.

        Raises:
            RunError: all steps of a polynomial decay would be warm-up, the phases of `warmup_stable_decay` are not as
                long as the run, or lr_scheduler_kwargs are not those of the schedule.
        """
        if self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        _check_decay(self.args, num_training_steps)
        _check_phases(self.args, num_training_steps)
        _lend_defaults(optimizer if optimizer is not None else self.optimizer)
        try:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        except (TypeError, ValueError) as error:
            kind = SchedulerType(self.args.lr_scheduler_type).value
            raise RunError(
                f"lr_scheduler_kwargs is {self.args.lr_scheduler_kwargs}, which lr_scheduler_type {kind} refuses: "
                f"{one_line(error)}"
            ) from error


def _lend_defaults(optimizer: Any) -> None:
    """Let the optimizers around torch's have its `defaults`."""
    plain = innermost(optimizer)
    while optimizer is not plain:
        if not hasattr(optimizer, "defaults"):
            getattr(optimizer, "optimizer", optimizer).defaults = plain.defaults
        optimizer = optimizer.optimizer


def _check_decay(args: Any, steps: int) -> None:
    warmup = args.get_warmup_steps(steps)
    if SchedulerType(args.lr_scheduler_type) == SchedulerType.POLYNOMIAL and warmup >= steps:
        raise RunError(
            f"warmup_steps is {args.warmup_steps}, {warmup} of {steps} steps, and lr_scheduler_type polynomial: there "
            "is nothing left to decay in. Set warmup_steps: 0, or train for more steps."
        )


def _check_phases(args: Any, steps: int) -> None:
    """Where they do not add up, transformers skips the stable phase, or trains the rest at the lowest rate."""
    if SchedulerType(args.lr_scheduler_type) != SchedulerType.WARMUP_STABLE_DECAY:
        return
    settings = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    warmup, stable, decay = (
        args.get_warmup_steps(steps),
        settings.get("num_stable_steps"),
        settings.get("num_decay_steps"),
    )
    if decay is None:
        raise RunError(
            "lr_scheduler_type warmup_stable_decay needs num_decay_steps in lr_scheduler_kwargs: the steps at the end "
            "in which the rate decays, 0 for none."
        )
    for name, value in (("num_decay_steps", decay), ("num_stable_steps", stable or 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RunError(f"lr_scheduler_kwargs: {name} is {value!r}, expected a number of steps.")
    if warmup + decay > steps or (stable is not None and warmup + stable + decay != steps):
        stable_too = "" if stable is None else f" num_stable_steps {stable},"
        raise RunError(
            f"warmup_steps {warmup},{stable_too} and num_decay_steps {decay} do not fit the {steps} steps of the run; "
            "without num_stable_steps, what they leave is the stable phase."
        )


def check_schedule(checkpoint: Path, scheduler: Any) -> None:
    """Check that what a checkpoint has of a schedule is of this one's kind; torch would take whatever names it has.

    Args:
        checkpoint: folder with the scheduler.pt.
        scheduler: of the run, in whatever wraps it.

    Raises:
        CheckpointError: it is not; names the file and the member.
    """
    path = checkpoint / SCHEDULER
    if not path.is_file():  # as under DeepSpeed, which keeps it in a file of its own
        return
    saved, own, kind = read_torch_file(str(path)), scheduler.state_dict(), type(_innermost(scheduler))
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path} holds {shown(saved)}, expected the state of a schedule.")
    for key, value in saved.items():
        if key not in own:
            if not isinstance(key, str) or key == "optimizer" or callable(getattr(kind, key, None)):
                raise CheckpointError(f"{path} has a member {shown(key)}, which the state of a schedule has not.")
        elif isinstance(own[key], list) and (not isinstance(value, list) or len(value) != len(own[key])):
            has = f"{len(value)} values" if isinstance(value, list) else shown(value)
            raise CheckpointError(f"{path}: {key} is {has}, expected {len(own[key])}: one of each parameter group.")
    for key in ("last_epoch", "_step_count"):
        if key in saved:
            read_count(saved[key], f"{path}: {key}")
    with FileReader() as reader:
        rates = [(key, plain_value(rate, reader)) for key in ("base_lrs", "_last_lr") for rate in saved.get(key) or ()]
    for key, rate in rates:
        read_number(rate, f"{path}: {key}", least=0.0)


def follow_schedule(scheduler: Any) -> None:
    """Set the rates of the next step to those that the schedule has for it, as it is laid out now.

    Of the same length they are that already. A schedule that is no function of the step alone is left as it is.

    Args:
        scheduler: of the run, once its state was loaded, in whatever wraps it.
    """
    plain = _innermost(scheduler)
    if not isinstance(plain, LambdaLR):
        return
    rates = [base * factor(plain.last_epoch) for base, factor in zip(plain.base_lrs, plain.lr_lambdas, strict=True)]
    for group, rate in zip(plain.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    plain._last_lr = rates


def _innermost(scheduler: Any) -> Any:
    """torch's own schedule, inside what accelerate and DeepSpeed wrap around it."""
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


__all__ = ["ScheduleMixin", "check_schedule", "follow_schedule"]
