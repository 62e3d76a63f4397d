# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What will be written, from what, and how: one value with one fingerprint, asked by all who must know "the same".

A `Job` is everything that decides what OUT will hold, and everything it is made from. The executor, the dry run, the
workspace and the record of a finished checkpoint have no notion of sameness of their own; `preflight.py` holds a job
against a folder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .bytes import ByteSource
from .containers import Layout
from .errors import CheckpointError
from .manifest import MANIFEST, package_version
from .plan import CheckpointPlan, PlanError

# Raised when the same plan, layout and sources would give other bytes: until then a checkpoint that an older version
# finished is still what this one would write.
ENGINE = 1


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written.

    Args:
        plan: where every byte of its tensors comes from.
        layout: which file each tensor is in, and where.
        small_files: name -> content of every other file but the record, read once; config.json among them.
        settings: what was asked of the writing, by name.
        sources: identity of every file that the plan reads, by its path below the folder that they share.
    """

    plan: CheckpointPlan
    layout: Layout
    small_files: Mapping[str, bytes]
    settings: Mapping[str, Any]
    sources: Mapping[str, str]

    @classmethod
    def of(cls, plan: CheckpointPlan, layout: Layout, **settings: Any) -> "Job":
        """The job of writing a plan as some files.

        Args:
            plan: the checkpoint; the files that it names beside the tensors are read here.
            layout: its files.
            settings: `digest`, `finite` and `no_overflow`, which promise something where they are True, and what else a
                user would want to be told of.

        Raises:
            CheckpointError: a file that the plan names cannot be read.
        """
        small_files = {name: _content(name, content) for name, content in plan.sidecars.items()}
        small_files["config.json"] = json_bytes(plan.config)
        return cls(plan, layout, small_files, settings, source_identities(plan.sources))

    def check(self) -> None:
        """Check that the pieces tile the tensors, the tensors the files, and that no two files have one name.

        Raises:
            PlanError: something does not add up.
        """
        self.plan.check()
        self.layout.check(self.plan.tensors)
        names = [*self.weights, *self.small_contents, MANIFEST]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PlanError(f"{twice} is planned twice: as weights and as another file.")

    @property
    def weights(self) -> dict[str, int]:
        """Size of every file of weights or state, by its path."""
        return {shard.filename: shard.nbytes for shard in self.layout.shards}

    @property
    def small_contents(self) -> dict[str, bytes]:
        """Content of every file but the weights and the record, by its path."""
        return {**self.small_files, **dict([self.layout.index] if self.layout.index else [])}

    @cached_property
    def small_digests(self) -> dict[str, str]:
        """Digest of every file but the weights and the record."""
        return {name: small_digest(content) for name, content in sorted(self.small_contents.items())}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the output, in JSON: what two jobs share iff they write the same from the same."""
        return {
            "engine": ENGINE,
            "plan": self.plan.fingerprint(),
            "layout": self.layout.fingerprint(),
            "small_files": self.small_digests,
            "sources": dict(sorted(self.sources.items())),
        }

    @cached_property
    def fingerprint(self) -> str:
        """A digest of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def run(self) -> dict[str, Any]:
        """What an unfinished run of this job says of itself; it resumes under one that says the same."""
        return _as_json(
            {
                "version": package_version(),
                "settings": self.settings,
                "seed": self.plan.seed,
                "config": self.plan.config,
                "lineage": self.plan.lineage,
                "weights": self.weights,
                **self.identity,
            }
        )


@dataclass(frozen=True)
class Finished:
    """The record of a finished shard.

    Args:
        size: bytes of the file.
        mtime_ns: its time of change; another one means that somebody touched it.
        digests: tensor name -> digest, empty if none are taken.
        statistics: symbol of the plan -> its value, for the symbols this shard uses.
        samples: `sample_digest` of the file.
    """

    size: int
    mtime_ns: int
    digests: dict[str, str]
    statistics: dict[str, float]
    samples: str


def source_identities(sources: Iterable[ByteSource], *, now: bool = False) -> dict[str, str]:
    """The identity of every file by its name: the shortest end of their paths that tells all of them apart.

    Where their folder lies does not matter, and does not show: these names are published.

    Args:
        sources: the files.
        now: look again what they are; they are what they were when their headers were read unless asked.

    Raises:
        OSError: a file is not there `now`.
    """
    files = {source.name: source for source in sources}
    parts = {name: name.split("/") for name in sorted(files)}
    depth = 1
    while len({tuple(part[-depth:]) for part in parts.values()}) < len(parts):
        depth += 1
    return {
        "/".join(part[-depth:]): files[name].current_identity() if now else files[name].identity
        for name, part in parts.items()
    }


# Differences, for people.

# What to tell first: what somebody has done, then what follows from it, then what nobody can read.
_TELLING = (
    "sources",
    "settings",
    "seed",
    "lineage",
    "config",
    "other sources",
    "parent",
    "weights",
    "small_files",
    "version",
    "engine",
)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The most telling thing in which two jobs differ; None if they are the same.

    Args:
        old: `Job.run` of one, as it was written down.
        new: of the other.
    """
    before, after = flatten(old), flatten(new)

    def rank(path: tuple[str, ...]) -> tuple[int, bool, bool, tuple[str, ...]]:
        in_both = path in before and path in after
        section = "parent" if path[:2] == ("lineage", "parent") else path[0]
        if section == "sources" and not in_both:  # what was asked for tells why other files are read
            section = "other sources"
        place = _TELLING.index(section) if section in _TELLING else len(_TELLING)
        return place, path[-1] == "README.md", not in_both, path

    for path in sorted(before.keys() | after.keys(), key=rank):
        is_cut_otherwise = path[-1] == "max_shard_size" and not {path} <= before.keys() & after.keys()  # see the layout
        if repr(before.get(path)) != repr(after.get(path)) and not is_cut_otherwise:  # NaN is no other than NaN
            return _describe_difference(path, before, after)
    return None


def _describe_difference(path: tuple[str, ...], before: Mapping[Any, Any], after: Mapping[Any, Any]) -> str:
    section, name = path[0], ".".join(path[1:])
    if section == "sources":
        if path in before and path in after:
            return f"the source file {name} has changed since: it has another size, time or content"
        return f"the source file {name} {'is not read any more' if path in before else 'was not read then'}"
    if section == "small_files":
        if path in before and path in after:
            return f"{name} would be another: what it is made from has changed since"
        return f"{name} {'is no part of it any more' if path in before else 'was no part of it'}"
    if section == "weights":
        return "its files were to be cut otherwise"
    if section in ("plan", "layout", "engine"):
        return {
            "plan": "its tensors were planned otherwise",
            "layout": "its files were laid out otherwise",
            "engine": "another version would write other bytes",
        }[section]
    return f"{'.'.join(path)} was {shortened(before.get(path))} and is {shortened(after.get(path))}"


def flatten(value: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """What is not an object itself, by the names that lead to it."""
    leaves: dict[tuple[str, ...], Any] = {}
    parts: list[tuple[tuple[str, ...], Any]] = [((name,), part) for name, part in value.items()]
    while parts:
        path, part = parts.pop()
        if isinstance(part, Mapping) and part:
            parts += [((*path, name), inner) for name, inner in part.items()]
        else:
            leaves[path] = part
    return leaves


def shortened(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Files.


def small_digest(content: bytes) -> str:
    """Digest of a small file."""
    return hashlib.sha256(content).hexdigest()


def json_bytes(value: Any) -> bytes:
    """A JSON file as we write them."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that is either whole or as good as not there."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _content(name: str, content: str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        return Path(content).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{content} cannot be read: {error.strerror}; it is to become {name}.") from None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
