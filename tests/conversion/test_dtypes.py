# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Element types that are only copied: every one that safetensors or torch has, against their own files."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from conversion.checkpoint.dtypes import BY_CODE, BY_NAME, DTYPES
from conversion.checkpoint.errors import CheckpointError
from conversion.convert import convert_checkpoint
from conversion.inspect import inspect_checkpoint

TORCH = [dtype.name for dtype in DTYPES if hasattr(torch, dtype.name)]


def anything(name: str, shape: tuple[int, ...] = (4, 8)) -> torch.Tensor:
    """Any bits, NaNs among them."""
    dtype = BY_NAME[name]
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if name == "bool" else 256, (count,), generator=torch.Generator().manual_seed(0))
    return data.to(torch.uint8).view(getattr(torch, name)).view(shape)


def by_hand(path: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    header, data = {}, b""
    for name, (code, shape, nbytes) in entries.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + nbytes]}
        data += bytes(range(len(data) % 200, len(data) % 200 + nbytes))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def content(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """What the library reads, of types that torch does not have too."""
    return {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in deserialize(path.read_bytes())}


def test_the_library_knows_no_other_types(tmp_path):
    by_hand(tmp_path / "x.safetensors", {"a": ("X", [1], 1)})
    with pytest.raises(SafetensorError, match="unknown variant") as refusal:
        content(tmp_path / "x.safetensors")
    known = re.findall(r"`(\w+)`", str(refusal.value).partition("expected one of")[2])
    assert set(BY_CODE) == set(known)
    with pytest.raises(CheckpointError, match=r"tensor 'a' has dtype 'X'; known are BF16, ") as refusal:
        convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_every_type_of_torch_from_safetensors(dtype, tmp_path):
    """A cast is of the plain floats alone; where there are small ones, which come with scales, it is refused."""
    known = [name for name in TORCH if BY_NAME[name].code and not (dtype and re.match("float[468]_", name))]
    save_file({name: anything(name) for name in known}, tmp_path / "model.safetensors")
    convert_checkpoint(tmp_path, tmp_path / "out", dtype=dtype)
    before, after = content(tmp_path / "model.safetensors"), content(tmp_path / "out/model.safetensors")
    cast = ("float16", "bfloat16", "float32") if dtype else ()
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == set(cast)


def test_every_type_of_torch_from_a_pickle(tmp_path):
    tensors = {name: anything(name) for name in TORCH if BY_NAME[name].code}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    save_file(tensors, tmp_path / "expected.safetensors")
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert content(tmp_path / "out/model.safetensors") == content(tmp_path / "expected.safetensors")


def test_types_that_share_bytes(tmp_path):
    """Four-bit floats as torch has them, two in a byte; six-bit floats, which torch does not have."""
    packed = {
        "four": ("F4", [3, 2, 10], 30),
        "six": ("F6_E2M3", [5, 8], 30),
        "other six": ("F6_E3M2", [4], 3),
        "none": ("F6_E3M2", [3, 0], 0),
    }
    by_hand(tmp_path / "model.safetensors", packed)
    assert {name: tuple(value[:2]) for name, value in content(tmp_path / "model.safetensors").items()} == {
        name: tuple(value[:2]) for name, value in packed.items()
    }
    assert inspect_checkpoint(tmp_path).parameters == 60 + 40 + 4
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert content(tmp_path / "out/model.safetensors") == content(tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path / "out", check=True).damages == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("F4", [2, 3], 3), "has shape [2, 3] of F4, of which 2 share 1 byte; rows that end inside of one"),
        (("F6_E2M3", [2, 2], 3), "has shape [2, 2] of F6_E2M3, of which 4 share 3 bytes"),
        (("F4", [], 1), "has shape [] of F4"),
        (("F4", [4], 4), "data_offsets [0, 4] span 4 bytes, shape [4] of F4 needs 2"),
        (("C64", [4], 16), "data_offsets [0, 16] span 16 bytes, shape [4] of C64 needs 32"),
    ],
)
def test_rows_that_end_inside_of_a_byte(entry, message, tmp_path):
    by_hand(tmp_path / "model.safetensors", {"a": entry})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("complex128", "w is complex128, which safetensors has no name for"),
        ("complex32", "'w' is a tensor of dtype torch.complex32, unknown to this package; save it as a plain tensor"),
    ],
)
def test_types_that_safetensors_does_not_have(name, message, tmp_path):
    torch.save({"w": torch.zeros(3, dtype=getattr(torch, name))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
