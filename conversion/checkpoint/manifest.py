# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`manifest.json`: what a checkpoint was made from, and the digest of every tensor.

It is published beside the weights, so it holds no local path, no user and no host name.
"""

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from .assemble import BLOCK
from .containers import Shard
from .errors import CheckpointError
from .plan import CheckpointPlan
from .strict_json import parse_json_object

MANIFEST = "manifest.json"
FORMAT = 1
_FIELDS = {"plan": str, "lineage": dict, "tensors": dict}  # what a manifest of this format has at least


def block_digest(chunks: Iterable[bytes | memoryview]) -> bytes:
    """Digest of one block's bytes, which may come in chunks of any size."""
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def tensor_digest(blocks: Iterable[bytes]) -> str:
    """Digest of a tensor: the hash of its blocks' digests in order, so that blocks may be made in any order."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def package_version() -> str:
    """Version of this package, or `unknown` in a checkout that was never installed."""
    try:
        return importlib.metadata.version("teleflm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def make_manifest(
    plan: CheckpointPlan, shards: Iterable[Shard], statistics: Mapping[str, float], digests: Mapping[str, str]
) -> dict[str, Any]:
    """The manifest of a finished checkpoint.

    Args:
        plan: what was executed.
        shards: the files it was written to.
        statistics: symbol of the plan -> the number behind it.
        digests: tensor name -> digest; empty if none were taken.
    """
    return {
        "format": FORMAT,
        "teleflm_version": package_version(),
        "plan": plan.fingerprint(),
        "seed": plan.seed,
        "lineage": plan.lineage,
        "statistics": dict(statistics),
        "digest": {"algorithm": "xxh3_128", "block_elements": BLOCK} if digests else None,
        "tensors": {
            tensor.name: {
                "file": shard.filename,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                **({"digest": digests[tensor.name]} if digests else {}),
            }
            for shard in shards
            for tensor, _ in shard.tensors
        },
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it has none.

    Raises:
        CheckpointError: it is not one this version understands.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = parse_json_object(path.read_bytes(), str(path))
    if manifest.get("format") != FORMAT:
        found = repr(manifest.get("format"))[:80]
        raise CheckpointError(f"{path}: manifest format is {found}, this version reads {FORMAT}; update teleflm.")
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            found = type(manifest.get(field)).__name__
            raise CheckpointError(
                f"{path}: {field} is a {found}, expected a {kind.__name__}; restore or remove the file."
            )
    return manifest


def parent_record(folder: Path) -> dict[str, Any] | None:
    """What a lineage keeps of the checkpoint it continues: the plan and the lineage in its manifest, if it has one.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    return {"plan": manifest["plan"], "lineage": manifest["lineage"]} if manifest else None
