# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What this process may use: processors, which are rarely all that the machine has, and memory."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

DEFAULT_MEMORY = "256MB"  # of all threads together
_MOST = 16  # more threads are of no use: they write to one file system, and share one interpreter
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")


def default_workers() -> int:
    """How many threads to run unless the user says: as many as this process may use processors, up to 16.

    Its affinity bounds them, and the quota of its cgroup and of those around it; the ranks that a launcher started
    beside it on this machine have their part of the rest.
    """
    affinity = _affinity()
    processors = min([affinity, *_quotas(_GROUPS, _OWN_GROUPS)])
    return max(1, min(_MOST, processors // _ranks_here(os.environ, affinity)))


def _affinity() -> int:
    """Processors that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(groups: Path, own: Path) -> Iterator[int]:
    """Processors that each cgroup of this process may keep busy, of those that have a limit."""
    for group in _own_groups(groups, own, "cpu"):
        yield from _quota(group)


def _own_groups(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of the cgroups of this process and of those around them, that may limit something."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "", "")[:3]
        if controllers == "":  # version 2
            folders = [groups]
        elif controller in controllers.split(","):
            folders = [groups / name for name in (controllers, controller)]
        else:
            continue
        for folder in folders:
            # A container may see its own group as the root, or by the host's path, which is not there then.
            below = folder / path.lstrip("/")
            for group in (below, *below.parents):
                if group == folder or folder in group.parents:
                    yield group


def _quota(group: Path) -> Iterator[int]:
    """The limit of one cgroup, rounded up; none where there is none."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (group / "cpu.max").read_text().split()
        yield max(1, -(-int(quota) // int(period)))  # "max" is no number
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            yield max(1, -(-int(quota) // int(period)))


def usable_memory() -> int | None:
    """Bytes that the processes of this machine, or of the cgroup they are in, can have together; swap counts.

    None where the system does not say.
    """
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    swap = _swap()
    limits = (limit for group in _own_groups(_GROUPS, _OWN_GROUPS, "memory") for limit in _memory_limit(group))
    return min([physical + swap, *(limit + swap for limit in limits)])


def _swap() -> int:
    with suppress(OSError):
        if match := re.search(r"SwapTotal:\s*(\d+) kB", _MEMORY.read_text()):
            return int(match[1]) * 1024
    return 0


def _memory_limit(group: Path) -> Iterator[int]:
    """What one cgroup may have without swap; none where there is no limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            yield int((group / name).read_text())  # "max" is no number


def _ranks_here(environment: Mapping[str, str], affinity: int) -> int:
    """How many ranks of a launcher share the processors of this process, itself among them."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _number(environment.get("LOCAL_WORLD_SIZE", "")) or 1
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 1
    if affinity < (_number(environment.get("SLURM_CPUS_ON_NODE", "")) or 0):  # srun gave each task its own
        return 1
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if tasks := _tasks_of_node(environment.get(name, ""), _number(environment.get("SLURM_NODEID", "")) or 0):
            return tasks
    return 1


def _tasks_of_node(text: str, node: int) -> int | None:
    """What Slurm says of a node in a list such as `4(x2),3`: its tasks; the most of any where it has fewer nodes."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return (counts[node] if node < len(counts) else max(counts)) or None


def _number(text: str) -> int | None:
    """A whole number, as launchers write them; None if it is none."""
    return int(text) if text.isascii() and text.isdigit() else None


def high_water() -> int:
    """Bytes of memory that this process has had at most until now."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS, where the unit is a byte
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    match = re.search(r"VmHWM:\s*(\d+) kB", status)  # not ru_maxrss, which a child begins with its parent's
    return int(match[1]) * 1024 if match else 0


def allow_many_files() -> None:
    """Raise the soft limit on open files to the hard one: a checkpoint may have a file for each of a thousand ranks."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS says unlimited and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
