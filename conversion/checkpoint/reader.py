# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading windows of files: bounded memory, no mapping, any number of threads."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType

import numpy as np

from .bytes import ByteSource, OpenBytes, read_fully
from .errors import CorruptData
from .kernel_copy import copy_range, write_all
from .limits import allow_many_files
from .plan import Box, Shape, View
from .scratch import scratch

# A strided window of short runs is read as one span when that is at most this much more than what it needs, else run
# by run.
_SPAN_WASTE = 2.0
_SPAN_SLACK = 64 * 1024
_LONG_RUN = 64 * 1024  # bytes worth a system call of their own
MAX_SPAN = 1 << 20  # bytes of a span, where it can be cut: what is copied out of it then is still in the cache

# Bytes that are read, hashed and written before the next: they stay in a core's cache, where a block has no room.
CHUNK = 256 * 1024


class FileReader:
    """Open source files and read windows of them. Thread-safe; a context manager that closes what it opened.

    A file is compared with what it was when its header was read as it is opened: whatever reads a window may raise
    `CorruptData` because it was changed or replaced meanwhile.
    """

    def __init__(self) -> None:
        allow_many_files()
        self._stack = ExitStack()
        self._files: dict[ByteSource, OpenBytes] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def _open(self, file: ByteSource) -> OpenBytes:
        """The file, opened at the first use."""
        with self._lock:
            opened = self._files.get(file)
            if opened is None:
                opened = self._files[file] = self._stack.enter_context(file.open())
            return opened

    def read(self, view: View) -> np.ndarray:
        """The window's elements as a new row-major array."""
        out = np.empty(view.shape, view.dtype.numpy)
        self.read_into(view, out)
        return out

    def read_into(self, view: View, out: np.ndarray) -> None:
        """Read the window into `out`, an array of its shape and dtype with any strides.

        Raises:
            CorruptData: the file ends before the window does.
        """
        if not view.numel:
            return
        begin, end = view.span
        in_one = view.is_contiguous or (
            _run_bytes(view) < _LONG_RUN and end - begin <= _SPAN_WASTE * view.nbytes + _SPAN_SLACK
        )
        if view.is_contiguous and out.flags.c_contiguous:
            self._read_bytes(view.file, begin, out)
        elif not in_one:
            self._read_parts(view, out, 1)
        elif end - begin > MAX_SPAN:
            step = view.strides[_widest(view)] * view.dtype.itemsize
            self._read_parts(view, out, max(1, MAX_SPAN // step))
        else:
            span = scratch("span", (end - begin) // view.dtype.itemsize, view.dtype.numpy)
            self._read_bytes(view.file, begin, span)
            strides = tuple(stride * view.dtype.itemsize for stride in view.strides)
            out[...] = np.lib.stride_tricks.as_strided(span, view.shape, strides, writeable=False)

    def _read_parts(self, view: View, out: np.ndarray, count: int) -> None:
        """Read a window in parts of so many indices along the dimension of the widest steps."""
        axis = _widest(view)
        for index in range(0, view.shape[axis], count):
            part = (*(slice(None),) * axis, slice(index, index + count))
            self.read_into(view[part], out[part])

    def chunks(self, view: View) -> Iterator[memoryview]:
        """The bytes of a contiguous window in order, in chunks; each is overwritten by the next.

        Raises:
            CorruptData: the file ends before the window does.
        """
        self._open(view.file).expect(*view.span)
        yield from _chunks(lambda chunk, offset: self._fill(view.file, chunk, offset), *view.span)

    def announce(self, file: ByteSource, begin: int, end: int) -> None:
        """Say that these bytes will be read soon, so that the system fetches them while others are worked on."""
        descriptor = self._open(file).descriptor
        if descriptor is not None and hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def copy_to(self, view: View, target: int, offset: int) -> None:
        """Copy a contiguous window's bytes into the file behind the descriptor `target`, at a byte offset.

        Raises:
            CorruptData: the source ends before the window does.
        """
        descriptor = self._open(view.file).descriptor
        if descriptor is None:
            for chunk in self.chunks(view):
                write_all(target, chunk, offset)
                offset += len(chunk)
            return
        try:
            copy_range(descriptor, view.offset, target, offset, view.nbytes)
        except EOFError:
            raise self._cut_short(view.file, view.span[1]) from None

    def _read_bytes(self, file: ByteSource, offset: int, out: np.ndarray) -> None:
        self._fill(file, out.reshape(-1).view(np.uint8).data, offset)

    def _fill(self, file: ByteSource, target: memoryview, offset: int) -> None:
        try:
            self._open(file).read_into(target, offset)
        except EOFError:
            raise self._cut_short(file, offset + len(target)) from None

    def _cut_short(self, file: ByteSource, end: int) -> CorruptData:
        return CorruptData(
            f"{file}: had {file.size} bytes when it was opened and ends before byte {end} now, to which a tensor "
            "reaches: it was cut short meanwhile; run the command again with the whole file."
        )


def _widest(view: View) -> int:
    """The dimension along which neighbours are farthest apart in the file."""
    return max(range(len(view.shape)), key=lambda axis: view.strides[axis] if view.shape[axis] > 1 else -1)


def _run_bytes(view: View) -> int:
    """Length of the stretches of a window that lie in the file without gaps."""
    run = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != run:
            break
        run *= size
    return run * view.dtype.itemsize


def read_chunks(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes `begin .. end` of an open file in order, in chunks; each is overwritten by the next.

    Raises:
        EOFError: the file ends before.
    """
    yield from _chunks(lambda chunk, offset: read_fully(descriptor, chunk, offset), begin, end)


def _chunks(fill: Callable[[memoryview, int], None], begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, end - begin)))
    for offset in range(begin, end, CHUNK):
        chunk = buffer[: end - offset]
        fill(chunk, offset)
        yield chunk


def boxes_of_range(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Cut the flat index range [start, stop) of a row-major array into boxes, each contiguous, in order.

    At most two partial boxes a dimension and one whole one.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = -(-start // row), stop // row  # whole rows lie between
    if first > last:  # inside one row
        yield from _in_row(shape, start // row, start % row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((index, *box.start), (1, *box.size))
