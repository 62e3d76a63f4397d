# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What runs in the process of [`sft.rewards.sandbox`], before and around the code. The standard library alone.

Read a job from the input, cut this process off, set limits, run code and tests, report. With namespaces these are four
processes: the first, which is told by the end of its input that time is up; the guard, which ends all others; the first
of their namespace, outside of which the guard is; and the one that runs the code.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

_NEW_MOUNTS, _NEW_NAMES, _NEW_IPC, _NEW_USERS, _NEW_PROCESSES = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000
_NEW_NETWORK = 0x40000000
# All of them, that of groups of processes included.
_NEW_ANY = _NEW_MOUNTS | _NEW_NAMES | _NEW_IPC | _NEW_USERS | _NEW_PROCESSES | _NEW_NETWORK | 0x02000000
_PRIVATE, _BIND, _RECURSIVE, _READ_ONLY, _NO_SET_ID, _NO_DEVICES = 0x40000, 0x1000, 0x4000, 1, 2, 4
_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _DETACH = 442, 0x8000, 2
_NOBODY = 65534
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _DROP_CAPABILITY, _SET_SECCOMP, _SECCOMP_FILTER = 1, 38, 24, 22, 2
_NO_HUGE_PAGES, _NOTIFY, _UNIX, _NOT_STREAM = 41, 1026, 1, 0xE

# Where the code works, in its own tree of files, and how many files it may make there.
_WORK, _FILES = "/sandbox", 4096
_HOST = b"sandbox"
# What the standard library is made of, beside itself: shared libraries, and the rules of time zones.
_LIBRARIES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/nix/store"),
    *("/etc/ld.so.cache", "/usr/share/zoneinfo"),
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_PACKAGES = ("site-packages", "dist-packages")


def main() -> None:
    """Do the job that stands in the first line of the input."""
    job = json.loads(sys.stdin.buffer.readline())
    limits = job["limits"]
    # The input ends when time is up, or when what waits for the report is gone. The report goes where only what knows
    # the token is believed; the code's own output goes nowhere.
    control, report = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    try:
        if limits["namespaces"]:
            _cut_off(job["folder"], limits, control)
        else:
            _leave_root(job["folder"])
            child = os.fork()
            if child:
                _guard(child, control, limits["seconds"])
        os.close(control)
        _limit(limits)
        if limits["namespaces"]:
            _filter_calls()
    except Exception as error:
        _say(report, {"token": job["token"], "failed": f"{type(error).__name__}: {error}"})
        os._exit(0)
    _say(report, {"token": job["token"], "begun": True})
    for passed in _run(job["code"], job["tests"]):
        _say(report, {"token": job["token"], "passed": passed})
    _say(report, {"token": job["token"], "passed": passed, "done": True})
    os._exit(0)  # whatever the code left to be done at the end is not done


def _say(report: int, what: dict[str, Any]) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def _run(code: str, tests: list[str]) -> Iterator[int | None]:
    """How many tests have raised nothing: 0 after the code, and again after each test; None if the code itself raises.

    Both run in the module `__main__`, where classes are looked for by name (pickle, type hints, unittest, doctest).
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, [""]
    passed = 0
    try:
        exec(compile(code, "code", "exec", dont_inherit=True), vars(module))
    except BaseException:
        yield None
        return
    yield passed
    for test in tests:
        with contextlib.suppress(BaseException):
            exec(compile(test, "test", "exec", dont_inherit=True), vars(module))
            passed += 1
        yield passed


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


def _guard(child: int, control: int, seconds: float) -> None:
    """Wait for a child, and end it when the input ends, or much too late; then end."""
    handle = os.pidfd_open(child)
    select.select([control, handle], [], [], seconds + 5)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    # Where it is the first of its namespace, it has ended only when all others have.
    os.waitpid(child, 0)
    os._exit(0)


# --- namespaces -------------------------------------------------------------------------------------------------------


def _call(name: str, *arguments: Any) -> None:
    """Call the C library."""
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


_LIBC = ctypes.CDLL(None, use_errno=True)


def _cut_off(folder: str, limits: dict[str, Any], control: int) -> None:
    """Go on as a process without network, capabilities, other processes, or files but those of the library and its own.

    It is nobody if this is root, else the user. The processes that called wait for it.
    """
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        raise OSError(f"no filter of system calls is known for {os.uname().machine}")
    made, mapped = os.pipe(), os.pipe()
    root = os.geteuid() == 0
    if root:
        os.setgroups([])
    guard = os.fork()
    if guard:
        os.close(made[1])
        if os.read(made[0], 1):
            _map_users(guard, root)
            os.write(mapped[1], b"1")
        os.waitpid(guard, 0)
        os._exit(0)
    os.close(mapped[1])
    _call("prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    _call("unshare", _NEW_USERS | _NEW_MOUNTS | _NEW_NETWORK | _NEW_PROCESSES | _NEW_IPC | _NEW_NAMES)
    os.write(made[1], b"1")
    if not os.read(mapped[0], 1):
        os._exit(0)  # the first process has said why
    first = os.fork()  # the first of the new namespace of processes
    if first:
        _guard(first, control, limits["seconds"])
    for end in (*made, mapped[0]):
        os.close(end)
    _make_files(folder, limits["file_mb"], machine["pivot_root"])
    for name in ("sethostname", "setdomainname"):
        _call(name, _HOST, len(_HOST))
    if root:
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    _drop_capabilities()
    os.chdir(_WORK)
    os.environ.update(HOME=_WORK, TMPDIR=_WORK)
    for place in (os.__file__, sys.executable):  # of root's, for example
        with open(place, "rb"):
            pass
    code = os.fork()
    if code:
        while os.wait()[0] != code:
            pass
        os._exit(0)  # the kernel ends all others
    os.setsid()  # signals to its group are not for the guard, which is in the old one


def _map_users(process: int, root: bool) -> None:
    """Say who is who in the namespace of users of a process; it has its own count of processes for each."""
    if root:
        users = groups = f"0 0 1\n{_NOBODY} {_NOBODY} 1\n"
    else:
        users, groups = f"{_NOBODY} {os.geteuid()} 1\n", f"{_NOBODY} {os.getegid()} 1\n"
    for name, text in (("setgroups", "deny"), ("uid_map", users), ("gid_map", groups)):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def _make_files(root: str, file_mb: int, pivot_root: int) -> None:
    """Replace the tree of files by one of the library, a few devices, and an empty folder; see `_LIBRARIES`."""
    _call("mount", None, b"/", None, _PRIVATE | _RECURSIVE, None)
    _call("mount", b"none", root.encode(), b"tmpfs", _NO_SET_ID | _NO_DEVICES, b"size=1m,mode=755")
    sys.executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    library = [path for path in sys.path if os.path.exists(path)]
    own = [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, os.path.realpath(sys.base_prefix))]
    for path in dict.fromkeys((*_LIBRARIES, *own, *library, sys.executable)):
        _show(path, root)
    for path in library:
        for name in _PACKAGES:
            if os.path.isdir(hidden := f"{root}{path}/{name}"):
                _call("mount", b"none", hidden.encode(), b"tmpfs", _NO_SET_ID | _NO_DEVICES, b"size=4k,mode=755")
    _set_attributes(root, _NO_SET_ID | _NO_DEVICES | _READ_ONLY)
    # What is mounted on top from here on is open to what the tree is not: to devices, and to writing.
    _call("mount", b"none", root.encode() + b"/dev", b"tmpfs", _NO_SET_ID, b"size=64k,mode=755")
    for name in _DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}")
    _set_attributes(f"{root}/dev", _NO_SET_ID | _READ_ONLY)
    options = f"size={file_mb}m,nr_inodes={_FILES},mode=700,uid={_NOBODY},gid={_NOBODY}"
    _call("mount", b"none", (root + _WORK).encode(), b"tmpfs", _NO_SET_ID | _NO_DEVICES, options.encode())
    os.chdir(root)
    _call("syscall", pivot_root, b".", b".")
    _call("umount2", b".", _DETACH)  # the old tree, on top
    os.chdir("/")


def _show(path: str, root: str) -> None:
    """Let a path of this tree be seen in the new one."""
    for name in ("/dev", _WORK):
        os.makedirs(root + name, exist_ok=True)
    if os.path.lexists(root + path) or not os.path.exists(path):
        return  # it is in a folder that is seen, or absent
    if os.path.islink(path):  # such as /lib, where it is usr/lib
        os.symlink(os.path.realpath(path), root + path)
        _show(os.path.realpath(path), root)
        return
    _bind(path, root + path)


def _bind(path: str, at: str) -> None:
    os.makedirs(os.path.dirname(at), exist_ok=True)
    if os.path.isdir(path):
        os.makedirs(at, exist_ok=True)
    else:
        os.close(os.open(at, os.O_CREAT | os.O_WRONLY, 0o644))
    _call("mount", path.encode(), at.encode(), None, _BIND | _RECURSIVE, None)


def _set_attributes(path: str, flags: int) -> None:
    """Set flags of a mount and all under it."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    _call("syscall", _SYS_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size)


def _drop_capabilities() -> None:
    """Without any, and with no way to new ones, nothing of this can be undone."""
    for capability in range(64):
        _LIBC.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


# --- system calls -----------------------------------------------------------------------------------------------------

_X86 = {
    "kind": 0xC000003E, "pivot_root": 155, "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166,
    "chroot": 161, "socket": 41, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "add_key": 248, "request_key": 249, "keyctl": 250, "memfd_create": 319, "shmget": 29, "shmat": 30, "shmctl": 31,
    "semget": 64, "msgget": 68, "mq_open": 240, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "syslog": 103,
    "io_setup": 206, "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300, "modify_ldt": 154,
    "uselib": 134, "personality": 135, "init_module": 175, "finit_module": 313, "kexec_load": 246, "vmsplice": 278,
    "inotify_init": 253, "inotify_init1": 294, "flock": 73, "socketpair": 53, "fcntl": 72, "prctl": 157,
}  # fmt: skip
_ARM = {
    "kind": 0xC00000B7, "pivot_root": 41, "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39,
    "chroot": 51, "socket": 198, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
    "add_key": 217, "request_key": 218, "keyctl": 219, "memfd_create": 279, "shmget": 194, "shmat": 196, "shmctl": 195,
    "semget": 190, "msgget": 186, "mq_open": 180, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "syslog": 116,
    "io_setup": 0, "name_to_handle_at": 264, "open_by_handle_at": 265, "fanotify_init": 262, "personality": 92,
    "init_module": 105, "finit_module": 273, "kexec_load": 104, "vmsplice": 75, "inotify_init1": 26, "flock": 32,
    "socketpair": 199, "fcntl": 25, "prctl": 167,
}  # fmt: skip
_MACHINES = {"x86_64": _X86, "aarch64": _ARM}
# From here on calls have one number everywhere. Those that may be made: close_range, without which glibc needs /proc,
# openat2, faccessat2, epoll_pwait2. The C library does without the others: rings (io_uring), in which sockets could be
# opened, new ways to mount, to make processes and memory, and handles of processes.
_NEW_CALLS, _NEW_ALLOWED = 424, (436, 437, 439, 441)


def _filter_calls() -> None:
    """Refuse system calls by which code could reach what is not its own, or hold memory that no limit counts."""
    # A byte that a pipe holds would keep 2 MB of a huge page, which is of no process once it is unmapped.
    _call("prctl", _NO_HUGE_PAGES, 1, 0, 0, 0)
    code = _program(_MACHINES[os.uname().machine])
    program = _Program(len(code) // 8, code)
    _call("prctl", _SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0)


class _Program(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _program(machine: dict[str, int]) -> bytes:
    """A filter for the calls of a processor: those named, and those that `_REFUSED` has, fail with EPERM.

    Most new ones fail as absent. Calls of another kind of program on it (x32, 32-bit), which are numbered otherwise,
    are refused as well.
    """
    number, kind, first_argument = 0, 4, 16
    steps: list[_Step] = [(_LOAD, 0, 0, kind), (_EQUAL, 0, "refuse", machine["kind"]), (_LOAD, 0, 0, number)]
    steps += [(_EQUAL, "allow", 0, call) for call in _NEW_ALLOWED]
    steps += [(_AT_LEAST, "absent", 0, _NEW_CALLS)]
    steps += [(_EQUAL, "refuse", 0, call) for name, call in machine.items() if name not in ("kind", *_REFUSED)]
    for name, arguments in _REFUSED.items():
        steps += [(_EQUAL, 0, 2 * len(arguments) + 1, machine[name])]
        for argument, test, value, refused_if in arguments:
            yes, no = ("refuse", 0) if refused_if else (0, "refuse")
            steps += [(_LOAD, 0, 0, first_argument + 8 * argument), (test, yes, no, value)]
        steps += [(_EQUAL, "allow", "allow", 0)]
    ends = {"allow": 0x7FFF0000, "refuse": 0x00050001, "absent": 0x00050026}  # EPERM, ENOSYS
    place = {name: len(steps) + index for index, name in enumerate(ends)}
    program = [
        (code, *(to if isinstance(to, int) else place[to] - at - 1 for to in (yes, no)), value)
        for at, (code, yes, no, value) in enumerate(steps)
    ]
    program += [(_END, 0, 0, value) for value in ends.values()]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _END = 0x20, 0x15, 0x35, 0x45, 0x06
# An instruction: what, where to go on if so and if not (so many further, or by name), and the value.
_Step = tuple[int, int | str, int | str, int]
# Of a call, by argument: a test, its value, and whether the call is refused if it holds or if it does not.
_REFUSED: dict[str, tuple[tuple[int, int, int, bool], ...]] = {
    "clone": ((0, _ANY_BIT, _NEW_ANY, True),),
    # An end of a pair of datagrams could send to any socket of the file system that it sees.
    "socketpair": ((0, _EQUAL, _UNIX, False), (1, _ANY_BIT, _NOT_STREAM, True)),
    "fcntl": ((1, _EQUAL, _NOTIFY, True),),
    "prctl": ((0, _EQUAL, _NO_HUGE_PAGES, True),),
}


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
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
