# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a run has logged so far, on disk: written line by line while it goes on, read for plots and pages.

`training_log.jsonl` in the output folder has a line for each of these, in the order in which they came about:

    begin       step from which training goes on, 0 or that of a checkpoint; `resumed`; `after`, the number of the
                session that made that checkpoint; `facts`, what is trained on what
    log         what the Trainer logged at a step: loss, learning_rate, grad_norm, eval_loss, ...
    measured    results of texts and tasks, `when`: before the first step or after the last
    end         `status`: done, interrupted or failed; `error`, why

A process that is killed writes no `end`. Sessions are numbered as they begin, from 0. They are a tree: a run may go
back to a checkpoint, and then on from one that an earlier session has made. Lines of steps that the model has not done
stay in the file; [`RunHistory`] tells them from those that count. Numbers that JSON does not have, NaN and infinities,
stand as their names.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft import SFTError

RUN_LOG = "training_log.jsonl"
SAMPLES = "samples.jsonl"
# Batches since the last log whose loss was no finite number, over all processes; logged where there are some.
NONFINITE = "nonfinite_losses"
_STATE = "trainer_state.json"
_WHOLE = "train_runtime"  # is in what is logged in the end, of the run as a whole
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLogError(SFTError):
    """A folder holds no run that can be shown."""


@dataclass
class Session:
    """One start of a run: from its beginning, or from a checkpoint.

    Args:
        start: steps done before.
        began: when, in ISO 8601; empty if nothing says so.
        facts: what is trained on what, see [`sft.training.watch.WatchCallback`].
        logs: what was logged, with `step`; steps that count.
        lost: what was logged of other steps: later sessions went on from a checkpoint before them, or beside them.
        status: `done`, `interrupted` or `failed`; None if no end is recorded: it goes on, or was killed.
        error: why it failed.
        last: when the last line was written.
        resumed: whether it went on from a checkpoint.
        after: number of the session that made that checkpoint, if it is known.
        measured: `before`, `after` -> results.
    """

    start: int = 0
    began: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    status: str | None = None
    error: str = ""
    last: str = ""
    resumed: bool = False
    after: int | None = None
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class RunHistory:
    """A run with all its sessions.

    Args:
        folder: that it was read from.
        sessions: of the run, one at least; attempts before its beginning are not among them.
        earlier: sessions in the same folder before those.
        samples: texts that were generated, of steps that count; see [`sft.training.samples`].
        measured: `before`, `after` -> results, as [`evaluation.measure.describe`] gives them.
        unreadable: lines of the files that are no JSON objects of ours.
        from_state: whether only the Trainer's own state was there, which tells nothing of sessions and data.
        cut: step of the checkpoint that it is shown at, if it is.
    """

    folder: Path
    sessions: list[Session]
    earlier: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: int = 0
    from_state: bool = False
    cut: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Those of the last session."""
        return self.sessions[-1].facts

    @property
    def status(self) -> str | None:
        """That of the last session."""
        return self.sessions[-1].status

    @property
    def step(self) -> int:
        """The last step that anything was logged of; of a checkpoint its own."""
        if self.cut is not None:
            return self.cut
        return max((entry["step"] for entry in self.entries()), default=self.sessions[-1].start)

    def entries(self) -> list[dict[str, Any]]:
        """All that was logged of steps that count."""
        return [entry for session in self.sessions for entry in session.logs]

    def numbers(self) -> list[str]:
        """The names of all numbers that were logged, in the order in which they came about."""
        return list(
            dict.fromkeys(
                name
                for entry in self.entries()
                for name, value in entry.items()
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
            )
        )

    def points(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a number, over all sessions."""
        return points(self.entries(), name)


def points(entries: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and values of a number that was logged."""
    return [
        (entry["step"], float(entry[name]))
        for entry in entries
        if isinstance(entry.get(name), int | float) and not isinstance(entry[name], bool)
    ]


def lost_steps(entries: list[dict[str, Any]], name: str) -> list[int]:
    """The steps at which a number was logged that is not finite; of the loss also those where a filter has hidden it.

    Args:
        entries: what was logged, in order.
        name: `loss`, `eval_loss`, `grad_norm`.
    """
    return [entry["step"] for entry in entries if _is_lost(entry, name)]


def lost_from(entries: list[dict[str, Any]], name: str) -> int | None:
    """The step from which on a number was never finite again; None if it was when it was logged last."""
    first = None
    for entry in reversed(entries):
        if name in entry and not _is_lost(entry, name):
            break
        if _is_lost(entry, name):
            first = entry["step"]
    return first


def _is_lost(entry: Mapping[str, Any], name: str) -> bool:
    value = entry.get(name)
    return (isinstance(value, float) and not math.isfinite(value)) or (name == "loss" and bool(entry.get(NONFINITE)))


# --- writing ----------------------------------------------------------------------------------------------------------


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line of JSON, and mend the file first if a killed process left a part of a line.

    Raises:
        OSError: it cannot be written.
    """
    line = json.dumps(_named(dict(values)), ensure_ascii=True, default=str) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


def append_event(folder: Path, event: str, values: Mapping[str, Any]) -> None:
    """Append a line to the log of the run in a folder, with the time.

    Raises:
        OSError: it cannot be written.
    """
    append_line(folder / RUN_LOG, {"event": event, "time": now(), **values})


def now() -> str:
    """The time, in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _named(value: Any) -> Any:
    """Numbers that JSON does not have as their names."""
    match value:
        case dict():
            return {str(key): _named(item) for key, item in value.items()}
        case list() | tuple():
            return [_named(item) for item in value]
        case float() if not math.isfinite(value):
            return next(name for name, number in _NAMES.items() if repr(number) == repr(value))
    return value


# --- reading ----------------------------------------------------------------------------------------------------------


def read_history(folder: str | Path) -> RunHistory:
    """Read what a run has logged so far.

    Args:
        folder: the output folder of a run, finished, interrupted or going on; or a `checkpoint-N` of one: then what was
            logged up to it. A folder of another Trainer will do if it has a `trainer_state.json`.

    Raises:
        RunLogError: there is nothing of a run.
    """
    place = Path(folder)
    if not place.is_dir():
        raise RunLogError(f"{place}: no such folder; give the output_dir of a run, or a checkpoint-N in it.")
    if (place / RUN_LOG).is_file():
        return _from_log(place)
    state = _find_state(place)
    if state is None:
        raise RunLogError(f"{place}: holds neither {RUN_LOG} nor {_STATE}; give the output_dir of a run.")
    logs, step = _read_state(state)
    folder = state.parent.parent
    if (folder / RUN_LOG).is_file() and state.parent.name.startswith("checkpoint-"):
        maker = find_maker(folder, logs, step)
        if maker is not None:
            return _at_checkpoint(folder, state.parent, maker, step)
    return RunHistory(place, [Session(logs=logs)], from_state=True)


def _find_state(place: Path) -> Path | None:
    """The Trainer's state in a folder, or that of its last checkpoint."""
    steps = {
        int(path.parent.name.removeprefix("checkpoint-")): path
        for path in place.glob(f"checkpoint-*/{_STATE}")
        if path.parent.name.removeprefix("checkpoint-").isdecimal()
    }
    own = place / _STATE
    return own if own.is_file() else steps[max(steps)] if steps else None


def _read_state(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        logs = [_parsed(entry) for entry in state["log_history"] if _is_entry(entry)]
        return logs, int(state["global_step"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunLogError(f"{path}: is no state of a Trainer ({error!r}).") from None


def _is_entry(entry: Any) -> bool:
    step = entry.get("step") if isinstance(entry, dict) else None
    return isinstance(step, int) and not isinstance(step, bool)


def _parsed(value: Any) -> Any:
    """The other way round than [`_named`]; texts that are no names stay."""
    match value:
        case dict():
            return {key: _parsed(item) for key, item in value.items()}
        case str() if value in _NAMES:
            return _NAMES[value]
    return value


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON Lines, and how many lines are none; a last line without its end is left out."""
    found, bad = [], 0
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunLogError(f"{path}: {error.strerror}.") from None
    *whole, _ = content.split(b"\n")  # what has no end yet is being written, or was cut by a kill
    for line in whole:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and _is_entry(value):
            found.append(value)
        else:
            bad += 1
    return found, bad


def _read_sessions(folder: Path) -> tuple[list[Session], int]:
    """All sessions of a log, with all that each has logged, and how many lines are none of ours."""
    lines, bad = _lines(folder / RUN_LOG)
    sessions: list[Session] = []
    for line in lines:
        event, time = line.pop("event", None), str(line.pop("time", ""))
        if event == "begin" or not sessions:
            facts, after = line.get("facts"), line.get("after")
            sessions.append(Session(line["step"], time, facts if isinstance(facts, dict) else {}))
            sessions[-1].resumed = bool(line.get("resumed"))
            sessions[-1].after = after if isinstance(after, int) and not isinstance(after, bool) else None
        session = sessions[-1]
        session.last = time
        if event == "log":
            session.logs.append({name: _parsed(value) for name, value in line.items()})
        elif event == "measured" and isinstance(line.get("results"), dict):
            session.measured[str(line.get("when"))] = line["results"]
        elif event == "end":
            session.status, session.error = str(line.get("status")), str(line.get("error") or "")
        elif event != "begin":
            bad += 1
    return sessions, bad


def _branch(sessions: list[Session], last: int, step: float = math.inf) -> dict[int, float]:
    """The sessions that have made a model: number -> the last step of each that counts, from the first one on.

    Args:
        sessions: all.
        last: number of the one that ended with it.
        step: of the model, if it was not the last of that session.
    """
    branch = {last: step}
    number = last
    while (parent := _parent(sessions, number)) is not None:
        branch[parent] = min(sessions[number].start, branch[number])
        number = parent
    return dict(sorted(branch.items()))


def _parent(sessions: list[Session], number: int) -> int | None:
    """The session that made the checkpoint from which one went on; of a log that does not say, the last that could."""
    session = sessions[number]
    if not session.resumed:
        return None
    after = session.after
    if after is not None and 0 <= after < number and sessions[after].start <= session.start:
        return after
    for earlier in range(number - 1, -1, -1):
        if sessions[earlier].start <= session.start:
            return earlier
        if not sessions[earlier].resumed:
            break
    return None


def _entries(sessions: list[Session], branch: Mapping[int, float]) -> list[dict[str, Any]]:
    return [entry for number, end in branch.items() for entry in sessions[number].logs if entry["step"] <= end]


def find_maker(folder: Path, logs: list[dict[str, Any]], step: int) -> int | None:
    """The number of the session that made a checkpoint; None if the log tells of none, or of other steps than it.

    A checkpoint holds all that was logged of its model, so what a session has logged with those before it up to that
    step has to be the same; but for what a Trainer logs of a run as a whole, which no checkpoint has.

    Args:
        folder: with the log.
        logs: `log_history` of the checkpoint.
        step: of it.
    """
    try:
        sessions, _ = _read_sessions(folder)
    except RunLogError:
        return None
    wanted = _of_steps(logs)
    found = [
        number
        for number, session in enumerate(sessions)
        if session.start <= step and _of_steps(_entries(sessions, _branch(sessions, number, step))) == wanted
    ]
    # One that only began at this step made nothing of it, unless it was the first.
    return max((number for number in found if sessions[number].start < step), default=max(found, default=None))


def _of_steps(entries: list[dict[str, Any]]) -> list[str]:
    """What was logged of steps, in a form in which equal numbers are equal texts."""
    return [json.dumps(_named(entry), sort_keys=True, default=str) for entry in entries if _WHOLE not in entry]


def _from_log(folder: Path) -> RunHistory:
    sessions, bad = _read_sessions(folder)
    if not sessions:
        raise RunLogError(f"{folder / RUN_LOG}: holds nothing of a run yet.")
    branch = _branch(sessions, len(sessions) - 1)
    first = min(branch)
    samples, more = _read_samples(folder / SAMPLES, branch)
    measured = _measured(sessions, branch)
    for number, session in enumerate(sessions[first:], first):
        end = branch.get(number, -math.inf)
        session.lost = [entry for entry in session.logs if entry["step"] > end]
        session.logs = [entry for entry in session.logs if entry["step"] <= end]
    return RunHistory(folder, sessions[first:], first, samples, measured, bad + more)


def _at_checkpoint(folder: Path, checkpoint: Path, maker: int, step: int) -> RunHistory:
    """A run as it was at a checkpoint that one of its sessions made."""
    sessions, bad = _read_sessions(folder)
    branch = _branch(sessions, maker, step)
    samples, more = _read_samples(folder / SAMPLES, branch)
    measured = _measured(sessions, branch)
    measured.pop("after", None)
    for number, end in branch.items():
        sessions[number].logs = [entry for entry in sessions[number].logs if entry["step"] <= end]
    sessions[maker].status, sessions[maker].error = "checkpoint", ""
    history = RunHistory(checkpoint, [sessions[number] for number in branch], min(branch), samples, measured)
    history.unreadable, history.cut = bad + more, step
    return history


def _measured(sessions: list[Session], branch: Mapping[int, float]) -> dict[str, dict[str, Any]]:
    measured: dict[str, dict[str, Any]] = {}
    for number in branch:
        measured.pop("after", None)  # of a run that was done and goes on: it is of another step
        measured |= sessions[number].measured
    return measured


def _read_samples(path: Path, branch: Mapping[int, float]) -> tuple[list[dict[str, Any]], int]:
    """The samples of steps that count, and how many lines are none."""
    if not path.is_file():
        return [], 0
    lines, bad = _lines(path)
    kept = []
    for line in lines:
        number, prompt = line.get("session"), line.get("prompt")
        said = isinstance(line.get("messages"), list) and isinstance(line.get("text"), str)
        if not (isinstance(number, int) and isinstance(prompt, int) and said):
            bad += 1
        elif line["step"] <= branch.get(number, -math.inf):
            kept.append(line)
    return kept, bad


def count_sessions(folder: Path) -> int:
    """How many sessions the log in a folder has; 0 without one."""
    return len(_read_sessions(folder)[0]) if (folder / RUN_LOG).is_file() else 0


__all__ = [
    "NONFINITE",
    "RUN_LOG",
    "SAMPLES",
    "RunHistory",
    "RunLogError",
    "Session",
    "append_event",
    "append_line",
    "count_sessions",
    "find_maker",
    "lost_from",
    "lost_steps",
    "now",
    "points",
    "read_history",
]
