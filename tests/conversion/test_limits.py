# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How many threads run unless the user says: by affinity, cgroup quotas and the ranks beside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.checkpoint import limits
from conversion.checkpoint.limits import default_workers


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 processors without a launcher, whose cgroups are plain files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(limits, "_MOST", 1000)
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OWN_GROUPS", tmp_path / "own")
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    return tmp_path


def write(machine: Path, own: str, files: dict[str, str]) -> None:
    (machine / "own").write_text(own)
    for name, text in files.items():
        path = machine / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_affinity():
    """In a process that really is bound to one processor."""
    script = """if True:
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from conversion import WriteOptions
        from conversion.checkpoint.limits import default_workers
        from teleflm.terminal import DEFAULT_WORKERS
        print(default_workers(), DEFAULT_WORKERS, WriteOptions().workers)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1"]


@pytest.mark.parametrize(
    ("own", "files", "workers"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/user/job", {"user/job/cpu.max": "800000 100000", "user/cpu.max": "max 100000"}, 8),
        ("0::/user/job", {"user/job/cpu.max": "800000 100000", "user/cpu.max": "300000 100000"}, 3),
        ("0::/the/hosts/path", {"cpu.max": "500000 100000"}, 5),
        ("0::/../outside", {"cpu.max": "500000 100000"}, 5),
        ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "600000", "cpu/a/cpu.cfs_period_us": "100000"}, 6),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/cpu.cfs_quota_us": "700000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            7,
        ),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ("5:memory:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ("0::/", {"cpu.max": "what"}, 64),
        ("0::/", {"cpu.max": "100000 0"}, 64),
        ("no group", {}, 64),
        ("", {}, 64),
    ],
)
def test_quotas(own, files, workers, machine):
    write(machine, own, files)
    assert default_workers() == workers


def test_without_cgroups(machine):
    assert default_workers() == 64


@pytest.mark.parametrize(
    ("environment", "workers"),
    [
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"RANK": "3", "WORLD_SIZE": "100", "LOCAL_WORLD_SIZE": "100"}, 1),
        ({"RANK": "3", "WORLD_SIZE": "16"}, 64),
        ({"LOCAL_WORLD_SIZE": "8"}, 64),
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "eight"}, 64),
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "0"}, 64),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2"}, 16),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_NODEID": "2"},
            32,
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS_PER_NODE": "2"}, 32),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "some", "SLURM_NODEID": "x"}, 64),
        # srun gave each of the tasks its own 64 of the 256 processors
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4",
                "SLURM_CPUS_ON_NODE": "256",
            },
            64,
        ),
        # a batch script, whose variables say what srun would start
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}, 64),
    ],
)
def test_ranks_beside(environment, workers, machine, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_workers() == workers


def test_never_more_than_are_of_use(machine, monkeypatch):
    monkeypatch.setattr(limits, "_MOST", 16)
    assert default_workers() == 16


def test_high_water():
    script = """if True:
        from conversion.checkpoint.limits import high_water
        before = high_water()
        bytes(bytearray(b"x") * (64 << 20))
        print(high_water() - before >> 20)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert 120 <= int(done.stdout) <= 135


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/a/b", {"a/b/memory.max": "500", "a/memory.max": "1000"}, 500),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "700"}, 700),
        ("0::/", {"memory.max": "max"}, None),
    ],
)
def test_memory_of_the_cgroup(own, files, limit, machine, monkeypatch):
    (machine / "meminfo").write_text("MemTotal: 1 kB\nSwapTotal:       2 kB\n")
    monkeypatch.setattr(limits, "_MEMORY", machine / "meminfo")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    write(machine, own, files)
    assert limits.usable_memory() == (limit or physical) + 2048
