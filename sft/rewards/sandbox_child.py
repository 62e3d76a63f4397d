# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What runs in the process of [`sft.rewards.sandbox`], before and around the code. The standard library alone.

Read a job from the input, cut this process off, set limits, run code and tests, report.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_NEW_MOUNTS, _NEW_IPC, _NEW_USERS, _NEW_PROCESSES, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PRIVATE, _NO_SET_ID, _NO_DEVICES, _NO_PROGRAMS, _READ_ONLY, _RECURSIVE = 0x40000, 2, 4, 8, 1, 0x4000
_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_READ_ONLY = 442, 0x8000, 1
_NOBODY = 65534
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _DROP_CAPABILITY, _SET_SECCOMP, _SECCOMP_FILTER = 1, 38, 24, 22, 2


def main() -> None:
    """Do the job that stands in the input."""
    job = json.loads(sys.stdin.buffer.read())
    limits = job["limits"]
    # The report goes where only what knows the token is believed; the code's own output goes nowhere.
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        _leave_root(job["folder"])
        if limits["namespaces"]:
            _cut_off(job["folder"], limits["file_mb"])
        _watch(limits["seconds"])
        _limit(limits)
    except Exception as error:
        _say(report, {"token": job["token"], "failed": f"{type(error).__name__}: {error}"})
        os._exit(0)
    _say(report, {"token": job["token"], "passed": _run(job["code"], job["tests"])})
    os._exit(0)  # whatever the code left to be done at the end is not done


def _say(report: int, what: dict[str, Any]) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def _run(code: str, tests: list[str]) -> int | None:
    """How many tests raise nothing; None if the code itself raises."""
    module = {"__name__": "__main__", "__builtins__": __builtins__}
    passed = 0
    try:
        exec(compile(code, "code", "exec"), module)
        for test in tests:
            with contextlib.suppress(BaseException):
                exec(compile(test, "test", "exec"), module)
                passed += 1
    except BaseException:
        return None
    return passed


def _leave_root(folder: str) -> None:
    """Become nobody if this is root, whom limits on processes do not bind, and if nobody can read the library."""
    if os.geteuid() != 0:
        return
    path = os.path.realpath(os.__file__)
    above = [path]
    while above[-1] != "/":
        above.append(os.path.dirname(above[-1]))
    if all(os.stat(place).st_mode & 0o5 >= (0o4 if place == path else 0o1) for place in above):
        os.chown(folder, _NOBODY, _NOBODY)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _watch(seconds: float) -> None:
    """Go on as a child of a process that waits so long for it, and ends it otherwise."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        return
    signal.sigtimedwait([signal.SIGCHLD], seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os._exit(0)  # where this is the first process of its namespace, the kernel ends all others


# --- namespaces -------------------------------------------------------------------------------------------------------


def _cut_off(folder: str, file_mb: int) -> None:
    """Go on as a process without network, sockets, capabilities, other processes, or files to write outside a folder.

    The process that called waits for that one.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    user, group = os.geteuid(), os.getegid()
    call("unshare", _NEW_USERS | _NEW_MOUNTS | _NEW_NETWORK | _NEW_PROCESSES | _NEW_IPC)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"65534 {user} 1")
    _write("/proc/self/gid_map", f"65534 {group} 1")
    child = os.fork()  # the first process of the new ones
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    call("prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    call("mount", None, b"/", None, _PRIVATE | _RECURSIVE, None)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY, 0, 0, 0)
    call("syscall", _SYS_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    call("mount", b"none", folder.encode(), b"tmpfs", _NO_SET_ID | _NO_DEVICES, f"size={file_mb}m,mode=700".encode())
    os.chdir(folder)
    if os.path.isdir("/proc"):
        call("mount", b"none", b"/proc", b"tmpfs", _NO_SET_ID | _NO_DEVICES | _NO_PROGRAMS | _READ_ONLY, b"size=4k")
    # Without capabilities none of this can be undone; in namespaces that it makes anew, mounts stay as they are.
    for capability in range(64):
        libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    code = _no_sockets(os.uname().machine)
    program = _Program(len(code) // 8, code)
    call("prctl", _SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0)


class _Program(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _no_sockets(machine: str) -> bytes:
    """A filter of system calls without `socket`: one in the file system, such as a daemon's, is on no network.

    Pairs of sockets stay. Rings (io_uring), in which sockets could be opened too, do not; nor do the calls of another
    kind of program, which are numbered otherwise.
    """
    kind, socket_call = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[machine]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    instructions = (
        (load, 0, 0, 4),  # the kind of program
        (equal, 0, 5, kind),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 3, 0, 0x40000000),  # of x32
        (equal, 2, 0, socket_call),
        (equal, 1, 0, 425),  # io_uring_setup
        (end, 0, 0, 0x7FFF0000),  # allowed
        (end, 0, 0, 0x00050001),  # EPERM
    )
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# --- limits -----------------------------------------------------------------------------------------------------------


def _limit(limits: dict[str, Any]) -> None:
    """Set what the kernel keeps of them."""
    megabyte, seconds = 1 << 20, limits["seconds"]
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_AS, limits["memory_mb"] * megabyte),
    ):
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
