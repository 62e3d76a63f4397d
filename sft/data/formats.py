# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows of conversations as they stand in files, and the layouts they come in.

| layout | columns | what it means here |
|---|---|---|
| messages | `messages`: a list of `{"role", "content"}` | as it stands |
| ShareGPT | `conversations`: a list of `{"from", "value"}`, and `system` | `human` is the user, `gpt` the assistant |
| prompt and completion | two texts, or two lists of messages | only the completion is trained on |
| Alpaca | `instruction`, `output`, and perhaps `input`, `system`, `history` | `input` is the instruction's next line |

A row of any layout may have `tools`: JSON Schemas of the functions that the assistant can call, as a list or as JSON
text of one. A message may have

- `content` in parts, `[{"type": "text", "text": ...}]`, which are joined;
- `tool_calls` of the assistant, and after it messages of the role `tool` with the results, in OpenAI's format;
  ShareGPT's `function_call` and `observation` are these;
- `reasoning_content` of the assistant, or `thinking` or `reasoning`, which transformers takes for the same;
- a `weight`: 0 leaves an assistant's message untrained, another number scales its loss; `train`, false or true, is
  weight 0 or 1.

Columns that no layout names are ignored. What is null counts as absent, wherever it stands in a row: Parquet has a null
for each field that another row has. If a row fits several layouts, the first one counts.

Files are read row by row: of `.jsonl` and Parquet no more than a row or a row group is in memory, of `.json` all.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sft import SFTError

MAX_ROW_BYTES = 1 << 26
_STATE = "state.json"  # of a folder that `save_to_disk` has written
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
# OWNER/NAME, perhaps with a revision, a configuration and a split; not what a path looks like.
DATASET_NAME = re.compile(
    r"(?P<path>\w[\w.-]*/\w[\w.-]*|\w[\w-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%-]+))?"
)
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
}
# What transformers' chat templates take for `reasoning_content`, in its order.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Called with the bytes just read and the bytes in all.
Progress = Callable[[int, int], None]
# Called with a file and its descriptor, before the first row is read from that and after the last.
Opened = Callable[[Path, int], None]


class DataError(SFTError):
    """The data cannot be read or trained on. The message names the file, and the row where there is one."""


class UnreadableError(DataError):
    """The system does not let something be read: rights, or a device that fails. It is not known to be damaged."""


class Problem(NamedTuple):
    """What is wrong with a row: a code of [`sft.data.checks.REASONS`], and where and what exactly."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in its file.

    Args:
        place: the file or dataset, as it was given to [`read_rows`].
        number: of the row in it, from 1, blank lines included.
        value: what JSON or Parquet holds there; the bytes of the line if that is no JSON.
        problem: why `value` is no JSON.
        text: the line of a `.jsonl` file, without the spaces around it; None in other files.
    """

    place: str
    number: int
    value: Any
    problem: Problem | None = None
    text: bytes | None = None

    @property
    def source(self) -> str:
        """`file:row`, for messages."""
        return f"{self.place}:{self.number}"

    @property
    def id(self) -> str | int | None:
        """The row's own name for itself, its column `id`, if it has one."""
        return self._name("id")

    @property
    def unique_id(self) -> str | int | None:
        """What no other row of the file may have: `id`, or for a selected row the `teleflm_id` that it was given.

        Files that are each numbered from 0 may be selected from together, so that ids of selected rows may repeat.
        """
        given = self._name("teleflm_id")
        return self.id if given is None else given

    def _name(self, column: str) -> str | int | None:
        found = self.value.get(column) if isinstance(self.value, dict) else None
        return found if isinstance(found, str | int) else None


class Turn(NamedTuple):
    """A message before it is checked, so of whatever types the file has; `where` is its place in the row.

    Args:
        content: a content in text parts is one text here; any other is as it stands.
        reasoning: the values of all fields that name reasoning, without those that are null or blank.
        tool_calls: what should be a list of calls, or JSON text of it.
        tool_call_id, name: of the call that a tool's result answers.
    """

    where: str
    role: Any
    content: Any
    weight: Any = None
    train: Any = None
    reasoning: tuple[Any, ...] = ()
    tool_calls: Any = None
    tool_call_id: Any = None
    name: Any = None


# --- rows of files ----------------------------------------------------------------------------------------------------


def read_rows(
    data: str | Path | Sequence[str | Path], progress: Progress | None = None, opened: Opened | None = None
) -> Iterator[Row]:
    """Read every row of some files or datasets.

    Args:
        data: files (`.jsonl`, `.json` with a list, `.parquet`; the first two also gzipped), folders that `datasets`
            can load, or names of datasets on the Hub: `OWNER/NAME`, `OWNER/NAME:SPLIT` or `OWNER/NAME:CONFIG:SPLIT`;
            the split is `train` unless given. `OWNER/NAME@REVISION` is of that branch, tag or commit. No code of a
            dataset is executed.
        progress: told of bytes as `.jsonl` files are read.
        opened: told of each file; not of those of a folder or a dataset, which `datasets` opens.

    Raises:
        DataError: a file or dataset is missing, unreadable, or of another kind.
    """
    places = [data] if isinstance(data, str | Path) else list(data)
    for place in places:
        yield from _read_place(str(place), progress, opened)


def _read_place(place: str, progress: Progress | None, opened: Opened | None) -> Iterator[Row]:
    path = Path(place)
    name = DATASET_NAME.fullmatch(place)
    if path.is_dir():
        yield from _read_dataset(place, {"path": place, "split": "train"})
    elif name and not path.exists() and not place.endswith(SUFFIXES):
        config, split = (name["config"], name["split"]) if name["split"] else (None, name["config"])
        what = {"path": name["path"], "name": config, "split": split or "train", "revision": name["revision"]}
        yield from _read_dataset(place, what)
    elif not place.endswith(SUFFIXES):
        raise DataError(f"{place}: not a file of conversations; known are {', '.join(SUFFIXES)}.")
    else:
        yield from _read_file(place, progress, opened)


def _read_file(place: str, progress: Progress | None, opened: Opened | None) -> Iterator[Row]:
    path = Path(place)
    try:
        with path.open("rb") as file:
            if opened:
                opened(path, file.fileno())
            if path.suffix == ".parquet":
                yield from _read_parquet(place, file)
            elif ".jsonl" in path.suffixes:
                yield from _read_jsonl(place, file, progress)
            else:
                yield from _read_json(place, file)
            if opened:
                opened(path, file.fileno())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again.") from error


def _read_jsonl(place: str, file: BinaryIO, progress: Progress | None) -> Iterator[Row]:
    total, done = os.fstat(file.fileno()).st_size, 0
    lines: Any = gzip.GzipFile(fileobj=file) if place.endswith(".gz") else file
    number = 0
    while line := lines.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            detail = f"it is longer than {MAX_ROW_BYTES:,} bytes; is the file one row a line?"
            yield Row(place, number, line[:1000], Problem("row_too_large", detail))
        elif line.strip():
            yield _parse(place, number, line)
        if progress and (number % 1000 == 0 or file.tell() == total):
            progress(file.tell() - done, total)
            done = file.tell()


def _parse(place: str, number: int, line: bytes) -> Row:
    try:
        # utf-8-sig, because files from Windows begin with a mark that JSON does not know.
        value = json.loads(line.decode("utf-8-sig"))
        return Row(place, number, value, text=line.removeprefix(codecs.BOM_UTF8).strip())
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} of the line is {line[error.start]:#04x}, which is no UTF-8; convert the file"
        return Row(place, number, line, Problem("not_utf8", detail))
    except (ValueError, RecursionError) as error:  # also of a thousand brackets
        return Row(place, number, line, Problem("invalid_json", str(error)))


def _read_json(place: str, file: BinaryIO) -> Iterator[Row]:
    text: Any = gzip.GzipFile(fileobj=file) if place.endswith(".gz") else file
    try:
        rows = json.load(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); one row a line is .jsonl.") from error
    if not isinstance(rows, list):
        raise DataError(f"{place}: holds a {type(rows).__name__}; expected a list of rows.")
    for number, row in enumerate(rows, start=1):
        yield Row(place, number, row)


def _read_parquet(place: str, file: BinaryIO) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Row(place, number, row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{place}: not a Parquet file, or a damaged one ({error}).") from error


def _read_dataset(place: str, arguments: dict[str, Any]) -> Iterator[Row]:
    import datasets

    with _loading(place):
        if (Path(place) / _STATE).is_file():
            rows: Any = datasets.load_from_disk(place)
        else:
            rows = datasets.load_dataset(**arguments, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Row(place, number, row)


def dataset_files(place: str) -> list[Path]:
    """The files that the rows of a dataset in a folder come from, in order; they may lie outside it.

    A `README.md` says which, for `load_dataset`; a `state.json` for `load_from_disk`.

    Args:
        place: the folder.

    Raises:
        DataError: it cannot be loaded, or has rows that come from no file of this machine.
    """
    import datasets

    with _loading(place):
        if (Path(place) / _STATE).is_file():
            state = json.loads((Path(place) / _STATE).read_text(encoding="utf-8"))
            names = [os.path.join(place, entry["filename"]) for entry in state["_data_files"]]
        else:
            resolved = datasets.load_dataset_builder(place).config.data_files or {}
            names = [str(name) for name in resolved.get("train", [])]
    for name in names:
        if not Path(name).is_file():
            raise DataError(
                f"{place}: its rows come from {name}, which is no file of this machine, so that nothing would tell "
                "when they change; download it and name that file."
            )
    return [Path(name) for name in names]


@contextmanager
def _loading(place: str) -> Iterator[None]:
    """What `datasets` says of a dataset that it cannot load, in one line."""
    import datasets

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        what = "not a dataset that can be loaded" if Path(place).is_dir() else "no such file, nor a dataset to be had"
        raise DataError(f"{place}: {what} ({' '.join(str(error).split())}).") from error


# --- turns of rows ----------------------------------------------------------------------------------------------------


def find_turns(row: Any) -> tuple[list[Turn], list[Problem]]:
    """The turns of a row in any of the layouts, unchecked, and what keeps a row or a message from having one."""
    if not isinstance(row, dict):
        return [], [Problem("not_an_object", f"it is a {type(row).__name__}; expected an object with `messages`")]
    columns = {name: value for name, value in row.items() if value is not None}
    if "messages" in columns:
        return turns_of(columns["messages"], "messages")
    if "conversations" in columns:
        return _after_system(columns, *_sharegpt_turns(columns["conversations"]))
    if {"prompt", "completion"} <= columns.keys():
        return _prompt_completion_turns(columns)
    if {"instruction", "output"} <= columns.keys():
        return _after_system(columns, *_alpaca_turns(columns))
    wanted = "`messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
    found = f"those with a value are {', '.join(columns) or 'none'}"
    return [], [Problem("missing_columns", f"it needs the columns {wanted}; {found}")]


def turns_of(messages: Any, column: str) -> tuple[list[Turn], list[Problem]]:
    """The turns of a list of messages, and what is no message.

    Args:
        messages: what should be a list of objects with `role`, `content` and perhaps what else a message may have.
        column: where it stands, for details of problems.
    """
    if not isinstance(messages, list) or not messages:
        found = "it is empty" if messages == [] else f"it is a {type(messages).__name__}"
        return [], [Problem("no_messages", f"`{column}` must be a list with messages in it; {found}")]
    turns, problems = [], []
    for index, message in enumerate(messages):
        where = f"{column}[{index}]"
        if isinstance(message, dict):
            turns.append(_turn(where, message))
        else:
            problems.append(Problem("bad_message", f"{where} is a {type(message).__name__}; expected an object"))
    return turns, problems


def _turn(where: str, message: dict[str, Any]) -> Turn:
    def said(field: str) -> Any:
        value = message.get(field)
        return None if value == [] or (isinstance(value, str) and not value.strip()) else value

    return Turn(
        where,
        message.get("role"),
        join_parts(message.get("content")),
        message.get("weight"),
        message.get("train"),
        tuple(value for field in _REASONING_FIELDS if (value := said(field)) is not None),
        said("tool_calls"),
        said("tool_call_id"),
        said("name"),
    )


def say(where: str, role: str, content: Any) -> Turn:
    """The turn of a column that is a content alone, without a message around it."""
    return Turn(where, role, join_parts(content))


def join_parts(content: Any) -> Any:
    """The text of a content in text parts; any other content as it is, one with other parts too."""
    if isinstance(content, list) and content and not any(map(wrong_part, content)):
        return "".join(part["text"] for part in content)
    return content


def wrong_part(part: Any) -> str | None:
    """Why a part of a content is none that can be trained on, if it is none."""
    if not isinstance(part, dict):
        return f"a part that is a {type(part).__name__}"
    if part.get("type") != "text":
        return f"a part of type {part.get('type')!r}"
    return None if isinstance(part.get("text"), str) else "a text part without text"


def _sharegpt_turns(messages: Any) -> tuple[list[Turn], list[Problem]]:
    def renamed(message: Any) -> Any:
        # Some files have this column with the other layout's keys.
        if not isinstance(message, dict) or message.get("from") is None:
            return message
        role, value = message["from"], message.get("value")
        if role == "function_call":
            return {**message, "role": "assistant", "content": None, "tool_calls": value}
        return {
            **message,
            "role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role,
            "content": value,
        }

    return turns_of(
        [renamed(message) for message in messages] if isinstance(messages, list) else messages, "conversations"
    )


def _prompt_completion_turns(columns: dict[str, Any]) -> tuple[list[Turn], list[Problem]]:
    turns, problems = [], []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = columns[column]
        found, wrong = ([say(column, role, value)], []) if isinstance(value, str) else turns_of(value, column)
        if column == "prompt":
            found = [turn._replace(weight=0, train=None) if turn.role == "assistant" else turn for turn in found]
        turns += found
        problems += wrong
    return turns, problems


def _alpaca_turns(columns: dict[str, Any]) -> tuple[list[Turn], list[Problem]]:
    turns: list[Turn] = []
    history = [] if columns.get("history", "") == "" else columns["history"]
    if not isinstance(history, list | tuple):
        found = type(history).__name__
        return [], [Problem("bad_message", f"history is a {found}; expected a list of [question, answer]")]
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return [], [
                Problem("bad_message", f"history[{index}] is {type(pair).__name__}; expected [question, answer]")
            ]
        turns += [say(f"history[{index}][{side}]", role, pair[side]) for side, role in enumerate(("user", "assistant"))]
    instruction, context = join_parts(columns["instruction"]), join_parts(columns.get("input"))
    if isinstance(instruction, str) and isinstance(context, str) and context.strip():
        instruction = f"{instruction}\n{context}"
    elif context is not None and not isinstance(context, str):
        return [], [Problem("bad_content", f"input has a content of type {type(context).__name__}; expected text")]
    return [*turns, say("instruction", "user", instruction), say("output", "assistant", columns["output"])], []


def _after_system(
    columns: dict[str, Any], turns: list[Turn], problems: list[Problem]
) -> tuple[list[Turn], list[Problem]]:
    """The turns after what the row's column `system` says, if anything."""
    system = join_parts(columns.get("system", ""))
    return ([say("system", "system", system), *turns] if system != "" else turns), problems


__all__ = [
    "DATASET_NAME",
    "SUFFIXES",
    "DataError",
    "Opened",
    "Problem",
    "Row",
    "Turn",
    "UnreadableError",
    "dataset_files",
    "find_turns",
    "join_parts",
    "read_rows",
    "turns_of",
    "wrong_part",
]
