# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A preset stands for a checkpoint wherever no weights are read, and for none where they are."""

import json
import os
import re
from pathlib import Path

import pytest

from conversion import inspect_checkpoint
from conversion.architecture import Architecture, load_preset, preset_names
from conversion.checkpoint import execute
from conversion.hollow import hollow_checkpoint, is_preset
from growth import grow_checkpoint
from teleflm.app import main


def teleflm(monkeypatch, *arguments: str) -> int:
    """Run the program in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["teleflm", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("preset", preset_names())
def test_a_hollow_checkpoint_is_the_presets_and_takes_no_room(preset):
    with hollow_checkpoint(preset) as folder:
        found = inspect_checkpoint(folder)
        assert found.architecture == Architecture.from_config(load_preset(preset))
        assert found.parameters == found.architecture.num_parameters
        assert found.dtypes.keys() == {"bfloat16"}
        assert sum(file.stat().st_blocks * 512 for file in folder.iterdir()) < 20e6
    assert not folder.parent.exists()


def test_inspect_tells_a_preset(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert teleflm(monkeypatch, "inspect", "tele-flm-1t", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["folder"], said["parameters"]) == ("tele-flm-1t", 1_083_813_908_480)
    assert said["warnings"][0].startswith("This is a preset: there are no weights here")
    assert said["chain"] == said["lineage"] == said["problems"] == []
    assert teleflm(monkeypatch, "inspect", "tele-flm-1t", "--check") == 2
    assert "tele-flm-1t is a preset, which has no weights to read" in capsys.readouterr().err


def test_grow_plans_with_a_preset_what_it_plans_with_weights(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    teleflm(monkeypatch, "grow", "tele-flm-52b", "out", "--to", "tele-flm-102b", "--dry-run", "--json")
    said = json.loads(capsys.readouterr().out)
    with hollow_checkpoint("tele-flm-52b") as folder:
        plan = grow_checkpoint(folder, tmp_path / "out", "tele-flm-102b", dry_run=True).plan
    assert {tensor["name"]: tensor["shape"] for tensor in said["tensors"]} == {
        tensor.name: list(tensor.shape) for tensor in plan.tensors
    }
    assert said["notes"][0].startswith("tele-flm-52b is a preset: nothing was read")
    assert os.listdir() == []


def test_a_plan_says_its_memory_where_it_would_be_refused_and_nothing_of_rows_that_no_tokenizer_tells(
    capsys, monkeypatch, tmp_path
):
    """The published models have rows without a piece: a preset, which has no tokenizer, is not known to have none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execute, "free_space", lambda folder: 10**9)
    assert teleflm(monkeypatch, "grow", "tele-flm-102b", "out", "--to", "tele-flm-1t", "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"^Would be refused, .*; it takes at most [\d.]+ [MG]B of memory\.$", said, re.MULTILINE)
    assert "The source has no tokenizer that tells its unused vocabulary rows, so new ones repeat the mean of" in said
    assert "has no unused vocabulary rows" not in said


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ([], "writing"),
        (["--dry-run", "--layers", "distance"], "--layers distance"),
        (["--dry-run", "--verify-source"], "--verify-source"),
        (["--dry-run", "--optimizer", "state"], "--optimizer"),
    ],
)
def test_what_needs_weights_is_refused(more, asked, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert teleflm(monkeypatch, "grow", "tele-flm-52b", "out", "--to", "tele-flm-102b", *more) == 2
    assert f"tele-flm-52b is a preset, and {asked} needs weights" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_folder_of_that_name_goes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert is_preset("tele-flm-1t")
    Path("tele-flm-1t").mkdir()
    assert not is_preset("tele-flm-1t")
    Path("tele-flm-52b").symlink_to("a disk that is not mounted")
    assert not is_preset("tele-flm-52b")
