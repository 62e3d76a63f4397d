# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One makes an entry, whoever dies; no other takes half of one for whole, and nobody waits for the dead."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sft.data import cache as cache_module
from sft.data import locks
from sft.data.cache import Cache, CacheError, default_folder
from sft.data.formats import DataError, UnreadableError
from sft.data.prepare import is_prepared, open_sealed, seal

ROOT = Path(__file__).parents[2]
# A process that asks for the entry `key`, and notes in the file `made` that it makes it. `how` is done while it does.
WORKER = """
import os, sys, time
from pathlib import Path
from sft.data.cache import Cache
from sft.data.formats import DataError
folder, how = Path(sys.argv[1]), sys.argv[2]
def build(entry):
    (entry / "half").write_text("half")
    with open(folder / "made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    exec(how)
    (entry / "content").write_text("all")
try:
    print(Cache(folder / "cache").get("key", build, lambda entry: (entry / "content").read_text()))
except DataError as error:
    sys.exit(f"error: {error}")
"""


def start(folder, how):
    command = [sys.executable, "-c", WORKER, str(folder), how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, what=Path.exists, seconds=30):
    end = time.monotonic() + seconds
    while not what(path):
        assert time.monotonic() < end, path
        time.sleep(0.02)


def read(entry):
    return (entry / "content").read_text()


def write(entry):
    (entry / "content").write_text("all")


def never(entry):
    raise AssertionError("it is there")


def test_one_of_many_makes_it(tmp_path):
    workers = [start(tmp_path, "time.sleep(1)") for _ in range(4)]
    assert [worker.communicate()[0].strip() for worker in workers] == ["all"] * 4
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"], "no lock and nothing partial stays"
    before = [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")]
    assert Cache(tmp_path / "cache").get("key", never, read) == "all"
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")] == before, (
        "opening needs no right to write"
    )


def test_those_who_wait_fail_with_the_words_of_who_failed(tmp_path):
    first = start(tmp_path, "time.sleep(2); raise DataError('row 7 is bad')")
    wait_for(tmp_path / "made")
    others = [start(tmp_path, "raise AssertionError") for _ in range(2)]
    ends = [worker.communicate()[1].strip() for worker in (first, *others)]
    assert ends == ["error: row 7 is bad"] * 3
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert Cache(tmp_path / "cache").get("key", write, read) == "all", "a later run tries again"


def test_any_error_of_who_makes_it_ends_the_others(tmp_path):
    first = start(tmp_path, "time.sleep(2); 1 / 0")
    wait_for(tmp_path / "made")
    other = start(tmp_path, "raise AssertionError")
    assert "ZeroDivisionError" in first.communicate()[1]
    (line,) = other.communicate()[1].splitlines()
    assert line.startswith("error: ")
    assert "ZeroDivisionError: division by zero" in line


def test_a_process_that_is_killed_leaves_nothing_that_counts(tmp_path):
    first = start(tmp_path, "time.sleep(60)")
    wait_for(tmp_path / "made")
    second = start(tmp_path, "pass")
    time.sleep(0.5)
    first.kill()
    killed = time.monotonic()
    assert second.communicate()[0].strip() == "all"
    assert time.monotonic() - killed < 20, "not after the patience for other machines, of a minute"
    first.communicate()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"owner": "x", "host": "elsewhere", "pid": 1, "system": "other"}'])
def test_a_lock_that_never_changes_is_taken_over(content, tmp_path):
    (tmp_path / ".key.lock").write_text(content)
    assert Cache(tmp_path, patience=0.5).get("key", write, read) == "all"


def gone_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_of_many_that_find_the_lock_of_a_killed_one_none_ends_another(tmp_path, monkeypatch):
    """They start together, as the ranks of a run that is started again do."""
    monkeypatch.setattr(cache_module, "_POLL_SECONDS", 0.01)
    dead = json.loads(locks.Lock(tmp_path / "x")._content()) | {"owner": "dead", "pid": gone_process()}
    for number in range(5):
        folder, barrier = tmp_path / str(number), threading.Barrier(8)
        folder.mkdir()
        (folder / ".key.lock").write_text(json.dumps(dead))

        def build(entry):
            for part in range(5):
                time.sleep(0.01)
                (entry / f"part{part}").write_text("")
            write(entry)

        def get(folder=folder, barrier=barrier, build=build):
            barrier.wait()
            return Cache(folder).get("key", build, read)

        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(get) for _ in range(8)]
            assert [one.result() for one in found] == ["all"] * 8
        assert [path.name for path in folder.iterdir()] == ["key"]


def test_the_lock_of_who_was_quicker_is_put_back(tmp_path, monkeypatch):
    """Between the last look at a lock that was left behind and its removal, another process has taken it over."""
    path, read_lock, looked = tmp_path / ".key.lock", locks.read_lock, []
    path.write_bytes(b"of the dead")

    def look(place):
        content = read_lock(place)
        if not looked:
            path.write_bytes(b"of a live one")
        looked.append(place)
        return content

    monkeypatch.setattr(locks, "read_lock", look)
    locks.take_over(path, b"of the dead")
    assert path.read_bytes() == b"of a live one"
    assert [*tmp_path.iterdir()] == [path]
    locks.take_over(path, b"of the dead")
    assert path.read_bytes() == b"of a live one", "nor is one that has changed touched"
    locks.take_over(path, b"of a live one")
    assert [*tmp_path.iterdir()] == []


def test_a_lock_that_was_put_back_goes_on_changing(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.01)
    with locks.Lock.acquire(tmp_path / "lock") as lock:
        (tmp_path / "lock").rename(tmp_path / "aside")
        time.sleep(0.1)
        assert not (tmp_path / "lock").exists(), "another may take it meanwhile"
        (tmp_path / "aside").rename(tmp_path / "lock")
        assert lock.is_mine()
        before = (tmp_path / "lock").read_bytes()
        wait_for(tmp_path / "lock", lambda path: locks.read_lock(path) != before)
    assert not (tmp_path / "lock").exists()


def test_only_what_the_dead_have_half_made_is_removed(tmp_path):
    """Of a process of another machine that is known after an hour without a change."""
    name = locks.Lock(tmp_path / "x").owner
    tag, _, rest = name.split("-")
    live, dead = f".key.{name}.partial", f".other.{tag}-{gone_process()}-{rest}.partial"
    far, old = (f".key.{name.replace(tag, '0' * 8).replace(rest, letter * 32)}.partial" for letter in "ab")
    for folder in (live, dead, far, old):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "half").write_text("")
    (tmp_path / ".mine.partial").write_text("of nobody here")
    for folder in (live, old, ".mine.partial"):
        os.utime(tmp_path / folder, (0, 0))
    assert Cache(tmp_path).get("key", write, read) == "all"
    assert {path.name for path in tmp_path.iterdir()} == {"key", live, far, ".mine.partial"}


def test_who_makes_it_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.01)

    def build(entry):
        os.utime(entry, (0, 0))
        wait_for(entry, lambda path: path.stat().st_mtime > 0)
        write(entry)

    assert Cache(tmp_path).get("key", build, read) == "all"


def test_what_is_half_made_and_removed_is_made_again(tmp_path):
    """Nobody is told of a failure: it is none."""
    made = []

    def build(entry):
        made.append(entry)
        if len(made) == 1:
            shutil.rmtree(entry)
        write(entry)

    assert Cache(tmp_path).get("key", build, read) == "all"
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.slow
def test_a_lock_that_changes_is_waited_for(tmp_path):
    """As long as it takes: eight times the patience here."""
    worker = start(tmp_path, "time.sleep(8)")
    wait_for(tmp_path / "made")
    assert Cache(tmp_path / "cache", patience=2.5).get("key", never, read) == "all"
    worker.communicate()


def test_a_paused_process_that_was_taken_for_dead_finds_the_entry(tmp_path):
    cache = Cache(tmp_path, patience=0.5)

    def paused(entry):
        write(entry)
        lock = json.loads((tmp_path / ".key.lock").read_text())
        (tmp_path / ".key.lock").write_text(json.dumps({**lock, "owner": "another"}))
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "content").write_text("of the other")

    assert cache.get("key", paused, read) == "of the other"
    assert json.loads((tmp_path / ".key.lock").read_text())["owner"] == "another", "its lock is not ours to remove"


def test_what_is_damaged_is_made_again(tmp_path, caplog):
    cache, opened = Cache(tmp_path), []

    def open_entry(entry):
        opened.append(read(entry))
        if opened[-1] != "all":
            raise DataError(f"{entry}: is damaged.")
        return opened[-1]

    cache.get("key", write, open_entry)
    (tmp_path / "key" / "content").write_text("other")
    assert cache.get("key", write, open_entry) == "all"
    assert "key: is damaged. It is made again." in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("closed", ["", "record", "content"])
def test_an_entry_that_may_not_be_read_is_neither_damaged_nor_moved(closed):
    """As another user's whose umask is 077."""
    datasets = pytest.importorskip("datasets")
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users

        def build(entry):
            datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(entry))
            (entry / "content").write_text("all")
            seal(entry, "record", {})

        def open_entry(entry):
            return open_sealed(entry, "record", "make it again")[0][:]

        Path(place).chmod(0o777)
        cache = Cache(Path(place) / "cache")
        assert cache.get("key", build, open_entry) == {"a": [1]}
        (Path(place) / "cache").chmod(0o777)
        entry = Path(place) / "cache" / "key"
        (entry / closed).chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(CacheError, match=r"/key\S*: Permission denied\. Ask .*chmod -R a\+rX \S+/key"):
                cache.get("key", never, open_entry)
        finally:
            if root:
                os.seteuid(0)
            (entry / closed).chmod(0o755)
        assert [path.name for path in (Path(place) / "cache").iterdir()] == ["key"]
        assert cache.get("key", never, open_entry) == {"a": [1]}


def test_data_that_may_not_be_entered_are_named():
    """By the place as it was given, before anything else is asked of it."""
    with tempfile.TemporaryDirectory() as place:
        closed = Path(place) / "prepared"
        closed.mkdir()
        Path(place).chmod(0o755)
        closed.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(UnreadableError, match=r"/prepared: Permission denied\.$"):
                is_prepared(closed)
        finally:
            if root:
                os.seteuid(0)
            closed.chmod(0o755)
        assert not is_prepared(closed)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"dataset_cache_dir .*file/cache cannot be written \(Not a directory\); give"):
        Cache(tmp_path / "file" / "cache").get("key", write, read)


def test_it_is_where_datasets_keeps_its_own(tmp_path):
    command = [sys.executable, "-c", "from sft.data.cache import default_folder; print(default_folder())"]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    environment.pop("HF_DATASETS_CACHE", None)
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == f"{tmp_path}/datasets/teleflm"
    assert default_folder().name == "teleflm"
