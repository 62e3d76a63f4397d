# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is in this folder? A checkpoint's architecture, files, record and faults, from headers alone."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import MODEL_TYPE, Architecture
from .checkpoint.check import Damage, check_digests
from .checkpoint.errors import CheckpointError
from .checkpoint.manifest import MANIFEST, read_manifest
from .checkpoint.sources import Source, open_checkpoint
from .hub import count_pieces, lineage_steps
from .mapping import check_tensors


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Args:
        folder: its path.
        format: the container of its weights: `safetensors` or `torch`.
        model_type: of its config.json, None without one.
        architecture: its numbers, for a Tele-FLM with a usable config.json.
        parameters: elements of all tensors.
        dtypes: dtype -> number of tensors.
        nbytes: bytes of all tensors.
        files: weight files and their sizes in bytes.
        pieces: pieces of its tokenizer, None without one.
        padding_rows: vocabulary rows without a piece, None if unknown.
        lineage: what it was made from, a sentence a step, oldest first.
        problems: what is wrong with it, a sentence each.
        damages: tensors that differ from the manifest; None if that was not checked.
    """

    folder: str
    format: str
    model_type: str | None
    architecture: Architecture | None
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    files: dict[str, int]
    pieces: int | None
    padding_rows: int | None
    lineage: list[str]
    problems: list[str]
    damages: list[Damage] | None


def inspect_checkpoint(
    path: str | Path,
    *,
    check: bool = False,
    workers: int = os.cpu_count() or 1,
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> Inspection:
    """Describe a checkpoint without loading it or executing anything it contains.

    Args:
        path: its folder, or one weight file.
        check: read every tensor and compare it with the digests of manifest.json.
        workers: threads for `check`.
        progress: called with the bytes `check` just read and those in all.

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is damaged; `check` without digests.
    """
    source = open_checkpoint(path)
    folder = Path(source.folder)
    problems: list[str] = []
    architecture = _noting(problems, lambda: _architecture(source))
    pieces = _noting(problems, lambda: count_pieces(folder))
    manifest = _noting(problems, lambda: read_manifest(folder))
    if architecture:
        _noting(problems, lambda: check_tensors(source.tensors, architecture, source.folder))
        if pieces and pieces > architecture.vocab_size:
            problems.append(
                f"tokenizer.model has {pieces} pieces, config.json a vocab_size of {architecture.vocab_size}."
            )
    if check and manifest is None:
        raise CheckpointError(f"{folder}/{MANIFEST}: no such file; there is nothing to check the tensors against.")
    return Inspection(
        folder=source.folder,
        format=source.format,
        model_type=(source.config or {}).get("model_type"),
        architecture=architecture,
        parameters=sum(view.numel for view in source.tensors.values()),
        dtypes=dict(Counter(view.dtype.name for view in source.tensors.values())),
        nbytes=sum(view.nbytes for view in source.tensors.values()),
        files={Path(file).name: os.path.getsize(file) for file in source.files},
        pieces=pieces,
        padding_rows=architecture.vocab_size - pieces if architecture and pieces else None,
        lineage=lineage_steps(manifest["lineage"]) if manifest else [],
        problems=problems,
        damages=check_digests(source, manifest, workers, progress) if check and manifest else None,
    )


def _architecture(source: Source) -> Architecture | None:
    where = f"{source.folder}/config.json"
    if source.config is None:
        raise CheckpointError(f"{where}: no such file.")
    return (
        Architecture.from_config(source.config, where, with_biases=True)
        if source.config.get("model_type") == MODEL_TYPE
        else None
    )


def _noting(problems: list[str], look: Callable[[], Any]) -> Any:
    """What `look` finds; what it complains of is noted instead of raised."""
    try:
        return look()
    except CheckpointError as error:
        problems.append(str(error))
        return None
