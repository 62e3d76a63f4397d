# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is to be done in a folder: the one place that holds a job against what lies there, and decides.

A folder has an owner. What an earlier run of ours wrote there, and says so in its record, is ours to replace; anything
else under a name that we would write, or that would be loaded with what we write, is somebody's, and stands in the way
until `--overwrite` is given.
"""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .errors import CheckpointError
from .folder_formats import is_setting, is_state, is_step, is_weights, known_files, loadable_files
from .job import Job, first_difference, read_json
from .manifest import MANIFEST, OLD_MANIFEST, is_plain, read_old_manifest, read_own_manifest, sample_digest
from .record import first_edit

PARTIAL = ".partial"
FOLDER = ".teleflm"
RUN = "run.json"


@dataclass(frozen=True)
class New:
    """Nothing stands in the way.

    Args:
        removes: what a run left that nobody can resume.
    """

    removes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resume:
    """An interrupted run of this very job is there and goes on.

    Args:
        relaxed: the run looked for values that are not finite or too large, and goes on without.
    """

    relaxed: bool = False


@dataclass(frozen=True)
class Done:
    """The folder holds exactly what the job would write, from the same sources.

    Args:
        missing: small files that are not there any more, or will not be once what stands in the way is removed; they
            can be written again from what the job knows.
    """

    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The folder holds something else.

    Args:
        reason: what, one sentence.
        removes: paths in the folder that `--overwrite` removes to make room; None if it would not help.
        then: what is to be done once they are gone.
    """

    reason: str
    removes: tuple[str, ...] | None = None
    then: New | Done = New()


Decision: TypeAlias = New | Resume | Done | Refused

_LOOKED_FOR = ("finite", "no_overflow")
_LOOKS = 5  # at a folder that changes
_WAY_OUT = "choose another folder or --overwrite"


def preflight(job: Job, out: Path) -> Decision:
    """Hold a job against the folder that it is to be written to; touches nothing.

    Args:
        job: what is to be written.
        out: the folder; it need not exist.
    """
    try:
        return _decide(job, out)
    except RecursionError:
        return Refused(f"{out}: holds a {MANIFEST} or {FOLDER}/{RUN} that nests too deeply; remove it.")


def _decide(job: Job, out: Path) -> Decision:
    above = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not above.is_dir():
        return Refused(f"{above}: is no folder, and {out} is to be one; write to another place.")
    if not os.path.lexists(out):
        return New()
    if _is_source(job, out):
        return Refused(f"{out}: is the source too; write to another folder.")
    if os.path.lexists(out / FOLDER) and ((out / FOLDER).is_symlink() or not (out / FOLDER).is_dir()):
        return Refused(f"{out}/{FOLDER}: has to be a folder, for what a run keeps meanwhile; move away what is there.")
    for _ in range(_LOOKS):
        there = _Contents(out)
        decision = _held_against_contents(job, there)
        if not isinstance(decision, Refused) or there.stays():
            break
    return decision


def _held_against_contents(job: Job, there: "_Contents") -> Decision:
    out = there.out
    files = (*job.weights, *(name + PARTIAL for name in job.weights), *job.small_contents, MANIFEST)
    folders = [name for name in files if lies_in(out, name, folders=True) and (out / name).is_dir()]
    if folders:
        return Refused(f"{out}/{folders[0]}: is a folder, where a file has to be; move it away or write elsewhere.")
    if there.fingerprint == job.fingerprint and (decision := _held_against_record(job, there)):
        return decision
    if there.run is not None:
        return _held_against_run(job, there, there.run)
    return _held_against_nothing(job, there)


class _Contents:
    """What lies in an output folder at one instant.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run, self.has_record, self.names = self._settled()
        self.record, self.record_fault = self._read_record()
        self.old_record = read_old_manifest(out)

    def _settled(self) -> tuple[dict[str, Any] | None, bool, list[str]]:
        """The run, whether there is a record, and the names, as they were together.

        Another rank may write its run and its first file between two looks: so they are taken again until they stay.
        """
        seen = self._look()
        for _ in range(_LOOKS):
            again = self._look()
            if again == seen:
                break
            seen = again
        return seen

    def stays(self) -> bool:
        """Whether the folder still is what it was: what was decided about two instants may be true of none."""
        return self._look() == (self.run, self.has_record, self.names)

    def _look(self) -> tuple[dict[str, Any] | None, bool, list[str]]:
        run = read_json(self.out / FOLDER / RUN)
        return run, os.path.lexists(self.out / MANIFEST), list(known_files(self.out))

    def _read_record(self) -> tuple[dict[str, Any] | None, str | None]:
        try:
            return read_own_manifest(self.out), None
        except CheckpointError as error:
            return None, str(error)

    @property
    def fingerprint(self) -> Any:
        """Of the job that the record says was done here."""
        return self.made_by.get("fingerprint")

    @property
    def made_by(self) -> dict[str, Any]:
        """What the record says of the job."""
        job = (self.record or {}).get("job")
        return job if isinstance(job, dict) else {}

    @property
    def weights(self) -> list[str]:
        """Weights of any format, whole: what makes them loadable first."""
        loadable = loadable_files()
        found = [name for name in self.names if is_weights(name)]
        return sorted(found, key=lambda name: (name not in loadable, name))

    @property
    def partials(self) -> list[str]:
        """Weights that are being written, or were when their run was killed."""
        return [name for name in self.names if name.endswith(PARTIAL) and is_weights(name.removesuffix(PARTIAL))]

    @property
    def left(self) -> list[str]:
        """Those of `partials` that a run of ours has left, as it also left its notes of them."""
        return [name for name in self.partials if self._is_left(name)]

    def _is_left(self, partial: str) -> bool:
        notes = self.out / FOLDER / partial.removesuffix(PARTIAL).replace("/", "-")
        has_notes = any(notes.with_name(notes.name + suffix).is_file() for suffix in (".journal", ".done"))
        return has_notes and lies_in(self.out, partial) and not (self.out / partial).is_symlink()

    @property
    def settings(self) -> list[str]:
        """Files that decide how the folder loads."""
        return [name for name in self.names if is_setting(name)]

    def obstacle(self, name: str) -> str:
        """What has to go before a file can be written: itself, or a link or file where a folder above it has to be."""
        parents = [parent for parent in reversed(Path(name).parents) if parent.parts]
        found = (parent for parent in parents if _is_entry(self.out / parent))
        return next((parent.as_posix() for parent in found), name)

    def present(self, names: Iterable[str]) -> list[str]:
        """What stands where some files are to be: mostly, these files."""
        return [name for name in dict.fromkeys(map(self.obstacle, names)) if os.path.lexists(self.out / name)]

    def digest(self, name: str) -> str | None:
        """Of a small file; None if it is not there, an empty text if it is no file, or lies behind a link."""
        path = self.out / name
        if self.obstacle(name) != name:
            return ""
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def removable(self, job: Job) -> tuple[str, ...]:
        """What `--overwrite` removes. What makes the folder load comes first, the record last.

        That is what the record lists or an interrupted run has written, if it still is what they say; weights that
        would load, whoever wrote them; other files that decide how the folder loads; what the job writes anyway.
        """
        partials = [name + PARTIAL for name in job.weights]
        records = [OLD_MANIFEST] if self.old_record else []
        anew = [*job.weights, *partials, *job.small_contents]
        ours = [*self._recorded(), *self._written(), *anew, *records]
        names = [name for name in (*self.weights, *self.settings, *self.partials, *ours) if name != MANIFEST]
        sources = {os.path.realpath(source.name) for source in job.plan.sources}
        found = [name for name in self.present(names) if lies_in(self.out, name)]
        paths = {name: self.out / name for name in found}
        kept = {name for name, path in paths.items() if os.path.realpath(path) in sources and not path.is_symlink()}
        return (*(name for name in found if name not in kept), *self.present([MANIFEST]))

    def _recorded(self) -> Iterator[str]:
        """The files that the record lists, unless somebody has put other ones in their place."""
        for name, entry in _entries((self.record or {}).get("files")):
            if not is_plain(name) or not lies_in(self.out, name):
                continue
            if is_weights(name):
                is_ours = _size(self.out / name) == entry.get("bytes")
            elif "samples" in entry:  # a file of state, or of an iteration: too large for a digest of it all
                is_ours = _size(self.out / name) == entry.get("bytes") and (
                    sample_digest(self.out / name) == entry.get("samples")
                )
            else:  # which only a digest tells from a file of somebody else
                is_ours = isinstance(entry.get("sha256"), str) and self.digest(name) == entry["sha256"]
            if is_ours:
                yield name

    @property
    def recorded_weights(self) -> list[str]:
        """The files of weights that the record lists and that are still there, whatever they are called."""
        files = dict(_entries((self.record or {}).get("files")))
        return [name for name in self._recorded() if "samples" in files[name] and "tensors" not in files[name]]

    def _written(self) -> Iterator[str]:
        """The files that an interrupted run has written, or was writing."""
        run = self.run or {}
        for name, digest in _items(run.get("small_files")):
            if is_plain(name) and self.digest(name) == digest:
                yield name
        for name, _ in _items(run.get("weights")):
            if is_weights(name) and is_plain(name):
                yield from (name, name + PARTIAL)
            elif is_state(name) and is_plain(name):
                yield from [name + PARTIAL, *([name] if is_placed(self.out, name) else [])]
            elif is_plain(name):  # of an iteration, as runs have them: what its notes show to be of this run alone
                yield from [name + PARTIAL] if self._is_left(name + PARTIAL) else []
                yield from [name] if is_placed(self.out, name) else []


def _held_against_record(job: Job, there: _Contents) -> Decision | None:
    """What to do where the record says that this very job was done; None if only an unfinished run can have said so."""
    out, loadable = there.out, job.layout.loadable_file
    if not (out / loadable).exists() and there.run is not None:
        return None
    for name, size in job.weights.items():
        found = _size(out / name)
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, expected {size}"
            present = there.present([loadable, *job.weights])
            held = f"already holds {present[0]}, but" if present else "holds the record of a finished checkpoint, but"
            return Refused(f"{out}: {held} {name} {state}; {_WAY_OUT}.", there.removable(job))
    edit = first_edit(there.record or {}, job)
    if edit:
        text = f"{out}/{MANIFEST}: is not the record that was written there: {edit}; restore it, {_WAY_OUT}."
        return Refused(text, there.removable(job))
    recorded = dict(_entries((there.record or {}).get("files")))
    touched = [name for name in job.weights if recorded.get(name, {}).get("samples") != sample_digest(out / name)]
    if touched:
        return Refused(f"{out}/{touched[0]}: is not what was written there; {_WAY_OUT}.", there.removable(job))
    promised = there.made_by.get("settings")
    for name, value in job.settings.items():
        given = promised.get(name) if isinstance(promised, dict) else None
        if value is True and given is not True:
            text = f"already holds {loadable}, but {name} was {given!r} and is {value!r}; {_WAY_OUT}."
            return Refused(f"{out}: {text}", there.removable(job))
    digests = {name: there.digest(name) for name in job.small_digests}
    missing = tuple(name for name, digest in digests.items() if digest is None)
    changed = [name for name, digest in digests.items() if digest not in (None, job.small_digests[name])]
    ours = {*job.weights, *digests}
    obstacles = dict.fromkeys(map(there.obstacle, changed))
    unknown = [name for name in (*there.weights, *there.settings) if name not in {*ours, *obstacles}]
    removes, then = (*obstacles, *unknown), Done(tuple(name for name in digests if name in {*missing, *changed}))
    if changed:
        text = f"{out}/{changed[0]}: is not what was written there; put it back, choose another folder, or --overwrite"
        also = f", and to remove {listed(unknown)}, which would be loaded with it" if unknown else ""
        return Refused(f"{text} to have it written again{also}.", removes, then)
    if unknown:
        text = f"{out}/{unknown[0]}: is not of this checkpoint and would be loaded with it; move it away or --overwrite"
        return Refused(f"{text} to remove it.", removes, then)
    return then


def _held_against_run(job: Job, there: _Contents, run: Mapping[str, Any]) -> Decision:
    """What to do where a run was interrupted."""
    out = there.out
    loadable = [name for name in there.weights if name in loadable_files()]
    if loadable:
        return Refused(f"{out}: already holds {loadable[0]}, {_made_otherwise(job, there)}", there.removable(job))
    promised = dict(_items(run.get("settings")))
    looked_for = {name: False for name in _LOOKED_FOR if promised.get(name) is True and job.settings.get(name) is False}
    relaxed = bool(looked_for)
    if relaxed:  # what it has written was looked at, which is more than is asked of it now
        run = {**run, "settings": {**promised, **looked_for}}
    difference = first_difference(run, job.run)
    if difference:
        text = f"holds an interrupted run, but {difference}; repeat that run, or --overwrite it."
        return Refused(f"{out}: {text}", there.removable(job))
    foreign = [name for name in (*there.weights, *there.settings) if name not in {*job.weights, *job.small_contents}]
    foreign += [there.obstacle(name) for name in job.weights if there.obstacle(name) != name]
    foreign += [name + PARTIAL for name in job.weights if (out / (name + PARTIAL)).is_symlink()]
    changed = [name for name, digest in job.small_digests.items() if there.digest(name) not in (None, digest)]
    foreign += map(there.obstacle, changed)
    foreign += [name for name in there.present(filter(is_state, job.weights)) if not is_placed(out, name)]
    foreign += [MANIFEST] if there.has_record and there.fingerprint != job.fingerprint else []
    if foreign:
        return Refused(f"{out}/{foreign[0]}: {_NOT_OURS}", there.removable(job))
    return Resume(relaxed)


_NOT_OURS = f"is there already, written by no earlier run; move it away, {_WAY_OUT}, which removes it."


def _held_against_nothing(job: Job, there: _Contents) -> Decision:
    """What to do where no run has left a word of itself."""
    out = there.out
    if held := there.weights or there.recorded_weights:
        return Refused(f"{out}: already holds {held[0]}, {_made_otherwise(job, there)}", there.removable(job))
    left = there.left
    partials = (name + PARTIAL for name in job.weights if name + PARTIAL not in left)
    foreign = there.present([*job.weights, *job.small_contents, *there.settings, *partials])
    foreign += [MANIFEST] if there.has_record else []
    foreign += [OLD_MANIFEST] if there.old_record else []
    if foreign:
        return Refused(f"{out}/{foreign[0]}: {_NOT_OURS}", there.removable(job))
    return New(tuple(left))


def _made_otherwise(job: Job, there: _Contents) -> str:
    """How a checkpoint differs from the one that would be written, as far as is known, and the way out."""
    if there.record_fault:
        return f"and its record cannot be read ({there.record_fault.rstrip('.')}); {_WAY_OUT}."
    record = there.record
    if record is None and there.old_record is None:
        return f"and nothing that says what it was made from; {_WAY_OUT}."
    if record is None or not there.made_by:
        return f"whose record does not say from which files it was made; {_WAY_OUT}."
    files = {name: entry["sha256"] for name, entry in _entries(record.get("files")) if "sha256" in entry}
    old = {
        "version": record.get("teleflm_version"),
        "seed": record.get("seed"),
        "lineage": record.get("lineage"),
        "sources": record.get("sources"),
        "plan": record.get("plan"),
        **{name: there.made_by.get(name) for name in ("settings", "engine", "layout")},
        "small_files": files,
    }
    if there.digest("config.json") == files.get("config.json"):
        old["config"] = read_json(there.out / "config.json")
    new = {name: value for name, value in job.run.items() if name in old}
    if old["plan"] == new["plan"] and old["layout"] == new["layout"]:
        del old["version"], new["version"]
    difference = first_difference(old, new) or "its record was edited"
    return f"but {difference}; {_WAY_OUT}."


# Files.


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        return None


def is_placed(out: Path, name: str) -> bool:
    """Whether a run that is not finished has written a file and given it its name, so that what lies there is its own.

    Args:
        out: the folder.
        name: of a file of state. Whatever loads weights would load it with them, so it is nobody's until shown.
    """
    record, path = read_json(out / FOLDER / (name.replace("/", "-") + ".done")), out / name
    if record is None or os.path.lexists(out / (name + PARTIAL)) or path.is_symlink() or not path.is_file():
        return False
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (record.get("size"), record.get("mtime_ns"))


def _is_source(job: Job, out: Path) -> bool:
    """Whether OUT is the checkpoint that is read: the folder of its files, or of the training steps they are in."""
    here = out.resolve()
    files = [Path(source.name) for source in job.plan.sources]
    folders = {folder for file in files for folder in (file.parent.resolve(), file.resolve().parent)}
    return any(is_step(folder.relative_to(here).as_posix()) for folder in folders if folder.is_relative_to(here))


def lies_in(out: Path, name: str, *, folders: bool = False) -> bool:
    """Whether a path is that of a file, or a link, that lies in a folder: no link on the way leads elsewhere.

    Args:
        out: the folder.
        name: the path below it.
        folders: whether it may be that of a folder.
    """
    path = out / name
    parents = [out / parent for parent in Path(name).parents if parent.parts]
    return not any(parent.is_symlink() for parent in parents) and (folders or _is_entry(path) or not path.is_dir())


def _is_entry(path: Path) -> bool:
    """Whether a path is that of something which is no folder: a link, or a file of any kind."""
    return path.is_symlink() or (os.path.lexists(path) and not path.is_dir())


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Some names for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _entries(value: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry) for name, entry in _items(value) if isinstance(entry, dict)]
