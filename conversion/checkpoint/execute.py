# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Running a plan: the one place that writes checkpoints.

Blocks of all tensors are made by a few threads (reading, hashing, casting and writing release the interpreter lock) and
written where the header says they belong. Memory is workers x block, whatever the model. Files are written under a
`.partial` name, preallocated so that a full disk shows before any work, synced, and renamed; the file that makes the
folder loadable comes last, so a folder that loads is complete.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .assemble import BLOCK, assemble, blocks, is_zero, resolve
from .containers import Shard, loadable_file, parse_size, safetensors_index, safetensors_shards
from .errors import CheckpointError
from .manifest import MANIFEST, block_digest, make_manifest, read_manifest, tensor_digest
from .plan import CheckpointPlan, TensorPlan
from .reader import FileReader
from .sources import WEIGHT_FILES

PARTIAL = ".partial"
_LOCK = ".teleflm.lock"


@dataclass(frozen=True)
class WriteOptions:
    """How to write a checkpoint.

    Args:
        max_shard_size: most bytes of tensors in a file, or text such as `5GB` (a larger tensor has a file to itself).
        workers: threads; memory grows with it, the output's bytes do not depend on it.
        digest: hash every tensor for the manifest.
        overwrite: replace the checkpoint that the folder already holds.
        progress: called from any thread with the number of output bytes just finished, and the number in all.
    """

    max_shard_size: str | int = "5GB"
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    digest: bool = True
    overwrite: bool = False
    progress: Callable[[int, int], None] = lambda nbytes, total: None

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)


@dataclass(frozen=True)
class Written:
    """A finished checkpoint: its folder, its weight files, bytes of tensors, and whether it was there already."""

    folder: Path
    files: tuple[str, ...]
    nbytes: int
    already_done: bool


def write_checkpoint(plan: CheckpointPlan, out: Path, options: WriteOptions) -> Written:
    """Execute a plan into a Hub folder of safetensors.

    Args:
        plan: what to write; checked before anything is touched.
        out: the folder: new, without a checkpoint, or holding this very one already, unless `overwrite` is set.
        options: see `WriteOptions`.

    Raises:
        PlanError: the plan does not tile its output.
        CheckpointError: the folder cannot be used, or a source cannot be read.
        OSError: the disk fails or is too small; the folder is then not loadable.
    """
    plan.check()
    shards = safetensors_shards(plan.tensors, options.shard_bytes)
    written = Written(out, tuple(shard.filename for shard in shards), plan.nbytes, already_done=False)
    if any(Path(file).resolve().parent == out.resolve() for file in plan.sources):
        raise CheckpointError(f"{out}: is the source too; write to another folder.")
    out.mkdir(parents=True, exist_ok=True)
    with _exclusive(out):
        if _is_done(plan, shards, out):
            return Written(written.folder, written.files, written.nbytes, already_done=True)
        _clear(out, options.overwrite)
        _require_space(out, shards)
        with FileReader() as reader:
            resolved = resolve(plan, reader, options.workers)

            def make(tensor: TensorPlan, start: int, stop: int) -> np.ndarray:
                return assemble(tensor, start, stop, reader=reader, resolved=resolved, seed=plan.seed)

            digests = _write_shards(shards, out, options, make)
        for name, content in plan.sidecars.items():
            _write_file(out / name, content if isinstance(content, bytes) else Path(content).read_bytes())
        _write_file(out / "config.json", _json_bytes(plan.config))
        _write_file(out / MANIFEST, _json_bytes(make_manifest(plan, shards, resolved, digests)))
        _make_loadable(shards, out)
    return written


def free_space(out: Path) -> int:
    """Bytes free where `out` is, or will be."""
    return shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free


def peak_memory(plan: CheckpointPlan, workers: int) -> int:
    """Bytes that running a plan takes at most beside the interpreter: some blocks a worker, whatever the model."""
    itemsize = max(tensor.dtype.itemsize for tensor in plan.tensors)
    return workers * BLOCK * (3 * itemsize + np.dtype(np.uint16).itemsize)  # a block, its source span, its draws


def _require_space(out: Path, shards: list[Shard]) -> None:
    need, free = sum(shard.nbytes for shard in shards), free_space(out)
    if need > free:
        raise OSError(
            errno.ENOSPC, f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; free some space", str(out)
        )


@dataclass(frozen=True)
class _Block:
    """A piece of work: elements `start .. stop` of a tensor, the `index`-th block of it, `at` this byte of a file."""

    file: "_ShardFile"
    tensor: TensorPlan
    index: int
    start: int
    stop: int
    at: int


class _ShardFile:
    """A shard being written under its partial name. The last of its blocks to finish syncs it."""

    def __init__(self, shard: Shard, out: Path) -> None:
        self._partial = out / (shard.filename + PARTIAL)
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._lock = threading.Lock()
        self._pending = 1 + sum(1 for tensor, _ in shard.tensors for _ in blocks(tensor.numel))
        try:
            os.posix_fallocate(self._descriptor, 0, shard.nbytes)  # what no block writes reads as zeros
            self.write(shard.header, 0)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes | memoryview, at: int) -> None:
        """Write the header or one block, and finish the file if it was the last."""
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], at + written)
        with self._lock:
            self._pending -= 1
            if self._pending:
                return
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_shards(
    shards: list[Shard], out: Path, options: WriteOptions, make: Callable[[TensorPlan, int, int], np.ndarray]
) -> dict[str, str]:
    """Write all shards; returns tensor name -> digest, empty if none are wanted."""
    open_files: list[_ShardFile] = []
    digests: dict[str, dict[int, bytes]] = {}
    total = sum(tensor.nbytes for shard in shards for tensor, _ in shard.tensors)

    def work_items() -> Iterator[_Block]:
        for shard in shards:
            file = _ShardFile(shard, out)
            open_files.append(file)
            for tensor, at in shard.tensors:
                digests[tensor.name] = {}
                for index, (start, stop) in enumerate(blocks(tensor.numel)):
                    yield _Block(file, tensor, index, start, stop, at + start * tensor.dtype.itemsize)

    def work(block: _Block) -> None:
        skip = not options.digest and is_zero(block.tensor, block.start, block.stop)
        data = b"" if skip else _bytes_of(make(block.tensor, block.start, block.stop))
        if options.digest:
            digests[block.tensor.name][block.index] = block_digest(data)
        written = b"" if skip or is_zero(block.tensor, block.start, block.stop) else data
        block.file.write(written, block.at)
        options.progress((block.stop - block.start) * block.tensor.dtype.itemsize, total)

    try:
        _run(work_items(), work, options.workers)
    finally:
        for file in open_files:
            file.close()
    if not options.digest:
        return {}
    return {name: tensor_digest(parts[i] for i in range(len(parts))) for name, parts in digests.items()}


def _run(items: Iterator[_Block], work: Callable[[_Block], None], workers: int) -> None:
    """Do all the work on some threads; the first error stops them and is raised."""
    lock, stop = threading.Lock(), threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                work(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="checkpoint") as pool:
        futures = [pool.submit(loop) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.view(np.uint8).data


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Hold the folder: a second run on it is refused. The lock goes with the process, so a killed run leaves none."""
    descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not _lock(descriptor, out / _LOCK):
            raise CheckpointError(f"{out}: another run is writing here; wait for it or choose another folder.")
        try:
            yield
        finally:
            (out / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that ended between our open and our lock has removed the file: the lock would then guard nothing.
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_done(plan: CheckpointPlan, shards: list[Shard], out: Path) -> bool:
    """Whether the folder is the finished result of this very plan."""
    files = {tensor.name: shard.filename for shard in shards for tensor, _ in shard.tensors}
    if not all((out / name).is_file() for name in {*files.values(), loadable_file(shards)}):
        return False
    manifest = read_manifest(out)
    if manifest is None or manifest["plan"] != plan.fingerprint():
        return False
    return {name: entry["file"] for name, entry in manifest["tensors"].items()} == files


def _clear(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a checkpoint; with `overwrite` remove that, the file that makes it loadable first."""
    present = [name for name in WEIGHT_FILES if (out / name).exists()]
    if present and not overwrite:
        raise CheckpointError(
            f"{out}: already holds {present[0]}, made otherwise; choose another folder or --overwrite."
        )
    manifest = read_manifest(out) if present else None
    stale = {entry["file"] for entry in manifest["tensors"].values()} if manifest else set()
    for name in [*present, *sorted(stale - set(present)), MANIFEST]:
        (out / Path(name).name).unlink(missing_ok=True)


def _make_loadable(shards: list[Shard], out: Path) -> None:
    """Give the shards their names, and last of all put the file in place that makes the folder load."""
    for shard in shards:
        (out / (shard.filename + PARTIAL)).rename(out / shard.filename)
    if len(shards) > 1:
        _sync_folder(out)
        _write_file(out / loadable_file(shards), safetensors_index(shards))
    _sync_folder(out)


def _sync_folder(out: Path) -> None:
    """Make renames durable."""
    descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
