# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the tests of the selection start from: a small corpus with planted copies, and ways to make tables."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.conversations import make_rows, read_pool

ROWS = 1000


def chat(*contents: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def table(chats: Sequence[list[dict[str, str]]], **columns) -> pa.Table:
    """The input of a kernel that reads `row`."""
    rows = pa.array([json.dumps({"messages": messages}).encode() for messages in chats], pa.large_binary())
    return pa.table({"row": rows, **columns})


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def corpus() -> list[dict]:
    """Rows of the benchmark's corpus: `messages`, what is `planted`, and the `group` of an original and its copy."""
    return list(make_rows(read_pool(), ROWS))


@pytest.fixture(scope="session")
def corpus_file(corpus, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", corpus)


@pytest.fixture
def lines(tmp_path) -> Callable[..., Path]:
    """Write rows to a file of JSON Lines."""
    return lambda *rows, name="data.jsonl": write_rows(tmp_path / name, rows)
