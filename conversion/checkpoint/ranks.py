# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the processes that share the work know of each other, through files in a folder beside OUT.

Each rank keeps one small file, `.OUT.ranks/<rank>.json`, which a thread writes anew every second or two: that it is
alive, how many bytes it has written, and at the end how it ended. Beside OUT and not in it, because a rank may fail
before OUT is anybody's; the last to leave removes it. Whoever waits reads them, so that a rank that fails is
known to all within seconds, with its reason; one that was killed after a while, because its file stops changing; and
one that never came, because it has none. No clocks are compared: what counts is whether a file changed while it was
looked at, by the clock of who looks.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from .errors import CorruptData

State: TypeAlias = Literal["working", "finished", "failed"]

_FOLDER = ".ranks"
_SAME_TRY_SECONDS = 30.0
_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.1
_TELL_SECONDS = 10.0

logger = logging.getLogger(__name__)


class RankFailed(CorruptData):
    """Another of the processes that share the work failed, or is gone."""


@dataclass
class _Sign:
    """The last that was seen of another rank: its file's content, and when that last changed."""

    content: dict[str, Any] = field(default_factory=dict)
    changed: float = field(default_factory=time.monotonic)


class Ranks:
    """One of the processes that share the work, and its view of the others. A context manager.

    An error that leaves the context is what the others are told. Alone, it keeps no files and watches nothing; what
    ranks that were killed have left it removes at the end, unless it changes.

    Args:
        out: the output folder; nothing is written in it.
        rank: of this process.
        world_size: how many there are.
        patience: seconds without a sign of life after which a rank counts as gone.
    """

    def __init__(
        self,
        out: Path,
        rank: int,
        world_size: int,
        *,
        patience: float,
    ) -> None:
        self.rank = rank
        self._others = {other: _Sign() for other in range(world_size) if other != rank}
        here = out.absolute()
        self._folder = here.with_name(f".{here.name}{_FOLDER}")
        self._patience = patience
        self._progress: Callable[[int], None] | None = None
        self._attempt = f"{os.getpid()}-{time.time_ns()}"  # so that no file is that of an earlier try
        self._launch = _launch()
        self._before: dict[int, dict[str, Any]] = {}  # perhaps of an earlier try
        self._state: State = "working"
        self._reason = ""
        self._done = self._beats = self._reported = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: str | None = None
        self._found: tuple[float, dict[str, bytes]] = (0.0, {})  # when this process came, and what was there
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> "Ranks":
        if self._others:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(exist_ok=True)
            self._beat()
            self._before = {other: self._read(other) for other in self._others if not self._is_of_this_try(other)}
            self._thread.start()
        else:
            self._found = time.monotonic(), self._signs()
        return self

    def _signs(self) -> dict[str, bytes]:
        """The files of all ranks."""
        found = {}
        for path in self._folder.glob("*.json"):
            with suppress(OSError):
                found[path.name] = path.read_bytes()
        return found

    def _remove_signs_of_killed(self) -> None:
        """Whoever is alive changes its file within two beats."""
        came, found = self._found
        if found:
            time.sleep(max(0.0, came + 3 * _BEAT_SECONDS - time.monotonic()))
            if self._signs() == found:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _is_of_this_try(self, other: int) -> bool:
        """Whether a file that was there first is of a rank that was quicker, and not of an earlier try."""
        content = self._read(other)
        if self._launch or content.get("launch"):
            return bool(content) and content.get("launch") == self._launch
        with suppress(OSError):  # by the clock of the disk, which both files have
            return self._path(self.rank).stat().st_mtime - self._path(other).stat().st_mtime < _SAME_TRY_SECONDS
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._others:
            if error is None:
                self._remove_signs_of_killed()
            return
        self._stop.set()
        self._thread.join()
        self._state = "failed" if error else "finished"
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._reason = "it was interrupted"
        elif error is not None and not isinstance(error, RankFailed):  # whose reason is another's
            self._reason = " ".join((str(error) or type(error).__name__).split())
        self._beat()
        if all(self._read(other).get("state") in ("finished", "failed") for other in self._others):
            shutil.rmtree(self._folder, ignore_errors=True)

    def advance(self, nbytes: int) -> None:
        """Count bytes that this rank has finished."""
        with self._lock:
            self._done += nbytes

    def check(self) -> None:
        """Stop if another rank has failed.

        Raises:
            RankFailed: one has; the message names it and its reason.
        """
        if self._failure:
            raise RankFailed(self._failure)

    def wait(self, condition: Callable[[], bool], needed: Iterable[int], what: str) -> None:
        """Wait for what other ranks do.

        Args:
            condition: whether it is done.
            needed: the ranks that do it.
            what: what it is, for the message.

        Raises:
            RankFailed: another rank has failed, or one that is needed gives no sign of life.
        """
        needed = [rank for rank in needed if rank != self.rank]
        started, told = time.monotonic(), False
        while not condition():
            self.check()
            missing = [rank for rank in needed if not self._others[rank].content]
            if missing and not told and time.monotonic() - started > _TELL_SECONDS:
                logger.warning("%s waits for rank %s, which has not come: %s", what, missing[0], self._way_out)
                told = True
            for rank in needed:
                if condition():  # its last word may be that it is finished
                    return
                self._require_alive(rank, what)
            time.sleep(_POLL_SECONDS)

    def _require_alive(self, rank: int, what: str) -> None:
        sign = self._others[rank]
        silent = time.monotonic() - sign.changed
        if silent <= self._patience and not (sign.content.get("state") == "finished" and silent > 5 * _BEAT_SECONDS):
            return
        again = "run the same command again, it goes on where it was"
        world = len(self._others) + 1
        if not sign.content:
            reason = self._before.get(rank, {}).get("reason")
            last = f" Its last word, perhaps of an earlier try: {reason}" if reason else ""
            raise RankFailed(
                f"rank {rank} of {world} has not come in {self._patience:.0f} s, and {what} waits for it: "
                f"{self._way_out}{last}"
            )
        if sign.content.get("state") == "finished":
            raise RankFailed(f"rank {rank} ended without {what}; {again}.")
        raise RankFailed(f"rank {rank} of {world} has given no sign of life for {silent:.0f} s; {again}.")

    @property
    def _way_out(self) -> str:
        world = len(self._others) + 1
        return (
            f"start all {world} (RANK and WORLD_SIZE, or Slurm's variables, say there are so many), or give --rank 0 "
            "--world-size 1."
        )

    def watch_progress(self, progress: Callable[[int], None]) -> None:
        """Tell somebody of the bytes that the others have finished, as they do."""
        self._progress = progress

    def settle(self, nbytes: int) -> None:
        """Count all bytes of the others as finished, which the last of their signs need not have said."""
        self._stop.set()
        if self._others:
            self._thread.join()
        if self._progress:
            self._progress(nbytes - self._reported)

    # The thread.

    def _watch(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            self._beat()
            for rank, sign in self._others.items():
                content = self._read(rank)
                if content and content not in (self._before.get(rank), sign.content):
                    sign.content, sign.changed = content, time.monotonic()
                if sign.content.get("state") == "failed" and not self._failure:
                    reason = sign.content.get("reason")
                    self._failure = f"rank {rank} failed: {reason}" if reason else None
            self._report()

    def _report(self) -> None:
        done = sum(int(sign.content.get("done", 0)) for sign in self._others.values())
        if self._progress and done > self._reported:
            self._progress(done - self._reported)
            self._reported = done

    def _beat(self) -> None:
        """Write this rank's file. Where that cannot be done, the others will miss it, which is what they should."""
        self._beats += 1
        content = {
            "attempt": self._attempt,
            "launch": self._launch,
            "beat": self._beats,
            "state": self._state,
            "done": self._done,
            "reason": self._reason,
        }
        path = self._path(self.rank)
        with suppress(OSError):
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(content))
            partial.replace(path)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            content = json.loads(self._path(rank).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"


def _launch() -> str:
    """What tells one start of all ranks from another, as far as their launcher says it; empty where it does not."""
    job, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if elastic != "none":
        return f"{elastic}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    return f"{job}-{step}" if job and step else ""
