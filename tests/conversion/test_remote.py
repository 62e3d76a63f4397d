# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sources that are elsewhere: on the Hub by its real client, in other stores by fsspec, over http by ranges."""

import gc
import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from typer.testing import CliRunner

import conversion.checkpoint.mirror as mirror
from conversion import WriteOptions, convert_checkpoint, export_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import open_checkpoint
from conversion.convert import plan_conversion
from conversion.hub.remote import is_remote, local_view
from growth import grow_checkpoint
from growth.verification.recorded import check_recordable, record_verification
from growth.verification.verify import verify_checkpoints
from teleflm.app import app
from tests.fixtures.hub import Fault
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

REPO = "owner/model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in each layout in which it may be published."""
    place = tmp_path_factory.mktemp("published")
    model = tiny_model()
    model.save_pretrained(place / "one file")
    model.save_pretrained(place / "sharded", max_shard_size="100KB")
    (place / "pickled").mkdir()
    torch.save(model.state_dict(), place / "pickled/pytorch_model.bin")
    shutil.copy(place / "one file/config.json", place / "pickled")
    for folder in place.iterdir():
        tiny_tokenizer(folder).save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return place


def contents(folder):
    return {path.name: path for path in folder.iterdir()}


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def lineage(folder):
    return json.loads((folder / MANIFEST).read_text())["lineage"]


@pytest.mark.parametrize("layout", ["one file", "sharded", "pickled"])
def test_a_model_of_the_hub_is_read_as_one_that_is_here(layout, here, folders, tmp_path):
    here.add_repository(REPO, contents(folders / layout))
    commit = here.repositories[REPO].branches["main"]
    convert_checkpoint(folders / layout, tmp_path / "local")
    convert_checkpoint(f"hf://{REPO}", tmp_path / "remote")
    assert weights(tmp_path / "remote") == weights(tmp_path / "local")
    assert lineage(tmp_path / "remote")["parent"] == {"origin": {"hub": REPO, "commit": commit}}
    card = (tmp_path / "remote/README.md").read_text()
    assert f"1. {REPO} on the Hub at {commit[:12]}, which has no record of its own." in card
    assert f"base_model: {REPO}" in card
    assert (tmp_path / "remote/tokenizer.model").read_bytes() == (folders / layout / "tokenizer.model").read_bytes()
    inspection = inspect_checkpoint(REPO)
    assert inspection.folder == f"hf://{REPO}@{commit}"
    assert inspect_checkpoint(inspection.folder).parameters == 78_816
    assert (inspection.parameters, inspection.problems) == (78_816, [])
    assert not [text for text in (tmp_path / "remote").iterdir() if b"/tmp" in text.read_bytes()]


def test_growing_judging_and_exporting_read_it_as_well(here, folders, tmp_path):
    here.add_repository(REPO, contents(folders / "sharded"))
    wider = {"hidden_size": 64, "num_attention_heads": 8}
    for name, source in (("local", folders / "sharded"), ("remote", REPO)):
        grow_checkpoint(source, tmp_path / name, overrides=wider)
    assert weights(tmp_path / "remote") == weights(tmp_path / "local")
    text = tmp_path / "text.txt"
    text.write_text("The stream widens, and the function stays. " * 9)
    found = verify_checkpoints(REPO, tmp_path / "remote", text=text, max_tokens=24)
    assert found.verdict == "certified"
    record_verification(REPO, tmp_path / "remote", found, check_recordable(tmp_path / "remote"))
    verdict = json.loads((tmp_path / "remote" / MANIFEST).read_text())["verification"]
    assert (verdict["verdict"], verdict["against"]["origin"]["hub"]) == ("certified", REPO)
    with pytest.raises(CheckpointError, match=r"is not on this machine, and its record cannot be changed"):
        check_recordable(REPO)
    with pytest.raises(CheckpointError, match="--forward loaded needs both models on this machine"):
        verify_checkpoints(REPO, tmp_path / "remote", text=text, forward="loaded")
    export_checkpoint(REPO, tmp_path / "granite", to="granite")
    assert load_file(tmp_path / "granite/model.safetensors").keys() == tiny_model().state_dict().keys()
    for name, source in (("here", folders / "sharded"), ("there", REPO)):
        export_checkpoint(source, tmp_path / name, to="gguf", name="tele")
    there, here_too = (tmp_path / name / "tele-F32.gguf" for name in ("there", "here"))
    assert there.read_bytes() == here_too.read_bytes()
    with pytest.raises(CheckpointError, match="is not on this machine, and cannot be linked to"):
        export_checkpoint(REPO, tmp_path / "linked", to="granite", link=True)
    assert not (tmp_path / "linked").exists()


def test_a_repository_of_ours_is_checked_against_its_record_where_it_is(here, folders, tmp_path):
    convert_checkpoint(folders / "sharded", tmp_path / "out", options=WriteOptions(max_shard_size="100KB"))
    here.add_repository(REPO, contents(tmp_path / "out"))
    assert inspect_checkpoint(REPO, check=True).damages == []
    weights = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    here.add_repository("owner/damaged", contents(tmp_path / "out"))
    damages = inspect_checkpoint("owner/damaged", check=True).damages
    assert [damage.reason for damage in damages] == ["does not have its digest"]


def test_a_revision_is_pinned_when_it_is_first_seen(here, folders, tmp_path):
    """Somebody commits other weights after the headers were read: the output is of the commit that was planned."""
    here.add_repository(REPO, contents(folders / "one file"))
    before = here.repositories[REPO].branches["main"]
    view = local_view(REPO)
    file = (folders / "one file/model.safetensors").read_bytes()
    HfApi().upload_file(path_or_fileobj=file[:-4] + b"\0\0\0\0", path_in_repo="model.safetensors", repo_id=REPO)
    convert_checkpoint(view, tmp_path / "old")
    convert_checkpoint(folders / "one file", tmp_path / "local")
    assert weights(tmp_path / "old") == weights(tmp_path / "local")
    assert lineage(tmp_path / "old")["parent"]["origin"]["commit"] == before
    convert_checkpoint(f"hf://{REPO}@{before}", tmp_path / "named")
    assert weights(tmp_path / "named") == weights(tmp_path / "local")
    with pytest.raises(CheckpointError, match=r"already holds model.safetensors, but the source file .* has changed"):
        convert_checkpoint(REPO, tmp_path / "old")


PASSING = {
    "unavailable": Fault.status(503),
    "too many": Fault.status(429, headers={"Retry-After": "1"}),
    "cut": Fault.cut(100),
    "dropped": Fault.drop(),
    "too short": Fault.wrong_length(-1),
    "too long": Fault.wrong_length(1),
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_waited_for(kind, here, folders, tmp_path):
    here.add_repository(REPO, contents(folders / "sharded"))
    seen = {}

    def fail_twice(request):
        seen[request.path] = seen.get(request.path, 0) + 1
        return PASSING[kind] if seen[request.path] <= 2 and "safetensors" in request.path else None

    here.fault = fail_twice
    convert_checkpoint(REPO, tmp_path / "out")
    here.fault = None
    convert_checkpoint(folders / "sharded", tmp_path / "local")
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_what_does_not_pass_is_one_line_and_nothing_loads(here, folders, tmp_path):
    here.add_repository(REPO, contents(folders / "sharded"))
    view = local_view(REPO)
    plan = convert_checkpoint(view, tmp_path / "out", dry_run=True)
    assert plan.written is None
    here.fault = lambda request: Fault.drop() if "safetensors" in request.path else None
    with pytest.raises((CheckpointError, OSError), match=r"model-00001-of-.*safetensors") as caught:
        convert_checkpoint(view, tmp_path / "out")
    assert "\n" not in mirror.shown(str(caught.value))
    assert f"hf://{REPO}@" in mirror.shown(str(caught.value))
    assert not weights(tmp_path / "out") if (tmp_path / "out").exists() else True
    here.fault = None
    convert_checkpoint(view, tmp_path / "out")
    assert weights(tmp_path / "out")


def test_other_bytes_than_the_hub_says_are_found(here, folders, tmp_path):
    """A small file whenever it is read, as all of it is; weights when that is asked for."""
    here.add_repository(REPO, contents(folders / "one file"))
    (repository, digest), content = next(
        (key, value) for key, value in here.objects.items() if len(value) > 100_000 and key[0] == REPO
    )
    here.objects[repository, digest] = content[:-1] + bytes([content[-1] ^ 1])
    convert_checkpoint(REPO, tmp_path / "unasked")
    with pytest.raises(CorruptData, match=rf"has the hash \w+, by .* it is {digest}"):
        convert_checkpoint(REPO, tmp_path / "asked", options=WriteOptions(verify_source=True))
    assert not (tmp_path / "asked").exists()


REFUSED = {
    "owner/nothing": "no such folder here, and no such model on the Hub, or it is private",
    "owner/data": "is a dataset on the Hub, expected a model",
    "stranger/closed": "is gated; ask for access on its page",
    f"hf://{REPO}@v9": "has no revision v9",
    f"hf://{REPO}/sub/folder": "holds no sub/folder at",
    "hf://model": "expected hf://OWNER/NAME",
    "hf://owner/mo del": "expected hf://OWNER/NAME",
    "nosuch://a/b": "[Pp]rotocol|nosuch",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_cannot_be_read_is_one_line(source, here, folders, tmp_path):
    here.add_repository(REPO, contents(folders / "one file"))
    here.add_repository("owner/data", {"a.txt": b"a"}, kind="dataset")
    here.add_repository("stranger/closed", {"config.json": b"{}"}, gated=True)
    with pytest.raises((CheckpointError, OSError), match=REFUSED[source]) as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "hf_test" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_here_is_never_looked_for_elsewhere(here, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "one file", "owner/model")
    here.add_repository(REPO, {"config.json": b"{}"})
    assert not is_remote(REPO)
    assert inspect_checkpoint(REPO).parameters == 78_816
    assert here.requests == []
    assert [is_remote(text) for text in ("owner/other", "a/b/c", "./a/b", "/a/b", "a", Path("owner/other"))] == [
        True,
        *[False] * 5,
    ]


@pytest.mark.slow
def test_a_thread_holds_one_window_whatever_the_number_of_files(folders, store):
    """And the budget knows of it: --memory is for all threads together."""
    put(store, "m", folders / "sharded")
    source = open_checkpoint(local_view("memory://m"))
    with FileReader() as reader:
        for view in source.tensors.values():
            for _ in reader.chunks(view):
                pass
            held = [value for value in gc.get_objects() if isinstance(value, mirror.OpenRemote)]
        assert len(held) > 2
        assert len(mirror._window.content) <= mirror.WINDOW
        assert not [file for file in held if any(isinstance(value, memoryview) for value in vars(file).values())]
    assert mirror._window.file is None
    plan, _ = plan_conversion(source)
    local, _ = plan_conversion(open_checkpoint(folders / "sharded"))
    share, less = (WriteOptions(workers=4, memory="256MB").share(found.tensors) for found in (plan, local))
    assert share.nbytes - less.nbytes == share.workers * mirror.WINDOW
    with pytest.raises(CheckpointError, match=r"--memory is 4 MB, less than one thread takes here"):
        WriteOptions(memory="4MB").share(plan.tensors)


# Other stores.


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def put(store, name, folder):
    for path in folder.iterdir():
        store.pipe_file(f"/{name}/{path.name}", path.read_bytes())


@pytest.mark.parametrize("layout", ["sharded", "pickled"])
def test_a_store_of_fsspec_is_read_by_ranges(layout, store, folders, tmp_path):
    put(store, "bucket/model", folders / layout)
    convert_checkpoint("memory://bucket/model", tmp_path / "remote")
    convert_checkpoint(folders / layout, tmp_path / "local")
    assert weights(tmp_path / "remote") == weights(tmp_path / "local")
    assert lineage(tmp_path / "remote")["parent"] == {"origin": {"url": "memory://bucket/model"}}
    with pytest.raises(CheckpointError, match="memory://bucket/nothing: no such file or folder"):
        convert_checkpoint("memory://bucket/nothing", tmp_path / "out")


def test_a_file_that_is_replaced_while_it_is_read_is_found(store, folders, tmp_path):
    put(store, "m", folders / "one file")
    view = local_view("memory://m")
    convert_checkpoint(view, tmp_path / "out", dry_run=True)
    store.pipe_file("/m/model.safetensors", (folders / "one file/model.safetensors").read_bytes()[:-4] + b"\0" * 4)
    with pytest.raises(CorruptData, match=r"memory://m/model.safetensors: had \d+ bytes and the version .* changed"):
        convert_checkpoint(view, tmp_path / "out")
    assert not weights(tmp_path / "out") if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("name", ["../../escaped.json", "a\\b.json", "x" * 300 + ".json"])
def test_a_name_that_would_lie_elsewhere_is_nothing_to_us(name, store, folders, tmp_path):
    put(store, "m", folders / "one file")
    store.store[f"/m/{name}"] = store.store["/m/config.json"]
    view = local_view("memory://m")
    assert {path.name for path in view.parent.rglob("*")} == {"m", *contents(folders / "one file")}
    convert_checkpoint(view, tmp_path / "out")


@contextmanager
def served(files, *, etag=True):
    """Some files over http, by ranges; yields the address, and the headers of the requests."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            seen.append((self.command, self.path, dict(self.headers)))
            content = files.get(self.path.split("?")[0].removeprefix("/model/"), b"")
            if not content:
                self.send_error(404 if content is not None else 503)
                return
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(content)}")
            if etag:
                self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/model", seen
    finally:
        server.shutdown()


@pytest.mark.parametrize("etag", [True, False])
@pytest.mark.parametrize("layout", ["sharded", "pickled"])
def test_a_folder_over_http_is_found_by_the_names_of_its_files(layout, etag, folders, tmp_path):
    pytest.importorskip("aiohttp")
    files = {path.name: path.read_bytes() for path in (folders / layout).iterdir()}
    convert_checkpoint(folders / layout, tmp_path / "local")
    with served(files, etag=etag) as (url, seen):
        convert_checkpoint(url.replace("//", "//user:secret@") + "?key=secret", tmp_path / "out")
        whole = [path for method, path, headers in seen if method == "GET" and "Range" not in headers]
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert not [path for path in whole if path.endswith((".safetensors", ".bin"))], "weights are read by ranges"
    assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["tokenizer.model", MANIFEST, "config.json", "model.safetensors.index.json"])
def test_a_host_that_fails_for_one_file_is_not_taken_to_lack_it(name, folders, tmp_path):
    pytest.importorskip("aiohttp")
    files = {path.name: path.read_bytes() for path in (folders / "sharded").iterdir()}
    with served({**files, name: None}) as (url, _), pytest.raises((CheckpointError, OSError)) as caught:
        convert_checkpoint(url, tmp_path / "out")
    assert re.search(r"its host failed: 503|503", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_passwords_and_signatures_are_struck_out_of_whatever_fails():
    text = mirror.without_credentials("403, url='http://user:pw@host/m?sig=SECRET', and s3://key:word@b/x?y=SECRET.")
    assert text == "403, url='http://host/m', and s3://b/x"


@pytest.mark.parametrize("out", ["s3://bucket/x", "gs://b/x", "https://u:secretpw@h/x?sig=SECRET"])
@pytest.mark.parametrize("command", ["convert", "grow"])
def test_an_output_elsewhere_is_no_folder_of_that_name(command, out, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--set", "num_hidden_layers=4"] if command == "grow" else []
    result = CliRunner().invoke(app, [command, str(folders / "one file"), out, *more])
    assert (result.exit_code, [*tmp_path.iterdir()]) == (2, [])
    assert "secretpw" not in result.output


def test_revisions_with_slashes_are_read(here, folders):
    here.add_repository(REPO, contents(folders / "one file"))
    HfApi().create_branch(REPO, branch="feat/x")
    assert inspect_checkpoint(f"hf://{REPO}@feat%2Fx").parameters == 78_816


def test_placeholders_are_no_weights(here, folders):
    """Whoever opens what stands for a remote file by other ways than ours finds a pointer, and no zeros."""
    here.add_repository(REPO, contents(folders / "one file"))
    placeholder = local_view(REPO) / "model.safetensors"
    assert placeholder.stat().st_size == (folders / "one file/model.safetensors").stat().st_size
    assert placeholder.read_bytes().startswith(b"version ")
    with pytest.raises(Exception, match=r"[Hh]eader"):
        load_file(placeholder)
