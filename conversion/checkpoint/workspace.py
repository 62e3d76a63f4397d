# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a run keeps beside its output until it is finished: enough to resume after a kill at any instant.

`OUT/.teleflm` holds `run.json` (which plan, settings and sources: another run is refused), a journal for each shard
that is being written (a line for each finished block, with its digest) and a record for each finished shard, which is
also the barrier between ranks. Shards lie in OUT under a `.partial` name until all are finished.

Nothing here is believed because it is written: blocks that a journal claims are hashed again before they count, and a
finished shard counts only while its file has the size and time of its record.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .assemble import blocks
from .containers import Shard
from .errors import CheckpointError, CorruptData
from .kernel_copy import PassingCache, available_memory, write_all
from .manifest import MANIFEST, package_version, tensor_digest
from .plan import CheckpointPlan
from .sources import WEIGHT_FILES, source_identity

PARTIAL = ".partial"
FOLDER = ".teleflm"
# The file by which Megatron-LM finds the step to load.
TRACKER = "latest_checkpointed_iteration.txt"
LOADABLE_FILES = (*WEIGHT_FILES, TRACKER)
# Every name under which transformers, Megatron-LM and we save weights, but for the steps of a training run: what
# --overwrite removes, and nothing else touches.
_WEIGHTS = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    rf"|{re.escape(TRACKER)}|release/mp_rank_\d+(_\d+)*/\w+\.pt"
)
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """The record of a finished shard.

    Args:
        size: bytes of the file.
        mtime_ns: its time of change; another one means that somebody touched it.
        digests: tensor name -> digest; empty if none are taken.
        statistics: symbol of the plan -> its value, for the symbols this shard uses.
    """

    size: int
    mtime_ns: int
    digests: dict[str, str]
    statistics: dict[str, float]


class Workspace:
    """The working folder of one run, as one of its ranks sees it. A context manager.

    Args:
        out: the output folder.
        plan: what is written.
        settings: what else decides the files, for example the shard size.
        rank: of this process; rank 0 prepares the folder, the others wait for that.
        overwrite: whether a checkpoint or another run in the folder may be removed.
        is_done: whether the folder holds the finished output, so that there is nothing to wait for.

    Raises:
        CheckpointError: another run is writing here, the folder holds something else, or a source changed meanwhile.
    """

    def __init__(
        self,
        out: Path,
        plan: CheckpointPlan,
        settings: Mapping[str, Any],
        rank: int,
        overwrite: bool,
        is_done: Callable[[], bool],
    ) -> None:
        self.out = out
        self.folder = out / FOLDER
        self._rank = rank
        self._overwrite = overwrite
        self._is_done = is_done
        self._lock = -1
        self._sources = plan.sources
        self._run = {
            "version": package_version(),
            "plan": plan.fingerprint(),
            "settings": dict(settings),
            "seed": plan.seed,
            "config": plan.config,
            "lineage": plan.lineage,
            "sources": _identities(self._sources),
        }

    def __enter__(self) -> "Workspace":
        if self._rank == 0:
            self._lock = _lock_folder(self.out)
            try:
                self._prepare()
            except BaseException:
                os.close(self._lock)
                raise
        else:
            self._await_run()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock >= 0:
            os.close(self._lock)

    def _prepare(self) -> None:
        """Resume the run that is here, or make room and start one."""
        if self._is_done():
            return
        run, obstacle = self.survey()
        if obstacle is None and run is not None:
            return
        if obstacle is not None and not self._overwrite:
            raise CheckpointError(obstacle)
        self._clear()
        self.folder.mkdir()
        write_file(self.folder / "run.json", json.dumps(self._run).encode())

    def _await_run(self) -> None:
        polls = _polls(f"rank 0 to prepare {self.out}")
        while not self._is_done():
            run, obstacle = self.survey()
            if obstacle is None and run is not None:
                return
            if obstacle is not None and not self._overwrite and not self._is_done():  # rank 0 refuses too
                raise CheckpointError(obstacle)
            next(polls)

    def survey(self) -> tuple[dict[str, Any] | None, str | None]:
        """The run that is here, and what stands in the way of this one; to be asked of a folder that is not done."""
        run = _read_json(self.folder / "run.json")
        present = [name for name in _weights_in(self.out) if not name.endswith(PARTIAL)]
        loadable = [name for name in LOADABLE_FILES if name in present]
        if loadable or (present and run is None):
            name = (loadable or present)[0]
            text = f"already holds {name}, made otherwise or from other sources; choose another folder or --overwrite."
            return run, f"{self.out}: {text}"
        difference = run and _difference(run, self._run)
        if difference:
            text = f"holds an interrupted run, but {difference}; repeat that run, or --overwrite it."
            return run, f"{self.out}: {text}"
        return run, None

    def _clear(self) -> None:
        """Remove a checkpoint or a run: first what other ranks would join, then what loads, then the rest."""
        names = _weights_in(self.out)
        for name in names:
            if name.endswith(PARTIAL):
                with (self.out / name).open("rb") as file:
                    _lock(file.fileno(), f"{self.out}: another run is writing {name}; wait for it.")
        (self.folder / "run.json").unlink(missing_ok=True)
        for name in (*sorted(names, key=lambda name: name not in LOADABLE_FILES), MANIFEST):
            (self.out / name).unlink(missing_ok=True)
        for folder in (*self.out.glob("release/mp_rank_*"), self.out / "release"):
            with suppress(OSError):  # it holds something else, or is not there
                folder.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self, shard: Shard) -> Finished | None:
        """The record of a shard, or None if it is not finished, or not what its record says."""
        record = _read_json(self.beside(shard, ".done"))
        if record is None:
            return None
        for path in (self.out / (shard.filename + PARTIAL), self.out / shard.filename):
            with suppress(FileNotFoundError):
                status = path.stat()
                if (status.st_size, status.st_mtime_ns) == (record["size"], record["mtime_ns"]):
                    return Finished(**record)
        return None

    def beside(self, shard: Shard, suffix: str) -> Path:
        """A file in the working folder about a shard."""
        return self.folder / (shard.filename.replace("/", "-") + suffix)

    def wait_for(self, shard: Shard) -> Finished:
        """The record of a shard, as soon as the rank that writes it is finished."""
        polls = _polls(f"{shard.filename}, which another rank writes")
        while (record := self.finished(shard)) is None:
            next(polls)
        return record

    def require_space(self, shards: list[Shard]) -> None:
        """Refuse to start what the disk cannot hold.

        Raises:
            OSError: the free space is less than what the shards still need.
        """
        need = sum(shard.nbytes - self._allocated(shard) for shard in shards)
        free = shutil.disk_usage(self.out).free
        if need > free:
            text = f"needs {need / 1e9:.3f} GB more, {free / 1e9:.3f} GB are free; free some space, then run this again"
            raise OSError(errno.ENOSPC, text, str(self.out))

    def _allocated(self, shard: Shard) -> int:
        for name in (shard.filename + PARTIAL, shard.filename):
            with suppress(FileNotFoundError):
                return min((self.out / name).stat().st_blocks * 512, shard.nbytes)
        return 0

    def check_sources(self) -> None:
        """Check that the sources still are what they were when the run began.

        Raises:
            CorruptData: one is not, so that the output may hold some of both.
        """
        try:
            changed = _difference({"sources": self._run["sources"]}, {"sources": _identities(self._sources)})
        except CheckpointError as error:
            raise CorruptData(str(error)) from None
        if changed:
            raise CorruptData(f"{self.out}: {changed} the run began; start over with --overwrite.")

    def write(self, name: str, content: bytes) -> None:
        """Write a small file of the output; what a kill leaves of it lies in the working folder."""
        write_file(self.out / name, content, self.folder / (name + PARTIAL))

    def remove(self) -> None:
        """Forget the run: its output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


class ShardFile:
    """A shard being written under its partial name. The last of its blocks to finish syncs it and leaves its record.

    Args:
        shard: the file's layout.
        workspace: where its journal is.
        statistics: for its record.
        digest: whether blocks come with digests; only then can a journal be checked, and is one kept.
        cached: whether what is written stays in the page cache.

    Raises:
        CheckpointError: another process is writing it.
        OSError: there is no room for it.
    """

    def __init__(
        self, shard: Shard, workspace: Workspace, statistics: dict[str, float], *, digest: bool, cached: bool
    ) -> None:
        self._shard = shard
        self._workspace = workspace
        self._statistics = statistics
        self._cached = cached
        self._journal_path = workspace.beside(shard, ".journal")
        self._lock = threading.Lock()
        self._pending = 1 + sum(1 for tensor, _ in shard.tensors for _ in blocks(tensor.numel))
        self._digests: dict[str, dict[int, bytes]] = {tensor.name: {} for tensor, _ in shard.tensors} if digest else {}
        self.claims = _read_journal(self._journal_path) if digest else {}
        self.path = workspace.out / (shard.filename + PARTIAL)
        self.descriptor = self._journal = -1
        try:
            with naming_errors(self.path):
                self._open(digest)
        except BaseException:
            self.close()
            raise
        self._passing = None if cached else PassingCache(self.descriptor)

    def _open(self, digest: bool) -> None:
        if digest:
            self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _lock(self.descriptor, f"{self._workspace.out}: another run is writing {self._shard.filename}; wait for it.")
        self._workspace.beside(self._shard, ".done").unlink(missing_ok=True)
        if not self.claims:
            os.ftruncate(self.descriptor, 0)  # so that what no block writes reads as zeros
        os.ftruncate(self.descriptor, self._shard.nbytes)
        os.posix_fallocate(self.descriptor, 0, self._shard.nbytes)
        for position, content in self._shard.fixed:
            self.write(content, position)

    @property
    def resumed(self) -> bool:
        """Whether an interrupted run wrote parts of the file, so that nothing can be assumed of the rest."""
        return bool(self.claims)

    def write(self, content: bytes | memoryview, position: int) -> None:
        """Write some bytes at a place."""
        write_all(self.descriptor, content, position, cached=self._cached)

    def record(self, tensor: str, index: int, digest: bytes) -> None:
        """Note that a block is in the file."""
        if self.claims.get((tensor, index)) != digest:
            os.write(self._journal, f"{index} {digest.hex()} {tensor}\n".encode())
        self._digests[tensor][index] = digest

    def release(self, position: int = 0, nbytes: int = 0) -> None:
        """Give up a hold on the file: each block has one, and whoever hands them out. The last completes the shard.

        Args:
            position: where the block that was written lies.
            nbytes: its size.
        """
        if nbytes and self._passing:
            self._passing.passed(position, nbytes)
        with self._lock:
            self._pending -= 1
            if self._pending:
                return
        with naming_errors(self.path):  # where writes are delayed, the disk may turn out to be full only here
            os.fsync(self.descriptor)
        if self._passing:
            self._passing.close()
        status = os.fstat(self.descriptor)
        digests = {name: tensor_digest(parts[i] for i in range(len(parts))) for name, parts in self._digests.items()}
        record = Finished(status.st_size, status.st_mtime_ns, digests, self._statistics)
        write_file(self._workspace.beside(self._shard, ".done"), json.dumps(asdict(record)).encode())
        self._journal_path.unlink(missing_ok=True)
        self._digests, self.claims = {}, {}  # a block of each 8 MiB of a large model's 2 TB, in hundreds of shards
        self.close()

    def close(self) -> None:
        """Close the files, finished or not."""
        for name in ("descriptor", "_journal"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


def fits_in_cache(nbytes: int) -> bool:
    """Whether an output of so many bytes would stay in the page cache for its next reader."""
    return nbytes <= available_memory() // 2


def _weights_in(out: Path) -> list[str]:
    """Paths in OUT of every file of a checkpoint, whole or partial."""
    names = (path.relative_to(out).as_posix() for path in (*out.iterdir(), *out.glob("release/mp_rank_*/*")))
    return sorted(name for name in names if _WEIGHTS.fullmatch(name.removesuffix(PARTIAL)))


def write_file(path: Path, content: bytes, partial: Path | None = None) -> None:
    """Write a small file so that it is there whole or not at all.

    Args:
        path: the file.
        content: what it shall hold.
        partial: where it is written before it gets its name; beside it unless given.
    """
    partial = partial or path.with_name(path.name + PARTIAL)
    with naming_errors(path), partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Have an error of the operating system say which file it is about; one of a descriptor does not know."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.strerror = f"{os.strerror(error.errno)}; free some space, then run this again"
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_folder(out: Path) -> int:
    """Hold OUT against a second run."""
    descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(descriptor, f"{out}: another run is writing here; wait for it or choose another folder.")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, refusal: str) -> None:
    """Hold an open file against other processes. The lock goes with the descriptor, so a killed run leaves none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(refusal) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("running without a lock: %s", error)


def _identities(files: Iterable[str]) -> dict[str, str]:
    """The identity of each file, by its path below the folder they share: where that folder lies does not matter."""
    paths = sorted(map(os.path.abspath, files))
    folder = os.path.commonpath(map(os.path.dirname, paths)) if paths else ""
    return {os.path.relpath(path, folder): source_identity(path) for path in paths}


def _read_json(path: Path) -> dict[str, Any] | None:
    """A file of ours, which is either whole or as good as not there."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing in which two runs differ, for people; None if they are the same."""
    before, after = _flatten(old), _flatten(json.loads(json.dumps(new)))
    for key in sorted(
        before.keys() | after.keys(), key=lambda key: (key == "plan", not key.startswith("sources"), key)
    ):
        if before.get(key) != after.get(key):
            if key.startswith("sources."):
                return f"the source file {key.removeprefix('sources.')} has changed since"
            if key == "plan":
                return "its tensors were planned otherwise"
            return f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
    return None


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, part in value.items() for k, v in _flatten(part, f"{prefix}.{name}" if prefix else name).items()
    }


def _read_journal(path: Path) -> dict[tuple[str, int], bytes]:
    """The blocks a journal claims; a line that a kill cut short is none."""
    claims: dict[tuple[str, int], bytes] = {}
    with suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            parts = line.decode(errors="replace").split(" ", 2)
            if len(parts) == 3 and parts[0].isdigit() and len(parts[1]) == 32:
                with suppress(ValueError):
                    claims[parts[2], int(parts[0])] = bytes.fromhex(parts[1])
    return claims


def _polls(what: str) -> Iterator[None]:
    """Tick, slowly, until the caller has what it waits for; say so once if that takes long."""
    started, told = time.monotonic(), False
    while True:
        time.sleep(_POLL_SECONDS)
        yield
        if not told and time.monotonic() - started > _PATIENCE_SECONDS:
            logger.warning("waiting for %s", what)
            told = True
