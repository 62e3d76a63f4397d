# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The record of a checkpoint, beside its weights: what it was made from, and the digest of everything in its folder.

It is published with the weights, so it holds no local path, no user and no host name.

    format            2
    teleflm_version   what wrote it
    plan              fingerprint of the plan
    seed, lineage     what was made from what; of the checkpoint that it continues, see `parent.py`
    statistics        symbol of the plan -> the number behind it
    job               its fingerprint, settings, `engine` and `layout`: what tells whether another is the same
    sources           file of the source -> its identity
    digest            how tensors are hashed; null if they are not
    files             every file of the folder -> bytes, and `sha256`; of weights instead `between`, of all but the
                      tensors, and `samples`, of a few places: what tells cheaply that they are still there; of what
                      training loads with the weights also its `tensors`, as below
    tensors           name -> file, dtype, shape, digest
    verification      what `teleflm verify --record` found, if it was run
    earlier           sha256 of this record as it was before a verdict was added, or it was published
    checksum          sha256 of all the rest: it tells of an edit, not of a forgery

Version 0.1.0 wrote a `manifest.json` (format 1), without `job`, `sources` and `files`. That name belongs to many
programs, so one that is not ours is nothing to us.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from .assemble import BLOCK
from .bytes import open_bytes
from .errors import CheckpointError
from .strict_json import read_json_object

MANIFEST = "teleflm_manifest.json"
OLD_MANIFEST = "manifest.json"
FORMAT, _OLD_FORMAT = 2, 1
_FIELDS = {"plan": str, "lineage": dict, "tensors": dict}  # what a record has at least, of either format
_OLD_FIELDS = {**_FIELDS, "teleflm_version": str, "statistics": dict}
_MOST_EARLIER = 20  # digests of itself that a record keeps
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MAX_NAME, _MAX_PATH = 255, 1000  # of a file, in bytes, as file systems have it; of a path below a folder
_MAX_MEMORY = 320 * 2**20  # that of 140,000 tensors takes 190 MB


def block_digest(chunks: Iterable[bytes | memoryview]) -> bytes:
    """Digest of one block's bytes, which may come in chunks of any size."""
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def tensor_digest(blocks: Iterable[bytes]) -> str:
    """Digest of a tensor: the hash of its blocks' digests in order, so that blocks may be made in any order."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def between_digest(parts: Iterable[bytes]) -> str:
    """Digest of what a file of weights holds beside its tensors: all of it, in order, as one."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sample_digest(path: Path) -> str:
    """Digest of a few places spread over a file, both of its ends among them.

    Two steps of a run have files of one size and header, and in an image of a container also of one time: this tells
    them apart, as training moves every weight.
    """
    with open_bytes(path) as data:
        return _samples(data.size, lambda at, size: data.pread(at, min(size, data.size - at)))


def sample_descriptor(descriptor: int) -> str:
    """`sample_digest` of an open file."""
    return _samples(os.fstat(descriptor).st_size, lambda at, size: os.pread(descriptor, size, at))


def _samples(size: int, read: Callable[[int, int], bytes]) -> str:
    digest = xxhash.xxh3_128()
    last = max(size - _SAMPLE_BYTES, 0)
    for number in range(_SAMPLES):
        digest.update(read(last * number // (_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.hexdigest()


def package_version() -> str:
    """Version of this package, or `unknown` in a checkout that was never installed."""
    try:
        return importlib.metadata.version("teleflm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def make_manifest(
    *,
    plan: str,
    seed: int,
    lineage: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    digests: bool,
    statistics: Mapping[str, float | str] | None = None,
    **more: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a finished checkpoint, see above.

    Args:
        plan: fingerprint of what was executed.
        seed: of it.
        lineage: what it was made from.
        tensors: name -> file, dtype, shape and, if they were taken, digest.
        digests: whether they were.
        statistics: symbol of the plan -> the number behind it.
        more: `job`, `sources` and `files`, of a checkpoint that the engine wrote.
    """
    return seal(
        {
            "format": FORMAT,
            "teleflm_version": package_version(),
            "plan": plan,
            "seed": seed,
            "lineage": dict(lineage),
            "statistics": dict(statistics or {}),
            **more,
            "digest": {"algorithm": "xxh3_128", "block_elements": BLOCK} if digests else None,
            "tensors": dict(tensors),
        }
    )


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the checksum of what it says now."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return {**content, "checksum": _checksum(content)}


def amend(record: Mapping[str, Any], before: bytes, **changes: Any) -> dict[str, Any]:
    """A record with something else in some of its fields.

    Args:
        record: as it is.
        before: its file, whose digest the new one keeps: what was made from the folder until now names that.
        changes: the fields.
    """
    known = record.get("earlier")
    earlier = [digest for digest in known if isinstance(digest, str)] if isinstance(known, list) else []
    return seal({**record, **changes, "earlier": [*earlier[-_MOST_EARLIER:], hashlib.sha256(before).hexdigest()]})


def is_edited(record: Mapping[str, Any]) -> bool:
    """Whether a record is not as it was written; of one without a checksum, as older versions wrote, it is unknown."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return "checksum" in record and record["checksum"] != _checksum(content)


def _checksum(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(content.items()):
        # As it is read again, where every name is a text; those of tensors and files, which may be many, are.
        as_read = value if name in ("tensors", "files") else json.loads(json.dumps(value))
        digest.update(json.dumps([name, as_read], sort_keys=True).encode())
    return digest.hexdigest()


def find_manifest(folder: Path) -> Path | None:
    """The file with the record of a folder, as this version writes it or as 0.1.0 did; None if it has none."""
    if (folder / MANIFEST).is_file():
        return folder / MANIFEST
    return folder / OLD_MANIFEST if read_old_manifest(folder) is not None else None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The record of a folder, as this version writes it or as 0.1.0 did; None if it has none.

    Raises:
        CheckpointError: it is not one this version understands.
    """
    own = read_own_manifest(folder)
    return read_old_manifest(folder) if own is None else own


def read_own_manifest(folder: Path) -> dict[str, Any] | None:
    """The record of a folder under the name that is ours alone, or None if it has none.

    Raises:
        CheckpointError: it is not one this version understands.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json_object(path, limit=_MAX_MEMORY)
    if manifest.get("format") not in (FORMAT, _OLD_FORMAT):
        found = repr(manifest.get("format"))[:80]
        raise CheckpointError(f"{path}: manifest format is {found}, this version reads {FORMAT}; update teleflm.")
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            found = type(manifest.get(field)).__name__
            raise CheckpointError(
                f"{path}: {field} is a {found}, expected a {kind.__name__}; restore or remove the file."
            )
    return manifest


def read_old_manifest(folder: Path) -> dict[str, Any] | None:
    """The record that version 0.1.0 left in a folder; None if there is none, or a file of that name of others."""
    path = folder / OLD_MANIFEST
    try:
        manifest = read_json_object(path, limit=_MAX_MEMORY) if path.is_file() else {}
    except CheckpointError:
        return None
    fits = all(isinstance(manifest.get(field), kind) for field, kind in _OLD_FIELDS.items())
    return manifest if fits and manifest.get("format") == _OLD_FORMAT else None


def recorded_tensors(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record, which may come from anyone, says of every tensor: of the weights and of files of state."""
    files, weights = record.get("files"), record.get("tensors")
    entries = [entry for entry in files.values() if isinstance(entry, dict)] if isinstance(files, dict) else []
    states = [entry["tensors"] for entry in entries if isinstance(entry.get("tensors"), dict)]
    listed = [*states, *([weights] if isinstance(weights, dict) else [])]
    return {name: entry for tensors in listed for name, entry in tensors.items()}


def without_state(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its files of state, which are no part of the model."""
    files = record.get("files")
    if not isinstance(files, dict):
        return dict(record)
    kept = {name: entry for name, entry in files.items() if not (isinstance(entry, dict) and "tensors" in entry)}
    return {**record, "files": kept}


def is_plain(name: str) -> bool:
    """Whether a name in a record, which may come from anyone, can be that of a file below its folder, in one way."""
    if "\\" in name or not name.isprintable() or len(name) > _MAX_PATH:
        return False
    return not any(part in ("", ".", "..") or len(part.encode()) > _MAX_NAME for part in name.split("/"))
