# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints of runs: kept by their steps, passed over where they are not whole, named where they cannot be saved."""

import json
import os
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import sft
from conversion.saved_files import FILES
from growth.training.errors import RunError
from growth.training.resume import find_checkpoint, find_fault
from growth.training.same_run import RUN, read_run, write_run
from sft.training.recipe import Recipe
from sft.training.train import train
from tests.sft.conftest import STRICT

SAVED = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, model_dir, data_file):
    """A run with its checkpoints of steps 1, 2 and 3; to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    keys = {"model_name_or_path": str(model_dir), "data_files": str(data_file), "output_dir": str(folder)}
    train(Recipe.from_dict({**STRICT, **keys, **SAVED, "max_length": 128}), progress=False)
    return folder


@pytest.fixture
def out(saved_run, tmp_path):
    return Path(shutil.copytree(saved_run, tmp_path / "out"))


def test_a_clock_that_is_set_back_costs_no_checkpoint(make_recipe, tmp_path):
    """`checkpoint-1` was changed, by this clock, in an hour."""
    later = time.time() + 3600
    put_forward = At(1, lambda: os.utime(tmp_path / "out/checkpoint-1", (later, later)))
    train(make_recipe(**SAVED, save_total_limit=1), callbacks=[put_forward], progress=False)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    kept = torch.load(tmp_path / "out/checkpoint-3/training_args.bin", weights_only=False)
    assert kept.save_total_limit == 1, "as it was given"


def test_what_a_checkpoint_is_of_is_there_before_it_counts_as_whole_and_others_are_removed(make_recipe, tmp_path):
    """A kill at any moment of saving: none of the old is gone before the new one is whole, and says what it is of."""
    seen = []

    def look(state_file):
        folder = Path(state_file).parent
        names = {path.name for path in folder.iterdir()}
        seen.append(
            (RUN in names, "trainer_state.json" in names, sorted(p.name for p in folder.parent.glob("checkpoint-*")))
        )

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            save = type(state).save_to_json

            def noted(self, path):
                look(path)
                save(self, path)

            state.save_to_json = noted.__get__(state)

    stale = tmp_path / "out/checkpoint-2"
    plant = At(1, lambda: [stale.mkdir(), (stale / "trainer_state.json").write_text('{"global_step": 2}')])
    train(make_recipe(**SAVED, save_total_limit=1), callbacks=[Watch(), plant], progress=False)
    assert seen[:3] == [
        (True, False, ["checkpoint-1"]),
        (True, False, ["checkpoint-1", "checkpoint-2"]),
        (True, False, ["checkpoint-2", "checkpoint-3"]),
    ]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """As an edit by hand: other words, the old checksum."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "batch_size": 99}))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("optimizer.pt", cut, r"is damaged \(.*optimizer\.pt is truncated"),
        ("optimizer.pt", empty, r"is damaged \(.*optimizer\.pt begins with b''"),
        ("scheduler.pt", empty, r"is damaged \(.*scheduler\.pt begins with b''"),
        ("rng_state.pth", cut, r"is damaged \(.*rng_state\.pth is truncated"),
        ("model.safetensors", cut, r"is damaged \(.*model\.safetensors "),
        ("model.safetensors", os.unlink, "has no weights"),
        ("run.json", os.unlink, r".*it has no run\.json"),
        ("run.json", cut, r"is damaged \(.*run\.json cannot be read"),
        ("run.json", flip, r"is damaged \(.*run\.json cannot be read"),
        ("optimizer.pt", os.unlink, "has no optimizer"),
        ("trainer_state.json", cut, "was not saved to its end"),
    ],
)
def test_what_is_not_whole_is_passed_over_with_its_reason_and_refused_by_name(name, damage, told, out, caplog):
    assert find_checkpoint(True, out) == str(out / "checkpoint-3")
    damage(out / "checkpoint-3" / name)
    assert find_checkpoint(True, out) == str(out / "checkpoint-2")
    record = caplog.records[-1].getMessage()
    assert record.endswith("; the run goes on from checkpoint-2")
    with pytest.raises(RunError, match="checkpoint-3") as error:
        find_checkpoint(out / "checkpoint-3", out)
    for text in (record, str(error.value)) if name != "trainer_state.json" else (record,):
        assert "\n" not in text
        assert re.search(rf"checkpoint-3 {told}", text)


def test_a_checkpoint_of_another_trainer_needs_no_run_json(out):
    """It has no record of this package's either."""
    for name in (RUN, "teleflm_manifest.json"):
        (out / "checkpoint-3" / name).unlink()
    assert find_fault(out / "checkpoint-3") is None


def test_parts_of_torch_without_their_end_are_not_whole(out):
    (out / "checkpoint-3/optimizer.pt").unlink()
    (out / "checkpoint-3/optimizer_0").mkdir()
    assert ".metadata" in find_fault(out / "checkpoint-3")
    (out / "checkpoint-3/optimizer_0/.metadata").write_bytes(b"")
    assert find_fault(out / "checkpoint-3") is None


@pytest.mark.parametrize("damaged", ["rng_state.pth", "model.safetensors"])
def test_what_only_loading_finds_out_is_one_line(damaged, out, make_recipe):
    """A whole file with the content of another, in a checkpoint whose run noted nothing of its files."""
    if damaged == "model.safetensors":
        save_file({"model.norm.weight": torch.ones(3)}, out / "checkpoint-3" / damaged, {"format": "pt"})
    else:
        shutil.copy(out / "checkpoint-3/scheduler.pt", out / "checkpoint-3" / damaged)
    found = read_run(out / "checkpoint-3")
    write_run(out / "checkpoint-3", {key: value for key, value in found.items() if key != FILES})
    with pytest.raises(sft.SFTError, match=r"checkpoint-3 cannot be loaded: .*; name another checkpoint") as error:
        train(make_recipe(**{**SAVED, "max_steps": 4}, max_length=128, resume_from_checkpoint=True), progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damaged", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_whole_file_of_another_checkpoint_is_passed_over(damaged, out):
    shutil.copy(out / "checkpoint-2" / damaged, out / "checkpoint-3" / damaged)
    assert re.search(rf"{damaged}: has .*not what was saved with the rest", find_fault(out / "checkpoint-3") or "")
    assert find_checkpoint(True, out) == str(out / "checkpoint-2")


@pytest.fixture
def full_disk():
    """Files may grow no further than a size, until this is undone: what a write finds is an error as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("whole", [1, 0])
def test_a_checkpoint_that_cannot_be_saved_ends_the_run_in_one_line(whole, make_recipe, tmp_path, full_disk, caplog):
    way_out = "resume_from_checkpoint: true goes on from checkpoint-1" if whole else "There is no checkpoint to go on"
    with pytest.raises(sft.SFTError, match=rf"checkpoint-{whole + 1} cannot be saved: .* MB are free .*{way_out}") as e:
        train(make_recipe(**SAVED), callbacks=[At(whole, full_disk)], progress=False)
    assert "\n" not in str(e.value)


def test_a_model_that_cannot_be_saved_is_one_line(make_recipe, full_disk):
    with pytest.raises(sft.SFTError, match=r"out cannot be saved: .* There is no checkpoint to go on from") as error:
        train(make_recipe(max_steps=1), callbacks=[At(0, full_disk)], progress=False)
    assert "\n" not in str(error.value)
