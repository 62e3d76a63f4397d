# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What makes a folder of weights a Hub repository: configuration, code, tokenizer and other small files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architecture import Architecture, load_config, model_code_constant, package_folder, rope_parameters
from ..checkpoint.errors import CheckpointError
from ..checkpoint.strict_json import read_json_object
from ..family import LLAMA, TELEFLM, Family, find_family
from .card import CARD, TOKENIZER_CODE, CardFacts, render_card, with_files
from .sentencepiece_file import open_model
from .small_files import check_read_files, copied_file, left_behind, small_files
from .tokenizer_files import (
    PLACES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TokenizerFiles,
    public_settings,
    tokenizer_files,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

CODE_FILES = ("configuration_teleflm.py", "modeling_teleflm.py", TOKENIZER_CODE)
_CHAT_TEMPLATE = "chat_template.jinja"
_GENERATION_CONFIG = "generation_config.json"
_ADDED_TOKENS = "added_tokens.json"
_MAX_TOKENIZER = 2**30  # bytes of memory; that of Llama 3 is thought to take 150 MB
_OLD_SPELLINGS = ("torch_dtype", "rope_theta", "rope_scaling", "transformers_version", "_name_or_path", "auto_map")


def hub_config(base: Mapping[str, Any], architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of an output folder: `base` in today's spelling, with our numbers, code and dtype.

    That of a Llama stays as it is but for numbers and dtype: other programs than transformers read its older spellings.

    Args:
        base: configuration of the source; fields we do not know are kept.
        architecture: the output's numbers.
        dtype: of the output's weights, for example `bfloat16`.
    """
    if find_family(base) is LLAMA:
        return _llama_config(base, architecture, dtype)
    kept = {key: value for key, value in base.items() if key not in _OLD_SPELLINGS}
    own = {
        "architectures": ["TeleFLMForCausalLM"],
        "auto_map": model_code_constant("modeling_teleflm.py", "AUTO_MAP"),
        "dtype": dtype,
        "rope_parameters": rope_parameters(base, "the source's config.json"),
    }
    return dict(sorted({**architecture.to_config(kept), **own}.items()))


def _llama_config(base: Mapping[str, Any], architecture: Architecture, dtype: str) -> dict[str, Any]:
    spelled = [name for name in ("dtype", "torch_dtype") if name in base] or ["dtype"]
    kept = {key: value for key, value in base.items() if key not in PLACES}
    own = {"architectures": [LLAMA.model_class], **dict.fromkeys(spelled, dtype)}
    return dict(sorted({**architecture.to_config(kept), **own}.items()))


def hub_sidecars(
    source: Path,
    facts: CardFacts,
    code: Sequence[str] = CODE_FILES,
    *,
    origin: Path | None = None,
    family: Family | None = TELEFLM,
    stock: bool = False,
) -> dict[str, str | bytes]:
    """The other files of an output folder: our code, the source's settings and licence, the model card.

    The source's code and card are left behind: their place is taken by ours. A tokenizer.model is accompanied by a
    tokenizer.json that was compared with it. `sidecar_notes` says what became of the source's files. Of a Llama,
    tokenizer and settings go along as they are, with the code that the tokenizer names, and without any of ours.

    Args:
        source: folder to copy from.
        facts: what its card says, beside what follows from these files and from the source's card.
        code: which of our files the output needs.
        origin: folder of the model whose card and licence count; `source` unless given.
        family: of the model in `source`.
        stock: whether the output is loaded without our code: its tokenizer then is what its tokenizer.json says.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder, or not what its name says.
    """
    if family is LLAMA:
        return _llama_sidecars(source, facts)
    package = package_folder()
    files: dict[str, str | bytes] = {name: str(package / name) for name in code}
    check_read_files(source)
    files |= {name: path for name, path in small_files(source, {}).items() if name != CARD}
    if TOKENIZER_MODEL in files:
        tokenizer = tokenizer_files(source, stock=stock)
        files = {name: content for name, content in files.items() if name not in tokenizer.dropped}
        files |= tokenizer.files
        settings = tokenizer.files.get(TOKENIZER_CONFIG)
        if settings and "chat_template" not in json.loads(settings):
            files.setdefault(_CHAT_TEMPLATE, str(package / _CHAT_TEMPLATE))
    for name in (TOKENIZER_CONFIG, _GENERATION_CONFIG):
        if isinstance(path := files.get(name), str) and (said := load_config(Path(path))) != public_settings(said):
            files[name] = (json.dumps(public_settings(said), indent=2, ensure_ascii=False) + "\n").encode()
    files[CARD] = render_card(with_files(facts, origin or source, files)).encode()
    return files


def _llama_sidecars(source: Path, facts: CardFacts) -> dict[str, str | bytes]:
    check_read_files(source)
    named = ("config.json", TOKENIZER_CONFIG)  # which may name code of the tokenizer
    found = small_files(source, {name: load_config(source / name) for name in named if copied_file(source, name)})
    files: dict[str, str | bytes] = {name: path for name, path in found.items() if name != CARD}
    files[CARD] = render_card(with_files(facts, source, files)).encode()
    return files


def sidecar_notes(
    source: Path, files: Mapping[str, str | bytes], *, family: Family | None = TELEFLM, stock: bool = False
) -> list[str]:
    """Notes on `hub_sidecars`: what stays behind, and why there is no tokenizer, or none for programs without our code.

    Args:
        source: the folder that was copied from.
        files: what `hub_sidecars` made of it.
        family, stock: as given there.
    """
    if family is LLAMA or not (source / TOKENIZER_MODEL).is_file():
        return left_behind(source, files)
    tokenizer = tokenizer_files(source, stock=stock)
    notes = left_behind(source, files, elsewhere=(*tokenizer.files, *tokenizer.dropped))
    return notes + _tokenizer_notes(source, tokenizer, stock=stock)


def tokenizer_notes(source: Path, *, family: Family | None = TELEFLM) -> list[str]:
    """Those of `sidecar_notes` that are on the tokenizer."""
    if family is LLAMA or not (source / TOKENIZER_MODEL).is_file():
        return []
    return _tokenizer_notes(source, tokenizer_files(source, stock=False), stock=False)


def _tokenizer_notes(source: Path, tokenizer: TokenizerFiles, *, stock: bool) -> list[str]:
    if tokenizer.problem and stock:
        return [f"Written without a tokenizer, as stock programs would read other ids: {tokenizer.problem}"]
    merged = [name for name in tokenizer.dropped if name != TOKENIZER_JSON and (source / name).is_file()]
    notes = [f"{TOKENIZER_CONFIG} says what was in {' and '.join(merged)}."] if merged else []
    if tokenizer.problem:
        return [f"There is no {TOKENIZER_JSON}, so only our code reads the tokenizer: {tokenizer.problem}", *notes]
    old = source / TOKENIZER_JSON
    if old.is_file() and old.read_bytes() != tokenizer.files[TOKENIZER_JSON]:
        notes.append(f"{TOKENIZER_JSON} is made of {TOKENIZER_MODEL}, and is not the one of the source.")
    return notes


def count_pieces(folder: Path) -> int | None:
    """Number of pieces of the folder's sentencepiece tokenizer, or None if it has none.

    Raises:
        CheckpointError: tokenizer.model cannot be read.
    """
    path = folder / "tokenizer.model"
    return open_pieces(path).get_piece_size() if path.is_file() else None


def count_token_ids(folder: Path) -> int | None:
    """One more than the largest token id that the tokenizer of a folder makes, or None if there is no tokenizer.

    A tokenizer.json counts before a tokenizer.model, as in transformers; and what was added to the vocabulary, wherever
    it is noted: there, in added_tokens.json or in tokenizer_config.json.

    Raises:
        CheckpointError: one of the files cannot be read.
    """
    ids: list[int] = []
    if path := copied_file(folder, TOKENIZER_JSON):
        said = read_json_object(Path(path), limit=_MAX_TOKENIZER)
        model = said.get("model")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
        if isinstance(vocabulary, Mapping):
            ids += _ids(vocabulary.values())
        elif isinstance(vocabulary, list):  # of a unigram model, in the order of their ids
            ids.append(len(vocabulary) - 1)
        added = said.get("added_tokens")
        ids += _ids(entry.get("id") for entry in added if isinstance(entry, Mapping)) if isinstance(added, list) else []
    elif (pieces := count_pieces(folder)) is not None:
        ids.append(pieces - 1)
    if not ids:
        return None
    if path := copied_file(folder, _ADDED_TOKENS):
        ids += _ids(read_json_object(Path(path)).values())
    if path := copied_file(folder, TOKENIZER_CONFIG):
        decoder = load_config(Path(path)).get("added_tokens_decoder")
        ids += [int(key) for key in decoder if key.isdecimal()] if isinstance(decoder, Mapping) else []
    return max(ids) + 1


def _ids(values: Iterable[Any]) -> list[int]:
    return [value for value in values if type(value) is int]


def open_pieces(path: Path) -> "SentencePieceProcessor":
    """Open a sentencepiece model, whatever its folder is called.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        return open_model(path.read_bytes(), str(path))  # sentencepiece itself opens UTF-8 names alone
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from None
