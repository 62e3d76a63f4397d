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
from ..checkpoint.errors import CheckpointError, one_line
from ..checkpoint.strict_json import read_json_object
from ..family import LLAMA, TELEFLM, Family, find_family
from .card import CARD, CardFacts, render_card, with_files
from .small_files import check_read_files, copied_file, small_files

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TOKENIZER_CODE = "tokenization_teleflm.py"
CODE_FILES = ("configuration_teleflm.py", "modeling_teleflm.py", TOKENIZER_CODE)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"

# Without these, transformers would encode with a class of its own, and other ids.
_TOKENIZER_CLASS = {
    "tokenizer_class": "TeleFLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]},
}
_TOKENIZER = "tokenizer.json"
_ADDED_TOKENS = "added_tokens.json"
_MAX_TOKENIZER = 2**30  # bytes of memory; that of Llama 3 is thought to take 150 MB
_SETTINGS_WITH_PATHS = (_TOKENIZER_CONFIG, "generation_config.json")
_PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
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
    kept = {key: value for key, value in base.items() if key not in _PLACES}
    own = {"architectures": [LLAMA.model_class], **dict.fromkeys(spelled, dtype)}
    return dict(sorted({**architecture.to_config(kept), **own}.items()))


def hub_sidecars(
    source: Path,
    facts: CardFacts,
    code: Sequence[str] = CODE_FILES,
    *,
    origin: Path | None = None,
    family: Family | None = TELEFLM,
) -> dict[str, str | bytes]:
    """The other files of an output folder: our code, the source's settings and licence, the model card.

    The source's code and card are left behind: their place is taken by ours. `small_files.left_behind` says so. Of a
    Llama, tokenizer and settings go along as they are, with the code that the tokenizer names, and without any of ours.

    Args:
        source: folder to copy from.
        facts: what its card says, beside what follows from these files and from the source's card.
        code: which of our files the output needs.
        origin: folder of the model whose card and licence count; `source` unless given.
        family: of the model in `source`.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder.
    """
    if family is LLAMA:
        return _llama_sidecars(source, facts)
    package = package_folder()
    files: dict[str, str | bytes] = {name: str(package / name) for name in code}
    check_read_files(source)
    files |= {name: path for name, path in small_files(source, {}).items() if name != CARD}
    if "tokenizer.model" in files:
        tokenizer = load_config(source / _TOKENIZER_CONFIG) if copied_file(source, _TOKENIZER_CONFIG) else {}
        files[_TOKENIZER_CONFIG] = (json.dumps({**_public(tokenizer), **_TOKENIZER_CLASS}, indent=2) + "\n").encode()
        if "chat_template" not in tokenizer:
            files.setdefault(_CHAT_TEMPLATE, str(package / _CHAT_TEMPLATE))
    for name in _SETTINGS_WITH_PATHS:
        if isinstance(path := files.get(name), str) and (said := load_config(Path(path))) != _public(said):
            files[name] = (json.dumps(_public(said), indent=2, ensure_ascii=False) + "\n").encode()
    files[CARD] = render_card(with_files(facts, origin or source, files)).encode()
    return files


def _llama_sidecars(source: Path, facts: CardFacts) -> dict[str, str | bytes]:
    check_read_files(source)
    named = ("config.json", _TOKENIZER_CONFIG)  # which may name code of the tokenizer
    found = small_files(source, {name: load_config(source / name) for name in named if copied_file(source, name)})
    files: dict[str, str | bytes] = {name: path for name, path in found.items() if name != CARD}
    files[CARD] = render_card(with_files(facts, source, files)).encode()
    return files


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without where they lay on the machine of whoever saved them, which tells a reader nothing."""
    return {name: value for name, value in settings.items() if name not in _PLACES}


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
    if path := copied_file(folder, _TOKENIZER):
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
    if path := copied_file(folder, _TOKENIZER_CONFIG):
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
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())  # sentencepiece itself opens UTF-8 names alone
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a sentencepiece model ({one_line(error)}); restore it or remove it."
        ) from None
