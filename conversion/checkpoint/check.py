# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading a checkpoint again and comparing it with the digests of its record: tensors, and every other byte."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from .bytes import OpenBytes, open_bytes
from .distributed_file import read_chunks_by_name
from .errors import CheckpointError, CorruptData
from .folder_formats import is_setting, is_state, is_weights, known_files
from .manifest import (
    between_digest,
    block_digest,
    find_manifest,
    is_plain,
    recorded_tensors,
    sample_digest,
    tensor_digest,
    without_state,
)
from .plan import View
from .reader import CHUNK, FileReader
from .torch_file import read_torch_file, tensors_within


@dataclass(frozen=True)
class Damage:
    """One thing that is not what the record says.

    Args:
        tensor: its name; None if it is a file, beside its tensors.
        file: where it is, or should be.
        reason: what is wrong with it, to be read after its name.
    """

    tensor: str | None
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file} {self.reason}" if self.tensor is None else f"{self.tensor} of {self.file} {self.reason}"


def check_folder(
    tensors: Mapping[str, View],
    folder: Path,
    manifest: Mapping[str, Any],
    workers: int,
    progress: Callable[[int, int], None],
    *,
    alone: bool = False,
    with_state: bool = True,
) -> list[Damage]:
    """Compare all of a folder with its record; see `check_digests` and `check_files`.

    Args:
        tensors: the weights that are there, by name.
        folder: the one with the record.
        manifest: its content.
        workers: threads.
        progress: called with the bytes just read and those in all.
        alone: whether only the files of the manifest are looked at, and not what else lies in the folder.
        with_state: whether files of state are looked at.

    Raises:
        CheckpointError: see `check_digests`.
    """
    manifest = manifest if with_state else without_state(manifest)
    states, faults = _read_states(folder, manifest)
    every = {**tensors, **states}
    damages = check_digests(every, folder, manifest, workers, progress, unread=faults)
    return damages + check_files(every, folder, manifest, alone=alone, with_state=with_state, unread=faults)


def _read_states(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, View], dict[str, str]]:
    """The tensors of the files of state that a record lists, and of those that cannot be read why."""
    states: dict[str, View] = {}
    faults: dict[str, str] = {}
    files = manifest.get("files")
    listed = files.items() if isinstance(files, dict) else ()
    names = [name for name, entry in listed if isinstance(entry, dict) and "tensors" in entry and is_plain(name)]
    for place in dict.fromkeys(_distributed_folder(name) or name for name in names):
        try:
            if place in names:
                states |= tensors_within(read_torch_file(folder / place), f"{place}/")
            else:
                states |= read_chunks_by_name(folder, place)
        except CheckpointError as error:
            faults |= {name: f"cannot be read: {error}" for name in names if place in (name, _distributed_folder(name))}
    return states, faults


def _distributed_folder(name: str) -> str | None:
    """The DCP folder that a file of state is of; None if it is a file of its own."""
    return str(PurePosixPath(name).parent) if name.endswith(".distcp") else None


def check_digests(
    tensors: Mapping[str, View],
    folder: Path,
    manifest: Mapping[str, Any],
    workers: int,
    progress: Callable[[int, int], None],
    *,
    unread: Collection[str] = (),
) -> list[Damage]:
    """Read every tensor of a checkpoint and compare it with its record, in bounded memory.

    Args:
        tensors: those that are there, by name.
        folder: the one with the record.
        manifest: its content.
        workers: threads.
        progress: called with the bytes just read and those in all.
        unread: files whose tensors are not looked for.

    Returns:
        The tensors that are missing, unknown or changed, in the order of the record; empty if all is well. Of a record
        without digests, only names, places, types and shapes are compared.

    Raises:
        CheckpointError: the record has digests that cannot be checked, or nothing to check at all.
    """
    listed, block = _read_expected(manifest, str(find_manifest(folder)))
    expected = {name: entry for name, entry in listed.items() if entry["file"] not in unread}
    total = sum(view.nbytes for name, view in tensors.items() if name in expected)

    def examine(name: str) -> Damage | None:
        entry, view = expected[name], tensors.get(name)
        if view is None:
            return Damage(name, entry["file"], "is missing")
        file, dtype, shape = _place(view, folder), view.dtype.name, list(view.shape)
        if file != entry["file"]:
            return Damage(name, file, f"was expected in {entry['file']}")
        if (dtype, shape) != (entry["dtype"], entry["shape"]):
            return Damage(name, file, f"is {dtype} {shape}, expected {entry['dtype']} {entry['shape']}")
        if block is None:
            return None
        try:
            digest = tensor_digest(_block_digests(view, block, reader, lambda nbytes: progress(nbytes, total)))
        except CorruptData as error:
            return Damage(name, entry["file"], f"cannot be read: {error}")
        return None if digest == entry["digest"] else Damage(name, entry["file"], "does not have its digest")

    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        damages = [damage for damage in pool.map(examine, expected) if damage is not None]
    unknown = [name for name in tensors if name not in expected]
    return damages + [Damage(name, _place(tensors[name], folder), "is not in the manifest") for name in unknown]


def check_files(
    tensors: Mapping[str, View],
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    alone: bool = False,
    with_state: bool = True,
    unread: Mapping[str, str] = MappingProxyType({}),
) -> list[Damage]:
    """Compare what a folder holds beside its tensors with its record.

    Args:
        tensors: those that are there, by name.
        folder: the one with the record.
        manifest: its content; of 0.1.0 it lists no files, and nothing is found.
        alone: whether only the files of the manifest are looked at, and not what else lies in the folder.
        with_state: whether files of state are looked for.
        unread: files whose tensors cannot be read, and why.

    Returns:
        Files that are missing or changed, and files that would be loaded and are not listed.
    """
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        return []
    placed = {name: entry.get("file") for name, entry in recorded_tensors(manifest).items()}
    has_digests = manifest.get("digest") is not None
    found = [
        _examine_file(name, entry, folder, tensors, placed, has_digests, unread.get(name))
        for name, entry in listed.items()
    ]
    known = [] if alone else known_files(folder)
    loaded = [name for name in known if is_weights(name) or is_setting(name) or (with_state and is_state(name))]
    extra = [Damage(None, name, "is not in the record, and would be loaded") for name in loaded if name not in listed]
    return [damage for damage in found if damage] + extra


def _examine_file(
    name: str,
    entry: Any,
    folder: Path,
    tensors: Mapping[str, View],
    placed: Mapping[str, str | None],
    has_digests: bool,
    fault: str | None,
) -> Damage | None:
    path = folder / name
    if not is_plain(name):
        return Damage(None, repr(name)[:80], "can be no file below the folder")
    if not isinstance(entry, dict) or type(size := entry.get("bytes")) is not int:
        return Damage(None, name, "has no size in the record")
    if not path.is_file():
        return Damage(None, name, "is missing")
    if path.stat().st_size != size:
        return Damage(None, name, f"has {path.stat().st_size} bytes, expected {size}")
    if fault:
        return Damage(None, name, fault)
    if "sha256" in entry:
        with open_bytes(path) as data:
            digest = _sha256(data)
        return None if digest == entry["sha256"] else Damage(None, name, "does not have its digest")
    inside = {tensor: view for tensor, view in tensors.items() if _place(view, folder) == name}
    if inside.keys() != {tensor for tensor, file in placed.items() if file == name}:
        return None  # which is said of the tensors
    if between_digest(outside_tensors(path, size, inside.values())) == entry.get("between"):
        if has_digests or sample_digest(path) == entry.get("samples"):
            return None  # with digests, it is said which tensors differ
        return Damage(None, name, "is not what was written there")
    return Damage(None, name, "differs outside of its tensors: its header, or what else it holds")


def outside_tensors(path: Path, size: int, tensors: Iterable[View]) -> Iterator[bytes]:
    """What a file of some size holds beside some tensors, in order."""
    position = 0
    with open_bytes(path) as data:
        for begin, end in [*sorted(view.span for view in tensors if view.numel), (size, size)]:
            for start in range(position, begin, CHUNK):
                yield data.pread(start, min(CHUNK, begin - start))
            position = max(position, end)


def _sha256(data: OpenBytes) -> str:
    digest = hashlib.sha256()
    for start in range(0, data.size, CHUNK):
        digest.update(data.pread(start, min(CHUNK, data.size - start)))
    return digest.hexdigest()


def _place(view: View, folder: Path) -> str:
    """The file of a tensor as a manifest names it."""
    return Path(view.file.name).relative_to(folder).as_posix()


def _read_expected(manifest: Mapping[str, Any], where: str) -> tuple[dict[str, dict[str, Any]], int | None]:
    """What a manifest says of each tensor, and the elements of a block, None without digests; it may be anyone's."""
    block: int | None = None
    match manifest:
        case {"digest": None, "files": dict()}:
            pass
        case {"digest": None}:
            raise CheckpointError(f"{where}: was written with --no-digest; there is nothing to check.")
        case {"digest": {"algorithm": "xxh3_128", "block_elements": int(block)}} if block > 0:
            pass
        case _:
            raise CheckpointError(
                f"{where}: digest is {manifest.get('digest')!r}, expected xxh3_128 of so many block_elements; "
                "update teleflm or restore the file."
            )
    tensors = recorded_tensors(manifest)
    for name, entry in tensors.items():
        match entry:
            case {"file": str(), "dtype": str(), "shape": list(), "digest": str()}:
                pass
            case {"file": str(), "dtype": str(), "shape": list()} if block is None:
                pass
            case _:
                raise CheckpointError(f"{where}: {name} lacks a file, dtype, shape or digest; restore the file.")
    return tensors, block


def _block_digests(view: View, block: int, reader: FileReader, progress: Callable[[int], None]) -> Iterator[bytes]:
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, block):
        part = flat[start : start + block]
        yield block_digest(reader.chunks(part))
        progress(part.nbytes)
