# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""States that no Adam has, and numbers that are none, wherever an optimizer.pt is read.

Each is planted, named in one line, and leaves nothing half-written.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Adafactor
from typer.testing import CliRunner

from conversion import convert_checkpoint, export_checkpoint
from conversion.adam_state import check_resumed_state
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import sample_digest, seal
from conversion.optimizer_state import OPTIMIZER_FILE
from conversion.saved_files import FILES, RUN, check_saved_files, describe_files
from growth import grow_checkpoint
from growth.training.grown_adam import load_adam_state
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.app import app
from tests.fixtures.tiny import tiny_model
from tests.growth.test_growth import one_thread  # noqa: F401

HUGE = 10**400


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model, and beside it what torch's AdamW saves after two steps, in Trainer's groups."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model()
    model.save_pretrained(folder)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    others = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    ids = torch.arange(40)[None]
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), folder / OPTIMIZER_FILE)
    return folder


def group(**settings):
    return lambda saved: saved["param_groups"][0].update(settings)


def step(value):
    return lambda saved: [entry.update(step=value) for entry in saved["state"].values()]


def one(place, value):
    """One element of one second moment."""

    def edit(saved):
        saved["state"][4]["exp_avg_sq"][place] = value

    return edit


def first_moment(value):
    def edit(saved):
        saved["state"][4]["exp_avg"][0, 0] = value

    return edit


UNREADABLE = {
    "step, 10**400": (step(HUGE), "it holds an integer of 1329 bits"),
    "step, -3": (step(-3), r"step of model\.embed_tokens\.weight is -3, expected a whole number from 0"),
    "step, 2.5": (step(torch.tensor(2.5)), "step of .* is 2.5, expected a whole number"),
    "step, True": (step(True), "step of .* is True, expected a whole number"),
    "step, a tensor of True": (step(torch.tensor(True)), "step of .* is a tensor, expected a whole number"),
    "step, nan": (step(math.nan), "step of .* is nan, expected a whole number"),
    "step, inf": (step(torch.tensor(math.inf)), "step of .* is inf, expected a whole number"),
    "step, beyond float32": (step(2.0**24 + 2), r"step of .* is 16777218.0, .* to 16,777,216"),
    "step, two": (step(torch.tensor([1.0, 2.0])), "step of .* is a tensor, expected a whole number"),
    "param_names, 5": (group(param_names=5), "param_names of parameter group 0 is 5, expected a list of numbers or"),
    "param_names, a text": (group(param_names="model"), "param_names of parameter group 0 is 'model', expected a list"),
    "a list in params": (
        lambda saved: saved["param_groups"][0]["params"].__setitem__(3, [1]),
        "params of parameter group 0 holds a list, expected a list of numbers or names",
    ),
    "True in params": (
        lambda saved: saved["param_groups"][0]["params"].__setitem__(1, True),
        "params of parameter group 0 holds True",
    ),
    "params, a dict": (group(params={}), "param_groups is no list of groups with params"),
    "keys of many types": (
        lambda saved: saved["state"][0].update({("a",): 1, None: 2, True: 3}),
        r"the state of model\.embed_tokens\.weight is \[.*only Adam",
    ),
    "no groups": (lambda saved: saved.update(param_groups=5), "is no optimizer state"),
    "lr, a text": (group(lr="x"), "parameter group 0: lr is 'x', expected a number at least 0"),
    "lr, none": (group(lr=None), "parameter group 0: lr is None, expected a number at least 0"),
    "lr, 10**400": (group(lr=HUGE), "it holds an integer of 1329 bits"),
    "lr, nan": (group(lr=math.nan), "parameter group 0: lr is nan, expected a number at least 0"),
    "lr, negative": (group(lr=torch.tensor(-1e-3)), "parameter group 0: lr is -0.001.*, expected a number at least 0"),
    "lr, True": (group(lr=True), "parameter group 0: lr is True"),
    "lr, a list": (group(lr=[1e-3]), "parameter group 0: lr is a list, expected a number"),
    "decay, negative": (
        group(weight_decay=-0.1),
        "parameter group 0: weight_decay is -0.1, expected a number at least",
    ),
    "decay, infinite": (group(weight_decay=math.inf), "weight_decay is inf, expected a number at least 0"),
    "betas, one": (group(betas=(0.9,)), "parameter group 0: betas is a tuple, expected two numbers"),
    "betas, 1": (group(betas=(0.9, 1.0)), "betas is 1.0, expected a number at least 0 and below 1"),
    "betas, texts": (group(betas=("a", "b")), "betas is 'a', expected a number at least 0 and below 1"),
    "eps, nan": (group(eps=math.nan), "parameter group 0: eps is nan, expected a number at least 0"),
    "amsgrad": (group(amsgrad=True), "amsgrad is True, and the state has no max_exp_avg_sq"),
    "maximize, a text": (group(maximize="no"), "maximize is 'no', expected true or false"),
    "a setting that is none": (group(mystery=math.nan), "parameter group 0: mystery is nan, expected a number"),
    "a setting without a name": (lambda saved: saved["param_groups"][0].update({5: 1.0}), "a setting called 5"),
    "step, a complex number": (step(torch.tensor(1j)), "step of .* is a tensor, expected a whole number"),
    "a set": (group(mystery={1}), r"mystery is an object, .*\.set, expected numbers"),
}
IMPOSSIBLE = {
    "v, negative": (
        one((0, 0), -1e-30),
        r"exp_avg_sq.*\[(0, )?0, 0\] is -1.*e-30, and a mean of squares is not negative",
    ),
    "v, nan": (one((1, 2), math.nan), r"exp_avg_sq.*(is nan|\[(0, )?1, 2\] is NaN or infinite)"),
    "v, infinite": (one((1, 2), math.inf), r"exp_avg_sq.*(is inf|\[(0, )?1, 2\] is NaN or infinite)"),
    "m, nan": (first_moment(math.nan), r"exp_avg.*\[(0, )?0, 0\] is NaN or infinite"),
}


def plant(edit, source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    saved = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
    edit(saved)
    torch.save(saved, folder / OPTIMIZER_FILE)
    return folder


def command(kind: str, folder: Path, out: Path, *more: str) -> list[str]:
    if kind == "grow":
        sizes = ["--set", "intermediate_size=96", "--set", "num_hidden_layers=4"]
        return ["grow", str(folder), str(out), "--optimizer", str(folder), *sizes, *more]
    return ["export", str(folder), str(out), "--to", kind, "--optimizer", *more]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "grow") for name in UNREADABLE), *((name, "torch_dist") for name in UNREADABLE if name.startswith("lr"))],
)
def test_a_state_that_is_none_is_refused_in_one_line(name, kind, source, tmp_path):
    edit, message = UNREADABLE[name]
    folder = plant(edit, source, tmp_path / "model")
    result = CliRunner().invoke(app, command(kind, folder, tmp_path / "out"))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(line)
    assert str(folder / OPTIMIZER_FILE) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "more"),
    [("grow", "--allow-nonfinite"), ("grow", "--no-digest"), ("torch_dist", "--no-digest"), ("dcp", "--workers=1")],
)
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_moments_that_no_adam_has_are_never_written(name, kind, more, source, tmp_path):
    """Whatever is allowed of weights, whether or not anything is hashed, and where bytes are only copied (dcp)."""
    edit, message = IMPOSSIBLE[name]
    folder = plant(edit, source, tmp_path / "model")
    result = CliRunner().invoke(app, command(kind, folder, tmp_path / "out", more))
    assert result.exit_code == 1, result.output
    with pytest.raises(CheckpointError, match=rf"{message}.*leave --optimizer out"):
        raise CheckpointError(result.stderr.splitlines()[-1])
    assert not list((tmp_path / "out").rglob("model*.safetensors"))
    assert not list((tmp_path / "out").rglob(".metadata"))


def test_minus_zero_is_a_second_moment(source, tmp_path):
    folder = plant(one((0, 0), -0.0), source, tmp_path / "model")
    assert CliRunner().invoke(app, command("grow", folder, tmp_path / "out")).exit_code == 0


@pytest.mark.parametrize(("key", "value"), [("exp_avg_sq", -1e-30), ("exp_avg_sq", math.nan), ("exp_avg", math.nan)])
def test_a_grown_state_that_no_adam_has_is_not_loaded(key, value, source, tmp_path):
    """As somebody's edit of it in place, which no record was asked about."""
    grow_checkpoint(source, tmp_path / "out", {"intermediate_size": 96}, optimizer=source)
    (tmp_path / "out/teleflm_manifest.json").unlink()
    saved = torch.load(tmp_path / "out" / OPTIMIZER_FILE, weights_only=True)
    saved["state"][4][key][0, 0] = value
    torch.save(saved, tmp_path / "out" / OPTIMIZER_FILE)
    model = TeleFLMForCausalLM.from_pretrained(tmp_path / "out")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt: {key} of model\..* holds .*no optimizer goes on from"):
        load_adam_state(optimizer, model, tmp_path / "out" / OPTIMIZER_FILE)


# What a run noted of what it saved.


@pytest.fixture
def noted(source, tmp_path) -> Path:
    """A folder as a run leaves it: what it saved is in its note."""
    folder = shutil.copytree(source, tmp_path / "checkpoint-2")
    note(folder)
    return folder


def note(folder: Path) -> None:
    run = {"made_from": {}, "batch_size": 1, "keys": {}, FILES: describe_files(folder)}
    (folder / RUN).write_text(json.dumps(seal(run)))


def exchange(folder: Path) -> None:
    """The state of another run at the same step: of the same size, names and steps."""
    saved = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
    for entry in saved["state"].values():
        entry["exp_avg"].mul_(0.5)
    torch.save(saved, folder / OPTIMIZER_FILE)


def test_an_exchanged_state_of_the_same_step_is_found(noted, tmp_path):
    check_saved_files(noted)
    before = (noted / OPTIMIZER_FILE).stat().st_size, sample_digest(noted / OPTIMIZER_FILE)
    exchange(noted)
    assert (noted / OPTIMIZER_FILE).stat().st_size == before[0]
    message = r"optimizer\.pt: has other content, so it is not what was saved with the rest of the checkpoint"
    for make in (
        lambda: grow_checkpoint(noted, tmp_path / "out", {"intermediate_size": 96}, optimizer=noted),
        lambda: export_checkpoint(noted, tmp_path / "out", to="dcp", optimizer=True),
    ):
        with pytest.raises(CheckpointError, match=message):
            make()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, "model.safetensors"])
def test_a_note_that_came_with_an_exchanged_file_is_of_other_weights(name, noted, source, tmp_path):
    """The fault: file and note of another checkpoint; what is left of this one does not fit that note."""
    other = shutil.copytree(source, tmp_path / "other")
    exchange(other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4:] = np.float32(0.25).tobytes()
    (other / "model.safetensors").write_bytes(weights)
    note(other)
    for taken in (name, RUN):
        shutil.copy(other / taken, noted / taken)
    with pytest.raises(CheckpointError, match="it is not what was saved with the rest of the checkpoint"):
        check_saved_files(noted)


def test_a_note_that_was_edited_is_refused(noted):
    (noted / RUN).write_text((noted / RUN).read_text().replace('"bytes": ', '"bytes": 1'))
    with pytest.raises(CheckpointError, match=r"run\.json was edited since it was written"):
        check_saved_files(noted)


@pytest.mark.parametrize("text", ["[1]", "{", '{"files": 5}', '{"files": {"optimizer.pt": {}}}', "\udc80"])
def test_a_run_json_of_another_program_is_nothing_to_us(text, noted):
    exchange(noted)
    (noted / RUN).write_bytes(text.encode("utf-8", "surrogatepass"))
    check_saved_files(noted)


@pytest.mark.parametrize("kind", ["adafactor", "sgd"])
def test_the_settings_of_other_optimizers_are_theirs(kind, tmp_path):
    """Adafactor has a pair for eps, a negative decay_rate, and no rate."""
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Adafactor([weight]) if kind == "adafactor" else torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / OPTIMIZER_FILE)
    check_resumed_state(tmp_path / OPTIMIZER_FILE)


def test_a_folder_whose_run_noted_nothing_is_taken_as_it_is(noted):
    exchange(noted)
    (noted / RUN).unlink()
    check_saved_files(noted)


@pytest.mark.parametrize("place", ["optimizer_0", "pytorch_model_fsdp_0"])
def test_parts_of_another_checkpoint_are_found_where_they_are_converted(place, source, tmp_path):
    """The fault: a folder of parts is exchanged as a whole, metadata and all, for that of another run."""
    run, other = tmp_path / "run", shutil.copytree(source, tmp_path / "other")
    export_checkpoint(source, run, to="dcp", optimizer=True)
    note(run)
    convert_checkpoint(run, tmp_path / "out", optimizer=True, vocab_size=640)
    exchange(other)
    weights = TeleFLMForCausalLM.from_pretrained(other)
    weights.lm_head.weight.data.mul_(0.5)
    weights.save_pretrained(other)
    export_checkpoint(other, tmp_path / "theirs", to="dcp", optimizer=True)
    shutil.rmtree(run / place)
    shutil.copytree(tmp_path / "theirs" / place, run / place)
    with pytest.raises(CheckpointError, match=rf"{place}/.*it is not what was saved with the rest of the checkpoint"):
        convert_checkpoint(run, tmp_path / "again", optimizer=True, vocab_size=640)
    assert not (tmp_path / "again").exists()
