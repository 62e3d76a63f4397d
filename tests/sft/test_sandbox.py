# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the sandbox says it stops is tried, each way to pass for what it is not as well."""

import contextlib
import errno
import fcntl
import importlib.util
import itertools
import os
import re
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sft.rewards import sandbox, sandbox_child
from sft.rewards.sandbox import Limits, SandboxError, check_sandbox, run_tests

QUICK = {"seconds": 1.0}


def can_cut_off():
    try:
        check_sandbox(Limits())
    except SandboxError:
        return False
    return True


def let_others_in(*places):
    """Root that has become nobody, which it does where nobody can read Python's library, is one of the others."""
    for place in {*places, *(parent for each in places for parent in each.parents)}:
        with contextlib.suppress(PermissionError):
            place.chmod(place.stat().st_mode | (0o055 if place.is_dir() else 0o066))


needs_namespaces = pytest.mark.skipif(not can_cut_off(), reason="no namespaces may be made here")
BOTH = [pytest.param(True, marks=needs_namespaces), False]


@pytest.mark.parametrize("namespaces", BOTH)
def test_tests_are_counted_one_by_one(namespaces):
    code = "def double(x):\n    print('noise', flush=True)\n    return 2 * x if x < 9 else 0"
    tests = ["assert double(2) == 4", "assert double(9) == 18", "raise SystemExit", "assert double('a') == 'aa'"]
    outcome = run_tests(code, tests, Limits(namespaces=namespaces))
    assert (outcome.ended, outcome.passed) == ("finished", 1), "a string is not smaller than a number"
    assert run_tests("import dataclasses, math, re, typing", ["pass"], Limits(namespaces=namespaces)).passed == 1


@pytest.mark.parametrize("namespaces", BOTH)
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 14, 15)]; time.sleep(60)",
        "import os, time\nif os.fork(): time.sleep(60)\nos.setsid(); time.sleep(60)",
    ],
    ids=["loop", "sleep", "signals", "daemon"],
)
def test_time_is_up_when_it_is(code, namespaces):
    begun = time.monotonic()
    assert run_tests(code, ["pass"], Limits(namespaces=namespaces, **QUICK)).passed is None
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("namespaces", BOTH)
@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "1 / 0",
        "def f(:",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'{\"passed\": 1}')\n  except OSError: 0\nos._exit(0)",
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'x' * (1 << 17))\n  except OSError: pass",
        "x = bytearray(1 << 30)",
        "x = 'a' * (1 << 30)",
        "open('large', 'w').write('x' * (1 << 25))",
        "files = [open('a', 'w') for _ in range(200)]",
        "def f(): f()\nf()",
    ],
)
def test_what_does_not_come_to_its_end_passes_nothing(code, namespaces):
    assert run_tests(code, ["pass"], Limits(namespaces=namespaces, **QUICK)).passed is None


MAIN = "__import__('__main__')"
SUITE = """
import unittest
class Judge(unittest.TestCase):
    def test(self): self.assertEqual(f(2), 4)
assert unittest.main(exit=False).result.wasSuccessful()
"""
EXAMPLE = """
def f(x):
    '''
    >>> f(2)
    4
    '''
    return 4
"""


@pytest.mark.parametrize("namespaces", BOTH)
@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("import pickle\nclass C: x = 1\ndef f(): return pickle.loads(pickle.dumps(C())).x", "assert f() == 1"),
        (
            "from __future__ import annotations\nclass A: 0\nclass B: a: A",
            "import typing; typing.get_type_hints(B)['a']",
        ),
        ("def f(x): return 4", f"assert {MAIN}.f(1) == 4 and not hasattr({MAIN}, '_say')"),
        (EXAMPLE, "import doctest; assert doctest.testmod().failed == 0"),
        ("def f(x): return 4", SUITE),
    ],
    ids=["pickle", "hints", "main", "doctest", "unittest"],
)
def test_what_runs_is_the_main_module(code, test, namespaces):
    """Where the library looks for classes, tests and examples: right code passes, and wrong code does not."""
    assert run_tests(code, [test], Limits(namespaces=namespaces)).passed == 1
    wrong = code.replace("return 4", "return 5").replace("x = 1", "x = 2").replace("class A: 0\n", "")
    assert run_tests(wrong, [test], Limits(namespaces=namespaces)).passed == 0


@pytest.mark.parametrize("namespaces", BOTH)
@pytest.mark.parametrize("last", ["while x == 9: pass", "if x == 9: import os; os._exit(0)"], ids=["hangs", "leaves"])
def test_tests_that_passed_before_the_end_have_passed(last, namespaces):
    code = f"def f(x):\n    {last}\n    return x"
    tests = [f"assert f({n}) == {n}" for n in range(10)]
    outcome = run_tests(code, tests, Limits(namespaces=namespaces, **QUICK))
    assert outcome.passed == 9
    assert outcome.ended in ("timeout", "died")


@pytest.mark.parametrize("namespaces", BOTH)
def test_thousands_of_tests_are_no_flood(namespaces):
    assert run_tests("", ["assert True"] * 3000, Limits(namespaces=namespaces)).passed == 3000


@pytest.mark.parametrize("namespaces", BOTH)
def test_the_environment_and_the_packages_are_not_there(namespaces, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    tests = [
        "import os; assert 'HF_TOKEN' not in os.environ and 'PATH' not in os.environ",
        "import os; assert os.listdir() == []",
        "import sys; assert sys.stdin.read() == ''",
        "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError",
        "assert hash('a') == hash('a')",
    ]
    assert run_tests("", tests, Limits(namespaces=namespaces)).passed == len(tests)
    seen = [run_tests("", [f"assert hash('a') % 64 == {n}" for n in range(64)], Limits(namespaces=namespaces))]
    assert seen[0].passed == 1


@pytest.mark.parametrize("namespaces", BOTH)
def test_nothing_is_left_in_the_folder_of_temporary_files(namespaces, tmp_path, monkeypatch):
    let_others_in(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "open('a', 'w').write('b')\nimport tempfile; tempfile.mkdtemp()"
    assert run_tests(code, ["import os; assert len(os.listdir()) == 2"], Limits(namespaces=namespaces)).passed == 1
    assert list(tmp_path.iterdir()) == []


NEST = "import os\nos.symlink('/', 'l')\nfor _ in range(1100):\n    os.mkdir('deep'); os.chdir('deep')"
SHUT = "import os\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0)"


@pytest.mark.parametrize("namespaces", BOTH)
@pytest.mark.parametrize("code", [NEST, SHUT], ids=["deep", "shut"])
def test_what_is_left_in_its_folder_is_removed(code, namespaces, tmp_path, monkeypatch):
    """Deeper than the library's own removal goes, which recurses, and than a path may be long."""
    let_others_in(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        assert run_tests(code, ["pass"], Limits(namespaces=namespaces)).passed == 1
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)  # pytest would fail on it


def test_what_keeps_writing_in_its_folder_ends_no_run(tmp_path, monkeypatch):
    """A process of another session, which only namespaces end."""
    let_others_in(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sft.rewards.sandbox._REMOVING_SECONDS", 0.2)
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    end = time.time() + 1.5\n"
        "    while time.time() < end:\n"
        "        for n in range(50):\n"
        "            try: open(str(n), 'w').close(); os.makedirs(f'd{n}/e')\n"
        "            except OSError: pass\n"
        "    os._exit(0)"
    )
    assert run_tests(code, ["pass"], Limits(namespaces=False)).passed == 1


def test_a_link_in_its_folder_is_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for place in (outside, folder / "a"):
        place.mkdir(parents=True)
    (outside / "kept").write_text("x")
    for name in ("l", "a/l"):
        (folder / name).symlink_to(outside, target_is_directory=True)
    sandbox._remove(str(folder))
    assert not folder.exists()
    assert (outside / "kept").exists()


def test_a_folder_that_is_moved_away_leads_nowhere(tmp_path, monkeypatch):
    """As code that goes on could do it while its folder is removed: `..` is then a place of others."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (folder / "a" / "b").mkdir(parents=True)
    unlink = sandbox._unlink_files

    def unlink_and_move(opened):
        left = unlink(opened)
        if not left and (folder / "a" / "b").exists():
            (folder / "a" / "b").rename(outside / "b")
        return left

    monkeypatch.setattr(sandbox, "_unlink_files", unlink_and_move)
    sandbox._remove(str(folder))
    assert (outside / "b").exists()


@needs_namespaces
def test_without_a_network_and_with_nothing_to_write(tmp_path):
    """A server that listens here cannot be reached; the same code without namespaces reaches it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        write = f"open({str(tmp_path / 'escaped')!r}, 'w')"
        shared = "open('/dev/shm/escaped', 'w')"
        assert run_tests("", [reach, write, shared], Limits()).passed == 0
        assert run_tests("", [reach], Limits(namespaces=False)).passed == 1
    assert list(tmp_path.iterdir()) == []


@needs_namespaces
def test_daemons_cannot_be_asked(tmp_path):
    """A socket in the file system is on no network: of Docker, for example, it would be a way out."""
    ask = "import socket\nwith socket.socket(socket.AF_UNIX) as it: it.connect({!r})"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        let_others_in(tmp_path / "s")
        server.listen(2)
        code = ask.format(str(tmp_path / "s"))
        assert run_tests("", [code], Limits(namespaces=False)).passed == 1
        assert run_tests("", [code], Limits()).passed == 0
    for call, number in ((41 if os.uname().machine == "x86_64" else 198, errno.EPERM), (425, errno.ENOSYS)):
        denied = f"import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall({call}, 1, 1, 0)\n"
        assert run_tests("", [denied + f"assert ctypes.get_errno() == {number}"], Limits()).passed == 1
    assert run_tests("", ["import asyncio; asyncio.run(asyncio.sleep(0))"], Limits()).passed == 1


@needs_namespaces
def test_it_cannot_undo_what_was_done():
    undo = [
        "import ctypes; assert ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0",
        "import ctypes; assert ctypes.CDLL(None).umount2(b'/proc', 2) == 0",
        "import os; os.listdir('/proc')[0]",
        "import os; os.kill(1, 9); os.kill(os.getppid(), 15); assert os.getppid() == 0",
        # New namespaces give new capabilities, but not over mounts that were read-only before.
        "import ctypes, os; libc = ctypes.CDLL(None); assert libc.unshare(0x10000000 | 0x20000) == 0\n"
        "assert libc.mount(None, b'/', None, 32 | 4096, None) == 0; open('/escaped', 'w')",
    ]
    assert run_tests("", undo, Limits()).passed == 0
    assert not Path("/escaped").exists()


@needs_namespaces
def test_no_process_outlives_it():
    name = f"outlives-{os.getpid()}"
    code = (
        "import os, ctypes, time\n"
        f"ctypes.CDLL(None).prctl(15, b'{name[:15]}', 0, 0, 0)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "time.sleep(0.1)"
    )
    assert run_tests(code, ["pass"], Limits()).passed == 1
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert name[:15] not in names


@needs_namespaces
def test_processes_are_limited_for_root_too():
    """Whatever user may read Python's library: the code is nobody's if this is root."""
    fork = "import os, time\nfor _ in range(50):\n    if os.fork() == 0:\n        time.sleep(5); os._exit(0)"
    assert run_tests("", [fork], Limits(processes=8, **QUICK)).passed == 0
    assert run_tests("", ["import os; assert os.getuid() == os.geteuid() == 65534"], Limits()).passed == 1
    assert run_tests("", ["import os; os.setuid(0)"], Limits()).passed == 0


@needs_namespaces
def test_it_sees_the_library_and_nothing_else(tmp_path):
    """Secrets, devices, terminals and named pipes are not there: the same code without namespaces reaches them."""
    secret, pipe = tmp_path / "secret", tmp_path / "pipe"
    secret.write_text("s")
    os.mkfifo(pipe)
    let_others_in(secret, pipe)
    end, terminal = os.openpty()
    held = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        name = os.ttyname(terminal)
        os.chmod(name, 0o666)
        reach = [
            f"assert open({str(secret)!r}).read() == 's'",
            f"open({str(pipe)!r}, 'w').write('x')",
            f"import os; os.write(os.open({name!r}, os.O_WRONLY | os.O_NOCTTY), b'x')",
        ]
        assert run_tests("", reach, Limits(namespaces=False)).passed == 3
        assert run_tests("", reach, Limits()).passed == 0
    finally:
        for number in (end, terminal, held):
            os.close(number)
    seen = [
        "import os; assert sorted(os.listdir('/dev')) == ['full', 'null', 'random', 'urandom', 'zero']",
        "import os, stat; assert not [d for d in os.listdir('/dev') if stat.S_ISBLK(os.stat('/dev/' + d).st_mode)]",
        "import os; assert not {'proc', 'sys', 'home', 'run', 'var'} & set(os.listdir('/'))",
        "import os; assert os.listdir('.') == [] and os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR']",
        # What is open is the three devices that stand for input and output, and the pipe of the report.
        "import os, stat\nkinds = []\nfor n in range(64):\n    try: kinds += [stat.S_IFMT(os.fstat(n).st_mode)]\n"
        "    except OSError: pass\nassert sorted(kinds) == sorted([stat.S_IFCHR] * 3 + [stat.S_IFIFO])",
        "import os; assert os.listdir('/..') == os.listdir('/')",
        "import os\nfor place in ('/', '/dev', os.path.dirname(os.__file__)):\n"
        "    assert os.statvfs(place).f_flag & (os.ST_RDONLY | os.ST_NOSUID) == os.ST_RDONLY | os.ST_NOSUID",
        "import os\nfor at in ('/', '.', os.path.dirname(os.__file__)): assert os.statvfs(at).f_flag & os.ST_NODEV",
        "open('/dev/null', 'w').write('x'); assert len(open('/dev/urandom', 'rb').read(9)) == 9",
    ]
    assert run_tests("", seen, Limits()).passed == len(seen)
    made = [
        "import os; os.mknod('disk', 0o60600, os.makedev(7, 0)); open('disk', 'rb')",
        "open('/new', 'w')",
        "open('/dev/new', 'w')",
        "import os; open(os.path.join(os.path.dirname(os.__file__), 'new.py'), 'w')",
        "import os; os.makedirs('/proc')",
        "import os; os.chmod('/dev/null', 0)",
    ]
    assert run_tests("", made, Limits()).passed == 0


@needs_namespaces
def test_the_standard_library_works_in_it():
    modules = ("ssl", "sqlite3", "ctypes", "lzma", "bz2", "zlib", "hashlib", "decimal", "zoneinfo", "unittest", "re")
    present = [name for name in modules if importlib.util.find_spec(name)]
    uses = [
        *(f"import {name}" for name in present),
        "import tempfile; tempfile.TemporaryFile().write(b'x')",
        "import subprocess as s, sys; assert s.run([sys.executable, '-c', 'raise SystemExit(7)']).returncode == 7",
        "import subprocess as s, sys; assert s.run([sys.executable, '-c', ''], capture_output=True).stdout == b''",
        # As subprocess does it from Python 3.13 on, and glibc without close_range only where there is /proc.
        "import os, sys\nif hasattr(os, 'POSIX_SPAWN_CLOSEFROM'):\n    x = sys.executable\n"
        "    os.waitpid(os.posix_spawn(x, [x, '-c', ''], {}, file_actions=[(os.POSIX_SPAWN_CLOSEFROM, 9)]), 0)",
        "import ctypes; assert ctypes.CDLL(None).syscall(436, 50, 60, 0) == 0",
        "from concurrent.futures import ThreadPoolExecutor as P; assert list(P(2).map(abs, [-1])) == [1]",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import os; r, w = os.pipe(); p = os.fork(); p or os._exit(os.write(w, b'x')); assert os.read(r, 1) == b'x'",
        "import asyncio; asyncio.run(asyncio.sleep(0))",
        "import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'",
        "import sysconfig, os; assert not os.listdir(os.path.join(os.path.dirname(os.__file__), 'site-packages'))"
        if Path(os.__file__).with_name("site-packages").is_dir()
        else "pass",
    ]
    failed = [use for use in uses if run_tests("", [use], Limits(memory_mb=1024)).passed != 1]
    assert failed == []


CALLS = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); libc.shmat.restype = ctypes.c_void_p\n"


@needs_namespaces
@pytest.mark.parametrize(
    "code",
    [
        "assert libc.shmget(0, ctypes.c_size_t(1 << 20), 0o1600) >= 0",
        "os.memfd_create('a')",
        "assert libc.syscall(447, 0) >= 0",
        "assert libc.unshare(0x10000000) == 0",
        "assert libc.unshare(0x20000) == 0",
        "stack = ctypes.create_string_buffer(1 << 16); f = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)\n"
        "assert libc.clone(f, ctypes.byref(stack, 1 << 15), 0x10000000 | 17, None) > 0",
        "assert libc.ptrace(16, os.getppid(), None, None) == 0",
        "child = os.fork()\nif not child:\n    import time; time.sleep(1)\nassert libc.ptrace(16, child, 0, 0) == 0",
        "libc.process_vm_readv.argtypes = [ctypes.c_int] + [ctypes.c_void_p, ctypes.c_ulong] * 2 + [ctypes.c_ulong]\n"
        "assert libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0) == 0",
        "assert libc.syscall({keyctl}, 0, -3, 0) >= 0",
        "assert libc.syscall({add_key}, b'user', b'a', b'b', 1, -3) >= 0",
        "assert libc.syscall({syslog}, 10, None, 0) >= 0",
        "assert libc.syscall({perf_event_open}, None, 0, -1, -1, 0) != -1 or ctypes.get_errno() != 1",
        "for n in range(9999): open(str(n), 'w').close()",
        "assert libc.vmsplice(os.pipe()[1], 0, 0, 0) == 0",
        "assert libc.prctl(42, 0, 0, 0, 0) == 0, 'huge pages'",
        "assert libc.prctl(41, 0, 0, 0, 0) == 0, 'huge pages again'",
        "assert libc.inotify_init1(0) >= 0",
        "import fcntl; fcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_SH)",
        "import fcntl; fcntl.fcntl(os.open('/', 0), fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
        "assert os.uname().nodename != 'sandbox'",
        "assert libc.sethostname(b'other', 5) == 0",
    ],
)
def test_nothing_is_held_or_reached_by_other_calls(code):
    """What each does where it is allowed is what a stock kernel does: some need the right to, which is gone as well."""
    numbers = sandbox_child._MACHINES[os.uname().machine]
    for name, number in numbers.items():
        code = code.replace(f"{{{name}}}", str(number))
    assert run_tests("", [CALLS + code], Limits()).passed == 0
    assert run_tests("", [CALLS], Limits()).passed == 1


def test_numbers_of_calls_are_the_kernels():
    """The headers of the kernel, where they are installed, are the authority."""
    header = next(Path("/usr/include").glob("**/asm/unistd_64.h"), None)
    generic = Path("/usr/include/asm-generic/unistd.h")
    if header is None or not generic.exists():
        pytest.skip("no headers of the kernel")
    for file, machine in ((header, "x86_64"), (generic, "aarch64")):
        text = file.read_text()
        defined = {name: int(number) for name, number in re.findall(r"define __NR(?:3264)?_(\w+)\s+(\d+)\b", text)}
        for name, number in sandbox_child._MACHINES[machine].items():
            if name != "kind":
                assert defined[name] == number, (machine, name)


def filtered(program, kind, number, *arguments):
    """What a filter says of a call, by the rules of classic BPF."""
    data = struct.pack("<IIQ6Q", number, kind, 0, *arguments, *[0] * (6 - len(arguments)))
    at, value = 0, 0
    while True:
        code, yes, no, k = struct.unpack_from("HBBI", program, 8 * at)
        if code == 0x20:
            value = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return k
        else:
            is_so = {0x15: value == k, 0x35: value >= k, 0x45: value & k != 0}[code]
            at += yes if is_so else no
        at += 1


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_names_on_either_processor(name):
    machine = sandbox_child._MACHINES[name]
    program = sandbox_child._program(machine)
    allowed, denied, absent = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    judged = {machine[name] for name in ("clone", "socketpair", "fcntl", "prctl")}
    named = set(machine.values()) - judged - {machine["kind"]}
    for number in set(range(424)) - judged:
        assert filtered(program, machine["kind"], number) == (denied if number in named else allowed), number
    for number in (*range(424, 600), 0x40000000 + 41, 0x40000000 + 436, 0xFFFFFFFF):
        assert filtered(program, machine["kind"], number) == (allowed if number in (436, 437, 439, 441) else absent)
    assert filtered(program, 0x40000003, 1) == denied, "32-bit calls"
    clone = machine["clone"]
    assert filtered(program, machine["kind"], clone, 0x3D0F00) == allowed, "a thread"
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert filtered(program, machine["kind"], clone, flag | 17) == denied
    for family, kind, flags in itertools.product(range(45), range(1, 6), (0, socket.SOCK_CLOEXEC)):
        expected = allowed if (family, kind) == (socket.AF_UNIX, socket.SOCK_STREAM) else denied
        assert filtered(program, machine["kind"], machine["socketpair"], family, kind | flags) == expected
    for command in (*range(40), 1024, 1025, 1026, 1030, 1031):
        expected = denied if command == fcntl.F_NOTIFY else allowed
        assert filtered(program, machine["kind"], machine["fcntl"], 3, command) == expected
    for option in range(80):
        assert filtered(program, machine["kind"], machine["prctl"], option) == (denied if option == 41 else allowed)


@needs_namespaces
@pytest.mark.parametrize(
    "code",
    [
        "import os, time; os.kill(0, 19); time.sleep(60)",
        "import os, time\nfor pid in (1, os.getppid()):\n    os.kill(pid, 19); os.kill(pid, 9)\ntime.sleep(60)",
        "import os, time\nif os.fork(): os.kill(0, 9)\ntime.sleep(60)",
        "import os, resource, time; resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)); time.sleep(60)",
    ],
    ids=["stop-group", "stop-first", "kill-group", "limit-first"],
)
def test_the_clock_is_out_of_reach(code):
    begun = time.monotonic()
    assert run_tests(code, ["pass"], Limits(**QUICK)).passed is None
    assert time.monotonic() - begun < 2.5


@pytest.mark.parametrize("namespaces", BOTH)
def test_code_cannot_say_that_the_sandbox_failed(namespaces):
    """Which would end the run, in words of its own; it may say only that its tests passed, as is documented."""
    code = (
        "import sys, os, json\n"
        "frame = sys._getframe()\n"
        "while 'job' not in frame.f_locals: frame = frame.f_back\n"
        "said = {'token': frame.f_locals['job']['token'], 'failed': 'disk full', 'begun': True, 'passed': True}\n"
        "os.write(frame.f_locals['report'], json.dumps(said).encode() + b'\\n')\n"
        "os._exit(0)"
    )
    assert run_tests(code, ["pass"], Limits(namespaces=namespaces)).passed is None
    assert run_tests(code.replace("True}", "1}"), ["pass"], Limits(namespaces=namespaces)).passed == 1


@pytest.mark.parametrize("namespaces", BOTH)
def test_the_clock_starts_with_the_code(namespaces, monkeypatch):
    """A machine that starts processes slowly costs the code nothing."""
    original = Path(sandbox_child.__file__).read_text()
    with tempfile.TemporaryDirectory() as folder:
        slow = Path(folder) / "child.py"
        slow.write_text(original.replace("    job = json", "    import time; time.sleep(1)\n    job = json", 1))
        monkeypatch.setattr("sft.rewards.sandbox._CHILD", slow)
        assert run_tests("", ["pass"], Limits(seconds=0.5, namespaces=namespaces)).passed == 1


@pytest.mark.parametrize("namespaces", BOTH)
@pytest.mark.parametrize("seconds", [5.0, 0.4], ids=["ends", "time-is-up"])
def test_what_is_said_while_nobody_looks_is_heard(seconds, namespaces, monkeypatch):
    """A scheduler may stop the process that listens between its look at the pipe and its next question."""
    look = selectors.DefaultSelector.select

    def looks_and_sleeps(self, timeout=None):
        found = look(self, timeout)
        if not found:
            time.sleep(0.5)
        return found

    monkeypatch.setattr(selectors.DefaultSelector, "select", looks_and_sleeps)
    code = "import time; time.sleep(0.2)"
    assert run_tests(code, ["pass"], Limits(seconds=seconds, namespaces=namespaces)).passed == 1


@needs_namespaces
def test_a_sandbox_that_cannot_be_made_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    original = Path(sys.modules["sft.rewards.sandbox"].__file__).with_name("sandbox_child.py").read_text()
    broken.write_text(
        original.replace(
            "_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _DETACH = 442", "_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _DETACH = 999"
        )
    )
    monkeypatch.setattr("sft.rewards.sandbox._CHILD", broken)
    with pytest.raises(SandboxError):
        run_tests("", ["pass"], Limits())
    check_sandbox.cache_clear()
    with pytest.raises(SandboxError, match="OSError"):
        check_sandbox(Limits())
    check_sandbox.cache_clear()


@pytest.mark.parametrize(
    "keys", [{"seconds": 0}, {"seconds": "1"}, {"memory_mb": 1.5}, {"processes": True}, {"namespaces": 1}]
)
def test_limits_are_numbers(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        Limits(**keys)


def test_the_child_needs_the_standard_library_alone():
    child = Path(sys.modules["sft.rewards.sandbox"].__file__).with_name("sandbox_child.py")
    subprocess.run([sys.executable, "-S", "-c", f"import runpy; runpy.run_path({str(child)!r})"], check=True)
