# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The states of a forward pass that goes layer by layer, on disk: bounded memory, and a place to go on from.

    job.json     what is computed; a folder of another computation is not touched
    states-0     the residual stream after an even number of layers, of one group of passages after another; float32,
    states-1     or float64; after an odd number. One is read while the other is written
    scores       log-likelihoods after the last layer, float64
    journal      a line for each group that was written: its state, its number, its digest, and those of the weights
                 that the layer was computed with

A process may be killed at any moment: what the journal says is checked against the digests before it is used, and what
it does not say is computed again. All groups of a state are of the same weights, or there is no state.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from conversion.checkpoint.atomic_file import write_atomically
from conversion.checkpoint.errors import CheckpointError, CorruptData

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_JOB, _JOURNAL, _SCORES = "job.json", "journal", "scores"
_FILES = (_JOB, _JOURNAL, _SCORES, "states-0", "states-1")
_PART = 1 << 24  # bytes that are hashed at a time


class HiddenStates:
    """The states of one computation; a context manager that holds the folder against a second process.

    State s is what s layers have made; that after the last layer holds the scores in its place.

    Args:
        folder: made if it is not there.
        job: what is computed, as JSON; another one in the folder is refused.
        sizes: bytes of each group in a state of hidden values.
        score_sizes: bytes of each group in the last state.
        layers: of the model.

    Attributes:
        weights: of each state that is there or was, the digests of the weights of its layer, by their names.

    Raises:
        CheckpointError: the folder is another computation's, is used at this moment, or holds other files.
        OSError: it cannot be written.
    """

    def __init__(
        self, folder: Path, job: Mapping[str, Any], sizes: Sequence[int], score_sizes: Sequence[int], layers: int
    ):
        self.folder, self.layers = folder, layers
        self._sizes, self._score_sizes = list(sizes), list(score_sizes)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._hold()
        try:
            self._claim(dict(job))
            self.weights: dict[int, dict[str, str]] = {}
            self._done = self._read_journal()
            # From the beginning, nothing that an earlier run noted counts.
            self._journal = (folder / _JOURNAL).open("a" if self._done else "w", encoding="utf-8")
            self._journal.write("\n")  # ends the line that a kill cut, which would spoil the next
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        os.close(self._lock)

    @property
    def next_layer(self) -> int:
        """The layer that is not finished yet; `layers` if all are."""
        return max((state for state, groups in self._done.items() if len(groups) == len(self._sizes)), default=0)

    def has(self, state: int, group: int) -> bool:
        """Whether a group of a state is there."""
        return group in self._done.get(state, {})

    def read(self, state: int, group: int, dtype: np.dtype[Any]) -> np.ndarray:
        """The values of a group of a state, flat.

        Raises:
            CorruptData: they are not what was written.
        """
        path, offset, size = self._place(state, group)
        values = np.empty(size // dtype.itemsize, dtype)
        with path.open("rb") as file:
            file.seek(offset)
            read = file.readinto(values.data.cast("B")) if size else 0
        if read != size or xxhash.xxh3_128_hexdigest(values.data) != self._done[state][group]:
            raise CorruptData(f"{path}: does not hold what was written; remove {self.folder}, and run this again.")
        return values

    def write(self, state: int, group: int, values: np.ndarray, weights: Mapping[str, str]) -> None:
        """Keep a group of a state; the state before the last one goes as this one comes.

        Args:
            state, group: which.
            values: of it.
            weights: digests of the weights that it was computed with, by their names.

        Raises:
            CorruptData: another group of the state was computed with other weights.
        """
        known = self.weights.setdefault(state, dict(weights))
        if different := next((name for name in known if known[name] != weights.get(name)), None):
            raise CorruptData(
                f"{different} has other values than when another part of the texts was computed: the model was changed "
                f"meanwhile. Remove {self.folder}, and run this again."
            )
        path, offset, size = self._place(state, group)
        values = np.ascontiguousarray(values)
        if values.nbytes != size:
            raise ValueError(f"group {group} of state {state} has {values.nbytes} bytes, expected {size}.")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            rest = memoryview(values.data.cast("B"))
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            os.close(descriptor)
        digest = xxhash.xxh3_128_hexdigest(values.data)
        self._journal.write(json.dumps([state, group, digest, dict(weights)]) + "\n")
        self._journal.flush()
        self._done.setdefault(state, {})[group] = digest
        self._done.pop(state - 2, None)

    def remove(self) -> None:
        """Remove the folder, when its numbers are where they belong; a file of others in it stays."""
        for path in (*(self.folder / name for name in _FILES), *self.folder.glob(f".{_JOB}-*")):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _place(self, state: int, group: int) -> tuple[Path, int, int]:
        is_last = state == self.layers
        sizes = self._score_sizes if is_last else self._sizes
        name = _SCORES if is_last else f"states-{state % 2}"
        return self.folder / name, sum(sizes[:group]), sizes[group]

    def _hold(self) -> int:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"{self.folder}: another process computes here; wait for it, or give another --work."
            ) from None
        except OSError:  # a file system without locks
            pass
        return descriptor

    def _claim(self, job: dict[str, Any]) -> None:
        path = self.folder / _JOB
        if path.is_file() and path.stat().st_size:  # an empty one is what a machine that went down left of it
            try:
                found = json.loads(path.read_bytes())
            except ValueError:
                found = {}
            differing = sorted(
                name for name in {*job, *found} if not isinstance(found, dict) or found.get(name) != job.get(name)
            )
            if differing:
                raise CheckpointError(
                    f"{self.folder}: holds the states of another evaluation ({', '.join(differing)} differ); give "
                    "another --work, or remove that folder."
                )
            return
        if others := sorted(entry.name for entry in self.folder.iterdir() if not _is_start(entry.name)):
            raise CheckpointError(f"{self.folder}: holds {others[0]}, and no evaluation; give another --work.")
        write_atomically(path, (json.dumps(job, indent=2) + "\n").encode())  # a kill leaves all of it or nothing

    def _read_journal(self) -> dict[int, dict[int, str]]:
        """What is there, and is what the journal says: the last whole state, and what there is of the next."""
        written: dict[int, dict[int, str]] = {}
        path = self.folder / _JOURNAL
        weights: dict[int, dict[str, str]] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                state, group, digest, read = json.loads(line)
                self._place(state, group)
                weights.setdefault(state, {}).update(read)
            except (ValueError, TypeError, IndexError):
                continue  # empty, or cut by a kill
            written.setdefault(state, {})[group] = digest
            written.pop(state - 2, None)
        last = max((state for state, groups in written.items() if len(groups) == len(self._sizes)), default=0)
        found = {state: self._intact(state, written[state]) for state in (last, last + 1) if state in written}
        if last and len(found[last]) < len(self._sizes):
            return {}
        self.weights = {state: weights[state] for state in weights if state <= last or found.get(state)}
        return {state: groups for state, groups in found.items() if groups}

    def _intact(self, state: int, groups: Mapping[int, str]) -> dict[int, str]:
        return {group: digest for group, digest in groups.items() if self._digest(state, group) == digest}

    def _digest(self, state: int, group: int) -> str | None:
        path, offset, size = self._place(state, group)
        digest = xxhash.xxh3_128()
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while size and (part := file.read(min(size, _PART))):
                    digest.update(part)
                    size -= len(part)
        except OSError:
            return None
        return None if size else digest.hexdigest()


def _is_start(name: str) -> bool:
    """Whether a file is what a run leaves that was killed before it had begun."""
    return name == _JOB or name.startswith(f".{_JOB}-")


def check_space(folder: Path, need: int) -> None:
    """Check that the states fit.

    Args:
        folder: where they will be, or a folder that is not there yet.
        need: bytes of all files.

    Raises:
        CheckpointError: they do not.
    """
    there = folder
    while not there.exists():
        there = there.parent
    held = sum(file.stat().st_size for name in _FILES if (file := folder / name).is_file())
    free = shutil.disk_usage(there).free + held
    if need > free:
        raise CheckpointError(
            f"{folder}: the hidden states take {need} bytes, and {free} are free; give a --work on another disk, or "
            "fewer texts."
        )


__all__ = ["HiddenStates", "check_space"]
