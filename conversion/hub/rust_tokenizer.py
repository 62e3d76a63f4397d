# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A tokenizer.json for a sentencepiece model: what readers without our code tokenize with, through Rust's `tokenizers`.

`TeleFLMTokenizer` cuts a text at its special tokens and has sentencepiece encode each part by itself. The file says the
same in the terms of `tokenizers`, step by step:

    added tokens     cut the text at the special tokens, as it is written
    normalizer       a leading space for each part, no extra spaces if the model has it so, spaces become U+2581
    pre-tokenizer    user-defined symbols stand alone, as sentencepiece never merges them with their neighbours
    model            merges in the order of the pieces' scores; bytes for unknown characters
    post-processor   <s> in front
    decoder          the same backwards; the first space of each part was none

A symbol is no added token: those lie outside of the normaliser, so that the part behind one would begin with a space,
and one at the beginning of a text would have none before it. Instead the model takes a part that is a piece as that
piece (`ignore_merges`), and the few parts of which that is not true are cut in two beforehand, where sentencepiece cuts
them.

Whether it is the same is not a matter of belief: `tokenizer_check.py` compares both, and what differs is not written.
Two kinds of models cannot be the same, and are refused. Rules for characters (`nmt_nfkc` and the like) `tokenizers`
applies to user-perceived characters, some whole and some in parts, and sentencepiece to the longest text that has a
rule: the end of a line, "\\r\\n", tells them apart. And the best reading of a unigram model has the largest sum of
scores, which one adds up in 32 bits and the other in 64: a row of underscores tells.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .sentencepiece_file import (
    SPACE,
    PieceType,
    SentencePieceFile,
    open_model,
    read_sentencepiece,
    without_normalizer,
)
from .tokenizer_check import check_tokenizer
from .tokenizer_settings import SpecialToken, TokenizerMismatch, TokenizerSettings, default_settings

# Noncharacters, which are not meant for texts: while one is decoded, they stand behind a special token, before the
# surface of an unknown piece, and for the space with which a piece begins.
_BEHIND_SPECIAL, _BEFORE_UNKNOWN, _FIRST_SPACE = (f"{mark}\ufdef{mark}" for mark in "\ufdd0\ufdd1\ufdd2")
_MOST_CUTS = 20_000  # parts that are a piece to `tokenizers` and not to sentencepiece


@lru_cache(maxsize=8)
def rust_tokenizer(model_file: bytes, settings: TokenizerSettings | None = None) -> str:
    """The tokenizer.json of a sentencepiece model, compared with sentencepiece on thousands of texts.

    The same bytes give the same text, whatever the machine.

    Args:
        model_file: content of tokenizer.model.
        settings: special tokens; the model's own, and <s> before every text, unless given.

    Returns:
        The content of the file: JSON of the `tokenizers` library, 0.19.1 or later.

    Raises:
        TokenizerMismatch: there is no such file, or what it makes of a text differs; names the text and the ids.
        CheckpointError: `model_file` is no sentencepiece model.
    """
    settings = settings or default_settings(model_file)
    model = read_sentencepiece(model_file)
    content = tokenizer_json(model, model_file, settings)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    check_tokenizer(text, model, model_file, settings)
    return text


def tokenizer_json(model: SentencePieceFile, model_file: bytes, settings: TokenizerSettings) -> dict[str, Any]:
    """The content of the file, not compared with anything; see `rust_tokenizer`."""
    _refuse_unsayable(model)
    cut_names = {token.text for token in settings.cuts}
    symbols = [text for text in model.texts(PieceType.USER_DEFINED) if text not in cut_names]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token) for token in sorted(settings.cuts, key=lambda token: token.id)],
        "normalizer": _normalizer(model),
        "pre_tokenizer": _pre_tokenizer(symbols, _misread(model, model_file, cut_names) if symbols else {}),
        "post_processor": _post_processor(settings),
        "decoder": _decoder(model, settings),
        "model": _bpe(model, ignore_merges=bool(symbols)),
    }


def _refuse_unsayable(model: SentencePieceFile) -> None:
    unsayable = {
        f"its algorithm is {model.algorithm}, expected bpe": model.algorithm != "bpe",
        "its normaliser has rules for characters": bool(model.charsmap),
        "it puts spaces behind words (treat_whitespace_as_suffix)": model.space_as_suffix,
        "it keeps spaces as they are (escape_whitespaces is false)": not model.escape_whitespaces,
        "it has rules for decoded text (denormalizer_spec)": model.has_denormalizer,
        "it has unused pieces": bool(model.texts(PieceType.UNUSED)),
    }
    for reason, holds in unsayable.items():
        if holds:
            raise TokenizerMismatch(f"tokenizer.model: {reason}, which tokenizer.json cannot say.")


# Parts of the file.


def _added_token(token: SpecialToken) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token.id, "content": token.text, **flags, "special": token.special}


def _sequence(kind: str, steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", kind: list(steps)} if steps else None


def _replace(content: str, *, text: str | None = None, regex: str | None = None) -> dict[str, Any]:
    pattern = {"String": text} if regex is None else {"Regex": regex}
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizer(model: SentencePieceFile) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    prefix = SPACE if model.add_dummy_prefix else ""
    if prefix:  # before anything can make the text empty: sentencepiece asks whether it was
        steps.append({"type": "Prepend", "prepend": prefix})
    if model.remove_extra_whitespaces:
        steps.append(_replace(prefix, regex=rf"\A{prefix} +"))
        steps.append(_replace(" ", regex=" {2,}"))
        steps.append(_replace("", regex=rf"[ {SPACE}]+\z"))  # sentencepiece drops a written U+2581 there too
    steps.append(_replace(SPACE, text=" "))
    return _sequence("normalizers", steps)


def _pre_tokenizer(symbols: Sequence[str], misread: Mapping[str, int]) -> dict[str, Any] | None:
    """Cuts around symbols, and in those of the parts between them that are a piece to `tokenizers` alone."""
    steps = []
    if symbols:
        steps.append(_split("|".join(map(re.escape, sorted(symbols, key=lambda text: (-len(text), text))))))
    if misread:
        rests: dict[str, list[str]] = {}
        for text, cut in sorted(misread.items()):
            rests.setdefault(text[:cut], []).append(re.escape(text[cut:]))
        options = (rf"{re.escape(first)}(?=(?:{'|'.join(rest)})\z)" for first, rest in rests.items())
        steps.append(_split(rf"\A(?:{'|'.join(options)})"))
    return _sequence("pretokenizers", steps)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _post_processor(settings: TokenizerSettings) -> dict[str, Any]:
    """What `TeleFLMTokenizer` puts around texts, and around pairs: a second <s> only where no </s> is between."""
    names = {token.id: token.text for token in settings.cuts}
    bos = [_special(names[settings.bos])] if settings.bos is not None else []
    eos = [_special(names[settings.eos])] if settings.eos is not None else []
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    used = [index for index in (settings.bos, settings.eos) if index is not None]
    return {
        "type": "TemplateProcessing",
        "single": [*bos, a, *eos],
        "pair": [*bos, a, *(eos or bos), b, *eos],
        "special_tokens": {
            names[index]: {"id": names[index], "ids": [index], "tokens": [names[index]]} for index in sorted(set(used))
        },
    }


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _decoder(model: SentencePieceFile, settings: TokenizerSettings) -> dict[str, Any] | None:
    names = [token.text for token in settings.cuts]
    silent = [re.escape(text) for text in model.texts(PieceType.CONTROL) if text not in names]
    (unknown,) = model.texts(PieceType.UNKNOWN)
    steps = [_replace(name + _BEHIND_SPECIAL, regex=rf"\A{re.escape(name)}\z") for name in names]
    if silent:
        steps.append(_replace("", regex=rf"\A(?:{'|'.join(silent)})\z"))
    steps.append(_replace(_BEFORE_UNKNOWN + model.unk_surface, regex=rf"\A{re.escape(unknown)}\z"))
    has_prefix = model.add_dummy_prefix or model.remove_extra_whitespaces
    if has_prefix:
        steps.append(_replace(_FIRST_SPACE, regex=rf"\A{SPACE}"))
    steps.append(_replace(" ", text=SPACE))
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if has_prefix:  # of one piece, or of every piece up to the first character
        count = "*" if model.remove_extra_whitespaces else "?"
        steps.append(_replace("", regex=rf"\A(?:{_FIRST_SPACE}){count}|{_BEHIND_SPECIAL}(?:{_FIRST_SPACE}){count}"))
        steps.append(_replace(" ", text=_FIRST_SPACE))
    else:
        steps.append(_replace("", text=_BEHIND_SPECIAL))
    steps.append(_replace("", text=_BEFORE_UNKNOWN))
    return _sequence("decoders", steps)


# Models.


def _bpe(model: SentencePieceFile, *, ignore_merges: bool) -> dict[str, Any]:
    merges = piece_merges(model)
    has_spaces = any(" " in left or " " in right for left, right in merges)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.texts(PieceType.UNKNOWN)[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
        # As lines, which every version reads; in pairs only where a line would be ambiguous.
        "merges": [list(pair) if has_spaces else " ".join(pair) for pair in merges],
    }


def piece_merges(model: SentencePieceFile) -> list[tuple[str, str]]:
    """The merges of a BPE model, first to last.

    sentencepiece merges the two neighbours whose joint text is the piece of the highest score, the leftmost of several;
    `tokenizers` those whose pair is first in a list. So every way to join a piece is there, in the order of the pieces'
    scores. In which order those of one piece stand would only matter where two of them overlap in a text, which no
    vocabulary was found to allow.
    """
    known = {piece.text for piece in model.pieces if piece.type is PieceType.NORMAL}
    ranked = sorted((piece for piece in model.pieces if piece.type is PieceType.NORMAL), key=lambda piece: -piece.score)
    return [
        (text[:cut], text[cut:])
        for text, *_ in ranked
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]


def _misread(model: SentencePieceFile, model_file: bytes, never: set[str]) -> dict[str, int]:
    """Texts that are a piece by name and that sentencepiece reads as others: text -> where it can be cut in two.

    Nothing was merged over the end of one of the others, so that either side reads the same without the other.

    Args:
        model: the model.
        model_file: its file.
        never: names at which texts are cut, so that no part is one of them.
    """
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    is_part = (piece.type is not PieceType.USER_DEFINED and piece.text not in never for piece in model.pieces)
    texts = [piece.text for piece, holds in zip(model.pieces, is_part, strict=True) if holds]
    pieces = open_model(without_normalizer(model_file))
    read = zip(texts, pieces.encode(texts, num_threads=1), strict=True)
    misread = [text for text, read_as in read if list(read_as) != [ids[text]]]
    if len(misread) > _MOST_CUTS:
        raise TokenizerMismatch(
            f"tokenizer.model: sentencepiece never makes {len(misread)} of its pieces, expected at most {_MOST_CUTS}."
        )
    unsafe = {*misread}
    found: dict[str, int] = {}
    for text in misread:
        ends = [end for _, end in pieces.encode(text, return_type="offset_mapping")["offsets"]]
        cuts = [end for end in ends if 0 < end < len(text) and not unsafe & {text[:end], text[end:]}]
        if not cuts:
            raise TokenizerMismatch(
                f"tokenizer.model: sentencepiece reads {text!r} as {pieces.encode(text)}, and not as its piece "
                f"{ids[text]}; tokenizer.json cannot say that."
            )
        found[text] = cuts[0]
    return found


__all__ = ["rust_tokenizer", "tokenizer_json"]
