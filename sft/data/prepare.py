# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tokenize conversations once, to disk, and train from there as often as wanted.

The folder is a dataset of the `datasets` library (`load_from_disk` opens it). Beside it, `rows.arrow` has a digest of
each conversation and of its first question, by which rows are held out and counted, and `prepared.json` says of what
all was made: the digest of the conversations, of the tokenizer and of the chat template, and the labelling. Training
opens it only if the tokenizer, the template and the labelling of the run are those, and every byte is what was written.

Rows are tokenized in parts of 1,024, which are files of their own until all are there; so several processes can share
the work, and one that was killed goes on. What comes out does not depend on how many there were: each reads and judges
all rows, which is little beside tokenizing, so that ids that repeat are found wherever they stand.

One command at a time writes a folder: a lock beside it says so. As locks can be lost, what is in the folder does not
depend on that: the parts of each job, which is what they are made of, are in a folder of its own, and each says which.
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import is_edited, package_version
from conversion.checkpoint.manifest import seal as with_checksum
from conversion.checkpoint.ranks import Ranks
from sft.data.checks import Conversation, Reject, check_rows
from sft.data.formats import DataError, Problem, Progress, Row, UnreadableError
from sft.data.holdout import digest_question
from sft.data.labels import (
    DataReport,
    Labelling,
    SourceReport,
    Tally,
    Tokenized,
    digest_conversation,
    require_rows,
    tokenize_checked,
)
from sft.data.locks import Held, Lock, hold
from sft.data.sources import Content, as_places, digest_file, is_local, is_unreadable, pin, read_content
from sft.tokenizer import control_tokens, require_fixed_template, tokenizer_digest

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PREPARED = "prepared.json"
ROWS = "rows.arrow"
# What `datasets` writes, and caches of later steps beside it.
_OURS = re.compile(
    r"prepared\.json|rows\.arrow|dataset_info\.json|state\.json|(data-\d+-of-\d+|cache-\w+)\.arrow|tmp\w+"
)
_LAYOUT = 1  # of the folder; another number is another fingerprint of the work, so that nothing of it is used again
_PART_ROWS = 1024
_SHARD_BYTES = 1 << 28
_BATCH = 256
_PATIENCE = 120.0
_LOCK_PATIENCE = 60.0
_JOB = "job.json"
_WHOLE = "whole-"


class DiskFull(DataError):
    """There is no room for what is tokenized."""


@dataclass(frozen=True)
class Prepared:
    """What [`prepare`] wrote.

    Args:
        folder: where.
        fingerprint: of the conversations, tokenizer, chat template and labelling; equal if and only if all are.
        report: what became of the rows.
    """

    folder: str
    fingerprint: str
    report: DataReport


def prepare(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    *,
    allow_rejects: bool = False,
    overwrite: bool = False,
    num_proc: int | None = None,
    progress: Progress | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Prepared:
    """Tokenize conversations and write them as a dataset, with bounded memory.

    Killed, it goes on when it is called again. Several processes, on machines that see the same files, share the work
    if each is told its rank; each returns when all is written.

    Args:
        data: see [`sft.data.formats.read_rows`].
        out: the folder to write; it appears when all is in it.
        tokenizer, labelling, num_proc, progress: see [`sft.data.labels.tokenize_rows`].
        allow_rejects: leave invalid rows out instead of raising.
        overwrite: replace a prepared folder; no other folder is ever replaced, nor a file of anybody else in it.
        rank, world_size: which of how many processes that share the work this is.

    Raises:
        DataError: the folder exists, or another command writes it; a file cannot be read, or changed while it was;
            there are invalid rows and they are not allowed; no row is left; another rank failed.
    """
    out = Path(out)
    places = tuple(pin(place) for place in as_places(data))
    content = read_content(places)
    job = describe_job(content, tokenizer, labelling)
    parts = _parts_folder(out, job)

    def is_done() -> bool:
        return not parts.exists() and (_read_record(out) or {}).get("job") == job

    if rank and is_done():
        return _prepared(out, _read_record(out) or {})  # the others were quicker
    _refuse_obstacle(out, overwrite=overwrite)
    with ExitStack() as stack:
        lock = None if rank else stack.enter_context(_alone(out, job, world_size))
        try:
            with Ranks(_ranks_of(out, job), rank, world_size, patience=_PATIENCE) as ranks:
                if rank == 0:
                    _refuse_obstacle(out, overwrite=overwrite)  # now that no other command is about to make one
                    _claim(out, parts, job)
                ranks.wait(lambda: _job_of(parts) == job or (rank > 0 and is_done()), [0], f"the folder {parts}")
                if rank and is_done():  # there was nothing to do for who comes late
                    return _prepared(out, _read_record(out) or {})
                count = write_parts(
                    content,
                    parts,
                    tokenizer,
                    labelling,
                    job,
                    num_proc=num_proc,
                    progress=progress,
                    rank=rank,
                    world=world_size,
                )
                if lock:
                    for number in range(count):
                        record = _part_record(parts, number)
                        ranks.wait(record.is_file, [number % world_size], f"part {number} of {count}")
                    _join_into(
                        out, parts, count, places, tokenizer, labelling, job, lock, allow_rejects, overwrite=overwrite
                    )
                else:
                    ranks.wait(is_done, [0], str(out))
        except CheckpointError as error:
            raise DataError(str(error)) from error
        except FileNotFoundError as error:
            if parts.is_dir():
                raise
            raise DataError(_taken_over(out)) from error
        except DataError as error:
            if lock and lock.is_mine() and world_size == 1 and not isinstance(error, DiskFull):
                _remove_parts(parts)  # of a full disk, what can be gone on with stays
            raise
    return _prepared(out, _read_record(out) or {})


@contextmanager
def _alone(out: Path, job: str, world_size: int) -> Iterator[Lock]:
    """The lock of the folder; a command that writes it while another does is refused."""
    here = out.absolute()
    here.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hold(here.with_name(f".{here.name}.lock"), job, _LOCK_PATIENCE) as lock:
            yield lock
    except Held as error:
        refusal = DataError(
            f"{out} is being written by process {error.owner.get('pid')} on {error.owner.get('host')}; wait until it "
            "ends, or choose another folder."
        )
        if error.owner.get("about") == job:  # its ranks have the files by which those of this command would hear of it
            raise refusal from error
        with Ranks(_ranks_of(out, job), 0, world_size, patience=_PATIENCE):
            raise refusal from error


def _taken_over(out: Path) -> str:
    return (
        f"{out}: another command has begun to write it, since this one gave no sign of life for "
        f"{_LOCK_PATIENCE:.0f} s; nothing of this one is in it. Run it again when the other has ended."
    )


def _ranks_of(out: Path, job: str) -> Path:
    """What the ranks of this job name their files by: those of another command do not know of them."""
    return out.absolute().with_name(f"{out.absolute().name}.{job[:16]}")


def _parts_folder(out: Path, job: str) -> Path:
    here = out.absolute()
    return here.with_name(f".{here.name}.{job[:16]}.parts")


def _remove_parts(parts: Path) -> None:
    if _job_of(parts) is not None:
        shutil.rmtree(parts, ignore_errors=True)


def _claim(out: Path, parts: Path, job: str) -> None:
    """Have a folder for the parts of this job; those of other jobs go, which were killed, as the lock is ours."""
    ours = re.compile(rf"\.{re.escape(out.absolute().name)}\.[0-9a-f]{{16}}\.parts")
    for other in parts.parent.iterdir():
        if other != parts and ours.fullmatch(other.name):
            _remove_parts(other)
    if parts.exists() and _job_of(parts) != job and (not parts.is_dir() or any(parts.iterdir())):
        raise DataError(f"{parts} is where parts are written, and it holds something else; move it away.")
    for whole in parts.glob(f"{_WHOLE}*"):
        shutil.rmtree(whole, ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    if _job_of(parts) != job:
        _write_json(parts / _JOB, {"job": job})


def _job_of(parts: Path) -> str | None:
    try:
        found = json.loads((parts / _JOB).read_bytes())
        return str(found["job"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _join_into(
    out: Path,
    parts: Path,
    count: int,
    places: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    job: str,
    lock: Lock,
    allow_rejects: bool,
    *,
    overwrite: bool,
) -> None:
    """Make the folder of its parts, which go in any case: with it, or because they are refused."""
    whole = parts / f"{_WHOLE}{uuid.uuid4().hex}"
    try:
        report = join_parts(parts, count, whole, places, tokenizer, labelling, job)
        require_rows(report, places, labelling, allow_rejects)
        if not lock.is_mine():
            raise DataError(_taken_over(out))
        _refuse_obstacle(out, overwrite=overwrite)
    except DiskFull:
        raise
    except DataError:
        if lock.is_mine():
            _remove_parts(parts)
        raise
    if out.exists():
        shutil.rmtree(out)
    whole.rename(out)
    shutil.rmtree(parts)


def _prepared(out: Path, record: dict[str, Any]) -> Prepared:
    return Prepared(str(out), record["fingerprint"], _report_from(record["report"]))


def describe_job(content: Content, tokenizer: "PreTrainedTokenizerBase", labelling: Labelling) -> str:
    """A digest of all that decides what comes out of tokenizing: content, tokenizer, template, labelling, and the code.

    Args:
        content: of what is tokenized; what is read later counts as of it only if it did not change meanwhile.

    Raises:
        TokenizerError: the chat template renders another text each time.
    """
    require_fixed_template(tokenizer)
    return _fingerprint(
        {"content": content.digest, "code": _digest_code(), "layout": _LAYOUT, **_made_of(tokenizer, labelling)}
    )


def _digest_code() -> str:
    """Of the modules and packages that decide the tokens: a version in development has the number of the last one."""
    from importlib.metadata import PackageNotFoundError, version

    import xxhash

    digest = xxhash.xxh3_128()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for name in ("transformers", "tokenizers", "sentencepiece", "jinja2"):
        with suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name)}".encode())
    return digest.hexdigest()


# --- parts ------------------------------------------------------------------------------------------------------------


def write_parts(
    content: Content,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    job: str,
    *,
    num_proc: int | None = None,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Tokenize this rank's parts of the rows, but those that are there; returns how many parts there are in all.

    A part is there only if no file has changed since before the digest that the parts are named by: what was read is
    what was digested, of the parts of a process that is killed too. At the end every byte is digested again.

    Raises:
        DataError: see [`sft.data.labels.tokenize_rows`]; a file changed while it was read; or the disk is full: how
            much was written, and of what share.
    """
    read = 0
    seen = [0, 0]  # bytes of the files

    def watch(done: int, total: int) -> None:
        seen[0], seen[1] = seen[0] + done, total
        if progress:
            progress(done, total)

    def mine() -> Iterator[tuple[Row, Conversation | Reject]]:
        nonlocal read
        have: dict[int, bool] = {}
        for row, outcome in check_rows(
            list(content.places),
            control_tokens(tokenizer, labelling.sanitize_control_tokens),
            watch,
            opened=content.require_opened,
        ):
            number = read // _PART_ROWS
            read += 1
            if number % world == rank:
                if number not in have:
                    have.clear()
                    have[number] = _is_part(folder, number, job)
                if not have[number]:
                    todo[number] = todo.get(number, 0) + 1
                    yield row, outcome

    todo: dict[int, int] = {}  # part -> rows of it that went to be tokenized; all, once the next part has begun
    outcomes = tokenize_checked(mine(), tokenizer, labelling, num_proc)
    try:
        while (first := next(outcomes, None)) is not None:
            number = min(todo)
            part = [first, *islice(outcomes, _PART_ROWS - 1)]
            content.require_same()
            _write_part(folder, number, part, content.places, job)
            del todo[number]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(_full_disk(folder, read, seen, error)) from error
    content.require_same_bytes()
    return -(-read // _PART_ROWS)


def _full_disk(folder: Path, rows: int, seen: Sequence[int], error: OSError) -> str:
    """How much was written and is needed, as far as the share of the rows that were read tells it."""
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = f"{folder.parent}: {error.strerror} after {written:,} bytes of the tokens of {rows:,} rows"
    if seen[0] and seen[1]:
        text += f"; the file that was being read alone needs about {2 * written * seen[1] // seen[0]:,} bytes"
    return f"{text}. Give a folder on a larger disk, with dataset_cache_dir in a recipe."


def _part_record(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.json"


def _is_part(folder: Path, number: int, job: str) -> bool:
    """Whether a part of this job is there, and is what was written."""
    try:
        record = json.loads(_part_record(folder, number).read_bytes())
        return record["job"] == job and bool(digest_file(folder / f"part-{number:06}.arrow") == record["digest"])
    except (OSError, ValueError, LookupError, TypeError, DataError):
        return False


def _write_part(
    folder: Path, number: int, outcomes: Sequence[tuple[Row, Tokenized | Reject]], places: Sequence[str], job: str
) -> None:
    """The arrays of a part, and what became of its rows; the second is written last, so it says that both are there."""
    import pyarrow as pa

    tally, rejects, path = Tally(), [], folder / f"part-{number:06}.arrow"
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    kept = []
    for row, outcome in outcomes:
        tally.add(outcome)
        if isinstance(outcome, Tokenized):
            kept.append(outcome)
        else:  # without the name, which a file that is read again may not have
            rejects.append([places.index(row.place), row.number, outcome.id, outcome.problems])
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, _part_schema()) as writer:
        for start in range(0, len(kept), _BATCH):
            writer.write_batch(_batch(kept[start : start + _BATCH]))
    digest = digest_file(partial)
    partial.replace(path)
    report = tally.report()
    counts = {"rows": report.rows, "truncated": report.truncated, "weighted": tally.weighted}
    record = {"job": job, "digest": digest, **counts}
    _write_json(_part_record(folder, number), {**record, "rejects": rejects})


def _part_schema() -> "pyarrow.Schema":
    import pyarrow as pa

    lists = {"input_ids": pa.int32(), "labels": pa.int32(), "weights": pa.float32()}
    return pa.schema([*((name, pa.list_(kind)) for name, kind in lists.items()), *_row_schema()])


def _row_schema() -> "pyarrow.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            ("digest", pa.binary(16)),
            ("question", pa.uint64()),
            ("tokens", pa.int32()),
            ("trained_tokens", pa.int32()),
            ("truncated", pa.bool_()),
        ]
    )


def _batch(rows: Sequence[Tokenized]) -> "pyarrow.RecordBatch":
    import pyarrow as pa

    schema = _part_schema()
    columns = [
        [row.input_ids for row in rows],
        [row.labels for row in rows],
        [row.weights for row in rows],
        [digest_conversation(row.conversation) for row in rows],
        [digest_question(row.conversation) for row in rows],
        [len(row.input_ids) for row in rows],
        [row.trained_tokens for row in rows],
        [row.truncated for row in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


# --- the folder -------------------------------------------------------------------------------------------------------


def join_parts(
    parts: Path,
    count: int,
    out: Path,
    places: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    job: str,
) -> DataReport:
    """Make a dataset of parts; parts and dataset are both on the disk for a while.

    Raises:
        DataError: a part is not what was written, or is of another job; there is no room for the dataset.
    """
    records = [json.loads(_part_record(parts, number).read_bytes()) for number in range(count)]
    if others := [number for number, record in enumerate(records) if record.get("job") != job]:
        raise DataError(f"{_part_record(parts, others[0])}: is of another job than this one; run it again.")
    files = [parts / f"part-{number:06}.arrow" for number in range(count)]
    if damaged := [path for path, record in zip(files, records, strict=True) if digest_file(path) != record["digest"]]:
        raise DataError(f"{damaged[0]}: is not what was written there; run it again.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(out).free
    if free < needed:
        raise DiskFull(f"{out.parent}: the tokens need {needed:,} bytes, and {free:,} are free; give a larger disk.")
    columns = ["input_ids", "labels", *(["weights"] if any(record["weighted"] for record in records) else [])]
    counts = _write_shards(files, out, columns)
    rejects = tuple(
        Reject(f"{places[place]}:{row}", name, tuple(Problem(*problem) for problem in problems))
        for record in records
        for place, row, name, problems in record["rejects"]
    )
    rows, truncated = (sum(record[key] for record in records) for key in ("rows", "truncated"))
    pinned = tuple(place for place in places if not is_local(place))
    report = DataReport(rows, rejects, truncated, *counts, pinned=pinned)
    made_of = _made_of(tokenizer, labelling)
    fingerprint = _fingerprint({"data": report.digest, **made_of})
    _write_state(out, fingerprint)
    record = {"teleflm": package_version(), "fingerprint": fingerprint, "job": job, "places": list(places), **made_of}
    record["report"] = asdict(report)
    seal(out, PREPARED, record)
    return report


def _write_shards(files: Iterable[Path], out: Path, columns: Sequence[str]) -> tuple[int, int, str]:
    """The columns of all parts in files of bounded size, and of their rows; returns tokens, trained tokens, digest."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import xxhash

    schema = pa.schema([_part_schema().field(name) for name in columns])
    digest, tokens, trained, shards = xxhash.xxh3_128(), 0, 0, 0
    with pa.OSFile(str(out / ROWS), "wb") as rows_file, pa.ipc.new_stream(rows_file, _row_schema()) as rows:
        batches = (batch for path in files for batch in _read_stream(path))
        batch = next(batches, None)
        while batch is not None or not shards:
            with pa.OSFile(str(out / f"shard-{shards}"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                while batch is not None and file.tell() < _SHARD_BYTES:
                    writer.write_batch(batch.select(columns))
                    about = batch.select(_row_schema().names)
                    rows.write_batch(about)
                    digest.update(b"".join(about["digest"].to_pylist()))
                    tokens += pc.sum(about["tokens"]).as_py()
                    trained += pc.sum(about["trained_tokens"]).as_py()
                    batch = next(batches, None)
            shards += 1
    for number in range(shards):
        (out / f"shard-{number}").rename(out / f"data-{number:05}-of-{shards:05}.arrow")
    return tokens, trained, digest.hexdigest()


def _read_stream(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _write_state(folder: Path, fingerprint: str) -> None:
    """What `datasets.load_from_disk` reads beside the files."""
    import pyarrow as pa
    from datasets import DatasetInfo, Features

    names = sorted(path.name for path in folder.glob("data-*"))
    with pa.memory_map(str(folder / names[0])) as file, pa.ipc.open_stream(file) as reader:
        DatasetInfo(features=Features.from_arrow_schema(reader.schema)).write_to_directory(str(folder))
    formats: dict[str, Any] = {
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
    }
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint, "_split": None}
    (folder / "state.json").write_text(json.dumps({**state, **formats}, indent=2, sort_keys=True), encoding="utf-8")


def seal(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write a record into a folder, with a digest of every other file there and a checksum of itself."""
    files = {path.name: digest_file(path) for path in sorted(folder.iterdir()) if path.name != name}
    (folder / name).write_text(json.dumps(with_checksum(record | {"files": files}), indent=1), encoding="utf-8")


def _is_as_sealed(record: dict[str, Any]) -> bool:
    return "checksum" in record and not is_edited(record)


def open_sealed(folder: Path, name: str, again: str) -> tuple["Dataset", dict[str, Any]]:
    """Open a dataset beside which [`seal`] has left a record, after reading every byte of it.

    Args:
        again: what to do if it is damaged, for messages.

    Raises:
        DataError: it is damaged.
        UnreadableError: it cannot be read, by rights or because the device fails.
    """
    from datasets import load_from_disk

    try:
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        if "checksum" not in record:
            raise DataError(f"{folder}: a damaged prepared folder, or one of an earlier version; {again}.")
        if not _is_as_sealed(record):
            raise DataError(f"{folder / name}: is not what was written there; {again}.")
        files = {file: str(digest) for file, digest in record["files"].items()}
        missing = [file for file in files if not (folder / file).is_file()]
        edited = missing or [file for file, digest in files.items() if digest_file(folder / file) != digest]
        dataset = None if edited else load_from_disk(folder)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, error, again) from error
    if dataset is None:
        raise DataError(f"{folder}/{edited[0]}: is not what was prepared there; {again}.")
    return dataset, record


def _damaged(folder: Path, error: Exception, again: str) -> DataError:
    if isinstance(error, OSError) and is_unreadable(error):
        return UnreadableError(f"{error.filename or folder}: {error.strerror}.")
    return DataError(f"{folder}: a damaged prepared folder ({error!r}); {again}.")


def _refuse_obstacle(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds what is not ours, or what is and may not be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not is_prepared(out):
        raise DataError(f"{out} already exists; choose another folder.")
    if foreign := [path.name for path in sorted(out.iterdir()) if path.is_dir() or not _OURS.fullmatch(path.name)]:
        raise DataError(f"{out} already exists and holds {foreign[0]}, which is not of it; choose another folder.")
    record = _read_record(out)
    if record is None or not {"fingerprint", "labelling", "report"} <= record.keys():
        raise DataError(f"{out} already exists, and its {PREPARED} is none of ours; choose another folder.")
    if not overwrite:
        raise DataError(f"{out} already exists; pass --overwrite to replace it.")


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def is_prepared(place: str | Path) -> bool:
    """Whether this is a folder that [`prepare`] wrote.

    Raises:
        UnreadableError: the folder, or one that it is in, may not be entered.
    """
    try:
        return (Path(place) / PREPARED).is_file()
    except PermissionError as error:
        raise UnreadableError(f"{place}: {error.strerror}.") from error


@dataclass(frozen=True)
class Rows:
    """A prepared folder that is open.

    Args:
        dataset: columns `input_ids`, `labels` and perhaps `weights`, mapped from the disk.
        report: what became of the rows.
        about: columns `digest`, `question`, `tokens`, `trained_tokens` and `truncated` of the same rows.
        fingerprint: see [`Prepared`].
        places: what it was made of was called so.
        content: a digest of all bytes of the dataset.
    """

    dataset: "Dataset"
    report: DataReport
    about: "pyarrow.Table"
    fingerprint: str
    places: tuple[str, ...]
    content: str

    def renamed(self, places: Sequence[str]) -> "Rows":
        """The same, of the same content in files that are called otherwise.

        Raises:
            DataError: it is not made of so many.
        """
        if tuple(places) == self.places:
            return self
        if len(places) != len(self.places):
            raise DataError(f"a damaged entry: made of {len(self.places)} places, not {len(places)}.")
        names = dict(zip(self.places, places, strict=True))
        rejects = []
        for reject in self.report.rejects:
            place, _, row = reject.source.rpartition(":")
            rejects.append(replace(reject, source=f"{names[place]}:{row}"))
        pinned = tuple(names[place] for place in self.report.pinned)
        return replace(self, report=replace(self.report, rejects=tuple(rejects), pinned=pinned), places=tuple(places))


def open_prepared(
    places: Sequence[str | Path], tokenizer: "PreTrainedTokenizerBase", labelling: Labelling
) -> tuple["Dataset", DataReport]:
    """Open a prepared folder for a run with this tokenizer and labelling; returns what `prepare_dataset` does.

    Raises:
        DataError: there are other places beside it; it is damaged; it was made with another tokenizer, chat template
            or labelling.
    """
    rows = open_rows(places, tokenizer, labelling)
    return rows.dataset, rows.report


def open_rows(places: Sequence[str | Path], tokenizer: "PreTrainedTokenizerBase", labelling: Labelling) -> Rows:
    """Likewise, with what is known of each row."""
    import pyarrow as pa
    from datasets import Dataset

    _refuse_others(places)
    folder, again = Path(places[0]), "prepare it again"
    dataset, record = open_sealed(folder, PREPARED, again)
    try:
        report = _report_from(record["report"])
        made_of = {name: record[name] for name in ("fingerprint", "tokenizer", "chat_template", "labelling")}
        about = pa.Table.from_batches(_read_stream(folder / ROWS), _row_schema())
        made_from = tuple(map(str, record["places"]))
        _require_true(report, made_from, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error, again) from error
    if len(dataset) != report.kept:
        raise DataError(f"{folder}: has {len(dataset)} rows, {PREPARED} says {report.kept}; {again}.")
    _refuse_difference(folder, made_of, _made_of(tokenizer, labelling))
    # What `datasets` caches of later steps is found again by this name, whoever prepared the folder.
    fingerprint = made_of["fingerprint"]
    dataset, content = Dataset(dataset.data, dataset.info, fingerprint=fingerprint), _fingerprint(record["files"])
    return Rows(dataset, report, about, fingerprint, made_from, content)


def _require_true(report: DataReport, places: Sequence[str], about: "pyarrow.Table") -> None:
    """Refuse a record that says of the rows what they are not, with a checksum or without.

    Raises:
        ValueError: it does; the message names what.
    """
    import pyarrow.compute as pc
    import xxhash

    sums = {name: int(pc.sum(about[name]).as_py() or 0) for name in ("tokens", "trained_tokens", "truncated")}
    digest = xxhash.xxh3_128(b"".join(about["digest"].to_pylist())).hexdigest()
    for name, value in {"kept": len(about), **sums, "digest": digest}.items():
        if getattr(report, name) != value:
            raise ValueError(f"{name} is {getattr(report, name)!r}, its rows have {value}")
    if not places:
        raise ValueError("no places")
    for reject in report.rejects:
        place, _, number = reject.source.rpartition(":")
        if place not in places or not number.isdecimal():
            raise ValueError(f"a rejected row {reject.source}, which is of none of its places")


def _refuse_others(places: Sequence[str | Path]) -> None:
    if len(places) > 1:
        raise DataError(
            f"{places[0]} and {len(places) - 1} more: a prepared folder stands alone; prepare all together."
        )


def require_made_for(
    places: Sequence[str | Path], tokenizer: "PreTrainedTokenizerBase | None", labelling: Labelling
) -> None:
    """Refuse a prepared folder that a run would refuse, by its record alone: its rows are not read.

    Args:
        places: of the run's data; other than prepared folders are not looked at.
        tokenizer: of the run; None: only the labelling is compared.
        labelling: of the run.

    Raises:
        DataError: as [`open_prepared`].
    """
    for place in filter(is_prepared, places):
        _refuse_others(places)
        record = _read_record(Path(place)) or {}
        wanted = _made_of(tokenizer, labelling) if tokenizer else {"labelling": asdict(labelling)}
        if not (wanted.keys() <= record.keys() and isinstance(record["labelling"], dict) and _is_as_sealed(record)):
            raise DataError(f"{place}: a damaged prepared folder; prepare it again.")
        _refuse_difference(Path(place), record, wanted)


def build_prepared(
    folder: Path,
    content: Content,
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    job: str,
    num_proc: int | None,
) -> None:
    """Write into an empty folder what [`prepare`] writes, by this process alone; rows may be invalid, and none left."""
    parts = folder / "parts"
    parts.mkdir()
    count = write_parts(content, parts, tokenizer, labelling, job, num_proc=num_proc)
    join_parts(parts, count, parts / "whole", content.places, tokenizer, labelling, job)
    for path in (parts / "whole").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(parts)


def _made_of(tokenizer: "PreTrainedTokenizerBase", labelling: Labelling) -> dict[str, Any]:
    import xxhash

    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": xxhash.xxh3_128_hexdigest(str(tokenizer.chat_template).encode()),
        "labelling": asdict(labelling),
    }


def _refuse_difference(folder: Path, made_of: dict[str, Any], wanted: dict[str, Any]) -> None:
    digests = [name for name in ("tokenizer", "chat_template") if name in wanted]
    pairs = [(name, made_of[name], wanted[name]) for name in digests]
    labelling = {**asdict(Labelling(None)), **made_of["labelling"]}  # an older record lacks what had one value then
    pairs += [(name, labelling[name], value) for name, value in wanted["labelling"].items()]
    for name, found, asked in pairs:
        if found != asked:
            if name in digests:
                what = f"{name.replace('_', ' ')} of digest {found}, this run's has {asked}"
            else:
                what = f"{name} {found}, this run has {asked}"
            raise DataError(f"{folder} was prepared with {what}; prepare it again for this run.")


def _fingerprint(value: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _report_from(values: dict[str, Any]) -> DataReport:
    rejects = tuple(
        Reject(reject["source"], reject["id"], tuple(Problem(*problem) for problem in reject["problems"]))
        for reject in values["rejects"]
    )
    sources = tuple(SourceReport(**source) for source in values["sources"])
    return DataReport(**{**values, "rejects": rejects, "sources": sources, "pinned": tuple(values["pinned"])})


__all__ = [
    "Prepared",
    "Rows",
    "build_prepared",
    "describe_job",
    "is_prepared",
    "open_prepared",
    "open_rows",
    "open_sealed",
    "prepare",
    "require_made_for",
    "seal",
]
