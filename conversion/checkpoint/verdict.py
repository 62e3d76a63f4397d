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
from .manifest import MANIFEST, amend, is_edited, read_own_manifest


def add_verification(folder: Path, verification: Mapping[str, Any]) -> None:
    """Put a verdict into the record of a folder, in place of an earlier one; the record is the old or the new one.

    The rest of it stays as it is, so a folder that holds what a command would write still does. The record's digest is
    another one, and it keeps the one before: what was made from the folder until now names that.

    Args:
        folder: the one that was verified.
        verification: what was found, in JSON.

    Raises:
        CheckpointError: the folder has no record of this version, it was edited, or it cannot be written.
    """
    path = folder / MANIFEST
    before = path.read_bytes() if path.is_file() else b""
    record = read_own_manifest(folder)
    if record is None:
        raise CheckpointError(f"{path}: no such file; there is no record that a verdict could be added to.")
    if is_edited(record):
        raise CheckpointError(f"{path}: was edited, its checksum is not that of the rest; restore the file.")
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link to {path.resolve()}; put a copy of the file in its place.")
    if record.get("verification") == verification:
        return
    try:
        write_atomically(path, json_bytes(amend(record, before, verification=dict(verification))))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; nothing was recorded.") from None
