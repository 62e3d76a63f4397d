# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The layout of GGUF files, the counterpart of `gguf_file.py`: what llama.cpp reads, all but the tensors' bytes."""

import struct
from collections.abc import Mapping, Sequence

import numpy as np

from .containers import Layout, Shard, tensor_groups
from .errors import CheckpointError
from .gguf_file import ALIGNMENT, ARRAY, BOOL, MAGIC, MAX_NAME_BYTES, NUMBERS, TEXT, TYPES, VERSION, Value
from .plan import TensorPlan

_NUMBER_TYPES: dict[np.dtype, int] = {dtype: number for number, dtype in NUMBERS.items()}
_TENSOR_TYPES = {dtype: number for number, dtype in TYPES.items()}
_MAX_FILES = 0xFFFF


def gguf_layout(stem: str, settings: Mapping[str, Value], tensors: Sequence[TensorPlan], max_shard_size: int) -> Layout:
    """A model as GGUF files: `STEM.gguf`, or `STEM-00001-of-000NN.gguf` and so on, as llama.cpp's own tools call them.

    Args:
        stem: of the file names.
        settings: the key-value pairs.
        tensors: in their order; those of a type of blocks count these.
        max_shard_size: most bytes of tensors in a file; a larger tensor has a file to itself.

    Raises:
        CheckpointError: GGUF has no such tensors, or not as many files.
    """
    groups = tensor_groups(tensors, max_shard_size)
    if len(groups) > _MAX_FILES:
        raise CheckpointError(f"{stem}: {len(groups)} files, GGUF has at most {_MAX_FILES}; raise --max-shard-size.")
    shards = []
    for number, group in enumerate(groups):
        split: dict[str, Value] = {}
        if len(groups) > 1:
            split = {
                "split.no": np.uint16(number),
                "split.count": np.uint16(len(groups)),
                "split.tensors.count": np.int32(len(tensors)),
            }
        own = {**settings, **split} if number == 0 else split
        filename = f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf" if split else f"{stem}.gguf"
        shards.append(_shard(filename, own, group))
    return Layout(tuple(shards))  # a loader is given the first file, which is put in place last


def _shard(filename: str, settings: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> Shard:
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(settings))]
    head += [_text(name) + _setting(value) for name, value in settings.items()]
    offset = 0
    for tensor in tensors:
        head.append(_tensor_info(tensor, offset))
        offset += tensor.nbytes + _padding(tensor.nbytes)
    content = b"".join(head)
    content += bytes(_padding(len(content)))
    fixed, placed, position = [(0, content)], [], len(content)
    for tensor in tensors:
        placed.append((tensor, position))
        position += tensor.nbytes
        if padding := _padding(position):
            fixed.append((position, bytes(padding)))
            position += padding
    return Shard(filename, tuple(fixed), tuple(placed))


def _padding(position: int) -> int:
    return -position % ALIGNMENT


def _tensor_info(tensor: TensorPlan, offset: int) -> bytes:
    name, kind = tensor.name.encode(), _TENSOR_TYPES.get(tensor.dtype)
    if len(name) > MAX_NAME_BYTES or kind is None:
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype}; GGUF has neither names of over {MAX_NAME_BYTES} bytes nor all types."
        )
    *slow, fast = tensor.shape
    sizes = [fast * tensor.dtype.packed, *reversed(slow)]
    return _text(tensor.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def _setting(value: Value) -> bytes:
    """The type of a value, and the value."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case str():
            return struct.pack("<I", TEXT) + _text(value)
        case np.ndarray():
            return (
                struct.pack("<IIQ", ARRAY, _NUMBER_TYPES[value.dtype.newbyteorder("<")], value.size) + value.tobytes()
            )
        case list():
            return struct.pack("<IIQ", ARRAY, TEXT, len(value)) + b"".join(map(_text, value))
    return struct.pack("<I", _NUMBER_TYPES[value.dtype.newbyteorder("<")]) + value.tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
