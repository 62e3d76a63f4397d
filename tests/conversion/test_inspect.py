# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm inspect`: what a folder holds, what is wrong with it, and which tensors are not what they were."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import WriteOptions, convert_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.safetensors_file import read_safetensors
from tests.fixtures.checkpoint_runs import contents, run_teleflm
from tests.fixtures.tiny import PIECE_COUNT, tiny_model, tiny_sentencepiece

PARAMETERS = sum(parameter.numel() for parameter in tiny_model().parameters())


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bin")
    model = tiny_model(dtype=torch.bfloat16)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    return folder


@pytest.fixture(scope="module")
def converted(bin_folder, tmp_path_factory) -> Path:
    """Four shards of safetensors with a manifest."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_checkpoint(bin_folder, folder, options=WriteOptions("40KB"))
    return folder


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def one_file(folder) -> Path:
    """The same tensors in a file of the reference library, with the configuration and the tokenizer."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("*.safetensors*"), folder / MANIFEST]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "container", "files"), [("bin_folder", "torch", 1), ("converted", "safetensors", 4)])
def test_what_a_folder_holds(name, container, files, request, tmp_path):
    folder = request.getfixturevalue(name)
    result = run_teleflm("inspect", folder, "--json", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["folder"] == str(folder)
    assert found["format"] == container
    assert found["model_type"] == "TeleFLM"
    assert found["architecture"]["num_hidden_layers"] == 3
    assert found["parameters"] == PARAMETERS
    assert found["dtypes"] == {"bfloat16": len(tiny_model().state_dict())}
    assert found["nbytes"] == 2 * PARAMETERS
    assert len(found["files"]) == files
    assert found["files"] == {file: (folder / file).stat().st_size for file in found["files"]}
    assert (found["pieces"], found["padding_rows"]) == (PIECE_COUNT, 40)
    assert found["logit_scale"] == 0.125
    assert (found["problems"], found["damages"]) == ([], None)
    assert len(found["lineage"]) == (2 if name == "converted" else 0)
    human = run_teleflm("inspect", folder, folder=tmp_path)
    assert human.returncode == 0
    for text in ("TeleFLM", f"{PARAMETERS:,}", "bfloat16", "40 rows of padding", "logits x 0.125"):
        assert text in human.stdout


def remove_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def edit_config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def shrink_the_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:512].contiguous()
    save_file(tensors, folder / "model.safetensors")
    edit_config(vocab_size=512)(folder)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (remove_a_weight, "model.layers.1.mlp.up_proj.weight is missing; config.json describes 30 weights"),
        (shrink_the_vocabulary, "tokenizer.model has 600 pieces, config.json a vocab_size of 512"),
        (edit_config(intermediate_size=96), "config.json says (32, 96)"),
        (edit_config(hidden_size="32"), "hidden_size is '32', expected an integer"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"?"), "not a sentencepiece model"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 9}'), "manifest format is 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problems_are_listed(harm, problem, one_file, tmp_path):
    """Each is a line; none keeps the rest from being said."""
    assert inspect_checkpoint(one_file).problems == []
    harm(one_file)
    result = run_teleflm("inspect", one_file, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("problem ")]
    assert problem in line
    found = json.loads(run_teleflm("inspect", one_file, "--json", folder=tmp_path).stdout)
    assert len(found["problems"]) == 1
    assert found["parameters"] > 0


# --check


def flip_a_bit(folder: Path, tensor: str, element: int = 0) -> str:
    """Returns the name of the tensor's file."""
    for path in folder.glob("*.safetensors"):
        view = read_safetensors(path).get(tensor)
        if view is not None:
            with path.open("r+b") as file:
                file.seek(view.offset + element * view.dtype.itemsize)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 16]))
            return path.name
    raise KeyError(tensor)


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize(
    "tensors",
    [
        [],
        ["model.norm.weight"],
        ["model.embed_tokens.weight"],
        ["model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"],
    ],
    ids=len,
)
def test_a_flipped_bit_is_found(tensors, workers, folder, tmp_path):
    files = [flip_a_bit(folder, name, element=17) for name in tensors]
    arguments = ("inspect", folder, "--check", "--workers", workers)
    result = run_teleflm(*arguments, folder=tmp_path)
    assert result.returncode == (3 if tensors else 0)
    lines = [line for line in result.stdout.splitlines() if line.startswith("damaged ")]
    assert lines == [
        f"damaged {name} of {file} does not have its digest." for name, file in zip(tensors, files, strict=True)
    ]
    assert ("Every tensor has its digest." in result.stdout) == (not tensors)
    found = json.loads(run_teleflm(*arguments, "--json", folder=tmp_path).stdout)
    assert [(damage["tensor"], damage["file"]) for damage in found["damages"]] == list(zip(tensors, files, strict=True))


def test_every_block_of_a_large_tensor_is_checked(tmp_path):
    """One bit in the last element of several blocks."""
    source = tmp_path / "source"
    source.mkdir()
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal(9_000_001).astype(np.float16))
    save_file({"w": tensor, "v": torch.ones(3)}, source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out", check=True).damages == []
    flip_a_bit(tmp_path / "out", "w", 9_000_000)
    (damage,) = inspect_checkpoint(tmp_path / "out", check=True).damages
    assert (damage.tensor, damage.file) == ("w", "model.safetensors")


def test_other_tensors_than_the_manifest_has(converted, one_file, tmp_path):
    """Missing, unknown, of another type, in another file."""
    tensors = load_file(one_file / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    tensors["model.layers.0.input_layernorm.weight"] = norm.float()
    tensors["extra"] = norm
    save_file(tensors, one_file / "model.safetensors")
    manifest = json.loads((converted / MANIFEST).read_text())
    for entry in manifest["tensors"].values():
        entry["file"] = "model.safetensors"
    manifest["tensors"]["lm_head.weight"]["file"] = "model-00004-of-00004.safetensors"
    del manifest["files"]  # as of 0.1.0
    (one_file / MANIFEST).write_text(json.dumps(manifest))
    result = run_teleflm("inspect", one_file, "--check", folder=tmp_path)
    assert result.returncode == 3
    assert {line for line in result.stdout.splitlines() if line.startswith("damaged ")} == {
        "damaged model.norm.weight of model.safetensors is missing.",
        "damaged model.layers.0.input_layernorm.weight of model.safetensors is float32 [32], expected bfloat16 [32].",
        "damaged extra of model.safetensors is not in the manifest.",
        "damaged lm_head.weight of model.safetensors was expected in model-00004-of-00004.safetensors.",
    }


def without_digests(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder)
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    convert_checkpoint(tmp_path, folder, options=WriteOptions(digest=False))
    edit_manifest(files=None)(folder, tmp_path)  # as of 0.1.0, which listed no files


def edit_manifest(**changes):
    def edit(folder: Path, tmp_path: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_digests, "manifest.json: was written with --no-digest; there is nothing to check"),
        (lambda folder, _: (folder / MANIFEST).unlink(), "manifest.json: no such file; there is nothing to"),
        (edit_manifest(digest={"algorithm": "md5", "block_elements": 4194304}), "digest is {'algorithm': 'md5'"),
        (edit_manifest(digest={"algorithm": "xxh3_128", "block_elements": 0}), "'block_elements': 0}, expected"),
        (edit_manifest(digest={"algorithm": "xxh3_128"}), "digest is {'algorithm': 'xxh3_128'}, expected"),
        (edit_manifest(digest="yes"), "digest is 'yes'"),
        (edit_manifest(tensors={"lm_head.weight": {"file": "x"}}), "lm_head.weight lacks a file, dtype, shape or"),
        (lambda folder, _: os.truncate(next(folder.glob("*.safetensors")), 900), "but has 900 bytes in all"),
        (lambda folder, _: next(folder.glob("*.safetensors")).unlink(), "1 of them missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_checked(harm, message, folder, tmp_path):
    harm(folder, tmp_path)
    result = run_teleflm("inspect", folder, "--check", folder=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert result.stdout == ""


def test_a_disk_that_fails_names_the_file(folder, monkeypatch):
    preadv = os.preadv

    def fail(file, buffers, offset):
        if offset > 8:  # the header is fine
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        inspect_checkpoint(folder, check=True, workers=1)
    assert caught.value.filename.startswith(f"{folder}/model-0000")


@pytest.mark.parametrize("path", ["", "model.safetensors", "nowhere"])
def test_nothing_to_inspect(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no weights|no such file"):
        inspect_checkpoint(tmp_path / "empty" / path)


def test_inspecting_changes_nothing(folder, tmp_path):
    before = contents(folder)
    inspect_checkpoint(folder, check=True)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["[/red]", "[bold]", "a\nb", "a\x1b[31mb", "\u202eab"])
def test_names_command_no_terminal(name, tmp_path):
    """Whatever a file calls its tensors, and a configuration its model, is shown and means nothing."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file({name: torch.ones(3)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": name}))
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    for command in (("convert", source, out, "--dry-run"), ("convert", source, out), ("inspect", out)):
        result = run_teleflm(*command, folder=tmp_path)
        assert result.returncode == 0, result.stderr
        assert shown in result.stdout
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    result = run_teleflm("inspect", out, "--check", folder=tmp_path)
    assert result.returncode == 3
    assert f"damaged {shown} of model.safetensors" in result.stdout
    (out / "model.safetensors").write_bytes(data[:-1])
    result = run_teleflm("inspect", out, folder=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("said", [5, ["a"], {"a": 1}, True, None])
def test_a_model_type_that_is_no_text(said, tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": said}))
    result = run_teleflm("inspect", tmp_path, folder=tmp_path)
    assert result.returncode == 0
    assert "unknown: no configuration" in result.stdout


def test_an_error_is_one_line_whatever_it_names():
    assert str(CheckpointError("a\nb\x1b[31m\u2028\udc80 is 层")) == "a\\nb\\x1b[31m\\u2028\\udc80 is 层"
    assert len(str(CheckpointError("x" * 10**6))) == 2000


def test_one_shard_is_checked_alone(folder, tmp_path):
    file = folder / "model-00001-of-00004.safetensors"
    (folder / "vocab.txt").write_text("of another")
    result = run_teleflm("inspect", file, "--check", folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "problem" not in result.stdout
    assert "no other file" not in result.stdout
    flip_a_bit(folder, next(iter(read_safetensors(file))))
    result = run_teleflm("inspect", file, "--check", folder=tmp_path)
    assert (result.returncode, result.stdout.count("damaged ")) == (3, 1)
    (folder / "model-00002-of-00004.safetensors").unlink()
    assert len(inspect_checkpoint(file, check=True).damages) == 1
