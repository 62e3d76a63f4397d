# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Copies inside the kernel, and what happens where the kernel will not."""

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from conversion.checkpoint import kernel_copy, workspace
from conversion.checkpoint.errors import CorruptData
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.kernel_copy import PassingCache, available_memory, copy_range, write_all
from conversion.checkpoint.plan import CheckpointPlan
from conversion.checkpoint.reader import FileReader
from tests.fixtures.checkpoint_runs import contents, make_sources, mixed_plan

SIZE = 100_000
DATA = np.random.default_rng(0).bytes(SIZE)

copy_file_range = os.copy_file_range


def raises(code: int):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    return refuse


def refuses_after_some(*args):
    """As a file system that gives up in the middle."""
    if args[3] > 20_000:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return short(*args)


def short(source, target, count, *offsets):
    return copy_file_range(source, target, min(count, 4097), *offsets)


KERNELS = {
    "as it is": copy_file_range,
    **{name: raises(getattr(errno, name)) for name in ("EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM")},
    "returns 0": lambda *args: 0,
    "short counts": short,
    "refuses after some": refuses_after_some,
}


@pytest.fixture(autouse=True)
def pages_of_one_byte(monkeypatch):
    """Every offset lines up, so the kernel is asked."""
    monkeypatch.setattr(kernel_copy, "PAGE", 1)


@pytest.fixture(params=KERNELS.values(), ids=KERNELS)
def kernel(request, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", request.param)
    monkeypatch.setattr(kernel_copy, "_BUFFER", 7001)


@pytest.fixture
def files(tmp_path):
    """Descriptors of a source and a target, and the target's path."""
    (tmp_path / "source").write_bytes(DATA)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target, tmp_path / "target"
    os.close(source)
    os.close(target)


@pytest.mark.parametrize(
    ("begin", "to", "count"), [(0, 0, SIZE), (4097, 13, 50_000), (SIZE - 1, 4096, 1), (3, 5, 0), (0, 1 << 33, 20_000)]
)
def test_bytes_arrive(kernel, files, begin, to, count):
    source, target, _ = files
    copy_range(source, begin, target, to, count)
    assert os.pread(target, count + 1, to) == DATA[begin : begin + count]
    assert not any(os.pread(target, min(to, 1 << 20), 0))


def test_the_end_of_the_source_is_an_error(kernel, files):
    source, target, _ = files
    with pytest.raises(EOFError):
        copy_range(source, SIZE - 10, target, 0, 20)
    assert os.pread(target, 30, 0) == DATA[-10:]


def test_checkpoints_are_the_same_whatever_the_kernel_does(kernel, tmp_path):
    make_sources(tmp_path / "sources")
    write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "plain", WriteOptions(digest=False))
    plain = contents(tmp_path / "plain")
    write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "digests", WriteOptions())
    assert contents(tmp_path / "digests")["model.safetensors"] == plain["model.safetensors"]


def test_a_source_cut_short_meanwhile_is_named(kernel, tmp_path):
    make_sources(tmp_path / "sources")
    view = mixed_plan(tmp_path / "sources").tensors[-1].pieces[0].source
    assert view.is_contiguous
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    with FileReader() as reader:
        reader.read(view)
        os.truncate(tmp_path / "sources/weight", 9000)
        for act in (lambda: reader.copy_to(view, target, 0), lambda: reader.read(view)):
            with pytest.raises(CorruptData, match=r"sources/weight: had 12016 bytes .* ends before byte 12016 now"):
                act()
    os.close(target)


@pytest.mark.parametrize(("begin", "to", "asked"), [(1, 4097, True), (8192, 0, True), (0, 8, False), (64, 4000, False)])
def test_the_kernel_is_asked_where_pages_line_up(begin, to, asked, files, monkeypatch):
    source, target, _ = files
    moved: list[int] = []
    monkeypatch.setattr(kernel_copy, "PAGE", 4096)
    monkeypatch.setattr(os, "copy_file_range", lambda *args: moved.append(copy_file_range(*args)) or moved[-1])
    copy_range(source, begin, target, to, 50_000)
    assert bool(moved) == asked
    assert os.pread(target, 50_001, to) == DATA[begin : begin + 50_000]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_other_errors_are_not_papered_over(code, files, monkeypatch):
    source, target, path = files
    monkeypatch.setattr(os, "copy_file_range", raises(code))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        copy_range(source, 0, target, 0, SIZE)
    assert caught.value.errno == code
    assert path.stat().st_size == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_name_the_file(code, tmp_path, monkeypatch):
    """A descriptor has no name; the one line that a user sees needs one."""
    make_sources(tmp_path / "sources")
    monkeypatch.setattr(os, "copy_file_range", raises(code))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "out", WriteOptions(digest=False))
    assert caught.value.filename == str(tmp_path / "out/model.safetensors.partial")
    assert ("free some space, then run this again" in caught.value.strerror) == (code == errno.ENOSPC)


def test_short_writes_go_on(files, monkeypatch):
    _, target, path = files
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:999], offset))
    write_all(target, memoryview(DATA), 5)
    assert path.read_bytes() == bytes(5) + DATA


def test_reading_goes_on_after_short_counts(tmp_path, monkeypatch):
    """Signals and network file systems cut reads."""
    make_sources(tmp_path / "sources")
    write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "whole", WriteOptions())
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:1001]], offset))
    write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "out", WriteOptions())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_kernel_does_the_copying(tmp_path, monkeypatch):
    """What does not change never passes through this process."""
    make_sources(tmp_path / "sources")
    (tensor,) = [t for t in mixed_plan(tmp_path / "sources").tensors if t.name == "ids"]
    read: list[int] = []

    def watched(descriptor: int, *args) -> int:
        """Samples of what was written are read; the source's data are not."""
        count = preadv(descriptor, *args)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path / "sources/ids"):
            read.append(count)
        return count

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", watched)
    moved: list[int] = []
    monkeypatch.setattr(os, "copy_file_range", lambda *args: moved.append(copy_file_range(*args)) or moved[-1])
    write_checkpoint(CheckpointPlan((tensor,), {}), tmp_path / "out", WriteOptions(digest=False))
    assert sum(moved) == tensor.nbytes
    assert not read
    assert Path(tmp_path / "out/model.safetensors").read_bytes().endswith((tmp_path / "sources/ids").read_bytes()[16:])


def cached_pages(path: Path) -> list[bool]:
    """Which pages of a file are in memory, as the kernel says."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), pages) == 0
        del start
    return [bool(page & 1) for page in pages]


@pytest.fixture
def a_disk(tmp_path):
    """Skips where files have no page cache to leave, as in a file system in memory."""
    path = tmp_path / "probe"
    path.write_bytes(DATA)
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(cached_pages(path)):
        pytest.skip("this file system keeps its files in memory")


def test_a_passing_cache_keeps_the_last_bytes(files, a_disk):
    _, target, path = files
    page, unit = mmap.PAGESIZE, 4 * mmap.PAGESIZE
    cache = PassingCache(target, keep=2 * unit)
    for at in range(0, 10 * unit, unit):
        write_all(target, DATA[:unit], at)
        os.fdatasync(target)  # what is not on the disk yet is never let go
        cache.passed(at, unit)
    there = cached_pages(path)
    assert sum(there) * page <= 2 * unit
    assert path.read_bytes() == DATA[:unit] * 10
    cache.close()
    assert not any(cached_pages(path))


def test_the_system_takes_the_hint_to_begin_writing(files):
    _, target, _ = files
    write_all(target, DATA, 0)
    hint = kernel_copy._find_sync_file_range()
    assert hint is None or hint(target, 0, len(DATA), kernel_copy._SYNC_FILE_RANGE_WRITE) == 0
    assert hint is not None or sys.platform != "linux"


def test_every_byte_begins_its_way_to_the_disk_when_it_is_written(tmp_path, monkeypatch):
    """And where the system has no such hint, the output is the same."""
    make_sources(tmp_path / "sources")
    plan, asked = mixed_plan(tmp_path / "sources"), set()

    def note(descriptor: int, offset: int, count: int, flags: int) -> int:
        assert flags == kernel_copy._SYNC_FILE_RANGE_WRITE
        asked.update(range(offset, offset + count))
        return -1  # what fails here is for fsync to find

    monkeypatch.setattr(kernel_copy, "_sync_file_range", note)
    write_checkpoint(plan, tmp_path / "hinted", WriteOptions())
    size, nbytes = (tmp_path / "hinted/model.safetensors").stat().st_size, plan.nbytes
    assert asked == set(range(size - nbytes, size))
    monkeypatch.setattr(kernel_copy, "_sync_file_range", None)
    write_checkpoint(plan, tmp_path / "without", WriteOptions())
    assert contents(tmp_path / "hinted") == contents(tmp_path / "without")


@pytest.mark.parametrize("digest", [False, True])
def test_an_output_larger_than_memory_leaves_the_page_cache(digest, tmp_path, a_disk, monkeypatch):
    monkeypatch.setattr(os, "fsync", os.fdatasync)  # which does wait for the disk
    make_sources(tmp_path / "sources")
    options = WriteOptions(digest=digest)
    write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "small", options)
    assert any(cached_pages(tmp_path / "small/model.safetensors"))
    monkeypatch.setattr(workspace, "available_memory", lambda: 10_000)
    write_checkpoint(mixed_plan(tmp_path / "sources"), tmp_path / "large", options)
    assert not any(cached_pages(tmp_path / "large/model.safetensors"))
    assert contents(tmp_path / "large") == contents(tmp_path / "small")


@pytest.mark.parametrize(("limit", "expected"), [("4096\n", 4096), ("max\n", None), (str(1 << 62), None), (None, None)])
def test_a_container_may_have_less_memory_than_its_machine(limit, expected, tmp_path, monkeypatch):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(kernel_copy, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    assert available_memory() == (expected or psutil.virtual_memory().total)
