# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The documents that are trained on, read from files; and of files that cannot be read, what is wrong and where.

The library `datasets` reads them, fast and through its cache. Of a file that it cannot read it says little, so then the
files are read once more, slowly, up to the first fault.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import xxhash

from conversion.checkpoint.errors import CheckpointError, one_line

LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet"}


def load_documents(files: Sequence[str], column: str) -> datasets.Dataset:
    """The documents of some files, a row each.

    Args:
        files: `.txt` (a document a file), `.jsonl`, `.json`, `.jsonl.gz` or `.parquet`, all of one kind.
        column: where the text of a row is, in files with rows.

    Raises:
        CheckpointError: a file is missing, of an unknown kind, damaged, or without the column; or a row of it holds
            something else than text there.
    """
    if not files:
        raise CheckpointError("train_files or eval_files names no file.")
    for file in files:
        if not Path(file).is_file():
            raise CheckpointError(f"{file}: no such file.")
    kinds = {LOADERS.get(Path(file).suffix) for file in files}
    kind = next(iter(kinds), None)
    if len(kinds) != 1 or kind is None:
        known = ", ".join(LOADERS)
        raise CheckpointError(f"{', '.join(files)}: expected files of one kind, each ending in one of {known}.")
    whole = {"sample_by": "document"} if kind == "text" else {}
    try:
        documents = datasets.load_dataset(kind, _state_of(files), data_files=list(files), split="train", **whole)
    except Exception as error:  # datasets raises its own, those of pyarrow, and whatever its readers meet
        fault = (
            _first_fault(files, column) or f"{', '.join(files)}: cannot be read: {one_line(error.__cause__ or error)}"
        )
        raise CheckpointError(fault) from error
    if column not in documents.column_names:
        found = ", ".join(documents.column_names)
        raise CheckpointError(f"{files[0]} has no column {column}; it has {found}. Set text_column.")
    kind_of_text = getattr(documents.features[column], "dtype", "no text")
    texts = documents.data.column(column)
    if kind_of_text not in ("string", "large_string") or texts.null_count or not _is_utf8(texts):
        other = f"{', '.join(files)}: {column} holds {kind_of_text}, expected text."
        raise CheckpointError(_first_fault(files, column) or other)
    return documents


def _state_of(files: Sequence[str]) -> str:
    """A name that other content of the files has not, for the cache of `datasets`, which looks at the time of change.

    A copy may keep that time, of other text of the same size too; the time of any change no program can set.
    """
    stamps = [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in map(os.stat, files)]
    return f"text-{xxhash.xxh3_64_hexdigest(repr(stamps).encode())}"


def _is_utf8(texts: pyarrow.ChunkedArray) -> bool:
    """Whether strings are what they say; the reader of JSON takes any bytes."""
    try:
        texts.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _first_fault(files: Sequence[str], column: str) -> str | None:
    """What is wrong with the first file or row with which something is; None if nothing is found."""
    for file in files:
        number, rows = 0, 0
        try:
            for number, row in _rows(Path(file), column):
                value = json.loads(row.decode("utf-8")) if isinstance(row, bytes) else row
                if fault := _fault_of(value, column):
                    return f"{file}: row {number} {fault}"
                rows += 1
        except UnicodeDecodeError as error:
            where = f" of line {number}" if number else ""
            return f"{file}: is not UTF-8 at byte {error.start}{where}; convert it."
        except (pyarrow.ArrowException, EOFError, zlib.error, gzip.BadGzipFile) as error:
            return f"{file}: is damaged, or no {Path(file).suffix} file ({one_line(error)}); fetch it again."
        except (ValueError, RecursionError) as error:
            return f"{file}: row {number} is not JSON ({one_line(error)}); repair or remove it."
        except OSError as error:
            return f"{file}: {error.strerror or one_line(error)}."
        if not rows:
            return f"{file}: holds no rows; leave it out."
    return None


def _fault_of(row: Any, column: str) -> str | None:
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, expected an object with {column}; repair or remove it."
    if column not in row:
        found = ", ".join(map(str, list(row)[:8])) or "nothing"
        return f"has no {column}, it has {found}; set text_column, or remove it."
    if not isinstance(row[column], str):
        found = "null" if row[column] is None else f"a {type(row[column]).__name__}"
        return f"holds {found} as {column}, expected text; repair or remove it."
    return None


def _rows(file: Path, column: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file with their numbers, counted from 1, blank lines included; those of lines unparsed."""
    if file.suffix == ".txt":
        yield 1, {column: file.read_bytes().decode("utf-8")}
    elif file.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = table.iter_batches(batch_size=1000, columns=[column])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    elif file.suffix == ".json" and isinstance(rows := _whole(file), list):
        yield from enumerate(rows, start=1)
    else:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line


def _whole(file: Path) -> Any:
    """What a `.json` file holds if it is one text of JSON; None if it may have one a line."""
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


__all__ = ["LOADERS", "load_documents"]
