# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the benchmarks share: interleaved runs, peak memory of a process tree, the state of the page cache, results.

A ratio compares runs of one round. Within a round the order is random, every run starts with the same cache, without
dirty pages, and ends when its output is on the disk.
"""

import argparse
import os
import platform
import random
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import results
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TELEFLM = [sys.executable, "-m", "teleflm"]
GIB = 1 << 30
_SAMPLE_SECONDS = 0.02
_FAMILY_SECONDS = 0.3

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One timed run: wall-clock and processor seconds, and the most memory its processes had resident, in bytes."""

    seconds: float
    cpu_seconds: float
    peak_rss: int = 0


def arguments(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """The options of every benchmark; `defaults` replaces some of theirs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=3.5, help="GiB of weights")
    parser.add_argument("--pairs", type=int, default=7, help="rounds of interleaved runs")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work, on a disk")
    parser.set_defaults(**defaults)
    return parser


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A new folder that is removed in the end, whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="teleflm-benchmark-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def run_processes(*commands: Sequence[str], environments: Sequence[Mapping[str, str]] = ({},)) -> Run:
    """Run some processes at once, from the root of the repository, until the last is finished.

    They keep what Python compiles, as it does unless it is told not to: an installed package is compiled once.

    Args:
        commands: one or more; a single one is started once for each environment.
        environments: variables on top of this process's.

    Raises:
        RuntimeError: one failed; the message holds its output.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started, used = time.perf_counter(), _children_cpu()
    lines = commands if len(commands) > 1 else commands * len(environments)
    processes = [
        subprocess.Popen(
            line, cwd=ROOT, env={**inherited, **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line, extra in zip(lines, environments, strict=True)
    ]
    stop, peak = threading.Event(), [0]
    watcher = threading.Thread(target=_watch, args=([process.pid for process in processes], stop, peak))
    watcher.start()
    outputs = [process.communicate()[0] for process in processes]
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    for process, line, output in zip(processes, lines, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{shlex.join(line)} exited with {process.returncode}:\n{output[-3000:]}")
    return Run(seconds, _children_cpu() - used, peak[0])


def _children_cpu() -> float:
    """Processor seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch(roots: list[int], stop: threading.Event, peak: list[int]) -> None:
    """Keep the sum of the resident high-water marks of some processes and their children in `peak`."""
    family, looked = set(roots), 0.0
    while not stop.wait(_SAMPLE_SECONDS):
        if time.monotonic() - looked > _FAMILY_SECONDS:
            looked = time.monotonic()
            family = {*roots, *(child for root in roots for child in _children(root))}
        peak[0] = max(peak[0], sum(map(_high_water, family)))


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _high_water(pid: int) -> int:
    """The most memory a living process ever had resident, in bytes; the kernel's own count, not a sample."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def cp(sources: Sequence[Path], folder: Path, names: Sequence[str] | None = None) -> Run:
    """Plain `cp` of some files into a new folder, under names of their own if given, and fsync of the copies."""
    folder.mkdir()
    copies = [folder / name for name in names or [source.name for source in sources]]
    started, used = time.perf_counter(), _children_cpu()
    for source, copy in zip(sources, copies, strict=True):
        subprocess.run(["cp", str(source), str(copy)], check=True)
    for copy in copies:
        descriptor = os.open(copy, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    return Run(time.perf_counter() - started, _children_cpu() - used)


def interleave(
    contestants: Mapping[str, Callable[[Path], Run]], rounds: int, place: Path, sources: Sequence[Path], cache: str
) -> dict[str, list[Run]]:
    """Run everyone once a round, in random order.

    Args:
        contestants: name -> what runs it into a folder that does not exist yet, and is removed afterwards.
        rounds: how many.
        place: where the outputs go.
        sources: the files they read.
        cache: `warm`, the sources are read before each run, or `cold`, they are dropped from the page cache.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in random.sample(list(contestants), len(contestants)):
            set_cache(sources, cache)
            run = contestants[name](place / "output")
            shutil.rmtree(place / "output", ignore_errors=True)
            runs[name].append(run)
            load = os.getloadavg()[0]
            console.print(f"{cache} {number + 1}/{rounds} {name}: {run.seconds:.2f} s (load {load:.1f})", style="dim")
    return runs


def set_cache(files: Sequence[Path], state: str) -> None:
    """Bring files into the page cache or drop them from it, with nothing left to write back."""
    os.sync()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            if state == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(1 << 20)
                while stream.readinto(buffer):
                    pass


def ratios(runs: Mapping[str, Sequence[Run]], name: str, base: str) -> str:
    """Seconds of one over seconds of another, round by round: median (least - most)."""
    quotients = [a.seconds / b.seconds for a, b in zip(runs[name], runs[base], strict=True)]
    return spread(quotients)


AGAINST_CP = ("", "seconds", "processor seconds", "x the time of cp", "times faster than loading all", "peak RSS, MiB")


def against_cp(runs: Mapping[str, Sequence[Run]], load_all: str) -> list[list[str]]:
    """A row for each contestant, beside `cp` and the one that loads all, if it ran: the columns are `AGAINST_CP`."""
    return [
        [
            name,
            seconds(runs[name]),
            cpu_seconds(runs[name]),
            ratios(runs, name, "cp"),
            ratios(runs, load_all, name) if load_all in runs else "",
            mib(runs[name]) if name != "cp" else "",
        ]
        for name in runs
    ]


def spread(values: Sequence[float]) -> str:
    """Median (least - most)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def seconds(runs: Sequence[Run]) -> str:
    """Seconds of some runs: median (least - most)."""
    return spread([run.seconds for run in runs])


def cpu_seconds(runs: Sequence[Run]) -> str:
    """Processor seconds of some runs: median (least - most)."""
    return spread([run.cpu_seconds for run in runs])


def mib(runs: Sequence[Run]) -> str:
    """The greatest peak memory of some runs, in MiB."""
    return f"{max(run.peak_rss for run in runs) / (1 << 20):,.0f}"


def report(
    title: str,
    folder: Path,
    about: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    goals: Sequence[results.Goal] = (),
) -> None:
    """Print a table, and keep it with the date, the command and the machine; RESULTS.md is made anew.

    It takes the place of the older one of the same title, to which TELEFLM_BENCHMARK_LABEL adds what sets apart a run
    of another size.
    """
    title = ", ".join(filter(None, [title, os.environ.get("TELEFLM_BENCHMARK_LABEL")]))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    section = results.Section(
        title=title,
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        command=_command(),
        about=f"{about} {machine(folder)}",
        columns=list(columns),
        rows=[list(row) for row in rows],
        goals=list(goals),
    )
    for goal in goals:
        found = results.worst(goal, section)
        console.print(f"{goal.claim}: {found.value if found else '-'}, held: {results.held(goal, found)}")
    results.write(results.put_on_top(section, results.read()))


def _command() -> str:
    """The command line, without the folders, which say nothing and are nobody's business."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--folder" in words:
        words[words.index("--folder") + 1] = "DIR"
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return f"python benchmarks/{shlex.join(words)}"


def machine(folder: Path) -> str:
    """Cores, memory, kernel, file system, and how busy the machine is."""
    memory = psutil.virtual_memory().total / GIB
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    file_system = max(mounts, key=lambda part: len(part.mountpoint)).fstype
    virtual = ", virtual machine" if "hypervisor" in Path("/proc/cpuinfo").read_text() else ""
    system = f"Linux {platform.release().split('-')[0]}, {file_system}, Python {platform.python_version()}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} cores{virtual}, {memory:.0f} GiB RAM, {system}; load average {load}."
