# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of zip directories against zipfile: the same members, of any zip that torch or it writes, or nothing."""

import io
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.checkpoint.bytes import open_bytes
from conversion.checkpoint.zip_directory import LOCAL_BYTES, content_start, read_directory


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(100.0), "b": torch.arange(7), "层": torch.ones(2, 3).to(torch.bfloat16)}, buffer)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def read(path, start, end) -> dict[str, tuple[int, int, int, bytes]]:
    """By name: header, size, checksum, and the content that is found there."""
    with open_bytes(path) as data:
        directory = read_directory(data, start, end)
        found = {}
        for name, member in directory.members.items():
            local = data.pread(directory.start + member.header, LOCAL_BYTES)
            begin = directory.start + content_start(local, member.header, name)
            found[name] = (member.header, member.size, member.crc, data.pread(begin, member.size))
        return found


def expected(content: bytes) -> dict[str, tuple[int, int, int, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {e.filename: (e.header_offset, e.file_size, e.CRC, archive.read(e)) for e in archive.infolist()}


FILES = {
    "torch": saved(),
    "zipfile": zipped({"a/data.pkl": b"N.", "a/data/0": bytes(range(99)), "é层": b"x", "empty": b""}),
    "nothing": zipped({}),
}


@pytest.mark.parametrize("before", [b"", b"another file", FILES["torch"]], ids=["alone", "after a text", "after a zip"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_what_zipfile_finds(content, before, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(before + content + b"rest")
    end = len(before) + len(content)
    assert read(path, len(before), end) == expected(content)
    assert read(path, None, end) == expected(content), "its beginning follows from its end"


def test_a_zip_is_no_zip_from_elsewhere_on(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before" + FILES["torch"])
    for start, end in [(0, None), (7, None), (6, -1), (6, -22)]:
        stop = path.stat().st_size + (end or 0)
        with pytest.raises(ValueError, match=r"makes it|no zip directory|has no entry"):
            read(path, start, stop)


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(["torch", "zipfile"]),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=3),
)
def test_mutations_are_read_as_zipfile_reads_them_or_refused(tmp_path_factory, kind, splices):
    content = FILES[kind]
    start_of_directory = content.index(b"PK\1\2")
    for number, dropped, inserted in splices:
        at = start_of_directory + number % (len(content) - start_of_directory)
        content = content[:at] + inserted + content[at + dropped :]
    path = tmp_path_factory.getbasetemp() / "mutated.zip"
    path.write_bytes(content)
    try:
        found = read(path, 0, len(content))
    except (ValueError, EOFError):
        return
    try:
        theirs = expected(content)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError):
        return  # it checks what is no business of ours: versions, checksums, both names
    assert {name: value[:3] for name, value in found.items()} == {name: value[:3] for name, value in theirs.items()}
