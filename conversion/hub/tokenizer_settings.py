# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a tokenizer is beside its pieces, as `TeleFLMTokenizer` reads it: special tokens, what comes around a text."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.errors import CheckpointError
from .sentencepiece_file import open_model

# In transformers' order, in which names that are no pieces get their ids.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerMismatch(CheckpointError):
    """A sentencepiece model cannot be said in the terms of `tokenizers`, or says something else there."""


@dataclass(frozen=True)
class SpecialToken:
    """A name at which texts are cut.

    Args:
        text: its name.
        id: its id.
        special: whether decoding can skip it.
    """

    text: str
    id: int
    special: bool = True


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a sentencepiece model add to it.

    Args:
        cuts: the names at which texts are cut.
        bos: the id that comes before every text, if one does.
        eos: the id that comes after every text, if one does.
    """

    cuts: tuple[SpecialToken, ...]
    bos: int | None
    eos: int | None


def default_settings(model_file: bytes) -> TokenizerSettings:
    """Those of a sentencepiece model without any file beside it."""
    pieces = open_model(model_file)
    ids = [index for index in (pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) if index >= 0]
    cuts = tuple(SpecialToken(pieces.id_to_piece(index), index) for index in ids)
    return TokenizerSettings(cuts, pieces.bos_id() if pieces.bos_id() >= 0 else None, None)


def read_names(config: Mapping[str, Any], model_file: bytes) -> dict[str, str | None]:
    """The special tokens that have a name, such as `bos_token`; the model's own where the configuration has none.

    Args:
        config: content of tokenizer_config.json.
        model_file: content of tokenizer.model.
    """
    pieces = open_model(model_file)
    own = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    own["pad_token"] = pieces.pad_id()
    texts = {name: pieces.id_to_piece(index) if index >= 0 else None for name, index in own.items()}
    return {name: name_of(config.get(name)) or texts.get(name) for name in (*NAMED, *_other_names(config))}


def read_settings(config: Mapping[str, Any], model_file: bytes) -> TokenizerSettings:
    """At which names `TeleFLMTokenizer` cuts texts, and what it puts around them.

    Args:
        config: content of tokenizer_config.json.
        model_file: content of tokenizer.model.

    Raises:
        TokenizerMismatch: it says what a tokenizer.json cannot.
    """
    pieces = open_model(model_file)
    named = read_names(config, model_file)
    unknown, own = named.pop("unk_token"), pieces.id_to_piece(pieces.unk_id())
    if unknown != own or unknown in (*named.values(), *_extra(config)):
        other = f"unk_token is {unknown!r}" if unknown != own else "another special token is that too"
        raise TokenizerMismatch(
            f"tokenizer_config.json: the unknown piece of tokenizer.model is {own!r}, and {other}; tokenizer.json "
            "cannot say that."
        )
    if config.get("split_special_tokens"):
        raise TokenizerMismatch("tokenizer_config.json: split_special_tokens is true, which tokenizer.json cannot say.")
    return special_tokens(config, model_file)


def special_tokens(config: Mapping[str, Any], model_file: bytes) -> TokenizerSettings:
    """What `read_settings` reads, whether or not a tokenizer.json can say it: at the unknown piece no text is cut."""
    pieces = open_model(model_file)
    named = read_names(config, model_file)
    unknown = named.pop("unk_token")
    specials = [text for text in (*named.values(), *_extra(config)) if text and text != unknown]
    ids = {text: index for index, text in _decoder_entries(config) if text != unknown}
    following = max([pieces.get_piece_size() - 1, *ids.values()]) + 1
    for text in dict.fromkeys(specials):
        if text not in ids:
            index = pieces.piece_to_id(text)
            is_piece = pieces.id_to_piece(index) == text
            ids[text] = index if is_piece else following
            following += not is_piece
    cuts = tuple(SpecialToken(text, index, text in specials) for text, index in sorted(ids.items(), key=lambda x: x[1]))
    has_bos, has_eos = _frame(config)
    bos, eos = named["bos_token"], named["eos_token"]
    return TokenizerSettings(cuts, ids.get(bos or "") if has_bos else None, ids.get(eos or "") if has_eos else None)


def _frame(config: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether <s> comes before a text, and </s> behind it."""
    pattern = config.get("special_tokens_pattern", "bos")
    flags = (("add_bos_token", "bos"), ("add_eos_token", "eos"))
    given = [config.get(flag) for flag, _ in flags]
    said = [word in str(pattern) if flag is None else bool(flag) for (_, word), flag in zip(flags, given, strict=True)]
    return said[0], said[1]


def name_of(value: Any) -> str | None:
    """The name of a special token, which may be there with its properties."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) and found else None


def _other_names(config: Mapping[str, Any]) -> list[str]:
    """Special tokens of other kinds, for example of images: whatever is called a token and is one to transformers."""
    others = (name for name in config if name.endswith("_token") and name not in NAMED)
    return [name for name in others if _is_token(config[name])]


def _is_token(value: Any) -> bool:
    is_token = isinstance(value, str) or (isinstance(value, Mapping) and value.get("__type") == "AddedToken")
    return is_token and name_of(value) is not None


def _extra(config: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens that have no name of their own in the configuration."""
    by_kind, listed = extra_tokens(config)
    yield from (*by_kind.values(), *listed)


def extra_tokens(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The names of further special tokens: those that have a kind, and the others.

    As transformers reads them, `additional_special_tokens` count only where `extra_special_tokens` is no list of some.
    """
    said, older = config.get("extra_special_tokens") or [], config.get("additional_special_tokens") or []
    by_kind = said if isinstance(said, Mapping) else {}
    listed = said if isinstance(said, list) and said else older if isinstance(older, list) else []
    return (
        {str(kind): name for kind, value in by_kind.items() if (name := name_of(value))},
        [name for value in listed if (name := name_of(value))],
    )


def _decoder_entries(config: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Ids and names of the tokens that were added to the vocabulary, or marked in it."""
    entries = config.get("added_tokens_decoder")
    found = []
    for index, token in entries.items() if isinstance(entries, Mapping) else ():
        name = name_of(token)
        if name is None or not re.fullmatch("[0-9]{1,9}", str(index)):
            raise CheckpointError(
                f"tokenizer_config.json: added_tokens_decoder has {str(index)[:20]!r}: {repr(token)[:60]}; remove it."
            )
        found.append((int(index), name))
    return found


__all__ = [
    "NAMED",
    "SpecialToken",
    "TokenizerMismatch",
    "TokenizerSettings",
    "default_settings",
    "extra_tokens",
    "name_of",
    "read_names",
    "read_settings",
    "special_tokens",
]
