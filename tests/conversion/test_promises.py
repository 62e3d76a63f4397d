# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`--verify-source`: what the Hub's own client, torch.save and our record promise, kept and broken."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub._local_folder import write_download_metadata
from safetensors.torch import load_file, save_file

from conversion.checkpoint.errors import CorruptData
from conversion.checkpoint.execute import CheckpointResult, WriteOptions
from conversion.checkpoint.manifest import MANIFEST
from conversion.convert import convert_checkpoint
from conversion.exports.export import export_checkpoint
from growth import grow_checkpoint
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.tiny import tiny_model

STATE = {"a": torch.arange(70_000, dtype=torch.float32), "b": torch.arange(12.0).view(3, 4), "c": torch.ones(5)}


def convert(source: Path, out: Path, **more) -> CheckpointResult:
    read: list[tuple[int, int]] = []
    options = WriteOptions(verify_source=True, verify_progress=lambda *call: read.append(call), workers=2)
    result = convert_checkpoint(source, out, options=options, **more)
    if read:
        assert {total for _, total in read} == {sum(nbytes for nbytes, _ in read)}
    return result


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_cache(folder: Path) -> Path:
    """As the Hub's client keeps a repository: files are links to blobs that are called by their hash."""
    folder = folder / "models--CofeAI--Tele-FLM"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(STATE, folder / "new")
    blob = folder / "blobs" / sha256(folder / "new")
    (folder / "new").rename(blob)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def in_local_folder(folder: Path) -> Path:
    """As the Hub's client leaves a folder that it downloaded to."""
    folder = folder / "local"
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")
    write_download_metadata(folder, "model.safetensors", "0" * 40, sha256(folder / "model.safetensors"))
    return folder


def in_bin(folder: Path) -> Path:
    folder = folder / "bin"
    folder.mkdir()
    torch.save(STATE, folder / "pytorch_model.bin")
    return folder


def with_record(folder: Path) -> Path:
    (folder / "before").mkdir()
    save_file(STATE, folder / "before/model.safetensors")
    convert_checkpoint(folder / "before", folder / "recorded")
    return folder / "recorded"


PROMISES = {
    "cache": (
        in_cache,
        "all of 1 file, by the sha256 that the Hub's client recorded",
        r"has the hash [0-9a-f]{64}, by",
    ),
    "local folder": (in_local_folder, "all of 1 file, by the sha256", r"it is [0-9a-f]{64}; copy or download"),
    "torch.save": (in_bin, "what is read of 1 file, by the checksums that torch.save wrote", r"/data/0 has the hash"),
    "record": (
        with_record,
        "what is read of 1 file, by the digests of its record",
        r"a has the hash [0-9a-f]{32}, by",
    ),
}


@pytest.mark.parametrize(("make", "kept", "broken"), PROMISES.values(), ids=PROMISES)
def test_a_promise_is_kept_or_broken(make, kept, broken, tmp_path):
    source = make(tmp_path)
    foreseen = convert(source, tmp_path / "out", dry_run=True).notes
    assert any(note.startswith(f"It would be verified: {kept}") for note in foreseen)
    assert not (tmp_path / "out").exists()
    notes = convert(source, tmp_path / "out").notes
    (note,) = (note for note in notes if "erified" in note)
    assert note.startswith(f"Verified: {kept}")
    assert load_file(tmp_path / "out/model.safetensors").keys() == STATE.keys()

    (weights,) = (path for path in source.iterdir() if path.suffix in (".safetensors", ".bin"))
    data = bytearray(weights.read_bytes())
    data[data.index(STATE["a"][1000:1010].numpy().tobytes())] ^= 1
    Path(os.path.realpath(weights)).write_bytes(data)
    with pytest.raises(CorruptData, match=broken) as refusal:
        convert(source, tmp_path / "again")
    assert weights.name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "again").exists()


def test_nobody_vouches_for_a_plain_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (note,) = (note for note in convert(tmp_path, tmp_path / "out").notes if "erified" in note)
    assert note.startswith("Not verified: 1 file (model.safetensors), which nothing vouches for")


def test_files_without_checksums_promise_nothing(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    (note,) = (note for note in convert(tmp_path, tmp_path / "out").notes if "erified" in note)
    assert note.startswith("Not verified: 1 file (pytorch_model.bin)")


def test_what_is_half_promised_is_said_to_be(tmp_path):
    """A zip in which one member has a checksum and another has none."""
    source = in_bin(tmp_path)
    data = bytearray((source / "pytorch_model.bin").read_bytes())
    with zipfile.ZipFile(source / "pytorch_model.bin") as archive:
        crc = archive.getinfo("pytorch_model/data/1").CRC.to_bytes(4, "little")
    entry = data.index(b"PK\1\2" + data[data.index(b"PK\1\2") + 4 : data.index(b"PK\1\2") + 8])
    while data[entry + 16 : entry + 20] != crc:
        entry = data.index(b"PK\1\2", entry + 1)
    data[entry + 16 : entry + 20] = bytes(4)
    (source / "pytorch_model.bin").write_bytes(data)
    notes = [note for note in convert(source, tmp_path / "out").notes if "erified" in note]
    assert [note.partition(":")[0] for note in notes] == ["Verified", "Not verified"]


def test_a_small_files_hash_is_not_taken_for_a_sha256(tmp_path):
    """The client calls files that are not in git-LFS by git's hash of 40 digits."""
    source = in_local_folder(tmp_path)
    write_download_metadata(source, "model.safetensors", "0" * 40, "1" * 40)
    (note,) = (note for note in convert(source, tmp_path / "out").notes if "erified" in note)
    assert note.startswith("Not verified")


@pytest.mark.parametrize("content", ["", "x", "0\n", "\0" * 10_000, "0\n" + "g" * 64])
def test_any_record_of_a_download_can_be_read(content, tmp_path):
    source = in_local_folder(tmp_path)
    (source / ".cache/huggingface/download/model.safetensors.metadata").write_text(content)
    (note,) = (note for note in convert(source, tmp_path / "out").notes if "erified" in note)
    assert note.startswith("Not verified")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("digest"),
        lambda manifest: manifest.update(digest={"algorithm": "md5", "block_elements": 5}),
        lambda manifest: manifest.update(digest={"algorithm": "xxh3_128", "block_elements": 0}),
        lambda manifest: manifest.update(tensors=dict.fromkeys(manifest["tensors"], 5)),
        lambda manifest: manifest.update(format="another's"),
    ],
)
def test_another_programs_manifest_promises_nothing(change, tmp_path):
    source = with_record(tmp_path)
    manifest = json.loads((source / MANIFEST).read_text())
    change(manifest)
    (source / MANIFEST).write_text(json.dumps(manifest))
    from conversion.checkpoint.plan import CheckpointPlan, TensorPlan
    from conversion.checkpoint.promises import foresee_verification
    from conversion.checkpoint.sources import open_checkpoint

    tensors = open_checkpoint(source).tensors
    plan = CheckpointPlan(tuple(TensorPlan.copy_of(name, view) for name, view in tensors.items()), {})
    (note,) = foresee_verification(plan, {})
    assert note.startswith("Not verified")


def test_a_distributed_checkpoint_is_many_zips(tmp_path):
    model = tiny_model()
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, checkpoint_id=run)
    model.config.save_pretrained(run)
    notes = convert(run, tmp_path / "out", vocab_size=640).notes
    assert [note for note in notes if "erified" in note] == [
        "Verified: what is read of 1 file, by the checksums that torch.save wrote, which find damage, not forgery."
    ]
    (file,) = run.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.index(model.lm_head.weight[3].detach().numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        CorruptData, match=r"distcp: archive/data/0 has the hash [0-9a-f]{8}, by the checksums that torch"
    ):
        convert(run, tmp_path / "again", vocab_size=640)


def test_of_a_rank_only_what_is_read_is_checked(tmp_path):
    """The optimizer in the same file is none of the conversion's business."""
    (tmp_path / "bin").mkdir()
    torch.save(STATE, tmp_path / "bin/pytorch_model.bin")
    data = bytearray((tmp_path / "bin/pytorch_model.bin").read_bytes())
    place = data.index(STATE["a"][1000:1010].numpy().tobytes())
    from conversion.checkpoint.plan import CheckpointPlan, TensorPlan
    from conversion.checkpoint.promises import verify_sources
    from conversion.checkpoint.sources import open_checkpoint

    data[place] ^= 1
    (tmp_path / "bin/pytorch_model.bin").write_bytes(data)
    view = open_checkpoint(tmp_path / "bin").tensors["b"]
    read: list[int] = []
    notes = verify_sources(
        CheckpointPlan((TensorPlan.copy_of("b", view),), {}), {}, 1, lambda nbytes, total: read.append(nbytes)
    )
    assert len(notes) == 1
    assert sum(read) == STATE["b"].nbytes


def test_an_exported_run_has_a_record(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hub")
    export_checkpoint(tmp_path / "hub", tmp_path / "run", to="megatron", tp=2, multipliers="keep")
    notes = convert(tmp_path / "run", tmp_path / "out", vocab_size=640).notes
    assert [note for note in notes if "erified" in note] == [
        "Verified: what is read of 2 files, by the digests of its record."
    ]
    file = tmp_path / "run/release/mp_rank_01/model_optim_rng.pt"
    data = bytearray(file.read_bytes())
    data[data.index(model.lm_head.weight[400].detach().view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptData, match=r"mp_rank_01/model_optim_rng\.pt: mp_rank_01/model/.* has the hash"):
        convert(tmp_path / "run", tmp_path / "again", vocab_size=640)


@pytest.mark.parametrize("command", ["convert", "grow", "export"])
def test_the_option(command, tmp_path):
    tiny_model().save_pretrained(tmp_path / "source")
    write_download_metadata(
        tmp_path / "source", "model.safetensors", "0" * 40, sha256(tmp_path / "source/model.safetensors")
    )
    more = {"convert": [], "grow": ["--set", "intermediate_size=96"], "export": ["--to", "llama"]}[command]
    arguments = (command, tmp_path / "source", tmp_path / "out", *more, "--verify-source")
    result = run_teleflm(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Verified: all of 1 file, by the sha256 that the Hub's client recorded." in result.stdout
    assert "verifying: " in result.stderr
    weights = tmp_path / "source/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    shutil.rmtree(tmp_path / "out")
    result = run_teleflm(*arguments, folder=tmp_path)
    assert result.returncode == 1
    assert "has the hash" in result.stderr
    assert not (tmp_path / "out/model.safetensors").exists()


def test_growth_checks_its_source(tmp_path):
    tiny_model().save_pretrained(tmp_path / "source")
    options = WriteOptions(verify_source=True)
    result = grow_checkpoint(tmp_path / "source", tmp_path / "out", {"intermediate_size": 96}, options=options)
    assert any(note.startswith("Not verified: 1 file (model.safetensors)") for note in result.notes)
