# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which small files of a folder go with its weights to a new one: those on a list, and none from outside of the folder.

A folder may come from anyone. A link in it that leads elsewhere would make a file of this machine part of what is
written, and perhaps published; whatever else lies in it (optimizer states, logs, notes) is nobody's business.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..architecture import package_folder
from ..checkpoint.errors import CheckpointError
from ..checkpoint.folder_formats import HUB, is_setting, is_state, is_weights, known_files
from ..checkpoint.manifest import MANIFEST, OLD_MANIFEST, find_manifest, read_manifest
from ..checkpoint.sources import WEIGHT_FILES, outside_target
from ..checkpoint.strict_json import read_json_object

_NAMED = 6  # files that a note lists
_MAX_BYTES = 100_000_000  # the largest tokenizer.json that is published has 35 MB
_TEXTS = re.compile(r"README\.md|(LICEN[CS]E|NOTICE|Notice|COPYING|USE_POLICY)([-_.][\w.-]+)?")
_CODE = re.compile(r"\w+\.py")
_JSON_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"  # goes along, with our class in it
# Those that are written anew, or are another model's.
_NOT_COPIED = ("config.json", "adapter_config.json", MANIFEST, OLD_MANIFEST)
# What a Trainer saves with the weights under names that weights have too.
_OF_A_RUN = re.compile(r"scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|training_args\.bin")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack")


def copied_file(folder: Path, name: str) -> str | None:
    """The path of a small file of a folder that may be copied; None if there is none.

    Args:
        folder: where it may lie.
        name: its path in there.

    Raises:
        CheckpointError: it is a link to something outside of the folder (a snapshot of a Hub cache links to its
            blobs), no regular file, or too large to be what its name says.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    _refuse_outside(path, folder)
    if not path.is_file():
        what = "a link to nothing" if not path.exists() else "a folder" if path.is_dir() else "a pipe or a device"
        raise CheckpointError(f"{path}: is {what}, expected a file; put that there, or remove it.")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: has {path.stat().st_size} bytes, expected at most {_MAX_BYTES} of such a file; move it away."
        )
    return str(path)


def _refuse_outside(path: Path, folder: Path) -> None:
    if target := outside_target(path, folder):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside of {folder}; put a copy in its place if it belongs to the model, "
            "or remove it."
        )


def is_text(name: str) -> bool:
    """Whether a small file is for people to read: card, licence, notice."""
    return _TEXTS.fullmatch(name) is not None


def check_read_files(folder: Path) -> None:
    """Refuse a folder whose configuration, index or record, from which the output's are made, lies elsewhere.

    Neither may anything but a file have the name of a setting: an output would have another in its place, or none.

    Raises:
        CheckpointError: see `copied_file`.
    """
    record = find_manifest(folder)
    settings = (entry.name for entry in sorted(folder.iterdir()) if is_setting(entry.name) and not entry.is_file())
    for name in ("config.json", *(name for name in WEIGHT_FILES if name.endswith(".json")), *settings):
        if name not in HUB.folders:
            copied_file(folder, name)
    if record:
        _refuse_outside(record, folder)


def check_json_settings(folder: Path) -> None:
    """Check that the settings of a folder are JSON objects, which transformers takes for granted.

    Raises:
        CheckpointError: one is not; the message names it.
    """
    for name in _JSON_SETTINGS:
        if os.path.lexists(folder / name):
            read_json_object(folder / name, infinite=True)


def _listed(folder: Path) -> Iterator[str]:
    """The path of every file of a folder that may be known; a folder of templates may be a link within the folder."""
    for name in known_files(folder):
        path = folder / name
        if name not in HUB.folders or not path.is_dir():
            yield name
            continue
        _refuse_outside(path, folder)
        yield from (f"{name}/{entry.name}" for entry in sorted(path.iterdir()) if not entry.is_dir())


def left_behind(folder: Path, files: Mapping[str, str | bytes], *, elsewhere: Collection[str] = ()) -> list[str]:
    """Notes on the small files of a folder that do not go with its weights, or in whose place the output has its own.

    Of those that we wrote, as the folder's record says, nothing is said.

    Args:
        folder: the model's.
        files: the small files of the output: name -> path, or content.
        elsewhere: names of which something else is said.
    """
    said = (read_manifest(folder) or {}).get("files")
    said = said if isinstance(said, Mapping) else {}
    dropped = [
        name
        for name in _listed(folder)
        if files.get(name) != str(folder / name)
        and not name.startswith(".")
        and name not in (*_NOT_COPIED, _TOKENIZER_CONFIG, *elsewhere)
        and not is_weights(name)
        and not is_state(name)
        and (not name.endswith(_WEIGHT_SUFFIXES) or _OF_A_RUN.fullmatch(name))
        and not _is_ours(folder / name, said.get(name))
    ]
    has_code = any(map(_CODE.fullmatch, files))
    replaced = [name for name in dropped if name in files or (has_code and _CODE.fullmatch(name))]
    left = [name for name in dropped if name not in replaced]
    own = "a card and code" if has_code else "a card"
    notes = [f"The output has {own} of its own, in place of: {_some(replaced)}."] if replaced else []
    return notes + ([f"Left behind, as a model needs no such files: {_some(left)}."] if left else [])


def _is_ours(path: Path, said: Any) -> bool:
    """Whether a file is as we wrote it: as the folder's record says of it, or as the code of this version is."""
    code = package_folder() / path.name
    record = said if isinstance(said, Mapping) else {}
    known = {record.get("bytes"): record.get("sha256")}
    if _CODE.fullmatch(path.name) and code.is_file():
        known[code.stat().st_size] = hashlib.sha256(code.read_bytes()).hexdigest()
    size = path.stat().st_size if path.is_file() else None
    if size is None or size not in known or size > _MAX_BYTES:  # it may be anything: a log of many gigabytes
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == known[size]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def is_text_or_code(name: str) -> bool:
    """Whether a path below a folder is that of a card, a licence or code, which may belong to a model."""
    return bool(_TEXTS.fullmatch(name) or _CODE.fullmatch(name))


def small_files(folder: Path, configs: Mapping[str, Any]) -> dict[str, str | bytes]:
    """The small files of a folder that a copy of the model needs; `left_behind` says which do not go along.

    Those are settings that transformers reads (tokenizer, templates, generation, processors), licence and card, and the
    model's own code where its configuration refers to some.

    Args:
        folder: the model's.
        configs: what its config.json and tokenizer_config.json say.

    Raises:
        CheckpointError: see `copied_file`.
    """
    has_code = any("auto_map" in config for config in configs.values() if isinstance(config, Mapping))
    copied: dict[str, str | bytes] = {}
    for name in _listed(folder):
        wanted = HUB.settings is not None and HUB.settings.fullmatch(name) is not None
        wanted = wanted or is_text(name) or (has_code and _CODE.fullmatch(name) is not None)
        path = copied_file(folder, name) if wanted and name not in _NOT_COPIED else None
        if path:
            copied[name] = path
    return copied
