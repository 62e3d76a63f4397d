# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One run at a time in an output folder, whatever became of the one before."""

import errno
import fcntl
import fnmatch
import inspect
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from transformers import Trainer

from conversion import convert_checkpoint
from conversion.hub.release import find_release
from growth.training.errors import RunError
from growth.training.output_lock import LOCK, hold_output
from tests.fixtures.tiny import tiny_model

# Not this module's code: what any process does that has a lock on the file.
HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, b'{"pid": 4711, "host": "node-3"}')
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_even_if_it_was_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / LOCK], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=r"process 4711 on node-3 trains into it.* give another output_dir") as error,
            hold_output(tmp_path, writes=True),
        ):
            pass
        assert "\n" not in str(error.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / LOCK).exists()
        with hold_output(tmp_path, writes=True):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert not (tmp_path / LOCK).exists()


def test_it_is_held_to_the_end_and_by_process_0_alone(tmp_path):
    with hold_output(tmp_path, writes=True):
        with hold_output(tmp_path, writes=False):
            pass
        with pytest.raises(RunError, match=f"process {os.getpid()} on "), hold_output(tmp_path, writes=True):
            pass
    with hold_output(tmp_path, writes=True):
        pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Between its opening and its locking the run that has the file ends, and a third one begins."""
    first, third = ExitStack(), ExitStack()
    first.enter_context(hold_output(tmp_path, writes=True))
    real = fcntl.flock

    def others_first(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", real)
        first.close()
        third.enter_context(hold_output(tmp_path, writes=True))
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", others_first)
    with third, pytest.raises(RunError, match="trains into it"), hold_output(tmp_path, writes=True):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def none_here(descriptor, how):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", none_here)
    with hold_output(tmp_path / "out", writes=True):
        assert list((tmp_path / "out").iterdir()) == []
    assert "out cannot be locked (Operation not supported): nothing keeps a second run" in caplog.text


def test_a_folder_of_a_refused_run_is_not_left_behind(tmp_path):
    with hold_output(tmp_path / "out", writes=True):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match="file/out cannot be written: Not a directory"),
        hold_output(tmp_path / "file" / "out", writes=True),
    ):
        pass


def test_the_lock_is_never_published(tmp_path):
    """It names this host: `publish` takes what is on its list, and a Trainer nothing that begins as this does."""
    tiny_model().save_pretrained(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "run")
    with hold_output(tmp_path / "run", writes=True):
        assert (tmp_path / "run" / LOCK).is_file()
        release = find_release(tmp_path / "run")
        assert LOCK not in release.files
        assert release.left_out == [LOCK]
    pushed = inspect.getsource(Trainer.push_to_hub) + inspect.getsource(Trainer._push_from_checkpoint)
    assert pushed.count('ignore_patterns=["_*"') == 2
    assert fnmatch.fnmatch(LOCK, "_*")
