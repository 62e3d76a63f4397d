# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The layout of a torch.save file, the counterpart of `torch_file.py`: what torch.load reads, planned without torch.

Everything but the tensors' bytes is known before any is there: the pickle, the directory, where each storage lies. The
one thing that depends on them, the checksum of each storage, is written as 0, as torch.save itself does after
`torch.serialization.set_crc32_options(False)`. torch.load never looks at it, nor does our reader; `unzip` would
complain. What the bytes are is in the manifest, as of any output.
"""

import hashlib
import struct
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from .containers import Shard
from .dtypes import DType
from .plan import TensorPlan, row_major_strides

_ALIGNMENT = 64  # of every member's content, as torch.save has it
_FORMAT_VERSION = b"3\n"  # of torch's zip files since 1.6
_MAX_32 = 0xFFFFFFFF  # stands for "see the zip64 field" where a size or position does not fit
_ZIP64_VERSION = 45
_UTF8_NAMES = 0x800


def torch_shard(filename: str, content: Any, *, state: bool = False) -> Shard:
    """The file that torch.save would write.

    Args:
        filename: path in the output folder.
        state: see `Shard`.
        content: what torch.load shall return: None, bool, int, float, str, lists, tuples, dicts, OrderedDicts,
            argparse.Namespaces, a `DType` for a torch.dtype, and a `TensorPlan` for each tensor.
    """
    tensors = list(planned_tensors(content))
    pickled = b"\x80\x02" + b"".join(opcodes(content, {id(t): str(key) for key, t in enumerate(tensors)})) + b"."
    storages = {f"data/{key}": tensor for key, tensor in enumerate(tensors)}
    members: dict[str, bytes | TensorPlan] = {
        "data.pkl": pickled,
        "byteorder": b"little",
        **storages,
        "version": _FORMAT_VERSION,
        ".data/serialization_id": _serialization_id(pickled),
    }
    laid_out = _zip_layout(filename, {f"{PurePosixPath(filename).stem}/{name}": m for name, m in members.items()})
    return replace(laid_out, state=state)


def planned_tensors(content: Any) -> Iterator[TensorPlan]:
    """The tensors in an object to be saved, in its order."""
    match content:
        case TensorPlan():
            yield content
        case Mapping():
            for item in content.values():
                yield from planned_tensors(item)
        case list() | tuple():
            for item in content:
                yield from planned_tensors(item)


def _serialization_id(pickled: bytes) -> bytes:
    """Forty digits, which torch logs; torch hashes names and data, and the data is not there yet."""
    return b"%040d" % (int.from_bytes(hashlib.sha256(pickled).digest(), "big") % 10**40)


# The zip: stored members, aligned through their headers' extra field.


def _zip_layout(filename: str, members: Mapping[str, bytes | TensorPlan]) -> Shard:
    fixed: list[tuple[int, bytes]] = []
    tensors: list[tuple[TensorPlan, int]] = []
    directory = b""
    position = 0
    for name, member in members.items():
        header, entry = _member_headers(name.encode(), member, position)
        directory += entry
        content = b"" if isinstance(member, TensorPlan) else member
        fixed.append((position, header + content))
        position += len(header) + len(content)
        if isinstance(member, TensorPlan):
            tensors.append((member, position))
            position += member.nbytes
    fixed.append((position, directory + _directory_end(len(members), len(directory), position)))
    return Shard(filename, tuple(fixed), tuple(tensors))


def _member_headers(name: bytes, member: bytes | TensorPlan, position: int) -> tuple[bytes, bytes]:
    """What stands before a member's content, and its entry in the directory."""
    size, checksum = (member.nbytes, 0) if isinstance(member, TensorPlan) else (len(member), zlib.crc32(member))
    is_long = size >= _MAX_32
    sizes = (_MAX_32, _MAX_32) if is_long else (size, size)
    version = _ZIP64_VERSION if is_long or position >= _MAX_32 else 0
    shared = (_UTF8_NAMES, 0, 0, 0, checksum, *sizes, len(name))

    here = _zip64_field(size, size) if is_long else b""
    unpadded = position + 30 + len(name) + len(here) + 4
    here += struct.pack("<2sH", b"FB", -unpadded % _ALIGNMENT) + b"Z" * (-unpadded % _ALIGNMENT)
    header = struct.pack("<4s5H3L2H", b"PK\3\4", version, *shared, len(here)) + name + here

    there = _zip64_field(*([size, size] if is_long else []), *([position] if position >= _MAX_32 else []))
    rest = (len(there), 0, 0, 0, 0, min(position, _MAX_32))
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", version, version, *shared, *rest) + name + there
    return header, entry


def _zip64_field(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _directory_end(count: int, size: int, position: int) -> bytes:
    """The end of a zip, in the wide form and in the narrow one, which every reader looks for first."""
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, count, count, size, position)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, position + size, 1)
    counts = (min(count, 0xFFFF),) * 2
    narrow = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *counts, min(size, _MAX_32), min(position, _MAX_32), 0)
    return wide + locator + narrow


# The pickle, protocol 2. Written by hand because a pickler imports what it names, and that would be torch.


def opcodes(value: Any, keys: Mapping[int, str]) -> Iterator[bytes]:
    """The opcodes that make an object.

    Args:
        value: see `torch_shard`.
        keys: the storage of each tensor in it by its id().
    """
    match value:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if value else b"\x89"
        case int():
            yield _integer(value)
        case float():
            yield b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            yield b"X" + struct.pack("<L", len(text)) + text
        case tuple():
            yield from _marked(value, b"t", keys)
        case list():
            yield b"]"
            yield from _marked(value, b"e", keys)
        case Mapping():
            yield _global("collections", "OrderedDict") + b")R" if isinstance(value, OrderedDict) else b"}"
            yield from _marked((part for item in value.items() for part in item), b"u", keys)
        case Namespace():
            yield _global("argparse", "Namespace") + b")\x81"
            yield from opcodes(vars(value), keys)
            yield b"b"
        case DType():
            yield _global("torch", value.name)
        case TensorPlan():
            yield from _tensor(value, keys)
        case _:
            raise TypeError(f"a torch.save file cannot hold a {type(value).__name__} here")


def _marked(items: Iterable[Any], opcode: bytes, keys: Mapping[int, str]) -> Iterator[bytes]:
    yield b"("
    for item in items:
        yield from opcodes(item, keys)
    yield opcode


def _tensor(tensor: TensorPlan, keys: Mapping[int, str]) -> Iterator[bytes]:
    """A call of torch._utils._rebuild_tensor_v2: storage, offset, size, stride, requires_grad, hooks.

    Where the type has no class of storage, that is untyped, and _rebuild_tensor_v3 is told the dtype.
    """
    untyped = not tensor.dtype.storage
    storage = _global("torch.storage", "UntypedStorage") if untyped else _global("torch", tensor.dtype.storage)
    yield _global("torch._utils", "_rebuild_tensor_v3" if untyped else "_rebuild_tensor_v2") + b"("
    yield b"(" + b"".join(opcodes("storage", keys)) + storage
    for part in (keys[id(tensor)], "cpu", tensor.nbytes if untyped else tensor.numel):
        yield from opcodes(part, keys)
    yield b"tQ"
    arguments: tuple[Any, ...] = (0, tensor.shape, row_major_strides(tensor.shape), False, OrderedDict())
    for argument in (*arguments, tensor.dtype) if untyped else arguments:
        yield from opcodes(argument, keys)
    yield b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
