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
from .sources import Source


@dataclass(frozen=True)
class Damage:
    """One tensor that is not what the manifest says, and how."""

    tensor: str
    file: str
    reason: str


def check_digests(
    source: Source, manifest: Mapping[str, Any], workers: int, progress: Callable[[int, int], None]
) -> list[Damage]:
    """Read every tensor of a checkpoint and compare it with its manifest, in bounded memory.

    Args:
        source: the checkpoint.
        manifest: its manifest.
        workers: threads.
        progress: called with the bytes just read and those in all.

    Returns:
        The tensors that are missing, unknown or changed, in the order of the manifest; empty if all is well.

    Raises:
        CheckpointError: the manifest has no digests.
    """
    if not manifest.get("digest"):
        raise CheckpointError(f"{source.folder}/{MANIFEST}: was written with --no-digest; there is nothing to check.")
    expected = manifest["tensors"]
    block = manifest["digest"]["block_elements"]
    total = sum(view.nbytes for name, view in source.tensors.items() if name in expected)

    def examine(name: str) -> Damage | None:
        entry, view = expected[name], source.tensors.get(name)
        if view is None:
            return Damage(name, entry["file"], "is missing")
        found = (Path(view.file).name, view.dtype.name, list(view.shape))
        if found != (entry["file"], entry["dtype"], entry["shape"]):
            return Damage(name, found[0], f"is {found[1]} {found[2]}, expected {entry['dtype']} {entry['shape']}")
        try:
            digest = tensor_digest(_block_digests(view, block, reader, lambda nbytes: progress(nbytes, total)))
        except CorruptData as error:
            return Damage(name, entry["file"], f"cannot be read: {error}")
        return None if digest == entry["digest"] else Damage(name, entry["file"], "does not have its digest")

    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        damages = [damage for damage in pool.map(examine, expected) if damage is not None]
    unknown = [name for name in source.tensors if name not in expected]
    return damages + [Damage(name, Path(source.tensors[name].file).name, "is not in the manifest") for name in unknown]


def _block_digests(view: View, block: int, reader: FileReader, progress: Callable[[int], None]) -> Iterator[bytes]:
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, block):
        part = flat[start : start + block]
        yield block_digest(reader.chunks(part))
        progress(part.nbytes)
