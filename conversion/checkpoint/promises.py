# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the files of a source promise of their own bytes, and whether it is so: what `--verify-source` checks.

    a download   the Hub's client keeps the sha256 of a large file: in its cache as the name of the file itself, beside
                 a folder that was downloaded to in `.cache/huggingface/download`
    a record     ours, beside the weights, has the digest of every tensor
    a zip        torch.save writes a CRC-32 of every member, unless it is told not to

The first of these that a file has is checked: of a download all of it, of the others what the plan reads. A checksum
finds damage; only the sha256, as far as its source is trusted, also finds what somebody changed on purpose.
"""

import hashlib
import os
import re
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .bytes import ByteSource, LocalFile, OpenBytes, reading
from .dtypes import BY_NAME
from .errors import CheckpointError, CorruptData
from .folder_formats import is_state
from .manifest import block_digest, read_manifest, recorded_tensors, tensor_digest
from .mirror import MirroredFile
from .plan import CheckpointPlan, View, source_views
from .reader import FileReader
from .safetensors_file import read_header
from .torch_file import read_torch_file, tensors_within
from .zip_directory import LOCAL_BYTES, Directory, Member, content_start, read_directory

Kind: TypeAlias = Literal["download", "record", "zip"]
Spans: TypeAlias = list[tuple[int, int]]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DOWNLOADS = Path(".cache/huggingface/download")
_MAX_DOWNLOAD_RECORD = 4096
_FOLDERS_UP = 2  # from a file to the folder with its record: a step of a training run, and a rank in it
_UINT8 = BY_NAME["uint8"]
_SAID = {
    "download": "the sha256 that the Hub's client recorded",
    "record": "the digests of its record",
    "zip": "the checksums that torch.save wrote, which find damage, not forgery",
}


@dataclass(frozen=True)
class Promise:
    """What a file says of some of its bytes.

    Args:
        kind: who says it.
        what: whose bytes these are, for the message: nothing for the whole file, else a member or a tensor.
        window: the bytes, or the tensor.
        expected: its hash, in hexadecimal.
        block: of a tensor's digest, the elements of a block.
    """

    kind: Kind
    what: str
    window: View
    expected: str
    block: int = 0


def verify_sources(
    plan: CheckpointPlan, recorded: Mapping[str, View], workers: int, progress: Callable[[int, int], None]
) -> list[str]:
    """Check what the files that a plan reads promise, in bounded memory.

    Args:
        plan: see `find_promises`.
        recorded: see `find_promises`.
        workers: threads.
        progress: called from any thread with the bytes just read and those in all.

    Returns:
        What was verified and what was not, a sentence each.

    Raises:
        CorruptData: a file is not what it promises; the message names it and both hashes.
    """
    promises, silent = find_promises(plan, recorded)
    total = sum(promise.window.nbytes for promise in promises)
    stop = threading.Event()

    def check(promise: Promise) -> None:
        if stop.is_set():
            return
        found = _hash(promise, reader, lambda nbytes: progress(nbytes, total), stop)
        if found != promise.expected and not stop.is_set():
            of = f"{promise.what} has" if promise.what else "has"
            raise CorruptData(
                f"{promise.window.file}: {of} the hash {found}, by {_SAID[promise.kind].partition(',')[0]} it is "
                f"{promise.expected}; copy or download the file again."
            )

    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(check, promise) for promise in promises]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [*_sentences("Verified", promises), *_silence(silent)]


def foresee_verification(plan: CheckpointPlan, recorded: Mapping[str, View]) -> list[str]:
    """What `verify_sources` would check, and what it could not, a sentence each; no data is read.

    Args:
        plan: see `find_promises`.
        recorded: see `find_promises`.
    """
    promises, silent = find_promises(plan, recorded)
    return [*_sentences("It would be verified", promises), *_silence(silent)]


def find_promises(plan: CheckpointPlan, recorded: Mapping[str, View]) -> tuple[list[Promise], list[ByteSource]]:
    """What the files that a plan reads promise, and the files of which something is read that nothing is promised of.

    Args:
        plan: what is read.
        recorded: the tensors in the plan's files by the names that a record beside them has; of safetensors files they
            are found without it.
    """
    promises: list[Promise] = []
    silent: list[ByteSource] = []
    for source, spans in _read_spans(plan).items():
        own = {name: view for name, view in recorded.items() if view.file.name == source.name}
        found = _of_download(source) or _of_record(source, spans, own) or _of_zip(source, spans)
        promises += found
        if not _covers(found, spans):
            silent.append(source)
    return promises, silent


def _read_spans(plan: CheckpointPlan) -> dict[ByteSource, Spans]:
    """Which bytes of each file a plan reads, in order and without overlaps."""
    touched: dict[ByteSource, set[tuple[int, int]]] = {}
    for tensor in plan.tensors:
        for view in source_views(tensor):
            if view.numel:
                touched.setdefault(view.file, set()).add(view.span)
    return {source: _merged(touched[source]) for source in sorted(touched, key=lambda source: source.name)}


def _merged(spans: Iterable[tuple[int, int]]) -> Spans:
    merged: Spans = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _near(spans: Spans, place: int) -> Spans:
    """The spans that may hold a place, or begin behind it as the first."""
    following = bisect_right(spans, (place, place))
    return spans[max(following - 1, 0) : following + 1]


def _is_read(spans: Spans, start: int, stop: int) -> bool:
    """Whether a plan reads something between two places."""
    return any(max(start, a) < min(stop, b) for a, b in _near(spans, start))


def _covers(promises: Iterable[Promise], spans: Spans) -> bool:
    promised = _merged(promise.window.span for promise in promises)
    return all(any(start <= a and b <= stop for start, stop in _near(promised, a)) for a, b in spans)


# A download.


def _of_download(source: ByteSource) -> list[Promise]:
    if isinstance(source, MirroredFile):
        sha256 = source.entry.sha256
    else:
        is_local = isinstance(source, LocalFile)
        sha256 = _blob_name(source.name) or _download_record(Path(source.name)) if is_local else None
    return [Promise("download", "", View.contiguous(source, 0, (source.size,), _UINT8), sha256)] if sha256 else []


def _blob_name(file: str) -> str | None:
    """The Hub's cache links a file of a snapshot to one that is called by its sha256 (a small one by another hash)."""
    folder, name = os.path.split(os.path.realpath(file))
    return name if os.path.basename(folder) == "blobs" and _SHA256.fullmatch(name) else None


def _download_record(file: Path) -> str | None:
    """Beside a folder that was downloaded to: the commit, the hash, and the time, each on a line."""
    for folder in list(file.parents)[: _FOLDERS_UP + 1]:
        path = folder / _DOWNLOADS / file.relative_to(folder).with_name(f"{file.name}.metadata")
        with suppress(CheckpointError), reading(path) as data:
            lines = data.pread(0, min(data.size, _MAX_DOWNLOAD_RECORD)).decode(errors="replace").split("\n")
            if len(lines) > 1 and _SHA256.fullmatch(lines[1].strip()):
                return lines[1].strip()
    return None


# A record.


def _of_record(source: ByteSource, spans: Spans, tensors: Mapping[str, View]) -> list[Promise]:
    """The digests of the tensors that are read, if a manifest beside the file has all of them."""
    file = Path(source.name)
    for folder in list(file.parents)[: _FOLDERS_UP + 1]:
        manifest = _manifest_of(folder)
        if manifest is None:
            continue
        known = {
            name: entry["digest"]
            for name, entry in recorded_tensors(manifest).items()
            if isinstance(entry, dict)
            and entry.get("file") == file.relative_to(folder).as_posix()
            and "digest" in entry
        }
        views = tensors or (_own_tensors(source, file.relative_to(folder).as_posix()) if known else {})
        block = manifest["digest"]["block_elements"]
        return [
            Promise("record", name, view, str(known[name]), block)
            for name, view in views.items()
            if name in known and view.is_contiguous and _is_read(spans, *view.span)
        ]
    return []


def _own_tensors(source: ByteSource, name: str) -> Mapping[str, View]:
    """The tensors of a file by the names that a record has: of state, these are the way that leads to them."""
    if name.endswith(".safetensors"):
        return read_header(source).tensors
    return tensors_within(read_torch_file(source), f"{name}/") if is_state(name) else {}


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """A manifest with digests that can be checked; somebody else's is none."""
    with suppress(CheckpointError):
        manifest = read_manifest(folder)
        match manifest:
            case {"digest": {"algorithm": "xxh3_128", "block_elements": int(block)}} if block > 0:
                return manifest
    return None


# A zip, or several in a row, as in a .distcp file.


def _of_zip(source: ByteSource, spans: Spans) -> list[Promise]:
    with source.open() as data:
        return [
            Promise("zip", name, View.contiguous(source, start, (member.size,), _UINT8), f"{member.crc:08x}")
            for directory in _zips(data)
            for name, member, start in _members(data, directory)
            if member.crc and _is_read(spans, start, start + member.size)
        ]


def _zips(data: OpenBytes) -> Iterator[Directory]:
    """The zips that a file consists of, the last one first; none if it is something else."""
    end = data.size
    with suppress(ValueError, EOFError):
        while end > 0:
            directory = read_directory(data, None, end)
            yield directory
            end = directory.start


def _members(data: OpenBytes, directory: Directory) -> Iterator[tuple[str, Member, int]]:
    for name, member in directory.members.items():
        local = data.pread(directory.start + member.header, min(LOCAL_BYTES, directory.position - member.header))
        with suppress(ValueError):
            yield name, member, directory.start + content_start(local, member.header, name)


# Checking.


def _hash(promise: Promise, reader: FileReader, progress: Callable[[int], None], stop: threading.Event) -> str:
    """The hash of what is there; of a part of it, once somebody has said to stop."""
    if promise.kind == "record":
        return tensor_digest(_block_digests(promise, reader, progress, stop))
    sha256, crc = hashlib.sha256(), 0
    for chunk in _chunks(promise.window, reader, progress, stop):
        if promise.kind == "download":
            sha256.update(chunk)
        else:
            crc = zlib.crc32(chunk, crc)
    return sha256.hexdigest() if promise.kind == "download" else f"{crc:08x}"


def _block_digests(
    promise: Promise, reader: FileReader, progress: Callable[[int], None], stop: threading.Event
) -> Iterator[bytes]:
    view = promise.window
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, promise.block):
        yield block_digest(_chunks(flat[start : start + promise.block], reader, progress, stop))


def _chunks(
    window: View, reader: FileReader, progress: Callable[[int], None], stop: threading.Event
) -> Iterator[memoryview]:
    for chunk in reader.chunks(window):
        if stop.is_set():
            return
        yield chunk
        progress(len(chunk))


# What is said of it.


def _sentences(done: str, promises: Iterable[Promise]) -> Iterator[str]:
    by_kind: dict[Kind, list[Promise]] = {}
    for promise in promises:
        by_kind.setdefault(promise.kind, []).append(promise)
    for kind, members in by_kind.items():
        files = len({promise.window.file for promise in members})
        whole = "all of" if kind == "download" else "what is read of"
        yield f"{done}: {whole} {files} file{'s' * (files != 1)}, by {_SAID[kind]}."


def _silence(silent: list[ByteSource]) -> Iterator[str]:
    if silent:
        names = ", ".join(os.path.basename(source.name) for source in silent[:3]) + ", ..." * (len(silent) > 3)
        files = f"{len(silent)} file{'s' * (len(silent) != 1)} ({names})"
        yield f"Not verified: {files}, which nothing vouches for: no record of a download, no digests, no checksums."
