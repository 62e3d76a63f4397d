# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A streamed evaluation that is killed goes on, and what lies between the layers is trusted by its digest alone."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conversion.architecture import Architecture
from conversion.checkpoint.assemble import BLOCK
from conversion.checkpoint.bytes import spread
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.manifest import block_digest, tensor_digest
from conversion.checkpoint.sources import open_checkpoint, source_identity
from conversion.model_identity import TensorDigest, tensor_digests
from evaluation import loaded_scores, measure
from evaluation.held_files import HeldFiles, require_digests
from evaluation.hidden_states import HiddenStates, check_space
from evaluation.measure import evaluate, no_progress
from evaluation.passages import Passage
from evaluation.streamed_model import StreamedModel
from evaluation.streamed_scores import memory_need, score_streamed
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_sentencepiece

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
        states.write(1, 0, np.arange(4, dtype=np.float32), {})
        np.testing.assert_array_equal(states.read(1, 0, np.dtype(np.float32)), np.arange(4))
        (tmp_path / "work/states-1").write_bytes(b"0" * 16)
        with pytest.raises(CorruptData, match="does not hold what was written; remove"):
            states.read(1, 0, np.dtype(np.float32))


def change_unseen(folder: Path) -> None:
    """Other weights of the same size, header and time, and the same at every place that an identity looks at."""
    path = folder / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:begin])
    seen = list(spread(len(content)))
    for name, entry in header.items():
        if "layers." in name and name.endswith("proj.weight"):
            for place in range(begin + entry["data_offsets"][0] + 3, begin + entry["data_offsets"][1], 4):
                if not any(start <= place < start + size for start, size in seen):
                    content[place] ^= 0x80  # the sign of a float32
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def large(tmp_path) -> Path:
    """A model of more bytes than an identity looks at."""
    path = tmp_path / "large"
    tiny_model(tiny_config()).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(tiny_sentencepiece())
    return path


def test_weights_that_were_swapped_between_two_runs(large, tmp_path):
    """With the size, time and samples of the first: no number of either, and the first goes on when it is back."""
    work, kept = tmp_path / "work", (large / "model.safetensors").read_bytes()
    expected, identity = score(large, tmp_path / "other"), source_identity(large / "model.safetensors")
    times = (large / "model.safetensors").stat().st_mtime_ns
    kill(large, work, 5)
    change_unseen(large)
    assert source_identity(large / "model.safetensors") == identity  # the plant is one
    with pytest.raises(CorruptData, match=r"model.safetensors: model.layers.0.* has other values than were computed"):
        score(large, work)
    (large / "model.safetensors").write_bytes(kept)
    os.utime(large / "model.safetensors", ns=(times, times))
    assert all(map(np.array_equal, score(large, work), expected))


@pytest.mark.parametrize("after", [1, 3, 6, 9], ids=lambda after: f"after-{after}")
def test_weights_that_are_swapped_within_a_run(after, large, tmp_path, monkeypatch):
    """Between two groups of a layer, between two layers, and after the last: no number of a mixture is returned."""
    write, count = HiddenStates.write, 0

    def counting(self, *what):
        nonlocal count
        write(self, *what)
        count += 1
        if count == after:
            change_unseen(large)

    monkeypatch.setattr(HiddenStates, "write", counting)
    with pytest.raises(CorruptData, match="has other values than"):
        score(large, tmp_path / "work")


def test_a_swap_is_seen_by_the_time_of_any_change(large, tmp_path, monkeypatch):
    """As of files that are no longer new, which are not read again at the end: unless something touched them."""
    monkeypatch.setattr(HeldFiles, "is_certain", lambda self: True)
    compared: list[object] = []
    monkeypatch.setattr(
        "evaluation.held_files.require_digests", lambda *what, **more: compared.append(require_digests(*what, **more))
    )
    held = HeldFiles.of(open_checkpoint(large))
    score(large, tmp_path / "work")
    assert compared == []
    assert held.touched() is None
    time.sleep(0.02)  # a step of the clock by which file systems note times
    (large / "model.safetensors").chmod(0o600)
    assert held.touched() == str(large / "model.safetensors")
    held.require_same(tensor_digests(open_checkpoint(large).tensors))  # it only was the mode
    assert compared == [None]
    with pytest.raises(CorruptData, match=r"model.safetensors: was written to or replaced, or its mode"):
        held.require_same({})
    change_unseen(large)
    with pytest.raises(CorruptData, match="has other values than were computed with"):
        held.require_same(
            tensor_digests({"model.norm.weight": open_checkpoint(large).tensors["model.norm.weight"]})
            | {"model.layers.1.mlp.up_proj.weight": "0"}
        )


def test_the_digests_are_those_of_the_record(large, tmp_path):
    """Of the values that were computed with, whatever blocks they came in; and so is the identity made of them."""
    digests: dict[str, str] = {}
    checkpoint = open_checkpoint(large)
    score_streamed(checkpoint, PASSAGES, memory=LEAST, work=tmp_path / "w", digests=digests, progress=no_progress)
    assert digests == tensor_digests(checkpoint.tensors)
    values, digest = np.arange(BLOCK + 5, dtype=np.float32), TensorDigest()
    for part in np.split(values, [3, 1000, BLOCK - 1, BLOCK + 2]):
        digest.update(part)
    blocks = [block_digest([part.data.cast("B")]) for part in (values[:BLOCK], values[BLOCK:])]
    assert digest.hexdigest() == tensor_digest(blocks)


def swapped_when(owner: object, name: str, change: Callable[[], None], monkeypatch) -> None:
    """Have something changed just before a function of the measuring is called."""
    call = getattr(owner, name)

    def changing(*arguments, **options):
        change()
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, changing)


@pytest.mark.parametrize("identify", [True, False])
def test_a_loaded_model_that_is_swapped(identify, large, text, monkeypatch):
    """Between its digests and its loading, and after it."""
    time.sleep(0.02)
    swapped_when(loaded_scores, "load_model", lambda: change_unseen(large), monkeypatch)
    with pytest.raises(CorruptData, match=r"other values than were computed with" if identify else "was written to"):
        evaluate(large, texts=[text], loaded=True, identify=identify)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("name", ["tokenizer.model", "config.json"])
def test_what_lies_beside_the_weights_and_is_swapped(name, loaded, large, text, monkeypatch):
    def change() -> None:
        with (large / name).open("ab") as file:
            file.write(b"\n")

    swapped_when(measure, "_score_loaded" if loaded else "score_streamed", change, monkeypatch)
    with pytest.raises(CorruptData, match=f"{name}: was changed while the model was measured"):
        evaluate(large, texts=[text], loaded=loaded, identify=True)


def test_groups_of_a_state_are_of_the_same_weights(tmp_path):
    with HiddenStates(tmp_path / "work", {}, [16, 16], [8, 8], 3) as states:
        states.write(1, 0, np.arange(4, dtype=np.float32), {"a": "0", "b": "1"})
        with pytest.raises(CorruptData, match="b has other values than when another part of the texts was computed"):
            states.write(1, 1, np.arange(4, dtype=np.float32), {"a": "0", "b": "2"})
        assert not states.has(1, 1)


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


def test_a_run_that_was_killed_before_it_had_begun(folder, tmp_path):
    """What it left of the job is in the way of nothing."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/job.json").touch()
    (tmp_path / "work/.job.json-abc").write_text("{")
    assert len(score(folder, tmp_path / "work")) == 3
    assert not (tmp_path / "work").exists()


def test_what_was_computed_stays_until_it_is_kept(folder, text, tmp_path, computed):
    """Where results cannot be written, the same call has only that to do again."""

    def refuse(evaluation: measure.Evaluation) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    with pytest.raises(OSError, match="No space left"):
        evaluate(folder, texts=[text], work=tmp_path / "work", keep=refuse)
    assert set(computed) == {0, 1, 2}
    computed.clear()
    kept: list[measure.Evaluation] = []
    result = evaluate(folder, texts=[text], work=tmp_path / "work", keep=kept.append)
    assert (computed, kept) == ([], [result])
    assert not (tmp_path / "work").exists()
    assert result.texts == evaluate(folder, texts=[text], work=tmp_path / "other").texts


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
