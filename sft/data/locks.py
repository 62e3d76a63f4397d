# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A file that says which process works on something, and that it lives: it changes every second.

A lock whose process is gone, or that has not changed for a while by the clock of who looks, is taken over. A process
that was paused may come back, and then two have worked: so nothing may depend on there being one. Who makes something
makes it in a folder of its own, and asks whether the lock is still its own before it puts that in place.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sft.data.formats import DataError

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0
OWNER_NAME = r"[0-9a-f]{8}-[0-9]+-[0-9a-f]{32}"


class Held(DataError):
    """A lock is another process's, which lives.

    Args:
        owner: what the lock says of it; see [`owner_of`].
    """

    def __init__(self, path: Path, owner: dict[str, Any]) -> None:
        super().__init__(f"{path} is of process {owner.get('pid')} on {owner.get('host')}.")
        self.owner = owner


class Lock:
    """A lock file that this process has, and changes every second.

    Args:
        path: of the file.
        about: what the lock is for, for those who find it.
    """

    def __init__(self, path: Path, about: str = "") -> None:
        self.path, self.about = path, about
        self.owner = _name_owner()
        self.touched: Path | None = None  # a folder that is marked with every beat, so that it shows who makes it live
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock", daemon=True)

    @classmethod
    @contextmanager
    def acquire(cls, path: Path, about: str = "") -> Iterator["Lock | None"]:
        """The lock, or None if another process has it."""
        lock = cls(path, about)
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
            if lock.is_mine():
                with suppress(OSError):
                    path.unlink()

    def is_mine(self) -> bool:
        """Whether nobody has taken it over."""
        return owner_of(read_lock(self.path) or b"").get("owner") == self.owner

    def _content(self) -> bytes:
        self._beats += 1
        who = {"owner": self.owner, "host": socket.gethostname(), "pid": os.getpid(), "system": _system()}
        return json.dumps({**who, "about": self.about, "beat": self._beats}).encode()

    def _watch(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            with suppress(OSError):
                if touched := self.touched:
                    os.utime(touched)
            if not self.is_mine():  # perhaps just not now: whoever takes it puts it back if it was not left behind
                continue
            with suppress(OSError):
                partial = self.path.with_name(f"{self.path.name}.{self.owner}")
                partial.write_bytes(self._content())
                partial.replace(self.path)


@contextmanager
def hold(path: Path, about: str, patience: float) -> Iterator[Lock]:
    """The lock, taken over if whoever has it is gone or silent; its folder must be there.

    Args:
        path, about: see [`Lock`].
        patience: seconds after which a lock that does not change counts as left behind.

    Raises:
        Held: another process has it, and was seen to change it.
    """
    while True:
        with Lock.acquire(path, about) as lock:
            if lock is not None:
                yield lock
                return
        _outlast(path, patience)


def _outlast(path: Path, patience: float) -> None:
    """Wait until a lock is free, or may be taken over and is; refuse one that changes."""
    first = content = read_lock(path)
    started, told = time.monotonic(), False
    while content is not None:
        owner, waited = owner_of(content), time.monotonic() - started
        if is_gone(owner) or waited > patience:
            take_over(path, content)
            return
        if content != first and owner:
            raise Held(path, owner)
        if not told and waited > _TELL_SECONDS:
            logger.warning(
                "%s: process %s on %s gives no sign of life; it is waited for until %.0f s have passed",
                path,
                owner.get("pid"),
                owner.get("host"),
                patience,
            )
            told = True
        time.sleep(_POLL_SECONDS)
        content = read_lock(path)


def take_over(path: Path, seen: bytes) -> None:
    """Remove a lock that was left behind, and no other: by now it may be of a process that was quicker.

    Of several processes that rename one file, one gets it; what it got it looks at, and puts back what is another's.

    Args:
        path: of the lock.
        seen: what it held when it was found to be left behind.
    """
    aside = path.with_name(f"{path.name}.{_name_owner()}")
    if read_lock(path) != seen:
        return
    with suppress(OSError):
        path.rename(aside)
        if read_lock(aside) != seen:
            with suppress(OSError):
                os.link(aside, path)  # which never replaces a third one's
        aside.unlink()


def read_lock(path: Path) -> bytes | None:
    """What a lock says, None if there is none."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def owner_of(content: bytes) -> dict[str, Any]:
    """Who keeps a lock: at least `owner`, and perhaps `host`, `pid`, `system`, `about`; nothing if it does not say."""
    try:
        found = json.loads(content)
    except ValueError:  # not written yet, or cut short by a full disk
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("owner"), str) else {}


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process is known to be gone: only of those of this machine one can know."""
    if not owner or not owner.get("system") or owner["system"] != _system() or not isinstance(owner.get("pid"), int):
        return False
    return _is_dead(owner["pid"])


def is_known_gone(name: str) -> bool | None:
    """Of an owner, by its name alone, whether its process is gone; None if it is of another machine."""
    tag, _, rest = name.partition("-")
    pid = rest.partition("-")[0]
    system = _system()
    return _is_dead(int(pid)) if system and tag == _tag(system) and pid.isdecimal() else None


def _is_dead(pid: int) -> bool:
    if os.name == "nt":  # where this would not ask the process, but end it
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    with suppress(OSError, IndexError):  # ended, and nobody has asked how
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _system() -> str:
    """Tells the machine, its start and the name space of its process numbers; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _name_owner() -> str:
    """What is left behind under this name tells of itself whether its process is gone."""
    return f"{_tag(_system())}-{os.getpid()}-{uuid.uuid4().hex}"


def _tag(system: str) -> str:
    return f"{zlib.crc32(system.encode()):08x}"


__all__ = ["OWNER_NAME", "Held", "Lock", "hold", "is_gone", "is_known_gone", "owner_of", "read_lock", "take_over"]
