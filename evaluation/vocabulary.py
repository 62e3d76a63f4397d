# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The tokenizer beside a checkpoint, without transformers: a sentencepiece model, or one of the tokenizers library."""

from pathlib import Path
from typing import Any, Protocol

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.strict_json import read_json_object
from conversion.family import is_llama
from conversion.hub.contents import open_pieces

SENTENCEPIECE, TOKENIZER = "tokenizer.model", "tokenizer.json"


class Vocabulary(Protocol):
    """What makes token ids of text, without any that begin or end it; as sentencepiece calls it."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""

    def bos_id(self) -> int:
        """The token that the model expects before a text; -1 if none."""

    def unk_id(self) -> int:
        """The token of what the vocabulary does not have; -1 if none."""


class _Tokenizer:
    """A tokenizer.json. What it puts before an empty text is what the model expects before any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids; the name of a special token in the text is that token, as transformers has it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def bos_id(self) -> int:
        """The first token of an empty text."""
        return next(iter(self._tokenizer.encode("", add_special_tokens=True).ids), -1)

    def unk_id(self) -> int:
        """That of the model."""
        token = getattr(self._tokenizer.model, "unk_token", None)
        number = None if token is None else self._tokenizer.token_to_id(token)
        return -1 if number is None else number


def open_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer of a folder: its tokenizer.model, or else its tokenizer.json; of a Llama's the other way round.

    Raises:
        CheckpointError: there is neither, or it cannot be read.
    """
    path = folder / "config.json"
    names = (SENTENCEPIECE, TOKENIZER)
    names = names[::-1] if path.is_file() and is_llama(read_json_object(path, infinite=True)) else names
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: holds neither {SENTENCEPIECE} nor {TOKENIZER}; put the model's tokenizer there."
        )
    return _open_tokenizer(folder / found) if found == TOKENIZER else open_pieces(folder / found)


def _open_tokenizer(path: Path) -> Vocabulary:
    try:
        from tokenizers import Tokenizer

        return _Tokenizer(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from None
    except Exception as error:  # the library has no class of its own
        raise CheckpointError(f"{path}: is no tokenizer ({one_line(error)}); restore it or remove it.") from None


__all__ = ["SENTENCEPIECE", "TOKENIZER", "Vocabulary", "open_vocabulary"]
