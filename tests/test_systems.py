# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Other systems than Linux, as far as taking away what they lack shows: the same bytes, or a line that says why not."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from tests.fixtures.lacking import ROOT, Said, run_lacking
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

# fmt: off
LINUX = [
    "posix_fallocate", "copy_file_range", "posix_fadvise", "sched_getaffinity", "preadv", "preadv2", "pwritev",
    "pwritev2", "pidfd_open", "memfd_create", "splice", "eventfd", "setresuid", "setresgid", "getrandom",
]
# fmt: on
# fmt: off
POSIX = [
    "pread", "pwrite", "sysconf", "getuid", "geteuid", "getgid", "fork", "killpg", "setsid", "uname",
    "mkfifo", "getppid", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "posix_spawn", "fchmod", "chown",
]
# fmt: on
# Modules that Windows does not have, and what may import one at its top: nothing that a command imports.
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
STAND_ALONE = {"sft/rewards/sandbox_child.py"}  # a program of its own that Linux alone runs
PACKAGES = ("teleflm", "sft", "growth", "evaluation", "conversion", "modeling_teleflm")
COMMANDS = [
    ["convert", "model", "converted", "--dtype", "bfloat16", "--workers", "3"],
    ["convert", "model", "copied"],
    ["grow", "model", "grown", "--set", "hidden_size=64", "--set", "num_attention_heads=8"],
    ["export", "grown", "gguf", "--to", "gguf"],
    ["export", "grown", "linked", "--to", "granite", "--link"],
    ["verify", "model", "grown", "--text", "text.txt", "--forward", "streamed"],
    ["inspect", "converted", "--check"],
    ["eval", "model", "--text", "text.txt"],
    ["sft", "validate", "chat.jsonl"],
    ["doctor"],
    ["convert", "model", "converted", "--dtype", "bfloat16"],
]


def write_inputs(folder: Path) -> Path:
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer(folder / "model").save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The value of a subscription is the item that the key selects.\n" * 20)
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that the commands wrote but records, which say when and what the program ran on."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "teleflm_manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("systems"))


@pytest.fixture(scope="module")
def on_linux(inputs, tmp_path_factory) -> dict[str, bytes]:
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("linux") / "here")
    said = run_lacking(folder, COMMANDS)
    assert [one.status for one in said[:8]] == [0] * 8, said
    return contents(folder)


@pytest.mark.slow
def test_the_same_bytes_without_what_only_linux_has(inputs, on_linux, tmp_path):
    """macOS: no /proc, no cgroups, none of Linux's calls."""
    folder = shutil.copytree(inputs, tmp_path / "here")
    said = run_lacking(folder, COMMANDS, attributes={"os": LINUX}, paths=["/proc", "/sys"])
    assert all("Traceback" not in one.stderr for one in said), said
    assert [one.status for one in said[:8]] == [0] * 8, said
    assert said[COMMANDS.index(["doctor"])].status == 0
    assert "already done" in said[-1].stdout + said[-1].stderr
    assert contents(folder) == on_linux


@pytest.fixture(scope="module")
def on_windows(inputs, tmp_path_factory) -> dict[str, Said]:
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("windows") / "here")
    lines = [["--help"], ["--version"], ["sft", "--help"], ["sft", "recipes"], *COMMANDS]
    attributes = {"os": LINUX + POSIX, "signal": ["SIGKILL", "SIGALRM", "setitimer", "pthread_sigmask"]}
    said = run_lacking(folder, lines, packages=POSIX_MODULES, attributes=attributes, paths=["/proc", "/sys"])
    assert not (folder / "converted").exists()
    return dict(zip(map(" ".join, lines), said, strict=True))


def test_what_works_on_windows(on_windows):
    for line in ("--help", "--version", "sft --help", "sft recipes"):
        assert on_windows[line].status == 0, on_windows[line]
    assert "Traceback" not in on_windows["sft validate chat.jsonl"].stderr


@pytest.mark.parametrize("line", [" ".join(command) for command in COMMANDS if command[0] not in ("sft", "doctor")])
def test_what_does_not_says_so(line, on_windows):
    said = on_windows[line]
    assert said.status == 2
    if line.split()[1] == "model":
        (told,) = said.stderr.splitlines()
        assert told.endswith("no os.pread, by which checkpoints are read; use Linux, macOS or WSL.")


def test_doctor_says_it_too(on_windows):
    assert on_windows["doctor"].status == 1
    assert "has no os.pread" in " ".join(on_windows["doctor"].stdout.split())


def assumed(tree: ast.Module, gone: set[str]) -> list[str]:
    """What a module takes from `os` as it is imported, or imports without asking whether it is there."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name in POSIX_MODULES]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Try):
            found += [
                f"os.{part.attr}"
                for part in ast.walk(node)
                if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "os" and part.attr in gone
            ]
    return found


def test_no_module_needs_a_system_to_be_imported():
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name not in STAND_ALONE:
            assert not assumed(ast.parse(path.read_text()), {*LINUX, *POSIX}), name


@pytest.mark.parametrize("planted", ["import resource", "from fcntl import flock", "_F = os.O_DIRECTORY | 1"])
def test_a_planted_one_is_found(planted):
    assert assumed(ast.parse(planted), {*LINUX, *POSIX})


def test_code_of_a_model_is_run_on_linux_alone(monkeypatch):
    from sft.rewards.sandbox import Limits, SandboxError, run_tests

    monkeypatch.delattr("os.pidfd_open", raising=False)
    with pytest.raises(SandboxError, match="Linux alone"):
        run_tests("x = 1", ["assert x"], Limits())


def test_python_versions_are_those_of_the_metadata():
    """What mypy and ruff check against is the oldest that setup.cfg promises, and this one is among the promised."""
    import configparser
    import tomllib

    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    oldest = settings["options"]["python_requires"].removeprefix(">=")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    named = [line.rpartition(":: ")[2] for line in settings["metadata"]["classifiers"].split("\n")]
    versions = [name for name in named if name[:2] == "3."]
    assert versions[0] == oldest == tools["mypy"]["python_version"]
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in versions
