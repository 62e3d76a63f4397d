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
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .assemble import blocks, copy_runs, is_zero, resolve, stream, zeros
from .budget import Share, share_out
from .containers import Layout, Shard, parse_size, safetensors_layout
from .dtypes import first_nonfinite
from .errors import CheckpointError, NotFinite
from .limits import DEFAULT_MEMORY, default_workers, high_water
from .manifest import MANIFEST, block_digest, make_manifest, read_manifest
from .plan import CheckpointPlan, TensorPlan
from .reader import FileReader, read_chunks
from .workspace import FOLDER, PARTIAL, Finished, ShardFile, Workspace, fits_in_cache, naming_errors, sync_folder

# What a checkpoint's files may lie in, below its folder: nothing, or a step of Megatron-LM or DeepSpeed.
_OWN_FOLDER = re.compile(r"\.|(iter_\d+|release|global_step\d+)(/.*)?")


@dataclass(frozen=True)
class WriteOptions:
    """How to write a checkpoint.

    Args:
        max_shard_size: most bytes of tensors in a file, or text such as `5GB` (a larger tensor has a file to itself).
        workers: threads; the output's bytes do not depend on it.
        digest: hash every tensor for the manifest. Without, an interrupted run resumes from whole shards only.
        overwrite: replace the checkpoint that the folder already holds, or a run there that was interrupted.
        progress: called from any thread with the number of output bytes just finished, and the number in all.
        rank: which of the processes that share the work this is; every one runs the same call.
        world_size: how many there are. Shard i is written by rank i modulo world_size; rank 0 waits for the others.
        finite: refuse to write a NaN or an infinity.
        memory: what all threads may hold together, beside the program itself: bytes, or text such as `256MB`. Fewer
            threads run than asked for where it does not suffice for all; the output's bytes do not depend on it.
        allow_nonfinite: write what is too large for a tensor's dtype as infinity, which is an error else.
    """

    max_shard_size: str | int = "5GB"
    workers: int = field(default_factory=default_workers)
    digest: bool = True
    overwrite: bool = False
    progress: Callable[[int, int], None] = lambda nbytes, total: None
    rank: int = 0
    world_size: int = 1
    finite: bool = False
    memory: str | int = DEFAULT_MEMORY
    allow_nonfinite: bool = False

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)

    def share(self, tensors: Iterable[TensorPlan]) -> Share:
        """What `memory` and `workers` come to for some tensors.

        Raises:
            CheckpointError: the memory is too little for one thread.
        """
        return share_out(tensors, self.workers, parse_size(self.memory))


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


def execute(
    plan: CheckpointPlan,
    out: Path,
    options: WriteOptions,
    notes: Sequence[str] = (),
    *,
    dry_run: bool = False,
    layout: Layout | None = None,
) -> CheckpointResult:
    """Write a checkpoint, or, in a dry run, only say what that would meet: `write_checkpoint` or `foresee`.

    Args:
        plan: what to write.
        out: the folder.
        options: see `WriteOptions`.
        notes: what a user should know of the plan, one sentence each.
        dry_run: plan and check everything, write nothing.
        layout: the output's files; a Hub folder of safetensors unless given.

    Raises:
        PlanError, CheckpointError, OSError: see `write_checkpoint`.
    """
    files = layout or safetensors_layout(plan.tensors, options.shard_bytes)
    if dry_run:
        plan.check()
        options.share(plan.tensors)
        return CheckpointResult(plan, [*files.shards], [*notes, *foresee(plan, out, options, layout)], None)
    written = write_checkpoint(plan, out, options, layout)
    return CheckpointResult(plan, [*files.shards], [*notes], written)


def write_checkpoint(plan: CheckpointPlan, out: Path, options: WriteOptions, layout: Layout | None = None) -> Written:
    """Execute a plan into a folder, or finish what an interrupted call of the same left there.

    Args:
        plan: what to write; checked before anything is touched.
        out: the folder: new, without a checkpoint, holding this very one or an interrupted run of it, unless
            `overwrite` is set.
        options: see `WriteOptions`.
        layout: the output's files; a Hub folder of safetensors unless given.

    Raises:
        PlanError: the plan does not tile its output.
        CheckpointError: the folder cannot be used, the memory is too little, or a source cannot be read.
        Overflow: a value is too large for the dtype that it is written in.
        OSError: the disk fails or is too small; the folder is then not loadable, and the same call resumes.
    """
    plan.check()
    files = layout or safetensors_layout(plan.tensors, options.shard_bytes)
    files.check(plan.tensors)
    share = options.share(plan.tensors)
    shards = [shard for shard in files.shards if shard.twin is None]
    written = Written(out, tuple(shard.filename for shard in files.shards), plan.nbytes)
    if _is_source(plan, out):
        raise CheckpointError(f"{out}: is the source too; write to another folder.")
    out.mkdir(parents=True, exist_ok=True)

    def is_done() -> bool:
        return _is_done(plan, files, out, options.digest)

    if is_done():
        shutil.rmtree(out / FOLDER, ignore_errors=True)  # of a run that was killed on its last step
        return replace(written, already_done=True)
    with (
        Workspace(out, plan, _settings(options, layout), options.rank, options.overwrite, is_done) as workspace,
        FileReader() as reader,
    ):
        mine = shards[options.rank :: options.world_size]
        todo = [shard for shard in mine if workspace.finished(shard) is None]
        if is_done():  # asked after looking at the records, which go when all is done
            return replace(written, already_done=True)
        workspace.require_space(todo)
        total = _tensor_bytes(mine)
        options.progress(total - _tensor_bytes(todo), total)
        _write_shards(plan, todo, total, workspace, reader, options, share)
        if options.rank == 0:
            finished = [workspace.wait_for(shard) for shard in shards]
            workspace.check_sources()
            _write_small_files(plan, files.shards, finished, workspace)
            _make_loadable(files, workspace)
            workspace.remove()
    return written


def foresee(plan: CheckpointPlan, out: Path, options: WriteOptions, layout: Layout | None = None) -> list[str]:
    """What `write_checkpoint` would meet in a folder, a sentence each; nothing is touched. For a dry run."""
    files = layout or safetensors_layout(plan.tensors, options.shard_bytes)
    if _is_source(plan, out):
        return [f"It would be refused: {out} is the source too; write to another folder."]
    if _is_done(plan, files, out, options.digest):
        return [f"{out} is already done."]
    notes = []
    if out.is_dir():
        settings = _settings(options, layout)
        workspace = Workspace(out, plan, settings, options.rank, options.overwrite, lambda: False)
        run, obstacle = workspace.survey()
        if obstacle is not None:
            notes.append(f"{'It would be removed' if options.overwrite else 'It would be refused'}: {obstacle}")
        elif run is not None:
            notes.append(f"{out} holds an interrupted run of this, which would be resumed.")
    need, free = sum(shard.disk_bytes for shard in files.shards), free_space(out)
    if need > free:
        notes.append(f"It would be refused: {need / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free.")
    return notes


def _settings(options: WriteOptions, layout: Layout | None) -> dict[str, Any]:
    """What decides the files beside the plan."""
    files = {"max_shard_size": options.shard_bytes} if layout is None else {"layout": layout.fingerprint()}
    return {**files, "digest": options.digest}


def _is_source(plan: CheckpointPlan, out: Path) -> bool:
    """Whether OUT is the checkpoint that is read: the folder of its files, or of the training steps they are in."""
    here = out.resolve()
    folders = {folder for file in plan.sources for folder in (Path(file).parent.resolve(), Path(file).resolve().parent)}
    below = (folder.relative_to(here).as_posix() for folder in folders if folder.is_relative_to(here))
    return any(_OWN_FOLDER.fullmatch(path) for path in below)


def free_space(out: Path) -> int:
    """Bytes free where `out` is, or will be."""
    return shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free


def peak_memory(plan: CheckpointPlan, options: WriteOptions) -> int:
    """Bytes that running a plan takes at most: this process as large as it has been until now, and its threads."""
    return high_water() + options.share(plan.tensors).nbytes


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
    share: Share,
) -> None:
    """Write some shards, and leave a record of each; `total` is for the progress."""
    tensors = [tensor for shard in shards for tensor, _ in shard.tensors]
    resolved = resolve(tensors, reader, max(1, share.prepass), allow_nonfinite=options.allow_nonfinite)
    open_files: list[ShardFile] = []
    cached = fits_in_cache(plan.nbytes)

    def work_items() -> Iterator[_Block]:
        for shard in shards:
            statistics = resolved.named([tensor for tensor, _ in shard.tensors])
            file = ShardFile(shard, workspace, statistics, digest=options.digest, cached=cached)
            open_files.append(file)
            for tensor, at in shard.tensors:
                for index, (start, stop) in enumerate(blocks(tensor.numel)):
                    yield _Block(file, tensor, index, start, stop, at + start * tensor.dtype.itemsize)
            file.release()

    def work(block: _Block) -> None:
        data = stream(
            block.tensor,
            block.start,
            block.stop,
            reader=reader,
            resolved=resolved,
            seed=plan.seed,
            stretch=share.stretch,
            allow_nonfinite=options.allow_nonfinite,
        )
        data = _checked(block, data) if options.finite else data
        with naming_errors(block.file.path):
            if options.digest:
                block.file.record(block.tensor.name, block.index, _write_hashed(block, data))
            elif options.finite:
                for _ in _written(block, data):
                    pass
            else:
                _write_plain(block, data, reader)
            block.file.release(block.at, block.nbytes)
        options.progress(block.nbytes, total)

    try:
        _run(work_items(), work, share.workers)
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
    return block_digest(_written(block, data))


def _checked(block: _Block, data: Iterator[memoryview]) -> Iterator[memoryview]:
    """Each chunk, if all its elements are finite."""
    at = block.start
    for chunk in data:
        found = first_nonfinite(chunk, block.tensor.dtype)
        if found is not None:
            index = np.unravel_index(at + found, block.tensor.shape or (1,))
            raise NotFinite(f"{block.tensor.name}{[*map(int, index)]} is NaN or infinite as {block.tensor.dtype}.")
        yield chunk
        at += len(chunk) // block.tensor.dtype.itemsize


def _written(block: _Block, data: Iterable[memoryview]) -> Iterator[memoryview]:
    """Each chunk, once it is in the file."""
    at = block.at
    for chunk in data:
        block.file.write(chunk, at)
        yield chunk
        at += len(chunk)


def _write_plain(block: _Block, data: Iterator[memoryview], reader: FileReader) -> None:
    """Put a block into its file without looking at bytes that do not change."""
    runs = copy_runs(block.tensor, block.start, block.stop)
    if runs is None:
        for _ in _written(block, data):
            pass
        return
    for view, at in runs:
        reader.copy_to(view, block.file.descriptor, block.at + at * view.dtype.itemsize)


@lru_cache(maxsize=16)
def _zero_digest(nbytes: int) -> bytes:
    return block_digest(zeros(nbytes))


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


def _is_done(plan: CheckpointPlan, files: Layout, out: Path, digest: bool) -> bool:
    """Whether the folder is the finished result of this very plan, made from the sources as they are now."""
    try:
        sizes = [(out / shard.filename).stat().st_size for shard in files.shards]
        finished = (out / files.loadable_file).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    if sizes != [shard.nbytes for shard in files.shards]:
        return False
    if any(os.stat(file).st_mtime_ns > finished for file in plan.sources):
        return False
    manifest = read_manifest(out)
    if manifest is None or manifest.get("plan") != plan.fingerprint() or (digest and not manifest.get("digest")):
        return False
    places = {tensor.name: shard.filename for shard in files.shards for tensor, _ in shard.tensors}
    return {name: entry["file"] for name, entry in manifest["tensors"].items()} == places


def _write_small_files(
    plan: CheckpointPlan, shards: Sequence[Shard], finished: Sequence[Finished], workspace: Workspace
) -> None:
    digests = {name: digest for record in finished for name, digest in record.digests.items()}
    statistics = {symbol: value for record in finished for symbol, value in record.statistics.items()}
    for name, content in plan.sidecars.items():
        workspace.write(name, content if isinstance(content, bytes) else Path(content).read_bytes())
    workspace.write("config.json", _json_bytes(plan.config))
    workspace.write(MANIFEST, _json_bytes(make_manifest(plan, shards, statistics, digests)))


def _make_loadable(files: Layout, workspace: Workspace) -> None:
    """Give the shards their names, and last of all put the file in place that makes the folder load."""
    out = workspace.out
    for shard in files.shards:
        path, partial = out / shard.filename, out / (shard.filename + PARTIAL)
        if shard.twin:
            path.unlink(missing_ok=True)  # a killed run may have made some
            os.link(os.path.realpath(shard.twin), path)
        elif partial.exists():  # a killed run may have renamed some
            partial.rename(path)
    if files.index:
        for folder in {folder for shard in files.shards for folder in (out / shard.filename).parents}:
            if folder == out or out in folder.parents:
                sync_folder(folder)
        workspace.write(*files.index)
    sync_folder(out)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
