# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Moving bytes from file to file inside the kernel, where that is possible and faster."""

import errno
import os

PAGE = 4096
_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_BUFFER = 256 * 1024  # stays in a core's cache between the reading and the writing
# The page cache allocates in units as large as the writes are. On a virtual machine the host has often taken the large
# ones back, and must find memory first: 3.5 GiB took 7.6 s here in writes of 256 KiB, 1.4 s in writes of 32 KiB.
_WRITE = 32 * 1024


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


def write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """`pwrite` until everything is written."""
    data = memoryview(content)
    written = 0
    while written < len(data):
        room = _WRITE - (offset + written) % _WRITE
        written += os.pwrite(descriptor, data[written : written + room], offset + written)
