# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What kind of training checkpoint a folder is, and which of its iterations is meant."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.bytes import read_start
from ..checkpoint.errors import CheckpointError
from ..checkpoint.folder_formats import FolderFormat, register
from ..checkpoint.manifest import read_manifest
from .checkpoint import NativeCheckpoint, NativeFormat
from .table import NativeWeight

FORMATS: tuple[NativeFormat, ...] = ("megatron", "torch_dist", "fsdp_dtensor", "dcp", "deepspeed")
_ITERATION = re.compile(r"iter_(\d{7,})")
RELEASE = "release"  # the step that a conversion writes, where Megatron-LM starts counting
TRACKER = "latest_checkpointed_iteration.txt"  # the file by which Megatron-LM finds the step to load
FSDP_WEIGHTS, FSDP_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # where Accelerate puts what FSDP2 has sharded
register(
    FolderFormat(
        "Megatron-LM",
        loadable=(TRACKER,),
        # Only what a conversion writes: the steps of a training run are nobody's to remove.
        weights=re.compile(
            rf"{re.escape(TRACKER)}|{RELEASE}/(mp_rank_\d+(_\d+)*/\w+\.pt|\.metadata|\w+\.json|\w+\.pt|\w+\.distcp)"
        ),
        folders=(f"{RELEASE}/mp_rank_*", RELEASE),
        steps=re.compile(rf"(iter_\d+|{RELEASE})(/.*)?"),
    )
)
register(
    FolderFormat(
        "DeepSpeed",
        loadable=(),
        weights=re.compile(r"(?!)"),  # we write none
        steps=re.compile(r"global_step\d+(/.*)?"),
    )
)
register(
    FolderFormat(
        "FSDP2",
        loadable=(f"{FSDP_WEIGHTS}/.metadata",),
        weights=re.compile(rf"{FSDP_WEIGHTS}/(\.metadata|__\d+_\d+\.distcp)"),
        folders=(FSDP_WEIGHTS, FSDP_OPTIMIZER),
        states=re.compile(rf"{FSDP_OPTIMIZER}/(\.metadata|__\d+_\d+\.distcp)"),
        steps=re.compile(rf"{FSDP_WEIGHTS}|{FSDP_OPTIMIZER}"),
    )
)
_MAX_TRACKER_BYTES = 200


def find_native(path: str | os.PathLike[str], iteration: int | None = None) -> tuple[NativeFormat, Path] | None:
    """The training checkpoint that a folder is or holds: its format, and the folder of the iteration.

    Args:
        path: a run's folder, or one iteration's.
        iteration: which; the latest unless given.

    Returns:
        None if the folder is no training checkpoint that this package knows.

    Raises:
        CheckpointError: the run has no such iteration, or says it has one that is not there.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        return None
    folder = _iteration_folder(root, iteration)
    found = _format(folder)
    return (found, folder) if found else None


def exported_folder(step: Path) -> Path | None:
    """The folder that an export wrote and left a manifest in, if the step is its; what was trained from it is not."""
    return step.parent if step.name == RELEASE or _is_recorded(step) else None


def _is_recorded(step: Path) -> bool:
    """Whether the record of the folder above lists files of a step: a run leaves its own there, and lists none."""
    try:
        files = (read_manifest(step.parent) or {}).get("files")
    except CheckpointError:
        return False
    return isinstance(files, dict) and any(name.startswith(f"{step.name}/") for name in files)


def _iteration_folder(root: Path, iteration: int | None) -> Path:
    if iteration is not None:
        folder = root / f"iter_{iteration:07d}"
        if not folder.is_dir() and _iteration_number(root) != iteration:
            present = ", ".join(sorted(entry.name for entry in root.glob("iter_*"))) or "none"
            raise CheckpointError(f"{folder}: no such folder; iterations there: {present}.")
        return folder if folder.is_dir() else root
    if (root / TRACKER).is_file():
        text = read_start(root / TRACKER, _MAX_TRACKER_BYTES).decode(errors="replace").strip()
        if text != RELEASE and not text.isdecimal():
            raise CheckpointError(f"{root / TRACKER}: says {text!r}, expected a number or {RELEASE}.")
        folder = root / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
        if not folder.is_dir():
            raise CheckpointError(f"{root / TRACKER}: says {text}, but there is no {folder.name}; give --iteration.")
        return folder
    return root / FSDP_WEIGHTS if (root / FSDP_WEIGHTS).is_dir() else root


def _format(folder: Path) -> NativeFormat | None:
    from .deepspeed import is_deepspeed
    from .dist_checkpoint import dist_format
    from .megatron import is_megatron

    if is_megatron(folder):
        return "megatron"
    return "deepspeed" if is_deepspeed(folder) else dist_format(folder)


def open_native(
    path: str | os.PathLike[str],
    iteration: int | None = None,
    *,
    table: Sequence[NativeWeight] | None = None,
    fp32_master: bool = False,
    optimizer: bool = False,
) -> NativeCheckpoint | None:
    """Open the training checkpoint that a folder is or holds; no tensor is loaded.

    Args:
        path: see `find_native`.
        iteration: see `find_native`.
        table: what its tensors are called, for a fork of Megatron.
        fp32_master: of DeepSpeed and Megatron: the optimizer's float32 weights, where the run's own are there too.
        optimizer: read Adam's moments too.

    Returns:
        None if the folder is no training checkpoint that this package knows.

    Raises:
        CheckpointError: see `find_native` and the readers.
    """
    from .deepspeed import read_deepspeed
    from .dist_checkpoint import read_dist_checkpoint
    from .megatron import read_megatron

    found = find_native(path, iteration)
    if found is None:
        return None
    kind, folder = found
    try:
        if kind == "megatron":
            number = _iteration_number(folder)
            return read_megatron(folder, number, table, fp32_master=fp32_master, optimizer=optimizer)
        if kind == "deepspeed":
            return read_deepspeed(folder, fp32_master=fp32_master, optimizer=optimizer)
        return read_dist_checkpoint(folder, table, fp32_master=fp32_master, optimizer=optimizer)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}.") from None


def _iteration_number(folder: Path) -> int | None:
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else None
