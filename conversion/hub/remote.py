# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Where a source is: a folder or file of this machine, or one elsewhere, for which a local folder then stands.

hf://OWNER/NAME[@REVISION][/FOLDER]    a model of the Hub, at the commit that the revision is now
OWNER/NAME[@REVISION]                  the same, where no such folder is here
s3://, gs://, https://, ...            whatever fsspec opens; over http, a folder's files are found by their names
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ..checkpoint.errors import CheckpointError
from ..checkpoint.manifest import MANIFEST, OLD_MANIFEST
from ..checkpoint.mirror import RemoteEntry, RemoteFolder, mirror, plainly
from ..checkpoint.sources import WEIGHT_FILES
from ..checkpoint.strict_json import parse_json_object
from .client import RemoteFile, check_repo_id, look_at, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_HUB = re.compile(r"(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>refs/[^/\s]+/[^/\s]+|[^/\s]+))?(?P<folder>(/[^/\s]+)*)/?")
_OWNER_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?")
_VERSIONS = ("ETag", "etag", "generation", "VersionId", "Content-MD5")  # what a host calls the state of a file
_TIMES = ("Last-Modified", "LastModified", "mtime", "created")
# What a folder may hold that cannot be listed.
_HTTP_NAMES = (
    *WEIGHT_FILES,
    *("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "README.md", "LICENSE"),
    *(MANIFEST, OLD_MANIFEST),
)
_PROBES = 16  # requests at a time


def is_remote(source: str | os.PathLike[str]) -> bool:
    """Whether a source is elsewhere: a URL, or OWNER/NAME where no such file or folder is here."""
    text = os.fspath(source)
    if _SCHEME.match(text):
        return True
    return isinstance(source, str) and _OWNER_NAME.fullmatch(text) is not None and not os.path.lexists(text)


def local_view(source: str | os.PathLike[str]) -> Path:
    """The local path of a source, or that of the folder which stands for it here, see `checkpoint/mirror.py`.

    Args:
        source: a path or a URL, see above.

    Raises:
        CheckpointError: there is no such thing, or it is not for this user.
        OSError: it cannot be reached.
    """
    if not is_remote(source):
        return Path(source)
    text = os.fspath(source)
    scheme, rest = match[1].lower() if (match := _SCHEME.match(text)) else "hf", _SCHEME.sub("", text, count=1)
    if scheme == "hf":
        return mirror(_of_the_hub(rest))
    if scheme == "file":
        return Path(rest)
    return _of_a_store(scheme, text)


# The Hub.


def _of_the_hub(text: str) -> RemoteFolder:
    """A model's files at one commit, whatever is committed later."""
    match = _HUB.fullmatch(text)
    if match is None:
        raise CheckpointError(f"hf://{text}: expected hf://OWNER/NAME[@REVISION].")
    repo_id, revision, below = check_repo_id(match["repo"]), match["revision"], match["folder"].strip("/")
    revision = unquote(revision) if revision else None  # feat%2Fx is the branch feat/x
    from fsspec import filesystem
    from huggingface_hub import HfApi

    api = HfApi(library_name="teleflm")
    there = look_at(api, repo_id, revision)
    if there is None:
        raise CheckpointError(
            f"{repo_id}: no such folder here, and no such model on the Hub, or it is private; check the name, and that "
            "HF_TOKEN may see it."
        )
    hub = filesystem("hf", endpoint=api.endpoint)  # by which an instance is known, and kept
    prefix = f"{below}/" if below else ""
    files = {
        name.removeprefix(prefix): _hub_entry(hub, f"{repo_id}@{there.commit}/{name}", file)
        for name, file in there.files.items()
        if name.startswith(prefix)
    }
    if not files:
        raise CheckpointError(f"{repo_id}: holds no {below or 'file'} at {there.commit[:12]}.")
    url = f"hf://{repo_id}@{there.commit}" + (f"/{below}" if below else "")
    return RemoteFolder(url, files, {"hub": repo_id, "commit": there.commit, **({"folder": below} if below else {})})


def _hub_entry(hub: "AbstractFileSystem", path: str, file: RemoteFile) -> RemoteEntry:
    def fetch(begin: int, end: int) -> bytes:
        with one_line(path.partition("@")[0]), hub.open(path, "rb", cache_type="none") as opened:
            opened.seek(begin)
            return bytes(opened.read(end - begin))

    return RemoteEntry(
        file.size, file.sha256 or file.oid, fetch, check=partial(_check_content, file), sha256=file.sha256
    )


def _check_content(file: RemoteFile, content: bytes) -> None:
    from .uploading import is_content

    if not is_content(file, content):
        raise CheckpointError(
            f"its content is not what the Hub says: sha256 {hashlib.sha256(content).hexdigest()[:12]}, expected "
            f"{(file.sha256 or 'git ' + file.oid)[:12]}"
        )


# Other stores.


def _of_a_store(scheme: str, url: str) -> Path:
    from fsspec.core import url_to_fs

    shown = _without_credentials(url)
    try:
        with plainly(shown):
            store, path = url_to_fs(url)
            if scheme in ("http", "https"):
                return _over_http(store, url, shown)
            if store.isfile(path):
                return (
                    mirror(_store_folder(store, shown.rsplit("/", 1)[0], {path.rsplit("/", 1)[-1]: path}))
                    / (path.rsplit("/", 1)[-1])
                )
            found = store.find(path)
    except ImportError as error:
        raise CheckpointError(f"{shown}: {scheme}:// needs {error.name or 'another package'}; install it.") from None
    root = path.rstrip("/") + "/"
    names = {name[len(root) :]: name for name in found if name.startswith(root)}
    if not names:
        raise CheckpointError(f"{shown}: no such file or folder.")
    return mirror(_store_folder(store, shown.rstrip("/"), names))


def _over_http(store: "AbstractFileSystem", url: str, shown: str) -> Path:
    """A file, or a folder whose files have the names that a checkpoint's have: http lists nothing."""
    if url.endswith((".safetensors", ".bin", ".pt", ".json")):
        name = urlsplit(url).path.rsplit("/", 1)[-1]
        return mirror(_store_folder(store, shown.rsplit("/", 1)[0], {name: url})) / name
    base = urlsplit(url)

    def address(name: str) -> str:
        return urlunsplit(base._replace(path=f"{base.path.rstrip('/')}/{name}"))

    with ThreadPoolExecutor(_PROBES) as pool:
        there = list(pool.map(lambda name: _is_there(store, address(name)), _HTTP_NAMES))
    names = {name for name, found in zip(_HTTP_NAMES, there, strict=True) if found}
    if not names & set(WEIGHT_FILES):
        raise CheckpointError(f"{shown}: has no weights: expected one of {', '.join(WEIGHT_FILES)}.")
    for index in sorted(name for name in names & set(WEIGHT_FILES) if name.endswith(".json")):
        placed = parse_json_object(store.cat_file(address(index)), f"{shown}/{index}").get("weight_map")
        names |= {name for name in (placed.values() if isinstance(placed, dict) else ()) if isinstance(name, str)}
    return mirror(_store_folder(store, shown.rstrip("/"), {name: address(name) for name in names}))


def _is_there(store: "AbstractFileSystem", url: str) -> bool:
    """Whether a host has a file: whatever else it answers than that it has none is a failure, and not an answer.

    Raises:
        OSError: the host cannot be reached, or fails.
    """
    try:
        store.info(url)
    except FileNotFoundError as error:  # which fsspec makes of every failure
        cause = error.__cause__
        status = getattr(cause, "status", None)
        if cause is None or isinstance(cause, FileNotFoundError) or status in (401, 403, 404, 410):
            return False
        raise OSError(None, f"its host failed: {status or type(cause).__name__}", url) from None
    return True


def _store_folder(store: "AbstractFileSystem", shown: str, paths: Mapping[str, str]) -> RemoteFolder:
    """Some files of a store, by name; those of a shard that is missing are left to whoever asks for it."""

    def entry(path: str) -> RemoteEntry | None:
        try:
            size, version = _look(store, path)
        except FileNotFoundError:
            return None
        fetch: Callable[[int, int], bytes] = partial(_fetch, store, path)
        return RemoteEntry(size, version, fetch, look=partial(_look, store, path))

    with ThreadPoolExecutor(_PROBES) as pool:
        entries = dict(zip(paths, pool.map(entry, paths.values()), strict=True))
    return RemoteFolder(shown, {name: found for name, found in entries.items() if found}, {"url": shown})


def _fetch(store: "AbstractFileSystem", path: str, begin: int, end: int) -> bytes:
    return bytes(store.cat_file(path, start=begin, end=end))


def _look(store: "AbstractFileSystem", path: str) -> tuple[int, str]:
    store.invalidate_cache()
    info: Mapping[str, Any] = store.info(path)
    if not isinstance(info.get("size"), int):
        raise CheckpointError(f"its host does not say how large {path.rsplit('/', 1)[-1]} is; it cannot read by ranges")
    return info["size"], _version(info)


def _version(info: Mapping[str, Any]) -> str:
    found: Iterable[Any] = (info[name] for name in (*_VERSIONS, *_TIMES) if info.get(name) is not None)
    return str(next(iter(found), ""))


def _without_credentials(url: str) -> str:
    """A URL without what must not be said: a password, and the query, where signatures are."""
    parts = urlsplit(url)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit(parts._replace(netloc=host, query="", fragment=""))


__all__ = ["is_remote", "local_view"]
