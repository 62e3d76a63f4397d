# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The tokenizer's files of an output folder: what `TeleFLMTokenizer` reads, and what reads the same without our code.

Both read one tokenizer_config.json, and transformers merges older files into it by rules of its own
(special_tokens_map.json, added_tokens.json, the added tokens of a tokenizer.json). So these are merged here, once, and
the output has none but the one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architecture import load_config
from ..checkpoint.errors import CheckpointError
from ..checkpoint.strict_json import read_json_object
from .small_files import copied_file
from .tokenizer_process import make_tokenizer
from .tokenizer_settings import NAMED, TokenizerMismatch, TokenizerSettings, extra_tokens

TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_SPECIAL_TOKENS_MAP, _ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
_MERGED_FILES = (_SPECIAL_TOKENS_MAP, _ADDED_TOKENS)
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
_FILES = (TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG, *_MERGED_FILES)

# Without these, transformers would encode with a class of its own, and other ids.
_OWN_CLASS = {
    "tokenizer_class": "TeleFLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]},
}
_STOCK_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
# What other classes read otherwise than ours, or what is said anew.
_DROPPED = (
    *("unk_token", "add_bos_token", "add_eos_token", "special_tokens_pattern", "added_tokens_decoder"),
    *("tokenizer_class", "auto_map", "add_prefix_space", "backend", "fast_tokenizer_files", "from_slow", "legacy"),
    *("sp_model_kwargs", "use_fast", "vocab_file", "clean_up_tokenization_spaces", "model_input_names"),
    *(_EXTRA, _ADDITIONAL, "tokenizer_object"),
)
PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of an output.

    Args:
        files: name -> content of what it has.
        dropped: names of the source's files that it does not have.
        problem: why stock programs have no tokenizer there; None if they have.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    problem: str | None = None


def tokenizer_files(source: Path, *, stock: bool) -> TokenizerFiles:
    """What the output has of the tokenizer of a folder, which has a tokenizer.model.

    Args:
        source: the folder.
        stock: whether the output is for programs without our code. If it is not, and they would read other ids, it is
            written for `TeleFLMTokenizer` alone; if it is, without a tokenizer.

    Raises:
        CheckpointError: a file cannot be read, or is not what its name says.
    """
    config = public_settings(_read(source, TOKENIZER_CONFIG) or {})
    merged = _merged(source, config)
    try:
        model_file = (source / TOKENIZER_MODEL).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source}/{TOKENIZER_MODEL}: {error.strerror}.") from None
    files = {TOKENIZER_MODEL: model_file}
    try:
        made = make_tokenizer(model_file, merged)
    except TokenizerMismatch as error:
        if stock:
            return TokenizerFiles({}, _FILES, str(error))
        # The tokens that a tokenizer.json adds are lost with it, unless the configuration has them.
        adds = bool(merged.get("added_tokens_decoder")) and merged != config
        files[TOKENIZER_CONFIG] = _json({**(merged if adds else config), **_OWN_CLASS})
        return TokenizerFiles(files, (TOKENIZER_JSON, *(_MERGED_FILES if adds else ())), str(error))
    except CheckpointError as error:
        raise CheckpointError(f"{source}/{error}") from None
    files[TOKENIZER_JSON] = made.text.encode()
    files[TOKENIZER_CONFIG] = _json(_config(merged, made.names, made.settings, stock=stock))
    return TokenizerFiles(files, _MERGED_FILES)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without where they lay on the machine of whoever saved them, which tells a reader nothing."""
    return {name: value for name, value in settings.items() if name not in PLACES}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = copied_file(folder, name)
    return load_config(Path(path)) if path else None


# What the files of a source say, as transformers reads them.


def merged_settings(source: Path) -> dict[str, Any]:
    """What transformers makes of the tokenizer_config.json of a folder and the older files beside it.

    Raises:
        CheckpointError: a file cannot be read, or is not what its name says.
    """
    return _merged(source, public_settings(_read(source, TOKENIZER_CONFIG) or {}))


def _merged(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with what transformers adds to it of the files beside it."""
    merged = dict(config)
    if "added_tokens_decoder" in merged:
        return merged
    older = _read(source, _SPECIAL_TOKENS_MAP) or {}
    merged = {name: value for name, value in merged.items() if name not in (_EXTRA, _ADDITIONAL)}
    merged |= {name: _typed(value) for name, value in older.items() if name not in (_EXTRA, _ADDITIONAL)}
    merged |= _said_extra(*_merged_extra(config, older))
    added: dict[str, Any] = {
        str(index): {"content": name} for name, index in (_read(source, _ADDED_TOKENS) or {}).items()
    }
    if path := copied_file(source, TOKENIZER_JSON):
        tokens = read_json_object(Path(path), infinite=True).get("added_tokens")
        entries = [dict(token) for token in tokens or [] if isinstance(token, Mapping) and "id" in token]
        added |= {str(token.pop("id")): token for token in entries}
    return {**merged, "added_tokens_decoder": added}


def _typed(value: Any) -> Any:
    """A token of special_tokens_map.json as tokenizer_config.json says it."""
    return {**value, "__type": "AddedToken"} if isinstance(value, Mapping) else value


def _merged_extra(config: Mapping[str, Any], older: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Further special tokens of both files: lists of the newer name add up, one of the older stands in for none."""
    (by_kind, listed), (other_kinds, more) = extra_tokens(config), extra_tokens(older)
    if other_kinds:
        listed = []
    if not listed or (isinstance(older.get(_EXTRA), list) and older[_EXTRA]):
        listed = [*dict.fromkeys([*listed, *more])]
    return {**by_kind, **other_kinds}, listed


def _said_extra(by_kind: Mapping[str, str], listed: list[str]) -> dict[str, Any]:
    """Further special tokens in the words of tokenizer_config.json, by name: not every class reads properties there."""
    if not by_kind:
        return {_EXTRA: listed} if listed else {}
    return {_EXTRA: dict(by_kind), **({_ADDITIONAL: listed} if listed else {})}


# What an output says.


def _config(
    merged: Mapping[str, Any], named: Mapping[str, str | None], settings: TokenizerSettings, *, stock: bool
) -> dict[str, Any]:
    """tokenizer_config.json for our class and for transformers' own, or for its own alone.

    It does not name the unknown piece: transformers' class would cut texts at `<unk>`, which is text to sentencepiece.
    """
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(token.id): {"content": token.text, **flags, "special": token.special} for token in settings.cuts}
    has_bos, has_eos = settings.bos is not None, settings.eos is not None
    frame: dict[str, Any] = {"special_tokens_pattern": "_".join(["bos"] * has_bos + ["eos"] * has_eos) or "none"}
    if stock:
        frame = {"add_bos_token": has_bos, "add_eos_token": has_eos}
    return {
        **{name: value for name, value in merged.items() if name not in (*_DROPPED, *NAMED)},
        **{name: text for name, text in named.items() if text and name != "unk_token"},
        **_said_extra(*extra_tokens(merged)),
        **frame,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **(_STOCK_CLASS if stock else _OWN_CLASS),
    }


__all__ = [
    "PLACES",
    "TOKENIZER_CONFIG",
    "TOKENIZER_JSON",
    "TOKENIZER_MODEL",
    "TokenizerFiles",
    "merged_settings",
    "public_settings",
    "tokenizer_files",
]
