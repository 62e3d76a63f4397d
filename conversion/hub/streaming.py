# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A checkpoint larger than the disk, streamed to a repository: each shard is written, sent, and removed.

    plan  ->  shard i is written in a working folder  ->  sent ahead of its commit  ->  removed  ->  ...  ->  one commit

What was sent is kept in the working folder, so that a killed call goes on with the next shard. Readers of the
repository see nothing of it until the commit.
"""

import base64
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.containers import Shard
from ..checkpoint.errors import CheckpointError
from ..checkpoint.execute import WriteOptions, make_job, write_and_ship
from ..checkpoint.job import Finished, Job, json_bytes
from ..checkpoint.manifest import MANIFEST, seal
from ..checkpoint.numbers import parse_size
from ..checkpoint.plan import CheckpointPlan
from ..checkpoint.record import job_record
from ..checkpoint.sizes import format_bytes
from ..checkpoint.workspace import forget_run
from .card import CARD, CardFacts, planned_facts
from .client import check_repo_id
from .published_card import CardOptions, validate_card
from .publishing import ask, compose_card, files_to_remove, make, require_free, tag_commit
from .release import refuse_secrets
from .uploading import Destination, Sent, commit, forgotten, send

_STATE = "sent.json"


@dataclass(frozen=True)
class Streamed:
    """A checkpoint that was streamed to a repository, or would be.

    Args:
        repo_id: `OWNER/NAME`.
        plan: the checkpoint.
        files: name -> bytes of every file.
        removed: files of the repository that go.
        in_flight: how many of its shards lie on this disk at once, at most.
        disk: bytes that these take.
        notes: what a user should know, one sentence each.
        url: of the commit; None after a dry run.
    """

    repo_id: str
    plan: CheckpointPlan
    files: dict[str, int]
    removed: list[str]
    in_flight: int
    disk: int
    notes: list[str]
    url: str | None = None


def stream_to_hub(
    plan: CheckpointPlan,
    repo_id: str,
    low_disk: str | int,
    options: WriteOptions,
    notes: list[str],
    *,
    work: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    card: CardOptions = CardOptions(),  # noqa: B008  (frozen)
    dry_run: bool = False,
) -> Streamed:
    """Write a plan as a model of the Hub, with little of it on this disk at any time.

    Args:
        plan: what to write.
        repo_id: `OWNER/NAME`; made if there is none.
        low_disk: bytes of this disk that may be used, or text such as `50GB`.
        options: how to write; shards are as large as `max_shard_size`.
        notes: what a user should know of the plan, one sentence each.
        work: the working folder; `teleflm-OWNER-NAME` here unless given. Removed when all is there.
        private, revision, tag, message, card: see `publish`.
        dry_run: ask the Hub, and write nothing, here and there.

    Raises:
        CheckpointError: the repository cannot be what was asked for, or one shard is larger than `low_disk`.
        OSError: the Hub cannot be reached or refuses, or the disk fails; the same call goes on.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    if options.world_size > 1:
        raise CheckpointError(f"{repo_id}: one process streams to the Hub, {options.world_size} were started.")
    job = make_job(plan, options)
    in_flight, disk = _in_flight(job, parse_size(low_disk), options)
    to = Destination(HfApi(library_name="teleflm"), repo_id, revision)
    there, said, reached = ask(to, private, tag, dry_run)
    files = {**job.weights, **{name: len(content) for name, content in job.small_contents.items()}}
    removed = files_to_remove(to, there, {*files, MANIFEST}) if there else []
    text = compose_card(to, there, _facts(job, repo_id), job.small_contents[CARD], card, repo_id)
    for name, content in {**job.small_contents, CARD: text}.items():
        if not name.endswith(".model"):
            refuse_secrets(content, f"{repo_id}/{name}")
    if reached:
        validate_card(text.decode(), repo_id)
    streamed = Streamed(repo_id, plan, files, removed, in_flight, disk, [*notes, *said])
    if dry_run:
        return streamed
    work = work or Path("teleflm-" + repo_id.replace("/", "-"))
    there, removed = make(to, there, private, {*files, MANIFEST})
    state = _State.read(work, job, repo_id, options.overwrite)
    state.forget(forgotten(to, state.sent))

    def ship(shard: Shard, path: Path, finished: Finished) -> None:
        state.add(shard.filename, send(to, {shard.filename: path})[shard.filename], finished)

    finished = write_and_ship(job, work, options, state.finished, ship, in_flight)
    record = job_record(job, finished)
    of_card = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    sealed = seal({**record, "files": {**record["files"], CARD: of_card}})
    contents = {**job.small_contents, CARD: text, MANIFEST: json_bytes(sealed)}
    if tag:
        require_free(to, tag, there, state.sent, contents, removed)
    url = commit(to, there.commit, state.sent, contents, removed, message or "Upload with teleflm")
    if tag:
        tag_commit(to, tag, url)
    state.remove()
    return Streamed(repo_id, plan, files, removed, in_flight, disk, streamed.notes, url)


def _in_flight(job: Job, budget: int, options: WriteOptions) -> tuple[int, int]:
    """How many shards may lie on the disk at once, and the bytes that they take."""
    largest = max(shard.disk_bytes for shard in job.layout.shards)
    if largest > budget:
        raise CheckpointError(
            f"--low-disk is {format_bytes(budget)}, and one file has {format_bytes(largest)}; allow that much, or give "
            f"a smaller --max-shard-size than {options.max_shard_size} (no file is smaller than its largest tensor)."
        )
    number = min(budget // largest, len(job.layout.shards))
    return number, number * largest


def _facts(job: Job, repo_id: str) -> CardFacts:
    views = [(tensor.dtype.name, tensor.numel, tensor.nbytes) for tensor in job.plan.tensors]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in job.small_contents.items():
            if "/" not in name:
                Path(folder, name).write_bytes(content)
        return replace(planned_facts(job.plan.config, job.plan.lineage, views, Path(folder)), repo_id=repo_id)


class _State:
    """What was sent, kept in the working folder.

    Args:
        work: that folder.
        fingerprint: of the job.
        repo_id: where it was sent.
        source: where it is read, if that is not on this machine.
    """

    def __init__(self, work: Path, fingerprint: str, repo_id: str, source: Any) -> None:
        self._work = work
        self._of = {"job": fingerprint, "repository": repo_id, "source": source}
        self._lock = threading.Lock()
        self.sent: dict[str, Sent] = {}
        self.finished: dict[str, Finished] = {}

    @classmethod
    def read(cls, work: Path, job: Job, repo_id: str, overwrite: bool) -> "_State":
        """What an earlier call left there.

        Raises:
            CheckpointError: it was another job, or went elsewhere.
        """
        parent = job.plan.lineage.get("parent")
        state = cls(work, job.fingerprint, repo_id, parent.get("origin") if isinstance(parent, dict) else None)
        found: Any = None
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((work / _STATE).read_bytes())
        if not isinstance(found, dict):
            return state
        if found.get("of") != state._of:
            if not overwrite:
                raise CheckpointError(
                    f"{work}: holds what is left of another upload{_moved(found.get('of'), state._of)}; "
                    "repeat that one, remove the folder, or --overwrite."
                )
            return state
        with suppress(KeyError, TypeError, ValueError):
            for name, entry in found["files"].items():
                sent, finished = entry["sent"], Finished(**entry["finished"])
                state.sent[name] = Sent(sent["size"], sent["sha256"], *map(_bytes, (sent["sample"], sent["content"])))  # type: ignore[arg-type]
                state.finished[name] = finished
        return state

    def add(self, name: str, sent: Sent, finished: Finished) -> None:
        """Keep that a shard was sent; durable when this returns."""
        with self._lock:
            self.sent[name], self.finished[name] = sent, finished
            self._write()

    def forget(self, names: set[str]) -> None:
        """Drop what the Hub has not kept."""
        for name in names:
            del self.sent[name], self.finished[name]

    def _write(self) -> None:
        files: Mapping[str, Any] = {
            name: {
                "sent": {**asdict(sent), "sample": _text(sent.sample), "content": _text(sent.content)},
                "finished": asdict(self.finished[name]),
            }
            for name, sent in self.sent.items()
        }
        partial = self._work / (_STATE + ".partial")
        with partial.open("w") as file:
            json.dump({"of": self._of, "files": files}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._work / _STATE)

    def remove(self) -> None:
        """Remove the working folder, unless somebody has put something there."""
        forget_run(self._work)
        (self._work / _STATE).unlink(missing_ok=True)
        with suppress(OSError):
            self._work.rmdir()


def _moved(before: Any, now: Mapping[str, Any]) -> str:
    """That a source on the Hub has moved on since, if that is all that is known to differ."""
    match before, now:
        case {"source": {"hub": str() as name, "commit": str() as old}}, {"source": {"hub": same, "commit": new}}:
            if name == same and old != new:
                return f", of hf://{name}@{old} (it is at {new[:12]} now)"
    return ""


def _text(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


__all__ = ["Streamed", "stream_to_hub"]
