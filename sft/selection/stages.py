# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a stage is, where it keeps what it found, and how it goes on after an interruption.

A stage judges the rows that the stages before it left. Its kernel is a pure function from an Arrow table to an Arrow
table of as many rows: the column `drop`, null or the reason why a row goes no further, and columns for later stages.
Kernels know nothing of files, processes or machines.

    OUT/stages/04-near-duplicates/00000-00007.parquet    a part: what the kernel made of piece 7 of file 0
    OUT/stages/04-near-duplicates/_stage.json            written last: settings, seed, digest, counts, versions, files

A part holds, beside the kernel's columns, the `position` of each row in the part of the same name of the first stage,
which alone holds the text. Parts depend on the files and the settings alone, so they are the same for any number of
workers. The digest of a stage covers its settings and the digest of the stage before it; a part carries it. What has
another digest was made by another command and is never mixed in.

After an interruption the parts that are there are kept; only the first stage reads its files again.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from threadpoolctl import threadpool_limits

from conversion.checkpoint.manifest import package_version, sample_digest
from sft import SFTError

_DIGEST = b"teleflm.digest"
_MARKER = "_stage.json"  # Parquet readers pass over files whose name begins so
_WAY_OUT = "--overwrite makes it anew, or give another OUT."

Kernel = Callable[[pa.Table], pa.Table]


class SelectionError(SFTError):
    """The selection refuses its input. The message is one line: what, where, and the way out."""


class Executor(Protocol):
    """Runs tasks somewhere; see [`sft.selection.executors`]."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The results in the order of the items, which are drawn as they are needed."""


@dataclass(frozen=True)
class Stage:
    """One step of a selection, before it runs.

    Args:
        name: of its folder.
        settings: everything that the outcome depends on besides the rows, as JSON.
        reads: columns of earlier stages that the kernel's input has.
        kernel: see above; it has to be picklable.
        whole: the kernel sees all rows in one table instead of one part at a time.
        in_process: the kernel runs part by part in this process, not in workers.
        fit: makes the kernel, from the `sample` rows with the smallest ids.
        sample_reads: columns that the sample has, if others than the kernel's input.
        sample_after: name of the stage that left the rows of which the sample is taken; the one before unless given.
        files, tables: of the first stage, which has no kernel: what it reads, and what yields the rows of a file in
            pieces, each a table with `drop`, `id`, `row` and perhaps more.
    """

    name: str
    settings: Mapping[str, Any]
    reads: tuple[str, ...] = ()
    kernel: Kernel | None = None
    whole: bool = False
    in_process: bool = False
    fit: Callable[[pa.Table], Kernel] | None = None
    sample: int = 0
    sample_reads: tuple[str, ...] = ()
    sample_after: str = ""
    files: tuple[str, ...] = ()
    tables: Callable[[str], Iterator[pa.Table]] | None = None


@dataclass(frozen=True)
class StageResult:
    """A stage that is done.

    Args:
        name: of the stage.
        rows_in, rows_out: rows it was given, and rows that go on.
        dropped: reason -> rows, most frequent first.
        seconds: it took; those of an earlier run if it was done already.
        parts: how many files it has.
    """

    name: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    seconds: float
    parts: int


class StageFiles:
    """What the stages of a selection left: each row in a part, each stage's columns in a part of its own.

    Args:
        folders: of the stages, in order.
        results: of those that are done.
    """

    def __init__(self, folders: Sequence[Path], results: Iterable[StageResult]) -> None:
        self.folders = list(folders)
        self.results = list(results)

    @classmethod
    def open(cls, folder: Path) -> "StageFiles":
        """Of a finished selection, by its folder `OUT/stages`."""
        folders = sorted(folder.glob("[0-9][0-9]-*"))
        return cls(folders, filter(None, map(_read_marker, folders)))

    def pieces(self, columns: Sequence[str], after: int | None = None) -> Iterator["Piece"]:
        """The rows that are left, part by part.

        Args:
            columns: of the stages up to there.
            after: number of the stage, from 0; the last one that is done unless given.
        """
        done = self.folders[: len(self.results) if after is None else after + 1]
        owners = _owners(done, columns)
        for part in sorted(done[-1].glob("*.parquet")):
            yield Piece(part, {column: folder / part.name for column, folder in owners.items()})

    def read(self, columns: Sequence[str], after: int | None = None) -> pa.Table:
        """Some columns of the rows that are left, with `part` (the name of their part) and `position`; see `pieces`."""
        tables = []
        for piece in self.pieces(columns, after):
            table = piece.read()
            names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(table), np.int32)), [piece.part.stem])
            tables.append(table.append_column("part", names))
        return pa.concat_tables(tables).unify_dictionaries()

    def read_sample(self, columns: Sequence[str], count: int, after: int | None = None) -> pa.Table:
        """As `read`, of the `count` rows with the smallest ids, in the order of the input."""
        rows = self.read(("id",), after)
        order = np.argsort(fixed_bytes(rows["id"]).view("S16").ravel(), kind="stable")[:count]
        chosen = rows.take(np.sort(order))
        tables = []
        for piece in self.pieces(columns, after):
            own = chosen.filter(pc.equal(chosen["part"], piece.part.stem))
            if len(own):
                table = piece.read()
                table = table.take(np.searchsorted(table["position"].to_numpy(), own["position"].to_numpy()))
                tables.append(table.append_column("part", own["part"]))
        return pa.concat_tables(tables)


class Workspace(StageFiles):
    """The folder of a selection.

    Args:
        folder: `OUT/stages`.
        stages: all of them, in order.
        seed: part of every digest.
        overwrite: make anew what another configuration made, and what builds on it.

    Raises:
        SelectionError: the folder holds stages of another configuration.
    """

    def __init__(self, folder: Path, stages: Sequence[Stage], seed: int, *, overwrite: bool = False) -> None:
        self.stages, self.seed = list(stages), seed
        super().__init__([folder / f"{n:02d}-{stage.name}" for n, stage in enumerate(stages, start=1)], [])
        self.digests: list[str] = []
        for stage in stages:
            before = self.digests[-1:]
            described = {"stage": stage.name, "seed": seed, "settings": stage.settings, "before": before}
            self.digests.append(make_digest(described))
        for number in range(len(stages)):
            try:
                self._check_stage(number)
            except SelectionError:
                if not overwrite:
                    raise
                for found in folder.glob("[0-9][0-9]-*"):
                    if int(found.name[:2]) > number:
                        shutil.rmtree(found)
                break

    def run(
        self,
        executor: Executor,
        notify: Callable[[str], None],
        after: Mapping[str, Callable[[StageFiles], None]] | None = None,
    ) -> list[StageResult]:
        """Run what is not done yet; stop early when no row is left.

        Args:
            executor: runs the tasks.
            notify: told a line for each stage.
            after: name of a stage -> what looks at its outcome before the next one begins, and may refuse it.
        """
        for number, stage in enumerate(self.stages[len(self.results) :], start=len(self.results)):
            result = _read_marker(self.folders[number]) or self._run_stage(number, executor)
            self.results.append(result)
            reasons = "".join(f", {count:,} {reason}" for reason, count in result.dropped.items())
            notify(f"{stage.name}: {result.rows_out:,} of {result.rows_in:,} rows, {result.seconds:.1f} s{reasons}")
            if not result.rows_out:
                break
            if after and stage.name in after:
                after[stage.name](self)
        return self.results

    def _run_stage(self, number: int, executor: Executor) -> StageResult:
        stage, folder = self.stages[number], self.folders[number]
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        # The order in which threads add up their sums would decide last bits, and so, now and then, a row.
        with threadpool_limits(None if stage.in_process else 1):
            total: Counter[str] = sum(self._count_tasks(number, executor), Counter())
        seconds = round(time.perf_counter() - started, 3)
        rows_out, dropped = total.pop(_KEPT, 0), dict(total.most_common())
        parts = len(list(folder.glob("*.parquet")))
        result = StageResult(stage.name, rows_out + sum(dropped.values()), rows_out, dropped, seconds, parts)
        _write_marker(folder, result, stage, self.seed, self.digests[number])
        return result

    def _count_tasks(self, number: int, executor: Executor) -> Iterable[Counter[str]]:
        """Run the tasks of a stage; each says how many rows it kept, and dropped for which reasons."""
        stage = self.stages[number]
        place: dict[str, Any] = {"folder": self.folders[number], "digest": self.digests[number]}
        if stage.tables:
            return executor.map(partial(_read_file, tables=stage.tables, **place), enumerate(stage.files))
        kernel = stage.fit(self._read_sample_of(stage)) if stage.fit else stage.kernel
        assert kernel is not None
        pieces = self.pieces(stage.reads)
        if stage.whole:
            return _run_whole(pieces, kernel=kernel, **place)
        run = map if stage.in_process else executor.map
        return run(partial(_run_part, kernel=kernel, **place), pieces)

    def _read_sample_of(self, stage: Stage) -> pa.Table:
        names = [each.name for each in self.stages]
        after = names.index(stage.sample_after) if stage.sample_after else None
        return self.read_sample(stage.sample_reads or stage.reads, stage.sample, after)

    def _check_stage(self, number: int) -> None:
        """Refuse what another configuration made; one that was interrupted made parts, and no marker."""
        folder, stage, digest = self.folders[number], self.stages[number], self.digests[number]
        for other in sorted(folder.parent.glob(f"{folder.name[:2]}-*")):
            if other != folder:
                raise SelectionError(f"{other}: of another configuration, which has here {stage.name}; {_WAY_OUT}")
        marker = _load_marker(folder)
        if marker and marker["digest"] != digest:
            there, here = (
                {"seed": s, **of} for s, of in ((marker["seed"], marker["settings"]), (self.seed, stage.settings))
            )
            differing = [key for key in here if there.get(key) != here[key]]
            values = "; ".join(f"{key} was {there.get(key)}, is {here[key]}" for key in differing)
            raise SelectionError(f"{folder}: of another configuration: {values or 'another version'}; {_WAY_OUT}")
        parts = sorted(folder.glob("*.parquet"))
        for part in parts:
            if (found := _part_digest(part)) != digest:
                raise SelectionError(f"{part}: of another configuration (digest {found}, not {digest}); {_WAY_OUT}")
        if marker and len(parts) != marker["parts"]:
            raise SelectionError(f"{folder}: has {len(parts)} parts, not {marker['parts']}; remove the folder.")
        written = marker["files"] if marker else {}
        for part in parts if marker else ():
            if written.get(part.name) != _identity(part):
                raise SelectionError(f"{part}: is not what was written there; {_WAY_OUT}")


@dataclass(frozen=True)
class Piece:
    """Where to find the rows of one part that are left.

    Args:
        part: of the last stage; names the rows.
        sources: column -> the part that holds it, of the last stage or of one before.
    """

    part: Path
    sources: dict[str, Path]

    def read(self) -> pa.Table:
        """The columns, and `position`, of the rows that are left."""
        own = [column for column, path in self.sources.items() if path == self.part]
        last = pq.read_table(self.part, columns=["position", "drop", *own], use_threads=False)
        last = last.filter(pc.is_null(last["drop"])).drop_columns("drop")
        positions = last["position"].to_numpy()
        for path in dict.fromkeys(path for path in self.sources.values() if path != self.part):
            columns = [column for column, source in self.sources.items() if source == path]
            earlier = pq.read_table(path, columns=["position", *columns], use_threads=False)
            at = np.searchsorted(earlier["position"].to_numpy(), positions)
            for column in columns:
                last = last.append_column(column, earlier[column].take(at))
        return last


# --- tasks ------------------------------------------------------------------------------------------------------------

_KEPT = ""  # counted beside the reasons


def _read_file(
    item: tuple[int, str], folder: Path, tables: Callable[[str], Iterator[pa.Table]], digest: str
) -> Counter[str]:
    number, file = item
    counts: Counter[str] = Counter()
    for piece, table in enumerate(tables(file)):
        positions = pa.array(np.arange(len(table), dtype=np.int32))
        part = folder / f"{number:05d}-{piece:05d}.parquet"
        counts += _write_part(table.append_column("position", positions), part, digest)
    return counts


def _run_part(piece: Piece, kernel: Kernel, folder: Path, digest: str) -> Counter[str]:
    part = folder / piece.part.name
    if part.exists():  # from before an interruption; its digest has been checked
        return _count(pq.read_table(part, columns=["drop"], use_threads=False))
    table = piece.read()
    return _write_part(kernel(table).append_column("position", table["position"]), part, digest)


def _run_whole(pieces: Iterator[Piece], kernel: Kernel, folder: Path, digest: str) -> Iterator[Counter[str]]:
    parts, tables = [], []
    for piece in pieces:
        parts.append(folder / piece.part.name)
        tables.append(piece.read())
    made = kernel(pa.concat_tables([table.drop_columns("position") for table in tables]))
    start = 0
    for part, table in zip(parts, tables, strict=True):
        rows = made.slice(start, len(table)).append_column("position", table["position"])
        start += len(table)
        yield _write_part(rows, part, digest)


def _write_part(table: pa.Table, part: Path, digest: str) -> Counter[str]:
    table = table.replace_schema_metadata({_DIGEST: digest.encode()})
    unfinished = part.with_suffix(f".{os.getpid()}.partial")
    pq.write_table(table, unfinished, compression="lz4", use_dictionary=["drop"], write_statistics=False)
    unfinished.replace(part)
    return _count(table)


def _part_digest(part: Path) -> str:
    try:
        return (pq.read_schema(part).metadata or {}).get(_DIGEST, b"none").decode()
    except (pa.ArrowException, OSError) as error:
        raise SelectionError(f"{part}: not a Parquet file, or a damaged one ({error}); remove it.") from error


def _identity(part: Path) -> dict[str, Any]:
    """What tells cheaply whether a part is still what was written: its size, and a digest of places spread over it."""
    return {"bytes": part.stat().st_size, "samples": sample_digest(part)}


def _count(table: pa.Table) -> Counter[str]:
    counts = table["drop"].combine_chunks().value_counts().to_pylist()
    return Counter({entry["values"] or _KEPT: entry["counts"] for entry in counts})


def _owners(folders: Sequence[Path], columns: Sequence[str]) -> dict[str, Path]:
    """Column -> the folder of the latest stage that made it."""
    owners = {}
    for folder in folders:
        parts = sorted(folder.glob("*.parquet"))
        names = pq.read_schema(parts[0]).names if parts else []
        owners.update({column: folder for column in columns if column in names})
    return owners


_FIELDS = {"digest", "seed", "settings", "files", *StageResult.__dataclass_fields__}


# --- markers ----------------------------------------------------------------------------------------------------------


def make_digest(value: Any) -> str:
    """A digest of something JSON can hold, and of this package's version."""
    text = json.dumps([package_version(), value], sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _load_marker(folder: Path) -> dict[str, Any] | None:
    """What `_stage.json` says, if the stage is done."""
    file = folder / _MARKER
    if not file.exists():
        return None
    try:
        marker = json.loads(file.read_text(encoding="utf-8"))
        if marker.keys() >= _FIELDS and isinstance(marker["files"], dict):
            return marker
    except (ValueError, AttributeError, RecursionError):
        pass
    raise SelectionError(f"{file}: damaged, or of an earlier version; remove its folder.")


def _read_marker(folder: Path) -> StageResult | None:
    marker = _load_marker(folder)
    return StageResult(**{name: marker[name] for name in StageResult.__dataclass_fields__}) if marker else None


def _write_marker(folder: Path, result: StageResult, stage: Stage, seed: int, digest: str) -> None:
    versions = {"teleflm": package_version(), "numpy": np.__version__, "pyarrow": pa.__version__}
    files = {part.name: _identity(part) for part in sorted(folder.glob("*.parquet"))}
    marker = {**asdict(result), "digest": digest, "seed": seed, "settings": stage.settings, "versions": versions}
    marker |= {"files": files}
    unfinished = folder / f"{_MARKER}.partial"
    unfinished.write_text(json.dumps(marker, indent=1, ensure_ascii=False), encoding="utf-8")
    unfinished.replace(folder / _MARKER)


def fixed_bytes(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of fixed-size binary as a `[rows, bytes]` array of uint8."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # of no chunks
        return np.empty((0, column.type.byte_width), np.uint8)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8, count=(array.offset + len(array)) * width)
    return data.reshape(-1, width)[array.offset :]


def drop_where(condition: np.ndarray, reason: str) -> pa.Array:
    """The column `drop`, for one reason."""
    return pc.if_else(pa.array(condition), reason, pa.scalar(None, pa.string()))


def drop_none(rows: int) -> pa.Array:
    """The column `drop` of a stage where all rows go on."""
    return pa.nulls(rows, pa.string())


__all__ = [
    "Executor",
    "Kernel",
    "Piece",
    "SelectionError",
    "Stage",
    "StageResult",
    "Workspace",
    "drop_none",
    "drop_where",
    "fixed_bytes",
    "make_digest",
]
