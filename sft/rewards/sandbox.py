# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Run Python code that a model wrote, with limits, in a process of its own.

There is a sandbox on Linux alone. In any case the code and its process group are ended when their time is up, by a
clock in the process that calls, which starts when the code does; each of its processes has so much memory, processor
time and so many open files, and each of its files such a size, at most; it inherits nothing of this environment and
input; and it is not believed for exiting with status 0.

With `namespaces` (where an unprivileged user may make them) it also sees no files but Python's library and shared
libraries, which it cannot write, five devices such as `null`, and an empty folder of its own in memory; it has no
network, no view of other processes, none of its own that outlives it, and so many at most; and system calls are refused
by which it could reach what it does not see, or hold memory that no limit counts. It is nobody if this is root.

Without them it can do what the user can: reach the network, write files, see other processes and their environments,
leave processes of another session behind, which count for what else the user, or nobody, runs, and may fill the disk or
keep a folder from being removed; and root, where nobody cannot read the library, can raise its limits.

What it can do with them all the same: read these libraries, and run programs that lie there; use a fault of the kernel,
which it shares; look in its own process for how tests are run and report what did not happen.
docs/preferences-and-rewards.md has all of it. A container or a virtual machine without secrets is the place to run this
in.
"""

import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("sandbox_child.py")
_REPORT_BYTES = 1 << 16
# To start an interpreter and make namespaces, to end all of it, to remove what it wrote; not of the code's own time.
_STARTING_SECONDS, _ENDING_SECONDS, _REMOVING_SECONDS = 30.0, 2.0, 30.0
LONGEST_SECONDS = 86400
_A_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)  # Windows has neither
# What can be set: days are no limit on a function, and the kernel takes no number of more than 63 bits of bytes.
_MOST = {
    "seconds": LONGEST_SECONDS,
    "memory_mb": 1 << 30,
    "file_mb": 1 << 30,
    "processes": 1 << 22,
    "open_files": 1 << 20,
}


@dataclass(frozen=True)
class Limits:
    """What code may take.

    Args:
        seconds: of wall-clock time, and of processor time.
        memory_mb: address space of each process, in MiB.
        file_mb: size of each file, and with namespaces of all of them together, in MiB.
        processes: of the user at most, threads included; with namespaces, of this sandbox.
        open_files: at once, by each process.
        namespaces: cut it off from network and file system; an error where that cannot be done.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 16
    open_files: int = 64
    namespaces: bool = True

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r:.80}; expected a number above 0, at most {most}.")
            if name != "seconds" and not isinstance(value, int):
                raise ValueError(f"{name} is {value!r:.80}; expected a whole number.")
        if not isinstance(self.namespaces, bool):
            raise ValueError(f"namespaces is {self.namespaces!r}; expected true or false.")


@dataclass(frozen=True)
class Outcome:
    """What became of code and its tests.

    Args:
        passed: tests that passed, until the end of all or of its time; None if the code did not come to its own end.
        ended: `finished`; `died`, of an error or for passing a limit; `flooded`, if it wrote to where the report goes;
            or `timeout`.
    """

    passed: int | None
    ended: str


class SandboxError(RuntimeError):
    """There is no sandbox as it was asked for."""


def run_tests(code: str, tests: list[str], limits: Limits) -> Outcome:
    """Run code, then each test in the same module, and count the tests that raise nothing.

    Args:
        code: Python source. If it raises, no test is run.
        tests: Python source each, such as `assert f(2) == 4`.
        limits: of all of it together.

    Raises:
        SandboxError: the sandbox itself could not be made.
    """
    if not hasattr(os, "pidfd_open"):
        raise SandboxError("code is run in a process of its own on Linux alone, and this is no Linux.")
    token = secrets.token_hex(16)
    with _temporary_folder() as folder:
        job = {"code": code, "tests": tests, "token": token, "folder": folder, "limits": asdict(limits)}
        # Nothing of this environment, no site-packages, the same order of sets each time.
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-X", "utf8", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            # A report after each test.
            most = _REPORT_BYTES + 100 * len(tests)
            said, ended = _listen(process, json.dumps(job).encode() + b"\n", limits.seconds, token, most)
        finally:
            _kill(process)
    return _read_report(said, ended, token, len(tests))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is gone afterwards, whatever code has left in it."""
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder with all that is in it, however deep; what cannot be removed, or comes back, stays.

    One folder is open at a time, and what is in it is named from there, so that nothing recurses and no path is too
    long or leads through a link. Code that goes on, without namespaces, may move what is open: the way up is the way
    down, or the removal ends.
    """
    end = time.monotonic() + _REMOVING_SECONDS
    above: list[tuple[str, tuple[int, int], list[str]]] = []  # name of the next, which this one is, what else is in it
    here = -1
    try:
        here = os.open(folder, _A_FOLDER)
        left = _unlink_files(here)
        while time.monotonic() < end:
            if left:
                name = left.pop()
                if os.geteuid() != 0:  # of the user's own: nothing that the code could not have done itself
                    os.chmod(name, 0o700, dir_fd=here)
                inside = os.open(name, _A_FOLDER, dir_fd=here)
                above.append((name, _identity(here), left))
                here, left = _closing(here, inside), _unlink_files(inside)
            elif above:
                name, identity, left = above.pop()
                here = _closing(here, os.open("..", _A_FOLDER, dir_fd=here))
                if _identity(here) != identity:
                    return
                os.rmdir(name, dir_fd=here)
            else:
                os.rmdir(folder)
                return
    except OSError:
        return
    finally:
        if here != -1:
            os.close(here)


def _unlink_files(folder: int) -> list[str]:
    """Remove what is in an open folder but folders; the names of those."""
    left = []
    for name in os.listdir(folder):
        try:
            os.unlink(name, dir_fd=folder)
        except OSError:
            left.append(name)
    return left


def _identity(folder: int) -> tuple[int, int]:
    found = os.fstat(folder)
    return found.st_dev, found.st_ino


def _closing(old: int, new: int) -> int:
    os.close(old)
    return new


def _listen(process: "subprocess.Popen[bytes]", job: bytes, seconds: float, token: str, most: int) -> tuple[bytes, str]:
    """Hand the job over, and read what comes back until it ends, takes too long or says more than `most` bytes.

    The clock is here, where code in the sandbox cannot reach it; it starts when the code does.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.flush()
    said, deadline, begun = b"", time.monotonic() + _STARTING_SECONDS, False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            # Asked before the look: what was said until the end, or until the time was up, is then seen by the look,
            # however late this process comes to it.
            left, has_ended = deadline - time.monotonic(), process.poll() is not None
            if not selector.select(0 if has_ended else max(0.0, min(left, 0.1))):
                if has_ended:  # something else may hold the pipe open
                    return said, "died"
                if left <= 0:
                    return said, "timeout" if begun else "unstarted"
                continue
            part = os.read(process.stdout.fileno(), _REPORT_BYTES)
            said += part
            if not part:
                return said, "finished"
            if len(said) > most:
                return said, "flooded"
            if not begun and any("begun" in report for report in _reports(said, token)):
                begun, deadline = True, time.monotonic() + seconds


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End everything of the process's session that is still in its group; with namespaces that is all there is."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # which tells the guard to end the others and wait for their end
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDING_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _reports(said: bytes, token: str) -> list[dict[str, Any]]:
    """What was said by what knows the token."""
    reports: list[dict[str, Any]] = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            report = json.loads(line)
            if isinstance(report, dict) and report.get("token") == token:
                reports.append(report)
    return reports


def _read_report(said: bytes, ended: str, token: str, count: int) -> Outcome:
    reports = _reports(said, token) if ended != "flooded" else []
    # Only before the code has begun: it may find the token, and what it says ends no run.
    if reports and "failed" in reports[0]:
        raise SandboxError(str(reports[0]["failed"]))
    if ended == "unstarted":
        raise SandboxError(f"it did not start in {_STARTING_SECONDS:g} seconds")
    passed = reports[-1].get("passed") if reports else None
    if isinstance(passed, bool) or not isinstance(passed, int) or not 0 <= passed <= count:
        passed = None
    is_done = passed is not None and reports[-1].get("done") is True
    return Outcome(passed, "finished" if is_done else "died" if ended == "finished" else ended)


@functools.cache
def check_sandbox(limits: Limits) -> None:
    """Check that there is such a sandbox here, by running something in it.

    Raises:
        SandboxError: there is not.
    """
    try:
        # What little a function needs: some memory beside the interpreter's own.
        outcome = run_tests("value = len(bytearray(8 << 20))", ["assert value == 8 << 20"], limits)
    except OSError as error:
        raise SandboxError(str(error)) from error
    if outcome.passed != 1:
        raise SandboxError(f"a test that must pass did not within its limits ({outcome.ended})")


__all__ = ["LONGEST_SECONDS", "Limits", "Outcome", "SandboxError", "check_sandbox", "run_tests"]
