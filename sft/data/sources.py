# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The sources that a run takes its rows from, and what tells whether their content is still the same."""

import difflib
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sft.data.formats import DATASET_NAME, SUFFIXES, DataError, UnreadableError, dataset_files

_BLOCK = 1 << 22
# What other trainers call it.
_ALIASES = {
    "fraction": "weight",
    "interleave_probs": "weight",
    "data_files": "path",
    "files": "path",
    "data_dir": "path",
    "dataset": "path",
    "config_name": "config",
    "max_samples": "max_rows",
}


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how many an epoch has.

    Args:
        name: what reports call it.
        places: files or datasets, see [`sft.data.formats.read_rows`].
        weight: how often an epoch has each row: 2 twice, 0.5 a half of the rows.
        max_rows, max_tokens: an epoch has no more of the source, whatever the weight says.
    """

    name: str
    places: tuple[str, ...]
    weight: float = 1.0
    max_rows: int | None = None
    max_tokens: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether an epoch has each row once."""
        return self.weight == 1 and self.max_rows is None and self.max_tokens is None


_PLACE_KEYS = ("revision", "config", "split")
_KEYS = ("path", "name", *_PLACE_KEYS, "weight", "max_rows", "max_tokens")


def parse_sources(values: Sequence[Any]) -> tuple[Source, ...]:
    """The sources that `data:` of a recipe lists.

    Args:
        values: mappings with `path` (a file, a folder, a name on the Hub, or a list of them) and perhaps `name`,
            `weight`, `max_rows`, `max_tokens`, and for the Hub `revision`, `config` and `split`.

    Raises:
        DataError: one is of another form; two have one name. The message names the entry.
    """
    if not values:
        raise DataError("data is an empty list; give at least one {path: FILE}.")
    sources = tuple(_parse_source(value, f"data[{index}]") for index, value in enumerate(values))
    names = [source.name for source in sources]
    if repeated := [name for name in names if names.count(name) > 1]:
        where = [f"data[{index}]" for index, name in enumerate(names) if name == repeated[0]]
        raise DataError(
            f"{' and '.join(where)} are both called {repeated[0]}; give each a name of its own (name: ...)."
        )
    if len(sources) > 127:
        raise DataError(
            f"data lists {len(sources)} sources; 127 at most. A source may have a list of files as its path."
        )
    return sources


def _parse_source(value: Any, where: str) -> Source:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {value!r}; expected a mapping such as {{path: FILE, weight: 0.5}}.")
    for key in value:
        if key not in _KEYS:
            nearest = _ALIASES.get(str(key)) or next(iter(difflib.get_close_matches(str(key), _KEYS, n=1)), None)
            way_out = f"did you mean {nearest}?" if nearest else f"keys are {', '.join(_KEYS)}."
            raise DataError(f"{where}: unknown key {key}; {way_out}")
    given = {key: found for key, found in value.items() if found is not None}
    paths = given.get("path")
    paths = [paths] if isinstance(paths, str) else paths
    if not (isinstance(paths, list) and paths and all(isinstance(path, str) and path for path in paths)):
        raise DataError(f"{where}.path is {given.get('path')!r}; expected a file, a dataset, or a list of them.")
    for key in ("name", *_PLACE_KEYS):
        if key in given and not (isinstance(given[key], str) and given[key]):
            raise DataError(f"{where}.{key} is {given[key]!r}; expected text.")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e6:
        raise DataError(f"{where}.weight is {weight!r}; expected a number above 0: how often an epoch has each row.")
    for key in ("max_rows", "max_tokens"):
        if key in given and not (type(given[key]) is int and given[key] > 0):
            raise DataError(f"{where}.{key} is {given[key]!r}; expected a whole number from 1.")
    places = tuple(_place(path, given, where) for path in paths)
    caps = (given.get("max_rows"), given.get("max_tokens"))
    return Source(given.get("name", ", ".join(places)), places, float(weight), *caps)


def _place(path: str, given: Mapping[str, Any], where: str) -> str:
    """A path, with what is said of it as the Hub's names have it: `OWNER/NAME@REVISION:CONFIG:SPLIT`."""
    said = [key for key in _PLACE_KEYS if key in given]
    if not said:
        return path
    match = DATASET_NAME.fullmatch(path)
    if is_local(path) or match is None:
        raise DataError(f"{where}.{said[0]} has no effect on {path}, which is no dataset of the Hub; delete the key.")
    inside = {"revision": match["revision"], "config": match["split"] and match["config"]}
    inside["split"] = match["split"] or match["config"]
    for key in said:
        if inside[key] is not None:
            raise DataError(f"{where}.{key} is {given[key]}, but {path} names one too; keep one of the two.")
    parts = {**{key: found for key, found in inside.items() if found}, **{key: given[key] for key in said}}
    place = match["path"] + (f"@{parts['revision']}" if "revision" in parts else "")
    if "config" in parts:
        place += f":{parts['config']}:{parts.get('split', 'train')}"
    elif "split" in parts:
        place += f":{parts['split']}"
    if DATASET_NAME.fullmatch(place) is None:
        raise DataError(f"{where}: {place} is no name of a dataset (OWNER/NAME@REVISION:CONFIG:SPLIT).")
    return place


def is_local(place: str) -> bool:
    """Whether a place is a file or a folder rather than a name on the Hub; see [`sft.data.formats.read_rows`]."""
    return Path(place).exists() or place.endswith(SUFFIXES) or DATASET_NAME.fullmatch(place) is None


def pin(place: str) -> str:
    """A dataset of the Hub with the commit that its revision, or its main branch, is at now; other places as they are.

    Raises:
        DataError: there is no such dataset or revision, or the Hub cannot be asked.
    """
    match = DATASET_NAME.fullmatch(place)
    if is_local(place) or match is None:
        return place
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(match["path"], revision=match["revision"], timeout=60).sha
    except Exception as error:  # of whatever client huggingface_hub has
        reason = " ".join(str(error).split())
        raise DataError(f"{place}: no such file, nor a dataset to be had ({reason}).") from error
    rest = place[len(match["path"]) + (len(match["revision"]) + 1 if match["revision"] else 0) :]
    return f"{match['path']}@{commit}{rest}"


class _State(NamedTuple):
    """What the system notes of a file, and changes if the file is written, replaced or renamed.

    Also if only its rights or its links change: nothing tells that from bytes that were put back.
    """

    inode: int
    size: int
    modified: int
    changed: int


@dataclass(frozen=True)
class Content:
    """What some places hold, and what tells later whether that is what was read from them.

    Args:
        places: pinned, see [`pin`].
        digest: of all that decides which rows are read, whatever the files are called and wherever they lie: of files
            their bytes, read through; of folders those of all files in them, and of files elsewhere that their rows
            come from; of datasets of the Hub the commit.
        states: of each file, of the descriptor that its bytes were digested from.
        entries: of folders and all that is in them, links not followed.
    """

    places: tuple[str, ...]
    digest: str
    states: Mapping[Path, _State]
    entries: Mapping[Path, _State | None]

    def require_opened(self, path: Path, descriptor: int) -> None:
        """Refuse to read rows from a file that is not the one that was digested, whatever its path names later.

        Raises:
            DataError: it is not; the message names it.
        """
        if _state(descriptor) != self.states.get(path):
            raise DataError(_changed(path))

    def require_same(self) -> None:
        """Refuse what was read since, if a file changed meanwhile; the system is asked, no byte is read.

        Of a folder, whose files `datasets` opens, it is not seen that a directory above it, or one of a file outside
        it, was another one for a while and is back.

        Raises:
            DataError: a file was written, replaced, renamed, added or removed, even if it is as it was before. The
                message names it.
        """
        for path in dict.fromkeys([*self.states, *(path for place in self.places for path in _files_in(place))]):
            if _state(path) != self.states.get(path):
                raise DataError(_changed(path))
        entries = _entries_of(self.places)
        for path in [*self.entries, *entries]:
            if entries.get(path) != self.entries.get(path):
                raise DataError(_changed(path))

    def require_same_bytes(self) -> None:
        """Likewise, and read every byte again: a disk of another machine may tell late that a file was written.

        Raises:
            DataError: a file changed.
        """
        again = read_content(self.places)
        self.require_same()
        if again.digest != self.digest:
            raise DataError(_changed(", ".join(self.places)))


def read_content(places: Sequence[str]) -> Content:
    """Digest the places that rows are about to be read from.

    Args:
        places: pinned, see [`pin`].

    Raises:
        DataError: a file cannot be read; a folder has rows that come from no file of this machine.
    """
    import xxhash

    digest, states, entries = xxhash.xxh3_128(), dict[Path, _State](), _entries_of(places)
    for place in places:
        # Repeated ids are looked for from one file to the next if they are one: so this decides too.
        digest.update(f"\0{places.index(place)}\0{_kind(place)}\0".encode())
        files = _files_in(place)
        named = {file: f"\0{file.relative_to(place)}\0" if Path(place).is_dir() else "" for file in files}
        for file in (*files, *_files_outside(place, files)):
            bytes_of_it, state = _digest_and_state(file)
            states.setdefault(file, state)  # of one that is named twice, as it was first
            digest.update(f"{named.get(file, '//')}{bytes_of_it}".encode())
        if not files:
            digest.update(place.encode())
    return Content(tuple(places), digest.hexdigest(), states, entries)


def _files_in(place: str) -> list[Path]:
    """The files of a place on this machine; none of a dataset of the Hub, whose commit says what it holds."""
    path = Path(place)
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if found.is_file())
    return [path] if is_local(place) else []


def _files_outside(place: str, files: Sequence[Path]) -> list[Path]:
    """The files that rows of a folder come from and that are not in it, in the order of the rows."""
    if not Path(place).is_dir():
        return []
    known = {os.path.realpath(file) for file in files}
    return [file for file in dataset_files(place) if os.path.realpath(file) not in known]


def _entries_of(places: Sequence[str]) -> dict[Path, _State | None]:
    folders = [Path(place) for place in places if Path(place).is_dir()]
    return {path: _state(path, follow=False) for folder in folders for path in (folder, *folder.rglob("*"))}


def _state(path: Path | int, *, follow: bool = True) -> _State | None:
    """Of a path or a descriptor."""
    try:
        found = os.fstat(path) if isinstance(path, int) else os.stat(path, follow_symlinks=follow)
    except OSError:  # it is gone, or whoever reads it says why it cannot be
        return None
    return _State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _changed(name: object) -> str:
    return f"{name}: changed while it was read; run it again when nothing writes to it any more."


def _kind(place: str) -> str:
    return (
        "folder" if Path(place).is_dir() else max((end for end in SUFFIXES if place.endswith(end)), key=len, default="")
    )


def digest_file(path: Path) -> str:
    """xxh3-128 of all bytes of a file.

    Raises:
        DataError: there is none.
        UnreadableError: it cannot be read.
    """
    return _digest_and_state(path)[0]


def _digest_and_state(path: Path) -> tuple[str, _State]:
    """Likewise, with what the system notes of the file of which they are, from before the first was read."""
    import xxhash

    digest = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            state = _state(file.fileno())
            assert state is not None
            buffer = memoryview(bytearray(_BLOCK))
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
        return digest.hexdigest(), state
    except OSError as error:
        kind = UnreadableError if is_unreadable(error) else DataError
        raise kind(f"{path}: {error.strerror or error}.") from error


def is_unreadable(error: OSError) -> bool:
    """Whether an error of the system says nothing of what is there: only that it is absent would, or no number."""
    return error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def as_places(files: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """One or several places, as texts."""
    return (os.fspath(files),) if isinstance(files, str | Path) else tuple(os.fspath(file) for file in files)


__all__ = [
    "Content",
    "Source",
    "as_places",
    "digest_file",
    "is_local",
    "is_unreadable",
    "parse_sources",
    "pin",
    "read_content",
]
