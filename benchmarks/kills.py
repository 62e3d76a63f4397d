# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Runs that are killed at random instants and started again: the output has to be that of a whole run, byte by byte."""

import hashlib
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import ROOT, run_processes

_KILLS_A_RUN = 4  # before one of them is let go on to its end


@dataclass(frozen=True)
class Outcome:
    """How many runs were killed before they were done, and how many outputs were not those of a whole run."""

    kills: int
    finished: int
    wrong: int


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def kill_and_resume(
    command: Sequence[str], out: Path, kills: int, whole_seconds: float, expected: Mapping[str, str]
) -> Outcome:
    """Start a command, kill it at a random instant, start it again; every few kills it goes on to its end.

    Args:
        command: writes the folder `out`, or resumes what a killed run of it left there.
        out: is removed each time it was finished and looked at.
        kills: how many.
        whole_seconds: what a run takes.
        expected: the `digests` of a run that was not killed.
    """
    struck = finished = wrong = 0
    since = 0  # the last run that was finished
    while struck < kills:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.2, whole_seconds))
        process.send_signal(signal.SIGKILL)
        is_struck = process.wait() == -signal.SIGKILL
        struck, since = struck + is_struck, since + is_struck
        if since == _KILLS_A_RUN or not is_struck or struck == kills:
            run_processes(command)
            finished, wrong, since = finished + 1, wrong + (digests(out) != expected), 0
            subprocess.run(["rm", "-r", str(out)], check=True)
    return Outcome(struck, finished, wrong)


def said_of_kills(outcome: Outcome) -> str:
    """A sentence for the results."""
    return (
        f"{outcome.kills} runs were killed at random instants and started again, {outcome.finished} of these to their "
        f"ends; {outcome.wrong} outputs were not those of a whole run, byte by byte."
    )
