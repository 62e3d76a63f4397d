# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Whether a model's files are, when a measurement ends, what they were when it began.

A measurement reads a model more than once: its headers, its weights layer by layer, its digests. Numbers of two states
of it are numbers of none. Size and time of change do not tell: a copy may keep both. The time of the file's last change
of any kind (`st_ctime_ns`), which no program can set, does; it also moves where a mode or a link is changed, so that
it only tells when everything has to be read again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from conversion.checkpoint.bytes import LocalFile
from conversion.checkpoint.errors import CorruptData
from conversion.checkpoint.sources import Source
from conversion.model_identity import tensor_digests

# Of the files beside the weights, those that decide what is computed.
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json"),
)
_GRAIN = 10**9  # nanoseconds: file systems note times in steps, some of a second; what is younger may change unseen

_Stamp: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True)
class HeldFiles:
    """The files of a model as they were at one moment.

    Args:
        checkpoint: the model, open.
        stamps: of each local weight file, by its path, its inode, size, time of change, and time of any change.
        small: of each file beside the weights, by its path, its sha256; None if it was not there.
        begun: nanoseconds of the clock when the stamps were taken.
    """

    checkpoint: Source
    stamps: dict[str, _Stamp]
    small: dict[str, str | None]
    begun: int

    @classmethod
    def of(cls, checkpoint: Source) -> "HeldFiles":
        """Those of a checkpoint, now.

        Raises:
            OSError: a file cannot be read.
        """
        stamps = {file.name: _stamp(file.name) for file in checkpoint.files if isinstance(file, LocalFile)}
        small = {path: _digest(path) for path in (f"{checkpoint.folder}/{name}" for name in _SMALL)}
        return cls(checkpoint, stamps, small, time.time_ns())

    def require_small_same(self) -> None:
        """Check the files beside the weights.

        Raises:
            CorruptData: one is another.
        """
        for path, digest in self.small.items():
            if _digest(path) != digest:
                raise CorruptData(f"{path}: was changed while the model was measured; run the command again.")

    def require_same(
        self, digests: Mapping[str, str], progress: Callable[[int, int], None] = lambda nbytes, total: None
    ) -> None:
        """Check the weights: by the stamps, and where these leave a doubt, by reading them again.

        Args:
            digests: of the tensors that were computed with, by name; none if there are none to compare.
            progress: called with the bytes just read and those in all.

        Raises:
            CorruptData: they are not what they were, or nothing can tell.
        """
        file = self.touched()
        if file and not digests:
            raise CorruptData(
                f"{file}: was written to or replaced, or its mode or links were changed, while the model was measured; "
                "run the command again."
            )
        if file or not self.is_certain():
            require_digests(self.checkpoint, digests, "while the model was measured; run the command again", progress)

    def touched(self) -> str | None:
        """A weight file that was written to, replaced or removed since, or had its mode or links changed.

        None is a promise that none was written to, unless the file system keeps no such times.
        """
        for path, stamp in self.stamps.items():
            try:
                now = _stamp(path)
            except OSError:
                return path
            if now != stamp:
                return path
        for file in self.checkpoint.files:
            if not isinstance(file, LocalFile) and file.current_identity() != file.identity:
                return file.name
        return None

    def is_certain(self) -> bool:
        """Whether a change since would have moved the stamps: not so of a file that had just been written then."""
        return all(self.begun - stamp[3] > _GRAIN for stamp in self.stamps.values())


def require_digests(
    checkpoint: Source,
    digests: Mapping[str, str],
    when: str,
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> None:
    """Read tensors of a checkpoint, and check that they still are those of some digests.

    Args:
        checkpoint: the model, open.
        digests: of tensors, by name.
        when: it was changed if it was, and the way out, for the message.
        progress: called with the bytes just read and those in all.

    Raises:
        CorruptData: one is not.
    """
    there = {name: view for name, view in checkpoint.tensors.items() if name in digests}
    found = tensor_digests(there, progress=progress)
    if different := next((name for name in digests if found.get(name) != digests[name]), None):
        file = there[different].file if different in there else checkpoint.folder
        raise CorruptData(f"{file}: {different} has other values than were computed with: it was changed {when}.")


def _stamp(path: str) -> _Stamp:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


__all__ = ["HeldFiles", "require_digests"]
