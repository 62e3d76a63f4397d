# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The Hub of the tests, by the real client: what it does, and that it refuses what the real one refuses."""

import base64
import hashlib
import json
import random
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fixtures.hub import Fault, running_hub

ROOT = Path(__file__).parents[2]
REPO = "owner/model"
BIG = random.Random(0).randbytes(100_000)
SHA = hashlib.sha256(BIG).hexdigest()
CARD = b"---\nlicense: mit\n---\n# A card\n"
FILES = {"README.md": CARD, "config.json": b"{}", "part/model.safetensors": BIG}


@pytest.fixture
def hub(monkeypatch):
    # The client reads these when it is imported, which is long before.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as running:
        yield running


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_test")


@pytest.fixture
def repository(hub):
    return hub.add_repository(REPO, FILES)


@pytest.fixture
def impatient(monkeypatch):
    """The client pauses between its tries, and nothing gets better by that here."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def download(hub, tmp_path):
    return partial(hf_hub_download, endpoint=hub.url, token="hf_test", cache_dir=tmp_path / "cache")


def add(files):
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def send_commit(hub, *operations, revision="main", repo=REPO, header=None):
    """A commit as the client never sends it."""
    lines = [{"key": "header", "value": {"summary": "raw", **(header or {})}}]
    lines += [{"key": key, "value": value} for key, value in operations]
    body = "\n".join(json.dumps(line) for line in lines)
    url = f"{hub.url}/api/models/{repo}/commit/{revision}"
    return httpx2.post(url, content=body.encode(), headers={"Authorization": "Bearer hf_test"})


def ask_upload(hub, sha256, size, repo=REPO):
    url = f"{hub.url}/{repo}.git/info/lfs/objects/batch"
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha256, "size": size}]}
    answer = httpx2.post(url, json=asked, headers={"Authorization": "Bearer hf_test"})
    return answer.json()["objects"][0]["actions"]["upload"]["href"]


# Uploads and commits


def test_a_commit_has_a_parent_a_tree_and_files_in_git_or_in_lfs(hub, api):
    api.create_repo(REPO)
    said = api.create_commit(REPO, add(FILES), commit_message="First", commit_description="Said of it")
    repository = hub.repositories[REPO]
    commit, initial = repository.history()
    assert (commit.sha, commit.parent, commit.message) == (said.oid, initial.sha, "First")
    assert repository.files() == {".gitattributes": initial.tree[".gitattributes"].content, **FILES}
    assert {path: blob.is_lfs for path, blob in commit.tree.items() if path in FILES} == {
        path: path.endswith(".safetensors") for path in FILES
    }
    assert hub.objects == {(REPO, SHA): BIG}
    newest = api.list_repo_commits(REPO)[0]
    assert (newest.commit_id, newest.title, newest.message) == (said.oid, "First", "Said of it")


@pytest.mark.parametrize("name", ["a.bin", "tokenizer.model", "a.safetensors", "large.txt", "small.txt", "empty.bin"])
def test_the_name_or_the_size_sends_a_file_to_lfs(hub, api, repository, name):
    content = {"large": b"x" * (hub.lfs_threshold + 1), "empty": b""}.get(name.partition(".")[0], b"small")
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)
    assert repository.tree()[name].is_lfs == (name not in ("small.txt", "empty.bin"))
    assert repository.files()[name] == content


def test_what_is_there_is_not_sent_again(hub, api):
    api.create_repo(REPO)
    for path in ("a.bin", "b.bin", "a.bin"):
        api.upload_file(path_or_fileobj=BIG, path_in_repo=path, repo_id=REPO)
    assert hub.received == {SHA: len(BIG)}
    assert len(hub.repositories[REPO].history()) == 3


@pytest.mark.parametrize("size", [30_000, 50_000, 99_999])
def test_a_large_object_goes_in_parts(hub, api, repository, size):
    hub.multipart_threshold, hub.part_size = 50_000, size
    content = BIG[::-1]
    api.upload_file(path_or_fileobj=content, path_in_repo="b.bin", repo_id=REPO)
    assert repository.files()["b.bin"] == content
    assert hub.received[hashlib.sha256(content).hexdigest()] == len(content)
    parts = [request for request in hub.requests if request.method == "PUT"]
    assert max(request.body_bytes for request in parts) == size
    assert sum(request.body_bytes for request in parts) == len(content)


def test_storage_refuses_what_is_not_what_it_says(hub, repository):
    content = b"something else"
    href = ask_upload(hub, hashlib.sha256(content).hexdigest(), len(content))
    assert httpx2.put(href, content=b"SOMETHING ELSE").status_code == 400
    assert httpx2.put(href, content=content[:-1]).status_code == 400
    assert httpx2.put(f"{href}0", content=content).status_code == 403
    assert httpx2.put(href, content=content, headers={"Authorization": "Bearer hf_test"}).status_code == 400
    assert httpx2.put(href, content=iter([content])).status_code == 501
    assert len(hub.objects) == 1
    assert hub.received == {}
    assert httpx2.put(href, content=content).status_code == 200
    assert len(hub.objects) == 2


def test_parts_that_make_another_object_are_refused(hub, api, repository, monkeypatch):
    hub.multipart_threshold, hub.part_size = 1000, 1000
    operation = CommitOperationAdd("b.bin", BIG[:5000])
    operation.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError) as caught:
        api.preupload_lfs_files(REPO, [operation])
    assert "XAmzContentSHA256Mismatch" in str(caught.value.__cause__)
    assert len(hub.objects) == 1


NOTHING = hashlib.sha256(b"never uploaded").hexdigest()
TEXT = {"content": base64.b64encode(b"text").decode(), "encoding": "base64"}
LARGE = {"content": base64.b64encode(b"x" * 2000).decode(), "encoding": "base64"}
LFS = {"algo": "sha256", "oid": SHA}
REFUSED = {
    "an object never uploaded": (
        400,
        "does not exist",
        [("lfsFile", {"path": "b.bin", "algo": "sha256", "oid": NOTHING})],
    ),
    "an object of another size": (400, "bytes instead of", [("lfsFile", {"path": "b.bin", **LFS, "size": 7})]),
    "another algorithm": (400, "does not exist", [("lfsFile", {"path": "b.bin", "algo": "sha1", "oid": SHA})]),
    "a file that is not there": (404, "doesn't exist", [("deletedFile", {"path": "nothing"})]),
    "a file as a folder": (404, "doesn't exist", [("deletedFolder", {"path": "config.json"})]),
    "a folder as a file": (404, "doesn't exist", [("deletedFile", {"path": "part"})]),
    "a large file in git": (400, "files that large go to LFS", [("file", {"path": "b.txt", **LARGE})]),
    "no base64": (400, "invalid content", [("file", {"path": "b.txt", "content": "?", "encoding": "base64"})]),
    "a path upwards": (400, "Invalid path", [("file", {"path": "a/../../b", **TEXT})]),
    "git's own folder": (400, "Invalid path", [("file", {"path": ".git/config", **TEXT})]),
    "no path": (400, "Invalid path", [("file", TEXT)]),
    "a file below a file": (400, "both a file and a folder", [("file", {"path": "config.json/b", **TEXT})]),
    "a file over a folder": (400, "both a file and a folder", [("file", {"path": "part", **TEXT})]),
    "no such operation": (400, "Unknown operation", [("rename", {"path": "b"})]),
    "a card without sense": (
        400,
        "license",
        [("file", {"path": "README.md", "content": "---\nlicense: mine\n---\n", "encoding": "utf-8"})],
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_commit_that_is_refused_changes_nothing(fault, hub, repository):
    status, message, operations = REFUSED[fault]
    before = repository.branches["main"]
    answer = send_commit(hub, ("file", {"path": "good.txt", **TEXT}), *operations)
    assert (answer.status_code, repository.branches["main"]) == (status, before)
    assert message in answer.json()["error"]
    assert len(repository.commits) == 2


def test_an_object_of_another_repository_is_none_of_this_one(hub, repository):
    hub.add_repository("owner/other")
    answer = send_commit(hub, ("lfsFile", {"path": "b.bin", **LFS}), repo="owner/other")
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"key": "file", "value": {}}', b'{"key": "header", "value": {}}', b"[1]"]
)
def test_a_malformed_commit_is_refused(hub, repository, body):
    url = f"{hub.url}/api/models/{REPO}/commit/main"
    answer = httpx2.post(url, content=body, headers={"Authorization": "Bearer hf_test"})
    assert answer.status_code == 400
    assert len(repository.commits) == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_a_commit_whose_sender_was_killed_did_not_happen(hub, repository, chunked):
    lines = [{"key": "header", "value": {"summary": "raw"}}, {"key": "file", "value": {"path": "a", **TEXT}}]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: 99999"
    head = f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_test\r\n{framing}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + (b"%x\r\n%b\r\n" % (len(body), body) if chunked else body))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert "a" not in repository.files()
    assert [(request.status, request.body_bytes) for request in hub.requests] == [(0, len(body))]


def test_one_commit_adds_replaces_and_deletes(api, repository):
    operations = [
        CommitOperationDelete("part/", is_folder=True),
        CommitOperationDelete("README.md"),
        *add({"part/new.bin": b"new", "config.json": b"[]"}),
    ]
    api.create_commit(REPO, operations, commit_message="All at once")
    files = repository.files()
    del files[".gitattributes"]
    assert files == {"config.json": b"[]", "part/new.bin": b"new"}


def test_a_copy_needs_no_upload(hub, api, repository):
    operations = [CommitOperationCopy("part/model.safetensors", "b.bin"), CommitOperationCopy("config.json", "c.json")]
    api.create_commit(REPO, operations, commit_message="Copy")
    assert repository.files()["b.bin"] == BIG
    assert hub.received == {}


def test_a_stale_parent_is_refused(api, repository):
    old = repository.branches["main"]
    api.create_commit(REPO, add({"a": b"1"}), commit_message="Theirs", parent_commit=old)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit(REPO, add({"a": b"2"}), commit_message="Ours", parent_commit=old)
    assert caught.value.response.status_code == 412
    assert repository.files()["a"] == b"1"


def test_of_many_writers_with_one_parent_one_gets_through(hub, repository):
    parent = repository.branches["main"]

    def write(number):
        path = {"path": f"{number}.txt", **TEXT}
        return send_commit(hub, ("file", path), header={"parentCommit": parent}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(write, range(8))) == [200] + [412] * 7
    assert len(repository.history()) == 3


def test_a_commit_with_too_many_operations_is_refused(hub, api, repository):
    hub.max_operations = 2
    with pytest.raises(HfHubHTTPError, match="413"):
        api.create_commit(REPO, add({"a": b"1", "b": b"2", "c": b"3"}), commit_message="Many")
    assert len(repository.commits) == 2


def test_what_is_beyond_the_quota_is_refused(hub, api, repository):
    hub.quota = len(BIG) + 5000
    api.upload_file(path_or_fileobj=BIG[:4000], path_in_repo="fits.bin", repo_id=REPO)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: Private repository storage limit"):
        api.upload_file(path_or_fileobj=BIG[:4001], path_in_repo="large.bin", repo_id=REPO)


# Branches, tags, pull requests


def test_branches_and_tags_name_commits(api, repository):
    main = repository.branches["main"]
    api.create_branch(REPO, branch="next/step")
    api.create_branch(REPO, branch="first", revision=repository.history()[-1].sha)
    commit = api.create_commit(REPO, add({"a": b"1"}), commit_message="There", revision="next/step")
    api.create_tag(REPO, tag="v1", revision="next/step", tag_message="The first")
    assert repository.branches == {"main": main, "next/step": commit.oid, "first": repository.history()[-1].sha}
    assert repository.tags == {"v1": commit.oid}
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == repository.branches
    assert {ref.name: ref.target_commit for ref in refs.tags} == repository.tags
    for make in (partial(api.create_branch, branch="first"), partial(api.create_tag, tag="v1")):
        with pytest.raises(HfHubHTTPError, match="409"):
            make(REPO)
        make(REPO, exist_ok=True)
    api.delete_branch(REPO, branch="first")
    api.delete_tag(REPO, tag="v1")
    assert (repository.branches.keys(), repository.tags) == ({"main", "next/step"}, {})


def test_refs_that_cannot_be_are_refused(hub, api, repository):
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(REPO, branch="main")
    for name in ("a b", "a..b", "refs/pr/7", ".a", "a.lock", "a/"):
        with pytest.raises(BadRequestError, match="Invalid reference name"):
            api.create_branch(REPO, branch=name)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="b", revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, add({"a": b"1"}), commit_message="There", revision="nowhere")
    api.create_tag(REPO, tag="v1")
    for revision in ("v1", repository.branches["main"]):
        assert send_commit(hub, ("file", {"path": "a", **TEXT}), revision=revision).status_code == 400


def test_a_pull_request_is_seen_when_it_is_merged(api, repository):
    main = repository.branches["main"]
    commit = api.create_commit(REPO, add({"a.bin": BIG[:9]}), commit_message="Ours", create_pr=True)
    assert (commit.pr_num, commit.pr_revision, repository.branches["main"]) == (1, "refs/pr/1", main)
    assert repository.files("refs/pr/1")["a.bin"] == BIG[:9]
    api.create_commit(REPO, add({"b": b"2"}), commit_message="More", revision="refs/pr/1")
    api.create_commit(REPO, add({"theirs": b"3"}), commit_message="Theirs")
    assert api.get_discussion_details(REPO, 1).status == "open"
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    api.merge_pull_request(REPO, 1)
    details = api.get_discussion_details(REPO, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", repository.branches["main"])
    assert repository.files().keys() >= {"a.bin", "b", "theirs"}
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_commit(REPO, add({"c": b"3"}), commit_message="Late", revision="refs/pr/1")


def test_a_pull_request_that_conflicts_or_is_a_draft_is_not_merged(api, repository):
    api.create_commit(REPO, add({"a": b"ours"}), commit_message="Ours", create_pr=True)
    theirs = api.create_commit(REPO, add({"a": b"theirs"}), commit_message="Theirs")
    with pytest.raises(HfHubHTTPError, match="merge conflicts: a"):
        api.merge_pull_request(REPO, 1)
    draft = api.create_pull_request(REPO, title="A draft")
    assert (draft.num, draft.status) == (2, "draft")
    with pytest.raises(BadRequestError, match="this one is draft"):
        api.merge_pull_request(REPO, 2)
    assert repository.branches["main"] == theirs.oid
    api.change_discussion_status(REPO, 2, "closed")
    assert [(d.num, d.status) for d in api.get_repo_discussions(REPO)] == [(2, "closed"), (1, "open")]


def test_a_pull_request_starts_from_the_parent_it_names(api, repository):
    parent = repository.branches["main"]
    api.create_commit(REPO, add({"theirs": b"1"}), commit_message="Theirs")
    made = api.create_commit(REPO, add({"a": b"1"}), commit_message="Ours", create_pr=True, parent_commit=parent)
    assert repository.commits[made.oid].parent == parent


# Who may do what


def test_a_repository_is_made_once(hub, api):
    api.create_repo(REPO, private=True)
    assert hub.repositories[REPO].private
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert str(api.create_repo(REPO, exist_ok=True, private=False)) == f"{hub.url}/{REPO}"
    assert hub.repositories[REPO].private  # and the client does not say so
    hub.add_repository("owner/data", kind="dataset")
    with pytest.raises(HfHubHTTPError, match="already created this dataset"):
        api.create_repo("owner/data")
    assert "/datasets/owner/data" in str(api.create_repo("owner/data", exist_ok=True))
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("owner/data")
    assert api.dataset_info("owner/data").sha == hub.repositories["owner/data"].branches["main"]
    api.update_repo_settings(REPO, private=False, gated="auto")
    assert (hub.repositories[REPO].private, hub.repositories[REPO].gated) == (False, "auto")
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_whose_token_it_is(hub, api):
    hub.tokens["hf_read"] = "read"
    assert api.whoami()["name"] == "owner"
    assert [api.whoami(token=t)["auth"]["accessToken"]["role"] for t in hub.tokens] == ["write", "read"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


ACCESS = {
    "nobody reads a public one": (None, "owner/public", "read", None),
    "a wrong token reads nothing": ("hf_wrong", "owner/public", "read", (401, HfHubHTTPError)),
    "nobody sees a private one": (None, "owner/private", "read", (401, RepositoryNotFoundError)),
    "the owner sees a private one": ("hf_read", "owner/private", "read", None),
    "others do not see a private one": ("hf_read", "other/private", "read", (404, RepositoryNotFoundError)),
    "nobody sees what is not there": (None, "owner/nothing", "read", (401, RepositoryNotFoundError)),
    "nothing is there": ("hf_test", "owner/nothing", "read", (404, RepositoryNotFoundError)),
    "nobody reads a gated one": (None, "other/gated", "read", (401, GatedRepoError)),
    "not granted": ("hf_test", "other/gated", "read", (403, GatedRepoError)),
    "granted": ("hf_read", "other/gated", "read", None),
    "the owner reads a gated one": ("hf_read", "owner/gated", "read", None),
    "nobody writes": (None, "owner/public", "write", (401, RepositoryNotFoundError)),
    "reading is not writing": ("hf_read", "owner/public", "write", (403, HfHubHTTPError)),
    "the owner writes": ("hf_test", "owner/public", "write", None),
    "the owner writes to his own only": ("hf_test", "other/public", "write", (403, HfHubHTTPError)),
    "anybody proposes": ("hf_test", "other/public", "propose", None),
    "but no objects": ("hf_test", "other/public", "propose an object", (403, HfHubHTTPError)),
    "the owner proposes objects": ("hf_test", "owner/public", "propose an object", None),
    "anybody who may write somewhere": ("hf_read", "other/public", "propose", (403, HfHubHTTPError)),
    "nobody creates": (None, "owner/new", "create", (401, HfHubHTTPError)),
    "a token that reads creates nothing": ("hf_read", "owner/new", "create", (403, HfHubHTTPError)),
    "somewhere else": ("hf_test", "other/new", "create", (403, HfHubHTTPError)),
}


@pytest.mark.parametrize("case", ACCESS)
def test_who_may_do_what(case, hub, tmp_path):
    token, repo, act, refused = ACCESS[case]
    hub.tokens["hf_read"] = "read"
    hub.namespaces = {"owner"}
    for owner in ("owner", "other"):
        hub.add_repository(f"{owner}/public", FILES)
        hub.add_repository(f"{owner}/private", FILES, private=True)
        hub.add_repository(f"{owner}/gated", FILES, gated="manual").granted.add("hf_read")
    api = HfApi(endpoint=hub.url, token=token or False)
    change = partial(api.upload_file, path_or_fileobj=b"new" * 999, path_in_repo="b.bin", repo_id=repo)
    acts = {
        "read": partial(api.hf_hub_download, repo, "part/model.safetensors", local_dir=tmp_path),
        "write": change,
        "propose": partial(change, create_pr=True, path_or_fileobj=b"new", path_in_repo="b.txt"),
        "propose an object": partial(change, create_pr=True),
        "create": partial(api.create_repo, repo),
    }
    if refused is None:
        acts[act]()
        return
    with pytest.raises((HfHubHTTPError, OSError)) as caught:
        acts[act]()
    # Before a download the client looks whether it has the file already, and raises its own error on top.
    error = caught.value if isinstance(caught.value, HfHubHTTPError) else caught.value.__cause__
    assert isinstance(error, refused[1])
    assert error.response.status_code == refused[0]
    assert hub.received == {}
    assert all(len(repository.commits) == 2 for repository in hub.repositories.values())


# Downloads


def test_what_was_put_comes_back(hub, api, repository, download, tmp_path):
    for path, content in FILES.items():
        assert Path(download(REPO, path)).read_bytes() == content
    folder = Path(snapshot_download(REPO, endpoint=hub.url, token="hf_test", cache_dir=tmp_path / "snapshots"))
    assert folder.name == repository.branches["main"]
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert Path(download(REPO, "config.json", revision=repository.branches["main"])).read_bytes() == b"{}"


def test_what_is_not_there_is_told_apart(hub, api, repository, download):
    with pytest.raises(RevisionNotFoundError):
        download(REPO, "config.json", revision="v7")
    with pytest.raises(EntryNotFoundError):
        download(REPO, "nothing.json")
    assert not api.file_exists(REPO, "nothing.json")
    assert api.file_exists(REPO, "config.json")
    assert not api.revision_exists(REPO, "v7")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing"))


def test_a_large_file_is_a_link_to_storage_with_its_digest(hub, repository):
    answer = httpx2.head(f"{hub.url}/{REPO}/resolve/main/part/model.safetensors")
    assert (answer.status_code, answer.headers["X-Repo-Commit"]) == (302, repository.branches["main"])
    assert (answer.headers["X-Linked-Etag"], answer.headers["X-Linked-Size"]) == (f'"{SHA}"', str(len(BIG)))
    link = answer.headers["Location"]
    assert httpx2.get(link).content == BIG
    assert httpx2.get(link, headers={"Authorization": "Bearer hf_test"}).status_code == 400
    assert httpx2.get(link[:-1]).status_code == 403
    hub.link_lifetime = -1
    late = httpx2.head(f"{hub.url}/{REPO}/resolve/main/part/model.safetensors").headers["Location"]
    assert httpx2.get(late).status_code == 403


RANGES = {"bytes=0-0": (0, 1), "bytes=10-19": (10, 20), "bytes=99990-": (99990, None), "bytes=-7": (-7, None)}
RANGES |= {"bytes=99999-200000": (99999, None)}


@pytest.mark.parametrize("asked", RANGES)
def test_a_range_is_what_was_asked_for(hub, repository, asked):
    answer = httpx2.get(
        f"{hub.url}/{REPO}/resolve/main/part/model.safetensors", headers={"Range": asked}, follow_redirects=True
    )
    expected = BIG[slice(*RANGES[asked])]
    assert (answer.status_code, answer.content) == (206, expected)
    start, stop, total = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers["Content-Range"]).groups())
    assert (BIG[start : stop + 1], total) == (expected, len(BIG))


@pytest.mark.parametrize("asked", ["bytes=100000-", "bytes=-0", "bytes=9-3"])
def test_a_range_outside_is_refused(hub, repository, asked):
    url = f"{hub.url}/{REPO}/resolve/main/part/model.safetensors"
    answer = httpx2.get(url, headers={"Range": asked}, follow_redirects=True)
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */100000")


def test_the_file_system_reads_by_ranges(hub, repository):
    system = HfFileSystem(endpoint=hub.url, token="hf_test", skip_instance_cache=True)
    assert sorted(system.find(REPO)) == sorted(f"{REPO}/{path}" for path in [".gitattributes", *FILES])
    path = f"{REPO}/part/model.safetensors"
    assert system.info(path)["lfs"]["sha256"] == SHA
    with system.open(path, block_size=1000) as file:
        for start in (0, 50_000, 99_000):
            file.seek(start)
            assert file.read(1000) == BIG[start : start + 1000]
    served = [request for request in hub.requests if request.path.startswith("/object/")]
    assert {request.status for request in served} == {206}
    assert system.cat_file(f"{REPO}/config.json") == b"{}"
    system.pipe_file(f"{REPO}/written.bin", b"written")
    assert repository.files()["written.bin"] == b"written"


def test_listings_come_in_pages(hub, api):
    files = {f"folder{number % 3}/{number}.json": b"%d" % number for number in range(50)}
    repository = hub.add_repository(REPO, files)
    hub.page_size = 20
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *files}
    found = list(api.list_repo_tree(REPO, recursive=True, expand=True))
    assert len(found) == 1 + 50 + 3
    assert {entry.last_commit.title for entry in found if entry.path != ".gitattributes"} == {"Add files"}
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "folder0", "folder1", "folder2"]
    assert len(list(api.list_repo_tree(REPO, "folder0"))) == 17
    for number in range(45):
        repository.move("main", repository.add_commit(repository.branches["main"], str(number), repository.tree()))
    assert len(api.list_repo_commits(REPO)) == 47


def test_what_is_said_of_a_repository(api, repository):
    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.gated, info.card_data.license) == (
        repository.branches["main"],
        False,
        False,
        "mit",
    )
    found = {file.rfilename: (file.size, file.lfs and file.lfs.sha256) for file in info.siblings}
    assert {path: found[path] for path in FILES} == {
        path: (len(content), SHA if content is BIG else None) for path, content in FILES.items()
    }
    paths = api.get_paths_info(REPO, ["config.json", "part", "nothing"], expand=True)
    assert [(p.path, type(p).__name__) for p in paths] == [("config.json", "RepoFile"), ("part", "RepoFolder")]
    assert paths[0].blob_id == hashlib.sha1(b"blob 2\0{}").hexdigest()


def test_a_dataset_is_no_model(hub, api, download):
    api.create_repo("owner/data", repo_type="dataset")
    api.create_commit("owner/data", add({"a.bin": BIG}), commit_message="First", repo_type="dataset")
    assert Path(download("owner/data", "a.bin", repo_type="dataset")).read_bytes() == BIG
    assert HfFileSystem(endpoint=hub.url, token="hf_test").exists("datasets/owner/data/a.bin")
    with pytest.raises(RepositoryNotFoundError):
        download("owner/data", "a.bin")


# Faults


def once(where, fault, method=None):
    """A fault of the first request whose path matches."""
    left = [fault]

    def plan(request):
        hit = re.search(where, request.path) and method in (None, request.method) and left
        return left.pop() if hit else None

    return plan


UPLOAD_FAULTS = {
    "busy": ("/upload/", Fault.status(503, "Slow down"), 1),
    "dropped before": ("/upload/", Fault.drop(), 1),
    "dropped after": ("/upload/", Fault.drop(after_effect=True), 2),
    "stalled": ("/upload/", Fault.stall(0.2), 1),
    "asked for nothing": ("objects/batch", Fault.drop(), 1),
    "cut": ("objects/batch", Fault.cut(20), 1),
    "not verified": ("lfs/verify", Fault.status(500), 1),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("case", UPLOAD_FAULTS)
def test_the_client_goes_on_after_a_fault_of_an_upload(case, hub, api):
    where, fault, times = UPLOAD_FAULTS[case]
    repository = hub.add_repository(REPO)
    hub.fault = once(where, fault)
    api.upload_file(path_or_fileobj=BIG, path_in_repo="b.bin", repo_id=REPO)
    assert repository.files()["b.bin"] == BIG
    assert hub.received == {SHA: times * len(BIG)}


COMMIT_FAULTS = {
    "refused": (Fault.status(500, "Try again"), False),
    "dropped before": (Fault.drop(), False),
    "dropped after": (Fault.drop(after_effect=True), True),
    "cut": (Fault.cut(5), True),
    "wrong length": (Fault.wrong_length(-1), True),
}


@pytest.mark.parametrize("case", COMMIT_FAULTS)
def test_the_client_is_told_that_a_commit_went_wrong(case, hub, api, repository):
    fault, happened = COMMIT_FAULTS[case]
    hub.fault = once("/commit/main", fault)
    with pytest.raises((httpx2.HTTPError, json.JSONDecodeError)):
        api.create_commit(REPO, add({"a": b"1"}), commit_message="Ours")
    assert ("a" in repository.files()) is happened


DOWNLOAD_FAULTS = {
    "stalled": Fault.stall(0.2),
    "dropped": Fault.drop(),
    "cut": Fault.cut(70_000),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("case", DOWNLOAD_FAULTS)
def test_the_client_goes_on_after_a_fault_of_a_download(case, hub, repository, download, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is less than one is lost
    hub.fault = once("/object/", DOWNLOAD_FAULTS[case])
    assert Path(download(REPO, "part/model.safetensors")).read_bytes() == BIG
    served = [request.status for request in hub.requests if request.path.startswith("/object/")]
    assert served == {"stalled": [200], "dropped": [0, 200], "cut": [200, 206]}[case]


@pytest.mark.parametrize("difference", [-1, 1])
def test_the_client_notices_a_wrong_length(hub, repository, download, difference):
    hub.fault = once("/object/", Fault.wrong_length(difference))
    with pytest.raises(OSError, match="Consistency check failed"):
        download(REPO, "part/model.safetensors")


def test_a_head_can_be_cut_too(hub, repository):
    hub.fault = once("/resolve/", Fault.cut())
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.head(f"{hub.url}/{REPO}/resolve/main/config.json")


def test_requests_are_counted_as_they_arrive(hub, repository):
    hub.fault = once("b", Fault.drop())
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.post(f"{hub.url}/b", content=b"123")
    httpx2.get(f"{hub.url}/a?b=c")
    assert [(r.number, r.method, r.path, r.status, r.body_bytes) for r in hub.requests] == [
        (1, "POST", "/b", 0, 3),
        (2, "GET", "/a?b=c", 404, 0),
    ]


# Cards

RESULT = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "ceval", "name": "C-Eval"},
    "metrics": [{"type": "acc", "value": 0.5}],
}
CARDS = {
    "sound": (
        {
            "license": "apache-2.0",
            "base_model": "CofeAI/Tele-FLM",
            "base_model_relation": "finetune",
            "language": ["en", "zh"],
            "datasets": ["owner/data"],
            "pipeline_tag": "text-generation",
            "tags": ["growth"],
            "model-index": [{"name": "m", "results": [RESULT]}],
        },
        None,
    ),
    "unknown license": ({"license": "Apache 2"}, '"license"'),
    "license without its name": ({"license": "mit", "license_name": "mine"}, "license_name"),
    "base that is a folder": ({"base_model": "/home/me/model"}, '"base_model"'),
    "one base that is a number": ({"base_model": ["a/b", 7]}, r'"base_model\[1\]" must be a string'),
    "unknown relation": ({"base_model_relation": "grown"}, "base_model_relation"),
    "language by name": ({"language": "English"}, '"language"'),
    "unknown task": ({"pipeline_tag": "talking"}, "pipeline_tag"),
    "tags that are text": ({"tags": "growth"}, '"tags"'),
    "results without metrics": (
        {"model-index": [{"name": "m", "results": [{**RESULT, "metrics": None}]}]},
        r'"model-index\[0\].results\[0\].metrics" is required',
    ),
    "metric without value": (
        {"model-index": [{"name": "m", "results": [{**RESULT, "metrics": [{"type": "acc"}]}]}]},
        r"metrics\[0\].value",
    ),
    "results without dataset": (
        {"model-index": [{"name": "m", "results": [{**RESULT, "dataset": {"name": "x"}}]}]},
        r"dataset.type",
    ),
    "no object": ([1], "must be of type object"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_is_held_against_the_rules(case, api, repository):
    data, message = CARDS[case]
    data = {"license": "mit", **data} if isinstance(data, dict) else data
    card = f"---\n{json.dumps(data)}\n---\n# A card\n".encode()
    if message is None:
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
        assert repository.files()["README.md"] == card
        return
    with pytest.raises(ValueError, match=message):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    assert repository.files()["README.md"] == CARD


@pytest.mark.filterwarnings("ignore:Warnings while validating")
def test_a_card_without_metadata_is_warned_about(api, repository):
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# A card", path_in_repo="README.md", repo_id=REPO)
    with pytest.raises(ValueError, match="parsing the YAML"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=REPO)


# Both ways of the client, in a process of its own

ROUND_TRIP = """if True:
    import hashlib, sys
    from pathlib import Path
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

    folder, repo = Path(sys.argv[1]), sys.argv[2]
    api = HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    for path in folder.iterdir():
        assert Path(hf_hub_download(repo, path.name)).read_bytes() == path.read_bytes(), path
    assert HfFileSystem().cat_file(f"{repo}/floats.bin", start=70_000, end=70_100) == (
        folder / "floats.bin").read_bytes()[70_000:70_100]
    if sys.argv[3:]:
        from transformers import AutoConfig
        assert AutoConfig.from_pretrained(repo).hidden_size == 64
    print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("disabled", ["1", None])
def test_the_client_gets_through_with_xet_and_without(hub, disabled, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    contents = {
        "noise.bin": BIG,
        "floats.bin": np.linspace(0, 1, 60_001, dtype=np.float32).tobytes(),
        "text.bin": b"".join(b"%d green bottles " % number for number in range(20_000)),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    environment = hub.environment(**({"HF_HUB_DISABLE_XET": disabled} if disabled else {}))
    command = [sys.executable, "-c", ROUND_TRIP, str(folder), REPO, *([] if disabled else ["and by transformers"])]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "fine\n", result.stderr
    digests = {hashlib.sha256(content).hexdigest(): len(content) for content in contents.values()}
    assert {sha: hub.received[sha] for sha in digests} == digests
    by_xet = any(request.path.startswith("/v1/xorbs/") for request in hub.requests)
    by_lfs = any(request.path.startswith("/upload/") for request in hub.requests)
    assert (by_xet, by_lfs) == ((False, True) if disabled else (True, False))


UPLOAD = """if True:
    import sys
    from huggingface_hub import HfApi
    HfApi().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="b.bin", repo_id=sys.argv[2])
"""
XET_FAULTS = {
    "no token": ("xet-write-token", Fault.status(500), 1),
    "lost xorb": ("/v1/xorbs/", Fault.drop(after_effect=True), 2),
    "cut shard": ("/v1/shards", Fault.cut(3), 1),
}


@pytest.mark.parametrize("case", XET_FAULTS)
def test_the_client_goes_on_after_a_fault_of_xet(case, hub, tmp_path, monkeypatch):
    where, fault, times = XET_FAULTS[case]
    repository = hub.add_repository(REPO)
    hub.fault = once(where, fault)
    (tmp_path / "b.bin").write_bytes(BIG)
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    command = [sys.executable, "-c", UPLOAD, str(tmp_path / "b.bin"), REPO]
    subprocess.run(command, cwd=ROOT, env=hub.environment(), capture_output=True, check=True)
    assert repository.files()["b.bin"] == BIG
    assert hub.received == {SHA: times * len(BIG)}


def test_an_open_file_goes_by_lfs_with_xet_too(hub, api, repository, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (tmp_path / "b.bin").write_bytes(BIG[::-1])
    with (tmp_path / "b.bin").open("rb") as file:
        api.upload_file(path_or_fileobj=file, path_in_repo="b.bin", repo_id=REPO)
    assert repository.files()["b.bin"] == BIG[::-1]


def test_a_hub_without_xet_does_not_get_lfs_instead(hub, api, repository, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = False
    with pytest.raises(ConnectionError, match="xet-write-token"):
        api.upload_file(path_or_fileobj=BIG[::-1], path_in_repo="b.bin", repo_id=REPO)


def xet_token(hub, kind="write"):
    headers = {"Authorization": "Bearer hf_test"}
    answer = httpx2.get(f"{hub.url}/api/models/{REPO}/xet-{kind}-token/main", headers=headers)
    return {"Authorization": f"Bearer {answer.json()['accessToken']}"}


def test_storage_of_xet_refuses_what_is_not_sound(hub, repository):
    chunk = bytes([0, 4, 0, 0, 0, 4, 0, 0]) + b"data"
    xorb = f"{hub.storage_url}/v1/xorbs/default/{'0' * 64}"
    assert httpx2.post(xorb, content=chunk).status_code == 401
    assert httpx2.post(xorb, content=chunk, headers=xet_token(hub, "read")).status_code == 403
    for damaged in (chunk[:-1], chunk + b"\1", bytes([0, 4, 0, 0, 7]) + chunk[5:], bytes([0, 4, 0, 0, 1]) + chunk[5:]):
        assert httpx2.post(xorb, content=damaged, headers=xet_token(hub)).status_code == 400
    assert httpx2.post(xorb, content=chunk, headers=xet_token(hub)).status_code == 200

    def shard(name, sha256):
        def swapped(text):
            return b"".join(int(text[at : at + 16], 16).to_bytes(8, "little") for at in range(0, 64, 16))

        flags = ((1 << 31) | (1 << 30)).to_bytes(4, "little")
        count, pad = (1).to_bytes(4, "little"), bytes(16)
        term = swapped(name) + bytes(4) + (4).to_bytes(4, "little") + bytes(4) + count
        file = bytes(32) + flags + count + bytes(8) + term + bytes(32) + pad + swapped(sha256) + pad
        head = b"HFRepoMetaData\0".ljust(32, b"\0") + (2).to_bytes(8, "little") + bytes(8)
        return head + file + b"\xff" * 32 + pad

    digest = hashlib.sha256(b"data").hexdigest()
    shards = f"{hub.storage_url}/v1/shards"
    for damaged in (b"", shard("1" * 64, digest), shard("0" * 64, "1" * 64)):
        assert httpx2.post(shards, content=damaged, headers=xet_token(hub)).status_code == 400
    assert (REPO, digest) not in hub.objects
    assert httpx2.post(shards, content=shard("0" * 64, digest), headers=xet_token(hub)).status_code == 200
    assert hub.objects[REPO, digest] == b"data"
