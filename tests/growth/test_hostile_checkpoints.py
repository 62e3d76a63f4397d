# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints that somebody made false, and a run that is told to go on from them: one line, and no step.

What a run noted of its files (`run.json`) is written anew after each edit, so that the guards behind that are met.
"""

import json
import math
import re
import shutil
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from conversion.saved_files import FILES, RUN, describe_files
from growth.training.resume import find_fault
from growth.training.same_run import read_run, write_run
from growth.training.train import main, train
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.growth.test_growth import one_thread  # noqa: F401
from tests.growth.test_train import split

pytestmark = pytest.mark.slow

HUGE = 10**400


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run with a checkpoint at step 2, and `other`, another one, which differs in its seed."""
    root = tmp_path_factory.mktemp("hostile")
    texts = [text for text in topics.topics.values() if len(text) > 200][:2]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text[:600]}) + "\n" for text in texts))
    tiny_model().save_pretrained(root / "source")
    tiny_tokenizer(root / "source").save_pretrained(root / "source")
    train(*split(keys_of(root, root / "run")))
    train(*split(keys_of(root, root / "other", seed=7)))
    return root


def keys_of(root: Path, out: Path, **keys) -> dict:
    return {
        "model_name_or_path": str(root / "source"),
        "train_files": [str(root / "text.jsonl")],
        "output_dir": str(out),
        "block_size": 16,
        "max_steps": 3,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **keys,
    }


def saved(name: str, edit):
    """An edit of what torch saved in a file."""

    def change(checkpoint: Path) -> None:
        content = torch.load(checkpoint / name, weights_only=False)
        edit(content)
        torch.save(content, checkpoint / name)

    return change


def state(**fields):
    """An edit of trainer_state.json."""

    def change(checkpoint: Path) -> None:
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def started(first):
    return state(stateful_callbacks={"AdamStart": {"args": {}, "attributes": {"first_step": first}}})


def cut(name: str):
    def change(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def entry(**values):
    return saved("optimizer.pt", lambda content: content["state"][0].update(values))


def group(**values):
    return saved("optimizer.pt", lambda content: content["param_groups"][0].update(values))


def schedule(**values):
    return saved("scheduler.pt", lambda content: content.update(values))


FAULTS = {
    "optimizer, cut": (cut("optimizer.pt"), r"is damaged \(.*optimizer\.pt is truncated"),
    "schedule, cut": (cut("scheduler.pt"), r"is damaged \(.*scheduler\.pt is truncated"),
    "random state, cut": (cut("rng_state.pth"), r"is damaged \(.*rng_state\.pth is truncated"),
    "step, 10**400": (entry(step=HUGE), r"optimizer\.pt: data\.pkl is damaged or hostile: it holds an integer"),
    "step, a list": (entry(step=[1]), r"optimizer\.pt: step of parameter 0 is a list, expected a whole number"),
    "step, nan": (entry(step=torch.tensor(math.nan)), "step of parameter 0 is nan, expected a whole number"),
    "step, another": (entry(step=torch.tensor(7.0)), "the optimizer is at step 7 after loading it, expected step 2"),
    "m, another shape": (
        entry(exp_avg=torch.zeros(3)),
        r"exp_avg of parameter 0, of shape \(640, 32\), has shape \(3,\)",
    ),
    "m, none": (entry(exp_avg=None), "exp_avg of parameter 0, .* has no shape"),
    "m, nan": (entry(exp_avg=torch.full((640, 32), math.nan)), "exp_avg of parameter 0.* holds no number"),
    "v, negative": (
        entry(exp_avg_sq=torch.full((640, 32), -1e-9)),
        "exp_avg_sq of parameter 0.* holds -1e-09, and a mean",
    ),
    "lr, a text": (group(lr="x"), "parameter group 0: lr is 'x', expected a number at least 0"),
    "lr, nan": (group(lr=math.nan), "parameter group 0: lr is nan"),
    "params, 5": (group(params=5), "param_groups is no list of groups with params"),
    "params, fewer": (group(params=[0]), "cannot be loaded"),
    "optimizer, a list": (lambda folder: torch.save([1], folder / "optimizer.pt"), "is no optimizer state"),
    "schedule, a list": (lambda folder: torch.save([1], folder / "scheduler.pt"), r"scheduler\.pt holds a list"),
    "schedule, a method": (schedule(step=5), "has a member 'step', which the state of a schedule has not"),
    "schedule, the optimizer": (schedule(optimizer=None), "has a member 'optimizer', which"),
    "schedule, last_epoch": (schedule(last_epoch="x"), "last_epoch is 'x', expected a whole number"),
    "schedule, before it": (schedule(last_epoch=-7), "last_epoch is -7, expected a whole number"),
    "schedule, a rate more": (schedule(base_lrs=[1e-3] * 9), "base_lrs is 9 values, expected 2: one of each"),
    "schedule, no rates": (schedule(base_lrs=None), "base_lrs is None, expected 2: one of each"),
    "schedule, nan": (schedule(base_lrs=[1e-3, math.nan]), "base_lrs is nan, expected a number at least 0"),
    "random state, no torch": (
        saved("rng_state.pth", lambda content: content.pop("cpu")),
        "cannot be loaded: KeyError",
    ),
    "random state, short": (
        saved("rng_state.pth", lambda content: content.update(cpu=torch.zeros(3, dtype=torch.uint8))),
        "cannot be loaded",
    ),
    "random state, a text": (saved("rng_state.pth", lambda content: content.update(python="x")), "cannot be loaded"),
    "state, cut": (cut("trainer_state.json"), r"holds no trainer_state\.json that can be read"),
    "state, -1": (state(global_step=-1), "global_step is -1, expected a whole number"),
    "state, True": (state(global_step=True), "was not saved to its end"),
    "state, 10**300": (state(global_step=10**300), "global_step is an integer of about 301 digits, expected a whole"),
    "state, 10**400": (state(global_step=HUGE), "was not saved to its end"),
    "state, unknown": (state(mystery=1), "trainer_state.json has 'mystery', which transformers .* has no use for"),
    "state, batch": (state(train_batch_size=None), "train_batch_size is None, expected a whole number"),
    "state, flos": (state(total_flos="many"), "total_flos is 'many', expected a number"),
    "state, tokens": (state(num_input_tokens_seen=-5), "num_input_tokens_seen is -5, expected a whole number"),
    "state, log": (state(log_history=[5]), "log_history is no list of objects"),
    "state, callbacks": (state(stateful_callbacks=[1]), "stateful_callbacks is no object of objects"),
    "state, best": (state(best_model_checkpoint=5), "best_model_checkpoint is 5, expected a str"),
    "start, a text": (started("x"), "first_step of AdamStart is 'x', expected a whole number"),
    "start, another": (started(5), "the optimizer is at step 2 after loading it, expected step 7"),
}


RUN_TOO = ("optimizer, cut", "step, 10**400", "state, cut")  # of those that no run has to be begun for


def go_on(root: Path, checkpoint: Path, tmp_path: Path, capsys, **keys) -> str:
    """What a run says that goes on from a checkpoint, and is refused."""
    given = keys_of(root, tmp_path / "again", resume_from_checkpoint=str(checkpoint), **keys)
    (tmp_path / "keys.json").write_text(json.dumps(given))
    assert main([str(tmp_path / "keys.json")]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert not list((tmp_path / "again").rglob("*.safetensors"))
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def note(checkpoint: Path) -> None:
    """As if the run had saved what is there now."""
    found = {key: value for key, value in read_run(checkpoint).items() if key not in (FILES, "checksum")}
    write_run(checkpoint, {**found, FILES: describe_files(checkpoint)})


@pytest.mark.parametrize("name", FAULTS)
def test_a_checkpoint_that_is_none_is_refused_in_one_line(name, root, tmp_path, capsys):
    """Where its headers tell, before anything is loaded; else by a run that loads it."""
    damage, message = FAULTS[name]
    checkpoint = shutil.copytree(root / "run/checkpoint-2", tmp_path / "checkpoint-2")
    damage(checkpoint)
    note(checkpoint)
    fault = find_fault(checkpoint)
    line = go_on(root, checkpoint, tmp_path, capsys) if fault is None or name in RUN_TOO else fault
    assert re.search(message, line), line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_file_of_another_run_at_the_same_step_is_refused(name, root, tmp_path, capsys):
    """The fault: same names, shapes and step; for scheduler.pt of another length, so that its bytes differ."""
    checkpoint = shutil.copytree(root / "run/checkpoint-2", tmp_path / "checkpoint-2")
    listed = json.loads((checkpoint / RUN).read_text())[FILES]
    assert {"optimizer.pt", "scheduler.pt", "model.safetensors"} == listed.keys()
    shutil.copy(root / "other/checkpoint-2" / name, checkpoint / name)
    if name == "scheduler.pt":
        schedule(_step_count=9)(checkpoint)
    line = go_on(root, checkpoint, tmp_path, capsys)
    assert re.search(rf"{name}: has .*, so it is not what was saved with the rest of the checkpoint", line), line


def test_a_log_of_a_run_with_nan_is_a_log(root, tmp_path):
    """A Trainer writes NaN into its log, and goes on."""
    checkpoint = shutil.copytree(root / "run/checkpoint-2", tmp_path / "checkpoint-2")
    state(log_history=[{"grad_norm": math.nan, "loss": math.inf, "step": 1}], best_metric=math.nan)(checkpoint)
    train(*split(keys_of(root, tmp_path / "again", resume_from_checkpoint=str(checkpoint))))
    assert (tmp_path / "again/model.safetensors").is_file()


def test_a_checkpoint_whose_run_noted_nothing_goes_on(root, tmp_path):
    """As earlier versions left it."""
    checkpoint = shutil.copytree(root / "run/checkpoint-2", tmp_path / "checkpoint-2")
    found = {key: value for key, value in read_run(checkpoint).items() if key not in (FILES, "checksum")}
    write_run(checkpoint, found)
    train(*split(keys_of(root, tmp_path / "again", resume_from_checkpoint=str(checkpoint))))
    assert (tmp_path / "again/model.safetensors").is_file()
