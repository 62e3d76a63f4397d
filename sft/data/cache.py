# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A folder of entries that one process makes and all others open.

An entry is a folder named by what it is made of. Whoever finds none makes it, and the others, of this run or another,
wait: for files, by the clock of who waits. No collective operation is pending meanwhile, whose limit (10 to 30 minutes)
tokenizing would exceed. Who makes an entry keeps a lock file beside it that changes every second. A lock whose process
is gone, or that has not changed for `patience` seconds, is taken over.

The lock saves work and nothing depends on it: an entry is made in a folder of its maker's own and renamed when all is
on the disk, so an entry that is there is complete, and of two makers the second finds it done. What was changed since
is found by digests, and made again. If making fails, those who waited fail too, with the same words.
"""

import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conversion.checkpoint.errors import one_line
from sft import SFTError
from sft.data.formats import DataError, UnreadableError

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0
_KEEP_FAILURES_SECONDS = 3600.0
_Opened = TypeVar("_Opened")


class CacheError(DataError):
    """The folder of the cache cannot be used. The message names it and the way out."""


@dataclass(frozen=True)
class Cache:
    """See the module.

    Args:
        folder: of the entries; made if absent. One that all processes see, or one for each machine.
        patience: seconds after which a lock that does not change counts as left behind.
    """

    folder: Path
    patience: float = 60.0

    def get(self, key: str, build: Callable[[Path], None], open_entry: Callable[[Path], _Opened]) -> _Opened:
        """Open an entry; make it if it is not there, or is damaged; wait if another process makes it.

        Args:
            key: names it, and says all that decides its content.
            build: writes it into an empty folder.
            open_entry: opens and checks it; raises DataError if it is damaged, UnreadableError if it cannot be read.

        Raises:
            DataError: making it failed, here or in the process that was waited for.
            CacheError: the folder cannot be written, or its disk is full; an entry is there and cannot be read, which
                then stays as it is.
        """
        entry = self.folder / key
        open_entry = self._or_say_unreadable(open_entry)
        while True:
            if self._is_there(entry):
                try:
                    return open_entry(entry)
                except CacheError:
                    raise
                except DataError:  # it is looked at again, once no other process makes it
                    pass
            with self._writing(), _Lock.acquire(self.folder / f".{key}.lock") as lock:
                if lock is not None:
                    if (found := self._look_again(entry, open_entry)) is not None:
                        return found
                    self._build(entry, lock, build)
                    return open_entry(entry)
            self._wait(entry, key)

    def _or_say_unreadable(self, open_entry: Callable[[Path], _Opened]) -> Callable[[Path], _Opened]:
        """No rights to an entry, and a device that fails, do not make it damaged: another user's is not moved."""

        def opened(entry: Path) -> _Opened:
            try:
                return open_entry(entry)
            except UnreadableError as error:
                raise CacheError(
                    f"dataset_cache_dir {self.folder}: an entry of it cannot be read. {error} Ask its owner to make it "
                    f"readable (chmod -R a+rX {entry}), or give another folder with dataset_cache_dir."
                ) from error

        return opened

    def _is_there(self, entry: Path) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # the folder may not be looked into; so it cannot be written, which says so
            return False

    def _look_again(self, entry: Path, open_entry: Callable[[Path], _Opened]) -> _Opened | None:
        """What another process has made until now; what is damaged is moved out of the way."""
        if not entry.is_dir():
            return None
        try:
            return open_entry(entry)
        except CacheError:
            raise
        except DataError as error:
            logger.warning("%s It is made again.", error)
            aside = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.damaged")
            entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            return None

    def _build(self, entry: Path, lock: "_Lock", build: Callable[[Path], None]) -> None:
        self._clear(entry.name, lock.path)
        partial = entry.with_name(f".{entry.name}.{lock.owner}.partial")
        partial.mkdir()
        try:
            build(partial)
            _sync(partial)
            if not entry.exists():
                with suppress(OSError):  # another process was as quick; its entry is the same
                    partial.rename(entry)
            if not entry.is_dir():
                raise CacheError(f"{entry} cannot be made; give another folder with dataset_cache_dir.")
        except Exception as error:
            if entry.is_dir():  # of a process that took this one, paused, for dead
                return
            lock.tell_failure(
                str(error) if isinstance(error, SFTError) else f"{type(error).__name__}: {one_line(error)}"
            )
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _clear(self, name: str, lock: Path) -> None:
        """Remove what processes that are gone have left of this entry; who makes it has the lock, so no other does."""
        for path in self.folder.glob(f".{name}.*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f".{name}.*.failed"):
            with suppress(OSError):  # by the clock of the disk, which both files have
                if lock.stat().st_mtime - path.stat().st_mtime > _KEEP_FAILURES_SECONDS:
                    path.unlink()

    def _wait(self, entry: Path, key: str) -> None:
        """Wait until the process that has the lock has ended, in whatever way."""
        path = self.folder / f".{key}.lock"
        seen, changed, started, told = b"", time.monotonic(), time.monotonic(), False
        owner: dict[str, Any] = {}
        while (content := _read(path)) is not None:
            now = time.monotonic()
            found = _owner(content)
            if owner and found and found.get("owner") != owner["owner"]:
                break  # that one has ended, and another was quicker than we
            if content != seen:
                seen, changed, owner = content, now, found or owner
            if not told and now - started > _TELL_SECONDS:
                logger.warning(
                    "%s: waiting for process %s on %s, which makes it", entry, found.get("pid"), found.get("host")
                )
                told = True
            if _is_gone(owner) or now - changed > self.patience:
                logger.warning("%s: process %s on %s gives no sign of life", entry, owner.get("pid"), owner.get("host"))
                with suppress(OSError):
                    path.unlink()
                return
            time.sleep(_POLL_SECONDS)
        if owner:
            failure = _read(self.folder / f".{key}.{owner['owner']}.failed")
            if failure is not None:
                raise DataError(failure.decode("utf-8", "replace"))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong with the disk, in one line."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise CacheError(
                f"dataset_cache_dir {self.folder} cannot be written ({error.strerror or error}); give another folder "
                "with dataset_cache_dir (the default is in HF_DATASETS_CACHE), or a folder that `teleflm sft prepare` "
                "has made."
            ) from error


class _Lock:
    """A lock file that this process has, and changes every second."""

    def __init__(self, path: Path) -> None:
        self.path, self.owner = path, uuid.uuid4().hex
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cache-lock", daemon=True)

    @classmethod
    @contextmanager
    def acquire(cls, path: Path) -> Iterator["_Lock | None"]:
        """The lock, or None if another process has it."""
        lock = cls(path)
        try:
            with path.open("xb") as file:
                file.write(lock._content())
        except FileExistsError:
            yield None
            return
        lock._thread.start()
        try:
            yield lock
        finally:
            lock._stop.set()
            lock._thread.join()
            if lock._is_mine():
                with suppress(OSError):
                    path.unlink()

    def tell_failure(self, reason: str) -> None:
        """Leave the reason for those who wait for this process."""
        with suppress(OSError):
            name = self.path.name.removesuffix(".lock")
            self.path.with_name(f"{name}.{self.owner}.failed").write_text(reason, encoding="utf-8")

    def _is_mine(self) -> bool:
        return _owner(_read(self.path) or b"").get("owner") == self.owner

    def _content(self) -> bytes:
        self._beats += 1
        who = {"owner": self.owner, "host": socket.gethostname(), "pid": os.getpid(), "system": _system()}
        return json.dumps({**who, "beat": self._beats}).encode()

    def _watch(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            if not self._is_mine():
                return
            with suppress(OSError):
                partial = self.path.with_name(f"{self.path.name}.{self.owner}")
                partial.write_bytes(self._content())
                partial.replace(self.path)


def _system() -> str:
    """Tells the machine, its start and the name space of its process numbers; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process is known to be gone: only of those of this machine one can know."""
    if not owner or not owner.get("system") or owner["system"] != _system() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _is_zombie(owner["pid"])


def _is_zombie(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _owner(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:  # not written yet, or cut short by a full disk
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("owner"), str) else {}


def _sync(folder: Path) -> None:
    """Bring all files of a folder to the disk, so that a name that is there after a power cut has its content."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def default_folder() -> Path:
    """Where the `datasets` library keeps its own: HF_DATASETS_CACHE, HF_HOME and XDG_CACHE_HOME move it."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "teleflm"


__all__ = ["Cache", "CacheError", "default_folder"]
