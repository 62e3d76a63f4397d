# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Schedules of the learning rate where transformers' own fail: under DeepSpeed, in runs that only warm up, and where
the phases of a schedule are not as long as the run.

Schedules with a floor ask the optimizer for its `defaults`, which DeepSpeed's does not have: a run with the polynomial
decay of the shipped recipes ended with an AttributeError before its first step (transformers 5.23, deepspeed 0.19).
"""

from typing import Any

import torch
from transformers.trainer_utils import SchedulerType

from conversion.checkpoint.errors import one_line

from .errors import RunError
from .optimizer_layout import innermost


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


__all__ = ["ScheduleMixin"]
