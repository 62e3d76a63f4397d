# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which checkpoints are kept, and what is said of those that are not whole; runs that meet them are in
tests/sft/test_checkpoints.py."""

import os
import time

import pytest
from transformers.trainer_utils import rotate_checkpoints

from growth.training.saving import superseded


@pytest.fixture
def make(tmp_path):
    """Checkpoints of these steps, the first one changed first."""

    def build(*steps):
        for number, step in enumerate(steps):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            os.utime(folder, (number * 100, number * 100))
        return tmp_path

    return build


def steps_of(paths):
    return [int(path.name.partition("-")[2]) for path in paths]


@pytest.mark.parametrize("limit", [1, 2, 3, 9, None, 0, -1])
@pytest.mark.parametrize("best", [None, 2, 6, 99])
@pytest.mark.parametrize("steps", [(2, 4, 6, 8), (4, 6, 8, 10, 12), (8,)])
def test_with_a_right_clock_it_is_what_transformers_removes(limit, best, steps, make):
    """Its order is that of the changes."""
    folder = make(*steps)
    best = folder / f"checkpoint-{best}" if best in (99, *steps) else None
    ours = superseded(folder, steps[-1], limit, best)
    if best is not None and best.name == "checkpoint-99":
        best = None  # of another folder: transformers keeps one fewer for it
    rotate_checkpoints(str(folder), limit, str(best) if best else None, use_mtime=True)
    assert {*steps} - {*steps_of(folder.iterdir())} == {*steps_of(ours)}


def test_a_clock_that_was_set_back_removes_nothing_that_is_new(make):
    folder = make(2, 4, 6)
    for name in ("checkpoint-2", "checkpoint-4"):
        os.utime(folder / name, (time.time() + 3600,) * 2)
    assert steps_of(superseded(folder, 6, 1)) == [2, 4]
    assert steps_of(superseded(folder, 6, 2)) == [2]


def test_after_a_run_went_back_what_it_has_left_goes_first(make):
    folder = make(2, 4, 8, 10, 6)
    assert steps_of(superseded(folder, 6, 1)) == [8, 10, 2, 4]
    assert steps_of(superseded(folder, 6, 2)) == [8, 10, 2]
    assert steps_of(superseded(folder, 6, 3, folder / "checkpoint-10")) == [8, 2]


def test_what_is_no_checkpoint_is_left_alone(make):
    folder = make(2, 4)
    (folder / "checkpoint-3-copy").mkdir()
    (folder / "checkpoint-1").write_text("a file")
    assert steps_of(superseded(folder, 4, 1)) == [2]
