# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What of a folder a repository gets, and what stands against that: looked at here, before the Hub is asked."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architecture import package_folder
from ..checkpoint.errors import CheckpointError
from ..checkpoint.manifest import MANIFEST, OLD_MANIFEST, find_manifest
from ..checkpoint.preflight import FOLDER, PARTIAL
from ..checkpoint.safetensors_file import read_header
from ..checkpoint.strict_json import parse_json_object, read_json_object
from ..inspect import inspect_checkpoint
from .card import CARD
from .small_files import copied_file, small_files
from .uploading import state_of

_CONFIGS = ("config.json", "adapter_config.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_INDEX = "model.safetensors.index.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAX_JSON = 320 * 2**20  # bytes of memory
_PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "special_tokens_map_file", "tokenizer_file")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # their texts are tokens
_PATH = re.compile(  # all of a text, or a part of it that can be nothing else
    r"\s*(?:/|~/|\.\.?/|[A-Za-z]:[\\/]+)[^\s/\\]+(?:[/\\].*)?\Z"
    r"|.*?(?:^|[\s\"'=(,:])(?:file:///|~/|\$HOME\b|/(?:home|root|Users|mnt|tmp|opt|scratch|gpfs|lustre|nfs|workspace)/)"
    r"|.*?(?:^|[\s\"'=(,])(?:[A-Za-z]:\\|\\\\\w)",
    re.DOTALL,
)
_SECRETS = {
    "a token of the Hub": re.compile(r"\b(hf_|api_org_)\w{30,}"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})"),
    "a key of AWS": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a key of Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a key of OpenAI or Anthropic": re.compile(r"\bsk-(proj-|ant-)?[A-Za-z0-9_-]{40,}"),
    "a token of Slack": re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{20,}"),
    "a private key": re.compile(r"-----BEGIN ([A-Z]+ )?PRIVATE KEY( BLOCK)?-----"),
}


@dataclass(frozen=True)
class Release:
    """What of a folder would be published.

    Args:
        folder: where it is.
        weights: path below it -> bytes, of the files with weights.
        contents: of the small files, read once: what is looked at is what is published.
        left_out: what stays here, because no reader of the model needs it.
        is_adapter: whether the weights are those of an adapter alone.
        state: identity of each file with weights, when it was found.
    """

    folder: Path
    weights: dict[str, int]
    contents: dict[str, bytes]
    left_out: list[str]
    is_adapter: bool
    state: dict[str, str]

    @property
    def small_files(self) -> dict[str, int]:
        """Path -> bytes of the files without weights."""
        return {name: len(content) for name, content in self.contents.items()}

    def require_unchanged(self) -> None:
        """Check that the weights are those that were looked at.

        Raises:
            CheckpointError: one was changed meanwhile.
        """
        for name, before in self.state.items():
            if state_of(self.folder / name) != before:
                raise CheckpointError(f"{self.folder}/{name}: was changed while it was published; run it again.")

    @property
    def files(self) -> dict[str, int]:
        """All of it."""
        return {**self.weights, **self.small_files}


def find_release(folder: Path) -> Release:
    """What of a folder would be published: weights in safetensors, and the small files that go with a model.

    Raises:
        CheckpointError: there is no finished checkpoint in safetensors, or a file of it leads out of the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    unfinished = sorted(path.name for pattern in (FOLDER, f"*{PARTIAL}") for path in folder.glob(pattern))
    if unfinished:
        raise CheckpointError(f"{folder}: holds {unfinished[0]} of an unfinished run; run its command again first.")
    names = [*_CONFIGS, _INDEX, MANIFEST, *([OLD_MANIFEST] if find_manifest(folder) == folder / OLD_MANIFEST else [])]
    found = {name: path for name in names if (path := copied_file(folder, name))}
    configs = {name: read_json_object(Path(path)) for name, path in found.items() if name in _CONFIGS}
    if copied_file(folder, _TOKENIZER_CONFIG):
        configs[_TOKENIZER_CONFIG] = read_json_object(folder / _TOKENIZER_CONFIG)
    names = [*found, *_without_strays(small_files(folder, configs), configs)]
    small = {name: (folder / name).read_bytes() for name in names}
    is_adapter = _CONFIGS[1] in small
    pattern = _ADAPTER_WEIGHTS if is_adapter else "model*.safetensors"
    weights = {path.name: path.stat().st_size for path in sorted(folder.glob(pattern)) if path.is_file()}
    if not weights:
        raise CheckpointError(f"{folder}: holds no safetensors; teleflm convert makes a folder that can be published.")
    for name in (CARD, *(() if is_adapter else _CONFIGS[:1])):
        if name not in small:
            raise CheckpointError(f"{folder}/{name}: no such file; teleflm convert, grow and sft export write one.")
    chosen = {*weights, *(name.split("/")[0] for name in small)}
    left_out = sorted(entry.name for entry in folder.iterdir() if entry.name not in chosen and entry.name != ".cache")
    if missing := sorted(_indexed(small, folder) - weights.keys()):
        raise CheckpointError(
            f"{folder}/{_INDEX}: names {missing[0]}, which is not there, or not called model*.safetensors; make the "
            "folder anew."
        )
    state = {name: state_of(folder / name) for name in weights}
    return Release(folder, weights, dict(sorted(small.items())), left_out, is_adapter, state)


def _indexed(small: Mapping[str, bytes], folder: Path) -> set[str]:
    """The files that the index names."""
    placed = parse_json_object(small[_INDEX], f"{folder}/{_INDEX}").get("weight_map") if _INDEX in small else None
    return {name for name in placed.values() if isinstance(name, str)} if isinstance(placed, dict) else set()


def _without_strays(names: Iterable[str], configs: Mapping[str, Any]) -> list[str]:
    """Small files without code that the configurations do not refer to, where all that they do is ours."""
    classes = [config.get("auto_map") for config in configs.values() if isinstance(config, Mapping)]
    said = [text for found in classes if isinstance(found, Mapping) for _, text in _texts(found)]
    modules = {text.rpartition("--")[2].partition(".")[0] + ".py" for text in said}
    ours = {path.name for path in package_folder().glob("*.py")}
    return [name for name in names if not name.endswith(".py") or not modules <= ours or name in ours]


def check_release(release: Release, check: bool, workers: int, progress: Callable[[int, int], None]) -> None:
    """Refuse what nobody should get.

    Args:
        release: the files.
        check: whether every tensor is read and held against the digests of the record, if there are any.
        workers: threads of that.
        progress: called with the bytes just read and those in all.

    Raises:
        CheckpointError: it is damaged, would not load, names a path of this machine, or holds a secret.
    """
    _refuse_secrets(release)
    _refuse_local_paths(release)
    _require_sound(release, check, workers, progress)


def _require_sound(release: Release, check: bool, workers: int, progress: Callable[[int, int], None]) -> None:
    """What `teleflm inspect` finds wrong with it is refused."""
    folder, weights = release.folder, release.weights
    digests = check and find_manifest(folder) is not None
    path = folder / _ADAPTER_WEIGHTS if release.is_adapter else folder
    inspection = inspect_checkpoint(path, check=digests, with_state=False, workers=workers, progress=progress)
    if inspection.problems and not release.is_adapter:  # an adapter alone has no architecture to hold it against
        raise CheckpointError(inspection.problems[0])
    # A card may be edited, and a configuration corrected, before they are published: only weights have to be intact.
    damages = [damage for damage in inspection.damages or [] if damage.tensor or damage.file in weights]
    if damages:
        first, more = damages[0], f", and {len(damages) - 1} more" if len(damages) > 1 else ""
        what = f"{first.tensor} {first.reason}" if first.tensor else first.reason
        raise CheckpointError(f"{folder}/{first.file}: {what}{more}; make the folder anew.")
    unknown = sorted(weights.keys() - inspection.files.keys())
    if unknown and not release.is_adapter:
        raise CheckpointError(f"{folder}/{unknown[0]}: is not in the index; remove it, or make the folder anew.")


def _refuse_local_paths(release: Release) -> None:
    """A path of this machine is nobody's business, and an adapter that names one as its base loads nowhere else."""
    for name, content in release.contents.items():
        if not name.endswith(".json") or name == MANIFEST:
            continue
        value = parse_json_object(content, f"{release.folder}/{name}", infinite=True, limit=_MAX_JSON)
        if name in _VOCABULARIES:
            value = {key: value[key] for key in _PATH_KEYS if key in value}
        elif name == _INDEX:
            value = {key: inner for key, inner in value.items() if key != "weight_map"}
        for key, text in _texts(value):
            if _PATH.match(text) or (key in _PATH_KEYS and text and Path(text).exists()):
                raise CheckpointError(
                    f"{release.folder}/{name}: {key} is {text[:200]}, a path of this machine; give the name on the "
                    "Hub instead, or take it out (for an adapter: teleflm sft export --base OWNER/NAME)."
                )


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, with the name that it has there."""
    parts: list[tuple[str, Any]] = [("", value)]
    while parts:
        key, part = parts.pop()
        if isinstance(part, str):
            yield key, part
        elif isinstance(part, Mapping):
            parts += part.items()
        elif isinstance(part, list):
            parts += [(key, inner) for inner in part]


def _refuse_secrets(release: Release) -> None:
    for name, content in release.contents.items():
        if not name.endswith(".model"):
            refuse_secrets(content, f"{release.folder}/{name}")
    for name in release.weights:
        metadata = read_header(release.folder / name).metadata
        refuse_secrets(json.dumps(metadata, ensure_ascii=False).encode(), f"{release.folder}/{name}")


def refuse_secrets(content: bytes, where: str) -> None:
    """Refuse a text with what looks like a key or a token in it, however it is written.

    Args:
        content: the text.
        where: its file, for the message.

    Raises:
        CheckpointError: there is one.
    """
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    text = content.decode(encoding, errors="replace")
    texts = [text]
    if where.endswith(".json"):
        with suppress(ValueError, RecursionError):
            texts.append(json.dumps(json.loads(text), ensure_ascii=False))  # what was escaped in it
    for read, (what, pattern) in ((read, item) for read in texts for item in _SECRETS.items()):
        if match := pattern.search(read):
            line = read.count("\n", 0, match.start()) + 1
            raise CheckpointError(
                f"{where}: line {line} holds what looks like {what}; take it out, and revoke it if it was one."
            )


__all__ = ["Release", "check_release", "find_release", "refuse_secrets"]
