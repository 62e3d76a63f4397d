# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Show what is trained on and what is not, token by token, before anything is."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.checks import Reject
from sft.data.labels import Labelling, Tokenized, tokenize_rows

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 4  # tokens before one that decide how it is spelled: a space, the bytes of a character


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that spell whole characters: one, or the several that share a character.

    Args:
        text: what they spell; characters that would not show, or would steer a terminal, by their names.
        ids: the tokens.
        weight: of their loss; 0 is not trained on.
    """

    text: str
    ids: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class PreviewedRow:
    """A row as it is trained on: where it stands, its pieces in order, and whether its end was cut off."""

    source: str
    pieces: tuple[Piece, ...]
    truncated: bool

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained on."""
        return sum(len(piece.ids) for piece in self.pieces if piece.weight)

    def __str__(self) -> str:
        cut = ", cut at max_length" if self.truncated else ""
        return f"{self.source}: {self.trained_tokens} trained of {self.tokens} tokens{cut}"


def preview(
    data: str | Path | Sequence[str | Path], tokenizer: "PreTrainedTokenizerBase", labelling: Labelling, count: int = 3
) -> list[PreviewedRow | Reject]:
    """The first rows that are trained on, and the rejects among them; no more of the data is read.

    Args:
        data: see [`sft.data.formats.read_rows`].
        tokenizer, labelling: see [`sft.data.labels.tokenize_rows`].
        count: how many rows that are trained on, at most.

    Raises:
        DataError: as [`sft.data.labels.tokenize_rows`] says.
    """
    shown: list[PreviewedRow | Reject] = []
    for _, outcome in tokenize_rows(data, tokenizer, labelling):
        if isinstance(outcome, Reject):
            shown.append(outcome)
            continue
        shown.append(PreviewedRow(outcome.conversation.source, tuple(spell(outcome, tokenizer)), outcome.truncated))
        if sum(isinstance(row, PreviewedRow) for row in shown) == count:
            break
    return shown


def spell(row: Tokenized, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Piece]:
    """Cut a row into pieces by decoding it with and without its next token."""
    ids, start = list(row.input_ids), 0
    for end in range(1, len(ids) + 1):
        first = max(0, start - _CONTEXT)
        before, after = (str(tokenizer.decode(ids[first:stop])) for stop in (start, end))
        is_whole = not after.endswith("\N{REPLACEMENT CHARACTER}")
        changes = end == len(ids) or row.weights[end] != row.weights[start]
        if is_whole or changes:
            yield Piece(visible(after[len(before) :]), tuple(ids[start:end]), row.weights[start])
            start = end


def visible(text: str) -> str:
    """A text, with what would not show, or would act on a terminal, written out; line breaks stay."""
    return "".join(char if char == "\n" or char.isprintable() else _name(char) for char in text)


def _name(char: str) -> str:
    if unicodedata.category(char) == "Zs":
        return char
    return f"\\u{ord(char):04x}" if ord(char) > 0xFF else f"\\x{ord(char):02x}"


def render_text(row: PreviewedRow, *, marks: bool) -> "Text":
    """A row for a terminal: what is trained on is green, the rest dim.

    Args:
        row: the row.
        marks: put what is trained on between marks as well, for where there are no colours.
    """
    from rich.text import Text

    text = Text()
    for weight, run in groupby(row.pieces, key=lambda piece: piece.weight):
        spelled = "".join(piece.text for piece in run)
        if not weight:
            text.append(spelled, style="dim")
            continue
        label = "" if weight == 1 else f"[x {weight:g}] "
        text.append(f"⟦{label}" if marks else label, style="bold")
        text.append(spelled, style="black on green" if weight == 1 else "black on yellow")
        text.append("⟧" if marks else "", style="bold")
    return text


__all__ = ["Piece", "PreviewedRow", "preview", "render_text", "spell", "visible"]
