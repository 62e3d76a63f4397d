# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the sandbox says it stops is tried, each way to pass for what it is not as well."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.rewards.sandbox import Limits, SandboxError, check_sandbox, run_tests

QUICK = {"seconds": 1.0}


def can_cut_off():
    try:
        check_sandbox(Limits())
    except SandboxError:
        return False
    return True


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
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "open('a', 'w').write('b')\nimport tempfile; tempfile.mkdtemp()"
    assert run_tests(code, ["import os; assert len(os.listdir()) == 2"], Limits(namespaces=namespaces)).passed == 1
    assert list(tmp_path.iterdir()) == []


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
    for folder in [tmp_path, *tmp_path.parents]:
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)
    ask = "import socket\nwith socket.socket(socket.AF_UNIX) as it: it.connect({!r})"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(2)
        code = ask.format(str(tmp_path / "s"))
        assert run_tests("", [code], Limits(namespaces=False)).passed == 1
        assert run_tests("", [code], Limits()).passed == 0
    for call in (41 if os.uname().machine == "x86_64" else 198, 425):
        denied = f"import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall({call}, 1, 1, 0)\n"
        assert run_tests("", [denied + "assert ctypes.get_errno() == 1"], Limits()).passed == 1
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
def test_processes_are_limited_unless_root_has_to_stay_root():
    code = "import os\nnobody = os.stat('/').st_uid != os.geteuid()"
    fork = "import os, time\nfor _ in range(50):\n    if os.fork() == 0:\n        time.sleep(5); os._exit(0)"
    library = Path(os.__file__).resolve()
    readable = all(place.stat().st_mode & 0o005 for place in [library, *library.parents])
    outcome = run_tests(code, [fork], Limits(processes=8, **QUICK))
    if os.geteuid() != 0 or readable:
        assert outcome.passed == 0
    else:
        pytest.skip("this is root, and nobody could not read Python's library")


@needs_namespaces
def test_a_sandbox_that_cannot_be_made_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    original = Path(sys.modules["sft.rewards.sandbox"].__file__).with_name("sandbox_child.py").read_text()
    broken.write_text(
        original.replace(
            "_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_READ_ONLY = 442",
            "_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_READ_ONLY = 99999",
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
