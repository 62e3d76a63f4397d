# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sending files to a repository so that its readers see all of them at one instant, or none.

Weights are sent ahead of the commit that names them: until that, the Hub has them and no reader sees them. What it has
is not sent again. Then one commit adds, replaces and removes everything; it names the commit that it was made for, and
is refused if another came between.

    hashing  ->  preupload_lfs_files, a group at a time, the next being hashed meanwhile  ->  create_commit
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.bytes import identify
from ..checkpoint.errors import CheckpointError
from ..checkpoint.folder_formats import is_weights
from .client import RemoteFile, Repository, has_status, look_at, one_line

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_GROUP = 8  # files that are sent together
_GROUP_BYTES = 50 * 10**9
_CHUNK = 1 << 22
_BATCH = 100  # files in one question to the Hub
_HASHES = ".cache/teleflm/sha256.json"


@dataclass(frozen=True)
class Sent:
    """A file that the Hub has, and that no commit need have named yet.

    Args:
        size: in bytes.
        sha256: of its content.
        sample: its first bytes, by which the Hub tells text from data.
        content: all of it, of a small file that the repository wants in its commit.
    """

    size: int
    sha256: str
    sample: bytes
    content: bytes | None = None


@dataclass(frozen=True)
class Destination:
    """Where a commit goes.

    Args:
        hub: the client.
        repo_id: `OWNER/NAME`.
        revision: branch; the main one unless given.
        pull_request: whether a pull request is opened instead.
    """

    hub: "HfApi"
    repo_id: str
    revision: str | None = None
    pull_request: bool = False


def send(
    to: Destination,
    files: Mapping[str, Path],
    hashes: "Hashes | None" = None,
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> dict[str, Sent]:
    """Send weights ahead of their commit; what the Hub has already is not sent.

    Args:
        to: the repository, which is there.
        files: path in the repository -> file.
        hashes: what is known of the files' hashes, and is to be kept.
        progress: called with the bytes just hashed and those in all.

    Returns:
        What `commit` needs to know of each, without the file.

    Raises:
        OSError: the Hub cannot be reached or refuses; the same call goes on.
    """
    total = sum(path.stat().st_size for path in files.values())
    sent: dict[str, Sent] = {}
    with ThreadPoolExecutor(1) as pool:
        groups = list(_groups(files))

        def prepare(group: Mapping[str, Path]) -> "list[CommitOperationAdd]":
            return [_addition(name, path, hashes, lambda n: progress(n, total)) for name, path in group.items()]

        ahead = pool.submit(prepare, groups[0]) if groups else None
        for number in range(len(groups)):
            assert ahead is not None
            additions = ahead.result()
            ahead = pool.submit(prepare, groups[number + 1]) if number + 1 < len(groups) else None
            with one_line(to.repo_id, to.revision):
                to.hub.preupload_lfs_files(
                    to.repo_id, additions, revision=to.revision, create_pr=to.pull_request, free_memory=True
                )
            _refuse_ignored(to, additions)
            for addition in additions:
                info = addition.upload_info
                if hashes:
                    hashes.keep(groups[number][addition.path_in_repo], info.sha256.hex())
                content = groups[number][addition.path_in_repo].read_bytes() if not addition._is_uploaded else None
                sent[addition.path_in_repo] = Sent(info.size, info.sha256.hex(), info.sample, content)
    return sent


def _refuse_ignored(to: Destination, additions: "Iterable[CommitOperationAdd]") -> None:
    """The client leaves out, without a word, what the repository's .gitignore names."""
    for addition in additions:
        if addition._should_ignore:
            raise CheckpointError(
                f"{to.repo_id}: its .gitignore leaves out {addition.path_in_repo}, which the model needs; "
                "take that line out of it first."
            )


def _groups(files: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    group: dict[str, Path] = {}
    nbytes = 0
    for name, path in files.items():
        size = path.stat().st_size
        if group and (len(group) == _GROUP or nbytes + size > _GROUP_BYTES):
            yield group
            group, nbytes = {}, 0
        group[name] = path
        nbytes += size
    if group:
        yield group


def _addition(name: str, path: Path, hashes: "Hashes | None", progress: Callable[[int], None]) -> "CommitOperationAdd":
    """A file to be added, hashed unless the Xet client does that while it cuts the file."""
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
    known = hashes.get(path) if hashes else None
    if known is None and not _has_xet():
        known = _sha256(path, progress)
    elif known is not None:
        progress(addition.upload_info.size)
    if known is not None:
        addition.upload_info.sha256 = bytes.fromhex(known)
    return addition


def _has_xet() -> bool:
    from huggingface_hub import constants

    return importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def commit(
    to: Destination,
    parent: str,
    sent: Mapping[str, Sent],
    contents: Mapping[str, bytes],
    removed: Iterable[str],
    message: str,
) -> str:
    """Make one commit of files that were sent, of small ones, and of removals.

    Args:
        to: the repository.
        parent: the commit that it replaces; if another one came between, this one is refused.
        sent: the files with weights, by path.
        contents: the small ones.
        removed: paths to remove.
        message: of the commit; its first line is the title.

    Returns:
        Its address; of the one that is there, if that holds all of this already.

    Raises:
        CheckpointError: the repository was changed meanwhile.
        OSError: the Hub cannot be reached or refuses; the repository is what it was, and the same call goes on.
    """
    from huggingface_hub import CommitOperationDelete

    title, _, description = message.strip().partition("\n")
    removed = list(removed)
    if not to.pull_request and (url := _url_if_there(to, sent, contents, removed)):
        return url
    small = [_small(name, content) for name, content in contents.items()]
    with one_line(to.repo_id, to.revision):
        to.hub.preupload_lfs_files(
            to.repo_id, small, revision=to.revision, create_pr=to.pull_request, free_memory=False
        )
    _refuse_ignored(to, small)
    operations: list[Any] = [
        *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed),
        *(_named(name, file) for name, file in sent.items()),
        *small,
    ]
    try:
        with one_line(to.repo_id, to.revision):
            try:
                info = to.hub.create_commit(
                    to.repo_id,
                    operations,
                    commit_message=title,
                    commit_description=description.strip(),
                    revision=to.revision,
                    parent_commit=parent,
                    create_pr=to.pull_request,
                )
            except Exception as error:
                if has_status(error, 412):
                    raise _moved(to, parent) from None
                if not has_status(error, 413):
                    raise

                def find() -> str | None:
                    return _url_if_there(to, sent, contents, removed)

                return _commit_in_parts(to, parent, operations, title, find)
            return str(info.pr_url or info.commit_url)
    except OSError:
        # The answer may have been lost, and the commit made.
        if not to.pull_request and (url := _url_if_there(to, sent, contents, removed)):
            return url
        raise


def _commit_in_parts(
    to: Destination, parent: str, operations: Sequence[Any], title: str, find: Callable[[], str | None]
) -> str:
    """Make one commit of what is too much for one request: by a pull request, merged at the end, unseen until then."""
    opened: list[Any] = []  # the first commit, which opened it

    def add(part: Sequence[Any]) -> None:
        where = {"revision": opened[0].pr_revision} if opened else {"revision": to.revision, "create_pr": True}
        where |= {} if opened else {"parent_commit": parent}
        try:
            info = to.hub.create_commit(to.repo_id, part, commit_message=title, **where)
        except Exception as error:
            if not has_status(error, 413) or len(part) == 1:
                raise
            add(part[: len(part) // 2])
            add(part[len(part) // 2 :])
            return
        opened.append(info)

    try:
        add(operations[: len(operations) // 2])
        add(operations[len(operations) // 2 :])
        if to.pull_request:
            return str(opened[0].pr_url)
        now = look_at(to.hub, to.repo_id, to.revision)
        if now is None or now.commit != parent:
            raise _moved(to, parent)
        to.hub.merge_pull_request(to.repo_id, opened[0].pr_num, comment=title)
    except BaseException:
        if opened:
            with suppress(Exception):
                to.hub.change_discussion_status(to.repo_id, opened[0].pr_num, "closed")
        raise
    if url := find():
        return url
    raise CheckpointError(
        f"{to.repo_id}: somebody has committed while the pull request was merged, so it holds something else too; "
        "look at it, and run the same command again."
    )


def _moved(to: Destination, parent: str) -> CheckpointError:
    return CheckpointError(
        f"{to.repo_id}: was {parent[:12]} when it was looked at, and somebody has committed since; run the same "
        "command again."
    )


def forgotten(to: Destination, sent: Mapping[str, Sent]) -> set[str]:
    """Which of the files that were sent earlier the Hub has not kept; it need not keep what no commit names."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    files = {file.sha256: name for name, file in sent.items() if file.content is None}
    infos = [UploadInfo(sent[name].size, sent[name].sample, bytes.fromhex(digest)) for digest, name in files.items()]
    gone: set[str] = set()
    for at in range(0, len(infos), _BATCH):
        with one_line(to.repo_id, to.revision):
            actions, errors, _ = post_lfs_batch_info(
                infos[at : at + _BATCH],
                token=to.hub.token if isinstance(to.hub.token, str) else None,
                repo_type="model",
                repo_id=to.repo_id,
                revision=to.revision,
                endpoint=to.hub.endpoint,
            )
        gone |= {files[action["oid"]] for action in actions if (action.get("actions") or {}).get("upload")}
        gone |= {files[error["oid"]] for error in errors if error.get("oid") in files}
    return gone


def _named(name: str, file: Sent) -> "CommitOperationAdd":
    """A file that the Hub has, as the client knows it after `preupload_lfs_files`, which need not be this process's."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    if file.content is not None:
        return _small(name, file.content)
    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=b"")
    addition.upload_info = UploadInfo(size=file.size, sample=file.sample, sha256=bytes.fromhex(file.sha256))
    addition._upload_mode = "lfs"
    addition._is_uploaded = True
    return addition


def _small(name: str, content: bytes) -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


def _url_if_there(
    to: Destination, sent: Mapping[str, Sent], contents: Mapping[str, bytes], removed: Iterable[str]
) -> str | None:
    """The address of a repository's commit if that holds these files and not those."""
    with suppress(OSError, CheckpointError):
        there = look_at(to.hub, to.repo_id, to.revision)
        others = {name for name in there.files if is_weights(name)} - {*sent, *contents} if there else set()
        if there and holds(there, sent, contents) and not (others | set(removed)) & there.files.keys():
            return f"{to.hub.endpoint}/{to.repo_id}/commit/{there.commit}"
    return None


def holds(there: Repository, sent: Mapping[str, Sent], contents: Mapping[str, bytes]) -> bool:
    """Whether a repository has these very files."""
    inline = {name: file.content for name, file in sent.items() if file.content is not None}
    weights = {name: file.sha256 for name, file in sent.items() if file.content is None}
    small = {**contents, **inline}
    return all(name in there.files and there.files[name].sha256 == sha256 for name, sha256 in weights.items()) and all(
        name in there.files and is_content(there.files[name], content) for name, content in small.items()
    )


def is_content(file: RemoteFile, content: bytes) -> bool:
    """Whether a file of a repository has some content."""
    if file.sha256 is not None:
        return file.sha256 == hashlib.sha256(content).hexdigest()
    return file.oid == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Hashes:
    """What is known of the sha256 of files, kept beside them so that an interrupted upload need not hash them again.

    A hash belongs to a file's identity: size, time of change, windows of its data, and the time of its inode, which
    whoever writes to it changes even where he sets the other time back.

    Args:
        folder: of the files; where nothing can be written in it, nothing is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _HASHES
        self._known: dict[str, list[str]] = {}
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._path.read_bytes())
            self._known = found if isinstance(found, dict) else {}

    def get(self, path: Path) -> str | None:
        """The sha256 of a file as it is now; None if it is not known."""
        match self._known.get(path.name):
            case [str(identity), str(digest)] if identity == state_of(path) and _is_sha256(digest):
                return digest
        return None

    def keep(self, path: Path, digest: str) -> None:
        """Remember a file's sha256."""
        self._known[path.name] = [state_of(path), digest]
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._known))
            partial.replace(self._path)


def state_of(path: Path) -> str:
    """What tells one state of a file of this machine from another, whoever sets its time of change back."""
    status = path.stat()
    return f"{identify(path).identity}-{status.st_ctime_ns}-{status.st_ino}"


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


__all__ = ["Destination", "Hashes", "Sent", "commit", "forgotten", "holds", "is_content", "send", "state_of"]
