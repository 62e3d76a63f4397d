# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a run saved into a checkpoint beside one another: weights, optimizer, schedule; and whether they still are that.

A Trainer's optimizer.pt says of which step it is and of no model, and so do the parts of FSDP and DeepSpeed. One of
another run at the same step loads as well. So a run notes sizes and samples of all that it saves for its own resuming,
in `run.json` (`growth.training.same_run`), before what makes the checkpoint count is written. Of each file a few places
are read: what was exchanged, restored from elsewhere or trained on shows; an edit in the middle of one tensor may not.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .checkpoint.errors import CheckpointError
from .checkpoint.manifest import is_edited, is_plain, sample_digest
from .checkpoint.sources import WEIGHT_FILES
from .checkpoint.strict_json import read_json_object

RUN = "run.json"  # what a checkpoint is of, and what was saved into it
FILES = "files"  # its member: path below the checkpoint -> bytes and samples
# Random states are no part of it: each process writes its own, whenever it comes to that.
_FILES = (
    *(*WEIGHT_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin", "adapter_model.*"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt"),
)
_FOLDERS = ("optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*", "global_step*")


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and samples of what a run saved into a checkpoint, by path below it.

    Raises:
        OSError, CheckpointError: a file cannot be read.
    """
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "samples": sample_digest(path)}
        for path in sorted(_saved(folder))
    }


def _saved(folder: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from (path for path in folder.glob(pattern) if path.is_file())
    for pattern in _FOLDERS:
        for place in folder.glob(pattern):
            yield from (path for path in place.rglob("*") if path.is_file())


def check_saved_files(folder: Path) -> None:
    """Check that what is in a checkpoint is what its run saved there, as far as that noted it.

    Files that are not there any more are not missed here, and nothing is known of a folder whose run noted none.

    Raises:
        CheckpointError: a file was exchanged or changed since, or the note itself was.
    """
    path = folder / RUN
    note: dict[str, Any] = {}
    if path.is_file():
        with suppress(CheckpointError):  # the name is anybody's; whoever resumes asks for one that can be read
            note = read_json_object(path, nan=True)
    listed = note.get(FILES)
    if listed is None or "checksum" not in note:
        return
    if is_edited(note) or not isinstance(listed, dict):
        raise CheckpointError(f"{path} was edited since it was written: its checksum is not that of the rest.")
    for name, entry in listed.items():
        if is_plain(name) and isinstance(entry, Mapping) and (folder / name).is_file():
            _check_file(folder / name, entry)


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size == entry.get("bytes") and sample_digest(path) == entry.get("samples"):
        return
    has = "other content" if size == entry.get("bytes") else f"{size} bytes, expected {entry.get('bytes')}"
    raise CheckpointError(
        f"{path}: has {has}, so it is not what was saved with the rest of the checkpoint; put that back, or name "
        "another checkpoint."
    )


__all__ = ["FILES", "RUN", "check_saved_files", "describe_files"]
