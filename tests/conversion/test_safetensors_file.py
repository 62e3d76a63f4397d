# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The safetensors reader against the safetensors library: the same bytes for what both accept, the same refusals."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from conversion.checkpoint.dtypes import DTYPES, DType
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.safetensors_file import read_header, read_safetensors
from tests.fixtures.yardstick import TWO_SECONDS, counted

SHAPES = [(3, 5), (7,), (), (0,), (2, 0, 3), (1, 2, 3, 4)]


def sample(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits: nothing may depend on what they mean."""
    data = torch.randint(0, 2 if dtype.name == "bool" else 256, (math.prod(shape) * dtype.itemsize,))
    return data.to(torch.uint8).view(getattr(torch, dtype.name)).view(shape)


def encode(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand; `header` is JSON text or what to dump as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def reference_accepts(path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


def test_bytes_of_every_dtype_and_shape(tmp_path):
    known = [dtype for dtype in DTYPES if dtype.code and hasattr(torch, dtype.name)]
    tensors = {
        f"{dtype}.{shape}": sample(dtype, shape) for dtype in known for shape in SHAPES if shape or dtype.packed < 2
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt", "né": "值"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "né": "值"}
    with safe_open(path, "pt") as reference, FileReader() as reader:
        assert set(header.tensors) == set(reference.keys())
        for name, view in header.tensors.items():
            expected = reference.get_tensor(name)
            assert (view.shape, view.dtype.name) == (tuple(expected.shape), str(expected.dtype).split(".")[1])
            assert reader.read(view).tobytes() == expected.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode({"b": entry(offsets=[8, 16]), "a": entry(offsets=[0, 8])}, bytes(16)))
    assert list(read_safetensors(path)) == ["a", "b"]
    assert read_header(path).raw == path.read_bytes()[:-16]


@pytest.mark.parametrize(
    "content",
    [
        encode({}),
        encode({"__metadata__": {}}),
        encode({"__metadata__": None, "a": entry()}, bytes(8)),
        encode(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      ', bytes(8)),
        encode({"a": entry("U8", [3], [0, 3]), "b": entry("F32", [1], [3, 7])}, bytes(7)),  # unaligned
        encode({"a": entry(shape=[0], offsets=[0, 0]), "b": entry(), "c": entry("I8", [5, 0], [8, 8])}, bytes(8)),
        encode({"a": entry(shape=[], offsets=[0, 4])}, bytes(4)),
        encode({"a": {**entry(), "note": "unknown fields are none of our business"}}, bytes(8)),
    ],
    ids=["empty", "no_metadata", "null_metadata", "padded", "unaligned", "zero_size", "scalar", "unknown_field"],
)
def test_accepts_what_the_library_accepts(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert reference_accepts(path)
    with safe_open(path, "pt") as file:
        assert set(read_safetensors(path)) == set(file.keys())


OVERFLOW = [2**62, 2**62]
REFUSED = {
    "no_bytes": (b"", "has 0 bytes"),
    "no_header": (b"\x08\0\0\0", "has 4 bytes"),
    "header_of_10_gb": (encode({}, length=10**10), "header of 10000000000 bytes, the limit is 16777216"),
    "header_past_end": (encode({}, length=100), "header of 100 bytes but has 10 bytes"),
    "a_zip": (b"PK\x03\x04" + bytes(100), "announces a header"),
    "not_json": (encode(b"{]"), "is not valid JSON"),
    "not_utf8": (encode(b'{"\xff": 1}'), "is not valid JSON"),
    "lone_surrogate": (encode(rb'{"\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "not valid JSON"),
    "a_list": (encode([]), "begins with b'\\['"),
    "leading_space": (encode(b' {"a":1}'), "begins with b' '"),
    "deep_json": (encode(b'{"a":' + b"[" * 100_000), "tensor 'a' is not described by an object"),
    "many_digits": (encode(b'{"a":' + b"1" * 5000 + b"}"), "not valid JSON"),
    "entry_is_a_number": (encode({"a": 1}), "tensor 'a' is described by a JSON int"),
    "metadata_not_strings": (encode({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
    "metadata_is_a_list": (encode({"__metadata__": ["a"]}), "__metadata__ must map strings to strings"),
    "unknown_dtype": (encode({"a": entry("F7")}, bytes(8)), "tensor 'a' has dtype 'F7'"),
    "dtype_is_a_number": (encode({"a": entry(4)}, bytes(8)), "tensor 'a' has dtype 4"),
    "no_dtype": (encode({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "has dtype None"),
    "no_offsets": (encode({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "has data_offsets None"),
    "negative_size": (encode({"a": entry(shape=[-2])}, bytes(8)), r"has shape \[-2\]"),
    "fractional_size": (encode({"a": entry(shape=[2.0])}, bytes(8)), r"has shape \[2.0\]"),
    "boolean_size": (encode({"a": entry(shape=[True, 2])}, bytes(8)), r"has shape \[True, 2\]"),
    "shape_is_a_number": (encode({"a": entry(shape=2)}, bytes(8)), "has shape 2"),
    "huge_size": (encode({"a": entry(shape=[2**64, 0], offsets=[0, 0])}), r"has shape \[18446744073709551616, 0\]"),
    "size_overflows": (encode({"a": entry(shape=OVERFLOW)}, bytes(8)), "span 8 bytes, shape .* needs"),
    "three_offsets": (encode({"a": entry(offsets=[0, 8, 8])}, bytes(8)), r"has data_offsets \[0, 8, 8\]"),
    "offsets_reversed": (encode({"a": entry(offsets=[8, 0])}, bytes(8)), r"has data_offsets \[8, 0\]"),
    "offsets_too_narrow": (encode({"a": entry(offsets=[0, 4])}, bytes(4)), "span 4 bytes, shape .2. of F32 needs 8"),
    "truncated": (encode({"a": entry()}, bytes(7)), "is truncated: 76 bytes, its header describes 77"),
    "trailing_byte": (encode({"a": entry()}, bytes(9)), "has trailing bytes: 78 bytes, its header describes 77"),
    "trailing_after_nothing": (encode({}, bytes(1)), "has trailing bytes"),
    "overlap": (
        encode({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "tensor 'b' starts at byte 135, inside the tensor before it, which ends at 139",
    ),
    "same_bytes_twice": (encode({"a": entry(), "b": entry()}, bytes(8)), "'b' starts at byte .* inside"),
    "gap": (encode({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)), "bytes .* before tensor 'b', belong to no"),
    "gap_at_start": (encode({"a": entry(offsets=[4, 12])}, bytes(12)), "before tensor 'a', belong to no tensor"),
    "zero_size_inside": (
        encode({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)),
        "tensor 'b' starts at byte .* inside",
    ),
}
# The library keeps the last of two equal names, and counts more dimensions than numpy.
STRICTER = {
    "repeated_name": (
        encode(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            bytes(8),
        ),
        "'a' occurs twice",
    ),
    "65_dimensions": (encode({"a": entry(shape=[1] * 64 + [2])}, bytes(8)), "expected at most 64 sizes"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_the_library_refuses(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_header(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not reference_accepts(path)


@pytest.mark.parametrize(("content", "message"), STRICTER.values(), ids=STRICTER)
def test_refuses_more_than_the_library(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
    assert reference_accepts(path)


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_folder_and_an_absent_file(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / name)


def test_the_headers_of_a_1t_model_read_in_no_time(tmp_path):
    """75 files of 20 tensors and 28 GiB each, sparse."""
    shape, nbytes = [98304, 7680], 98304 * 7680 * 2
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(20)]
    header = {name: entry("BF16", shape, [i * nbytes, (i + 1) * nbytes]) for i, name in enumerate(names)}
    paths = [tmp_path / f"model-{i:05}-of-00075.safetensors" for i in range(75)]
    for path in paths:
        path.write_bytes(encode(header))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + 20 * nbytes)
    with counted() as taken:
        assert all(list(read_safetensors(path)) == names for path in paths)
    assert taken.yardsticks < TWO_SECONDS


VALID = save({"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.empty(0)}, {"format": "pt"})


@settings(max_examples=400, deadline=1000)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)
)
def test_mutations_are_read_or_refused(tmp_path_factory, splices):
    content = VALID
    for start, dropped, inserted in splices:
        content = content[:start] + inserted + content[start + dropped :]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_safetensors(path)
    except CheckpointError:
        return
    assert reference_accepts(path)
    assert max((view.span[1] for view in tensors.values()), default=0) <= len(content)
