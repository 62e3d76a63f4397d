# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a lineage keeps of the checkpoint that a step continues, and whether that was still the one of its record.

plan, lineage     of the parent's record; of a lineage of more than `MAX_STEPS` steps the oldest are left out
record            sha256 of the file of its record: the link to it
matches           whether its weights were what its record says when the step read them, as far as `record_mismatch`
                  can see; null if it saw no difference, and the record has no samples to see one by
mismatch          if not: what differs
edited            true if the record itself was not as it was written
verification      the verdict in its record, if it holds one
origin            where it was read, if that was not on this machine: `hub` and `commit`, or `url`; such a checkpoint
                  need have no record
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import printable
from .job import shortened
from .manifest import find_manifest, is_edited, is_plain, read_manifest, sample_digest
from .mirror import origin
from .plan import View
from .sources import Source
from .strict_json import MAX_JSON_DEPTH

# A step takes two levels of the JSON, and what it says a few more.
MAX_STEPS = 40
_MAX_DEPTH = MAX_JSON_DEPTH - 10
_MAX_VERDICT, _MAX_REASON = 4000, 300  # characters
_CONFIG = "config.json"


def parent_of(checkpoint: Source) -> dict[str, Any] | None:
    """What a lineage keeps of the checkpoint that it continues, see above; None if it is here and has no record.

    Raises:
        CheckpointError: see `manifest.read_manifest`.
    """
    record, place = parent_record(Path(checkpoint.folder), checkpoint.tensors), origin(checkpoint.folder)
    return {**(record or {}), "origin": place} if place else record


def parent_record(folder: Path, tensors: Mapping[str, View] | None = None) -> dict[str, Any] | None:
    """What a lineage keeps of a folder that it continues, see above; None if it has no record.

    Args:
        folder: the one with the record.
        tensors: those that the step reads, by the names of the record, if it has them by these.

    Raises:
        CheckpointError: see `manifest.read_manifest`.
    """
    path, record = find_manifest(folder), read_manifest(folder)
    if path is None or record is None:
        return None
    mismatch = record_mismatch(folder, record, tensors)
    return {
        "plan": record["plan"],
        "lineage": _shortened(record["lineage"]),
        "record": hashlib.sha256(path.read_bytes()).hexdigest(),
        "matches": False if mismatch else True if _has_samples(record) else None,
        **({"mismatch": mismatch} if mismatch else {}),
        **({"edited": True} if is_edited(record) else {}),
        **_verdict(record),
    }


def record_mismatch(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, View] | None = None) -> str | None:
    """Where the weights or the configuration of a folder are not those of its record; None if nowhere it was looked.

    Cheap, whatever the size of the model: of each weight file its size and its samples, of config.json its digest, of
    the tensors names, types and shapes. It sees a file that was trained on, replaced, added or removed. It cannot see
    an edit that keeps a file's size and touches none of the 16 samples of 4096 bytes, both ends of the file among them:
    a tensor that was changed in the middle of a file needs `inspect --check` or `--verify-source`, which read
    everything. Records of 0.1.0, and of fine-tuning before 0.2, list no files: of these it sees names, types and shapes
    alone.

    Args:
        folder: the one with the record.
        record: its content; it may come from anyone.
        tensors: those that are there, by the names of the record.
    """
    found = _mismatch(folder, record, tensors)
    return printable(found)[:_MAX_REASON] if found else None


def _mismatch(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, View] | None) -> str | None:
    listed = record.get("files")
    files = listed if isinstance(listed, dict) else {}
    for name, entry in files.items():
        if isinstance(entry, dict) and is_plain(name) and (difference := _file_difference(folder / name, name, entry)):
            return difference
    if tensors is None:
        return None
    if files:
        read = {os.path.relpath(view.file.name, folder) for view in tensors.values()}
        if extra := sorted(read - files.keys()):
            return f"{extra[0]} is not in the record"
    return _tensor_difference(tensors, record["tensors"])


def _file_difference(path: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    samples, digest = entry.get("samples"), entry.get("sha256")
    if "tensors" in entry or (samples is None and name != _CONFIG):  # of state, which is no part of the model
        return None
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry.get("bytes"):
        return f"{name} has {size} bytes, expected {shortened(entry.get('bytes'))}"
    is_same = sample_digest(path) == samples if samples is not None else _digest(path) == digest
    return None if is_same else f"{name} has other content"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_difference(tensors: Mapping[str, View], expected: Mapping[str, Any]) -> str | None:
    for name, view in tensors.items():
        entry = expected.get(name)
        if not isinstance(entry, dict):
            return f"{name} is not in the record"
        found, recorded = [view.dtype.name, list(view.shape)], [entry.get("dtype"), entry.get("shape")]
        if found != recorded:
            return f"{name} is {found[0]} {found[1]}, expected {shortened(recorded[0])} {shortened(recorded[1])}"
    missing = next((name for name in expected if name not in tensors), None)
    return f"{missing} is missing" if missing is not None else None


def _has_samples(record: Mapping[str, Any]) -> bool:
    files = record.get("files")
    entries = files.values() if isinstance(files, dict) else ()
    return any(isinstance(entry, dict) and "samples" in entry for entry in entries)


def _verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    verdict = record.get("verification")
    is_kept = isinstance(verdict, dict) and len(json.dumps(verdict)) <= _MAX_VERDICT
    return {"verification": verdict} if is_kept else {}


def _depth(value: Any) -> int:
    """How deep JSON nests, which `strict_json` has bounded."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _shortened(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage of as many steps as a record can hold one more of: the oldest are left out, and it says so."""
    steps = [lineage]
    while isinstance(parent := steps[-1].get("parent"), dict) and isinstance(parent.get("lineage"), dict):
        steps.append(parent["lineage"])
    if len(steps) < MAX_STEPS:
        is_readable = _depth(lineage) <= _MAX_DEPTH  # what is not was not written by us
        return dict(lineage) if is_readable else {"parent": {"omitted": True}}
    kept: dict[str, Any] | None = None
    for step in reversed(steps[: MAX_STEPS - 1]):
        rest = {name: value for name, value in step["parent"].items() if name != "lineage"}
        kept = {**step, "parent": {**rest, "lineage": kept} if kept else {**rest, "omitted": True}}
    return kept or {}


def parent_notes(lineage: Mapping[str, Any]) -> list[str]:
    """What somebody should know who continues a checkpoint that is not the one of its record."""
    parent = lineage.get("parent")
    found = parent if isinstance(parent, dict) else {}
    notes = []
    if found.get("matches") is False:
        reason = found.get("mismatch")
        notes.append(f"The source's weights are not those of its record: {reason}; changed since. The lineage says so.")
    if found.get("edited") is True:
        notes.append("The source's record was edited: its checksum is not that of the rest. The lineage says so.")
    return notes
