# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Texts of any kind: what is read of them, and what is refused in one line."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from conversion.checkpoint.errors import CheckpointError
from evaluation.measure import evaluate
from evaluation.text import encode_beginning, read_content, read_documents
from evaluation.vocabulary import open_vocabulary
from tests.fixtures.tiny import tiny_tokenizer


def test_a_file_is_a_document(tmp_path):
    path = tmp_path / "a.b.txt"
    path.write_bytes("\ufeffline\r\n天\n".encode())
    found = read_documents(path)
    expected = "line\r\n天\n"  # as it stands, but for the mark
    assert (found.name, found.documents, found.nbytes) == ("a.b", (expected,), 10)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_row_is_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n", "id": 1}\n\n{"text": "天"}')
    found = read_documents(path)
    assert (found.documents, found.nbytes) == (("one\n", "天"), 7)
    upper = path.rename(tmp_path / "A.JSONL")  # as some systems write it
    assert read_documents(upper).documents == found.documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt: no such file."),
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b"\xef\xbb\xbf", "a.txt: is empty"),
        ("a.txt", bytes(range(256)), "a.txt: is not UTF-8 at byte 128"),
        ("a.txt", b"x\0" * 9, "a.txt: holds NUL at character 1"),
        ("a.txt", "天".encode("utf-16"), "a.txt: is not UTF-8 at byte 0"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}', "a.jsonl: line 2: text is missing"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl: line 1: text is empty"),
        ("a.jsonl", b'{"text": ["x"]}', "a.jsonl: line 1: text is a list"),
        ("a.jsonl", b'["x"]', "a.jsonl: line 1 is a JSON list"),
        ("a.jsonl", b'{"text": "x"', "a.jsonl: line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl: line 1 is not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "a\\u0000b"}',
            "a.jsonl: line 2: text: holds NUL at character 1: it is no",
        ),
        ("a.jsonl", b"[" * 10**6, "a.jsonl: line 1 nests deeper"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_is_no_text(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_documents(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_folders_devices_and_large_files(tmp_path):
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_documents(tmp_path)
    with pytest.raises(CheckpointError, match="has more than 1000 bytes"):
        read_content(Path("/dev/zero"), limit=1000)
    if os.getuid():
        (tmp_path / "a").touch(mode=0)
        with pytest.raises(CheckpointError, match="Permission denied"):
            read_documents(tmp_path / "a")


def test_a_line_of_a_megabyte(folder, tmp_path):
    """Every token of it once, by windows; of a text whose every character is three bytes, and of one row of JSON."""
    line = "天地 " * 20_000
    (tmp_path / "a.txt").write_text(line)
    assert len(read_documents(tmp_path / "a.txt").documents[0].encode()) == 140_000
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a, b: [c] " * 100_000}))
    assert read_documents(tmp_path / "b.jsonl").nbytes == 1_000_000
    (tmp_path / "c.txt").write_text("x" * 3000)
    (result,) = evaluate(folder, texts=[tmp_path / "c.txt"]).texts
    assert result.tokens == len(tiny_tokenizer(tmp_path / "t").sp_model.encode("x" * 3000))


def test_only_the_beginning_is_read_for_a_few_tokens(folder, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the value " * 100_000 + b"\xff")
    ids = encode_beginning(open_vocabulary(folder), tmp_path / "a.txt", 10)
    assert ids == tiny_tokenizer(tmp_path / "t").sp_model.encode("the value " * 100)[:10]


def test_two_files_of_one_name(folder, tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    with pytest.raises(CheckpointError, match="two files are called a,"):
        evaluate(folder, texts=[tmp_path / "a.txt", tmp_path / "a.jsonl"])
