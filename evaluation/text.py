# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Texts from files, and as the tokens of a checkpoint, without transformers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion.checkpoint.errors import CheckpointError, printable
from conversion.checkpoint.sources import Source
from conversion.checkpoint.strict_json import parse_json_object

from .vocabulary import Vocabulary, open_vocabulary

MAX_BYTES = 256 * 2**20  # of a file: all of its tokens are in memory
_MAX_JSON = 2**31  # bytes of memory, which a row of many commas is thought to take
_PIECE = 256  # characters; no piece of these vocabularies is longer
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class TextFile:
    """Documents of a file.

    Args:
        name: of the file, without folders and suffix, as it can be shown.
        sha256: of its content.
        documents: texts, none empty.
        nbytes: of all documents in UTF-8.
    """

    name: str
    sha256: str
    documents: tuple[str, ...]
    nbytes: int


def read_documents(path: Path) -> TextFile:
    """The documents of a file of text: one, or of JSON Lines (`.jsonl`) the `text` of each row.

    Raises:
        CheckpointError: there is no such file, it is no text, or too large; a row or all of it is empty.
    """
    content = read_content(path)
    if path.suffix.lower() in _JSON_LINES:
        documents = tuple(_row_text(row, where) for where, row in json_lines(content, path))
    else:
        documents = (decode(content, path),)
    if not documents or not all(documents):
        raise CheckpointError(f"{path}: is empty; give a text of some hundred words.")
    nbytes = sum(len(document.encode()) for document in documents)
    return TextFile(printable(path.stem), hashlib.sha256(content).hexdigest(), documents, nbytes)


def read_content(path: Path, limit: int = MAX_BYTES) -> bytes:
    """All bytes of a file.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is larger than the limit.
    """
    with _readable(path), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path}: has more than {limit} bytes; give a part of it, or several files.")
    return content


def decode(content: bytes, path: Path) -> str:
    """Bytes as text, without a byte order mark.

    Raises:
        CheckpointError: they are not UTF-8, or hold NUL, which no text does.
    """
    with _readable(path):
        text = content.decode("utf-8").removeprefix("\ufeff")
    return without_nul(text, path)


def json_lines(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of JSON Lines, each with what to call it in a message; blank lines are left out.

    Raises:
        CheckpointError: a line is no JSON object.
    """
    decode(content, path)
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield where, parse_json_object(line, where, limit=_MAX_JSON)


def _row_text(row: dict[str, object], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text:
        found = "missing" if text is None else "empty" if text == "" else f"a {type(text).__name__}"
        raise CheckpointError(f"{where}: text is {found}, expected a text; repair or remove the line.")
    return without_nul(text, f"{where}: text")


def tokenize(checkpoint: Source, text: Path, max_tokens: int) -> np.ndarray:
    """The first tokens of a text, after the checkpoint's beginning-of-sequence token: ids [T].

    Raises:
        CheckpointError: the text is missing, empty or not UTF-8, or the checkpoint has no tokenizer.
    """
    vocabulary = open_vocabulary(Path(checkpoint.folder))
    ids = encode_beginning(vocabulary, text, max_tokens)
    if not ids:
        raise CheckpointError(f"{text}: is empty; give a text of some hundred words.")
    bos = vocabulary.bos_id()
    return np.array([*([bos] if bos >= 0 else []), *ids][:max_tokens], np.int64)


def encode_beginning(vocabulary: Vocabulary, text: Path, max_tokens: int) -> list[int]:
    """The first tokens of a text, at most so many.

    Args:
        vocabulary: makes the tokens.
        text: a file, UTF-8.
        max_tokens: that are wanted.

    Raises:
        CheckpointError: the file cannot be read, or is not UTF-8.
    """
    with _readable(text), text.open(encoding="utf-8") as file:
        beginning = file.read(_PIECE * max_tokens)
    return vocabulary.encode(without_nul(beginning, text))[:max_tokens]


def without_nul(text: str, where: Path | str) -> str:
    """A text, whether it stood in a file as it is or was written in JSON or YAML.

    Raises:
        CheckpointError: it holds NUL, which no text does.
    """
    if "\0" in text:
        raise CheckpointError(f"{where}: holds NUL at character {text.index(chr(0))}: it is no text.")
    return text


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one line why a file is no text that can be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 at byte {error.start}; convert it.") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from None


__all__ = [
    "TextFile",
    "decode",
    "encode_beginning",
    "json_lines",
    "read_content",
    "read_documents",
    "tokenize",
    "without_nul",
]
