# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Publishing, by the real client of the Hub over HTTP to a small Hub on this machine."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.numpy import load_file, save_file

import teleflm.app
from conversion import WriteOptions, convert_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST, is_edited, seal
from conversion.hub import loading
from conversion.hub.published_card import CardOptions
from conversion.hub.publishing import publish
from conversion.inspect import inspect_checkpoint
from growth import grow_checkpoint
from tests.fixtures.hub import Fault
from tests.fixtures.hub.repositories import Blob
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

ROOT = Path(teleflm.__file__).parent.parent
REPO = "owner/model"
CODE = {"configuration_teleflm.py", "modeling_teleflm.py", "tokenization_teleflm.py"}
TEXTS = {"README.md", "config.json", MANIFEST, "model.safetensors.index.json"}
TOKENIZER = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_model(tiny_config()).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\n---\n# The source\n")
    return folder


@pytest.fixture(scope="module")
def versions(source, tmp_path_factory):
    """Two versions of a model: the first in one file, the second, which grew, in several."""
    first, second = (tmp_path_factory.mktemp("hub") / name for name in ("v1", "v2"))
    convert_checkpoint(source, first)
    grow_checkpoint(source, second, overrides={"num_hidden_layers": 4}, options=WriteOptions(max_shard_size="100kB"))
    return first, second


@pytest.fixture
def folder(versions, tmp_path):
    return Path(shutil.copytree(versions[1], tmp_path / "folder"))


def run(hub, *arguments, **environment):
    """The command in a process of its own: the client reads where its Hub is when it is imported."""
    command = [sys.executable, "-m", "teleflm", "publish", *map(str, arguments)]
    environment = hub.environment(**{"HF_HUB_DISABLE_XET": "1", **environment})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def weights_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def loads(files):
    """Whether a repository holds one whole version: what its index or its one file says is there, and nothing else."""
    weights = {name for name in files if name.endswith(".safetensors")}
    if "model.safetensors.index.json" in files:
        return weights == set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    return weights == {"model.safetensors"}


def test_one_commit_holds_what_a_reader_needs(hub, folder):
    (folder / "optimizer.pt").write_bytes(b"not for the public")
    (folder / "checkpoint-10").mkdir()
    shards = weights_of(folder).keys()
    assert len(shards) > 1

    options = ("--private", "--revision", "step7", "--tag", "v7", "-m", "The seventh\nMore of it", "--json")
    result = run(hub, folder, REPO, *options)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    repository = hub.repositories[REPO]
    assert repository.private
    only, initial = repository.history("step7")
    assert repository.history() == [initial]
    assert only.message.startswith("The seventh")
    assert repository.tags == {"v7": only.sha}
    assert said["weights"].keys() == shards
    assert said["small_files"].keys() == CODE | TEXTS | TOKENIZER | {"generation_config.json"}
    files = repository.files("step7")
    assert files.keys() - initial.tree.keys() == said["weights"].keys() | said["small_files"].keys()
    unchanged = files.keys() - initial.tree.keys() - {"README.md", MANIFEST}
    assert all((folder / name).read_bytes() == files[name] for name in unchanged)
    assert said["left_out"] == ["checkpoint-10", "optimizer.pt"]
    assert said["url"] == f"{hub.url}/{REPO}/commit/{only.sha}"
    assert "one token" in said["notes"][-1]


def test_the_card_has_the_name_under_which_it_loads(here, folder):
    publish(folder, REPO, load=False, card=CardOptions(base_models=["owner/base"], datasets=["owner/data"]))
    card = here.repositories[REPO].files()["README.md"].decode()
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card
    metadata = ModelCard(card).data
    assert (metadata.license, metadata.language) == ("apache-2.0", ["en", "zh"])
    assert (metadata.base_model, metadata.datasets) == (["owner/base"], ["owner/data"]) or (
        metadata.base_model,
        metadata.datasets,
    ) == ("owner/base", ["owner/data"])


def test_another_version_leaves_nothing_of_the_one_before(here, versions):
    first, second = versions
    publish(second, REPO, load=False)
    HfApi().upload_file(path_or_fileobj=b"a curve", path_in_repo="images/curve.png", repo_id=REPO)
    published = publish(first, REPO, load=False)
    assert published.removed == sorted([*weights_of(second), "model.safetensors.index.json"])
    files = here.repositories[REPO].files()
    assert weights_of(first) == {name: files[name] for name in files if name.endswith(".safetensors")}
    assert loads(files)
    assert files["images/curve.png"] == b"a curve"


def test_what_is_there_is_neither_sent_nor_committed_again(here, folder):
    first = publish(folder, REPO, load=False)
    sent, commits = dict(here.received), len(here.repositories[REPO].history())
    again = publish(folder, REPO, load=False, tag="v1")
    assert (here.received, len(here.repositories[REPO].history())) == (sent, commits)
    assert again.url == first.url
    assert here.repositories[REPO].tags == {"v1": here.repositories[REPO].history()[0].sha}


def test_a_pull_request_changes_nothing_until_it_is_merged(here, versions):
    publish(versions[0], REPO, load=False)
    before = here.repositories[REPO].files()
    url = publish(versions[1], REPO, load=False, pull_request=True).url
    assert url == f"{here.url}/{REPO}/discussions/1"
    assert here.repositories[REPO].files() == before
    assert loads(here.repositories[REPO].files("refs/pr/1"))


@pytest.mark.parametrize("most", [1, 3, 7])
def test_what_is_too_much_for_one_commit_is_still_seen_at_one_instant(most, here, versions):
    publish(versions[0], REPO, load=False)
    seen = []
    here.max_operations = most
    here.fault = lambda request: seen.append(loads(here.repositories[REPO].files()))
    publish(versions[1], REPO, load=False)
    assert all(seen)
    files = here.repositories[REPO].files()
    assert loads(files)
    assert {**files, **weights_of(versions[1])} == files
    assert [request.status for request in here.repositories[REPO].pull_requests.values()] == ["merged"]


def test_somebody_else_who_commits_meanwhile_is_not_overwritten(here, folder, versions):
    publish(versions[0], REPO, load=False)

    def commit_between(*_):
        if "theirs.txt" not in here.repositories[REPO].files():
            HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=REPO)

    with pytest.raises(CheckpointError, match=r"owner/model: was \w{12} when it was looked at, and somebody has comm"):
        publish(folder, REPO, load=False, hash_progress=commit_between)
    assert loads(here.repositories[REPO].files())
    publish(folder, REPO, load=False)
    assert {**here.repositories[REPO].files(), **weights_of(folder)} == here.repositories[REPO].files()
    assert here.repositories[REPO].files()["theirs.txt"] == b"theirs"


FAILURES = {
    "unavailable": Fault.status(503),
    "forbidden": Fault.status(403, "You have exceeded your storage quota"),
    "cut": Fault.cut(10),
    "dropped": Fault.drop(),
    "answer lost": Fault.drop(after_effect=True),
    "wrong length": Fault.wrong_length(),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_whatever_fails_the_repository_loads_and_the_command_goes_on(kind, here, versions):
    """At every third request of a publication in turn; the client gives up, as the fault stays."""
    first, second = versions
    publish(first, REPO, load=False)
    old = here.repositories[REPO].files()
    counted = []
    here.fault = lambda request: counted.append(request.path)
    publish(second, REPO, load=False, dry_run=True)
    at = len(counted)
    points = range(1 + FAILURES_ORDER.index(kind) % 3, at + 12, 3)
    for point in points:
        number, failed = itertools.count(1), []

        def fail(request, number=number, point=point, failed=failed):
            assert loads(here.repositories[REPO].files())
            if next(number) >= point and not failed.count(request.path) > 20:
                failed.append(request.path)
                return FAILURES[kind]
            return None

        here.fault = fail
        with suppress(CheckpointError, OSError):
            publish(second, REPO, load=False)
        here.fault = None
        files = here.repositories[REPO].files()
        assert loads(files)
        assert files == old or {**files, **weights_of(second)} == files
    publish(second, REPO, load=False)
    files = here.repositories[REPO].files()
    assert loads(files)
    assert {**files, **weights_of(second)} == files


FAILURES_ORDER = [*FAILURES]


def test_what_is_published_fits_its_record_whose_earlier_digest_it_names(here, folder, tmp_path):
    """Moments stay here and the card gets its name: the published record says so, and is not the folder's."""
    before = (folder / MANIFEST).read_bytes()
    record = json.loads(before)
    moments = {"optimizer.pt": {"bytes": 3, "sha256": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps(seal({**record, "files": {**record["files"], **moments}})))
    (folder / "optimizer.pt").write_bytes(b"mom")
    of_folder = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    publish(folder, REPO, load=False)
    (tmp_path / "there").mkdir()
    for name, content in here.repositories[REPO].files().items():
        (tmp_path / "there" / name).write_bytes(content)
    assert not (tmp_path / "there/optimizer.pt").exists()
    assert inspect_checkpoint(tmp_path / "there", check=True).damages == []
    published = json.loads((tmp_path / "there" / MANIFEST).read_text())
    assert published["earlier"] == [of_folder]
    assert not is_edited(published)
    assert (folder / "README.md").read_bytes() != (tmp_path / "there/README.md").read_bytes()


def test_an_edited_record_is_published_as_it_is(here, folder):
    record = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**record, "seed": 5}))
    publish(folder, REPO, load=False, check=False)
    assert is_edited(json.loads(here.repositories[REPO].files()[MANIFEST]))


def test_what_the_hub_refuses_is_one_line_and_the_command_goes_on_later(hub, folder):
    hub.fault = lambda request: Fault.status(403, "No write access") if "/commit/" in request.path else None
    result = run(hub, folder, REPO, "--no-load")
    assert result.returncode == 1
    assert len(hub.repositories[REPO].history()) == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("teleflm: ")]
    assert lines == [
        "teleflm: owner/model: the Hub refuses: No write access; the same command goes on once that is settled"
    ]
    hub.fault = None
    assert run(hub, folder, REPO, "--no-load").returncode == 0
    assert len(hub.repositories[REPO].history()) == 2


def test_a_full_quota_is_one_line(here, folder):
    here.quota = 1000
    with pytest.raises(OSError, match=r"[Qq]uota|storage"):
        publish(folder, REPO, load=False)
    assert len(here.repositories[REPO].history()) == 1


def test_a_dry_run_touches_nothing(here, folder, versions):
    publish(versions[0], REPO, load=False)
    before, sent = here.repositories[REPO].history(), dict(here.received)
    planned = publish(folder, REPO, load=False, dry_run=True)
    assert planned.url is None
    assert planned.removed == ["model.safetensors"]
    assert (here.repositories[REPO].history(), here.received) == (before, sent)
    assert publish(folder, "owner/other", load=False, dry_run=True).notes == [
        "owner/other is not there yet, and would be made."
    ]
    assert here.repositories.keys() == {REPO}


def test_a_hub_that_is_not_there_is_one_line(folder, hub):
    hub.url = "http://127.0.0.1:9"
    result = run(hub, folder, REPO)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "teleflm: owner/model: " in result.stderr


def test_xet_is_the_way_of_the_client_and_works_as_well(hub, folder):
    result = run(hub, folder, REPO, "--no-load", HF_HUB_DISABLE_XET="0")
    assert result.returncode == 0, result.stderr
    assert {**hub.repositories[REPO].files(), **weights_of(folder)} == hub.repositories[REPO].files()
    assert any("xet" in request.path for request in hub.requests)


# May we? Found out before anything is read in full, hashed or sent.

NOT_ALLOWED = {
    "no token": ({"HF_TOKEN": ""}, {}, "no token; run `hf auth login` or set HF_TOKEN"),
    "a token that may only read": ({"HF_TOKEN": "hf_reader"}, {}, "this token may only read"),
    "an unknown token": ({"HF_TOKEN": "hf_stranger"}, {}, "token"),
    "somebody else's name": ({}, {"repo_id": "stranger/model"}, "stranger is neither owner, whose token this is, nor"),
    "a dataset": ({}, {"repo_id": "owner/data"}, "is a dataset on the Hub, expected a model"),
    "public": ({}, {"private": True}, "is public, and --private does not change that"),
    "a tag that is taken": ({}, {"tag": "v1"}, "has a tag v1 already, of "),
    "a tag of a pull request": ({}, {"tag": "v2", "pull_request": True}, "a pull request has no commit of its own"),
}


@pytest.mark.parametrize("case", NOT_ALLOWED)
def test_what_may_not_be_is_found_before_anything_is_read(case, here, folder, versions, monkeypatch, tmp_path):
    variables, arguments, message = NOT_ALLOWED[case]
    here.tokens["hf_reader"] = "read"
    here.namespaces = {"owner"}
    here.add_repository("owner/data", {"a.txt": b"a"}, kind="dataset")
    publish(versions[0], REPO, load=False, tag="v1")
    publish(versions[1], REPO, load=False)
    before = dict(here.received)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    read = []
    with pytest.raises((CheckpointError, OSError), match=re.escape(message)) as caught:
        publish(
            folder, **{"repo_id": REPO, "load": False, "progress": lambda *nbytes: read.append(nbytes), **arguments}
        )
    assert not read
    assert here.received == before
    assert "hf_" not in str(caught.value)


# Whose words.


def test_the_owners_words_survive_a_publication(here, folder, versions):
    publish(versions[0], REPO, load=False)
    card = here.repositories[REPO].files()["README.md"].decode()
    words = card.replace("license: apache-2.0", "license: apache-2.0\nthumbnail: x.png") + "\n## Thanks\n\nTo all.\n"
    HfApi().upload_file(path_or_fileobj=words.encode(), path_in_repo="README.md", repo_id=REPO)
    publish(folder, REPO, load=False)
    card = here.repositories[REPO].files()["README.md"].decode()
    assert "To all." in card
    assert ModelCard(card).data.thumbnail == "x.png"
    assert "num_hidden_layers 3 to 4" in card

    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n## Mine\n\nOther words.\n")
    with pytest.raises(CheckpointError, match=r"has words of its own, and the README.md of the repository other ones"):
        publish(folder, REPO, load=False)
    publish(folder, REPO, load=False, card=CardOptions(words="there"))
    assert "To all." in here.repositories[REPO].files()["README.md"].decode()
    publish(folder, REPO, load=False, card=CardOptions(words="here"))
    assert "Other words." in here.repositories[REPO].files()["README.md"].decode()


def test_a_model_without_a_licence_is_refused(folder):
    (folder / "README.md").write_text("# A model\n")
    with pytest.raises(CheckpointError, match=r"README.md: license is missing.* Or give --license\."):
        publish(folder, REPO, load=False, dry_run=True)
    assert publish(folder, REPO, load=False, dry_run=True, card=CardOptions(license="apache-2.0")).weights
    with pytest.raises(CheckpointError, match="license is 'gpl-99', no identifier of the Hub's"):
        publish(folder, REPO, load=False, dry_run=True, card=CardOptions(license="gpl-99"))


# What nobody should get.


def damage_weights(folder):
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, path)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_config(folder, **changes):
    edit(folder / "config.json", **changes)


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
        "_name_or_path is /home/me/m, a path of this machine",
    ),
    "local path of a tokenizer": (
        lambda folder: edit(folder / "tokenizer_config.json", special_tokens_map_file="/home/me/.cache/x.json"),
        "tokenizer_config.json: special_tokens_map_file is /home/me/.cache/x.json, a path of this machine",
    ),
    "local path somewhere": (
        lambda folder: edit(folder / "generation_config.json", made={"by": [{"on": "C:\\\\Users\\\\me"}]}),
        "generation_config.json: on is C:",
    ),
    "a secret": (
        lambda folder: edit_config(folder, note="use hf_" + "aB3" * 12),
        r"config.json: line \d+ holds what looks like a token of the Hub; take it out",
    ),
    "a key in a text": (
        lambda folder: (folder / "LICENSE").write_text("-----BEGIN RSA PRIVATE KEY-----"),
        "LICENSE: line 1 holds what looks like a private key",
    ),
    "a link that leads out": (
        lambda folder: ((folder / "LICENSE").unlink(missing_ok=True), (folder / "LICENSE").symlink_to("/etc/hostname")),
        "LICENSE: is a link to /etc/hostname, outside of",
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
        publish(folder, REPO, load=False, dry_run=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "owner/mo del", "owner/.."])
def test_an_impossible_name_is_refused(repo_id, folder):
    with pytest.raises(CheckpointError, match=re.escape(repo_id)):
        publish(folder, repo_id, load=False, dry_run=True)


@pytest.mark.parametrize("name", ["", "owner/base", None])
def test_a_name_that_is_no_folder_is_let_through(name, folder):
    edit_config(folder, _name_or_path=name)
    assert publish(folder, REPO, load=False, dry_run=True).weights


def test_the_check_can_be_left_out(folder):
    damage_weights(folder)
    assert publish(folder, REPO, check=False, load=False, dry_run=True).url is None


def test_a_card_that_the_hub_would_not_take_is_found_before_anything_is_made(here, folder):
    """By the Hub's own word, which knows more than we do; also of a repository that is not there yet."""
    here.fault = lambda request: Fault.status(400) if "validate-yaml" in request.path else None
    with pytest.raises((CheckpointError, OSError), match=r"owner/model: "):
        publish(folder, REPO, load=False)
    assert here.repositories == {}


# What a hostile reader found, each planted.


def commit_elsewhere(hub, name, content, repo=REPO):
    """Somebody else commits, in the midst of a request of ours."""
    repository = hub.repositories[repo]
    head = repository.branches["main"]
    tree = {**repository.commits[head].tree, name: Blob(content)}
    repository.move("main", repository.add_commit(head, "somebody else's", tree))


def test_a_repository_that_ignores_weights_is_not_emptied(here, folder, versions):
    publish(versions[0], REPO, load=False)
    commit_elsewhere(here, ".gitignore", b"*.safetensors\n")
    with pytest.raises(CheckpointError, match=r"its .gitignore leaves out model-00001.*, which the model needs"):
        publish(folder, REPO, load=False)
    assert loads(here.repositories[REPO].files())
    commit_elsewhere(here, ".gitignore", b"*.jinja\n")
    with pytest.raises(CheckpointError, match=r"its .gitignore leaves out chat_template.jinja"):
        publish(folder, REPO, load=False)
    assert loads(here.repositories[REPO].files())


def test_what_somebody_commits_while_the_folder_is_checked_is_not_overwritten(here, folder, versions):
    publish(versions[0], REPO, load=False)
    done = []

    def commit_once(request):
        if request.method == "POST" and request.path.startswith("/api/repos/create") and not done:
            done.append(request)
            commit_elsewhere(here, "README.md", here.repositories[REPO].files()["README.md"] + b"\nOf a colleague.\n")

    here.fault = commit_once
    with pytest.raises(CheckpointError, match="somebody has committed since"):
        publish(folder, REPO, load=False)
    here.fault = None
    publish(folder, REPO, load=False)
    assert b"Of a colleague." in here.repositories[REPO].files()["README.md"]


def test_metadata_of_the_hub_survives_and_a_contradiction_is_asked_about(here, folder, versions):
    publish(versions[0], REPO, load=False)
    card = here.repositories[REPO].files()["README.md"].decode()
    own = card.replace("license: apache-2.0", "license: apache-2.0\nthumbnail: x.png\nextra_gated_prompt: Agree.")
    commit_elsewhere(here, "README.md", own.encode())
    publish(folder, REPO, load=False)
    metadata = ModelCard(here.repositories[REPO].files()["README.md"].decode()).data
    assert (metadata.thumbnail, metadata.extra_gated_prompt) == ("x.png", "Agree.")
    commit_elsewhere(here, "README.md", own.replace("license: apache-2.0", "license: mit").encode())
    with pytest.raises(CheckpointError, match=r"has another license, and the README.md of the repository other ones"):
        publish(folder, REPO, load=False)
    publish(folder, REPO, load=False, card=CardOptions(words="there"))
    assert ModelCard(here.repositories[REPO].files()["README.md"].decode()).data.license == "mit"


def test_what_was_looked_at_is_what_is_published(here, folder):
    """Files that change between the look and the commit: small ones count as they were, weights stop it."""
    shard = min(folder.glob("*.safetensors"))

    def change(request):
        if request.path.startswith("/api/repos/create"):
            edit(folder / "generation_config.json", note="/home/alice/secret")

    here.fault = change
    publish(folder, REPO, load=False)
    assert b"alice" not in here.repositories[REPO].files()["generation_config.json"]

    def change_weights(request):
        if request.path.startswith("/api/repos/create"):
            times = shard.stat()
            content = shard.read_bytes()
            shard.write_bytes(content[:-16] + bytes(16))
            os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))

    (folder / "generation_config.json").write_text("{}")
    here.fault = change_weights
    before = here.repositories[REPO].files()
    with pytest.raises(CheckpointError, match=r"model-00001.*: was changed while it was published"):
        publish(folder, REPO, load=False)
    assert here.repositories[REPO].files() == before


def test_the_answer_to_a_tag_may_be_lost(here, folder):
    here.fault = lambda request: (
        Fault.drop(after_effect=True) if "/tag/" in request.path and request.method == "POST" else None
    )
    with suppress(OSError):
        publish(folder, REPO, load=False, tag="v1")
    here.fault = None
    publish(folder, REPO, load=False, tag="v1")
    assert here.repositories[REPO].tags == {"v1": here.repositories[REPO].branches["main"]}


def test_a_tag_is_that_of_the_commit_that_was_made(here, folder):
    def commit_before(request):
        if "/tag/" in request.path and "late.txt" not in here.repositories[REPO].files():
            commit_elsewhere(here, "late.txt", b"late")

    here.fault = commit_before
    publish(folder, REPO, load=False, tag="v1")
    assert "late.txt" not in here.repositories[REPO].files("v1")
    with pytest.raises(CheckpointError, match="v1 is a tag or a commit, and --revision has to be a branch"):
        publish(folder, REPO, load=False, revision="v1")


SECRETS = {
    "in an escape": ("generation_config.json", lambda path: path.write_text('{"a": "hf\\u005f' + "aB3" * 12 + '"}')),
    "in UTF-16": ("LICENSE", lambda path: path.write_text("hf_" + "aB3" * 12, encoding="utf-16")),
    "of PGP": ("LICENSE", lambda path: path.write_text("-----BEGIN PGP PRIVATE KEY BLOCK-----")),
    "in a path": ("generation_config.json", lambda path: edit(path, by="/usr/bin/env T=hf_" + "aB3" * 12)),
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_found_however_it_is_written_and_not_repeated(case, folder):
    name, plant = SECRETS[case]
    plant(folder / name)
    with pytest.raises(CheckpointError, match=r"holds what looks like a (token|private key)") as caught:
        publish(folder, REPO, load=False, dry_run=True)
    assert "aB3aB3" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["loaded from /home/alice/x", "file:///data/x", " /home/alice/x", "$HOME/run7", "\\\\server\\share", "~/x"],
)
def test_a_path_of_this_machine_is_found_within_a_text(path, folder):
    edit(folder / "generation_config.json", note=path)
    with pytest.raises(CheckpointError, match=r"note is .*, a path of this machine"):
        publish(folder, REPO, load=False, dry_run=True)


@pytest.mark.parametrize(
    "text", ["a/b", "and/or", "1/2", "https://huggingface.co/owner/x", "{{ a }} / {{ b }}", "/", "~"]
)
def test_a_slash_is_no_path(text, folder):
    edit(folder / "generation_config.json", note=text)
    publish(folder, REPO, load=False, dry_run=True)


def test_code_that_nobody_refers_to_stays_here(here, folder):
    (folder / "my_launch_script.py").write_text("print(1)")
    published = publish(folder, REPO, load=False)
    assert published.left_out == ["my_launch_script.py"]
    assert "my_launch_script.py" not in here.repositories[REPO].files()


def test_an_index_that_names_another_file_is_refused(folder):
    last = max(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(last.name, "part4.safetensors"))
    last.rename(folder / "part4.safetensors")
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"names part4.safetensors, which is not there, or not called model\*"):
        publish(folder, REPO, load=False, dry_run=True)


def test_a_card_says_of_a_record_that_it_was_edited_and_of_weights_that_they_are_others(here, folder):
    record = json.loads((folder / MANIFEST).read_text())
    forged = {"operation": "train", "steps": 5, "tokens": 10**9, "initial_weights": "random"}
    (folder / MANIFEST).write_text(json.dumps({**record, "lineage": forged}))
    publish(folder, REPO, load=False)
    card = here.repositories[REPO].files()["README.md"].decode()
    assert "The record of this folder was edited after it was written" in card
    (folder / MANIFEST).write_text(json.dumps(record))
    damage_weights(folder)
    publish(folder, REPO, load=False, check=False)
    card = here.repositories[REPO].files()["README.md"].decode()
    assert "What lies here is not what its record says" in card
    assert "What is exact" not in card


def test_a_load_that_does_not_end_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(loading, "_PATIENCE", 0.01)
    with pytest.raises(CheckpointError, match=r"did not load in a process of its own in 0.01 s; --no-load"):
        publish(folder, REPO, dry_run=True)


def test_a_commit_right_before_the_merge_of_a_pull_request_is_named(here, folder, versions):
    publish(versions[0], REPO, load=False)
    here.max_operations = 8

    def commit_before(request):
        if "/merge" in request.path and "pytorch_model.bin" not in here.repositories[REPO].files():
            commit_elsewhere(here, "pytorch_model.bin", b"theirs")

    here.fault = commit_before
    with pytest.raises(CheckpointError, match="somebody has committed while the pull request was merged"):
        publish(folder, REPO, load=False)
    publish(folder, REPO, load=False)
    assert loads(here.repositories[REPO].files())
    assert "pytorch_model.bin" not in here.repositories[REPO].files()
