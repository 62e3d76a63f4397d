# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a file may make us take: less than 100 MiB and some seconds, or one line; and what real ones need is read."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.checkpoint.manifest import MANIFEST
from tests.fixtures.hostile_pickles import text
from tests.fixtures.yardstick import TWO_SECONDS

ROOT = Path(__file__).parents[2]
LIMIT = 100 * 2**20


@pytest.fixture(scope="module")
def reader() -> Iterator[Callable[[str, Path], dict[str, Any]]]:
    """Reads a file in another process, and says what that took."""
    command = [sys.executable, "-m", "tests.fixtures.bounded_reader"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=ROOT) as process:

        def read(kind: str, path: Path) -> dict[str, Any]:
            print(json.dumps({"reader": kind, "path": str(path)}), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield read
        process.stdin.close()


# Contents are made when they are needed: together they are half a gigabyte.


def safetensors(folder: Path, content: str) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content.encode())
    return path


def entries(count: int, name: str = "%x") -> str:
    return ",".join(f'"{name % i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))


def zipped(folder: Path, members: list[tuple[bytes, bytes | int]], count: int | None = None, wide: bool = False):
    """A zip by hand; a member that is a number is a hole of that size."""
    path, directory, at = folder / "x.bin", bytearray(), 0
    with path.open("wb") as file:
        for name, content in members:
            size = content if isinstance(content, int) else len(content)
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name)
            file.seek(content, 1) if isinstance(content, int) else file.write(content)
            fields = (20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, at)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name
            at += 30 + len(name) + size
        start, number = at, len(members) if count is None else count
        file.write(directory)
        if wide:
            numbers = (number, number, len(directory), start)
            file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers))
            file.write(struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1))
        short = min(number, 65535)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, len(directory), start, 0))
    return path


def torch_file(folder: Path, pickled: bytes, **more: bytes | int) -> Path:
    members = {"data.pkl": pickled, "data/0": bytes(24), **more}
    return zipped(folder, [(f"archive/{name}".encode(), content) for name, content in members.items()])


def empty_members(count: int) -> list[tuple[bytes, bytes | int]]:
    return [(b"archive/data.pkl", b"N."), *((b"a/%x" % i, b"") for i in range(count))]


def metadata(folder: Path, pickled: bytes) -> Path:
    head = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}" + text("a") + b"("
    (folder / ".metadata").write_bytes(head + pickled + b"tsb.")
    return folder


def store(folder: Path, name: str, content: str, size: int | None = None) -> Path:
    (folder / name).write_text(content)
    if size:
        os.truncate(folder / name, size)
    return folder


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def gguf_array(kind: int, count: int, entry: bytes) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    return head + struct.pack("<IIQ", 9, kind, count) + entry * count


INDEX = "model.safetensors.index.json"
PID = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tq\x020"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\nq\x01(h\x02QK\x00K\x02\x85K\x01\x85\x89}tq\x040"
CHUNK = b"ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\nq\0"
ENTRY = '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}'

Cases = dict[str, tuple[Callable[[], Any], str]]
HEADERS: Cases = {
    "77 MB": (lambda: "{" + entries(1_400_000) + "}", "announces a header of 80081521 bytes, the limit is 16777216"),
    "empty tensors": (lambda: "{" + entries(290_000) + "}", "more than 100000 tensors"),
    "as many tensors as may be": (lambda: "{" + entries(100_000, "n" * 40 + "%x") + "}", "read"),
    "empty lists": (lambda: ENTRY % ",".join(["[]"] * 5_000_000), "described by 15000046 bytes, the limit is 16384"),
    "metadata": (lambda: '{"__metadata__":{' + ",".join(f'"{i:x}":""' for i in range(10**6)) + "}}", "could take 2"),
    "one name": (lambda: '{"' + "a" * 16_000_000 + '":{"dtype":"F32"}}', "has shape None"),
    "one brace": (lambda: '{"a":{' + "1," * 8_000_000 + "}", "described by 16000002 bytes, the limit is 16384"),
    "open braces": (lambda: '{"a":' * 3_000_000, "not described by an object"),
    "open text": (lambda: '{"' + "\\" * 16_000_000, "not valid JSON"),
}
PICKLES: Cases = {
    "storages": (lambda: PID + b"(" + b"h\x02Q" * 1_900_000 + b"t.", "more memory"),
    "tensors": (lambda: PID + TENSOR + b"(" + b"h\x01h\x04R" * 1_140_000 + b"t.", "more memory"),
    "nothing": (lambda: b"(" + b"N" * 5_700_000 + b"t.", "more operations"),
    "strings": (lambda: b"(" + b"".join(b"\x8c\x02%02x" % (i % 256) for i in range(1_400_000)) + b"t.", "more memory"),
    "integers": (lambda: b"(" + b"M\x01\x02" * 1_900_000 + b"t.", "more memory"),
    "lists": (lambda: b"(" + b"]" * 5_700_000 + b"t.", "more memory"),
    "tuples": (lambda: b"(" + b"N\x85" * 2_850_000 + b"t.", "more memory"),
    "floats": (lambda: b"(" + b"G\0\0\0\0\0\0\0\1" * 600_000 + b"t.", "holds a tuple"),
    "objects": (lambda: b"cm\nn\nq\0(" + b"h\0)R" * 1_400_000 + b"t.", "more memory"),
    "dicts": (lambda: b"(" + b"}K\1K\2s" * 1_000_000 + b"t.", "more memory"),
    "one dict": (
        lambda: b"}(" + b"".join(b"J%bN" % struct.pack("<I", i) for i in range(900_000)) + b"u.",
        "more memory",
    ),
    "a memo": (
        lambda: b"(" + b"".join(b"Nr%bj%b" % ((struct.pack("<I", i),) * 2) for i in range(500_000)) + b"t.",
        "more memory",
    ),
}
ZIPS: Cases = {
    "sparse byteorder": (
        lambda: [(b"archive/data.pkl", b"N."), (b"archive/byteorder", 800_000_000)],
        r"byteorder is b'\\x00",
    ),
    "sparse pickle": (lambda: [(b"archive/data.pkl", 800_000_000)], "has 800000000 bytes, the limit is 25165824"),
    "a large directory": (lambda: empty_members(200_000), "has 10530158 bytes, the limit is 8388608"),
    "many members": (lambda: empty_members(70_000), "has 70001 members, the limit is 65536"),
}
CONFIGS: Cases = {
    "one text": (lambda: '{"a":"' + "x" * 33_000_000 + '"}', "read"),
    "wide text": (lambda: '{"a":"\U0001f600' + "x" * 11_000_000 + '"}', "read"),
    "wider text": (lambda: '{"a":"\U0001f600' + "x" * 20_000_000 + '"}', "could take 180000.* the limit is 100663296"),
    "lists": (lambda: '{"a":[' + ",".join(["[]"] * 3_000_000) + "]}", "could take 4"),
    "fewer lists": (lambda: '{"a":[' + ",".join(["[]"] * 650_000) + "]}", "read"),
    "objects": (lambda: '{"a":[' + ",".join(['{"b":1}'] * 290_000) + "]}", "read"),
    "names": (lambda: "{" + ",".join(f'"{i:x}":""' for i in range(350_000)) + "}", "read"),
    "depth": (lambda: '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nests deeper than 100 levels"),
    "open depth": (lambda: "[" * 100_000, "nests deeper than 100 levels"),
    "some depth": (lambda: '{"a":' + "[" * 200 + "]" * 200 + "}", "nests deeper than 100 levels"),
    "digits": (lambda: '{"a":' + "9" * 100_000 + "}", "a number has 100000 digits"),
    "NaN": (lambda: '{"a":NaN}', "NaN is no number"),
    "half a character": (lambda: '{"a":"\\ud800"}', "is not valid JSON"),
}
METADATA: Cases = {
    "lists": (lambda: b"]" * 5_700_000, "more memory"),
    "records": (lambda: CHUNK + b"h\0)\x81" * 1_400_000, "more memory"),
    "nothing": (lambda: b"N" * 5_700_000, "more operations"),
    "tuples": (lambda: b"N\x85" * 2_850_000, "more memory"),
}
GGUF: Cases = {
    "as many texts as may be": (lambda: gguf_array(8, 1_040_000, struct.pack("<Q", 8) + b"a" * 8), "read"),
    "texts": (lambda: gguf_array(8, 2_000_000, bytes(8)), "has 2000000 texts in arrays, more than 1048576"),
    "numbers": (lambda: gguf_array(6, 5_500_000, bytes(4)), "read"),
    "one text": (lambda: gguf_array(8, 1, struct.pack("<Q", 2**62)), "past the end of the file"),
    "a long text": (lambda: gguf_array(8, 1, struct.pack("<Q", 30_000_000) + bytes(30_000_000)), "the 25165824 bytes"),
    "tensors": (
        lambda: b"GGUF" + struct.pack("<IQQ", 3, 100_000, 0) + b"".join(
            struct.pack("<Q6sIIQ", 6, b"%06d" % i, 0, 0, 0) for i in range(100_000)
        ) + bytes(64),
        "'000001' lies in the one before it",
    ),
}  # fmt: skip
# By reader: the file's name, its content, its size.
OTHERS: dict[str, tuple[str, str, Callable[[], str], int | None, str]] = {
    "config of 100 MB": ("config", "config.json", lambda: "{", 10**8, "has 100000000 bytes, the limit is 33554432"),
    "manifest of 120 MB": ("manifest", MANIFEST, lambda: "{", 120_000_000, "its JSON has 120000000 bytes"),
    "metadata.json of 100 MB": ("native", "metadata.json", lambda: '{"sharded_backend":1}', 10**8, "read"),
    "metadata of 200 MB": ("dcp", ".metadata", lambda: "x", 2 * 10**8, "200000000 bytes, the limit is 134217728"),
    "tracker of 1 GB": (
        "native",
        "latest_checkpointed_iteration.txt",
        lambda: "x" * 300,
        10**9,
        "says 'x*', expected a number",
    ),
    "index of a million files": (
        "open",
        INDEX,
        lambda: "{" + " " * 33_777_795,  # as large as it is; what it says is not read
        None,
        "has 33777796 bytes, the limit is 33554432",
    ),
    "index of many files": (
        "open",
        INDEX,
        lambda: json.dumps({"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(150_000)}}),
        None,
        "names 150000 files, the limit is 16384",
    ),
}


def check(found: dict[str, Any], outcome: str) -> None:
    assert found["bytes"] < LIMIT
    assert found["yardsticks"] < TWO_SECONDS  # the slowest takes 24 yardsticks of 30
    assert re.search(outcome, found["outcome"]), found["outcome"]
    assert outcome == "read" or found["outcome"].startswith("CheckpointError: ")
    assert "\n" not in found["outcome"]
    assert len(found["outcome"]) < 1000


@pytest.mark.parametrize(("content", "outcome"), HEADERS.values(), ids=HEADERS)
def test_headers(content, outcome, tmp_path, reader):
    check(reader("open", safetensors(tmp_path, content())), outcome)


@pytest.mark.parametrize(("content", "outcome"), PICKLES.values(), ids=PICKLES)
def test_pickles(content, outcome, tmp_path, reader):
    check(reader("open", torch_file(tmp_path, content())), outcome)


@pytest.mark.parametrize(("members", "outcome"), ZIPS.values(), ids=ZIPS)
def test_zips(members, outcome, tmp_path, reader):
    check(reader("open", zipped(tmp_path, members(), wide=True)), outcome)


@pytest.mark.parametrize(("count", "outcome"), [(2**60, "the limit is 65536"), (1, "has 122 bytes, its 1 entries 62")])
def test_zips_that_say_they_have_so_many_members(count, outcome, tmp_path, reader):
    members = [(b"archive/data.pkl", b"N."), (b"archive/data/1", b"")]
    check(reader("open", zipped(tmp_path, members, count, wide=True)), outcome)


@pytest.mark.parametrize(("content", "outcome"), CONFIGS.values(), ids=CONFIGS)
def test_configurations(content, outcome, tmp_path, reader):
    check(reader("config", store(tmp_path, "config.json", content()) / "config.json"), outcome)


@pytest.mark.parametrize(("content", "outcome"), METADATA.values(), ids=METADATA)
def test_metadata(content, outcome, tmp_path, reader):
    check(reader("dcp", metadata(tmp_path, content())), outcome)


@pytest.mark.parametrize(("content", "outcome"), GGUF.values(), ids=GGUF)
def test_gguf(content, outcome, tmp_path, reader):
    (tmp_path / "x.gguf").write_bytes(content())
    check(reader("gguf", tmp_path / "x.gguf"), outcome)


@pytest.mark.parametrize(("kind", "name", "content", "size", "outcome"), OTHERS.values(), ids=OTHERS)
def test_other_files(kind, name, content, size, outcome, tmp_path, reader):
    folder = store(tmp_path, name, content(), size)
    check(reader(kind, folder / name if kind == "config" else folder), outcome)


@pytest.mark.parametrize(
    ("kind", "name"), [("config", "config.json"), ("open", "shard.safetensors"), ("open", "x.bin")]
)
def test_a_pipe_is_not_waited_for(kind, name, tmp_path, reader):
    os.mkfifo(tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    path = tmp_path / name if kind == "config" else tmp_path
    check(reader(kind, path), "It is a pipe|1 of them missing")
    os.symlink("/dev/zero", tmp_path / "zero.safetensors")
    check(reader("config", tmp_path / "zero.safetensors"), "It is a pipe, a socket or a device, no file")


@pytest.mark.slow
def test_what_large_checkpoints_need_is_read(tmp_path, reader):
    """100,000 tensors in a header, 20,000 in a pickle; the index of 140,000, and its record: no model has more."""
    names = [f"model.layers.{i // 400}.mlp.experts.{i}.gate_proj.weight" for i in range(140_000)]
    entry = '"%s":{"dtype":"BF16","shape":[1,2],"data_offsets":[%d,%d]}'
    header = "{" + ",".join(entry % (name, 4 * i, 4 * i + 4) for i, name in enumerate(names[:100_000])) + "}"
    path = safetensors(tmp_path, header)
    os.truncate(path, path.stat().st_size + 400_000)
    check(reader("open", path), "read")
    torch.save({name: torch.zeros(1) for name in names[:20_000]}, tmp_path / "x.bin")
    check(reader("open", tmp_path / "x.bin"), "read")
    (tmp_path / "moe").mkdir()
    shards = [f"model-{i % 163:05d}-of-00163.safetensors" for i in range(len(names))]
    (tmp_path / "moe" / INDEX).write_text(json.dumps({"weight_map": dict(zip(names, shards, strict=True))}, indent=2))
    check(reader("open", tmp_path / "moe"), "names 163 files, 163 of them missing")
    record = {"dtype": "bfloat16", "shape": [7168, 2048], "digest": "0" * 32}
    tensors = {name: {"file": shard, **record} for name, shard in zip(names, shards, strict=True)}
    manifest = {"format": 2, "plan": "", "lineage": {}, "tensors": tensors}
    (tmp_path / "moe" / MANIFEST).write_text(json.dumps(manifest, indent=2))
    found = reader("manifest", tmp_path / "moe")
    assert found["outcome"] == "read"
    assert found["bytes"] < 2 * LIMIT
