# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folders that are elsewhere, read by ranges: a local folder stands for each, and no weight is downloaded.

The small files of a remote folder are fetched into a temporary one. In the place of every weight file lies a
placeholder of its size that takes no space, so that whatever looks for names and sizes finds them; whoever opens one
through `bytes.py`, by which alone sources are read, reads the remote file. What opens a placeholder itself finds the
text of a pointer, which every reader of weights refuses.

    RemoteFolder  --mirror-->  a local path  --open_bytes-->  OpenRemote  (ranges, a window for each thread)
"""

import atexit
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from .bytes import MIRRORS, ByteSource, OpenBytes, spread
from .errors import CheckpointError, CorruptData
from .manifest import is_plain

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_LARGE = 100_000_000  # bytes; no small file of a model has more
_POINTER = b"version of a file that is elsewhere\n"  # as Git LFS begins, which readers refuse
WINDOW = 4 << 20  # bytes that a thread fetches at a time, at most
_TRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 16.0  # seconds
_DOWNLOADS = 8  # small files at a time

Fetch = Callable[[int, int], bytes]


@dataclass(frozen=True)
class RemoteEntry:
    """A file of a remote folder.

    Args:
        size: in bytes.
        version: what another state of the file does not have: an ETag, a hash; empty where nobody says.
        fetch: reads the bytes from one place to another.
        look: the size and the version of what is there now; None where that cannot change.
        check: raises if the content of a small file is not what its host says; None where it says nothing.
        sha256: of the content, where the host knows it.
    """

    size: int
    version: str
    fetch: Fetch
    look: Callable[[], tuple[int, str]] | None = None
    check: Callable[[bytes], None] | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that is elsewhere, as it was when it was looked at.

    Args:
        url: where, without credentials; with the commit, where there are such.
        files: its files, by path below it.
        origin: what a record says of it.
    """

    url: str
    files: Mapping[str, RemoteEntry]
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Mirror:
    folder: RemoteFolder
    root: str
    entries: dict[str, RemoteEntry]


_mirrors: dict[str, _Mirror] = {}  # by the URL and the state of every file
_lock = threading.Lock()


def mirror(folder: RemoteFolder) -> Path:
    """The local folder that stands for a remote one; made at the first call, removed when the program ends.

    Raises:
        CheckpointError: a small file cannot be read, or is not what its host says.
    """
    state = f"{folder.url} {sorted((name, entry.size, entry.version) for name, entry in folder.files.items())}"
    with _lock:
        if state not in _mirrors:
            _mirrors[state] = _make(folder)
        return Path(_mirrors[state].root)


def _make(folder: RemoteFolder) -> _Mirror:
    place = tempfile.mkdtemp(prefix="teleflm-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    root = os.path.join(os.path.realpath(place), folder.url.rstrip("/").rsplit("/", 1)[-1].partition("@")[0] or "root")
    files = {name: entry for name, entry in folder.files.items() if is_plain(name)}  # others would lie elsewhere
    small = {name: entry for name, entry in files.items() if not _is_large(name, entry)}
    large = {os.path.join(root, name): entry for name, entry in files.items() if name not in small}
    for name, entry in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in small:
            with path.open("wb") as file:
                file.write(_POINTER[: entry.size])
                file.truncate(entry.size)
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        list(pool.map(lambda item: _download(folder.url, Path(root), *item), small.items()))
    made = _Mirror(folder, root, large)
    MIRRORS[root] = lambda name: OpenRemote(name, _url(made, name), large[name]) if name in large else None
    return made


def _is_large(name: str, entry: RemoteEntry) -> bool:
    return name.endswith(_WEIGHTS) or entry.size > _LARGE


def _download(url: str, root: Path, name: str, entry: RemoteEntry) -> None:
    with plainly(f"{url}/{name}"):
        content = _persistently(lambda: entry.fetch(0, entry.size), entry.size, f"{url}/{name}") if entry.size else b""
        if entry.check:
            try:
                entry.check(content)
            except CheckpointError as error:
                raise CheckpointError(f"{url}/{name}: {error}; try again, or tell its owner.") from None
    (root / name).write_bytes(content)


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{what} cannot be read: {without_credentials(said).rstrip('.')}.") from None


def without_credentials(text: str) -> str:
    """A text whose URLs have no user, password or query, where signatures are."""
    return re.sub(r"(://[^\s?'\"]+)\?[^\s'\"]+", r"\1", re.sub(r"://[^/@\s'\"]+@", "://", text))


def _url(made: _Mirror, name: str) -> str:
    return f"{made.folder.url}/{os.path.relpath(name, made.root)}"


def origin(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """What a record says of where a folder came from; None of one that is on this machine."""
    path = os.path.realpath(folder)
    for made in _mirrors.values():
        if path == made.root or path.startswith(made.root + os.sep):
            return dict(made.folder.origin)
    return None


def shown(text: str) -> str:
    """A message in which remote folders have their own names, and not those of what stands for them here."""
    for made in list(_mirrors.values()):
        text = text.replace(made.root, made.folder.url)
    return without_credentials(text)


@dataclass(frozen=True, slots=True, eq=False)
class MirroredFile(ByteSource):
    """A file of a remote folder; its name is that of the placeholder.

    Args:
        url: where it is.
        entry: how it is read.
        header: its header, as far as the identity looks at it: where each part begins, and its hash.
    """

    url: str = field(kw_only=True)
    entry: RemoteEntry = field(kw_only=True)

    @property
    def window(self) -> int:
        """See `ByteSource.window`."""
        return WINDOW

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.url

    def open(self) -> "OpenRemote":
        """See `ByteSource.open`."""
        self._require_same()
        return OpenRemote(self.name, self.url, self.entry)

    def current_identity(self) -> str:
        """See `ByteSource.current_identity`."""
        if self.entry.look is None:
            return self.identity
        size, version = self.entry.look()
        return self.identity if (size, version) == (self.size, self.entry.version) else f"{size}-{version}"

    def _require_same(self) -> None:
        if self.entry.look is None:
            return
        with plainly(self.url):
            size, version = self.entry.look()
        if (size, version) != (self.size, self.entry.version):
            raise CorruptData(
                f"{self.url}: had {self.size} bytes and the version {self.entry.version or 'none'} when its header was "
                f"read, has {size} and {version or 'none'}; it was changed meanwhile: run the command again."
            )


class _Window(threading.local):
    """What a thread read last, of whatever file, and how far it said that it will go on: one a thread, however many
    files are open."""

    file: "OpenRemote | None" = None
    begin: int = 0
    content: memoryview = memoryview(b"")
    end: int = 0


_window = _Window()


class OpenRemote(OpenBytes):
    """A file of a remote folder that is open.

    Args:
        name: the placeholder's path.
        url: where it is.
        entry: how it is read.
    """

    def __init__(self, name: str, url: str, entry: RemoteEntry) -> None:
        self.name, self.url, self.size = name, url, entry.size
        self._entry = entry

    def expect(self, begin: int, end: int) -> None:
        """See `OpenBytes.expect`."""
        if _window.file is not self:
            self._forget()
        _window.file, _window.end = self, end

    def read_into(self, target: memoryview, offset: int) -> None:
        """See `OpenBytes.read_into`."""
        if offset + len(target) > self.size:
            raise EOFError
        if _window.file is not self:
            self._forget()
        done = 0
        while done < len(target):
            at = offset + done
            if not _window.begin <= at < _window.begin + len(_window.content):
                _window.content = memoryview(b"")  # before the next one is there
                end = min(max(offset + len(target), _window.end), at + WINDOW)
                _window.begin, _window.content = at, memoryview(self._fetch(at, end))
                _window.file = self
            part = _window.content[at - _window.begin :][: len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)

    @staticmethod
    def _forget() -> None:
        _window.file, _window.begin, _window.content, _window.end = None, 0, memoryview(b""), 0

    def _fetch(self, begin: int, end: int) -> bytes:
        return _persistently(lambda: self._entry.fetch(begin, end), end - begin, self.url)

    def identified(self, *header: tuple[int, bytes]) -> MirroredFile:
        """See `OpenBytes.identified`."""
        head = xxhash.xxh3_128()
        for _, content in header:
            head.update(content)
        version = self._entry.version
        if not version:  # then the data itself has to tell
            data = xxhash.xxh3_128()
            for offset, size in spread(self.size):
                data.update(self._fetch(offset, offset + size))
            version = data.hexdigest()
        identity = f"{self.size}-{version}-{head.hexdigest()}"
        return MirroredFile(self.name, self.size, identity, url=self.url, entry=self._entry)

    def close(self) -> None:
        """Let go of it."""
        if _window.file is self:
            self._forget()


def _persistently(fetch: Callable[[], bytes], size: int, url: str) -> bytes:
    """Read some bytes, again if that fails in a way that may pass.

    Raises:
        OSError: it does not pass; the message is of the last try.
    """
    said = ""
    for attempt in range(_TRIES):
        if attempt:
            wait = min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT)
            time.sleep(wait * random.uniform(0.5, 1.0))
        try:
            content = fetch()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            said = without_credentials(error.strerror or str(error)) or type(error).__name__
            raise OSError(error.errno, said, url) from None
        except CheckpointError:
            raise
        except Exception as error:  # of as many kinds as there are file systems
            said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
            continue
        if len(content) == size:
            return content
        said = f"it sent {len(content)} bytes, expected {size}"
    said = without_credentials(said).rstrip(".").removesuffix("; the same command goes on from here")
    raise OSError(None, f"{said}, {_TRIES} times; the same command goes on from here", url)


__all__ = ["MirroredFile", "OpenRemote", "RemoteEntry", "RemoteFolder", "mirror", "origin", "plainly", "shown"]
