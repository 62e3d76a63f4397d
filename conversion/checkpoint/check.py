# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading a checkpoint again and comparing it with the digests of its manifest."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, CorruptData
from .manifest import MANIFEST, block_digest, tensor_digest
from .plan import View
from .reader import FileReader


@dataclass(frozen=True)
class Damage:
    """One tensor that is not what the manifest says, and how."""

    tensor: str
    file: str
    reason: str


def check_digests(
    tensors: Mapping[str, View],
    folder: Path,
    manifest: Mapping[str, Any],
    workers: int,
    progress: Callable[[int, int], None],
) -> list[Damage]:
    """Read every tensor of a checkpoint and compare it with its manifest, in bounded memory.

    Args:
        tensors: those that are there, by name.
        folder: the one with the manifest.
        manifest: its content.
        workers: threads.
        progress: called with the bytes just read and those in all.

    Returns:
        The tensors that are missing, unknown or changed, in the order of the manifest; empty if all is well.

    Raises:
        CheckpointError: the manifest has no digests, or none that can be checked.
    """
    expected, block = _read_expected(manifest, f"{folder}/{MANIFEST}")
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
        try:
            digest = tensor_digest(_block_digests(view, block, reader, lambda nbytes: progress(nbytes, total)))
        except CorruptData as error:
            return Damage(name, entry["file"], f"cannot be read: {error}")
        return None if digest == entry["digest"] else Damage(name, entry["file"], "does not have its digest")

    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        damages = [damage for damage in pool.map(examine, expected) if damage is not None]
    unknown = [name for name in tensors if name not in expected]
    return damages + [Damage(name, _place(tensors[name], folder), "is not in the manifest") for name in unknown]


def _place(view: View, folder: Path) -> str:
    """The file of a tensor as a manifest names it."""
    return Path(view.file).relative_to(folder).as_posix()


def _read_expected(manifest: Mapping[str, Any], where: str) -> tuple[dict[str, dict[str, Any]], int]:
    """What a manifest says of each tensor, and the elements of a block; it may come from anywhere."""
    match manifest:
        case {"digest": None}:
            raise CheckpointError(f"{where}: was written with --no-digest; there is nothing to check.")
        case {"digest": {"algorithm": "xxh3_128", "block_elements": int(block)}} if block > 0:
            pass
        case _:
            raise CheckpointError(
                f"{where}: digest is {manifest.get('digest')!r}, expected xxh3_128 of so many block_elements; "
                "update teleflm or restore the file."
            )
    for name, entry in manifest["tensors"].items():
        match entry:
            case {"file": str(), "dtype": str(), "shape": list(), "digest": str()}:
                pass
            case _:
                raise CheckpointError(f"{where}: {name} lacks a file, dtype, shape or digest; restore the file.")
    return manifest["tensors"], block


def _block_digests(view: View, block: int, reader: FileReader, progress: Callable[[int], None]) -> Iterator[bytes]:
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, block):
        part = flat[start : start + block]
        yield block_digest(reader.chunks(part))
        progress(part.nbytes)
