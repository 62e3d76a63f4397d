# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Several processes share the work: same bytes, in any order, and one that dies may come back alone."""

import errno
import fcntl
import json
import logging
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import conversion.checkpoint.preflight as preflight_module
from conversion.checkpoint import ranks
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import WriteOptions, Written, make_job, write_checkpoint
from conversion.checkpoint.folder_formats import loadable_files
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.preflight import FOLDER, PARTIAL, RUN, New, Resume, preflight
from conversion.checkpoint.ranks import RankFailed, Ranks
from conversion.checkpoint.sources import WEIGHT_FILES
from conversion.checkpoint.workspace import Workspace
from teleflm.terminal import process_rank
from tests.fixtures.checkpoint_runs import (
    SHARD_BYTES,
    Instant,
    contents,
    finish,
    make_sources,
    mixed_plan,
    run_teleflm,
    write,
)

OPTIONS = {"max_shard_size": SHARD_BYTES, "workers": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert finish(write(sources, out, OPTIONS)) == 0
    return contents(out)


def start(sources: Path, out: Path, rank: int, world_size: int, *args, **options):
    return write(sources, out, {**OPTIONS, "rank": rank, "world_size": world_size, **options}, *args)


@pytest.mark.parametrize(
    "order",
    [(0, 1), (1, 0), (2, 1, 0), (1, 0, 2), (3, 1, 0, 2), tuple(reversed(range(8)))],
    ids=lambda order: " ".join(map(str, order)),
)
@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
def test_same_bytes_in_any_order(order, digest, sources, alone, tmp_path):
    """With eight, two have nothing to write."""
    ranks = []
    for rank in order:
        ranks.append(start(sources, tmp_path / "out", rank, len(order), digest=digest))
        time.sleep(0.02)
    assert [finish(process) for process in ranks] == [0] * len(order)
    found = contents(tmp_path / "out")
    assert {name for name, data in found.items() if data != alone[name]} == (set() if digest else {MANIFEST})
    assert found.keys() == alone.keys()


@pytest.mark.parametrize("victim", [None, 0, 1])
def test_a_torch_folder_has_the_same_ranks(victim, sources, tmp_path):
    """One that dies comes back alone, too."""
    options = {"torch_folder": True, "workers": 1}
    assert finish(write(sources, tmp_path / "alone", options)) == 0
    instants = {victim: Instant("write shard.journal", 2, "within")}

    def start_one(rank: int, kill_at: Instant | None = None):
        return write(sources, tmp_path / "out", {**options, "rank": rank, "world_size": 2}, {}, kill_at)

    ranks = [start_one(rank, instants.get(rank)) for rank in range(2)]
    if victim is not None:
        assert finish(ranks[victim]) == -signal.SIGKILL
        assert not [name for name in contents(tmp_path / "out") if name in loadable_files()]
        ranks[victim] = start_one(victim)
    assert [finish(process) for process in ranks] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize(
    "instant",
    [
        Instant("write shard.journal", 1, "within"),
        Instant("fsync shard.partial", 1, "before"),
        Instant("rename shard.done.partial", 1, "before"),
        Instant("rename shard.done.partial", 2, "after"),
    ],
    ids=lambda instant: f"{instant.moment} {instant.call}",
)
def test_one_dies_and_comes_back_alone(instant, victim, sources, alone, tmp_path):
    ranks = [start(sources, tmp_path / "out", r, 3, {}, instant if r == victim else None) for r in range(3)]
    assert finish(ranks[victim]) == -signal.SIGKILL
    others = [process for rank, process in enumerate(ranks) if rank not in (0, victim)]
    assert [finish(process) for process in others] == [0] * len(others)
    if victim:
        assert ranks[0].exitcode is None, "rank 0 did not wait"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in WEIGHT_FILES]
    assert finish(start(sources, tmp_path / "out", victim, 3)) == 0
    assert finish(ranks[0]) == (0 if victim else -signal.SIGKILL)
    assert contents(tmp_path / "out") == alone


@pytest.mark.parametrize("world_sizes", [(2, 3), (4, 1), (1, 4)])
def test_all_die_and_others_finish(world_sizes, sources, alone, tmp_path):
    """The number of ranks is no part of the run."""
    rng = random.Random(str(world_sizes))
    before, after = world_sizes
    instants = [Instant("write shard.journal", rng.randint(1, 3), "within") for _ in range(before)]
    ranks = [start(sources, tmp_path / "out", r, before, {}, instants[r]) for r in range(before)]
    time.sleep(0.2)
    for process in ranks:
        process.kill()
        finish(process)
    ranks = [start(sources, tmp_path / "out", r, after) for r in range(after)]
    assert [finish(process) for process in ranks] == [0] * after
    assert contents(tmp_path / "out") == alone


def test_a_rank_that_comes_late_finds_it_done(sources, alone, tmp_path):
    assert finish(write(sources, tmp_path / "out", OPTIONS)) == 0
    assert finish(start(sources, tmp_path / "out", 1, 2)) == 0
    assert contents(tmp_path / "out") == alone


def test_rank_0_finishes_while_another_looks_around(sources, monkeypatch, tmp_path):
    """It finds the records gone and must not take that for work to do."""
    plan, out = mixed_plan(sources), tmp_path / "out"
    write_checkpoint(plan, tmp_path / "alone", WriteOptions(max_shard_size=SHARD_BYTES))

    def await_run(self: Workspace) -> None:
        write_checkpoint(plan, out, WriteOptions(max_shard_size=SHARD_BYTES))

    monkeypatch.setattr(Workspace, "_await_run", await_run)
    assert write_checkpoint(plan, out, WriteOptions(max_shard_size=SHARD_BYTES, rank=1, world_size=2)).already_done
    assert contents(out) == contents(tmp_path / "alone")


def test_a_rank_with_another_argument_is_refused(sources, tmp_path):
    """The first is still at work, as far as the folder tells."""
    out, killed_at = tmp_path / "out", Instant("write shard.journal", 2)
    assert finish(start(sources, out, 0, 2, {}, killed_at)) == -signal.SIGKILL
    before = contents(out)
    for changes, options, message in [
        ({"seed": 8}, {}, "seed was 7 and is 8"),
        ({}, {"max_shard_size": 1000}, "settings.max_shard_size was 12000 and is 1000"),
        ({}, {"digest": False}, "settings.digest was True and is False"),
    ]:
        options = WriteOptions(**{**OPTIONS, "rank": 1, "world_size": 2, **options})
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(mixed_plan(sources, **changes), out, options)
    assert contents(out) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_what_rank_0_refuses(rank, sources, tmp_path):
    """Instead of waiting for it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pytorch_model.bin").write_bytes(b"theirs")
    with pytest.raises(CheckpointError, match=r"already holds pytorch_model\.bin"):
        write_checkpoint(mixed_plan(sources), tmp_path / "out", WriteOptions(rank=rank, world_size=2))
    assert contents(tmp_path / "out") == {"pytorch_model.bin": b"theirs"}


def test_every_rank_overwrites_what_rank_0_overwrites(sources, alone, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / "out" / name).write_bytes(b"theirs")
    ranks = [start(sources, tmp_path / "out", rank, 3, overwrite=True) for rank in (2, 1, 0)]
    assert [finish(process) for process in ranks] == [0, 0, 0]
    assert contents(tmp_path / "out") == alone


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_shard_has_one_writer(overwrite, sources, tmp_path):
    """The same rank started twice; and a run that would replace one of which a rank still lives."""
    out, killed_at = tmp_path / "out", Instant("write shard.journal", 2)
    assert finish(start(sources, out, 0, 2, {}, killed_at)) == -signal.SIGKILL
    shard = f"model-00001-of-00006.safetensors{PARTIAL}"
    plan = mixed_plan(sources, seed=8 if overwrite else 7)
    options = WriteOptions(**OPTIONS, world_size=2, overwrite=overwrite)
    with (out / shard).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(out)
        with pytest.raises(CheckpointError, match=r"another run is writing model-00001-of-00006\.safetensors.*wait"):
            write_checkpoint(plan, out, options)
        assert contents(out) == before


def test_two_runs_on_one_folder(sources, alone, tmp_path):
    """Of many that start at once one does the work; the rest refuse, or come late enough to find it done."""
    runs = [write(sources, tmp_path / "out", OPTIONS) for _ in range(4)]
    statuses = [finish(process) for process in runs]
    assert 0 in statuses
    assert set(statuses) <= {0, 1}
    assert contents(tmp_path / "out") == alone


def test_without_locks_a_run_goes_on_and_says_so(sources, monkeypatch, caplog, tmp_path):
    """As on a Lustre that was mounted without them."""

    def flock(*args):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        write_checkpoint(mixed_plan(sources), tmp_path / "out", WriteOptions())
    assert "without a lock" in caplog.text


# A rank that fails, is killed or never comes: nobody waits for ever, and everybody knows why.


def test_a_failure_is_known_to_all_in_seconds(sources, tmp_path):
    """A full disk on one machine, for example; and what failed before is not taken for what fails now."""
    plan = mixed_plan(sources)

    def run(rank: int, failing: int | None) -> BaseException | Written:
        def progress(nbytes: int, total: int) -> None:
            if nbytes and rank == failing:
                raise OSError(errno.ENOSPC, "No space left on device", "the disk of rank 2")

        options = WriteOptions(**OPTIONS, rank=rank, world_size=3, progress=progress)
        try:
            return write_checkpoint(plan, tmp_path / "out", options)
        except (CheckpointError, OSError) as error:
            return error

    for failing in (2, 2, None):
        started = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(run, range(3), [failing] * 3))
        assert time.monotonic() - started < 20, "nobody waited until its patience was at its end"
        if failing is None:
            assert all(isinstance(result, Written) for result in results), results
            continue
        assert isinstance(results[failing], OSError)
        assert isinstance(results[0], RankFailed)
        assert re.search(r"^rank 2 failed: .*No space left on device", str(results[0]))
        assert not [path for path in (tmp_path / "out").iterdir() if path.name in WEIGHT_FILES]


@pytest.mark.slow
def test_one_that_is_killed_is_missed(sources, alone, tmp_path):
    killed = start(sources, tmp_path / "out", 1, 2, {}, Instant("write shard.journal", 1, "within"))
    options = WriteOptions(**OPTIONS, rank=0, world_size=2, patience=3.0)
    with pytest.raises(RankFailed, match=r"rank 1 of 2 has given no sign of life for \d s; run the same command again"):
        write_checkpoint(mixed_plan(sources), tmp_path / "out", options)
    assert finish(killed) == -signal.SIGKILL
    write_checkpoint(mixed_plan(sources), tmp_path / "out", WriteOptions(**OPTIONS))
    found = contents(tmp_path / "out")
    weights = [name for name in alone if name.endswith(".safetensors")]
    assert [found[name] for name in weights] == [alone[name] for name in weights]


@pytest.mark.parametrize("refused", [0, 1])
def test_a_failure_before_the_work_is_known_too(refused, sources, tmp_path):
    """Of a source that is not there on one machine, for example: nobody waits for who will not come."""
    out = tmp_path / "out"

    def run_told(rank: int) -> BaseException | Written:
        """As the commands do, which know of each other before they plan."""
        try:
            with Ranks(out, rank, 2, patience=60.0) as known:
                if rank == refused:
                    raise CheckpointError("missing: no such file or folder.")
                options = WriteOptions(**OPTIONS, rank=rank, world_size=2, ranks=known)
                return write_checkpoint(mixed_plan(sources), out, options)
        except CheckpointError as error:
            return error

    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_told, range(2)))
    assert time.monotonic() - started < 20
    other = results[1 - refused]
    if refused == 0 or not isinstance(other, Written):
        assert str(other) == f"rank {refused} failed: missing: no such file or folder."
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")], "the last to leave cleans up"


def test_an_earlier_failure_is_not_todays(sources, tmp_path):
    """One that was left by a try of an hour ago."""
    folder = tmp_path / ".out.ranks"
    folder.mkdir()
    (folder / "1.json").write_text(json.dumps({"attempt": "1-1", "beat": 3, "state": "failed", "reason": "old"}))
    os.utime(folder / "1.json", (time.time() - 3600,) * 2)
    ranks_of = [start(sources, tmp_path / "out", rank, 2) for rank in range(2)]
    assert [finish(process) for process in ranks_of] == [0, 0]


@pytest.mark.parametrize(("rank", "missing", "what"), [(0, 1, "model-00002"), (3, 0, "the preparation of")])
def test_ranks_that_never_come(rank, missing, what, sources, monkeypatch, caplog, tmp_path):
    """As under a stray RANK and WORLD_SIZE: it is said early, and ends."""
    monkeypatch.setattr(ranks, "_TELL_SECONDS", 0.2)
    options = WriteOptions(**OPTIONS, rank=rank, world_size=8, patience=1.5)
    expected = rf"rank {missing} of 8 has not come in 2 s, and {what}.*give --rank 0 --world-size 1"
    with pytest.raises(RankFailed, match=expected):
        write_checkpoint(mixed_plan(sources), tmp_path / "out", options)
    assert re.search(rf"{what}.* waits for rank {missing}, which has not come: start all 8", caplog.text)


def test_rank_0_shows_the_progress_of_all(sources, tmp_path):
    seen = []

    def run(rank: int):
        progress = (lambda nbytes, total: seen.append((nbytes, total))) if rank == 0 else lambda nbytes, total: None
        options = WriteOptions(**OPTIONS, rank=rank, world_size=2, progress=progress)
        return write_checkpoint(plan, tmp_path / "out", options)

    plan = mixed_plan(sources)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert {total for _, total in seen} == {plan.nbytes}
    assert sum(nbytes for nbytes, _ in seen) == plan.nbytes


TORCHRUN = {"RANK": "{rank}", "WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_the_command_under_a_launcher(launcher, tmp_path):
    """Both ranks run one command line; standard output is that of rank 0."""
    source = tmp_path / "source"
    write_checkpoint(make_plan(tmp_path), source, WriteOptions())
    arguments = ("convert", source, tmp_path / "out", "--max-shard-size", "12KB", "--json")

    def run(rank: int):
        (tmp_path / str(rank)).mkdir()
        environment = {name: value.format(rank=rank) for name, value in launcher.items()}
        return run_teleflm(*arguments, folder=tmp_path / str(rank), environment=environment)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (0, 1))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout)["already_done"] is False
    assert second.stdout == ""
    (tmp_path / "alone").mkdir()
    run_teleflm(*(str(a).replace("/out", "/one") for a in arguments), folder=tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


def make_plan(folder: Path):
    make_sources(folder / "files")
    return mixed_plan(folder / "files", config={"model_type": "other"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((0, 1), (0, 1)),
        ((2, 3), (2, 3)),
        ((None, 3), "go together"),
        ((2, None), "go together"),
        ((3, 3), "--rank is 3 and --world-size is 3"),
    ],
)
def test_options_go_before_the_environment(options, expected, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    if isinstance(expected, tuple):
        assert process_rank(*options) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            process_rank(*options)


def test_the_way_out_of_a_stray_environment_is_one(tmp_path):
    """What the message advises, followed."""
    source = tmp_path / "source"
    write_checkpoint(make_plan(tmp_path), source, WriteOptions())
    environment = {"RANK": "3", "WORLD_SIZE": "8"}
    arguments = ("convert", source, tmp_path / "out", "--rank", "0", "--world-size", "1")
    result = run_teleflm(*arguments, folder=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    dry = run_teleflm("convert", source, tmp_path / "new", "--dry-run", folder=tmp_path, environment=environment)
    assert (dry.returncode, dry.stderr.splitlines()[-1]) == (0, "rank 3 of 8: rank 0 shows the plan.")
    assert not list(tmp_path.glob(".new*"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"RANK": "3"}, (0, 1)),
        ({"WORLD_SIZE": "4"}, (0, 1)),
        # A batch script sees the variables of its job, but no step shares its work.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
        # torchrun inside of srun: torchrun's ranks share the work.
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is '4' and WORLD_SIZE is '4'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is '0' and WORLD_SIZE is '0'"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK is '-1'"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK is ''"),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "RANK is '²'"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2"}, "SLURM_PROCID is '2' and SLURM_NTASKS is ''"),
    ],
)
def test_rank_of_this_process(environment, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert process_rank() == expected
    else:
        with pytest.raises(ValueError, match=expected):
            process_rank()


def test_a_rank_outside_of_the_world_is_bad_usage(sources, tmp_path):
    environment = {"RANK": "2", "WORLD_SIZE": "2"}
    result = run_teleflm("convert", sources, tmp_path / "out", folder=tmp_path, environment=environment)
    assert result.returncode == 2
    assert result.stderr == "teleflm: RANK is '2' and WORLD_SIZE is '2': that is no rank of a world.\n"
    assert not (tmp_path / "out").exists()
    assert FOLDER not in contents(tmp_path)


def test_a_folder_that_another_rank_just_begins_to_write_is_not_somebody_elses(sources, monkeypatch, tmp_path):
    """Between any two looks at OUT, rank 0 writes its run and its first file: that is no file of an unknown origin."""
    plan = mixed_plan(sources)
    job = make_job(plan, WriteOptions(max_shard_size=SHARD_BYTES))
    looks, begun, begin_after, out = 0, False, 0, tmp_path

    def watched(look):
        def look_and_begin(*args, **options):
            nonlocal looks, begun
            found = look(*args, **options)
            looks += 1
            if looks == begin_after:
                begun = True
                (out / FOLDER).mkdir()
                (out / FOLDER / RUN).write_text(json.dumps(job.run))
                (out / (job.layout.shards[0].filename + PARTIAL)).touch()
            return found

        return look_and_begin

    monkeypatch.setattr(preflight_module, "read_json", watched(preflight_module.read_json))
    monkeypatch.setattr(preflight_module, "known_files", watched(preflight_module.known_files))
    monkeypatch.setattr(os.path, "lexists", watched(os.path.lexists))
    while True:
        begin_after += 1
        looks, begun, out = 0, False, tmp_path / str(begin_after)
        out.mkdir()
        decision = preflight(job, out)
        if not begun:
            break
        assert isinstance(decision, New | Resume), begin_after
    assert begin_after > 10
