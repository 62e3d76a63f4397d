# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A streamed evaluation that is killed goes on, and what lies between the layers is trusted by its digest alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.sources import open_checkpoint
from evaluation.hidden_states import HiddenStates, check_space
from evaluation.measure import no_progress
from evaluation.passages import Passage
from evaluation.streamed_model import StreamedModel
from evaluation.streamed_scores import memory_need, score_streamed
from tests.fixtures.tiny import tiny_config

ROOT = Path(__file__).parents[2]
PASSAGES = [Passage(np.random.default_rng(seed).integers(0, 640, 41), 40) for seed in range(3)]
LEAST = memory_need(Architecture.from_config(tiny_config().to_dict()), 40, 40, "float32", 0)
WRITES = 9  # three groups after each of three layers

# Runs the same in a process of its own, which kills itself after a number of groups, or amid one.
KILLED = f"""if True:
    import os, signal, sys
    import numpy as np
    from pathlib import Path
    from conversion.checkpoint.sources import open_checkpoint
    from evaluation.measure import no_progress
    from evaluation.hidden_states import HiddenStates
    from evaluation.passages import Passage
    from evaluation.streamed_scores import score_streamed
    passages = [Passage(np.random.default_rng(seed).integers(0, 640, 41), 40) for seed in range(3)]
    write, count = HiddenStates.write, 0
    def counting(self, *what):
        global count
        if count == int(sys.argv[3]):
            if sys.argv[4] == "amid":  # its values are there, and half of its line
                journal, self._journal = self._journal, open(os.devnull, "w")
                write(self, *what)
                journal.write('[1, 2, "0a')
                journal.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        write(self, *what)
    HiddenStates.write = counting
    score_streamed(
        open_checkpoint(sys.argv[1]), passages, memory={LEAST}, work=Path(sys.argv[2]), workers=1, progress=no_progress
    )
"""


def score(folder: Path, work: Path, notes: list[str] | None = None) -> list[np.ndarray]:
    return score_streamed(
        open_checkpoint(folder),
        PASSAGES,
        memory=LEAST,
        work=work,
        workers=1,
        progress=no_progress,
        notify=(notes if notes is not None else []).append,
    )


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The layers that are computed, one entry a group."""
    layers: list[int] = []
    layer = StreamedModel.layer

    def counted(self, number, *arguments):
        layers.append(number)
        return layer(self, number, *arguments)

    monkeypatch.setattr(StreamedModel, "layer", counted)
    return layers


def kill(folder: Path, work: Path, after: int, how: str = "between") -> None:
    command = [sys.executable, "-c", KILLED, folder, work, str(after), how]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize(("after", "how"), [(0, "between"), (4, "amid"), (6, "between"), (8, "amid")])
def test_a_killed_run_goes_on(after, how, folder, tmp_path, computed):
    expected = score(folder, tmp_path / "other")
    assert len(computed) == WRITES
    computed.clear()
    kill(folder, tmp_path / "work", after, how)
    notes: list[str] = []
    found = score(folder, tmp_path / "work", notes)
    assert computed == [0, 0, 0, 1, 1, 1, 2, 2, 2][after:]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert ("where it was interrupted" in notes[0]) is (after > 0)
    assert not (tmp_path / "work").exists()


def test_killed_again_and_again(folder, tmp_path, computed):
    for _ in range(2):
        kill(folder, tmp_path / "work", 2)
    found = score(folder, tmp_path / "work")
    assert computed == [1, 1, 2, 2, 2]
    assert all(map(np.array_equal, found, score(folder, tmp_path / "other")))


@pytest.mark.parametrize(("after", "file"), [(4, "states-1"), (4, "states-0"), (7, "states-0"), (7, "scores")])
def test_states_that_were_damaged_are_computed_again(after, file, folder, tmp_path, computed):
    """A byte of each group is another one: what is left of the last layer does not count, or all begins anew."""
    expected = score(folder, tmp_path / "other")
    work = tmp_path / "work"
    kill(folder, work, after)
    content = bytearray((work / file).read_bytes())
    content[5] ^= 1
    (work / file).write_bytes(content)
    computed.clear()
    found = score(folder, work)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    is_partial = file == {4: "states-0", 7: "scores"}[after]
    assert len(computed) == (WRITES - after + 1 if is_partial else WRITES)


def test_states_that_are_cut_short(folder, tmp_path):
    work = tmp_path / "work"
    kill(folder, work, 5)
    (work / "states-1").write_bytes(b"")
    assert all(map(np.array_equal, score(folder, work), score(folder, tmp_path / "other")))


def test_states_that_change_while_they_are_used(tmp_path):
    with HiddenStates(tmp_path / "work", {}, [16], [8], 3) as states:
        states.write(1, 0, np.arange(4, dtype=np.float32))
        np.testing.assert_array_equal(states.read(1, 0, np.dtype(np.float32)), np.arange(4))
        (tmp_path / "work/states-1").write_bytes(b"0" * 16)
        with pytest.raises(CorruptData, match="does not hold what was written; remove"):
            states.read(1, 0, np.dtype(np.float32))


def test_another_evaluation_is_not_mixed_in(folder, tmp_path):
    work = tmp_path / "work"
    kill(folder, work, 5)
    with pytest.raises(CheckpointError, match=r"holds the states of another evaluation \(.*passages.* differ\)"):
        score_streamed(open_checkpoint(folder), PASSAGES[:2], memory=LEAST, work=work, progress=no_progress)
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_bytes())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match="architecture"):
        score(changed, work)
    assert len(score(folder, work)) == 3  # the first one goes on


def test_a_folder_of_somebody_else(folder, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt, and no evaluation; give another --work"):
        score(folder, work)
    assert [entry.name for entry in work.iterdir()] == ["notes.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        score(folder, tmp_path / "file")


def test_two_at_once(folder, tmp_path):
    with (
        HiddenStates(tmp_path / "work", {}, [], [], 3),
        pytest.raises(CheckpointError, match="another process computes"),
    ):
        score(folder, tmp_path / "work")


def test_a_disk_that_is_too_small(tmp_path):
    with pytest.raises(CheckpointError, match=r"the hidden states take 1152921504606846976 bytes, and \d+ are free"):
        check_space(tmp_path / "not/there/yet", 2**60)


def test_the_default_place_is_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes: list[str] = []
    score_streamed(open_checkpoint(folder), PASSAGES, progress=no_progress, notify=notes.append)
    assert f"{tmp_path}/cache/teleflm/eval-" in notes[0]
    assert os.listdir(tmp_path / "cache/teleflm") == []
