# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Moving bytes into files with the kernel's help: copied without coming here, written, let go of by its page cache."""

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

PAGE = 4096
_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SMALL_MACHINE = 4 << 30  # memory of one that does not say what it has
_BUFFER = 256 * 1024  # stays in a core's cache between the reading and the writing
# The page cache allocates in units as large as the writes are. On a virtual machine the host has often taken the large
# ones back, and must find memory first: 3.5 GiB took 7.6 s here in writes of 256 KiB, 1.4 s in writes of 32 KiB. Where
# a PassingCache gives the same memory back and back again, larger ones are faster: 37.6 GB took 22.9 s and 18.8 s.
_WRITE, _PASSING_WRITE = 32 * 1024, 128 * 1024
_SYNC_FILE_RANGE_WRITE = 2


def copy_range(source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy bytes between two open files, by `copy_file_range` or, where that is not to be had, by a buffer.

    Args:
        source: descriptor to read.
        source_offset: first byte.
        target: descriptor to write.
        target_offset: where it goes.
        count: how many bytes.

    Raises:
        EOFError: the source ends before.
        OSError: reading or writing failed.
    """
    # Where pages do not line up the kernel copies each in two parts, which takes longer than a buffer.
    lines_up = source_offset % PAGE == target_offset % PAGE
    done = _copy_in_kernel(source, source_offset, target, target_offset, count) if lines_up else 0
    while done < count:
        data = os.pread(source, min(_BUFFER, count - done), source_offset + done)
        if not data:
            raise EOFError
        write_all(target, data, target_offset + done)
        done += len(data)


def _copy_in_kernel(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    """Copy until it is done or the kernel cannot; returns how many bytes that were."""
    done = 0
    if not hasattr(os, "copy_file_range"):  # only Linux has it
        return done
    try:
        while done < count:
            moved = os.copy_file_range(source, target, count - done, source_offset + done, target_offset + done)
            if moved == 0:  # the end of the source, or a file system that does not say it cannot
                break
            done += moved
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return done


def write_all(descriptor: int, content: bytes | memoryview, offset: int, *, cached: bool = True) -> None:
    """`pwrite` until everything is written, in the units that are fastest for a file that stays cached, or does not."""
    unit = _WRITE if cached else _PASSING_WRITE
    data = memoryview(content)
    written = 0
    while written < len(data):
        room = unit - (offset + written) % unit
        written += os.pwrite(descriptor, data[written : written + room], offset + written)


class PassingCache:
    """Keeps the page cache of a file that is being written to the last few bytes written.

    An output larger than memory would push everything else out of the cache, and its own beginning in the end; and for
    every page of it the kernel must find memory, which a virtual machine's host may have to find too: 30 GB took 42 to
    51 s here, and 9 s with this.

    Args:
        descriptor: the file.
        keep: bytes that stay.
    """

    def __init__(self, descriptor: int, keep: int = 128 * 1024 * 1024) -> None:
        self._descriptor = descriptor
        self._room = keep
        self._written: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def passed(self, offset: int, count: int) -> None:
        """Say that a range is written: its way to the disk begins, and what was written long before is let go."""
        _let_go(self._descriptor, offset, count)  # of what is not on the disk yet, this only begins the writing
        old = []
        with self._lock:
            self._written.append((offset, count))
            self._room -= count
            while self._room < 0:
                old.append(self._written.popleft())
                self._room += old[-1][1]
        for start, size in old:
            _let_go(self._descriptor, start, size)

    def close(self) -> None:
        """Let go of all of the file, which has been synced."""
        _let_go(self._descriptor, 0, 0)


def _let_go(descriptor: int, offset: int, count: int) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def begin_writing(descriptor: int, offset: int, count: int) -> None:
    """Have the system begin to move a range that was written to the disk, where it can be told so (Linux).

    It would hold it back for half a minute, or until there is much of it, and whoever syncs the file waits for all.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)  # a hint: that it fails is found by fsync


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):  # another system, or another C library
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _find_sync_file_range()


def preallocate(descriptor: int, size: int) -> None:
    """Give a file its size, and the disk space for it where the system and the file system can do that.

    Raises:
        OSError: there is no room for it.
    """
    os.ftruncate(descriptor, size)
    if not size or not hasattr(os, "posix_fallocate"):  # macOS has none
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def available_memory() -> int:
    """Bytes of memory of this machine, or of the container this process is in."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others may not have these names
        machine = _SMALL_MACHINE
    try:
        return min(machine, int(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # none, or "max"
        return machine
