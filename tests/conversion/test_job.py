# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Done means done, and the same means the same: whatever differs is named, and nothing else is called done."""

import fcntl
import hashlib
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from conversion import WriteOptions, convert_checkpoint, export_checkpoint, inspect_checkpoint
from conversion.checkpoint import execute
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.preflight import FOLDER
from growth import fold_masks, grow_checkpoint
from growth.method import Mask
from tests.conversion.test_deepspeed import zero2
from tests.fixtures.checkpoint_runs import contents, run_teleflm
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

NOON = 1_700_000_000


def freeze_times(folder: Path) -> None:
    """As in the image of a container, where all files are of one time."""
    for path in folder.rglob("*"):
        os.utime(path, (NOON, NOON))


@cache
def hub_files(seed: int) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        tiny_model(seed=seed).save_pretrained(place)
        tiny_tokenizer(Path(place)).save_pretrained(place)
        return contents(Path(place))


def hub_folder(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    for name, content in hub_files(seed).items():
        (folder / name).write_bytes(content)
    return folder


def bin_folder(folder: Path, seed: int) -> Path:
    hub_folder(folder, seed)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def stock_folder(folder: Path, seed: int) -> Path:
    """Of a model that is no Tele-FLM."""
    hub_folder(folder, seed)
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config.pop("auto_map", None)
        (folder / name).write_text(json.dumps({**config, "model_type": "other"}))
    return folder


def megatron_run(folder: Path, seed: int) -> Path:
    export_checkpoint(hub_folder(folder.with_name(f"{folder.name}-hub"), seed), folder, to="megatron", tp=2)
    return folder


def dcp_run(folder: Path, seed: int) -> Path:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(dict(tiny_model(seed=seed).state_dict()), checkpoint_id=folder)
    return folder


def deepspeed_run(folder: Path, seed: int) -> Path:
    return zero2(folder, tiny_model(seed=seed).state_dict())


def masked_folder(folder: Path, seed: int) -> Path:
    source = hub_folder(folder.with_name(f"{folder.name}-hub"), seed)
    grow_checkpoint(source, folder, {"hidden_size": 48, "num_attention_heads": 6}, method=Mask())
    return folder


def with_config(source: Path, out: Path, options: WriteOptions | None = None, **arguments):
    return convert_checkpoint(source, out, config=tiny_config().to_dict(), options=options, **arguments)


@dataclass(frozen=True)
class Way:
    """A way to make a checkpoint of another."""

    make: Callable[[Path, int], Path]
    write: Callable


WAYS = {
    "convert .bin": Way(bin_folder, convert_checkpoint),
    "convert safetensors": Way(hub_folder, convert_checkpoint),
    "convert another model": Way(stock_folder, convert_checkpoint),
    "convert Megatron": Way(megatron_run, convert_checkpoint),
    "convert DCP": Way(dcp_run, with_config),
    "convert DeepSpeed": Way(deepspeed_run, with_config),
    "grow": Way(
        hub_folder,
        lambda source, out, **rest: grow_checkpoint(source, out, {"hidden_size": 48, "num_attention_heads": 6}, **rest),
    ),
    "fold": Way(masked_folder, fold_masks),
    "export granite": Way(hub_folder, lambda source, out, **rest: export_checkpoint(source, out, to="granite", **rest)),
    "export llama": Way(hub_folder, lambda source, out, **rest: export_checkpoint(source, out, to="llama", **rest)),
    "export megatron": Way(
        hub_folder, lambda source, out, **rest: export_checkpoint(source, out, to="megatron", tp=2, **rest)
    ),
    "export by links": Way(
        hub_folder, lambda source, out, **rest: export_checkpoint(source, out, to="granite", link=True, **rest)
    ),
}


@pytest.fixture(scope="module", params=WAYS, ids=str)
def way(request) -> Way:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def steps(way, tmp_path_factory) -> list[Path]:
    """Two steps of one run: files of the same names, sizes, headers and times."""
    place = tmp_path_factory.mktemp("steps")
    folders = [way.make(place / f"checkpoint-{step}00", step) for step in (1, 2)]
    for folder in folders:
        for path in folder.rglob(f"*{MANIFEST}"):  # which would tell
            path.unlink()
        freeze_times(folder)
    one, other = ({path.relative_to(f): path.stat().st_size for path in f.rglob("*")} for f in folders)
    assert one == other
    return folders


def refused(write: Callable, source: Path, out: Path) -> str:
    """Why a call is refused, as it runs and as a dry run foresees it; nothing is touched."""
    before = contents(out)
    with pytest.raises(CheckpointError) as caught:
        write(source, out)
    assert "\n" not in str(caught.value)
    dry = write(source, out, dry_run=True)
    assert f"It would be refused: {caught.value}" in dry.notes
    assert dry.foreseen.refused
    assert contents(out) == before
    return str(caught.value)


def test_another_step_is_not_already_done(way, steps, tmp_path):
    first, second = steps
    out = tmp_path / "out"
    assert not way.write(first, out).written.already_done
    assert way.write(first, out).written.already_done
    assert f"{out} is already done." in way.write(first, out, dry_run=True).notes
    before = contents(out)
    text = refused(way.write, second, out)
    assert "already holds" in text
    assert "has changed since" in text
    assert contents(out) == before
    way.write(second, out, options=WriteOptions(overwrite=True))
    way.write(second, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    assert inspect_checkpoint(out).problems == []


def test_a_source_may_move(way, steps, tmp_path):
    """It is known by what it holds, not by where it lies."""
    shutil.copytree(steps[0], tmp_path / "here", symlinks=True)
    way.write(tmp_path / "here", tmp_path / "out")
    (tmp_path / "here").rename(tmp_path / "there")
    assert way.write(tmp_path / "there", tmp_path / "out").written.already_done


@pytest.mark.parametrize("name", ["config.json", "another file"])
def test_a_small_file_that_is_gone_is_written_again(name, way, steps, tmp_path):
    out = tmp_path / "out"
    way.write(steps[0], out)
    whole = contents(out)
    record = json.loads((out / MANIFEST).read_bytes())
    assert record["files"].keys() == whole.keys() - {MANIFEST}
    lost = name if name in whole else sorted(n for n, entry in record["files"].items() if "sha256" in entry)[-1]
    (out / lost).unlink()
    foreseen = way.write(steps[0], out, dry_run=True)
    assert f"{lost} would be written again." in foreseen.notes
    assert contents(out).keys() == whole.keys() - {lost}
    result = way.write(steps[0], out)
    assert (result.written.already_done, result.written.restored) == (True, (lost,))
    assert f"{lost} was missing and was written again." in result.notes
    assert contents(out) == whole


def test_a_small_file_that_was_changed_is_named(way, steps, tmp_path, monkeypatch):
    """And only it is written again, not the weights."""
    out = tmp_path / "out"
    way.write(steps[0], out)
    whole = contents(out)
    (out / "config.json").write_text("{}")
    assert refused(way.write, steps[0], out).startswith(f"{out}/config.json: is not what was written there")
    monkeypatch.setattr(execute, "write_shards", None)
    result = way.write(steps[0], out, options=WriteOptions(overwrite=True))
    assert result.written.restored == ("config.json",)
    assert contents(out) == whole


def test_weights_that_were_saved_over_are_not_already_done(way, steps, tmp_path):
    """By a trainer, under the same name, of the same size and time."""
    out = tmp_path / "out"
    way.write(steps[0], out)
    way.write(steps[1], tmp_path / "other")
    file = next(name for name in contents(out) if name.endswith((".safetensors", ".pt")))
    times = (out / file).stat()
    (out / file).unlink()  # which may be a link
    shutil.copy(tmp_path / "other" / file, out / file)
    os.utime(out / file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert refused(way.write, steps[0], out).startswith(f"{out}/{file}: is not what was written there")


@pytest.mark.parametrize("name", ["vocab.json", "pytorch_model.bin", "adapter_config.json"])
def test_a_file_that_would_be_loaded_with_a_finished_checkpoint_is_named(name, way, steps, tmp_path):
    out = tmp_path / "out"
    way.write(steps[0], out)
    whole = contents(out)
    (out / name).write_bytes(b"theirs")
    assert refused(way.write, steps[0], out).startswith(f"{out}/{name}: is not of this checkpoint")
    assert way.write(steps[0], out, options=WriteOptions(overwrite=True)).written.already_done
    assert contents(out) == whole


# What else decides the output. One way for all, and the most different.


@pytest.fixture
def source(tmp_path) -> Path:
    folder = hub_folder(tmp_path / "source", 1)
    freeze_times(folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    os.utime(path, (NOON, NOON))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tokenizer_config.json", "tokenizer_config.json would be another: what it is made from has changed since"),
        ("generation_config.json", "generation_config.json would be another"),
        ("config.json", "config.note was None and is 1"),
    ],
)
def test_a_small_file_of_the_source_that_changed_is_named(name, what, source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    edit_json(source / name, note=1)
    assert f"already holds model.safetensors, but {what}" in refused(convert_checkpoint, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "went", "came"),
    [
        ("generation_config.json", "generation_config.json is no part of it any more", "was no part of it"),
        ("tokenizer.model", *["tokenizer_config.json would be another: what it is made from has changed"] * 2),
    ],
)
def test_a_small_file_of_the_source_that_came_or_went_is_named(name, went, came, source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    (source / name).rename(tmp_path / name)
    assert went in refused(convert_checkpoint, source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "without")
    (tmp_path / name).rename(source / name)
    assert came in refused(convert_checkpoint, source, tmp_path / "without")


def test_what_was_not_looked_for_is_not_said_to_be_absent(tmp_path):
    """A run that holds NaN, converted as it is, and then strictly; and the other way round."""
    run, out = megatron_run(tmp_path / "run", 1), tmp_path / "out"

    def strict(source: Path, out: Path, **rest):
        return convert_checkpoint(source, out, **rest)

    convert_checkpoint(run, out, allow_nonfinite=True)
    assert "but finite was False and is True" in refused(strict, run, out)
    strict(run, tmp_path / "strict")
    assert convert_checkpoint(run, tmp_path / "strict", allow_nonfinite=True).written.already_done


def test_a_run_that_failed_over_a_nan_goes_on_without_looking(tmp_path):
    """As its message says; and from then on it is one that did not look."""
    run, out = megatron_run(tmp_path / "run", 1), tmp_path / "out"
    file = run / "release/mp_rank_01/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["output_layer.weight"][0] = torch.nan
    torch.save(state, file)
    with pytest.raises(CorruptData, match="--allow-nonfinite"):
        convert_checkpoint(run, out, options=WriteOptions(workers=1))
    calls = iter(range(100))

    def stop(nbytes: int, total: int) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(run, out, allow_nonfinite=True, options=WriteOptions(workers=1, progress=stop))
    with pytest.raises(CheckpointError, match=r"interrupted run, but settings\.finite was False and is True"):
        convert_checkpoint(run, out)
    convert_checkpoint(run, out, allow_nonfinite=True)
    convert_checkpoint(run, tmp_path / "fresh", allow_nonfinite=True)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"dtype": "bfloat16"}, "lineage.dtype was None and is 'bfloat16'"),
        ({"options": WriteOptions("100KB")}, "settings.max_shard_size was 5000000000 and is 100000"),
    ],
    ids=["dtype", "shard size"],
)
def test_another_argument_is_named(arguments, what, source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"already holds model.safetensors, but {what}; choose another"):
        convert_checkpoint(source, tmp_path / "out", **arguments)


def test_a_shard_size_that_changes_nothing_is_the_same(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    assert convert_checkpoint(source, tmp_path / "out", options=WriteOptions("4GB")).written.already_done


def test_another_version_of_this_package_is_the_same_until_it_writes_other_bytes(source, tmp_path, monkeypatch):
    from conversion.checkpoint import job, manifest

    monkeypatch.setattr(manifest, "package_version", lambda: "0.0.9")
    convert_checkpoint(source, tmp_path / "out")
    monkeypatch.undo()
    assert convert_checkpoint(source, tmp_path / "out").written.already_done
    monkeypatch.setattr(job, "ENGINE", job.ENGINE + 1)
    text = refused(convert_checkpoint, source, tmp_path / "out")
    assert "another version would write other bytes" in text


def test_what_is_written_is_what_was_fingerprinted(source, tmp_path):
    """A tokenizer that is replaced while the weights are being written."""
    before = (source / "tokenizer.model").read_bytes()

    def replace_the_tokenizer(nbytes: int, total: int) -> None:
        (source / "tokenizer.model").write_bytes(b"another")

    convert_checkpoint(source, tmp_path / "out", options=WriteOptions(progress=replace_the_tokenizer))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == before


# The record.


def test_the_record_says_what_each_file_is(source, tmp_path):
    """By hashlib and xxhash, over what is there."""
    import xxhash

    out = tmp_path / "out"
    convert_checkpoint(source, out, options=WriteOptions("100KB"))
    record = json.loads((out / MANIFEST).read_bytes())
    assert record["files"].keys() == contents(out).keys() - {MANIFEST}
    for name, entry in record["files"].items():
        data = (out / name).read_bytes()
        assert entry["bytes"] == len(data)
        if name.endswith(".safetensors"):
            header = data[: 8 + int.from_bytes(data[:8], "little")]
            assert entry["between"] == xxhash.xxh3_128_hexdigest(header)
        else:
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert record["sources"].keys() == {"model.safetensors"}
    assert str(tmp_path) not in json.dumps(record)


def test_a_record_holds_the_digest_of_the_one_before(source, tmp_path):
    convert_checkpoint(source, tmp_path / "one")
    grow_checkpoint(tmp_path / "one", tmp_path / "two", {"num_hidden_layers": 4})
    first, second = (json.loads((tmp_path / name / MANIFEST).read_bytes()) for name in ("one", "two"))
    parent = second["lineage"]["parent"]
    assert parent["record"] == hashlib.sha256((tmp_path / "one" / MANIFEST).read_bytes()).hexdigest()
    assert (parent["plan"], parent["lineage"]) == (first["plan"], first["lineage"])


def damaged(out: Path, tmp_path: Path) -> list[str]:
    """What `inspect --check` says."""
    result = run_teleflm("inspect", out, "--check", folder=tmp_path)
    assert result.returncode in (0, 3), result.stderr
    lines = [line.removeprefix("damaged ") for line in result.stdout.splitlines() if line.startswith("damaged ")]
    assert result.returncode == (3 if lines else 0)
    assert ("no other file would be loaded" in result.stdout) == (not lines)
    return lines


def change_the_metadata(out: Path) -> None:
    path = out / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b'"format":"pt"') == 1
    path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"'))


CHANGES = {
    "README.md": (lambda out: (out / "README.md").write_text("mine"), "README.md has 4 bytes, expected "),
    "one letter": (
        lambda out: (out / "README.md").write_bytes((out / "README.md").read_bytes().replace(b"TeleFLM", b"TeleFLN")),
        "README.md does not have its digest.",
    ),
    "no tokenizer": (lambda out: (out / "tokenizer.model").unlink(), "tokenizer.model is missing."),
    "header": (change_the_metadata, "model.safetensors differs outside of its tensors"),
    "another tokenizer": (
        lambda out: (out / "vocab.json").write_text("{}"),
        "vocab.json is not in the record, and would be loaded.",
    ),
    "other weights": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b""),
        "pytorch_model.bin is not in the record, and would be loaded.",
    ),
    "a template": (
        lambda out: [(out / "additional_chat_templates").mkdir(), (out / "additional_chat_templates/a.jinja").touch()],
        "additional_chat_templates/a.jinja is not in the record, and would be loaded.",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_check_finds_what_differs_in_any_file(change, source, tmp_path):
    harm, said = CHANGES[change]
    convert_checkpoint(source, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("of no concern")
    assert damaged(tmp_path / "out", tmp_path) == []
    harm(tmp_path / "out")
    (line,) = damaged(tmp_path / "out", tmp_path)
    assert line.startswith(said)


def test_the_arguments_in_a_megatron_file_are_checked(source, tmp_path):
    """They lie between the tensors, and decide what the weights mean."""
    export_checkpoint(source, tmp_path / "out", to="megatron")
    assert damaged(tmp_path / "out", tmp_path) == []
    file = tmp_path / "out/release/mp_rank_00/model_optim_rng.pt"
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read("model_optim_rng/data.pkl")
    assert pickled.count(b"rotary_base") == 1
    edited = pickled.replace(b"rotary_base", b"rotary_bass")
    old, new = (struct.pack("<L", zlib.crc32(content)) for content in (pickled, edited))
    file.write_bytes(data.replace(pickled, edited).replace(old, new))
    assert damaged(tmp_path / "out", tmp_path) == [
        "release/mp_rank_00/model_optim_rng.pt differs outside of its tensors: its header, or what else it holds."
    ]


OLD = {"format": 1, "teleflm_version": "0.1.0", "plan": "0" * 64, "seed": 0, "statistics": {}, "digest": None}


def test_a_record_of_version_0_1_0_is_read_and_replaced(source, tmp_path):
    """Under its old name; what it was made from it does not say."""
    out = tmp_path / "out"
    convert_checkpoint(source, out, options=WriteOptions("100KB"))
    whole = contents(out)
    record = json.loads((out / MANIFEST).read_bytes())
    (out / MANIFEST).unlink()
    old = {**OLD, "lineage": record["lineage"], "tensors": record["tensors"], "digest": record["digest"]}
    (out / "manifest.json").write_text(json.dumps(old))
    assert inspect_checkpoint(out).lineage == inspect_checkpoint(out, check=True).lineage != []

    def again(source: Path, out: Path, **rest):
        return convert_checkpoint(source, out, options=WriteOptions("100KB"), **rest)

    assert "whose record does not say from which files it was made" in refused(again, source, out)
    grow_checkpoint(out, tmp_path / "grown", {"num_hidden_layers": 4})
    parent = json.loads((tmp_path / "grown" / MANIFEST).read_bytes())["lineage"]["parent"]
    assert parent["record"] == hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    convert_checkpoint(source, out, options=WriteOptions("100KB", overwrite=True))
    assert contents(out) == whole


# Who owns what.


THEIRS = {
    "README.md": "of a folder that we would write",
    "config.json": "the same",
    "tokenizer.json": "loaded with what we write",
    "adapter_config.json": "as well",
    "additional_chat_templates/rag.jinja": "as well",
    MANIFEST: "a record without a checkpoint",
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_file_of_somebody_else_stands_in_the_way(name, source, tmp_path):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"theirs")
    (out / "thesis.tex").write_bytes(b"theirs")
    assert refused(convert_checkpoint, source, out).startswith(f"{out}/{name}: is there already")
    result = run_teleflm("convert", source, out, folder=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    convert_checkpoint(source, tmp_path / "fresh")
    convert_checkpoint(source, out, options=WriteOptions(overwrite=True))
    assert contents(out) == contents(tmp_path / "fresh") | {"thesis.tex": b"theirs"}


def test_a_file_that_comes_while_a_run_is_interrupted_is_somebody_elses(source, tmp_path):
    out = tmp_path / "out"

    def stop(nbytes: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, options=WriteOptions(progress=stop))
    (out / "README.md").write_bytes(b"theirs")
    assert refused(convert_checkpoint, source, out).startswith(f"{out}/README.md: is there already")
    (out / "README.md").unlink()
    convert_checkpoint(source, out)
    convert_checkpoint(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_never_removed(name, source, tmp_path):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "thesis.tex").write_bytes(b"theirs")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=f"{name}: is a folder, where a file has to be"):
            convert_checkpoint(source, tmp_path / "out", options=WriteOptions(overwrite=overwrite))
    assert contents(tmp_path / "out") == {f"{name}/thesis.tex": b"theirs"}


def test_overwriting_leaves_nothing_of_the_old_checkpoint_and_all_of_the_users(source, tmp_path):
    """Shards, code and settings of the one that was there would be loaded with the new one, or confuse its reader."""
    old, out = bin_folder(tmp_path / "old", 2), tmp_path / "out"
    grow_checkpoint(
        old,
        out,
        {"hidden_size": 48, "num_attention_heads": 6},
        method=Mask(),
        options=WriteOptions("100KB"),
    )
    written = contents(out).keys()
    theirs = {"thesis.tex": b"1", "optimizer.pt": b"2", "runs/log": b"3", "manifest.json": b"4", "LICENSE": b"5"}
    for name, data in theirs.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "vocab.json"):
        (out / name).write_bytes(b"stale")
    foreseen = convert_checkpoint(source, out, options=WriteOptions(overwrite=True), dry_run=True)
    assert "It would be removed from" in foreseen.notes[-1]
    assert not foreseen.foreseen.refused
    convert_checkpoint(source, out, options=WriteOptions(overwrite=True))
    convert_checkpoint(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh") | theirs
    assert written - contents(out).keys(), "nothing was stale"


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "sub/../../outside", "thesis.tex", "linked/outside", "a\\b", ".", ""]
)
def test_a_record_cannot_have_anything_removed(name, source, tmp_path):
    """It may come from anyone: a name that leads outside, or that of a file which is not what the record says."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    convert_checkpoint(source, out)
    outside.write_bytes(b"theirs")
    (out / "thesis.tex").write_bytes(b"theirs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/outside").write_bytes(b"theirs")
    (out / "linked").symlink_to(tmp_path / "elsewhere")
    record = json.loads((out / MANIFEST).read_bytes())
    digest = hashlib.sha256(b"theirs" if name != "thesis.tex" else b"other").hexdigest()
    record["files"][name] = {"bytes": 6, "sha256": digest}
    (out / MANIFEST).write_text(json.dumps(record))
    convert_checkpoint(source, out, dtype="bfloat16", options=WriteOptions(overwrite=True))
    assert outside.read_bytes() == (out / "thesis.tex").read_bytes() == b"theirs"
    assert (tmp_path / "elsewhere/outside").read_bytes() == b"theirs"


def test_a_record_cannot_have_the_source_removed(source, tmp_path):
    """Which may lie below the folder, as a trainer's checkpoints do."""
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    step = shutil.copytree(source, out / "checkpoint-100")
    record = json.loads((out / MANIFEST).read_bytes())
    record["files"]["checkpoint-100/model.safetensors"] = {"bytes": (step / "model.safetensors").stat().st_size}
    (out / MANIFEST).write_text(json.dumps(record))
    convert_checkpoint(step, out, dtype="bfloat16", options=WriteOptions(overwrite=True))
    assert contents(step) == contents(source)


def test_a_link_under_a_name_that_is_written_is_not_followed(source, tmp_path):
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_bytes(b"theirs")
    out.mkdir()
    for name in ("model.safetensors.partial", "README.md", "config.json", MANIFEST):
        (out / name).symlink_to(precious)
    convert_checkpoint(source, out, options=WriteOptions(overwrite=True))
    assert precious.read_bytes() == b"theirs"
    assert not [path for path in out.iterdir() if path.is_symlink()]


# What is copied from a source.


def test_only_what_a_model_needs_is_copied(tmp_path):
    folder = stock_folder(tmp_path / "source", 1)
    needed = ("vocab.json", "merges.txt", "LICENSE", "LICENSE-MODEL.txt", "NOTICE", "preprocessor_config.json")
    needed += ("tokenizer.json", "additional_chat_templates/rag.jinja", "README.md")
    others = (
        "adapter_config.json",
        "optimizer.pt",
        "trainer_state.json",
        "notes.txt",
        "id_rsa",
        ".env",
        "all_results.json",
        "evil.py",
    )
    for name in (*needed, *others):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}")
    for path in folder.glob("*_teleflm.py"):
        path.unlink()
    result = convert_checkpoint(folder, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert found.keys() >= set(needed)
    assert not found.keys() & set(others)
    assert [note for note in result.notes if note.startswith("Left behind")] == [
        "Left behind, as a model needs no such files: all_results.json, evil.py, id_rsa, notes.txt, trainer_state.json."
    ]


def test_what_a_trainer_saved_with_the_weights_is_named(tmp_path):
    folder = stock_folder(tmp_path / "source", 1)
    for name in ("scheduler.pt", "rng_state.pth", "training_args.bin", "optimizer.pt", "other.bin"):
        (folder / name).write_bytes(b"")
    assert "Left behind, as a model needs no such files: rng_state.pth, scheduler.pt, training_args.bin." in [
        *convert_checkpoint(folder, tmp_path / "out").notes
    ]


def test_code_goes_with_a_configuration_that_refers_to_it(tmp_path):
    folder = stock_folder(tmp_path / "source", 1)
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_other.Other"})
    (folder / "modeling_other.py").write_text("raise SystemExit")
    convert_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out/modeling_other.py").read_text() == "raise SystemExit"


@pytest.mark.parametrize("make", [hub_folder, stock_folder])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_a_link_that_leads_out_of_the_source_is_refused(name, make, tmp_path):
    folder, secret = make(tmp_path / "source", 1), tmp_path / "secret"
    (folder / name).rename(secret)
    (folder / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=rf"{name}: is a link to {secret}, outside of {folder}; put a copy"):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [hub_folder, stock_folder])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "README.md"])
@pytest.mark.parametrize(
    ("put", "what"),
    [
        (os.mkfifo, "a pipe or a device"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("nothing"), "a link to nothing"),
    ],
    ids=["pipe", "folder", "link"],
)
def test_what_is_no_file_under_the_name_of_one_is_refused(put, what, name, make, tmp_path):
    """The output would have another file in its place, and nobody would know."""
    if (name, what) == ("README.md", "a folder"):
        pytest.skip("folders are nobody's small files")
    folder = make(tmp_path / "source", 1)
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    with pytest.raises(CheckpointError, match=rf"{folder}/{name}: is {what}, expected a file"):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_of_a_source_and_of_a_hub_cache_are_followed(tmp_path):
    plain = hub_folder(tmp_path / "plain", 1)
    convert_checkpoint(plain, tmp_path / "expected")
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots/0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in plain.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy2(path, cache / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    inside = shutil.copytree(plain, tmp_path / "inside")
    (inside / "tokenizer.model").rename(inside / "real")
    (inside / "tokenizer.model").symlink_to("real")
    for folder in (snapshot, inside):
        convert_checkpoint(folder, tmp_path / f"{folder.name}-out")
        found, expected = contents(tmp_path / f"{folder.name}-out"), contents(tmp_path / "expected")
        assert {n: d for n, d in found.items() if n != MANIFEST} == {n: d for n, d in expected.items() if n != MANIFEST}


@pytest.mark.parametrize("make", [bin_folder, stock_folder])
def test_converting_one_file_takes_nothing_that_lies_beside_it(make, tmp_path):
    folder = make(tmp_path / "source", 1)
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    result = convert_checkpoint(file, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {"config.json", "model.safetensors", MANIFEST}
    assert json.loads((tmp_path / "out/config.json").read_bytes()) == {}
    assert result.notes == [
        "The weights were converted alone: nothing beside them was read. Name their folder to have it all."
    ]
    assert load_file(tmp_path / "out/model.safetensors").keys() == tiny_model().state_dict().keys()


def test_a_tensor_with_the_name_of_the_metadata_is_refused(tmp_path):
    torch.save({"__metadata__": torch.ones(3), "w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a tensor is called __metadata__, a name that safetensors keeps"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Dry runs, and systems that lack something.


def test_a_dry_run_knows_of_a_run_that_is_under_way(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    result = convert_checkpoint(source, out, dry_run=True)
    assert result.notes[-1] == f"It would be refused: another run is writing to {out}."
    os.close(descriptor)
    assert not convert_checkpoint(source, out, dry_run=True).foreseen.refused


def test_a_dry_run_counts_what_an_interruption_left(source, tmp_path):
    out, options = tmp_path / "out", WriteOptions("100KB", workers=1)
    whole = convert_checkpoint(source, out, options=options, dry_run=True).foreseen
    assert whole.need == sum(size for size in whole_sizes(source, tmp_path).values())
    calls = iter(range(1000))

    def stop(nbytes: int, total: int) -> None:
        if next(calls) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, options=replace(options, progress=stop))
    left = convert_checkpoint(source, out, options=options, dry_run=True)
    there = sum(path.stat().st_size for path in out.glob("*.partial"))
    assert there > 0
    assert left.foreseen.need == whole.need - there
    assert "which would be resumed: " in left.notes[-1]
    text = run_teleflm("convert", source, out, "--max-shard-size", "100KB", "--dry-run", folder=tmp_path).stdout
    assert "Would write" in text
    convert_checkpoint(source, out, options=options)
    done = run_teleflm("convert", source, out, "--max-shard-size", "100KB", "--dry-run", folder=tmp_path).stdout
    assert "is already done" in done
    assert "Would write no weights" in done


def whole_sizes(source: Path, tmp_path: Path) -> dict[str, int]:
    convert_checkpoint(source, tmp_path / "sizes", options=WriteOptions("100KB"))
    return {path.name: path.stat().st_size for path in (tmp_path / "sizes").glob("*.safetensors")}


LACKING = ("posix_fallocate", "posix_fadvise", "copy_file_range", "O_NOFOLLOW")


@pytest.mark.parametrize("lacking", [*LACKING, "fcntl", "O_DIRECTORY", "all"])
@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
def test_a_system_that_lacks_something_writes_the_same(digest, lacking, source, tmp_path, monkeypatch):
    """As macOS has no posix_fallocate, and Windows no fcntl."""
    from conversion.checkpoint import workspace

    options = WriteOptions("100KB", digest=digest)
    convert_checkpoint(source, tmp_path / "expected", options=options)
    for name in LACKING if lacking == "all" else [lacking]:
        monkeypatch.delattr(os, name, raising=False)
    if lacking in ("fcntl", "all"):
        monkeypatch.setattr(workspace, "fcntl", None)
    if lacking in ("O_DIRECTORY", "all"):
        monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    convert_checkpoint(source, tmp_path / "out", options=options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert convert_checkpoint(source, tmp_path / "out", options=options).written.already_done
    assert not convert_checkpoint(source, tmp_path / "other", options=options, dry_run=True).foreseen.refused


def test_folders_are_synced_around_the_file_that_makes_them_load(source, tmp_path, monkeypatch):
    """Of one file too: what it is loaded with is durable before it is there, and it itself when the call returns."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        calls.append(f"fsync {os.path.relpath(os.readlink(f'/proc/self/fd/{descriptor}'), tmp_path)}")
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        calls.append(f"rename {os.path.relpath(target, tmp_path)}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    convert_checkpoint(source, tmp_path / "out")
    at = calls.index("rename out/model.safetensors")
    small = [i for i, call in enumerate(calls) if call.startswith("rename out/") and ".teleflm" not in call and i != at]
    assert max(small) < calls.index("fsync out") < at < len(calls) - 1 - calls[::-1].index("fsync out")
    assert "fsync ." in calls[:at], "the folder itself is an entry of another"
    assert FOLDER not in contents(tmp_path / "out")


# What an outsider tried.


EDITS = {
    "emptied": ({"tensors": {}, "files": {}, "sources": {}, "digest": None}, "it has no digest of "),
    "lineage": ({"lineage": {"operation": "HAND EDITED"}}, "its lineage."),
    "sources": ({"sources": {}}, "its sources"),
    "tensors": ({"tensors": {}}, "it has no digest of "),
    "files": ({"files": {}}, "its files"),
    "another field": ({"note": 1}, "its note is 1, expected None"),
    "no promise of digests": ({"job": {"settings": {}}}, "its "),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_record_is_not_already_done(edit, source, tmp_path):
    changes, said = EDITS[edit]
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    whole = contents(out)
    record = json.loads((out / MANIFEST).read_bytes())
    if "job" in changes:
        changes = {"job": {**record["job"], **changes["job"]}}
    (out / MANIFEST).write_text(json.dumps({**record, **changes}))
    text = refused(convert_checkpoint, source, out)
    assert text.startswith(f"{out}/{MANIFEST}: is not the record that was written there: ")
    assert said in text
    convert_checkpoint(source, out, options=WriteOptions(overwrite=True))
    assert contents(out) == whole


@pytest.fixture
def templated(tmp_path) -> Path:
    folder = stock_folder(tmp_path / "templated", 1)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/foo.jinja").write_text("{{2}}")
    return folder


@pytest.mark.parametrize("kind", ["link", "link that holds it", "file"])
@pytest.mark.parametrize("finished", [False, True])
def test_nothing_is_written_through_a_link(kind, finished, templated, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    if kind == "link that holds it":
        (other / "foo.jinja").write_text("{{2}}")
    before = contents(other)
    convert_checkpoint(templated, tmp_path / "fresh")
    if finished:
        convert_checkpoint(templated, out)
        shutil.rmtree(out / "additional_chat_templates")
    out.mkdir(exist_ok=True)
    if kind == "file":
        (out / "additional_chat_templates").write_text("theirs")
    else:
        (out / "additional_chat_templates").symlink_to(other)
    assert "additional_chat_templates" in refused(convert_checkpoint, templated, out)
    dry = convert_checkpoint(templated, out, options=WriteOptions(overwrite=True), dry_run=True)
    assert f"It would be removed from {out}: additional_chat_templates." in dry.notes
    convert_checkpoint(templated, out, options=WriteOptions(overwrite=True))
    assert contents(out) == contents(tmp_path / "fresh")
    assert contents(other) == before


@pytest.mark.parametrize("name", ["additional_chat_templates", "custom_generate"])
def test_a_linked_folder_that_would_be_loaded_is_named(name, source, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "generate.py").write_text("evil")
    convert_checkpoint(source, out)
    (out / name).symlink_to(other)
    assert refused(convert_checkpoint, source, out).startswith(f"{out}/{name}: is not of this checkpoint")
    assert damaged(out, tmp_path) == [f"{name} is not in the record, and would be loaded."]


def test_two_faults_are_mended_at_once(source, tmp_path):
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    whole = contents(out)
    (out / "generation_config.json").write_text("{}")
    (out / "vocab.txt").write_text("")
    text = refused(convert_checkpoint, source, out)
    assert "generation_config.json: is not what was written" in text
    assert "to remove vocab.txt" in text
    result = convert_checkpoint(source, out, options=WriteOptions(overwrite=True))
    assert "generation_config.json had been changed and was written again." in result.notes
    assert contents(out) == whole


@pytest.mark.parametrize("name", ["README.md", "vocab.txt", MANIFEST])
def test_a_file_that_comes_while_it_is_written_is_not_replaced(name, source, tmp_path):
    out = tmp_path / "out"

    def put(nbytes: int, total: int) -> None:
        (out / name).write_text("theirs")

    with pytest.raises(CheckpointError, match=name):
        convert_checkpoint(source, out, options=WriteOptions(progress=put))
    assert (out / name).read_text() == "theirs"
    (out / name).unlink()
    convert_checkpoint(source, out)
    convert_checkpoint(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_others_keep_is_left(source, tmp_path):
    out = tmp_path / "out"
    theirs = {
        ".teleflm/notes": b"1",
        "pytorch_model.bin.partial": b"2",
        "model-00001-of-00009.safetensors.partial": b"3",
    }
    for name, data in theirs.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    for _ in range(2):
        convert_checkpoint(source, out)
        assert contents(out).items() >= theirs.items()


@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors.partial"])
def test_a_dangling_link_is_somebody_elses(name, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "gone")
    assert f"{name}: is there already" in refused(convert_checkpoint, source, tmp_path / "out")


def test_a_size_alone_makes_no_file_ours(source, tmp_path):
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    (out / "notes.txt").write_bytes(b"12345")
    record = json.loads((out / MANIFEST).read_bytes())
    record["files"] |= {"notes.txt": {"bytes": 5}, "a" * 300: {"bytes": 5}}
    (out / MANIFEST).write_text(json.dumps(record))
    assert {line.split(" ")[0] for line in damaged(out, tmp_path)} == {"notes.txt", "'" + "a" * 79}
    convert_checkpoint(source, out, dtype="bfloat16", options=WriteOptions(overwrite=True))
    assert (out / "notes.txt").read_bytes() == b"12345"


@pytest.mark.parametrize("place", ["model.safetensors.partial", ".teleflm", "file"])
def test_what_cannot_be_written_there_is_said_first(place, source, tmp_path):
    out = tmp_path / "out"
    if place == ".teleflm":
        out.mkdir()
        (out / place).write_text("theirs")
    elif place == "file":
        (tmp_path / "file").write_text("theirs")
        out = tmp_path / "file/out"
    else:
        (out / place).mkdir(parents=True)
    assert "folder" in refused(convert_checkpoint, source, out)
    with pytest.raises(CheckpointError, match="folder"):
        convert_checkpoint(source, out, options=WriteOptions(overwrite=True))


def test_an_export_by_links_is_checked(source, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(source, out, to="granite", link=True)
    found = run_teleflm("inspect", out, "--check", folder=tmp_path)
    assert (found.returncode, "The record has no digests of tensors" in found.stdout) == (0, True)
    (out / "vocab.txt").write_text("x")
    (out / "README.md").write_text("x")
    assert len(damaged(out, tmp_path)) == 2
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(weights[:-5000] + bytes(5000))
    assert "model.safetensors is not what was written there." in damaged(out, tmp_path)


def test_what_an_interruption_wrote_is_counted_by_its_journal(source, tmp_path):
    """A file has its full size on the disk before its first block is in it."""
    out = tmp_path / "out"

    def stop(nbytes: int, total: int) -> None:
        if nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, options=WriteOptions(workers=1, progress=stop))
    foreseen = convert_checkpoint(source, out, dry_run=True).foreseen
    size = (source / "model.safetensors").stat().st_size
    assert foreseen.need == 0
    assert size // 2 < foreseen.left < size


def test_each_link_that_is_none_is_named(source, tmp_path):
    convert_checkpoint(source, tmp_path / "source-2", options=WriteOptions("100KB"))
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "source-2", out, to="granite", link=True)
    file = min(out.glob("*.safetensors"))
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    other = sorted(out.glob("*.safetensors"))[1]
    shutil.copy(other, tmp_path / "elsewhere")
    other.unlink()
    other.symlink_to(tmp_path / "elsewhere")
    (*_, note) = export_checkpoint(tmp_path / "source-2", out, to="granite", link=True).notes
    assert f"Not links to the source's files: {file.name}, {other.name}." in note


def test_an_edited_tracker_is_a_damage(source, tmp_path):
    export_checkpoint(source, tmp_path / "out", to="megatron")
    (tmp_path / "out/latest_checkpointed_iteration.txt").write_text("nothing")
    assert damaged(tmp_path / "out", tmp_path) == ["latest_checkpointed_iteration.txt does not have its digest."]
