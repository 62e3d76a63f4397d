# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a sentencepiece model file says, read without protobuf: its pieces with their types, and how it normalises text.

sentencepiece's own runtime encodes, but does not tell which pieces are user-defined, or what its normaliser does. The
file is a `ModelProto` of sentencepiece_model.proto; a field of a message is a varint of its number and wire type, and
its value.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # stands for a space in pieces


class PieceType(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece of the vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceFile:
    """A sentencepiece model.

    Args:
        pieces: the vocabulary.
        algorithm: `unigram`, `bpe`, `word` or `char`.
        byte_fallback: whether characters without a piece become bytes.
        unk_surface: what an unknown piece is decoded to.
        space_as_suffix: whether spaces are put at the end of words.
        charsmap: compiled rules of the normaliser; empty if it changes no character.
        add_dummy_prefix: whether a text begins with a space that it does not have.
        remove_extra_whitespaces: whether spaces at both ends, and all but one between words, are dropped.
        escape_whitespaces: whether spaces become `SPACE`.
        has_denormalizer: whether decoded text is changed by rules.
    """

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool
    unk_surface: str
    space_as_suffix: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    has_denormalizer: bool

    def texts(self, *types: PieceType) -> list[str]:
        """The pieces of some types."""
        return [piece.text for piece in self.pieces if piece.type in types]


_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_TYPES = {int(kind): kind for kind in PieceType}
_FLOAT = struct.Struct("<f")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Numbers of the fields of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK, _UNK_SURFACE = 3, 24, 35, 44
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE = 2, 3, 4, 5


def read_sentencepiece(content: bytes, where: str = "tokenizer.model") -> SentencePieceFile:
    """Read a sentencepiece model.

    Args:
        content: of the file.
        where: what to call it in errors.

    Raises:
        CheckpointError: it is no sentencepiece model.
    """
    try:
        return _model(content)
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise CheckpointError(f"{where}: not a sentencepiece model ({error}); restore it or remove it.") from None


@lru_cache(maxsize=2)
def open_model(content: bytes, where: str = "tokenizer.model") -> "SentencePieceProcessor":
    """sentencepiece's own runtime on a model.

    Args:
        content: of the file.
        where: what to call it in errors.

    Raises:
        CheckpointError: it is none.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{where}: not a sentencepiece model ({one_line(error)}); restore it or remove it."
        ) from None


def without_normalizer(content: bytes) -> bytes:
    """The same model with a normaliser that leaves text as it is, so that what it encodes are pieces as they stand.

    A message that is there twice is merged by whatever reads protobuf: what is appended has the last word.
    """
    fields = b"".join(bytes([number << 3, 0]) for number in (_DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE))
    message = bytes([_CHARSMAP << 3 | _BYTES, 0]) + fields
    return content + bytes([_NORMALIZER << 3 | _BYTES, len(message)]) + message


def _model(content: bytes) -> SentencePieceFile:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    denormalizer: dict[int, int | bytes] = {}
    messages = {_TRAINER: trainer, _NORMALIZER: normalizer, _DENORMALIZER: denormalizer}
    for number, value in _fields(content):
        if number == _PIECES:
            pieces.append(_usual_piece(_bytes(value)) or _piece(_message(value)))
        elif number in messages:
            messages[number].update(_message(value))
    algorithm = trainer.get(_MODEL_TYPE, 1)
    if not pieces or algorithm not in _ALGORITHMS:
        raise ValueError(f"{len(pieces)} pieces, model type {algorithm!r}")
    return SentencePieceFile(
        tuple(pieces),
        _ALGORITHMS[int(algorithm)],
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, False)),
        unk_surface=_text(trainer.get(_UNK_SURFACE, " \u2047 ".encode())),
        space_as_suffix=bool(trainer.get(_SUFFIX, False)),
        charsmap=_bytes(normalizer.get(_CHARSMAP, b"")),
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        remove_extra_whitespaces=bool(normalizer.get(_EXTRA_WHITESPACES, True)),
        escape_whitespaces=bool(normalizer.get(_ESCAPE, True)),
        has_denormalizer=bool(denormalizer.get(_CHARSMAP, b"")),
    )


def _usual_piece(content: bytes) -> Piece | None:
    """A piece whose fields are all there, or all but the type, in order, as every piece is written; None of another."""
    end = 2 + content[1] if len(content) > 1 else 0
    if content[:1] != b"\x0a" or end > 0x81 or content[end : end + 1] != b"\x15":
        return None
    (score,), rest = _FLOAT.unpack_from(content, end + 1), content[end + 5 :]
    if rest and (len(rest) != 2 or rest[0] != 0x18 or rest[1] not in _TYPES):
        return None
    return Piece(content[2:end].decode(), score, _TYPES[rest[1]] if rest else PieceType.NORMAL)


def _piece(fields: dict[int, int | bytes]) -> Piece:
    score = fields.get(_PIECE_SCORE, bytes(4))
    return Piece(
        _text(fields.get(_PIECE_TEXT, b"")),
        struct.unpack("<f", _bytes(score))[0],
        PieceType(int(fields.get(_PIECE_TYPE, PieceType.NORMAL))),
    )


def _message(value: int | bytes) -> dict[int, int | bytes]:
    return dict(_fields(_bytes(value)))


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number, expected bytes")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode()


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message, in order: number and value; fixed ones as their bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(content, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if size < 0 or at + size > len(content):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(content)}")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


__all__ = [
    "SPACE",
    "Piece",
    "PieceType",
    "SentencePieceFile",
    "open_model",
    "read_sentencepiece",
    "without_normalizer",
]
