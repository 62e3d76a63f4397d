# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sources of bytes: what tells one state of a file from another, files that change meanwhile, files of other kinds."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from conversion.checkpoint import bytes as sources
from conversion.checkpoint.bytes import ByteSource, LocalFile, OpenBytes, identify, open_bytes, reading
from conversion.checkpoint.distributed_file import read_distributed_checkpoint
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.plan import CheckpointPlan, TensorPlan, View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.safetensors_file import read_header
from conversion.checkpoint.sources import source_identity
from conversion.checkpoint.torch_file import read_state_dict
from tests.fixtures.yardstick import TWO_SECONDS, counted

WEIGHT = torch.arange(1_000_000, dtype=torch.float32)


def same_time(path: Path) -> None:
    """As in a container's image, where every file has one time."""
    os.utime(path, ns=(0, 0))


def safetensors(path: Path, value: float) -> ByteSource:
    save_file({"w": WEIGHT + value}, path)
    same_time(path)
    return read_header(path).source


def without_checksums(path: Path, value: float) -> ByteSource:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": WEIGHT + value}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    same_time(path)
    return read_state_dict(path)[0]


def distributed(path: Path, value: float) -> ByteSource:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": WEIGHT + value}, checkpoint_id=path)
    same_time(path / "__0_0.distcp")
    (view,) = [view for _, view in read_distributed_checkpoint(path).tensors["w"].chunks]
    return view.file


@pytest.mark.parametrize("save", [safetensors, without_checksums, distributed])
def test_two_steps_of_one_run_are_told_apart(save, tmp_path):
    """Their files have one size, one time and one header."""
    suffix = {safetensors: ".safetensors", without_checksums: ".bin", distributed: ""}[save]
    first, second = save(tmp_path / f"100{suffix}", 0.0), save(tmp_path / f"200{suffix}", 1.0)
    assert first.size == second.size
    assert first.identity != second.identity
    assert first.current_identity() == first.identity
    if save is safetensors:
        assert first.identity.split("-")[:3] == second.identity.split("-")[:3]


def test_an_identity_is_the_same_wherever_a_file_lies(tmp_path):
    source = safetensors(tmp_path / "a.safetensors", 0.0)
    shutil.copy2(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    other = read_header(tmp_path / "b.safetensors").source
    assert other.identity == source.identity == source_identity(tmp_path / "b.safetensors")
    assert other != source
    assert read_header(tmp_path / "a.safetensors").source == source
    assert len({other, source, read_header(tmp_path / "a.safetensors").source}) == 2


@pytest.mark.parametrize(("size", "place"), [(65_536, 0), (65_536, 31_000), (65_536, 65_535), (10**6, 0), (10**6, -1)])
def test_every_byte_of_a_small_file_counts_and_both_ends_of_any(size, place, tmp_path):
    path = tmp_path / "x"
    data = bytearray(size)
    path.write_bytes(data)
    same_time(path)
    before = identify(path)
    data[place] ^= 1
    path.write_bytes(data)
    same_time(path)
    assert identify(path).identity != before.identity


def test_every_part_of_a_header_counts(tmp_path):
    """A header may be longer than what is read together."""
    tensors = {f"{'n' * 100}{i:05d}": torch.zeros(1) for i in range(12_000)}
    save_file(tensors, tmp_path / "x.safetensors")
    same_time(tmp_path / "x.safetensors")
    source = read_header(tmp_path / "x.safetensors").source
    raw = bytearray((tmp_path / "x.safetensors").read_bytes())
    for place in (raw.index(b"n00001"), raw.index(b"n07777"), raw.index(b"n11998")):
        changed = raw.copy()
        changed[place] = ord("m")
        (tmp_path / "x.safetensors").write_bytes(changed)
        same_time(tmp_path / "x.safetensors")
        assert source.current_identity() != source.identity
        assert read_header(tmp_path / "x.safetensors").source.identity == source.current_identity()


def replace_by_another(path: Path) -> None:
    os.rename(path, path.with_suffix(".old"))
    save_file({"w": WEIGHT + 1}, path)


CHANGES = {
    "replaced": replace_by_another,
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "cut short": lambda path: os.truncate(path, 1000),
    "longer": lambda path: os.truncate(path, 5_000_000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changed_after_its_header_was_read(change, tmp_path):
    view = read_header_of(tmp_path / "x.safetensors")
    change(tmp_path / "x.safetensors")
    with (
        FileReader() as reader,
        pytest.raises(CorruptData, match=r"x\.safetensors: had 4000\d+ bytes of .* has \d+ of"),
    ):
        reader.read(view)
    plan = CheckpointPlan((TensorPlan.copy_of("w", view),), {})
    with pytest.raises(CorruptData, match="was changed or replaced meanwhile: run the command again"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert not (tmp_path / "out/model.safetensors").exists()


def read_header_of(path: Path) -> View:
    safetensors(path, 0.0)
    return read_header(path).tensors["w"]


def test_a_file_that_is_gone(tmp_path):
    view = read_header_of(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    with FileReader() as reader, pytest.raises(OSError, match="No such file") as caught:
        reader.read(view)
    assert caught.value.filename == str(tmp_path / "x.safetensors")


@pytest.mark.parametrize("year", [-(10**18), 10**19 // 2])
def test_any_time_can_be_said(year, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    source = LocalFile(str(path), 1, "", mtime_ns=year)
    with pytest.raises(CorruptData, match="was changed or replaced"):
        source.open()


def test_two_thousand_ranks_are_identified_in_a_second(tmp_path):
    """Sparse, as large as those of a trillion parameters; none stays open."""
    for rank in range(2048):
        with (tmp_path / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(7 * 10**9)
    before = len(os.listdir("/proc/self/fd"))
    with counted() as taken:
        found = [identify(tmp_path / f"__{rank}_0.distcp") for rank in range(2048)]
    assert taken.yardsticks < TWO_SECONDS
    assert len(os.listdir("/proc/self/fd")) == before
    assert len({source.name for source in found}) == 2048


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nothing", "a zero byte"])
def test_what_is_no_file_is_one_line(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "a zero byte":
        path = tmp_path / "x\0y"
    with pytest.raises(CheckpointError, match=r"cannot be read: (Is a directory|It is a pipe|No such file)"):
        identify(path)


def test_reads_are_bounded(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    with open_bytes(tmp_path / "x") as data:
        assert data.read(2, 3, limit=3, what="it") == b"234"
        with pytest.raises(CheckpointError, match="x: it has 4 bytes, the limit is 3"):
            data.read(2, 4, limit=3, what="it")
        with pytest.raises(EOFError):
            data.pread(8, 3)
    with pytest.raises(CheckpointError, match="x: was cut short"), reading(tmp_path / "x") as data:
        data.pread(0, 11)


# A source of another kind: what remote ones will be.

STORE: dict[str, bytes] = {}


class StoredSource(ByteSource):
    def open(self) -> "StoredBytes":
        return StoredBytes(self.name)

    def current_identity(self) -> str:
        return hashlib.sha256(STORE[self.name]).hexdigest()


class StoredBytes(OpenBytes):
    def __init__(self, name: str) -> None:
        if name not in STORE:
            raise FileNotFoundError(2, "No such file or directory", name)
        self.name, self.size = name, len(STORE[name])

    def read_into(self, target: memoryview, offset: int) -> None:
        data = STORE[self.name][offset : offset + len(target)]
        if len(data) < len(target):
            raise EOFError
        target[:] = data

    def identified(self, *header: tuple[int, bytes]) -> StoredSource:
        return StoredSource(self.name, self.size, hashlib.sha256(STORE[self.name]).hexdigest())

    def close(self) -> None:
        pass


@pytest.mark.parametrize("container", ["safetensors", "bin", "distcp"])
def test_nothing_above_assumes_a_local_file(container, tmp_path, monkeypatch):
    """The whole way from a header to the bytes of an output, from a source that has no path."""
    monkeypatch.setitem(sources.OPENERS, "store", StoredBytes)
    tensors = {"w": WEIGHT[:5000].view(50, 100), "b": torch.arange(7).to(torch.bfloat16)}
    if container == "safetensors":
        save_file(tensors, tmp_path / "x")
        STORE["store://here/x.safetensors"] = (tmp_path / "x").read_bytes()
        views = read_header("store://here/x.safetensors").tensors
    elif container == "bin":
        torch.save(tensors, tmp_path / "x")
        STORE["store://here/x.bin"] = (tmp_path / "x").read_bytes()
        _, views = read_state_dict("store://here/x.bin")
    else:
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(tensors, checkpoint_id=tmp_path / "x")
        for file in (tmp_path / "x").iterdir():
            STORE[f"store://here/{file.name}"] = file.read_bytes()
        chunks = read_distributed_checkpoint("store://here").tensors
        views = {name: tensor.chunks[0][1] for name, tensor in chunks.items()}
    assert {view.file.name.partition("://")[0] for view in views.values()} == {"store"}
    with pytest.raises(CheckpointError, match=r"store://here/nothing cannot be read: No such file"):
        identify("store://here/nothing")
    with FileReader() as reader:
        for name, view in views.items():
            expected = tensors[name].view(torch.uint8).numpy().tobytes()
            assert reader.read(view).tobytes() == expected
            target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            reader.copy_to(view, target, 3)
            assert os.pread(target, len(expected) + 1, 3) == expected
            os.close(target)
