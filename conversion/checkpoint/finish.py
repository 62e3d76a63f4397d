# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What makes a folder loadable: the small files, the record, and last of all the file by which loaders find it.

Also links in the place of weights that are another folder's very bytes, and what has to be done where a file system
makes none.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from .containers import Shard
from .job import Finished, Job, json_bytes
from .kernel_copy import copy_range
from .manifest import MANIFEST
from .preflight import PARTIAL
from .record import job_record
from .workspace import Workspace, naming_errors, put_there, sync_folder

LinkKind: TypeAlias = Literal["hard link", "symbolic link", "copy"]

# A link is refused: across file systems, too many of them, not to be had here, or not to a file of somebody else
# (Linux's protected_hardlinks).
_NO_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def finish(job: Job, finished: Sequence[Finished], workspace: Workspace) -> None:
    """Complete a folder whose shards are written.

    Args:
        job: what was written.
        finished: the record of each shard that was written.
        workspace: where.

    Raises:
        OSError: the disk is full; the folder is not loadable, and the same call resumes.
    """
    workspace.require_ours()
    write_small_files(job, finished, workspace)
    make_loadable(job, workspace)


def write_small_files(job: Job, finished: Sequence[Finished], workspace: Workspace) -> None:
    """Write everything but the weights and what makes them loadable."""
    for name, content in job.small_files.items():
        workspace.write(name, content)
    workspace.write(MANIFEST, json_bytes(job_record(job, finished)))


def make_loadable(job: Job, workspace: Workspace) -> None:
    """Give the shards their names, and last of all put the file in place that makes it load."""
    out, layout = workspace.out, job.layout
    *first, last = sorted(layout.shards, key=lambda shard: shard.filename == layout.loadable_file)
    for shard in first:
        _name_shard(out, shard)
    if layout.index:
        _name_shard(out, last)
    sync_folders(out, (*job.weights, *job.small_files))
    with suppress(PermissionError):  # somebody else's, in which we may make entries and not look
        sync_folder(out.absolute().parent)
    workspace.require_ours()
    if layout.index:
        workspace.write(*layout.index)
    else:
        _name_shard(out, last)
    sync_folders(out, [layout.loadable_file])


def write_missing(job: Job, names: Iterable[str], workspace: Workspace) -> None:
    """Write small files of a finished folder again."""
    contents = job.small_contents
    workspace.folder.mkdir(exist_ok=True)
    for name in names:
        workspace.write(name, contents[name])
    sync_folders(workspace.out, names)


def sync_folders(out: Path, names: Iterable[str]) -> None:
    """Make the names of files below a folder durable."""
    folders = {folder for name in names for folder in (out / name).parents if folder == out or out in folder.parents}
    for folder in sorted(folders, reverse=True):
        sync_folder(folder)


def _name_shard(out: Path, shard: Shard) -> None:
    path, partial = out / shard.filename, out / (shard.filename + PARTIAL)
    if shard.twin:
        path.unlink(missing_ok=True)  # a killed run may have made some
        _link(os.path.realpath(shard.twin), path)
    elif partial.exists():  # a killed run may have renamed some
        if shard.state and os.path.lexists(path):
            raise put_there(path)
        partial.rename(path)


# Links.


def link_kind(out: Path, shard: Shard) -> LinkKind:
    """How a file of a finished folder shares the bytes of its twin."""
    path = out / shard.filename
    if not shard.twin or not os.path.samefile(path, shard.twin):
        return "copy"
    return "symbolic link" if path.is_symlink() else "hard link"


def _link(source: str, path: Path) -> None:
    """Have a file hold the bytes of another one, at the least cost that the file system allows."""
    for link in (os.link, os.symlink):
        try:
            link(source, path)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    _copy(source, path)


def _copy(source: str, path: Path) -> None:
    """Copy a file, inside of the kernel and without taking space where it can do that."""
    partial = path.with_name(path.name + PARTIAL)
    with naming_errors(path), open(source, "rb") as reader, partial.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        copy_range(reader.fileno(), 0, writer.fileno(), 0, size)
        os.fsync(writer.fileno())
    partial.rename(path)
