# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A verdict in the record of a checkpoint that is there already: the one thing that is ever added to one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic_file import write_atomically
from .errors import CheckpointError
from .job import json_bytes
from .manifest import MANIFEST, is_edited, read_own_manifest, seal


def add_verification(folder: Path, verification: Mapping[str, Any]) -> None:
    """Put a verdict into the record of a folder, in place of an earlier one; the record is the old or the new one.

    The rest of it stays as it is, so a folder that holds what a command would write still does. The record's digest is
    another one: what was made from the folder before names the record as it was then.

    Args:
        folder: the one that was verified.
        verification: what was found, in JSON.

    Raises:
        CheckpointError: the folder has no record of this version, it was edited, or it cannot be written.
    """
    path = folder / MANIFEST
    record = read_own_manifest(folder)
    if record is None:
        raise CheckpointError(f"{path}: no such file; there is no record that a verdict could be added to.")
    if is_edited(record):
        raise CheckpointError(f"{path}: was edited, its checksum is not that of the rest; restore the file.")
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link to {path.resolve()}; put a copy of the file in its place.")
    try:
        write_atomically(path, json_bytes(seal({**record, "verification": dict(verification)})))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; nothing was recorded.") from None
