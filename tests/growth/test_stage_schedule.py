# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A schedule that goes on over the stages of a growth: the rates of every step, and every stage that cannot go on."""

import json
import math
import re
import shutil
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from transformers import TrainerCallback

from conversion.checkpoint.manifest import MANIFEST, seal
from growth import grow_checkpoint
from growth.stages import read_schedule, run_keys
from growth.training.errors import RunError
from growth.training.stage_schedule import continue_schedule, schedule_factor
from growth.training.train import main, train
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.growth.test_growth import one_thread  # noqa: F401
from tests.growth.test_train import split

pytestmark = pytest.mark.slow

TARGET = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 110, "num_hidden_layers": 4}
PEAK = 1e-3
WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}


class Rates(TrainerCallback):
    """The learning rates with which each step is made."""

    def __init__(self):
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def keys_of(root: Path, model: Path, name: str, **keys) -> dict:
    return {
        "model_name_or_path": str(model),
        "train_files": [str(root / "text.jsonl")],
        "output_dir": str(root / name),
        "block_size": 16,
        "max_steps": 6,
        "save_steps": 2,
        "warmup_steps": 1,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "constant_with_warmup",
        "mup_base_width": 32,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **keys,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`first`, a run that stops in its stable phase, and `decayed`, one that does not; models grown from both."""
    root = tmp_path_factory.mktemp("stages")
    texts = [text for text in topics.topics.values() if len(text) > 200][:3]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text[:800]}) + "\n" for text in texts))
    tiny_model().save_pretrained(root / "source")
    tiny_tokenizer(root / "source").save_pretrained(root / "source")
    train(*split(keys_of(root, root / "source", "first", learning_rate=PEAK, warmup_steps=2)))
    train(*split(keys_of(root, root / "source", "decayed", learning_rate=PEAK, **WSD)))
    for run, step in (("first", 6), ("first", 2), ("decayed", 6), ("decayed", 4)):
        checkpoint = root / run / f"checkpoint-{step}"
        grow_checkpoint(checkpoint, root / f"{run}-{step}", TARGET, optimizer=checkpoint)
    return root


def record_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_bytes())["lineage"]


@pytest.mark.parametrize("grown", ["first-6", "decayed-4"])
def test_the_next_stage_goes_on_where_the_first_stopped(grown, root, tmp_path, caplog):
    """At 0.5 of its rate, after one step of warm-up, and down a cosine at the end; whole, and resumed in the middle."""
    keys = keys_of(root, root / grown, "", output_dir=str(tmp_path / "run"), continue_schedule=0.5, **WSD)
    growth, args = split(keys)
    rates = Rates()
    train(growth, args, [rates])
    half = 0.5 * PEAK
    expected = [0.0, half, half, half, half, half * 0.5 * (1 + math.cos(math.pi / 2))]
    assert [step[0] for step in rates.seen] == pytest.approx(expected, abs=1e-15)
    for vector, matrix, norm in rates.seen:
        assert (matrix, norm) == (pytest.approx(vector * 32 / 40), vector)
    lineage = record_of(tmp_path / "run")
    step = int(grown[-1])
    assert lineage["continued_schedule"] == {"learning_rate": PEAK, "step": step, "factor": 0.5}
    assert lineage["learning_rate"] == half
    assert (lineage["moments"], lineage["moments_step"]) == ("grown", step)
    assert f"0.5 of the 0.001 of step {step}" in caplog.text
    assert "its record and optimizer.pt agree" in caplog.text
    assert "the learning rate decays after step 4 of 6" in caplog.text

    resumed = Rates()
    checkpoint = str(tmp_path / "run/checkpoint-4")
    keys |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint}
    train(*split({**keys, "model_name_or_path": checkpoint}), [resumed])
    assert resumed.seen == rates.seen[4:]
    assert record_of(tmp_path / "again")["continued_schedule"] == lineage["continued_schedule"]


@pytest.mark.parametrize(("steps", "kind"), [(4, "linear"), (12, "cosine")])
def test_a_run_that_goes_on_with_another_length_has_its_rates_from_the_next_step_on(steps, kind, root, tmp_path):
    """The oracle is a run of that length from its beginning: its rates after step 2."""
    keys = keys_of(root, root / "source", "", learning_rate=PEAK, lr_scheduler_type=kind, save_strategy="no")
    whole, resumed = Rates(), Rates()
    train(*split({**keys, "output_dir": str(tmp_path / "whole"), "max_steps": steps}), [whole])
    train(*split({**keys, "output_dir": str(tmp_path / "run"), "save_strategy": "steps", "max_steps": 6}))
    checkpoint = str(tmp_path / "run/checkpoint-2")
    keys |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint, "max_steps": steps}
    train(*split(keys), [resumed])
    assert resumed.seen == whole.seen[2:]
    lineage = record_of(tmp_path / "again")
    assert lineage["last_learning_rate"] == whole.seen[-1][0]
    factor = lineage["last_learning_rate"] / PEAK
    assert 0 < factor < 1
    assert record_of(tmp_path / "run")["last_learning_rate"] != lineage["last_learning_rate"]


def test_a_schedule_that_was_laid_out_anew_after_the_last_step_is_not_believed(root, tmp_path, capsys):
    """The fault: two thirds of the peak in step 3, of a warm-up over 3 of two epochs; resumed to one epoch, of which
    nothing is left to do, and by which the warm-up would have been over."""
    keys = keys_of(root, root / "source", "", learning_rate=PEAK, block_size=64, per_device_train_batch_size=7)
    keys |= {"max_steps": -1, "num_train_epochs": 2, "warmup_steps": 0.5, "save_steps": 3}
    train(*split({**keys, "output_dir": str(tmp_path / "long")}))
    checkpoint = str(tmp_path / "long/checkpoint-3")
    short = {"output_dir": str(tmp_path / "short"), "resume_from_checkpoint": checkpoint, "num_train_epochs": 1}
    train(*split({**keys, **short}))
    lineage = record_of(tmp_path / "short")
    assert (lineage["steps"], lineage["lr_scheduler"]["warmup_steps"]) == (3, 2)
    assert lineage["last_learning_rate"] == pytest.approx(PEAK * 2 / 3)
    grow_checkpoint(tmp_path / "short", tmp_path / "grown", TARGET)
    given = keys_of(root, tmp_path / "grown", "", output_dir=str(tmp_path / "next"), continue_schedule=1)
    message = (
        r"made its last step at the learning rate 0.000666.*, and not at the 0.001 that its schedule over 3 steps has"
    )
    refused(given, message, tmp_path, capsys)


@pytest.mark.parametrize("form", ["file", "command line"])
def test_the_default_rate_is_a_rate_where_it_is_given(form, root, tmp_path, capsys):
    """5e-5, which is transformers' default: given, it contradicts; not given, it says nothing."""
    keys = keys_of(root, root / "first-6", "", output_dir=str(tmp_path / "run"), continue_schedule=1, max_steps=1)
    keys |= {"save_strategy": "no"}

    def run(**more) -> int:
        if form == "file":
            (tmp_path / "run.json").write_text(json.dumps({**keys, **more}))
            return main([str(tmp_path / "run.json")])
        line = [part for key, value in {**keys, **more}.items() for part in (f"--{key}", *_words(value))]
        return main(line)

    assert run(learning_rate=5e-5) == 2
    message = "learning_rate is 5e-05, but continue_schedule 1 of the 0.001 at which the run before stopped is 0.001"
    assert message in capsys.readouterr().err
    assert run() == 0
    assert record_of(tmp_path / "run")["learning_rate"] == PEAK


def _words(value) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def test_a_run_that_ends_without_decay_ended_at_its_peak(root, tmp_path, caplog):
    """transformers' schedule is 0 after its last step, so that is what optimizer.pt has: no rate of any step."""
    settings = {"lr_scheduler_kwargs": {"num_decay_steps": 0}, "max_steps": 2, "learning_rate": PEAK}
    keys = keys_of(root, root / "source", "", output_dir=str(tmp_path / "run"), **{**WSD, **settings})
    train(*split(keys))
    saved = torch.load(tmp_path / "run/checkpoint-2/optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["lr"] == 0
    grow_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "grown", TARGET, optimizer=tmp_path / "run/checkpoint-2")
    _, args = split(keys_of(root, tmp_path / "grown", "next"))
    found = continue_schedule(args, tmp_path / "grown", 1.0, base_width=32)
    assert (args.learning_rate, found.step) == (PEAK, 2)
    assert "its record and optimizer.pt agree" in caplog.text


def test_without_an_optimizer_the_record_alone_is_believed_and_that_is_said(root, tmp_path, caplog):
    folder = shutil.copytree(root / "first-6", tmp_path / "model", ignore=shutil.ignore_patterns("optimizer.pt"))
    _, args = split(keys_of(root, folder, "next"))
    continue_schedule(args, folder, 1.0, base_width=32)
    assert "by its record alone" in caplog.text


def test_without_muP_the_width_that_was_trained_is_the_base(root, tmp_path):
    """One rate for all before, so that is the rate of a model of that width."""
    folder = edited(root, tmp_path, lambda lineage: run_of(lineage).update(mup_base_width=None))
    for base in (None, 32):
        _, args = split(keys_of(root, folder, "next"))
        continue_schedule(args, folder, 1.0, base_width=base)
        assert args.learning_rate == PEAK
    with pytest.raises(RunError, match=r"mup_base_width is 40, but the run before had no mup_base_width.*none or 32"):
        continue_schedule(split(keys_of(root, folder, "next"))[1], folder, 1.0, base_width=40)


def run_of(lineage: dict) -> dict:
    """The run in the lineage of a grown model."""
    return lineage["parent"]["lineage"]


def edited(root: Path, tmp_path: Path, edit) -> Path:
    folder = shutil.copytree(root / "first-6", tmp_path / "edited")
    record = json.loads((folder / MANIFEST).read_bytes())
    edit(record["lineage"])
    (folder / MANIFEST).write_text(json.dumps(seal(record)))
    return folder


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("decayed-6", {}, "stopped in its decay, at 0.5 of its peak 0.001 in step 6 of 6: grow from a checkpoint of"),
        ("first-2", {}, "stopped in its warm-up, at 0.5 of its peak 0.001 in step 2 of 6"),
        ("source", {}, "no record tells of the run that trained it"),
        ("first-6", {"lr_scheduler_type": "linear"}, "lr_scheduler_type is linear, which has no stable phase"),
        (
            "first-6",
            {"lr_scheduler_type": "constant"},
            "warmup_steps is 1, and lr_scheduler_type constant, which never",
        ),
        (
            "first-6",
            {"learning_rate": 2e-3},
            "learning_rate is 0.002, but continue_schedule 1 of the 0.001 .* is 0.001",
        ),
        ("first-6", {"mup_base_width": 40}, "mup_base_width is 40, but the run before had mup_base_width 32"),
        ("first-6", {"mup_base_width": None}, "mup_base_width is None, but the run before had mup_base_width 32"),
        ("first-6", {"continue_schedule": 0}, "continue_schedule is 0.0, expected a number above 0"),
        ("first-6", {"continue_schedule": True}, "continue_schedule is True, expected a number"),
        ("first-6", {"continue_schedule": "much"}, "continue_schedule is 'much', expected a number"),
    ],
)
def test_a_stage_that_cannot_go_on_is_refused_in_one_line(model, keys, message, root, tmp_path, capsys):
    given = keys_of(root, root / model, "", output_dir=str(tmp_path / "run"), **{"continue_schedule": 1, **keys})
    refused(given, message, tmp_path, capsys)


def refused(keys: dict, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "run.json").write_text(json.dumps(keys))
    assert main([str(tmp_path / "run.json")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*{message}", error), error
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_an_optimizer_of_another_checkpoint_is_refused(root, tmp_path, capsys):
    """The fault: weights of step 6 beside moments that grew at step 2, in the middle of the warm-up."""
    folder = shutil.copytree(root / "first-6", tmp_path / "model")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        group["lr"] /= 2
    torch.save(saved, folder / "optimizer.pt")
    keys = keys_of(root, folder, "", output_dir=str(tmp_path / "run"), continue_schedule=1)
    refused(keys, "is of a run at learning rate 0.0005 of a peak 0.001, but the record .* says 0.001", tmp_path, capsys)


def test_moments_of_another_step_of_the_stable_phase_are_refused(root, tmp_path, capsys):
    """The fault: the rates are the same, and the weights are of step 6, the moments of step 4."""
    run, states = root / "first", tmp_path / "states"
    for name, file in (("weights", "checkpoint-6"), ("moments", "checkpoint-4")):  # without what tells growth of it
        shutil.copytree(run / file, states / name)
        (states / name / "trainer_state.json").unlink()
    grow_checkpoint(states / "weights", tmp_path / "model", TARGET, optimizer=states / "moments")
    keys = keys_of(root, tmp_path / "model", "", output_dir=str(tmp_path / "run"), continue_schedule=1)
    refused(keys, "is of Adam's step 4, but by the record of .* it was at 6 after its 6 steps", tmp_path, capsys)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda lineage: run_of(lineage)["lr_scheduler"].update(type="cosine"),
            "lr_scheduler_type cosine, which has no",
        ),
        (
            lambda lineage: run_of(lineage).pop("lr_scheduler"),
            "recorded with lr_scheduler.warmup_steps None, expected a",
        ),
        (lambda lineage: run_of(lineage).update(steps="x"), "recorded with steps x, expected a number"),
        (lambda lineage: run_of(lineage).update(steps=0), "did no step"),
        (
            lambda lineage: run_of(lineage)["lr_scheduler"].update(type="warmup_stable_decay", settings={"a": 1}),
            "recorded with a schedule that transformers refuses",
        ),
        (
            lambda lineage: lineage["parent"].update(matches=False, mismatch="model.safetensors has other content"),
            "what the record of the step 'train' says, but the weights are not .* any more: model.safetensors has",
        ),
        (lambda lineage: run_of(lineage).update(operation="fine-tune"), "has the step 'fine-tune' after the last run"),
        (
            lambda lineage: run_of(lineage).update(operation="convert", parallel={}),
            "has the step 'convert' after the last run",
        ),
    ],
)
def test_a_record_that_does_not_say_where_it_stopped_is_refused(edit, message, root, tmp_path, capsys):
    folder = edited(root, tmp_path, edit)
    keys = keys_of(root, folder, "", output_dir=str(tmp_path / "run"), continue_schedule=1)
    refused(keys, message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs num_decay_steps in lr_scheduler_kwargs"),
        ({"num_decay_steps": 6}, "warmup_steps 1, and num_decay_steps 6 do not fit the 6 steps"),
        (
            {"num_decay_steps": 2, "num_stable_steps": 2},
            "1, num_stable_steps 2, and num_decay_steps 2 do not fit the 6",
        ),
        ({"num_decay_steps": -1}, "num_decay_steps is -1, expected a number of steps"),
        ({"num_decay_steps": 2, "decay": "linear"}, "which lr_scheduler_type warmup_stable_decay refuses: .*decay"),
        ({"num_decay_steps": 2, "decay_type": "steep"}, "refuses: Unknown decay type: steep"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(settings, message, root, tmp_path, capsys):
    """transformers would skip the stable phase, or train the rest at the lowest rate."""
    keys = keys_of(root, root / "source", "", output_dir=str(tmp_path / "run"), learning_rate=PEAK)
    refused({**keys, **WSD, "lr_scheduler_kwargs": settings}, message, tmp_path, capsys)


def test_factors_by_hand():
    assert [schedule_factor("warmup_stable_decay", 2, 8, {"num_decay_steps": 2}, at) for at in range(9)] == (
        pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.5, 0])
    )
    assert [schedule_factor("constant", 2, 8, None, at) for at in (0, 9)] == [1, 1]


def test_a_plan_and_its_runs_agree(root, tmp_path):
    """What a plan says of a stage are keys that the run takes, over the record of the run before."""
    stage = {"tokens": 96, "batch_tokens": 16, "learning_rate": PEAK, "warmup_steps": 2, "model": str(root / "source")}
    last = {**stage, "learning_rate": 8.5e-4, "warmup_steps": 1, "decay_steps": 2, "model": None, "set": TARGET}
    schedule = read_schedule({"sequence_length": 16, "stages": [stage, last]}, "a.yaml")
    first, second = (run_keys(schedule, index) for index in (0, 1))
    assert first == {
        "block_size": 16,
        "max_steps": 6,
        "learning_rate": PEAK,
        "mup_base_width": 32,
        "warmup_steps": 2,
        "lr_scheduler_type": "constant_with_warmup",
    }
    was = record_of(root / "first")
    assert (was["steps"], was["learning_rate"], was["lr_scheduler"]["warmup_steps"]) == (6, PEAK, 2)
    assert second["continue_schedule"] == 0.85
    rates = Rates()
    keys = keys_of(root, root / "first-6", "", output_dir=str(tmp_path / "run"), save_strategy="no")
    train(*split({**keys, **second}), [rates])
    assert max(step[0] for step in rates.seen) == pytest.approx(8.5e-4)
    assert len(rates.seen) == 6
    assert rates.seen[-1][0] < 8.5e-4
