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
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from .assemble import blocks
from .containers import Shard
from .errors import CheckpointError, CorruptData
from .folder_formats import format_folders
from .job import Finished, Job, first_difference, read_json, source_identities
from .kernel_copy import PassingCache, available_memory, begin_writing, preallocate, write_all
from .manifest import MANIFEST, sample_descriptor, tensor_digest
from .preflight import FOLDER, PARTIAL, RUN, Done, New, Refused, Resume, lies_in, preflight
from .ranks import Ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK_ATTEMPTS = 3
_LOCK_SECONDS = 0.1
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # a link under a name that we write would lead somewhere else

logger = logging.getLogger(__name__)


class Workspace:
    """The working folder of one run, as one of its ranks sees it. A context manager.

    Args:
        job: what is written.
        out: the output folder.
        ranks: this process and the others; rank 0 prepares the folder, the others wait for that.
        overwrite: whether what stands in the way may be removed.

    Raises:
        CheckpointError: another run is writing here, or the folder holds something else.
    """

    def __init__(self, job: Job, out: Path, ranks: Ranks, overwrite: bool) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.job = job
        self._ranks = ranks
        self._overwrite = overwrite
        self._lock = -1

    def __enter__(self) -> "Workspace":
        if self._ranks.rank == 0:
            self._lock = _lock_folder(self.out)
            try:
                self._prepare()
            except BaseException:
                self._unlock()
                raise
        else:
            self._await_run()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def done(self) -> Done | None:
        """The job, if it is done already."""
        decision = preflight(self.job, self.out)
        return decision if isinstance(decision, Done) else None

    def _prepare(self) -> None:
        """Resume the run that is here, or make room and start one."""
        decision = preflight(self.job, self.out)
        if isinstance(decision, Refused) and self._overwrite and decision.removes is not None:
            self._clear(decision.removes)
            decision = preflight(self.job, self.out)
        if isinstance(decision, Refused):
            raise CheckpointError(decision.reason)
        if isinstance(decision, New):
            self._clear(decision.removes)
            forget_run(self.out)
            self.folder.mkdir(exist_ok=True)
        elif not (isinstance(decision, Resume) and decision.relaxed):
            return
        write_file(self.folder / RUN, json.dumps(self.job.run).encode())

    def _await_run(self) -> None:
        def is_prepared() -> bool:
            decision = preflight(self.job, self.out)
            if isinstance(decision, Refused) and not (self._overwrite and decision.removes is not None):
                decision = preflight(self.job, self.out)  # rank 0 may have finished while it was looked at
                if isinstance(decision, Refused):  # rank 0 refuses too
                    raise CheckpointError(decision.reason)
            return isinstance(decision, Done | Resume)

        self._ranks.wait(is_prepared, [0], f"the preparation of {self.out}")

    def _clear(self, names: tuple[str, ...]) -> None:
        """Remove files of an earlier run: first what other ranks would join, then in the order given."""
        for name in names:
            if name.endswith(PARTIAL) and (self.out / name).is_file():
                with (self.out / name).open("rb") as file:
                    _lock(file.fileno(), f"{self.out}: another run is writing {name}; wait for it.")
        (self.folder / RUN).unlink(missing_ok=True)
        for name in names:
            if lies_in(self.out, name):
                (self.out / name).unlink(missing_ok=True)
        for folder in format_folders(self.out):
            with suppress(OSError):  # it holds something else
                folder.rmdir()

    def finished(self, shard: Shard) -> Finished | None:
        """The record of a shard, or None if it is not finished, or not what its record says."""
        record = read_json(self.beside(shard, ".done"))
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

    def wait_for(self, shard: Shard, rank: int) -> Finished:
        """The record of a shard, as soon as the rank that writes it is finished with it.

        Raises:
            RankFailed: a rank has failed, or this one is gone.
        """
        self._ranks.wait(lambda: self.finished(shard) is not None, [rank], shard.filename)
        record = self.finished(shard)
        if record is None:
            raise CorruptData(f"{self.out}: {shard.filename} was changed while this run waited; start over.")
        return record

    def require_space(self, shards: list[Shard]) -> None:
        """Refuse to start what the disk cannot hold.

        Args:
            shards: what is still to be written.

        Raises:
            OSError: the free space is less than what these still need.
        """
        need = sum(missing_bytes(self.out, shard) for shard in shards)
        free = shutil.disk_usage(self.out).free
        if need > free:
            text = f"needs {need / 1e9:.3f} GB more, {free / 1e9:.3f} GB are free; free some space, then run this again"
            raise OSError(errno.ENOSPC, text, str(self.out))

    def check_sources(self) -> None:
        """Check that the sources still are what they were when the job was made.

        Raises:
            CorruptData: one is not, so that the output may hold some of both.
        """
        try:
            now = source_identities(self.job.plan.sources, now=True)
        except OSError as error:
            raise CorruptData(f"{error.filename} cannot be read: {error.strerror or error}.") from None
        changed = first_difference({"sources": self.job.sources}, {"sources": now})
        if changed:
            raise CorruptData(f"{self.out}: while it was written, {changed}; start over with --overwrite.")

    def write(self, name: str, content: bytes) -> None:
        """Write a small file of the output; what a kill leaves of it lies in the working folder."""
        path = self.out / name
        if os.path.lexists(path) and not self._is_ours(name, content):
            raise put_there(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content, self.folder / (name.replace("/", "-") + PARTIAL))

    def _is_ours(self, name: str, content: bytes) -> bool:
        """Whether a small file that is there already is one that an interrupted run of this has written."""
        path = self.out / name
        if path.is_symlink() or not path.is_file():
            return False
        if name == MANIFEST:  # which also says what was looked for, and that may have changed
            return ((read_json(path) or {}).get("job") or {}).get("fingerprint") == self.job.fingerprint
        return path.read_bytes() == content

    def require_ours(self) -> None:
        """Look again, before what makes the folder loadable: hours have passed.

        Raises:
            CheckpointError: somebody has put something there that would be replaced, or loaded with what was written.
        """
        decision = preflight(self.job, self.out)
        if isinstance(decision, Refused):
            raise CheckpointError(decision.reason)

    def remove(self) -> None:
        """Forget the run: its output is complete."""
        forget_run(self.out)


def put_there(path: Path) -> CheckpointError:
    """The error for a file that somebody has put in the place of one of ours."""
    return CheckpointError(f"{path}: was put there while this run wrote; move it away, then run this again.")


def forget_run(out: Path) -> None:
    """Remove what a run keeps until it is finished, and nothing that somebody else has put beside it."""
    folder = out / FOLDER
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.name == RUN or path.suffix in (".journal", ".done", PARTIAL):
                with suppress(OSError):
                    path.unlink()
    with suppress(OSError):  # there is none, or it holds something else
        folder.rmdir()


def missing_bytes(out: Path, shard: Shard) -> int:
    """Bytes of disk that a shard still needs, beside those that it has, whole or partial."""
    for name in (shard.filename + PARTIAL, shard.filename):
        with suppress(FileNotFoundError):
            return shard.disk_bytes - min(_allocated(out / name), shard.disk_bytes)
    return shard.disk_bytes


def unwritten_bytes(out: Path, shard: Shard) -> int:
    """Bytes of a shard that an interrupted run has not written, by its journal: a file has its full size at once."""
    beside = out / FOLDER / shard.filename.replace("/", "-")
    if beside.with_name(beside.name + ".done").is_file() or shard.twin:
        return 0 if not shard.twin else shard.disk_bytes
    claims = _read_journal(beside.with_name(beside.name + ".journal"))
    if not claims or not (out / (shard.filename + PARTIAL)).is_file():
        return shard.disk_bytes
    written = sum(
        (stop - start) * tensor.dtype.itemsize
        for tensor, _ in shard.tensors
        for index, (start, stop) in enumerate(blocks(tensor.numel))
        if (tensor.name, index) in claims
    )
    return max(shard.disk_bytes - written, 0)


def _allocated(path: Path) -> int:
    status = path.stat()
    return getattr(status, "st_blocks", 0) * 512


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
            self._journal = _open_journal(self._journal_path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o666)
        _lock(self.descriptor, f"{self._workspace.out}: another run is writing {self._shard.filename}; wait for it.")
        self._workspace.beside(self._shard, ".done").unlink(missing_ok=True)
        if not self.claims:
            os.ftruncate(self.descriptor, 0)  # so that what no block writes reads as zeros
        preallocate(self.descriptor, self._shard.nbytes)
        for position, content in self._shard.fixed:
            self.write(content, position)

    @property
    def is_state(self) -> bool:
        """Whether it holds no weights, see `Shard`."""
        return self._shard.state

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
            line = f"{index} {digest.hex()} {tensor}\n".encode()
            with self._lock:  # a write may be short; what follows must not come between its parts
                while line:
                    line = line[os.write(self._journal, line) :]
        self._digests[tensor][index] = digest

    def release(self, position: int = 0, nbytes: int = 0) -> None:
        """Give up a hold on the file: each block has one, and whoever hands them out. The last completes the shard.

        Args:
            position: where the block that was written lies.
            nbytes: its size.
        """
        if nbytes and self._passing:
            self._passing.passed(position, nbytes)
        elif nbytes:
            begin_writing(self.descriptor, position, nbytes)
        with self._lock:
            self._pending -= 1
            if self._pending:
                return
        with naming_errors(self.path):  # where writes are delayed, the disk may turn out to be full only here
            os.fsync(self.descriptor)
            samples = sample_descriptor(self.descriptor)
        if self._passing:
            self._passing.close()
        status = os.fstat(self.descriptor)
        digests = {name: tensor_digest(parts[i] for i in range(len(parts))) for name, parts in self._digests.items()}
        record = Finished(status.st_size, status.st_mtime_ns, digests, self._statistics, samples)
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
    """Make renames in a folder durable, where folders can be synced."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens none
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some network file systems
            raise
    finally:
        os.close(descriptor)


def is_locked(out: Path) -> bool:
    """Whether a run is writing to a folder at this moment."""
    if fcntl is None or not out.is_dir():
        return False
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
    return False


def _lock_folder(out: Path) -> int:
    """Hold OUT against a second run; -1 where folders cannot be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        logger.warning("running without a lock: this system cannot open folders")
        return -1
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _lock(descriptor, f"{out}: another run is writing here; wait for it or choose another folder.")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, refusal: str) -> None:
    """Hold an open file against other processes. The lock goes with the descriptor, so a killed run leaves none."""
    if fcntl is None:
        logger.warning("running without a lock: this system has none")
        return
    for attempt in range(_LOCK_ATTEMPTS):  # a dry run that looks whether somebody writes holds it for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt < _LOCK_ATTEMPTS - 1:
                time.sleep(_LOCK_SECONDS)
        except OSError as error:  # some network file systems have no locks
            logger.warning("running without a lock: %s", error)
            return
    raise CheckpointError(refusal)


def _open_journal(path: Path) -> int:
    """A journal, to be appended to: after a whole line, whatever a kill or a full disk left at its end."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _NOFOLLOW, 0o666)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


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
