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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architecture import load_config
from ..checkpoint.errors import CheckpointError
from ..checkpoint.strict_json import read_json_object
from .rust_tokenizer import SpecialToken, TokenizerMismatch, TokenizerSettings, rust_tokenizer
from .sentencepiece_file import open_model
from .small_files import copied_file

TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_SPECIAL_TOKENS_MAP, _ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
_MERGED_FILES = (_SPECIAL_TOKENS_MAP, _ADDED_TOKENS)
_FILES = (TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG, *_MERGED_FILES)

# Without these, transformers would encode with a class of its own, and other ids.
_OWN_CLASS = {
    "tokenizer_class": "TeleFLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]},
}
_STOCK_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
# In transformers' order, in which names that are no pieces get their ids.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What other classes read otherwise than ours, or what is said anew.
_DROPPED = (
    *("unk_token", "add_bos_token", "add_eos_token", "special_tokens_pattern", "added_tokens_decoder"),
    *("tokenizer_class", "auto_map", "add_prefix_space", "backend", "fast_tokenizer_files", "from_slow", "legacy"),
    *("sp_model_kwargs", "use_fast", "vocab_file", "clean_up_tokenization_spaces", "model_input_names"),
)
_PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")


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
        named = read_names(merged, model_file)
        settings = read_settings(merged, model_file)
        files[TOKENIZER_JSON] = rust_tokenizer(model_file, settings).encode()
    except TokenizerMismatch as error:
        if stock:
            return TokenizerFiles({}, _FILES, str(error))
        files[TOKENIZER_CONFIG] = _json({**config, **_OWN_CLASS})
        return TokenizerFiles(files, (TOKENIZER_JSON,), str(error))
    except CheckpointError as error:
        raise CheckpointError(f"{source}/{error}") from None
    files[TOKENIZER_CONFIG] = _json(_config(merged, named, settings, stock=stock))
    return TokenizerFiles(files, _MERGED_FILES)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without where they lay on the machine of whoever saved them, which tells a reader nothing."""
    return {name: value for name, value in settings.items() if name not in _PLACES}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = copied_file(folder, name)
    return load_config(Path(path)) if path else None


# What the files of a source say, as transformers reads them.


def _merged(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with what transformers adds to it of the files beside it."""
    merged = dict(config)
    if "added_tokens_decoder" in merged:
        return merged
    merged |= _read(source, _SPECIAL_TOKENS_MAP) or {}
    added: dict[str, Any] = {
        str(index): {"content": name} for name, index in (_read(source, _ADDED_TOKENS) or {}).items()
    }
    if path := copied_file(source, TOKENIZER_JSON):
        tokens = read_json_object(Path(path), infinite=True).get("added_tokens")
        added |= {str(token["id"]): token for token in tokens or [] if isinstance(token, Mapping) and "id" in token}
    return {**merged, "added_tokens_decoder": added}


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
    return {name: _name_of(config.get(name)) or texts.get(name) for name in (*_NAMED, *_other_names(config))}


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
    specials = [text for text in (*named.values(), *_extra(config)) if text]
    if unknown != own or unknown in specials:
        other = f"unk_token is {unknown!r}" if unknown != own else "another special token is that too"
        raise TokenizerMismatch(
            f"{TOKENIZER_CONFIG}: the unknown piece of {TOKENIZER_MODEL} is {own!r}, and {other}; {TOKENIZER_JSON} "
            "cannot say that."
        )
    if config.get("split_special_tokens"):
        raise TokenizerMismatch(f"{TOKENIZER_CONFIG}: split_special_tokens is true, which tokenizer.json cannot say.")
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
    return TokenizerSettings(cuts, ids[bos] if has_bos and bos else None, ids[eos] if has_eos and eos else None)


def _frame(config: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether <s> comes before a text, and </s> behind it."""
    pattern = config.get("special_tokens_pattern", "bos")
    flags = (("add_bos_token", "bos"), ("add_eos_token", "eos"))
    given = [config.get(flag) for flag, _ in flags]
    said = [word in str(pattern) if flag is None else bool(flag) for (_, word), flag in zip(flags, given, strict=True)]
    return said[0], said[1]


def _name_of(value: Any) -> str | None:
    """The name of a special token, which may be there with its properties."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) and found else None


def _other_names(config: Mapping[str, Any]) -> list[str]:
    """Special tokens of other kinds, for example of images: whatever is called a token and is a text."""
    return [name for name in config if name.endswith("_token") and name not in _NAMED and _name_of(config[name])]


def _extra(config: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens that have no name of their own in the configuration."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else []
    yield from filter(None, map(_name_of, values))


def _decoder_entries(config: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Ids and names of the tokens that were added to the vocabulary, or marked in it."""
    entries = config.get("added_tokens_decoder")
    found = []
    for index, token in entries.items() if isinstance(entries, Mapping) else ():
        name = _name_of(token)
        if name is None or not str(index).isdecimal():
            raise CheckpointError(f"{TOKENIZER_CONFIG}: added_tokens_decoder has {index!r}: {token!r}; remove that.")
        found.append((int(index), name))
    return found


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
        **{name: value for name, value in merged.items() if name not in (*_DROPPED, *_NAMED)},
        **{name: text for name, text in named.items() if text and name != "unk_token"},
        **frame,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **(_STOCK_CLASS if stock else _OWN_CLASS),
    }


__all__ = [
    "TOKENIZER_CONFIG",
    "TOKENIZER_JSON",
    "TOKENIZER_MODEL",
    "TokenizerFiles",
    "public_settings",
    "read_names",
    "read_settings",
    "tokenizer_files",
]
