# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Where bytes come from: files that are read at any place, and what tells one state of a file from another.

    open_bytes(where)  ->  OpenBytes    a file that is open: its size, bounded reads
    .identified(head)  ->  ByteSource   the same as a value, once its header is read: name, size, identity
    .open()            ->  OpenBytes    later, for the data; refused if it is not the file whose header was read

A `ByteSource` goes into every window of a plan, so that nothing can forget which bytes were meant. Only this module
opens source files. What is not on this machine is a class of each kind more, and a scheme in `OPENERS`.

Reads say how much they may take at most: a file's own word for a size is nobody's reason to allocate it.
"""

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self, TypeAlias

import xxhash

from .errors import CheckpointError, CorruptData

# An identity looks at this many windows of the data, evenly spread, both ends among them: runs whose files have one
# size, one header and one time, as all in a container's image have, still hold other numbers there.
_WINDOWS = 16
_WINDOW = 4096
_PART = 1 << 20

Ranges: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class ByteSource(ABC):
    """A file as it was when its header was read. A value: two are equal that have one name and one identity.

    Args:
        name: its absolute path or its URL.
        size: in bytes.
        identity: a text that another state of the file does not have.
    """

    name: str
    size: int
    identity: str

    @property
    def window(self) -> int:
        """Bytes that a thread which reads it holds, beside those that it asked for."""
        return 0

    @abstractmethod
    def open(self) -> "OpenBytes":
        """Open it for reading its data.

        Raises:
            CorruptData: it is not what it was when its header was read.
            OSError: it cannot be opened.
        """

    @abstractmethod
    def current_identity(self) -> str:
        """The identity of what is there now; OSError if nothing is."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByteSource):
            return NotImplemented
        return self is other or (self.name, self.identity) == (other.name, other.identity)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


class OpenBytes(ABC):
    """A file that is open. Reads may come from any number of threads. A context manager that closes it.

    Attributes:
        name: its absolute path or its URL.
        size: in bytes, when it was opened.
    """

    name: str
    size: int

    @abstractmethod
    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` on.

        Raises:
            EOFError: the file ends before.
            OSError: reading failed.
        """

    def expect(self, begin: int, end: int) -> None:  # noqa: B027  (of a local file nothing need be done)
        """Learn that the thread will read these bytes next, in order, and may read them at once."""

    @abstractmethod
    def identified(self, *header: tuple[int, bytes]) -> ByteSource:
        """What is open as a value.

        Args:
            header: the parts of its header that were read: where each begins, and its bytes.
        """

    @property
    def descriptor(self) -> int | None:
        """The descriptor of a local file, from which the kernel can copy; None for any other."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pread(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, which the caller has found to be few.

        Raises:
            EOFError: the file ends before.
            OSError: reading failed.
        """
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read(self, offset: int, size: int, *, limit: int, what: str) -> bytes:
        """`size` bytes from `offset` on, where a file says the size.

        Args:
            offset, size: the bytes.
            limit: the most that anything real needs.
            what: they are, for the message.

        Raises:
            CheckpointError: it is more than that.
            EOFError: the file ends before.
            OSError: reading failed.
        """
        if size > limit:
            raise CheckpointError(f"{self.name}: {what} has {size} bytes, the limit is {limit}.")
        return self.pread(offset, size)


@dataclass(frozen=True, slots=True, eq=False)
class LocalFile(ByteSource):
    """A file on this machine.

    Args:
        mtime_ns: its time of change.
        header: where the header is that its identity looks at: (first byte, bytes) of each part.
    """

    mtime_ns: int = field(default=0, kw_only=True)
    header: Ranges = field(default=(), kw_only=True)

    def __fspath__(self) -> str:
        return self.name

    def open(self) -> "OpenFile":
        """See `ByteSource.open`."""
        file = OpenFile(self.name)
        if (file.size, file.mtime_ns) != (self.size, self.mtime_ns):
            file.close()
            raise CorruptData(
                f"{self.name}: had {self.size} bytes of {_moment(self.mtime_ns)} when its header was read, has "
                f"{file.size} of {_moment(file.mtime_ns)}; it was changed or replaced meanwhile: run the command again."
            )
        return file

    def current_identity(self) -> str:
        """See `ByteSource.current_identity`."""
        with OpenFile(self.name) as file:
            return file.identity(self.header)


class OpenFile(OpenBytes):
    """A file on this machine that is open.

    Args:
        path: an absolute path.

    Raises:
        OSError: there is none, or it is a folder, a pipe or a device, which might never end, or never begin; or this
            is Windows.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        if not hasattr(os, "pread"):
            reason = "this system has no os.pread, by which checkpoints are read; use Linux, macOS or WSL"
            raise OSError(errno.ENOSYS, reason, path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            status = os.fstat(self._descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "It is a pipe, a socket or a device, no file", path)
        except BaseException:
            self.close()
            raise
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    @property
    def descriptor(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read_into(self, target: memoryview, offset: int) -> None:
        """See `OpenBytes.read_into`."""
        try:
            read_fully(self._descriptor, target, offset)
        except OSError as error:
            error.filename = self.name  # which a descriptor does not know
            raise

    def identified(self, *header: tuple[int, bytes]) -> LocalFile:
        """See `OpenBytes.identified`."""
        ranges = tuple((offset, len(content)) for offset, content in header)
        identity = self._identity(iter([content for _, content in header]))
        return LocalFile(self.name, self.size, identity, mtime_ns=self.mtime_ns, header=ranges)

    def identity(self, header: Ranges) -> str:
        """The identity, with the header read again; of a file that has become shorter, what is left of it."""
        return self._identity(
            self._upto_end(at, min(_PART, offset + size - at))
            for offset, size in header
            for at in range(offset, offset + size, _PART)
        )

    def _identity(self, header: Iterator[bytes]) -> str:
        """Size and time of the open file, a hash of its header, a hash of windows of its data."""
        head, data = xxhash.xxh3_128(), xxhash.xxh3_128()
        for part in header:
            head.update(part)
        for offset, size in spread(self.size):
            data.update(self._upto_end(offset, size))
        return f"{self.size}-{self.mtime_ns}-{head.hexdigest()}-{data.hexdigest()}"

    def _upto_end(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)


def read_fully(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill a buffer from an open file of this machine.

    Raises:
        EOFError: the file ends before.
        OSError: reading failed.
    """
    done = 0
    while done < len(target):
        count = _read_some(descriptor, target[done:], offset + done)
        if count == 0:
            raise EOFError
        done += count


def _read_some(descriptor: int, target: memoryview, offset: int) -> int:
    """Read into a buffer as much as comes; how many bytes that was, 0 at the end."""
    if hasattr(os, "preadv"):  # macOS has it since version 11
        return os.preadv(descriptor, [target], offset)
    data = os.pread(descriptor, min(len(target), _PART), offset)
    target[: len(data)] = data
    return len(data)


def spread(size: int) -> Iterator[tuple[int, int]]:
    """Where an identity looks at data: small windows, evenly spread over a file; all of it, if that is less."""
    if size <= _WINDOWS * _WINDOW:
        yield 0, size
        return
    for number in range(_WINDOWS):
        yield number * (size - _WINDOW) // (_WINDOWS - 1), _WINDOW


def _moment(mtime_ns: int) -> str:
    seconds, rest = divmod(mtime_ns, 10**9)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"
    except (ValueError, OverflowError, OSError):  # a file may say any year
        return f"{mtime_ns} ns"


Where: TypeAlias = str | os.PathLike[str] | ByteSource
"""A file: its path or URL, or what it was when its header was read."""

# By the scheme of a URL: what opens it. A path has none.
OPENERS: dict[str, Callable[[str], OpenBytes]] = {}
# By the path of a folder that stands for one elsewhere: what opens a file in it; None for a file that is here.
MIRRORS: dict[str, Callable[[str], OpenBytes | None]] = {}


def full_name(where: Where) -> str:
    """The absolute path or the URL of a file."""
    if isinstance(where, ByteSource):
        return where.name
    name = os.fspath(where)
    return name if _scheme(name) in OPENERS else os.path.abspath(name)


def open_bytes(where: Where) -> OpenBytes:
    """Open a file, wherever it is.

    Raises:
        CorruptData: it is not what it was when its header was read.
        OSError: it cannot be opened.
    """
    if isinstance(where, ByteSource):
        return where.open()
    name = full_name(where)
    opener = OPENERS.get(_scheme(name))
    try:
        return opener(name) if opener else _open_mirrored(name) or OpenFile(name)
    except ValueError:  # a zero byte in it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None


def _open_mirrored(name: str) -> OpenBytes | None:
    for root, opener in MIRRORS.items():
        if name.startswith(root + os.sep):
            return opener(name)
    return None


def _scheme(name: str) -> str:
    scheme, colon, _ = name.partition("://")
    return scheme if colon else ""


def identify(where: Where) -> ByteSource:
    """A file without a header as a value.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(where) as data:
        return data.identified()


def read_start(where: Where, size: int) -> bytes:
    """The first bytes of a file, fewer if it has fewer.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(where) as data:
        return data.pread(0, min(data.size, size))


def refuse_pointer(name: str, head: bytes) -> None:
    """Refuse what Git left in a file's place where it was to fetch that from elsewhere.

    Args:
        name: of the file.
        head: its first bytes, eight or more.

    Raises:
        CheckpointError: it is such a pointer.
    """
    if head[:8] == b"version ":
        raise CheckpointError(f"{name} is a Git LFS pointer, expected weights; run `git lfs pull` in its repository.")


@contextmanager
def reading(where: Where, *, missing: str | None = None) -> Iterator[OpenBytes]:
    """Open a file for its header: whatever the system has against that is an error of the checkpoint, on one line.

    Args:
        where: the file.
        missing: what to say if there is none.

    Raises:
        CheckpointError: the file cannot be opened or read, or became shorter while it was read.
    """
    try:
        with open_bytes(where) as data:
            yield data
    except EOFError:
        raise CheckpointError(f"{full_name(where)}: was cut short while its header was read; try again.") from None
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{full_name(where)} is missing; {missing}.") from None
        raise CheckpointError(
            f"{error.filename or full_name(where)} cannot be read: {error.strerror or error}."
        ) from None
