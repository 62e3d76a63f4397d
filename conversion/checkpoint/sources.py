# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Opening a Hugging Face checkpoint: its tensors as windows of its files, its configuration, its faults.

Opening reads headers only, and every check that headers allow is made here, before anyone plans on what it found.
"""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from . import safetensors_file, torch_file
from .bytes import ByteSource, Where, full_name
from .errors import CheckpointError
from .plan import View
from .safetensors_file import read_header
from .strict_json import read_json_object
from .torch_file import read_state_dict

Format: TypeAlias = Literal["safetensors", "torch"]

# What transformers looks for, in its order.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_WEIGHTS_FIELD = "transformers_weights"  # of a config.json: the file that transformers loads, whatever others there are
_INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+(?P<suffix>\.\w+)")
# The published models have 400 at most, a training run one for each of some thousand ranks.
_MAX_FILES = 16_384


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open for planning; no tensor is loaded.

    Args:
        folder: absolute path of its folder.
        format: the container of its weight files.
        tensors: every tensor by name; in the order of the files, and within a file in the file's order.
        files: the weight files.
        config: the content of config.json, but for the name of the weights' file; None if there is none.
        metadata: `__metadata__` of the one safetensors file, or `metadata` of the index; empty otherwise.
    """

    folder: str
    format: Format
    tensors: dict[str, View]
    files: tuple[ByteSource, ...]
    config: dict[str, Any] | None
    metadata: dict[str, Any]


def open_checkpoint(path: str | os.PathLike[str]) -> Source:
    """Open a checkpoint in the Hugging Face layout, safetensors or torch.save, in one file or sharded.

    Args:
        path: its folder, its index, or one weight file, which is then opened alone.

    Raises:
        CheckpointError: there is none, a file is damaged, or the index and its shards disagree.
    """
    try:
        place = Path(os.path.abspath(path))
        source = _open(weights := _find_weights(place))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    if not source.config or _WEIGHTS_FIELD not in source.config:
        return source
    named = source.config[_WEIGHTS_FIELD]
    if place != weights and named not in (None, weights.name):
        raise CheckpointError(
            f"{source.folder}/config.json: {_WEIGHTS_FIELD} is {str(named)[:80]!r}, which transformers loads in place "
            f"of {weights.name}; remove it, or give that file the usual name."
        )
    # It is true of this folder alone: what is made of it has files of its own.
    return replace(source, config={key: value for key, value in source.config.items() if key != _WEIGHTS_FIELD})


def _open(weights: Path) -> Source:
    if weights.name.endswith(_INDEX_SUFFIX):
        index = read_json_object(weights)
        files, tensors = _read_shards(weights, index)
        metadata = index.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
    else:
        source, tensors, metadata = _read_weights(weights)
        files = (source,)
    config = weights.parent / "config.json"
    return Source(
        folder=str(weights.parent),
        format=_format(files[0].name),
        tensors=tensors,
        files=files,
        config=read_json_object(config, infinite=True) if config.exists() else None,
        metadata=metadata,
    )


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Refuse a path that is no text, which Python opens and libraries beneath transformers cannot.

    Raises:
        CheckpointError: it is not UTF-8, or this locale has no such letters.
    """
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        way_out = "rename it" if encoding == "utf-8" else "rename it, or set LC_ALL=C.UTF-8"
        raise CheckpointError(
            f"{path}: its name is not {encoding}, and the libraries that load it need that; {way_out}."
        ) from None


def source_identity(where: Where) -> str:
    """A text that changes when a weight file does: its size, its time of change, hashes of its header and its data.

    The header is the one of safetensors, or the directory and pickle of a torch.save zip (with a checksum of each
    storage, as torch writes it); of the data, a few small windows are looked at. It is what the `ByteSource` of a file
    that was opened has, and what this says of a file is only true of what is there at this moment.

    Raises:
        CheckpointError: the file cannot be read, or is a safetensors file with a damaged header.
    """
    module = safetensors_file if _format(full_name(where)) == "safetensors" else torch_file
    return module.identify(where).identity


def outside_target(path: Path, folder: Path) -> Path | None:
    """Where a path in a folder leads, if that is outside of the folder; None if it is inside.

    A snapshot of a Hub cache links to the blobs of its repository, which are part of it.
    """
    target, root = path.resolve(), folder.resolve()
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    return None if any(target.is_relative_to(place) for place in (root, *blobs)) else target


def link_notes(files: Iterable[str], what: str = "Weights were", whose: str = "their") -> list[str]:
    """A sentence on the files of tensors that are links out of their folders, which is allowed, but never unsaid.

    Args:
        files: their paths.
        what: they hold, and its verb.
        whose: folder it is.
    """
    targets = {file: outside_target(Path(file), Path(file).parent) for file in sorted(files)}
    links = [f"{Path(file).name} ({target})" for file, target in targets.items() if target]
    return [f"{what} taken through links that lead out of {whose} folder: {_some(links)}."] if links else []


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder.")
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return path / name
    raise CheckpointError(f"{path} has no weights: expected one of {', '.join(WEIGHT_FILES)}.")


def _format(file: str) -> Format:
    return "safetensors" if file.endswith(".safetensors") else "torch"


def _read_weights(file: Path) -> tuple[ByteSource, dict[str, View], dict[str, Any]]:
    """A weight file, its tensors, and what else it says."""
    if _format(file.name) == "torch":
        return *read_state_dict(file), {}
    header = read_header(file)
    return header.source, header.tensors, dict(header.metadata)


# Sharded checkpoints: the index says in which file each tensor is; the files must say the same.


def _read_shards(index_file: Path, index: dict[str, Any]) -> tuple[tuple[ByteSource, ...], dict[str, View]]:
    expected = _parse_weight_map(index_file, index)
    by_file: dict[str, list[str]] = {}
    for name, file_name in sorted(expected.items(), key=lambda item: item[1]):
        by_file.setdefault(file_name, []).append(name)
    _check_files(index_file, tuple(index_file.parent / name for name in by_file))
    sources: list[ByteSource] = []
    tensors: dict[str, View] = {}
    for file_name, names in by_file.items():
        source, found, _ = _read_weights(index_file.parent / file_name)
        for name, view in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name!r} is in {tensors[name].file} and in {source}; keep the one that {index_file.name} names "
                    f"({expected.get(name)})."
                )
            tensors[name] = view
        _check_shard(index_file, expected, names, file_name, found)
        sources.append(source)
    return tuple(sources), tensors


def _parse_weight_map(index_file: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map of tensor names to file names; download it again.")
    for tensor, name in weight_map.items():
        # A name that leads elsewhere would make whoever opens the folder read, or later replace, files outside of it.
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise CheckpointError(
                f"{index_file} places {tensor!r} in {name!r}, expected the name of a file in the same folder."
            )
    return weight_map


def _check_files(index_file: Path, files: tuple[Path, ...]) -> None:
    if len(files) > _MAX_FILES:
        raise CheckpointError(f"{index_file} names {len(files)} files, the limit is {_MAX_FILES}.")
    formats = {_format(file.name) for file in files}
    if len(formats) > 1:
        raise CheckpointError(f"{index_file} names safetensors files and others; make an index for each.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index_file} names {len(files)} files, {len(missing)} of them missing: {_some(missing)}; "
            "download the rest."
        )
    kinds = {match.group("stem", "suffix") for file in files if (match := _SHARD.fullmatch(file.name))}
    known = {file.name for file in files}
    extra = [
        entry.name
        for entry in sorted(index_file.parent.iterdir())
        if (match := _SHARD.fullmatch(entry.name))
        and match.group("stem", "suffix") in kinds
        and entry.name not in known
    ]
    if extra:
        raise CheckpointError(
            f"{index_file} names {len(files)} files, the folder has {len(extra)} more of their kind: {_some(extra)}; "
            "move away those of the other save."
        )


def _check_shard(
    index_file: Path, expected: dict[str, str], names: list[str], file_name: str, found: dict[str, View]
) -> None:
    for name in found:
        if expected.get(name) != file_name:
            place = f"in {expected[name]}" if name in expected else "nowhere"
            raise CheckpointError(f"{file_name} holds {name!r}, {index_file} places it {place}; download both again.")
    absent = [name for name in names if name not in found]
    if absent:
        raise CheckpointError(
            f"{index_file} places tensors in {file_name} that it does not hold, {len(absent)} of them: "
            f"{_some(absent)}; download both again."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
