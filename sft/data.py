# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From files of conversations to the token ids and labels that are trained on.

TRL can tokenize conversations itself. It is done here because TRL's errors name no row, rows that truncation leaves
without a trained token vanish uncounted (or, packed, stay and train nothing), and a control token inside a user's text
passes. What comes out is TRL's pre-tokenized format: `input_ids`, and `labels` with -100 where nothing is learned.

A row is an object with `messages`, a list of `{"role": "system" | "user" | "assistant", "content": text}`. Other
columns are ignored. A row that cannot be trained on is a [`Reject`] with one of these reasons:

| reason | the row |
|---|---|
| `invalid_json` | is a line that is not JSON in UTF-8 |
| `no_messages` | has no `messages`, or they are not a list with something in it |
| `bad_message` | has a message that is not an object |
| `unknown_role` | has a role other than the three |
| `system_not_first` | has a system message that is not its first |
| `bad_content` | has a content that is not text, or is an assistant's and blank |
| `no_assistant` | has nobody to learn from |
| `control_token` | spells out a control token in a content, which would become the real one |
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft import SFTError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
_ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class DataError(SFTError):
    """The data cannot be read or trained on. The message names the file, and the row where there is one."""


@dataclass(frozen=True)
class Conversation:
    """A valid row: its messages, reduced to `role` and `content`, and where it stands (`file:row`, from 1)."""

    messages: list[dict[str, str]]
    source: str


@dataclass(frozen=True)
class Reject:
    """A row that cannot be trained on: where it stands (`file:row`, from 1), a reason code, and what is wrong."""

    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of some files.

    Args:
        rows: rows read.
        rejects: rows that are invalid.
        dropped: sources of valid rows of which `max_length` leaves no trained token.
        truncated: rows trained on without their end, because they are longer than `max_length`.
        tokens, trained_tokens: of the rows that are trained on, after truncation.
    """

    rows: int
    rejects: tuple[Reject, ...]
    dropped: tuple[str, ...]
    truncated: int
    tokens: int
    trained_tokens: int

    def __str__(self) -> str:
        kept = self.rows - len(self.rejects) - len(self.dropped)
        text = f"{kept} of {self.rows} rows, {self.trained_tokens} trained of {self.tokens} tokens"
        if self.truncated:
            text += f"; {self.truncated} cut at max_length"
        if self.dropped:
            text += f"; {len(self.dropped)} dropped, max_length leaves no trained token ({_first(self.dropped)})"
        if self.rejects:
            text += f"; {_summary(self.rejects)}"
        return text


# --- rows -------------------------------------------------------------------------------------------------------------


def read_conversations(
    files: Sequence[str | Path], control_tokens: Collection[str] = ()
) -> tuple[list[Conversation], list[Reject]]:
    """Read and check every row of some files. Neither torch nor transformers is needed.

    Args:
        files: `.jsonl`, `.json` or `.parquet`; the first two also gzipped. Blank lines are skipped.
        control_tokens: texts that no content may contain.

    Raises:
        DataError: a file is missing, unreadable, or of another kind.
    """
    conversations, rejects = [], []
    for path in map(Path, files):
        for number, row in _read_rows(path):
            source = f"{path}:{number}"
            problem = row if isinstance(row, _Problem) else _find_problem(row, control_tokens)
            if problem:
                rejects.append(Reject(source, *problem))
            else:
                messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
                conversations.append(Conversation(messages, source))
    return conversations, rejects


class _Problem(NamedTuple):
    reason: str
    detail: str


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row); a line that is not JSON is yielded as a problem."""
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{path}: not a file of conversations; known are {', '.join(_SUFFIXES)}.")
    read = _read_parquet if path.suffix == ".parquet" else _read_jsonl if ".jsonl" in path.suffixes else _read_json
    try:
        yield from read(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of a thousand brackets
                    yield number, _Problem("invalid_json", str(error))


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); one row a line is .jsonl.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__}; expected a list of rows.")
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}).") from error


def _find_problem(row: Any, control_tokens: Collection[str]) -> _Problem | None:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        found = (
            f"its columns are {', '.join(row) or 'none'}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        )
        return _Problem("no_messages", f"a row needs a non-empty list `messages`; {found}")
    for index, message in enumerate(messages):
        if problem := _find_message_problem(index, message, control_tokens):
            return problem
    if all(message["role"] != "assistant" for message in messages):
        return _Problem("no_assistant", f"none of its {len(messages)} messages is an assistant's")
    return None


def _find_message_problem(index: int, message: Any, control_tokens: Collection[str]) -> _Problem | None:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        return _Problem("bad_message", f"{where} is a {type(message).__name__}; expected an object")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        return _Problem("unknown_role", f"{where} has role {role!r}; expected {', '.join(_ROLES)}")
    if role == "system" and index > 0:
        return _Problem("system_not_first", f"{where} is a system message; only messages[0] may be")
    if not isinstance(content, str):
        return _Problem("bad_content", f"{where} has a content of type {type(content).__name__}; expected text")
    if re.search("[\ud800-\udfff]", content):
        return _Problem("bad_content", f"{where} has half of a surrogate pair, which is no character")
    if role == "assistant" and not content.strip():
        return _Problem("bad_content", f"{where} is an assistant's and blank")
    if spelled := [token for token in control_tokens if token in content]:
        return _Problem("control_token", f"{where} contains {spelled[0]}; remove or rewrite it")
    return None


def _summary(rejects: Sequence[Reject]) -> str:
    counts = Counter(reject.reason for reject in rejects)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    examples = _first([f"{reject.source}: {reject.detail}" for reject in rejects])
    return f"{len(rejects)} invalid rows ({reasons}): {examples}"


def _first(items: Sequence[str], limit: int = 3) -> str:
    return "; ".join([*items[:limit], *(["..."] if len(items) > limit else [])])


# --- token ids and labels ---------------------------------------------------------------------------------------------


def prepare_dataset(
    files: str | Path | Sequence[str | Path],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    assistant_only_loss: bool = True,
    allow_rejects: bool = False,
    num_proc: int | None = None,
) -> tuple["Dataset", DataReport]:
    """Read conversations and tokenize them with the tokenizer's chat template.

    Everything is held in memory, 8 bytes a token.

    Args:
        files: see [`read_conversations`].
        tokenizer: its chat template needs `{% generation %}` blocks for `assistant_only_loss`.
        max_length: keep the first so many tokens of a row; `None` keeps all.
        assistant_only_loss: labels are -100 outside the `{% generation %}` blocks; else every token is trained on.
        allow_rejects: leave invalid rows out (they are in the report) instead of raising.
        num_proc: processes that tokenize.

    Returns:
        a dataset with columns `input_ids` and `labels` (lists of int32), of at least one row, each row with at least
        one label that is trained on; and what became of all rows.

    Raises:
        DataError: a file cannot be read; there are invalid rows and they are not allowed; no row is left.
    """
    import numpy as np
    from datasets import Dataset, Features, List, Value

    paths = [files] if isinstance(files, str | Path) else list(files)
    conversations, rejects = read_conversations(paths, control_tokens(tokenizer))
    if rejects and not allow_rejects:
        raise DataError(f"{_summary(rejects)}. Correct them, or set allow_rejects: true to leave them out.")
    rows = len(conversations) + len(rejects)
    if not conversations:
        why = _summary(rejects) if rejects else "no rows"
        raise DataError(f"nothing to train on in {', '.join(map(str, paths))}: {why}.")

    ids = List(Value("int32"))
    tokenized = Dataset.from_list([vars(conversation) for conversation in conversations]).map(
        _tokenize,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "assistant_only_loss": assistant_only_loss},
        remove_columns="messages",
        features=Features(
            {
                "source": Value("string"),
                "input_ids": ids,
                "labels": ids,
                "tokens": Value("int32"),
                "trained_tokens": Value("int32"),
                "truncated": Value("bool"),
            }
        ),
        num_proc=num_proc,
        desc="Tokenizing conversations",
    )
    table = tokenized.data
    trained_tokens = table.column("trained_tokens").to_numpy()
    kept = np.flatnonzero(trained_tokens)
    report = DataReport(
        rows=rows,
        rejects=tuple(rejects),
        dropped=tuple(table.column("source").take(np.flatnonzero(trained_tokens == 0)).to_pylist()),
        truncated=int(table.column("truncated").to_numpy()[kept].sum()),
        tokens=int(table.column("tokens").to_numpy()[kept].sum()),
        trained_tokens=int(trained_tokens.sum()),
    )
    if not len(kept):
        raise DataError(f"no row has a trained token within max_length {max_length}: {report}. Raise max_length.")
    return tokenized.select(kept).select_columns(["input_ids", "labels"]), report


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts that become one token wherever they stand: special tokens, and the markers of the chat template.

    A marker such as `<_user>` is not a special token to transformers: sentencepiece calls it a user-defined symbol.
    """
    markers = set(re.findall(r"<[^<>\s]+>", str(tokenizer.chat_template))) & tokenizer.get_vocab().keys()
    return sorted(markers | tokenizer.get_added_vocab().keys() - {tokenizer.unk_token})


def _tokenize(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", max_length: int | None, assistant_only_loss: bool
) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        encoding: Any = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=assistant_only_loss
        )
    except TemplateError as error:
        raise DataError(f"{row['source']}: the chat template refuses it: {error}") from error
    input_ids = encoding["input_ids"]
    mask = encoding["assistant_masks"] if assistant_only_loss else [1] * len(input_ids)
    labels = [token if trained else IGNORE_INDEX for token, trained in zip(input_ids, mask, strict=True)]
    return {
        "input_ids": input_ids[:max_length],
        "labels": labels[:max_length],
        "tokens": len(input_ids[:max_length]),
        "trained_tokens": sum(mask[:max_length]),
        "truncated": max_length is not None and len(input_ids) > max_length,
    }


__all__ = [
    "Conversation",
    "DataError",
    "DataReport",
    "Reject",
    "control_tokens",
    "prepare_dataset",
    "read_conversations",
]
