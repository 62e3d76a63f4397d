# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Schedules of the learning rate where transformers' own fail: under DeepSpeed, and in runs that only warm up.

Schedules with a floor ask the optimizer for its `defaults`, which DeepSpeed's does not have: a run with the polynomial
decay of the shipped recipes ended with an AttributeError before its first step (transformers 5.23, deepspeed 0.19).
"""

from typing import Any

import torch
from transformers.trainer_utils import SchedulerType

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
            RunError: all steps of a polynomial decay would be warm-up.
        """
        if self.lr_scheduler is None:
            _check_decay(self.args, num_training_steps)
            _lend_defaults(optimizer if optimizer is not None else self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]


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


__all__ = ["ScheduleMixin"]
