# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""That one run at a time writes into an output folder.

Two runs in one folder mix their checkpoints, logs and models, and each of them ends as if nothing was wrong. What lies
in the folder does not tell that another run has just begun there: before its first checkpoint it holds nothing. So
process 0 of a run keeps a lock on a file of the folder. The lock is the system's and goes with the process that has it,
so a run that was killed leaves none.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RunError
from .grown_adam import on_every_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "_training.lock"  # of names that begin so, a Trainer with push_to_hub uploads none; it has the name of this host
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # a link under this name would lead somewhere else


@contextmanager
def hold_output(folder: str | Path, *, writes: bool) -> Iterator[None]:
    """Hold an output folder against other runs; every process of a run has to call it.

    Where the file system has no locks, that is said and the run goes on. A folder that was made for this and that
    nothing was put into is removed again.

    Args:
        folder: made if absent.
        writes: whether this is the process that holds it, process 0 of the run.

    Raises:
        RunError: another run holds it, or it cannot be written. On the other processes a CheckpointError says so.
    """
    place = Path(folder)
    made = writes and not place.exists()
    descriptor = on_every_process(lambda: _acquire(place) if writes else -1)
    try:
        yield
    finally:
        if descriptor >= 0:
            with suppress(OSError):  # before it is given up: whoever finds it then has no lock on another file
                (place / LOCK).unlink()
            os.close(descriptor)
        if made:
            with suppress(OSError):  # it holds something
                place.rmdir()


def _acquire(folder: Path) -> int:
    """A descriptor that has the lock, or -1 where there are no locks."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o666)
            try:
                if not _lock(descriptor, folder):
                    path.unlink(missing_ok=True)
                    os.close(descriptor)
                    return -1
                if _is_at(descriptor, path):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # of a run that has ended since, and removed the file
    except OSError as error:
        raise RunError(f"output_dir {folder} cannot be written: {error.strerror or error}; give another.") from error


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether the lock was got; False where there are none.

    Raises:
        RunError: another process has it.
    """
    problem = "this system has no locks"
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise RunError(
                f"output_dir {folder}: {_holder(descriptor)} trains into it, and two runs in one folder would mix; "
                "give another output_dir, or wait until that run has ended."
            ) from None
        except OSError as error:  # some network file systems have none
            problem = error.strerror or str(error)
    logger.warning("%s cannot be locked (%s): nothing keeps a second run from writing into it", folder, problem)
    return False


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(found['pid'])} on {ascii(found['host'])[1:-1]}"
    except (OSError, ValueError, LookupError, TypeError):  # not written yet
        return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


__all__ = ["LOCK", "hold_output"]
