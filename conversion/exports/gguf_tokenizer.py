# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The tokenizer of a Tele-FLM in the settings of GGUF, so that llama.cpp finds the ids that `TeleFLMTokenizer` finds.

`TeleFLMTokenizer` cuts a text at its special tokens and has sentencepiece encode each part: a space before it, and
user-defined symbols, such as <_user>, whole and without a space of their own. Nothing is put before a chat; a plain
text begins with <s>. llama.cpp (`tokenizer.ggml.model` = llama) merges as sentencepiece does, but cuts at user-defined
symbols as at special tokens, and has one pair of switches for chats and plain texts alike: `add_bos_token`, and
`add_space_prefix`, a space behind every cut. So no setting is right for both, and which is wanted is chosen:

    chat    both are off. The template writes the spaces, as text; a plain text has to begin with "<s> "
    text    both are as the tokenizer has them, for plain texts. There is no chat template, whose ids would be others
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..architecture import load_config, package_folder
from ..checkpoint.errors import CheckpointError
from ..checkpoint.gguf_file import Value
from ..hub.contents import open_pieces
from ..hub.sentencepiece_file import PieceType, SentencePieceFile, read_sentencepiece
from ..hub.small_files import copied_file

Prompts: TypeAlias = Literal["chat", "text"]

_FILE, _CONFIG, _TEMPLATE = "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"
_PADDING_SCORE = -10_000.0
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_GENERATION = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
_ELSEWHERE = "serve the model through transformers (--to granite) instead"


@dataclass(frozen=True)
class _SpecialTokens:
    """The tokens at which `TeleFLMTokenizer` cuts a text, and what it puts around one.

    Args:
        bos: id of the token that a text begins with.
        eos: of the one that ends a turn.
        unk: of the unknown piece, at which no text is cut.
        pad: of padding; None if there is none.
        cuts: names of all at which texts are cut.
        add_bos: whether a plain text begins with `bos`.
        add_eos: whether it ends with `eos`.
    """

    bos: int
    eos: int
    unk: int
    pad: int | None
    cuts: frozenset[str]
    add_bos: bool
    add_eos: bool


def tokenizer_settings(folder: Path, vocab_size: int, prompts: Prompts) -> tuple[dict[str, Value], str | None]:
    """The settings `tokenizer.*` of a GGUF file, and what the prompt of a plain text has to begin with; None of `text`.

    Args:
        folder: the model's.
        vocab_size: rows of its embedding; those without a piece get a name that no text makes.
        prompts: what llama.cpp is to tokenize right, see above.

    Raises:
        CheckpointError: there is no tokenizer.model, or llama.cpp would find other ids than its own runtime.
    """
    path = copied_file(folder, _FILE)
    if path is None:
        raise CheckpointError(f"{folder}: holds no {_FILE}, which a GGUF file has inside; put it there.")
    model = read_sentencepiece(Path(path).read_bytes(), path)
    config = load_config(folder / _CONFIG) if copied_file(folder, _CONFIG) else {}
    special = _special_tokens(Path(path), config)
    _check(model, special, vocab_size, path)
    names = [piece.text for piece in model.pieces]
    names += _padding_names(names, vocab_size)
    padding = vocab_size - len(model.pieces)
    scores = [piece.score for piece in model.pieces] + [_PADDING_SCORE] * padding
    types = [_type(piece.text, piece.type, special.cuts) for piece in model.pieces] + [PieceType.UNUSED] * padding
    _check_names(names, types, path)
    settings: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": np.asarray(scores, "<f4"),
        "tokenizer.ggml.token_type": np.asarray(types, "<i4"),
        "tokenizer.ggml.bos_token_id": np.uint32(special.bos),
        "tokenizer.ggml.eos_token_id": np.uint32(special.eos),
        "tokenizer.ggml.unknown_token_id": np.uint32(special.unk),
    }
    if special.pad is not None:
        settings["tokenizer.ggml.padding_token_id"] = np.uint32(special.pad)
    is_text = prompts == "text"
    settings["tokenizer.ggml.add_bos_token"] = is_text and special.add_bos
    settings["tokenizer.ggml.add_eos_token"] = is_text and special.add_eos
    settings["tokenizer.ggml.add_space_prefix"] = is_text and model.add_dummy_prefix
    if not is_text:
        settings["tokenizer.chat_template"] = spaced_template(
            _chat_template(folder, config), sorted(special.cuts), add_space=model.add_dummy_prefix
        )
    begin = (model.pieces[special.bos].text if special.add_bos else "") + " " * model.add_dummy_prefix
    return settings, None if is_text else begin


def _type(text: str, kind: PieceType, cuts: frozenset[str]) -> PieceType:
    """llama.cpp finds tokens of the types control, unknown and user-defined in a text: these are to be ours."""
    if text in cuts:
        return PieceType.CONTROL
    return PieceType.UNUSED if kind in (PieceType.CONTROL, PieceType.UNKNOWN) else kind


def _padding_names(names: Sequence[str], vocab_size: int) -> Iterator[str]:
    """Names for rows without a piece; llama.cpp wants them, each another."""
    taken = set(names)
    for number in range(len(names), vocab_size):
        name = f"[PAD{number}]"
        while name in taken:
            name = f"[{name}]"
        yield name


# What llama.cpp would do otherwise.


def _check(model: SentencePieceFile, special: _SpecialTokens, vocab_size: int, path: str) -> None:
    if len(model.pieces) > vocab_size:
        raise CheckpointError(f"{path}: has {len(model.pieces)} pieces, config.json a vocab_size of {vocab_size}.")
    missing = _BYTES - {piece.text for piece in model.pieces if piece.type == PieceType.BYTE}
    names = {piece.text for piece in model.pieces}
    foreign = sorted(special.cuts - names)
    reasons = {
        f"is a {model.algorithm} model, and llama.cpp merges such pieces as BPE does": model.algorithm != "bpe",
        f"has no pieces for {len(missing)} of the 256 bytes, which llama.cpp needs": bool(missing),
        "normalises characters, which llama.cpp does not": bool(model.charsmap),
        "removes extra spaces, which llama.cpp does not": model.remove_extra_whitespaces,
        "has spaces as they are, where llama.cpp has U+2581": not model.escape_whitespaces,
        "has spaces at the end of words, where llama.cpp has them at the beginning": model.space_as_suffix,
        "changes decoded text, which llama.cpp does not": model.has_denormalizer,
        "has unused pieces, which llama.cpp would use": bool(model.texts(PieceType.UNUSED)),
        f"has no piece {', '.join(foreign)}, a special token of {_CONFIG}": bool(foreign),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointError(f"{path}: {reason}, so that ids would be others; {_ELSEWHERE}.")


def _check_names(names: Sequence[str], types: Sequence[PieceType], path: str) -> None:
    """Check that llama.cpp makes no piece out of text that is none of text: it merges whatever has a name."""
    whole = {name for name, kind in zip(names, types, strict=True) if kind == PieceType.NORMAL}
    others = [name for name, kind in zip(names, types, strict=True) if kind in (PieceType.UNUSED, PieceType.BYTE)]
    for name in others:
        for cut in range(1, len(name)):
            if all(len(part) == 1 or part in whole for part in (name[:cut], name[cut:])):
                raise CheckpointError(
                    f"{path}: has the pieces {name[:cut]!r} and {name[cut:]!r}, of which llama.cpp would make "
                    f"{name!r}, a piece that no text has; {_ELSEWHERE}."
                )


# Special tokens, as `TeleFLMTokenizer` has them.


def _special_tokens(path: Path, config: Mapping[str, Any]) -> _SpecialTokens:
    pieces = open_pieces(path)
    where = path.with_name(_CONFIG)
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        name = _content(config.get(f"{role}_token"))
        ids[role] = getattr(pieces, f"{role}_id")() if name is None else pieces.piece_to_id(name)
        if name is not None and pieces.id_to_piece(ids[role]) != name:
            raise CheckpointError(f"{where}: {role}_token is {name!r}, which is no piece of {path.name}; {_ELSEWHERE}.")
    for role in ("bos", "eos", "unk"):
        if ids[role] < 0:
            raise CheckpointError(f"{path}: has no {role} token, which llama.cpp takes for granted; {_ELSEWHERE}.")
    names = {pieces.id_to_piece(number) for number in ids.values() if number >= 0} | {*_added(config, where)}
    pattern = config.get("special_tokens_pattern", "bos")
    adds = {
        end: config[f"add_{end}_token"] if isinstance(config.get(f"add_{end}_token"), bool) else end in str(pattern)
        for end in ("bos", "eos")
    }
    return _SpecialTokens(
        ids["bos"],
        ids["eos"],
        ids["unk"],
        ids["pad"] if ids["pad"] >= 0 else None,
        frozenset(names - {pieces.id_to_piece(ids["unk"])}),
        adds["bos"],
        adds["eos"],
    )


def _added(config: Mapping[str, Any], where: Path) -> Iterator[str]:
    """Names of the tokens that a tokenizer_config.json adds to the four."""
    for field in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        said = config.get(field) or []
        for value in said.values() if isinstance(said, Mapping) else said if isinstance(said, list) else [said]:
            name = _content(value)
            if name is None:
                raise CheckpointError(f"{where}: {field} has {str(value)[:80]!r}, expected names of tokens.")
            yield name


def _content(token: Any) -> str | None:
    """The name of a token, which may be an object."""
    name = token.get("content") if isinstance(token, Mapping) else token
    return name if isinstance(name, str) and name else None


# The chat template.


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    """The one that transformers would use: that of the folder, of its tokenizer_config.json, or ours."""
    if path := copied_file(folder, _TEMPLATE):
        return Path(path).read_text("utf-8")
    said = config.get("chat_template")
    named = (
        {entry.get("name"): entry.get("template") for entry in said if isinstance(entry, Mapping)}
        if isinstance(said, list)
        else {"default": said}
    )
    template = named.get("default")
    return template if isinstance(template, str) else (package_folder() / _TEMPLATE).read_text("utf-8")


def spaced_template(template: str, cuts: Sequence[str], *, add_space: bool) -> str:
    """A chat template that writes what another writes, and a space before each part between special tokens.

    Args:
        template: the other. Its marks of what is generated, which only transformers knows, become comments.
        cuts: the names of the special tokens.
        add_space: whether the tokenizer puts a space there.
    """
    plain = _GENERATION.sub(r"{#\1 \2 \3#}", template)
    if not add_space:
        return plain
    inner = "{% if gguf_PART %}{{ ' ' ~ gguf_PART }}{% endif %}".replace("PART", str(len(cuts)))
    # The longest name is cut at first: none hides in another.
    for number, name in reversed([*enumerate(sorted(cuts, key=len, reverse=True))]):
        quoted = json.dumps(name, ensure_ascii=False)
        inner = (
            f"{{% for gguf_{number + 1} in gguf_{number}.split({quoted}) %}}"
            f"{{% if not loop.first %}}{{{{ {quoted} }}}}{{% endif %}}{inner}{{% endfor %}}"
        )
    return "{% set gguf_0 %}" + plain.removesuffix("\n") + "{% endset %}" + inner


__all__ = ["Prompts", "spaced_template", "tokenizer_settings"]
