# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A checkpoint streamed to the Hub: never more on this disk than allowed, resumed wherever it was stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import teleflm.app
from conversion import WriteOptions, convert_checkpoint, convert_to_hub, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from tests.fixtures.hub import Fault
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

ROOT = Path(teleflm.app.__file__).parent.parent
REPO = "owner/streamed"
SHARD = "30KB"
OPTIONS = WriteOptions(max_shard_size=SHARD)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_model(tiny_config(vocab_size=640, num_hidden_layers=8)).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    convert_checkpoint(source, out, options=OPTIONS)
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors*")}


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def on_disk(folder):
    """Bytes of weights that lie in a folder."""
    total = 0
    for path in folder.glob("*.safetensors*"):
        with suppress(FileNotFoundError):  # it was just taken away
            total += path.stat().st_size
    return total


def largest(expected):
    return max(len(content) for name, content in expected.items() if name.endswith(".safetensors"))


def weights(files):
    return {name: content for name, content in files.items() if ".safetensors" in name}


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_no_more_lies_here_than_is_allowed_and_the_same_arrives(shards, here, source, expected, work):
    budget, most = shards * largest(expected), [0]

    def look(*_):
        most[0] = max(most[0], on_disk(work))

    here.fault = look
    options = WriteOptions(max_shard_size=SHARD, progress=look)
    streamed = convert_to_hub(source, REPO, budget, work=work, options=options)
    here.fault = None
    files = here.repositories[REPO].files()
    assert weights(files) == expected
    assert len(expected) > 8
    assert largest(expected) <= most[0] <= budget
    assert streamed.in_flight == shards
    assert streamed.disk <= budget
    assert not work.exists()
    assert len(here.repositories[REPO].history()) == 2
    assert f'from_pretrained("{REPO}"' in files["README.md"].decode()


def test_what_arrives_is_whole_by_its_record(here, source, work, tmp_path):
    convert_to_hub(source, REPO, "170KB", work=work, options=OPTIONS)
    inspection = inspect_checkpoint(REPO, check=True)
    assert (inspection.damages, inspection.problems) == ([], [])
    for name, content in here.repositories[REPO].files().items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert inspect_checkpoint(tmp_path / "copy", check=True).damages == []


def test_from_the_hub_to_the_hub(here, source, expected, work):
    """Nothing but the shards that are in flight is ever here."""
    here.add_repository("owner/base", {path.name: path for path in source.iterdir()})
    convert_to_hub("owner/base", REPO, "170KB", work=work, options=OPTIONS)
    files = here.repositories[REPO].files()
    assert weights(files) == expected
    origin = {"hub": "owner/base", "commit": here.repositories["owner/base"].branches["main"]}
    assert json.loads(files[MANIFEST])["lineage"]["parent"] == {"origin": origin}
    assert "base_model: owner/base" in files["README.md"].decode()


@pytest.mark.parametrize("seed", range(4))
def test_stopped_anywhere_it_goes_on_and_sends_nothing_twice(seed, here, source, expected, work):
    chance, stops = random.Random(seed), 0
    while True:
        at, count = chance.randrange(4, 60), [0]

        def stop(request, at=at, count=count):
            count[0] += 1
            return Fault.drop(after_effect=bool(at % 2)) if at <= count[0] < at + 40 else None

        here.fault = stop if stops < 5 else None
        try:
            convert_to_hub(source, REPO, "170KB", work=work, options=OPTIONS)
            break
        except (CheckpointError, OSError):
            stops += 1
            if stops > 5:  # nothing fails any more
                raise
            assert weights(here.repositories[REPO].files()) in ({}, expected) if REPO in here.repositories else True
    assert weights(here.repositories[REPO].files()) == expected
    sizes = {digest: len(content) for (_, digest), content in here.objects.items()}
    twice = {digest for digest, nbytes in here.received.items() if nbytes > sizes[digest]}
    assert len(twice) <= stops, "only what the answer to was lost may have been sent again"


@pytest.mark.slow
def test_killed_processes_leave_what_the_next_one_goes_on_with(hub, source, expected, tmp_path):
    """SIGKILL at some request; each process goes on where the one before it was killed."""
    command = [sys.executable, "-m", "teleflm", "convert", source, f"hf://{REPO}", "--low-disk", "170KB"]
    command = [*map(str, command), "--max-shard-size", SHARD, "--work", str(tmp_path / "work")]
    chance, running, most = random.Random(5), [], [0]

    def run(kill_at):
        count = [0]

        def kill(request):
            most[0] = max(most[0], on_disk(tmp_path / "work"))
            count[0] += 1
            if count[0] == kill_at:
                os.kill(running[-1].pid, signal.SIGKILL)

        hub.fault = kill
        environment = hub.environment(HF_HUB_DISABLE_XET="1")
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        _, said = running[-1].communicate()
        return running[-1].returncode, said

    for _ in range(3):
        code, said = run(chance.randrange(6, 24))
        assert code in (-signal.SIGKILL, 0), said
        assert weights(hub.repositories[REPO].files()) in ({}, expected) if REPO in hub.repositories else True
    code, said = run(0)
    assert code == 0, said
    assert weights(hub.repositories[REPO].files()) == expected
    assert most[0] <= 170_000
    assert not (tmp_path / "work").exists()


def test_what_the_hub_has_not_kept_is_made_again(here, source, expected, work):
    """It need not keep what no commit has named: some of it is gone when the run is resumed."""
    here.fault = lambda request: Fault.status(403, "No") if "/commit/" in request.path else None
    with pytest.raises(OSError, match="the Hub refuses: No"):
        convert_to_hub(source, REPO, "170KB", work=work, options=OPTIONS)
    here.fault = None
    assert on_disk(work) == 0
    for key in sorted(here.objects)[:2]:
        del here.objects[key]
    convert_to_hub(source, REPO, "170KB", work=work, options=OPTIONS)
    assert weights(here.repositories[REPO].files()) == expected


def test_another_job_does_not_go_on_with_the_one_before(here, source, work):
    here.fault = lambda request: Fault.status(403, "No") if "/commit/" in request.path else None
    with pytest.raises(OSError, match="the Hub refuses: No"):
        convert_to_hub(source, REPO, "170KB", work=work, options=OPTIONS)
    here.fault = None
    for to, how in (("owner/other", {}), (REPO, {"dtype": "float16"})):
        with pytest.raises(CheckpointError, match=r"work: holds what is left of another upload; repeat that one"):
            convert_to_hub(source, to, "170KB", work=work, options=OPTIONS, **how)
    options = WriteOptions(max_shard_size=SHARD, overwrite=True)
    convert_to_hub(source, REPO, "170KB", work=work, options=options, dtype="float16")
    first = min(weights(here.repositories[REPO].files()))
    (work.parent / "first").write_bytes(here.repositories[REPO].files()[first])
    assert {str(tensor.dtype) for tensor in load_file(work.parent / "first").values()} == {"torch.float16"}


REFUSED = {
    "a budget below a file": ({"low_disk": "10KB"}, r"--low-disk is 10 kB, and one file has \d+"),
    "several processes": ({"options": WriteOptions(rank=0, world_size=2)}, "one process streams to the Hub, 2 were"),
    "no name": ({"repo_id": "streamed"}, "names no owner; write OWNER/NAME"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(case, here, source, work):
    changes, message = REFUSED[case]
    arguments = {"repo_id": REPO, "low_disk": "170KB", "options": OPTIONS, "work": work, **changes}
    with pytest.raises(CheckpointError, match=message):
        convert_to_hub(source, **arguments)
    assert not work.exists()
    assert here.repositories == {}


def test_a_dry_run_asks_and_writes_nothing(here, source, work):
    streamed = convert_to_hub(source, REPO, "170KB", work=work, options=OPTIONS, dry_run=True)
    assert streamed.url is None
    assert streamed.notes[-1] == f"{REPO} is not there yet, and would be made."
    assert here.repositories == {}
    assert not work.exists()


COMMANDS = {
    "no budget": (["hf://owner/x"], "hf://owner/x: is on the Hub; --low-disk 50GB streams to it"),
    "a folder with a budget": (["out", "--low-disk", "1GB"], "out: --low-disk is for an output on the Hub"),
    "a folder that is private": (["out", "--private"], "out: --private is for an output on the Hub"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_options_that_do_not_go_together_are_refused(case, source, tmp_path):
    arguments, message = COMMANDS[case]
    command = [sys.executable, "-m", "teleflm", "convert", str(source), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, [*tmp_path.iterdir()]) == (2, [])
    assert message in result.stderr


def test_what_the_errors_of_the_card_advise_can_be_done_here_too(here, source, work, tmp_path):
    bare = Path(shutil.copytree(source, tmp_path / "bare"))
    (bare / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"license is missing.* Or give --license"):
        convert_to_hub(bare, REPO, "170KB", work=work, options=OPTIONS)
    command = ["convert", str(bare), f"hf://{REPO}", "--low-disk", "170KB", "--max-shard-size", SHARD]
    result = CliRunner().invoke(teleflm.app.app, [*command, "--work", str(work), "--license", "apache-2.0"])
    assert result.exit_code == 0, result.output
    assert b"license: apache-2.0" in here.repositories[REPO].files()["README.md"]


def test_a_secret_in_a_setting_is_not_streamed_either(here, source, work, tmp_path):
    told = Path(shutil.copytree(source, tmp_path / "told"))
    (told / "generation_config.json").write_text(json.dumps({"note": "hf_" + "aB3" * 12}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: line \d+ holds what looks like a token"):
        convert_to_hub(told, REPO, "170KB", work=work, options=OPTIONS)
    assert here.repositories == {}
