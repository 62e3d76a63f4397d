# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Running a job: the one place that writes checkpoints.

Blocks of all tensors are made by a few threads (reading, hashing, casting and writing release the interpreter lock) and
written where the header says they belong; bytes that do not change are moved inside the kernel. Memory is
a few MB a worker, whatever the model. Shards are independent, so the ranks of any launcher each take some. What is
finished is journalled (`workspace.py`), and the file that makes the folder loadable comes last, so a folder that loads
is complete.
"""

import gc
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from .assemble import blocks, copy_runs, is_zero, resolve, source_spans, stream, zeros
from .budget import Share, reading_threads, share_out
from .containers import Layout, Shard, safetensors_layout
from .errors import CheckpointError, CorruptData, ImpossibleState, NotFinite
from .finish import finish, write_missing
from .folder_formats import is_state, known_files
from .job import Finished, Job
from .limits import DEFAULT_MEMORY, default_workers, high_water
from .manifest import block_digest
from .numbers import parse_size
from .parent import parent_notes
from .plan import CheckpointPlan, RowScales, TensorPlan, View
from .preflight import PARTIAL, Decision, Done, Refused, Resume, listed, preflight
from .promises import foresee_verification, verify_sources
from .ranks import Ranks
from .reader import FileReader, read_chunks
from .rounding import first_negative, first_nonfinite
from .sizes import format_bytes
from .sources import link_notes
from .workspace import (
    ShardFile,
    Workspace,
    fits_in_cache,
    forget_run,
    is_locked,
    missing_bytes,
    naming_errors,
    unwritten_bytes,
)

_AHEAD = 8  # blocks a worker, that the system is told of before they are read
_NO_STATE = "no optimizer goes on from that (--allow-nonfinite is for weights): leave --optimizer out"
_NOTES = (".done", ".journal")  # of a shard, in the working folder


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
        world_size: how many there are. Shard i is written by rank i modulo world_size; rank 0 waits for the others,
            and its `progress` is that of all.
        patience: seconds without a sign of life after which another rank counts as gone.
        ranks: what this rank and the others know of each other; given by who wants them to know of a failure that
            comes before anything is written.
        finite: refuse to write a NaN or an infinity.
        memory: what all threads may hold together, beside the program itself: bytes, or text such as `256MB`. Fewer
            threads run than asked for where it does not suffice for all; the output's bytes do not depend on it.
        allow_nonfinite: write what is too large for a tensor's dtype as infinity, which is an error else; of weights
            alone, as no optimizer goes on from a state that is not finite.
        verify_source: check what the source's files promise of their bytes first, see `promises.py`; rank 0 does.
        verify_progress: as `progress`, of that.
    """

    max_shard_size: str | int = "5GB"
    workers: int = field(default_factory=default_workers)
    digest: bool = True
    overwrite: bool = False
    progress: Callable[[int, int], None] = lambda nbytes, total: None
    rank: int = 0
    world_size: int = 1
    patience: float = 120.0
    ranks: Ranks | None = None
    finite: bool = False
    memory: str | int = DEFAULT_MEMORY
    allow_nonfinite: bool = False
    verify_source: bool = False
    verify_progress: Callable[[int, int], None] = lambda nbytes, total: None

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
    """A finished checkpoint.

    Args:
        folder: where it is.
        files: its weight files.
        nbytes: bytes of its tensors.
        already_done: whether it was there already.
        restored: small files that were missing from it or had been changed, and were written again.
        replaced: those of them that had been changed.
    """

    folder: Path
    files: tuple[str, ...]
    nbytes: int
    already_done: bool = False
    restored: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Foreseen:
    """What writing a checkpoint would meet.

    Args:
        decision: what would be done in the folder, after what would be removed from it.
        refused: whether it would be refused.
        need: bytes that the disk must still have room for.
        free: bytes that would be free for them.
        notes: what a user should know, one sentence each.
        left: bytes that would still be written; more than `need` where their place on the disk is taken already.
    """

    decision: Decision
    refused: bool
    need: int
    free: int
    notes: list[str]
    left: int = 0


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint that was planned and, unless it was a dry run, written.

    Args:
        plan: the whole output, tensor by tensor.
        shards: its files.
        notes: what a user should know, one sentence each.
        written: the output; None after a dry run.
        foreseen: what writing it would meet; None unless it was a dry run.
    """

    plan: CheckpointPlan
    shards: list[Shard]
    notes: list[str]
    written: Written | None
    foreseen: Foreseen | None = field(default=None, kw_only=True)


def execute(
    plan: CheckpointPlan,
    out: Path,
    options: WriteOptions,
    notes: Sequence[str] = (),
    *,
    dry_run: bool = False,
    layout: Layout | None = None,
    recorded: Mapping[str, View] | None = None,
    states: Sequence[Shard] = (),
) -> CheckpointResult:
    """Write a checkpoint, or, in a dry run, only say what that would meet.

    Args:
        plan: what to write.
        out: the folder.
        options: see `WriteOptions`.
        notes: what a user should know of the plan, one sentence each.
        dry_run: plan and check everything, write nothing.
        layout: the output's files; a Hub folder of safetensors unless given.
        recorded: see `find_promises`.
        states: files of state of that Hub folder; the plan has their tensors too.

    Raises:
        PlanError, CheckpointError, OSError: see `run_job`.
        CorruptData: the source is not what it promises; nothing was written.
    """
    job = make_job(plan, options, layout, states)
    shards = [*job.layout.shards]
    notes = [*notes, *parent_notes(plan.lineage), *_links(plan)]
    if dry_run:
        options.share(plan.tensors)
        notes = [*notes, *(foresee_verification(plan, recorded or {}) if options.verify_source else [])]
        foreseen = foresee(job, out, options)
        return CheckpointResult(plan, shards, [*notes, *foreseen.notes], None, foreseen=foreseen)
    if options.verify_source and options.rank == 0:  # which alone makes the output loadable
        threads = reading_threads(options.workers, parse_size(options.memory))
        notes = [*notes, *verify_sources(plan, recorded or {}, threads, options.verify_progress)]
    written = run_job(job, out, options)
    was = {name: "had been changed" if name in written.replaced else "was missing" for name in written.restored}
    restored = [f"{name} {state} and was written again." for name, state in was.items()]
    return CheckpointResult(plan, shards, [*notes, *restored, *_left_states(job, out)], written)


def _links(plan: CheckpointPlan) -> list[str]:
    names = [source.name for source in plan.sources]
    states = [name for name in names if is_state(Path(name).name)]
    weights = [name for name in names if name not in states]
    return [*link_notes(weights), *link_notes(states, "The optimizer's state was", "its")]


def _left_states(job: Job, out: Path, removed: Sequence[str] = ()) -> list[str]:
    """Notes on what training would load with the weights, and somebody else has put there: it is theirs, and stays."""
    names = known_files(out) if out.is_dir() else ()
    ours = (*job.weights, *job.small_contents, *removed)
    left = [name for name in names if is_state(name) and name not in ours]
    places = dict.fromkeys(Path(name).parts[0] for name in left)
    return [
        f"{out / place} is not of this checkpoint and stays; "
        + ("`teleflm train` refuses to begin beside it" if place in left else "training may load it with the weights")
        + ": move it away."
        for place in places
    ]


def write_checkpoint(plan: CheckpointPlan, out: Path, options: WriteOptions, layout: Layout | None = None) -> Written:
    """Execute a plan into a folder: `run_job` of `make_job`."""
    return run_job(make_job(plan, options, layout), out, options)


def make_job(
    plan: CheckpointPlan,
    options: WriteOptions,
    layout: Layout | None = None,
    states: Sequence[Shard] = (),
) -> Job:
    """Everything that decides what will be written, checked to add up.

    Args:
        plan: what to write.
        options: how.
        layout: the output's files; a Hub folder of safetensors unless given.
        states: files of state of that Hub folder; the plan has their tensors too.

    Raises:
        PlanError: the plan does not tile its output.
        CheckpointError: a source or a file beside it cannot be read, or no such file can be written.
    """
    plan.check()
    cut = {} if layout else {"max_shard_size": options.shard_bytes}
    files = layout or _hub_layout(plan, states, options.shard_bytes)
    promises = {"digest": options.digest, "finite": options.finite, "no_overflow": not options.allow_nonfinite}
    job = Job.of(plan, files, **promises, **cut)
    job.check()
    return job


def _hub_layout(plan: CheckpointPlan, states: Sequence[Shard], shard_bytes: int) -> Layout:
    """A Hub folder of safetensors, and some files of state."""
    elsewhere = {tensor.name for shard in states for tensor, _ in shard.tensors}
    layout = safetensors_layout([tensor for tensor in plan.tensors if tensor.name not in elsewhere], shard_bytes)
    return replace(layout, shards=(*layout.shards, *states))


def run_job(job: Job, out: Path, options: WriteOptions) -> Written:
    """Write a job's output, or finish what an interrupted call of the same left there.

    Ranks that were not told of each other before, see `WriteOptions.ranks`, are here.

    Args:
        job: what to write.
        out: the folder: new, without anything that would be replaced or loaded with it, holding this very output or an
            interrupted run of it, unless `overwrite` is set.
        options: see `WriteOptions`.

    Raises:
        CheckpointError: the folder cannot be used, the memory is too little, or a source cannot be read.
        Overflow: a value is too large for the dtype that it is written in.
        OSError: the disk fails or is too small; the folder is then not loadable, and the same call resumes.
    """
    if options.ranks is None:
        with Ranks(out, options.rank, options.world_size, patience=options.patience) as ranks:
            return run_job(job, out, replace(options, ranks=ranks))
    ranks = options.ranks
    share = options.share(job.plan.tensors)
    shards = [shard for shard in job.layout.shards if shard.twin is None]
    written = Written(out, tuple(job.weights), job.plan.nbytes)
    decision = preflight(job, out)
    if isinstance(decision, Refused) and (decision.removes is None or not options.overwrite):
        raise CheckpointError(decision.reason)
    if decision == Done():
        forget_run(out)  # of a run that was killed on its last step
        return replace(written, already_done=True)
    out.mkdir(parents=True, exist_ok=True)
    whole = _tensor_bytes(shards)
    if options.rank == 0:
        ranks.watch_progress(lambda nbytes: options.progress(nbytes, whole))
    with Workspace(job, out, ranks, options.overwrite) as workspace, FileReader() as reader:
        mine = shards[options.rank :: options.world_size]
        todo = [shard for shard in mine if workspace.finished(shard) is None]
        done = workspace.done()  # asked after looking at the records, which go when all is done
        if done:
            if done.missing and options.rank == 0:
                write_missing(job, done.missing, workspace)
                workspace.remove()
            removed = decision.removes if isinstance(decision, Refused) and decision.removes else ()
            replaced = tuple(name for name in done.missing if name in removed)
            return replace(written, already_done=True, restored=done.missing, replaced=replaced)
        workspace.require_space(todo)
        total = whole if options.rank == 0 else _tensor_bytes(mine)

        def advance(nbytes: int) -> None:
            ranks.check()
            ranks.advance(nbytes)
            options.progress(nbytes, total)

        advance(_tensor_bytes(mine) - _tensor_bytes(todo))
        write_shards(job.plan, todo, advance, workspace, reader, options, share)
        if options.rank == 0:
            finished = [workspace.wait_for(shard, i % options.world_size) for i, shard in enumerate(shards)]
            ranks.settle(whole - _tensor_bytes(mine))
            workspace.check_sources()
            finish(job, finished, workspace)
            workspace.remove()
    return written


def write_and_ship(
    job: Job,
    work: Path,
    options: WriteOptions,
    shipped: Mapping[str, Finished],
    ship: Callable[[Shard, Path, Finished], None],
    in_flight: int,
) -> list[Finished]:
    """Write a job's shards one after another in a working folder, and ship each from there, so that few lie on disk.

    Args:
        job: what to write; each of its shards is made, none is a link.
        work: the working folder. What a killed call left there is gone on with.
        options: see `WriteOptions`; one process does it all.
        shipped: records of the shards that earlier calls have shipped.
        ship: takes a finished shard away: called in another thread with its layout, its file, which is removed
            afterwards, and its record. It has to be durable.
        in_flight: how many shards may lie in `work` at once, the one that is written among them.

    Returns:
        The record of each shard, in order.

    Raises:
        CheckpointError, CorruptData, OSError: see `run_job`; whatever `ship` raises.
    """
    share = options.share(job.plan.tensors)
    shards, records = list(job.layout.shards), dict(shipped)
    total, todo = _tensor_bytes(shards), [shard for shard in shards if shard.filename not in records]
    work.mkdir(parents=True, exist_ok=True)
    with (
        Ranks(work, 0, 1, patience=options.patience) as ranks,
        Workspace(job, work, ranks, options.overwrite) as workspace,
        FileReader() as reader,
        ThreadPoolExecutor(in_flight) as shipping,
    ):
        workspace.require_space(todo[:in_flight])
        options.progress(total - _tensor_bytes(todo), total)
        pending: deque[Future[None]] = deque()

        def take_away(shard: Shard, finished: Finished) -> None:
            ship(shard, work / (shard.filename + PARTIAL), finished)
            for path in (work / (shard.filename + PARTIAL), *(workspace.beside(shard, end) for end in _NOTES)):
                path.unlink(missing_ok=True)

        for shard in todo:
            while len(pending) >= in_flight or (pending and pending[0].done()):
                pending.popleft().result()
            if workspace.finished(shard) is None:
                write_shards(
                    job.plan, [shard], lambda nbytes: options.progress(nbytes, total), workspace, reader, options, share
                )
            finished = workspace.finished(shard)
            if finished is None:
                raise CorruptData(f"{work}: {shard.filename} was changed while this run wrote; start over.")
            records[shard.filename] = finished
            pending.append(shipping.submit(take_away, shard, finished))
        for future in pending:
            future.result()
        workspace.check_sources()
    return [records[shard.filename] for shard in shards]


def foresee(job: Job, out: Path, options: WriteOptions) -> Foreseen:
    """What `run_job` would meet in a folder; nothing is touched. For a dry run."""
    decision = preflight(job, out)
    room = sum(shard.disk_bytes for shard in job.layout.shards)
    free = free_space(out)
    if is_locked(out):
        return Foreseen(decision, True, room, free, [f"It would be refused: another run is writing to {out}."])
    notes = _left_states(job, out, decision.removes or () if isinstance(decision, Refused) else ())
    if isinstance(decision, Refused):
        if decision.removes is None or not options.overwrite:
            return Foreseen(decision, True, room, free, [f"It would be refused: {decision.reason}"])
        notes.append(f"It would be removed from {out}: {listed(decision.removes)}.")
        free += sum(_freed(out / name) for name in decision.removes)
        decision = decision.then
    match decision:
        case Done(missing):
            written = [f"{name} would be written again." for name in missing]
            return Foreseen(decision, False, 0, free, [*notes, f"{out} is already done.", *written])
        case Resume():
            need = sum(missing_bytes(out, shard) for shard in job.layout.shards)
            unwritten = sum(unwritten_bytes(out, shard) for shard in job.layout.shards)
            there = f"{format_bytes(room - unwritten)} of {format_bytes(room)} are written"
            notes.append(f"{out} holds an interrupted run of this, which would be resumed: {there}.")
        case _:
            need = unwritten = room
    if need > free:
        notes.append(f"It would be refused: {need / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free.")
    return Foreseen(decision, need > free, need, free, notes, unwritten)


def _freed(path: Path) -> int:
    """Bytes that removing a file gives back to the disk: none where it is a link, or another name has the bytes."""
    status = path.lstat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") and status.st_nlink == 1 else 0


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


def write_shards(
    plan: CheckpointPlan,
    shards: Sequence[Shard],
    advance: Callable[[int], None],
    workspace: Workspace,
    reader: FileReader,
    options: WriteOptions,
    share: Share,
) -> None:
    """Write some shards, and leave a record of each; `advance` is told the bytes of each block."""
    tensors = [tensor for shard in shards for tensor, _ in shard.tensors]
    resolved = resolve(tensors, reader, max(1, share.prepass), allow_nonfinite=options.allow_nonfinite)
    open_files: list[ShardFile] = []
    cached = fits_in_cache(plan.nbytes)

    announced = _announce(shards, reader, _AHEAD * share.workers)

    def work_items() -> Iterator[_Block]:
        for shard in shards:
            statistics = resolved.named([tensor for tensor, _ in shard.tensors])
            file = ShardFile(shard, workspace, statistics, digest=options.digest, cached=cached)
            open_files.append(file)
            for tensor, at in _in_order(shard):
                for index, (start, stop) in enumerate(blocks(tensor.numel)):
                    next(announced, None)
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
        looks = options.finite or block.file.is_state  # a moment that is no number is found by no loss until too late
        data = _checked(block, data) if looks else data
        with naming_errors(block.file.path):
            if options.digest:
                block.file.record(block.tensor.name, block.index, _write_hashed(block, data))
            elif looks:
                for _ in _written(block, data):
                    pass
            else:
                _write_plain(block, data, reader)
            block.file.release(block.at, block.nbytes)
        advance(block.nbytes)

    try:
        with _without_old_garbage():
            _run(work_items(), work, share.workers)
    finally:
        for file in open_files:
            file.close()


@contextmanager
def _without_old_garbage() -> Iterator[None]:
    """Keep the collector from what exists already: a large plan, which it looked through again and again for nothing.

    Whoever has frozen something himself (`gc.freeze`) keeps it so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _in_order(shard: Shard) -> list[tuple[TensorPlan, int]]:
    """The tensors of a shard in the order in which they are made: scales after the rows in which they are found."""
    return sorted(shard.tensors, key=lambda placed: any(isinstance(piece, RowScales) for piece in placed[0].pieces))


def _announce(shards: Sequence[Shard], reader: FileReader, ahead: int) -> Iterator[None]:
    """At each step, tell the system what one more block will read; at the first, what the next `ahead` will.

    Threads that read at their own places of one file look like chance to the system, and it fetches nothing in advance:
    a third of the time of a growth from a cold cache was waiting for the disk.
    """
    every = ((tensor, *block) for shard in shards for tensor, _ in _in_order(shard) for block in blocks(tensor.numel))
    for number, (tensor, start, stop) in enumerate(every):
        for span in source_spans(tensor, start, stop):
            reader.announce(*span)
        if number >= ahead:
            yield


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
    """Each chunk, if all its elements are finite, and none is negative where none may be."""
    tensor, at = block.tensor, block.start
    for chunk in data:
        found = first_nonfinite(chunk, tensor.dtype.numpy) if tensor.dtype.is_floating else None
        if found is not None:
            said = f"{_element(tensor, at + found)} is NaN or infinite as {tensor.dtype}"
            if block.file.is_state:
                raise ImpossibleState(f"{said}; {_NO_STATE}.")
            raise NotFinite(f"{said}.")
        if tensor.nonnegative:
            found = first_negative(chunk, tensor.dtype.numpy)
            if found is not None:
                value = float(np.frombuffer(chunk, tensor.dtype.numpy)[found])
                said = f"{_element(tensor, at + found)} is {value:.9g}, and a mean of squares is not negative"
                raise ImpossibleState(f"{said}; {_NO_STATE}.")
        yield chunk
        at += len(chunk) // tensor.dtype.itemsize


def _element(tensor: TensorPlan, at: int) -> str:
    """A tensor's name with the index of one of its elements."""
    return f"{tensor.name}{[*map(int, np.unravel_index(at, tensor.shape or (1,)))]}"


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
