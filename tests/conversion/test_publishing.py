# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Publishing, by the real client of the Hub over HTTP to a small Hub on this machine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import teleflm.app
from conversion import WriteOptions, convert_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.hub.publishing import publish
from conversion.inspect import inspect_checkpoint
from tests.fixtures.hub import Fault, running_hub
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

ROOT = Path(teleflm.__file__).parent.parent
REPO = "owner/model"
CODE = {"configuration_teleflm.py", "modeling_teleflm.py", "tokenization_teleflm.py"}
TEXTS = {"README.md", "config.json", MANIFEST, "model.safetensors.index.json"}
TOKENIZER = {"tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("hub") / "out"
    tiny_model(tiny_config()).save_pretrained(source)
    tiny_tokenizer(source).save_pretrained(source)
    convert_checkpoint(source, out, options=WriteOptions(max_shard_size="100kB"))
    return out


@pytest.fixture
def folder(hub_folder, tmp_path):
    return Path(shutil.copytree(hub_folder, tmp_path / "folder"))


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


def run(hub, *arguments):
    """The command in a process of its own: the client reads where its Hub is when it is imported."""
    command = [sys.executable, "-m", "teleflm", "publish", *map(str, arguments)]
    environment = hub.environment(HF_HUB_DISABLE_XET="1")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_what_a_reader_needs_arrives_and_the_weights_arrive_first(hub, folder):
    (folder / "optimizer.pt").write_bytes(b"not for the public")
    (folder / "checkpoint-10").mkdir()
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1

    result = run(hub, folder, REPO, "--private", "--revision", "step7", "-m", "The seventh", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    repository = hub.repositories[REPO]
    assert repository.private
    second, first, initial = repository.history("step7")
    assert repository.history() == [initial]
    assert [first.message, second.message] == ["The seventh"] * 2
    assert first.tree.keys() - initial.tree.keys() == said["weights"].keys() == shards
    small = CODE | TEXTS | TOKENIZER | {"generation_config.json"}
    assert second.tree.keys() - first.tree.keys() == said["small_files"].keys() == small
    assert all((folder / name).read_bytes() == repository.files("step7")[name] for name in shards | small)
    assert said["left_out"] == ["checkpoint-10", "optimizer.pt"]
    assert said["url"] == f"{hub.url}/{REPO}/commit/{second.sha}"


def test_moments_stay_here_and_the_published_record_does_not_miss_them(hub, folder, tmp_path):
    record = json.loads((folder / MANIFEST).read_text())
    listed = {**record, "files": {**record["files"], "optimizer.pt": {"bytes": 3, "sha256": "0" * 64}}}
    (folder / MANIFEST).write_text(json.dumps(listed))
    (folder / "optimizer.pt").write_bytes(b"mom")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: apache-2.0\n", 1))
    result = run(hub, folder, REPO)
    assert result.returncode == 0, result.stderr
    files = hub.repositories[REPO].files()
    assert "optimizer.pt" not in files
    assert json.loads(files[MANIFEST]) == record
    for name, content in files.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    damages = inspect_checkpoint(tmp_path / "there", check=True).damages
    assert [damage.file for damage in damages] == ["README.md"]  # which got its licence


def test_what_the_hub_refuses_is_one_line_and_the_command_goes_on_later(hub, folder):
    hub.fault = lambda request: Fault.status(403, "No write access") if "/commit/" in request.path else None
    result = run(hub, folder, REPO)
    assert result.returncode == 1
    assert len(hub.repositories[REPO].history()) == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("teleflm: ")]
    assert len(lines) == 1
    assert re.fullmatch(r"teleflm: owner/model: .*403.*; the same command goes on from here", lines[0])
    hub.fault = None
    assert run(hub, folder, REPO).returncode == 0
    assert len(hub.repositories[REPO].history()) == 3


def test_a_dry_run_touches_nothing(hub, folder):
    result = run(hub, folder, REPO, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"would be uploaded to owner/model", result.stdout)
    assert (hub.repositories, hub.requests) == ({}, [])


def test_a_hub_that_is_not_there_is_one_line(folder, hub):
    hub.url = "http://127.0.0.1:9"
    result = run(hub, folder, REPO)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "teleflm: owner/model: " in result.stderr


def damage_weights(folder):
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, path)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


FAULTS = {
    "damaged": (damage_weights, r"00001-of-.*safetensors: .* make the folder anew"),
    "no shard": (lambda folder: min(folder.glob("*.safetensors")).unlink(), "model-00001-of"),
    "unfinished": (lambda folder: (folder / ".teleflm").mkdir(), "holds .teleflm of an unfinished run"),
    "partial": (lambda folder: (folder / "a.safetensors.partial").touch(), "holds a.safetensors.partial of an unfin"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "README.md: no such file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "wrong size": (lambda folder: edit_config(folder, num_hidden_layers=9), "layers"),
    "stray shard": (
        lambda folder: shutil.copy(min(folder.glob("*.safetensors")), folder / "model-old.safetensors"),
        "model-old.safetensors: is not in the index",
    ),
    "local path": (
        lambda folder: edit_config(folder, _name_or_path="/home/me/m"),
        "_name_or_path is /home/me/m, a fold",
    ),
    "pickles only": (
        lambda folder: [path.rename(path.with_suffix(".bin")) for path in folder.glob("*.safetensors")],
        "holds no safetensors; teleflm convert",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_nobody_should_get_is_refused(fault, folder):
    plant, message = FAULTS[fault]
    plant(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        publish(folder, REPO, dry_run=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "owner/mo del", "owner/.."])
def test_an_impossible_name_is_refused(repo_id, folder):
    with pytest.raises(CheckpointError, match=re.escape(repo_id)):
        publish(folder, repo_id, dry_run=True)


@pytest.mark.parametrize("name", ["", "owner/base", None])
def test_a_name_that_is_no_folder_is_let_through(name, folder):
    edit_config(folder, _name_or_path=name)
    assert publish(folder, REPO, dry_run=True).weights


def test_the_check_can_be_left_out(folder):
    damage_weights(folder)
    assert publish(folder, REPO, check=False, dry_run=True).url is None
