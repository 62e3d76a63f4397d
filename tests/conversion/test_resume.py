# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Killed at any instant, the same call finishes the job; nothing loads before it is complete."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conversion.checkpoint import execute
from conversion.checkpoint.assemble import stream
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.folder_formats import loadable_files
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.plan import CheckpointPlan
from conversion.checkpoint.preflight import FOLDER, PARTIAL
from conversion.checkpoint.sources import WEIGHT_FILES
from tests.fixtures import checkpoint_runs as runs
from tests.fixtures.checkpoint_runs import SHARD_BYTES, Instant, contents, finish, make_sources, torch_folder, write

SHAPES = {
    "one file": {"max_shard_size": 10**9},
    "shards": {"max_shard_size": SHARD_BYTES},
    "torch folder": {"torch_folder": True},
    "distributed folder": {"distributed_folder": True},
    "iteration folder": {"iteration_folder": True},
    "GGUF files": {"gguf_folder": True},
}

# The instants that matter most: (call, moment). Every one that a run goes through is tried, at a random repetition.
DELICATE = [
    ("mkdir .teleflm", "after"),
    ("write run.json.partial", "within"),
    ("rename run.json.partial", "after"),
    ("posix_fallocate shard.partial", "after"),
    ("pwrite shard.partial", "within"),
    ("copy_file_range shard.partial", "within"),
    ("write shard.journal", "within"),
    ("write shard.journal", "after"),
    ("fsync shard.partial", "before"),
    ("fsync shard.partial", "after"),
    ("write shard.done.partial", "within"),
    ("rename shard.done.partial", "before"),
    ("rename shard.done.partial", "after"),
    ("unlink shard.journal", "after"),
    ("write teleflm_manifest.json.partial", "within"),
    ("fsync teleflm_manifest.json.partial", "before"),
    ("rename teleflm_manifest.json.partial", "after"),
    ("rename shard.partial", "before"),
    ("rename shard.partial", "after"),
    ("write shard.index.json.partial", "within"),
    ("rename shard.index.json.partial", "before"),
    ("rename shard.index.json.partial", "after"),
    ("unlink run.json", "after"),
    ("rmdir .teleflm", "before"),
]
GGUF_FIRST = "model-00001-of-00006.gguf"  # by which a loader finds the others
INSTANTS = 20  # for each shape, with and without digests


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


@pytest.fixture
def small_blocks(monkeypatch):
    """In this process, what the others do by themselves."""
    monkeypatch.setattr(runs.assemble, "BLOCK", runs.assemble.BLOCK)
    monkeypatch.setattr(runs.assemble, "draw_words", runs.assemble.draw_words)
    monkeypatch.setattr(runs.kernel_copy, "PAGE", runs.kernel_copy.PAGE)
    runs.use_small_blocks()


def instants_of(trace: Path) -> list[Instant]:
    """In an order that does not depend on the threads."""
    fields = sorted(line.rsplit(" ", 2) for line in trace.read_text().splitlines())
    return [Instant(call, int(number), moment) for call, number, moment in fields]


def choose(instants: list[Instant], absent: set[str], rng: random.Random) -> list[Instant]:
    """Each delicate instant once, then any."""
    delicate = [[i for i in instants if (i.call, i.moment) == wanted] for wanted in DELICATE]
    assert {call for (call, _), found in zip(DELICATE, delicate, strict=True) if not found} == absent
    chosen = [rng.choice(found) for found in delicate if found]
    return chosen + rng.sample(instants, max(0, INSTANTS - len(chosen)))


def assert_nothing_loads_unless_complete(out: Path, finished: dict[str, bytes], where: object) -> None:
    found = contents(out)
    if any(name in (*loadable_files(), GGUF_FIRST) for name in found):
        assert {name: data for name, data in found.items() if not name.startswith(FOLDER)} == finished, where


@pytest.mark.parametrize("digest", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["digests", "no digests"])
@pytest.mark.parametrize("shape", SHAPES)
def test_killed_and_resumed(shape, digest, sources, tmp_path):
    rng = random.Random(f"{shape}, {digest}")
    options = {**SHAPES[shape], "digest": digest, "workers": 2}
    started = time.monotonic()
    assert finish(write(sources, tmp_path / "out", options, trace=tmp_path / "trace")) == 0
    seconds = time.monotonic() - started
    whole = contents(tmp_path / "out")
    absent = {"copy_file_range shard.partial"} if digest else {call for call, _ in DELICATE if "journal" in call}
    absent |= {call for call, _ in DELICATE if "index" in call} if shape in ("one file", "GGUF files") else set()
    for number, instant in enumerate(choose(instants_of(tmp_path / "trace"), absent, rng)):
        out = tmp_path / f"{number}/out"
        out.parent.mkdir()
        assert finish(write(sources, out, options, kill_at=instant)) == -signal.SIGKILL, instant
        assert_nothing_loads_unless_complete(out, whole, instant)
        if number % 3 == 0:  # and again, from outside, at any time
            again = write(sources, out, options)
            time.sleep(rng.uniform(0, seconds))
            again.kill()
            assert finish(again) in (0, -signal.SIGKILL)
            assert_nothing_loads_unless_complete(out, whole, instant)
        assert finish(write(sources, out, options)) == 0, instant
        assert contents(out) == whole, instant


# What is taken for done. Here a run is interrupted in this process, by an error after some of its blocks.


class Interruption(Exception):
    pass


def interrupt(plan: CheckpointPlan, out: Path, after: int = 15, **options) -> None:
    """Write until so many blocks are done."""
    calls = itertools.count()

    def progress(nbytes: int, total: int) -> None:
        if next(calls) == after:
            raise Interruption

    with pytest.raises(Interruption):
        write_checkpoint(plan, out, WriteOptions(workers=1, progress=progress, **options))


def raise_interruption(nbytes: int, total: int) -> None:
    raise Interruption


@pytest.fixture
def plan(sources, small_blocks) -> CheckpointPlan:
    return runs.mixed_plan(sources)


@pytest.fixture
def elements_made(monkeypatch) -> list[int]:
    """Number of elements of each block that is made from now on."""
    made: list[int] = []

    def counted(tensor, start, stop, **rest):
        made.append(stop - start)
        yield from stream(tensor, start, stop, **rest)

    monkeypatch.setattr(execute, "stream", counted)
    return made


@pytest.fixture
def whole(plan, tmp_path) -> dict[str, bytes]:
    write_checkpoint(plan, tmp_path / "whole", WriteOptions())
    return contents(tmp_path / "whole")


def journal_of(out: Path) -> Path:
    (path,) = (out / FOLDER).glob("*.journal")
    return path


def zero_a_block(out: Path) -> None:
    overwrite_byte_range(out, 4000, bytes(500))


def flip_a_bit(out: Path) -> None:
    data = (out / "model.safetensors.partial").read_bytes()
    overwrite_byte_range(out, 5000, bytes([data[5000] ^ 1]))


def overwrite_byte_range(out: Path, at: int, data: bytes) -> None:
    path = out / "model.safetensors.partial"
    before = path.read_bytes()
    assert any(before[at : at + 100]), "the run did not come that far"
    path.write_bytes(before[:at] + data + before[at + len(data) :])


def cut_the_last_line(out: Path) -> None:
    journal = journal_of(out)
    journal.write_bytes(journal.read_bytes()[:-20])


def scribble_over_the_weights(out: Path) -> None:
    """Also where zeros belong, which no run writes to a fresh file."""
    path = out / "model.safetensors.partial"
    path.write_bytes(b"\xff" * path.stat().st_size)


def lose_the_journal(out: Path) -> None:
    journal_of(out).unlink()
    scribble_over_the_weights(out)


def lose_the_weights(out: Path) -> None:
    (out / "model.safetensors.partial").unlink()


def shorten_the_weights(out: Path) -> None:
    os.truncate(out / "model.safetensors.partial", 3000)


def write_garbage_into_the_journal(out: Path) -> None:
    journal = journal_of(out)
    claims = journal.read_bytes()
    digest = claims.split()[1]
    lies = [b"0 " + digest + b" nothing", b"99999 " + digest + b" grown", b"-1 " + digest + b" grown", b"\xff\xfe \0"]
    lies += [b"%d %s ids" % (block, b"0" * 32) for block in range(4)]
    lies += [b"1 zz grown", b"", b"\xc2\xb2 " + digest + b" ids"]
    journal.write_bytes(b"\n".join(lies) + b"\n" + claims + b"3 " + digest)


@pytest.mark.parametrize(
    "harm",
    [
        zero_a_block,
        flip_a_bit,
        scribble_over_the_weights,
        cut_the_last_line,
        lose_the_journal,
        lose_the_weights,
        shorten_the_weights,
        write_garbage_into_the_journal,
    ],
)
def test_what_a_journal_claims_is_checked(harm, plan, whole, tmp_path):
    interrupt(plan, tmp_path / "out")
    assert journal_of(tmp_path / "out").stat().st_size > 500
    harm(tmp_path / "out")
    write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert contents(tmp_path / "out") == whole


def test_short_writes_leave_whole_lines(plan, whole, tmp_path, monkeypatch):
    """The system may take a few bytes at a time, of several threads."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: random.randint(1, 7)]))
    calls = itertools.count()

    def progress(nbytes: int, total: int) -> None:
        if next(calls) == 15:
            raise Interruption

    with pytest.raises(Interruption):
        write_checkpoint(plan, tmp_path / "out", WriteOptions(workers=4, progress=progress))
    lines = journal_of(tmp_path / "out").read_text().splitlines()
    names = {tensor.name for tensor in plan.tensors}
    assert len(lines) >= 15
    assert all(re.fullmatch(r"\d+ [0-9a-f]{32} (\w+)", line)[1] in names for line in lines)
    monkeypatch.setattr(os, "write", real)
    write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert contents(tmp_path / "out") == whole


def test_a_torn_line_costs_its_own_block_alone(plan, whole, elements_made, tmp_path):
    """What is written behind it by the next run, which is interrupted too, counts."""
    interrupt(plan, tmp_path / "out", after=5)
    cut_the_last_line(tmp_path / "out")
    interrupt(plan, tmp_path / "out", after=12)
    elements_made.clear()
    write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert len(elements_made) == 21 - 12
    assert contents(tmp_path / "out") == whole


def test_without_digests_an_unfinished_file_counts_for_nothing(plan, tmp_path):
    write_checkpoint(plan, tmp_path / "whole", WriteOptions(digest=False))
    interrupt(plan, tmp_path / "out", digest=False)
    scribble_over_the_weights(tmp_path / "out")
    write_checkpoint(plan, tmp_path / "out", WriteOptions(digest=False))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_blocks_are_not_made_twice(plan, whole, elements_made, tmp_path):
    write_checkpoint(plan, tmp_path / "all", WriteOptions())
    total = sum(elements_made)
    elements_made.clear()
    interrupt(plan, tmp_path / "out", after=12)
    before = sum(elements_made)
    assert 0 < before < total
    write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert sum(elements_made) == total


@pytest.mark.parametrize("touched", [False, True], ids=["intact", "touched"])
@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
def test_finished_shards_are_not_made_twice(digest, touched, plan, tmp_path):
    options = {"max_shard_size": SHARD_BYTES, "digest": digest}
    write_checkpoint(plan, tmp_path / "whole", WriteOptions(**options))
    interrupt(plan, tmp_path / "out", after=13, **options)
    finished = sorted((tmp_path / "out" / FOLDER).glob("*.done"))
    assert [path.name[:11] for path in finished] == ["model-00001", "model-00002"]
    if touched:
        shard = tmp_path / "out" / (finished[0].stem + PARTIAL)
        shard.write_bytes(bytes(shard.stat().st_size))
    steps: list[int] = []
    write_checkpoint(plan, tmp_path / "out", WriteOptions(**options, progress=lambda nbytes, _: steps.append(nbytes)))
    assert steps[0] == (28_000 if touched else 28_000 + 11_440)
    assert sum(steps) == plan.nbytes
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Which run may go on where, and what it may replace.


@pytest.mark.parametrize(
    ("changes", "options", "difference"),
    [
        ({"seed": 8}, {}, "seed was 7 and is 8"),
        ({"config": {"model_type": "TeleFLM", "size": 81}}, {}, "config.size was 80 and is 81"),
        ({}, {"max_shard_size": "1KB"}, "settings.max_shard_size was 5000000000 and is 1000"),
        ({}, {"digest": False}, "settings.digest was True and is False"),
    ],
)
def test_another_run_is_refused_and_told_the_difference(changes, options, difference, plan, sources, tmp_path):
    out = tmp_path / "out"
    interrupt(plan, out)
    before = contents(out)
    other = runs.mixed_plan(sources, **changes)
    with pytest.raises(CheckpointError, match=f"holds an interrupted run, but {difference}; .*--overwrite"):
        write_checkpoint(other, out, WriteOptions(**options))
    assert contents(out) == before
    write_checkpoint(other, out, WriteOptions(**options, overwrite=True))
    write_checkpoint(other, tmp_path / "fresh", WriteOptions(**options))
    assert contents(out) == contents(tmp_path / "fresh")


def test_another_layout_is_another_run(plan, tmp_path):
    with pytest.raises(Interruption):
        write_checkpoint(plan, tmp_path / "out", WriteOptions(progress=raise_interruption), torch_folder(plan))
    with pytest.raises(CheckpointError, match="holds an interrupted run, but its files were to be cut otherwise"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())


def test_the_number_of_workers_and_ranks_may_change(plan, whole, tmp_path):
    interrupt(plan, tmp_path / "out")
    write_checkpoint(plan, tmp_path / "out", WriteOptions(workers=3))
    assert contents(tmp_path / "out") == whole


def change_a_byte(file: Path) -> None:
    with file.open("r+b") as stream:
        byte = stream.read(101)[-1]
        stream.seek(100)
        stream.write(bytes([byte ^ 1]))


def change_a_byte_and_restore_the_time(file: Path) -> None:
    """As a copy that keeps times: only the header can tell."""
    status = file.stat()
    change_a_byte(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [change_a_byte, change_a_byte_and_restore_the_time, os.utime])
def test_a_source_that_changed_is_noticed(change, small_blocks, tmp_path):
    """In an interrupted run, in a finished one, and in one that goes on meanwhile."""
    make_sources(tmp_path / "sources")
    source, out = tmp_path / "sources/norm", tmp_path / "out"

    def plan() -> CheckpointPlan:
        return runs.mixed_plan(tmp_path / "sources")

    interrupt(plan(), out)
    change(source)
    with pytest.raises(CheckpointError, match="interrupted run, but the source file norm has changed since"):
        write_checkpoint(plan(), out, WriteOptions())
    calls = itertools.count()
    late = WriteOptions(overwrite=True, progress=lambda *_: change(source) if next(calls) == 10 else None)
    text = r"while it was written, the source file norm has changed since: .*; start over with --overwrite"
    with pytest.raises(CorruptData, match=text):
        write_checkpoint(plan(), out, late)
    assert not [name for name in contents(out) if name in WEIGHT_FILES]
    write_checkpoint(plan(), out, WriteOptions(overwrite=True))
    assert write_checkpoint(plan(), out, WriteOptions()).already_done
    change(source)
    text = r"already holds model\.safetensors, but the source file norm has changed since: .*; choose .*--overwrite"
    with pytest.raises(CheckpointError, match=text):
        write_checkpoint(plan(), out, WriteOptions())


def test_sources_of_the_same_name_are_told_apart(small_blocks, tmp_path):
    """As the ranks of a Megatron checkpoint are: mp_rank_00/model_optim_rng.pt, mp_rank_01/..."""
    for rank in "01":
        make_sources(tmp_path / rank)

    def plan() -> CheckpointPlan:
        weights = [runs.mixed_plan(tmp_path / rank).tensors[-1] for rank in "01"]
        return CheckpointPlan((weights[0], replace(weights[1], name="other")), {})

    interrupt(plan(), tmp_path / "out", after=2)
    os.utime(tmp_path / "0/weight")
    with pytest.raises(CheckpointError, match="the source file 0/weight has changed since"):
        write_checkpoint(plan(), tmp_path / "out", WriteOptions())


def test_sources_may_move_while_a_run_is_interrupted(small_blocks, whole, tmp_path):
    make_sources(tmp_path / "here")
    interrupt(runs.mixed_plan(tmp_path / "here"), tmp_path / "out")
    (tmp_path / "here").rename(tmp_path / "there")
    write_checkpoint(runs.mixed_plan(tmp_path / "there"), tmp_path / "out", WriteOptions())
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_another_version_does_not_go_on(version, plan, tmp_path):
    """It may cut blocks elsewhere, or draw other numbers."""
    interrupt(plan, tmp_path / "out")
    record = tmp_path / "out" / FOLDER / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "version": version}))
    with pytest.raises(CheckpointError, match="interrupted run, but version was"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())


@pytest.mark.parametrize("name", ["run.json", "model-00001-of-00006.safetensors.done"])
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"\xff"])
def test_damaged_records_count_for_nothing(name, content, plan, tmp_path):
    write_checkpoint(plan, tmp_path / "whole", WriteOptions(max_shard_size=SHARD_BYTES))
    interrupt(plan, tmp_path / "out", after=13, max_shard_size=SHARD_BYTES)
    (tmp_path / "out" / FOLDER / name).write_bytes(content)
    write_checkpoint(plan, tmp_path / "out", WriteOptions(max_shard_size=SHARD_BYTES))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def truncate_a_shard(out: Path) -> None:
    os.truncate(out / "model-00002-of-00006.safetensors", 1000)


def remove_a_shard(out: Path) -> None:
    (out / "model-00002-of-00006.safetensors").unlink()


def remove_the_manifest(out: Path) -> None:
    (out / MANIFEST).unlink()


@pytest.mark.parametrize("harm", [truncate_a_shard, remove_a_shard, remove_the_manifest])
def test_what_is_not_whole_is_not_already_done(harm, plan, tmp_path):
    options = WriteOptions(max_shard_size=SHARD_BYTES)
    write_checkpoint(plan, tmp_path / "out", options)
    whole = contents(tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors\.index\.json"):
        write_checkpoint(plan, tmp_path / "out", options)
    write_checkpoint(plan, tmp_path / "out", replace(options, overwrite=True))
    assert contents(tmp_path / "out") == whole


def test_digests_are_part_of_done(plan, tmp_path):
    """With them is more than without, not the reverse."""
    write_checkpoint(plan, tmp_path / "out", WriteOptions(digest=False))
    assert write_checkpoint(plan, tmp_path / "out", WriteOptions(digest=False)).already_done
    with pytest.raises(CheckpointError, match="already holds"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())
    write_checkpoint(plan, tmp_path / "out", WriteOptions(overwrite=True))
    assert write_checkpoint(plan, tmp_path / "out", WriteOptions(digest=False)).already_done


OTHERS = {
    "a model in three shards": [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    + ["model.safetensors.index.json"],
    "a model of .bin files": ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "pytorch_model.bin"],
    "a Megatron model": ["latest_checkpointed_iteration.txt", "release/mp_rank_05/model_optim_rng.pt"],
    "a download in progress": ["model-00001-of-00006.safetensors", "model-00002-of-00009.safetensors"],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_weights_of_others_are_kept_or_replaced_whole(files, shape, plan, tmp_path):
    """No shard of theirs stays among ours, and what is no weight file, or a step of a run, is left alone."""
    out = tmp_path / "out"
    kept = dict.fromkeys(("optimizer.bin", "thesis.pdf.partial", "iter_0000100/mp_rank_00/model.pt"), b"theirs")
    for name in (*files, *kept):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"theirs")
    before = contents(out)
    options = WriteOptions(max_shard_size=SHAPES[shape].get("max_shard_size", 10**9))
    layout = torch_folder(plan) if shape == "torch folder" else None
    with pytest.raises(
        CheckpointError, match=r"already holds .*(model|latest).*; choose another folder or --overwrite"
    ):
        write_checkpoint(plan, out, options, layout)
    assert contents(out) == before
    write_checkpoint(plan, out, replace(options, overwrite=True), layout)
    write_checkpoint(plan, tmp_path / "fresh", options, layout)
    assert contents(out) == contents(tmp_path / "fresh") | kept
    assert not (out / "release/mp_rank_05").exists()


@pytest.mark.parametrize("shape", SHAPES)
def test_overwriting_killed_and_resumed(shape, sources, tmp_path):
    """A checkpoint in seven shards, of another seed, gives way to this one or to nothing; and this one to that."""
    old, new = {"max_shard_size": 10_500}, {**SHAPES[shape], "overwrite": True}
    assert finish(write(sources, tmp_path / "old", old, {"seed": 8})) == 0
    before = contents(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    assert finish(write(sources, tmp_path / "out", new, trace=tmp_path / "trace")) == 0
    whole = contents(tmp_path / "out")
    delicate = [i for i in instants_of(tmp_path / "trace") if i.call.startswith(("unlink", "rmdir", "mkdir", "rename"))]
    for number, instant in enumerate(random.Random(shape).sample(delicate, 12)):
        out = tmp_path / f"{number}/out"
        shutil.copytree(tmp_path / "old", out)
        assert finish(write(sources, out, new, kill_at=instant)) == -signal.SIGKILL, instant
        if contents(out) != before:
            assert_nothing_loads_unless_complete(out, whole, instant)
        assert finish(write(sources, out, new)) == 0, instant
        assert contents(out) == whole, instant
    assert finish(write(sources, out, {**old, "overwrite": True}, {"seed": 8})) == 0
    assert contents(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_overwritten(overwrite, small_blocks, tmp_path):
    """Nor where its files are links, as in a Hub cache."""
    make_sources(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for blob in (tmp_path / "blobs").iterdir():
        (links / blob.name).symlink_to(blob)
    before = contents(tmp_path)
    for out in (links, tmp_path / "blobs", tmp_path / "blobs/../snapshot"):
        with pytest.raises(CheckpointError, match="is the source too"):
            write_checkpoint(runs.mixed_plan(links), out, WriteOptions(overwrite=overwrite))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["release/mp_rank_00", "iter_0000100/mp_rank_00", "iter_0000100"])
def test_a_training_run_is_never_overwritten_by_its_conversion(step, small_blocks, tmp_path):
    run = tmp_path / "run"
    (run / step).mkdir(parents=True)
    make_sources(run / step)
    (run / "latest_checkpointed_iteration.txt").write_bytes(b"100")
    before = contents(run)
    plan = runs.mixed_plan(run / step)
    for layout in (None, torch_folder(plan)):
        with pytest.raises(CheckpointError, match="is the source too"):
            write_checkpoint(plan, run, WriteOptions(overwrite=True), layout)
    assert contents(run) == before
    write_checkpoint(plan, run / "converted", WriteOptions())
