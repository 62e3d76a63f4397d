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
