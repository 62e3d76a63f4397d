# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""First stage: the rows of a file, judged as training judges them, and how later stages read them."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from sft.data.checks import Conversation, check_rows
from sft.data.formats import find_turns
from sft.tokenizer import family_control_tokens

PIECE_ROWS = 2048
PIECE_BYTES = 1 << 24
_SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "row": pa.large_binary(),
        "id": pa.binary(16),
        "drop": pa.string(),
        "detail": pa.string(),
    }
)


def read_tables(file: str, piece_rows: int = PIECE_ROWS) -> Iterator[pa.Table]:
    """The rows of a file, in pieces of at most `piece_rows` rows and about [`PIECE_BYTES`].

    Yields:
        tables with `source` (`file:row`), `row` (the row as JSON; null if it is invalid), `id` (16 bytes, equal for
        conversations with equal roles and texts), `drop` (the first of [`sft.data.checks.REASONS`]) and `detail`.

    Raises:
        DataError: the file cannot be read.
    """
    piece: list[dict[str, Any]] = []
    size = 0
    for row, outcome in check_rows(file, family_control_tokens()):
        if isinstance(outcome, Conversation):
            text = to_json(row.value)
            piece.append({"source": row.source, "row": text, "id": content_id(outcome.messages)})
            size += len(text)
        else:
            detail = outcome.detail.encode("utf-8", "replace").decode()
            piece.append({"source": row.source, "id": bytes(16), "drop": outcome.reason, "detail": detail})
        if len(piece) == piece_rows or size > PIECE_BYTES:
            yield pa.Table.from_pylist(piece, _SCHEMA)
            piece, size = [], 0
    if piece:
        yield pa.Table.from_pylist(piece, _SCHEMA)


def content_id(messages: Sequence[dict[str, str]]) -> bytes:
    """xxh3-128 of the roles and NFKC-normalised texts of a conversation; spaces at the ends do not count."""
    digest = xxhash.xxh3_128()
    for message in messages:
        content = message["content"].strip()
        text = content if content.isascii() else unicodedata.normalize("NFKC", content)
        digest.update(f"{message['role']}\0{len(text)}\0{text}".encode())
    return digest.digest()


def to_json(value: object) -> bytes:
    """A row as JSON in UTF-8; what JSON cannot hold, such as a date from Parquet, as text."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a column that nobody reads
        return json.dumps(value, default=str).encode()


def conversations(table: pa.Table) -> Iterator[list[dict[str, str]]]:
    """The messages (`role`, `content`) of valid rows, from their column `row`."""
    for text in table["row"]:
        turns, _ = find_turns(json.loads(text.as_py()))
        yield [{"role": turn.role, "content": turn.content} for turn in turns]


def whole_text(messages: Sequence[dict[str, str]]) -> str:
    """All that is said in a conversation."""
    return "\n".join(message["content"] for message in messages)


def answers(messages: Sequence[dict[str, str]]) -> list[str]:
    """What the assistant says."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


__all__ = [
    "PIECE_BYTES",
    "PIECE_ROWS",
    "answers",
    "content_id",
    "conversations",
    "read_tables",
    "to_json",
    "whole_text",
]
