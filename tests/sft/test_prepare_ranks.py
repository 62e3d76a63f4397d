# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`sft prepare` by several processes, or by one that was killed: the same bytes."""

import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sft.data import labels, locks
from sft.data import prepare as module
from sft.data.dataset import prepare_dataset
from sft.data.labels import DataError, Labelling
from sft.data.prepare import prepare
from tests.fixtures.tiny import tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, chat, write

ROOT = Path(__file__).parents[2]
LABELLING = Labelling(max_length=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "_PART_ROWS", 7)


@pytest.fixture(autouse=True)
def one_template_at_a_time(monkeypatch):
    """Ranks are threads here, and transformers' cached template is not for several; those of processes are apart."""
    tokenize, lock = labels.tokenize, threading.Lock()

    def alone(*args):
        with lock:
            return tokenize(*args)

    monkeypatch.setattr(labels, "tokenize", alone)


@pytest.fixture
def rows_file(conversations, tmp_path):
    """Invalid rows, a repeated id whose first is in another part, and weights in one part alone."""
    rows = [{**row, "id": index} for index, row in enumerate(conversations)]
    rows[3], rows[40] = {}, {**rows[40], "id": 1}
    rows[20] = chat(ASK, ANSWER, ASK, ANSWER, weights={1: 0.5})
    return write(tmp_path / "data.jsonl", rows)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def prepare_together(world, data, out, tokenizer, **settings):
    def one(rank):
        return prepare(data, out, tokenizer, LABELLING, rank=rank, world_size=world, **settings)

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
        return [future.exception() or future.result() for future in futures]


def test_the_bytes_do_not_depend_on_how_many_share_the_work(rows_file, tokenizer, tmp_path):
    for world in (1, 2, 5, 9):
        (first, *others) = prepare_together(world, rows_file, tmp_path / f"out{world}", tokenizer, allow_rejects=True)
        assert others == [first] * (world - 1)
        assert contents(tmp_path / f"out{world}") == contents(tmp_path / "out1")
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out1", "out2", "out5", "out9"}
    opened, report = prepare_dataset(tmp_path / "out5", tokenizer, max_length=64)
    fresh, fresh_report = prepare_dataset(rows_file, tokenizer, max_length=64, allow_rejects=True)
    assert opened[:] == fresh[:]
    assert report == fresh_report
    assert [reject.reason for reject in report.rejects] == ["missing_columns", "duplicate_id"]


def test_large_folders_are_in_several_files(rows_file, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 4000)
    prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert len([*(tmp_path / "out").glob("data-*")]) > 2
    opened, _ = prepare_dataset(tmp_path / "out", tokenizer, max_length=64)
    assert opened[:] == prepare_dataset(rows_file, tokenizer, max_length=64, allow_rejects=True)[0][:]


KILLED = """
import os, sys
from pathlib import Path
from sft.data import prepare as module
from sft.data.labels import Labelling
from tests.fixtures.tiny import tiny_tokenizer
module._PART_ROWS = 7
write, written = module._write_part, []
def write_part(*args):
    if len(written) == 4:
        os.kill(os.getpid(), 9)
    written.append(write(*args))
module._write_part = write_part
data, out, tokenizer = map(Path, sys.argv[1:])
module.prepare(data, out, tiny_tokenizer(tokenizer), Labelling(max_length=64), allow_rejects=True)
"""


@pytest.mark.slow
def test_one_that_was_killed_goes_on_and_makes_damaged_parts_again(rows_file, tokenizer, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(rows_file), str(tmp_path / "out"), str(tmp_path / "tokenizer")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    (parts,) = tmp_path.glob(".out.*.parts")
    assert not (tmp_path / "out").exists()
    assert len([*parts.glob("part-*.json")]) == 4
    damaged = parts / "part-000002.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (parts / "part-000004.arrow").write_bytes(b"half of one")
    written, write_part = [], module._write_part
    monkeypatch.setattr(module, "_write_part", lambda *args: written.append(args[1]) or write_part(*args))
    prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert written == [2, 4, 5, 6]
    assert [*tmp_path.glob(".*")] == [], "neither parts nor the lock of the one that was killed"
    prepare(rows_file, tmp_path / "whole", tokenizer, LABELLING, allow_rejects=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_rank_that_comes_late_finds_all_done(rows_file, tokenizer, tmp_path, monkeypatch):
    """It looked before the others were there, and they are gone: it waits for nobody."""
    prepare(rows_file, tmp_path / "whole", tokenizer, LABELLING, allow_rejects=True)
    enter = module.Ranks.__enter__

    def late(ranks):
        (tmp_path / "whole").rename(tmp_path / "out")
        return enter(ranks)

    monkeypatch.setattr(module.Ranks, "__enter__", late)
    monkeypatch.setattr(module, "_PATIENCE", 1.0)
    made = prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True, rank=1, world_size=2)
    assert made.report.rows == 48


def test_one_process_removes_what_killed_ranks_have_left(rows_file, tokenizer, tmp_path):
    content = module.read_content((str(rows_file),))
    job = module.describe_job(content, tokenizer, LABELLING)
    ranks = tmp_path / f".out.{job[:16]}.ranks"
    ranks.mkdir()
    for rank in range(2):
        (ranks / f"{rank}.json").write_text(json.dumps({"attempt": "1-2", "beat": 7, "state": "working"}))
    prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert not ranks.exists()


def test_parts_of_other_data_are_not_gone_on_with(rows_file, conversations, tokenizer, tmp_path, monkeypatch):
    write_part = module._write_part

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_part", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(rows_file, tmp_path / "out", tokenizer, LABELLING)
    (left,) = tmp_path.glob(".out.*.parts")
    (tmp_path / ".out.of.others.parts").mkdir()
    (tmp_path / ".out.0123456789abcdef.parts").mkdir()
    (tmp_path / ".out.0123456789abcdef.parts" / "mine").write_text("")
    monkeypatch.setattr(module, "_write_part", write_part)
    other = write(tmp_path / "other.jsonl", conversations)
    prepare(other, tmp_path / "out", tokenizer, LABELLING)
    assert prepare_dataset(tmp_path / "out", tokenizer, max_length=64)[1].rows == 48
    assert not left.exists(), "of a job that was killed"
    assert len([*tmp_path.glob(".out.*.parts")]) == 2, "what is not ours stays"
    place = left.with_name(left.name.replace(".out.", ".new."))
    place.mkdir()
    (place / "mine").write_text("")
    with pytest.raises(DataError, match=r"\.parts is where parts are written, and it holds something else"):
        prepare(rows_file, tmp_path / "new", tokenizer, LABELLING)
    assert (place / "mine").exists()


@pytest.fixture
def quick_locks(monkeypatch):
    monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.02)


def meanwhile(monkeypatch, act):
    """Do something once, after the second part was written."""
    write_part, acted = module._write_part, []

    def write_and_act(folder, number, *args):
        write_part(folder, number, *args)
        if number == 1 and not acted:
            acted.append(1)
            act(folder)

    monkeypatch.setattr(module, "_write_part", write_and_act)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("same", [False, True], ids=["other data", "same data"])
def test_two_commands_do_not_write_one_folder(
    same, world, rows_file, conversations, tokenizer, tmp_path, monkeypatch, quick_locks
):
    """The second is refused while the first works, and what is there in the end is the first's, whole."""
    other = rows_file if same else write(tmp_path / "other.jsonl", conversations[::-1])
    refused = []

    def second(folder):
        with pytest.raises(DataError) as found:
            prepare(other, tmp_path / "out", tokenizer, LABELLING, overwrite=True, world_size=world)
        refused.append(str(found.value))

    meanwhile(monkeypatch, second)
    prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert refused == [
        f"{tmp_path}/out is being written by process {os.getpid()} on {socket.gethostname()}; wait until it ends, or "
        "choose another folder."
    ]
    prepare(rows_file, tmp_path / "whole", tokenizer, LABELLING, allow_rejects=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("same", [False, True], ids=["other data", "same data"])
def test_a_command_that_was_paused_does_not_replace_what_another_has_made(
    same, rows_file, conversations, tokenizer, tmp_path, monkeypatch
):
    """It counted as dead; its lock, its parts and the folder are the other's."""
    other = rows_file if same else write(tmp_path / "other.jsonl", conversations[::-1])

    def second(folder):
        (tmp_path / ".out.lock").write_text("")
        prepare(other, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)

    monkeypatch.setattr(module, "_LOCK_PATIENCE", 0.1)
    meanwhile(monkeypatch, second)
    with pytest.raises(DataError, match=r"out: another command has begun to write it, since this one gave no sign"):
        prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True, overwrite=True)
    prepare(other, tmp_path / "whole", tokenizer, LABELLING, allow_rejects=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_of_another_job_is_not_joined(rows_file, tokenizer, tmp_path, monkeypatch):
    """However it came there: each says whose it is."""

    def of_another(folder):
        record = folder / "part-000000.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "job": "0" * 32}))

    meanwhile(monkeypatch, of_another)
    with pytest.raises(DataError, match=r"part-000000\.json: is of another job than this one; run it again"):
        prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_part_of_another_job_is_made_again(rows_file, tokenizer, tmp_path, monkeypatch):
    def of_another_and_killed(folder):
        record = folder / "part-000000.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "job": "0" * 32}))
        raise KeyboardInterrupt

    with monkeypatch.context() as change:
        meanwhile(change, of_another_and_killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    written, write_part = [], module._write_part
    monkeypatch.setattr(module, "_write_part", lambda *args: written.append(args[1]) or write_part(*args))
    prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert written == [0, 2, 3, 4, 5, 6]


def test_if_one_fails_all_do_with_its_words(rows_file, tokenizer, tmp_path):
    first, *others = prepare_together(3, rows_file, tmp_path / "out", tokenizer)
    assert str(first).startswith("2 invalid rows (1 missing_columns, 1 duplicate_id): ")
    assert [str(other) for other in others] == [f"rank 0 failed: {first}"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_a_full_disk_says_how_much_it_takes_and_what_was_done_stays(rows_file, tokenizer, tmp_path, monkeypatch):
    write_part, written = module._write_part, []

    def fill(*args):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(write_part(*args))

    monkeypatch.setattr(module, "_write_part", fill)
    with pytest.raises(
        DataError, match=r"No space left on device after [\d,]+ bytes of the tokens of \d+ rows.*larger"
    ):
        prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    monkeypatch.setattr(module, "_write_part", lambda *args: written.append(1) or write_part(*args))
    prepare(rows_file, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True)
    assert len(written) == 7


@pytest.mark.slow
def test_the_launcher_says_who_is_who(data_file, model_dir, tmp_path):
    options = ["--model", str(model_dir), "--max-length", "64"]
    teleflm = [sys.executable, "-m", "teleflm", "sft", "prepare", str(data_file), str(tmp_path / "out"), *options]
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen(teleflm, env=environment, **pipes) for environment in environments]
    (out, first), (silent, second) = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], first + second
    assert out.startswith(f"{tmp_path}/out: 48 of 48 rows")
    assert silent == ""
    assert json.loads((tmp_path / "out" / module.PREPARED).read_text())["report"]["rows"] == 48
