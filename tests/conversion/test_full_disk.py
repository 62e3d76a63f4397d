# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A disk that is too small: said in one line, before the work where it can be known, and no work is lost."""

import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion import WriteOptions, convert_checkpoint
from conversion.checkpoint import execute, finish
from conversion.checkpoint.folder_formats import loadable_files
from conversion.checkpoint.sources import WEIGHT_FILES
from tests.fixtures.checkpoint_runs import contents, disk_cannot_preallocate, disk_seems_empty, run_teleflm
from tests.fixtures.tiny import tiny_model

pytestmark = pytest.mark.slow

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount a file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def source(tmp_path) -> Path:
    """Ten tensors of 200 kB."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    save_file(
        {f"t{i}": rng.standard_normal(50_000, np.float32) for i in range(10)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text('{"model_type": "other"}')
    return folder


def leave(disk: Path, nbytes: int) -> None:
    """Fill the disk up to so many bytes."""
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE - nbytes)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "needs 0.002 GB more, 0.001 GB are free; free some space, then run this again"),
        (disk_seems_empty, "No space left on device; free some space, then run this again"),
        (disk_cannot_preallocate, "No space left on device; free some space, then run this again"),
    ],
    ids=["known before", "preallocating", "writing"],
)
@pytest.mark.parametrize("more", [[], ["--no-digest"], ["--max-shard-size", "450kB"]], ids=" ".join)
def test_a_full_disk(fault, message, more, disk, source, tmp_path):
    leave(disk, 1_000_000)
    command = ("convert", source, disk / "out", *more)
    result = run_teleflm(*command, folder=tmp_path, patch=fault)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line != "converting: 2 MB"]
    assert line.startswith(f"teleflm: {disk}/out")
    assert line.endswith(message)
    assert not [name for name in contents(disk / "out") if name in WEIGHT_FILES]
    (disk / "ballast").unlink()
    assert run_teleflm(*command, folder=tmp_path).returncode == 0
    assert run_teleflm("convert", source, tmp_path / "elsewhere", *more, folder=tmp_path).returncode == 0
    assert contents(disk / "out") == contents(tmp_path / "elsewhere")


def test_shards_that_fitted_are_kept(disk, source, tmp_path):
    leave(disk, 1_000_000)
    command = ("convert", source, disk / "out", "--max-shard-size", "450kB")
    assert run_teleflm(*command, folder=tmp_path, patch=disk_seems_empty).returncode == 1
    finished = [path.name for path in (disk / "out/.teleflm").glob("*.done")]
    assert finished
    (disk / "ballast").unlink()
    steps: list[int] = []
    options = WriteOptions("450kB", progress=lambda nbytes, total: steps.append(nbytes))
    convert_checkpoint(source, disk / "out", options=options)
    assert steps[0] == len(finished) * 400_000


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("shard_size", ["5GB", "450kB"])
@pytest.mark.parametrize(
    ("step", "file"),
    [("_write_hashed", ".safetensors.partial"), ("write_small_files", "config.json"), ("make_loadable", "")],
)
def test_a_disk_that_fills_up_at_the_very_end(step, file, shard_size, disk, source, tmp_path, monkeypatch):
    """The weights have their room; the journal, the small files and the index find none. A rename needs none."""
    module = finish if hasattr(finish, step) else execute
    real = getattr(module, step)
    monkeypatch.setattr(module, step, lambda *args: (fill(disk), real(*args))[1])
    options = WriteOptions(shard_size, workers=1)
    if step == "make_loadable" and shard_size == "5GB":
        convert_checkpoint(source, disk / "out", options=options)
    else:
        with pytest.raises(OSError, match="No space left on device; free some space, then run this again") as caught:
            convert_checkpoint(source, disk / "out", options=options)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename.endswith(file)
        assert not [name for name in contents(disk / "out") if name in WEIGHT_FILES]
    monkeypatch.undo()
    (disk / "ballast").unlink()
    convert_checkpoint(source, disk / "out", options=options)
    convert_checkpoint(source, tmp_path / "elsewhere", options=options)
    assert contents(disk / "out") == contents(tmp_path / "elsewhere")


@pytest.mark.parametrize("fault", [None, disk_seems_empty, disk_cannot_preallocate])
@pytest.mark.parametrize("to", [("megatron", "--tp", "2"), ("dcp",), ("torch_dist",)], ids=lambda to: to[0])
def test_a_full_disk_under_folders_to_train_on(to, fault, disk, tmp_path):
    leave(disk, 250_000)
    tiny_model().save_pretrained(tmp_path / "source")
    command = ("export", tmp_path / "source", disk / "out", "--to", *to)
    result = run_teleflm(*command, folder=tmp_path, patch=fault)
    assert result.returncode == 1
    assert "free some space, then run this again" in result.stderr
    assert not [name for name in contents(disk / "out") if name in loadable_files()]
    (disk / "ballast").unlink()
    assert run_teleflm(*command, folder=tmp_path).returncode == 0
    assert run_teleflm(*command[:2], tmp_path / "elsewhere", *command[3:], folder=tmp_path).returncode == 0
    assert contents(disk / "out") == contents(tmp_path / "elsewhere")
