# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""First stage: the rows of a file, judged as training judges them, and how later stages read them."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from sft.data.checks import Conversation, check_rows, message_of
from sft.data.formats import Row, find_turns
from sft.tokenizer import family_control_tokens

PIECE_ROWS = 2048
PIECE_BYTES = 1 << 24
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
# What a row or a message may say besides its texts and calls, and the selection does not read. Of it, training reads:
TRAINED = frozenset({"tools", "reasoning_content", "reasoning", "thinking"})
UNREAD_COLUMNS = (*sorted(MEDIA), "tools", "functions", "tool_calls")
UNREAD_FIELDS = (*sorted(MEDIA), "function_call", "reasoning_content", "reasoning", "thinking")
OWN = "teleflm_"  # begins the name of every column we add
# Every column that a selection may have added; see `pipeline` and `rejects`.
_WRITTEN = frozenset(
    OWN + name
    for name in ("id", "domain", "score", "target", "similarity", "operator", "reason", "duplicate_of", "detail")
)
_WRITTEN_AT_END = re.compile(
    rb'(?:,\s*"(?:' + "|".join(sorted(_WRITTEN)).encode() + rb')":\s*(?:"(?:[^"\\]|\\.)*+"|[-+.\deE]++|null))++\s*\}$'
)
_SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "row": pa.large_binary(),
        "id": pa.binary(16),
        "unread": pa.string(),
        "drop": pa.string(),
        "detail": pa.string(),
    }
)


def read_tables(
    file: str, piece_rows: int = PIECE_ROWS, repeated_ids: bool = False, sanitized: bool = False
) -> Iterator[pa.Table]:
    """The rows of a file, in pieces of at most `piece_rows` rows and about [`PIECE_BYTES`].

    With `repeated_ids` a row whose id an earlier one has is as valid as any; with `sanitized` one that spells out a
    special token (see [`sft.tokenizer.control_tokens`]).

    Yields:
        tables with `source` (`file:row`), `row` (the row as JSON, of JSON Lines the bytes that stand there; what is no
        JSON as it came), `id` (16 bytes, equal for conversations with equal roles, texts and unread fields; zeros if
        the row is invalid), `unread` (the names of [`find_unread`], separated by commas; null without), `drop` (the
        first of [`sft.data.checks.REASONS`]) and `detail`.

    Raises:
        DataError: the file cannot be read.
    """
    piece: list[dict[str, Any]] = []
    size = 0
    for row, outcome in check_rows(file, family_control_tokens(sanitized), repeated_ids=repeated_ids):
        if isinstance(outcome, Conversation):
            text = to_json(row.value) if row.text is None else row.text
            unread = find_unread(row.value)
            own_id = content_id(list(map(as_text, outcome.messages)), unread)
            piece.append({"source": row.source, "row": text, "id": own_id, "unread": ",".join(unread) or None})
            size += len(text)
        else:
            detail = outcome.detail.encode("utf-8", "replace").decode()
            text = _as_it_came(row)
            piece.append({"source": row.source, "row": text, "id": bytes(16), "drop": outcome.reason, "detail": detail})
            size += len(text)
        if len(piece) == piece_rows or size > PIECE_BYTES:
            yield pa.Table.from_pylist(piece, _SCHEMA)
            piece, size = [], 0
    if piece:
        yield pa.Table.from_pylist(piece, _SCHEMA)


def _as_it_came(row: Row) -> bytes:
    """The bytes of a row that may be no JSON."""
    if row.text is not None:
        return row.text
    return row.value.rstrip(b"\r\n") if isinstance(row.value, bytes) else to_json(row.value)


def find_unread(value: Any) -> dict[str, Any]:
    """What a row says that the selection does not read: column -> value, field of messages -> values."""
    found = {name: value[name] for name in UNREAD_COLUMNS if _is_said(value.get(name))}
    for column in ("messages", "conversations", "prompt", "completion"):
        messages = value.get(column)
        for index, message in enumerate(messages if isinstance(messages, list) else []):
            if isinstance(message, dict):
                for field in UNREAD_FIELDS:
                    if _is_said(message.get(field)):
                        found.setdefault(f"{column}[].{field}", []).append([index, message[field]])
    return found


def _is_said(value: Any) -> bool:
    return value is False or value == 0 or bool(value)


def read_unread(table: pa.Table) -> list[dict[str, Any]]:
    """[`find_unread`] of valid rows; their columns `unread` and `row`."""
    if "unread" not in table.column_names:
        return [{} for _ in range(len(table))]
    return [
        find_unread(json.loads(row.as_py())) if names.is_valid else {}
        for row, names in zip(table["row"], table["unread"], strict=True)
    ]


# Full and half widths, spaces and Latin ligatures: other compatibility forms, as of x² or ½, say something else.
_WIDTHS = re.compile("[\u3000\uff01-\uffee\xa0\u2000-\u200a\u202f\u205f\ufb00-\ufb06]+")


def _normalise(text: str) -> str:
    """NFC, and characters that differ in their width alone made one."""
    return unicodedata.normalize("NFC", _WIDTHS.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text))


def content_id(messages: Sequence[dict[str, str]], unread: Mapping[str, Any] | None = None) -> bytes:
    """xxh3-128 of the roles and texts of a conversation, in NFC and without differences of width or at the ends.

    Args:
        messages: with `role` and `content`.
        unread: see [`find_unread`]: pictures of two rows differ even if their texts do not.
    """
    digest = xxhash.xxh3_128()
    for message in messages:
        content = message["content"].strip()
        text = content if content.isascii() else _normalise(content)
        digest.update(f"{message['role']}\0{len(text)}\0{text}".encode())
    if unread:
        digest.update(b"\0" + to_json(unread))
    return digest.digest()


def add_columns(row: bytes, columns: Mapping[str, Any]) -> bytes:
    """A row with some of our columns at its end; all that stands in it before stays byte for byte.

    Args:
        row: an object as JSON. All columns of an earlier selection are left out: they say what that one did. Where they
            do not stand at its end, as they were written, the row is written anew.
        columns: named [`OWN`] and more.
    """
    if OWN.encode() in row:
        row = _WRITTEN_AT_END.sub(b"}", row.rstrip())
        value = json.loads(row)
        if not _WRITTEN.isdisjoint(value):
            row = to_json({name: kept for name, kept in value.items() if name not in _WRITTEN})
    head = row.rstrip()[:-1]
    return head + (b"" if head.strip() == b"{" else b", ") + to_json(columns)[1:]


def to_json(value: object) -> bytes:
    """A row as JSON in UTF-8; what JSON cannot hold, such as a date from Parquet, as text."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a column that nobody reads
        return json.dumps(value, default=str).encode()


def conversations(table: pa.Table) -> Iterator[list[dict[str, str]]]:
    """The messages (`role`, `content`) of valid rows, from their column `row`; see [`as_text`]."""
    for text in table["row"]:
        turns, _ = find_turns(json.loads(text.as_py()))
        yield [as_text(message_of(turn)) for turn in turns]


def as_text(message: Mapping[str, Any]) -> dict[str, str]:
    """A message reduced to `role` and `content`: its text, and after it its calls, a line of JSON each.

    Args:
        message: as [`sft.data.checks.message_of`] makes it.
    """
    calls = [to_json(call["function"]).decode() for call in message.get("tool_calls", ())]
    return {"role": message["role"], "content": "\n".join(filter(None, (message["content"], *calls)))}


def whole_text(messages: Sequence[dict[str, str]]) -> str:
    """All that is said in a conversation."""
    return "\n".join(message["content"] for message in messages)


def answers(messages: Sequence[dict[str, str]]) -> list[str]:
    """What the assistant says."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


__all__ = [
    "MEDIA",
    "OWN",
    "PIECE_BYTES",
    "PIECE_ROWS",
    "TRAINED",
    "UNREAD_COLUMNS",
    "UNREAD_FIELDS",
    "add_columns",
    "answers",
    "as_text",
    "content_id",
    "conversations",
    "find_unread",
    "read_tables",
    "read_unread",
    "to_json",
    "whole_text",
]
