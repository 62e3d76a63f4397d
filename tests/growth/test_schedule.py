# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Schedules with a floor, under an optimizer like DeepSpeed's, and in a run that only warms up."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from growth.training.errors import RunError
from growth.training.schedule import ScheduleMixin
from tests.fixtures.tiny import tiny_model


class Scheduled(ScheduleMixin, Trainer):
    pass


class Wrapper:
    """As DeepSpeedZeroOptimizer: around an optimizer, with its groups, without its defaults."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


@pytest.fixture
def make_trainer(tmp_path):
    def make(mixed=Scheduled, **keys):
        floor = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9}, "learning_rate": 1e-2}
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **{**floor, **keys})
        return mixed(tiny_model(), args)

    return make


def wrapped(trainer):
    from accelerate.optimizer import AcceleratedOptimizer

    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
    outer = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    outer.optimizer = Wrapper(optimizer)
    return outer


def test_a_floor_under_an_optimizer_without_defaults(make_trainer):
    trainer = make_trainer()
    scheduler = trainer.create_scheduler(10, wrapped(trainer))
    assert scheduler.get_last_lr()[0] == 1e-2
    with pytest.raises(AttributeError, match="defaults"):
        make_trainer(Trainer).create_scheduler(10, wrapped(trainer))  # the fault that this is for


def test_nothing_but_warm_up_is_refused(make_trainer):
    with pytest.raises(RunError, match=r"warmup_steps is 0.03, 1 of 1 steps") as error:
        make_trainer(warmup_steps=0.03).create_scheduler(1, torch.optim.SGD([torch.zeros(1)]))
    assert "\n" not in str(error.value)
    trainer = make_trainer(warmup_steps=0)
    assert trainer.create_scheduler(1, torch.optim.SGD([torch.zeros(1)])) is trainer.lr_scheduler
    make_trainer(warmup_steps=0.03, lr_scheduler_type="linear", lr_scheduler_kwargs={}).create_scheduler(
        1, torch.optim.SGD([torch.zeros(1)])
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_scheduler_kwargs": {}}, "needs num_decay_steps in lr_scheduler_kwargs"),
        (
            {"lr_scheduler_kwargs": {"num_decay_steps": 8}, "warmup_steps": 3},
            "warmup_steps 3, and num_decay_steps 8 do not",
        ),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 1.5}}, "num_decay_steps is 1.5, expected a number of steps"),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 2, "lr_end": 0}}, "which lr_scheduler_type .* refuses: .*lr_end"),
    ],
)
def test_phases_that_do_not_fit_are_refused(keys, message, make_trainer):
    """Of ten steps; transformers would begin to decay from below the peak, or end in a TypeError."""
    with pytest.raises(RunError, match=message):
        make_trainer(lr_scheduler_type="warmup_stable_decay", **keys).create_scheduler(
            10, torch.optim.SGD([torch.zeros(1)])
        )


def test_phases_that_fit_are_transformers_own(make_trainer):
    keys = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}
    optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2) for _ in range(2)]
    ours, theirs = (
        make_trainer(mixed, warmup_steps=2, **keys).create_scheduler(8, optimizer)
        for mixed, optimizer in zip((Scheduled, Trainer), optimizers, strict=True)
    )
    for _ in range(8):
        assert ours.get_last_lr() == theirs.get_last_lr()
        for optimizer, scheduler in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            scheduler.step()
