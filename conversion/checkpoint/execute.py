# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Running a plan: the one place that writes checkpoints.

Blocks of all tensors are made by a few threads (reading, hashing, casting and writing release the interpreter lock) and
written where the header says they belong; bytes that do not change are moved inside the kernel. Memory is
a few MB a worker, whatever the model. Shards are independent, so the ranks of any launcher each take some. What is
finished is journalled (`workspace.py`), and the file that makes the folder loadable comes last, so a folder that loads
is complete.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .assemble import blocks, copy_runs, is_zero, resolve, stream
from .containers import Shard, loadable_file, parse_size, safetensors_index, safetensors_shards
from .errors import CheckpointError
from .kernel_copy import write_all
from .manifest import MANIFEST, block_digest, make_manifest, read_manifest
from .normal_stream import GRID
from .plan import CheckpointPlan, TensorPlan
from .reader import FileReader, read_chunks
from .workspace import FOLDER, PARTIAL, Finished, ShardFile, Workspace, naming_errors, sync_folder


@dataclass(frozen=True)
class WriteOptions:
    """How to write a checkpoint.

    Args:
        max_shard_size: most bytes of tensors in a file, or text such as `5GB` (a larger tensor has a file to itself).
        workers: threads; memory grows with it, the output's bytes do not depend on it.
        digest: hash every tensor for the manifest. Without, an interrupted run resumes from whole shards only.
        overwrite: replace the checkpoint that the folder already holds, or a run there that was interrupted.
        progress: called from any thread with the number of output bytes just finished, and the number in all.
        rank: which of the processes that share the work this is; every one runs the same call.
        world_size: how many there are. Shard i is written by rank i modulo world_size; rank 0 waits for the others.
    """

    max_shard_size: str | int = "5GB"
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    digest: bool = True
    overwrite: bool = False
    progress: Callable[[int, int], None] = lambda nbytes, total: None
    rank: int = 0
    world_size: int = 1

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
    already_done: bool = False


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint that was planned and, unless it was a dry run, written.

    Args:
        plan: the whole output, tensor by tensor.
        shards: its files.
        notes: what a user should know, one sentence each.
        written: the output; None after a dry run.
    """

    plan: CheckpointPlan
    shards: list[Shard]
    notes: list[str]
    written: Written | None


def write_checkpoint(plan: CheckpointPlan, out: Path, options: WriteOptions) -> Written:
    """Execute a plan into a Hub folder of safetensors, or finish what an interrupted call of the same left there.

    Args:
        plan: what to write; checked before anything is touched.
        out: the folder: new, without a checkpoint, holding this very one or an interrupted run of it, unless
            `overwrite` is set.
        options: see `WriteOptions`.

    Raises:
        PlanError: the plan does not tile its output.
        CheckpointError: the folder cannot be used, or a source cannot be read.
        OSError: the disk fails or is too small; the folder is then not loadable, and the same call resumes.
    """
    plan.check()
    shards = safetensors_shards(plan.tensors, options.shard_bytes)
    written = Written(out, tuple(shard.filename for shard in shards), plan.nbytes)
    if _is_source(plan, out):
        raise CheckpointError(f"{out}: is the source too; write to another folder.")
    out.mkdir(parents=True, exist_ok=True)

    def is_done() -> bool:
        return _is_done(plan, shards, out, options.digest)

    if is_done():
        shutil.rmtree(out / FOLDER, ignore_errors=True)  # of a run that was killed on its last step
        return replace(written, already_done=True)
    with (
        Workspace(out, plan, _settings(options), options.rank, options.overwrite, is_done) as workspace,
        FileReader() as reader,
    ):
        mine = shards[options.rank :: options.world_size]
        todo = [shard for shard in mine if workspace.finished(shard) is None]
        if is_done():  # asked after looking at the records, which go when all is done
            return replace(written, already_done=True)
        workspace.require_space(todo)
        total = _tensor_bytes(mine)
        options.progress(total - _tensor_bytes(todo), total)
        _write_shards(plan, todo, total, workspace, reader, options)
        if options.rank == 0:
            finished = [workspace.wait_for(shard) for shard in shards]
            workspace.check_sources()
            _write_small_files(plan, shards, finished, workspace)
            _make_loadable(shards, workspace)
            workspace.remove()
    return written


def foresee(plan: CheckpointPlan, shards: Sequence[Shard], out: Path, options: WriteOptions) -> list[str]:
    """What `write_checkpoint` would meet in a folder, a sentence each; nothing is touched. For a dry run."""
    if _is_source(plan, out):
        return [f"It would be refused: {out} is the source too; write to another folder."]
    if _is_done(plan, shards, out, options.digest):
        return [f"{out} is already done."]
    notes = []
    if out.is_dir():
        workspace = Workspace(out, plan, _settings(options), options.rank, options.overwrite, lambda: False)
        run, obstacle = workspace.survey()
        if obstacle is not None:
            notes.append(f"{'It would be removed' if options.overwrite else 'It would be refused'}: {obstacle}")
        elif run is not None:
            notes.append(f"{out} holds an interrupted run of this, which would be resumed.")
    need, free = sum(shard.nbytes for shard in shards), free_space(out)
    if need > free:
        notes.append(f"It would be refused: {need / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free.")
    return notes


def _settings(options: WriteOptions) -> dict[str, Any]:
    """What decides the files beside the plan."""
    return {"max_shard_size": options.shard_bytes, "digest": options.digest}


def _is_source(plan: CheckpointPlan, out: Path) -> bool:
    return any(out.resolve() in (Path(file).parent.resolve(), Path(file).resolve().parent) for file in plan.sources)


def free_space(out: Path) -> int:
    """Bytes free where `out` is, or will be."""
    return shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free


def peak_memory(plan: CheckpointPlan, workers: int) -> int:
    """Bytes that running a plan takes at most beside the interpreter: a few MB a worker, whatever the model."""
    itemsize = max(tensor.dtype.itemsize for tensor in plan.tensors)
    return workers * GRID * (3 * itemsize + np.dtype(np.uint16).itemsize)  # elements, their source span, their draws


@dataclass(frozen=True)
class _Block:
    """A piece of work: elements `start .. stop` of a tensor, its `index`-th block, at byte `at` of a file."""

    file: ShardFile
    tensor: TensorPlan
    index: int
    start: int
    stop: int
    at: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.tensor.dtype.itemsize


def _write_shards(
    plan: CheckpointPlan,
    shards: Sequence[Shard],
    total: int,
    workspace: Workspace,
    reader: FileReader,
    options: WriteOptions,
) -> None:
    """Write some shards, and leave a record of each; `total` is for the progress."""
    resolved = resolve([tensor for shard in shards for tensor, _ in shard.tensors], reader, options.workers)
    open_files: list[ShardFile] = []

    def work_items() -> Iterator[_Block]:
        for shard in shards:
            statistics = resolved.named([tensor for tensor, _ in shard.tensors])
            file = ShardFile(shard, workspace, statistics, digest=options.digest)
            open_files.append(file)
            for tensor, at in shard.tensors:
                for index, (start, stop) in enumerate(blocks(tensor.numel)):
                    yield _Block(file, tensor, index, start, stop, at + start * tensor.dtype.itemsize)
            file.release()

    def work(block: _Block) -> None:
        data = stream(block.tensor, block.start, block.stop, reader=reader, resolved=resolved, seed=plan.seed)
        with naming_errors(block.file.path):
            if options.digest:
                block.file.record(block.tensor.name, block.index, _write_hashed(block, data))
            else:
                _write_plain(block, data, reader)
            block.file.release()
        options.progress(block.nbytes, total)

    try:
        _run(work_items(), work, options.workers)
    finally:
        for file in open_files:
            file.close()


def _write_hashed(block: _Block, data: Iterator[memoryview]) -> bytes:
    """Put a block into its file, unless it is there already; returns its digest."""
    descriptor = block.file.descriptor
    claimed = block.file.claims.get((block.tensor.name, block.index))
    if claimed is not None and block_digest(read_chunks(descriptor, block.at, block.at + block.nbytes)) == claimed:
        return claimed
    if is_zero(block.tensor, block.start, block.stop) and not block.file.resumed:
        return _zero_digest(block.nbytes)
    return block_digest(_written(descriptor, data, block.at))


def _written(descriptor: int, data: Iterable[memoryview], at: int) -> Iterator[memoryview]:
    """Each chunk, once it is in the file."""
    for chunk in data:
        write_all(descriptor, chunk, at)
        yield chunk
        at += len(chunk)


def _write_plain(block: _Block, data: Iterator[memoryview], reader: FileReader) -> None:
    """Put a block into its file without looking at bytes that do not change."""
    runs = copy_runs(block.tensor, block.start, block.stop)
    if runs is None:
        for _ in _written(block.file.descriptor, data, block.at):
            pass
        return
    for view, at in runs:
        reader.copy_to(view, block.file.descriptor, block.at + at * view.dtype.itemsize)


@lru_cache(maxsize=16)
def _zero_digest(nbytes: int) -> bytes:
    return block_digest([bytes(nbytes)])


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


def _tensor_bytes(shards: Iterable[Shard]) -> int:
    return sum(tensor.nbytes for shard in shards for tensor, _ in shard.tensors)


def _is_done(plan: CheckpointPlan, shards: Sequence[Shard], out: Path, digest: bool) -> bool:
    """Whether the folder is the finished result of this very plan, made from the sources as they are now."""
    try:
        sizes = [(out / shard.filename).stat().st_size for shard in shards]
        finished = (out / loadable_file(shards)).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    if sizes != [shard.nbytes for shard in shards]:
        return False
    if any(os.stat(file).st_mtime_ns > finished for file in plan.sources):
        return False
    manifest = read_manifest(out)
    if manifest is None or manifest.get("plan") != plan.fingerprint() or (digest and not manifest.get("digest")):
        return False
    files = {tensor.name: shard.filename for shard in shards for tensor, _ in shard.tensors}
    return {name: entry["file"] for name, entry in manifest["tensors"].items()} == files


def _write_small_files(
    plan: CheckpointPlan, shards: Sequence[Shard], finished: Sequence[Finished], workspace: Workspace
) -> None:
    digests = {name: digest for record in finished for name, digest in record.digests.items()}
    statistics = {symbol: value for record in finished for symbol, value in record.statistics.items()}
    for name, content in plan.sidecars.items():
        workspace.write(name, content if isinstance(content, bytes) else Path(content).read_bytes())
    workspace.write("config.json", _json_bytes(plan.config))
    workspace.write(MANIFEST, _json_bytes(make_manifest(plan, shards, statistics, digests)))


def _make_loadable(shards: Sequence[Shard], workspace: Workspace) -> None:
    """Give the shards their names, and last of all put the file in place that makes the folder load."""
    out = workspace.out
    for shard in shards:
        if (out / (shard.filename + PARTIAL)).exists():  # a killed run may have renamed some
            (out / (shard.filename + PARTIAL)).rename(out / shard.filename)
    if len(shards) > 1:
        sync_folder(out)
        workspace.write(loadable_file(shards), safetensors_index(shards))
    sync_folder(out)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
