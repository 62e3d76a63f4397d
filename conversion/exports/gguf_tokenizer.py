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

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..architecture import package_folder
from ..checkpoint.errors import CheckpointError
from ..checkpoint.gguf_file import Value
from ..hub.sentencepiece_file import SPACE, PieceType, SentencePieceFile, open_model, read_sentencepiece
from ..hub.small_files import copied_file
from ..hub.tokenizer_files import merged_settings
from ..hub.tokenizer_settings import name_of, read_names, special_tokens

Prompts: TypeAlias = Literal["chat", "text"]

_FILE, _TEMPLATE = "tokenizer.model", "chat_template.jinja"
_PADDING_SCORE = -10_000.0
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_QUOTED = r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' """
_TAG = re.compile(
    rf"""\{{\#.*?\#\}} | \{{\{{(?:{_QUOTED}|.)*?\}}\}}
    | \{{%(?P<before>[-+]?)\s*(?P<statement>\w+)(?:{_QUOTED}|.)*?(?P<after>[-+]?)%\}}""",
    re.VERBOSE | re.DOTALL,
)
_GENERATION = ("generation", "endgeneration")  # which only transformers knows
_STATEMENTS = {
    *("if", "elif", "else", "endif", "for", "endfor", "break", "continue", "set", "endset"),
    *("macro", "endmacro", "call", "endcall", "filter", "endfilter", *_GENERATION),
}
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
        names: those that have a name, such as `bos_token`.
        add_bos: whether a plain text begins with `bos`.
        add_eos: whether it ends with `eos`.
    """

    bos: int
    eos: int
    unk: int
    pad: int | None
    cuts: frozenset[str]
    names: Mapping[str, str]
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
    content = Path(path).read_bytes()
    model = read_sentencepiece(content, path)
    config = merged_settings(folder)
    special = _special_tokens(Path(path), content, config)
    _check(model, special, vocab_size, path)
    _check_cuts(special.cuts, model.texts(PieceType.USER_DEFINED), path)
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
        template = _chat_template(folder, config)
        _check_template(template, folder)
        settings["tokenizer.chat_template"] = spaced_template(
            template, sorted(special.cuts), add_space=model.add_dummy_prefix, names=special.names
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
        f"has no piece {', '.join(foreign)}, a special token of the tokenizer": bool(foreign),
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
            if (cut == 1 or name[:cut] in whole) and (cut == len(name) - 1 or name[cut:] in whole):
                raise CheckpointError(
                    f"{path}: has the pieces {name[:cut]!r} and {name[cut:]!r}, of which llama.cpp would make "
                    f"{name!r}, a piece that no text has; {_ELSEWHERE}."
                )


def _check_cuts(cuts: Iterable[str], symbols: Iterable[str], path: str) -> None:
    """Check that llama.cpp cuts a text where `TeleFLMTokenizer` and sentencepiece do.

    Those cut at special tokens, and what is between at symbols, from left to right; it cuts at the longest name of all
    first, and before spaces are U+2581. Only where one name begins in another can that make a difference.
    """
    cuts = {*cuts}
    symbols = {*symbols} - cuts
    if spaced := min((name for name in symbols if " " in name or SPACE in name), default=None):
        raise CheckpointError(
            f"{path}: has the symbol {spaced!r}, for which llama.cpp looks before it makes U+2581 of spaces; "
            f"{_ELSEWHERE}."
        )
    names = sorted(cuts | symbols)
    orders = [sorted(some, key=lambda name: -len(name.encode())) for some in (names, names[::-1])]
    at_cuts, at_symbols = _at(cuts), _at(symbols)
    for text in _overlaps(names):
        expected = _parts(_parts([text], at_cuts), at_symbols)
        if any(_parts_by_one(text, order) != expected for order in orders):
            raise CheckpointError(
                f"{path}: the text {text!r} is cut into {', '.join(map(repr, expected))} at symbols and special "
                f"tokens, by llama.cpp otherwise; {_ELSEWHERE}."
            )


def _overlaps(names: Sequence[str]) -> Iterator[str]:
    """Names that may have another inside, and texts in which one begins before another ends."""
    yield from names
    begins = defaultdict(list)
    for name in names:
        for end in range(1, len(name)):
            begins[name[:end]].append(name)
    for name in names:
        for start in range(1, len(name)):
            yield from (name[:start] + other for other in begins.get(name[start:], ()))


def _at(names: Iterable[str]) -> re.Pattern[str]:
    """Where texts are cut: at names, the longest where several begin."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'})")


def _parts(texts: Iterable[str], at: re.Pattern[str]) -> list[str]:
    """Texts, cut."""
    return [part for text in texts for part in at.split(text) if part]


def _parts_by_one(text: str, names: Iterable[str]) -> list[str]:
    """A text cut at one name after the other."""
    parts, known = [text], {*names}
    for name in names:
        if name in text:
            parts = [new for part in parts for new in ([part] if part in known else _parts([part], _at([name])))]
    return parts


# Special tokens, as `TeleFLMTokenizer` has them.


def _special_tokens(path: Path, content: bytes, config: Mapping[str, Any]) -> _SpecialTokens:
    pieces = open_model(content, str(path))
    where = path.parent
    _check_added(config, where)
    names, own = read_names(config, content), pieces.id_to_piece(pieces.unk_id())
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        name = names[f"{role}_token"]
        if name is None and role == "pad":
            continue
        if name is None:
            raise CheckpointError(f"{path}: has no {role} token, which llama.cpp takes for granted; {_ELSEWHERE}.")
        ids[role] = pieces.piece_to_id(name)
        if pieces.id_to_piece(ids[role]) != name:
            raise CheckpointError(f"{where}: {role}_token is {name!r}, which is no piece of {path.name}; {_ELSEWHERE}.")
    if names["unk_token"] != own:
        raise CheckpointError(
            f"{where}: unk_token is {names['unk_token']!r}, and the unknown piece of {path.name} is {own!r}, which is "
            f"llama.cpp's; {_ELSEWHERE}."
        )
    if config.get("split_special_tokens"):
        raise CheckpointError(
            f"{where}: split_special_tokens is true, and llama.cpp does not split them; {_ELSEWHERE}."
        )
    special = special_tokens(config, content)
    for token in special.cuts:
        found = pieces.piece_to_id(token.text)
        if pieces.id_to_piece(found) == token.text and found != token.id:
            raise CheckpointError(
                f"{where}: the id of {token.text!r} is {token.id}, and {found} in {path.name}, which is llama.cpp's; "
                f"{_ELSEWHERE}."
            )
    return _SpecialTokens(
        ids["bos"],
        ids["eos"],
        ids["unk"],
        ids.get("pad"),
        frozenset(token.text for token in special.cuts),
        {name: text for name, text in names.items() if text},
        special.bos is not None,
        special.eos is not None,
    )


def _check_added(config: Mapping[str, Any], where: Path) -> None:
    """Check the tokens that a configuration adds to those with a name."""
    for field in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        said = config.get(field) or []
        for value in said.values() if isinstance(said, Mapping) else said if isinstance(said, list) else [said]:
            if name_of(value) is None:
                raise CheckpointError(f"{where}: {field} has {str(value)[:80]!r}, expected names of tokens.")


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


def _check_template(template: str, folder: Path) -> None:
    """Check that llama.cpp knows the statements of a template: it loads no model with another."""
    for tag in _TAG.finditer(template):
        name = tag["statement"]
        if name and (name not in _STATEMENTS or "+" in (tag["before"], tag["after"])):
            raise CheckpointError(
                f"{folder}: the chat template has {tag[0][:60]!r}, which llama.cpp does not read, so that it would not "
                "load the model; write the template without it, or give --prompts text."
            )


def spaced_template(
    template: str, cuts: Sequence[str], *, add_space: bool, names: Mapping[str, str] | None = None
) -> str:
    """A chat template that writes what another writes, and a space before each part between special tokens.

    Args:
        template: the other. Its marks of what is generated, which only transformers knows, become comments.
        cuts: the names of the special tokens.
        add_space: whether the tokenizer puts a space there.
        names: what a template may call them, such as `pad_token`; llama.cpp gives it <s> and </s> alone.
    """
    plain = _TAG.sub(_without_marks, template)
    plain = (
        "".join(
            f"{{% set {name} = {_quoted(text)} %}}"
            for name, text in (names or {}).items()
            if name not in ("bos_token", "eos_token") and name.isidentifier() and re.search(rf"\b{name}\b", template)
        )
        + plain
    )
    if not add_space:
        return plain
    inner = "{% if gguf_PART %}{{ ' ' ~ gguf_PART }}{% endif %}".replace("PART", str(len(cuts)))
    # The longest name is cut at first: none hides in another.
    for number, name in reversed([*enumerate(sorted(cuts, key=len, reverse=True))]):
        inner = (
            f"{{% for gguf_{number + 1} in gguf_{number}.split({_quoted(name)}) %}}"
            f"{{% if not loop.first %}}{{{{ {_quoted(name)} }}}}{{% endif %}}{inner}{{% endfor %}}"
        )
    return "{% set gguf_0 %}" + plain.removesuffix("\n") + "{% endset %}" + inner


def _without_marks(tag: re.Match[str]) -> str:
    return f"{{#{tag['before']} {tag['statement']} {tag['after']}#}}" if tag["statement"] in _GENERATION else tag[0]


def _quoted(text: str) -> str:
    """A text as templates write it, with the escapes that llama.cpp reads too."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


__all__ = ["Prompts", "spaced_template", "tokenizer_settings"]
