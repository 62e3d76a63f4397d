# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Moving bytes from file to file inside the kernel, where the file systems allow it."""

import errno
import os

_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_BUFFER = 8 << 20
# Larger writes make the page cache allocate in larger units. On a virtual machine the host has often taken those back,
# and must find memory for them first: 3.5 GiB in writes of 256 KiB took 7.6 s here, in writes of 64 KiB 2.7 s.
_WRITE = 64 * 1024


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
    while done < count:
        data = os.pread(source, min(_BUFFER, count - done), source_offset + done)
        if not data:
            raise EOFError
        write_all(target, data, target_offset + done)
        done += len(data)


def write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """`pwrite` until everything is written."""
    data = memoryview(content)
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written : written + _WRITE], offset + written)
