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
on the disk, so an entry that is there is complete, and of two makers the second finds it done. Nobody removes what a
maker that may live has half made. What was changed since is found by digests, and made again. If making fails, those
who waited fail too, with the same words.
"""

import logging
import os
import re
import shutil
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
from sft.data.locks import OWNER_NAME, Lock, is_gone, is_known_gone, owner_of, read_lock, take_over

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0
_KEEP_SECONDS = 3600.0
_LEFT = re.compile(rf"\..+\.(?P<owner>{OWNER_NAME})(\.partial|\.failed)?")
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
            with self._writing(), Lock.acquire(self.folder / f".{key}.lock") as lock:
                if lock is not None:
                    if (found := self._look_again(entry, open_entry)) is not None:
                        return found
                    if self._build(entry, lock, build):
                        return open_entry(entry)
                    continue
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

    def _build(self, entry: Path, lock: Lock, build: Callable[[Path], None]) -> bool:
        """Make an entry; whether it is there now. It is not if somebody has removed what was half made of it."""
        self._clear(lock)
        partial = entry.with_name(f".{entry.name}.{lock.owner}.partial")
        partial.mkdir()
        lock.touched = partial
        try:
            build(partial)
            _sync(partial)
            if not entry.exists():
                with suppress(OSError):  # another process was as quick; its entry is the same
                    partial.rename(entry)
            if partial.is_dir() and not entry.is_dir():
                raise CacheError(f"{entry} cannot be made; give another folder with dataset_cache_dir.")
        except Exception as error:
            if entry.is_dir():  # of a process that took this one, paused, for dead
                return True
            if not partial.is_dir():
                logger.warning("%s: what was half made of it is gone (%s). It is made again.", entry, one_line(error))
                return False
            _tell_failure(
                lock, str(error) if isinstance(error, SFTError) else f"{type(error).__name__}: {one_line(error)}"
            )
            raise
        finally:
            lock.touched = None
            shutil.rmtree(partial, ignore_errors=True)
        return entry.is_dir()

    def _clear(self, lock: Lock) -> None:
        """Remove what processes that are gone have left, of whatever entry.

        Of one of another machine that is not known, and a failure is there to be read by others: these go if they have
        not changed for an hour, by the clock of the disk, which both files have.
        """
        for path in self.folder.iterdir():
            if (match := _LEFT.fullmatch(path.name)) is None:
                continue
            with suppress(OSError):
                gone = None if path.suffix == ".failed" else is_known_gone(match["owner"])
                if gone is None:
                    gone = lock.path.stat().st_mtime - path.stat().st_mtime > _KEEP_SECONDS
                if gone and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif gone:
                    path.unlink()

    def _wait(self, entry: Path, key: str) -> None:
        """Wait until the process that has the lock has ended, in whatever way."""
        path = self.folder / f".{key}.lock"
        seen, changed, started, told = b"", time.monotonic(), time.monotonic(), False
        owner: dict[str, Any] = {}
        while (content := read_lock(path)) is not None:
            now = time.monotonic()
            found = owner_of(content)
            if owner and found and found.get("owner") != owner["owner"]:
                break  # that one has ended, and another was quicker than we
            if content != seen:
                seen, changed, owner = content, now, found or owner
            if not told and now - started > _TELL_SECONDS:
                logger.warning(
                    "%s: waiting for process %s on %s, which makes it", entry, found.get("pid"), found.get("host")
                )
                told = True
            if is_gone(owner) or now - changed > self.patience:
                logger.warning("%s: process %s on %s gives no sign of life", entry, owner.get("pid"), owner.get("host"))
                take_over(path, content)
                return
            time.sleep(_POLL_SECONDS)
        if owner:
            failure = read_lock(self.folder / f".{key}.{owner['owner']}.failed")
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


def _tell_failure(lock: Lock, reason: str) -> None:
    """Leave the reason for those who wait for this process."""
    with suppress(OSError):
        name = lock.path.name.removesuffix(".lock")
        lock.path.with_name(f"{name}.{lock.owner}.failed").write_text(reason, encoding="utf-8")


def _sync(folder: Path) -> None:
    """Bring all files of a folder to the disk, so that a name that is there after a power cut has its content."""
    folders = hasattr(os, "O_DIRECTORY")  # Windows opens none
    for path in filter(lambda path: folders or path.is_file(), [*folder.rglob("*"), folder]):
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
