# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The safetensors reader: a header of JSON becomes windows of the file; no tensor is loaded.

    8 bytes      n, little-endian
    n bytes      {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest     the tensors, back to back; offsets count from here

Every byte after the header must belong to exactly one tensor, as the reference library demands. The header is parsed
an entry at a time, each into its window, because parsed whole it takes eight times its size.
"""

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from .bytes import ByteSource, OpenBytes, Where, reading, refuse_pointer
from .dtypes import BY_CODE
from .errors import CheckpointError
from .plan import View
from .strict_json import parse_json_object

# The reference library allows 100,000,000 bytes, which can make a reader take gigabytes. 100,000 tensors need 12 MB;
# the largest header in the field, of the 1T in one file, 150 KB.
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
_MAX_ENTRY_BYTES = 16 * 1024
_MAX_METADATA_MEMORY = 32 * 2**20
# numpy's bound; it keeps the product of a hostile shape cheap.
MAX_DIMENSIONS = 64

_AGAIN = "copy or download the file again"
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says of itself.

    Args:
        source: the file.
        tensors: in the order of their bytes.
        metadata: its `__metadata__`.
        raw: the length field and the JSON, as they lie in the file.
    """

    source: ByteSource
    tensors: dict[str, View]
    metadata: dict[str, str]
    raw: bytes


def read_safetensors(where: Where) -> dict[str, View]:
    """The tensors of a safetensors file, in the order of their bytes; none is loaded.

    Raises:
        CheckpointError: see `read_header`.
    """
    return read_header(where).tensors


def read_header(where: Where) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is truncated or too long, its header is no valid description of
            tensors, or larger than any checkpoint's, or tensors overlap or leave bytes out.
    """
    with reading(where) as data:
        raw = _read_raw_header(data)
        source = data.identified((0, raw))
    metadata: dict[str, str] | None = None
    tensors: dict[str, View] = {}
    for name, value in _members(raw, source.name):
        if name in tensors or (name == _METADATA and metadata is not None):
            raise CheckpointError(f"{source}: the header is not valid: {_short(name)} occurs twice; {_AGAIN}.")
        if name == _METADATA:
            metadata = _parse_metadata(value, source.name)
        else:
            tensors[name] = _read_entry(name, value, source, len(raw))
    spans = sorted((*view.span, name) for name, view in tensors.items())
    _check_tiling(spans, source.name, len(raw), source.size)
    return SafetensorsHeader(source, {name: tensors[name] for *_, name in spans}, metadata or {}, raw)


def identify(where: Where) -> ByteSource:
    """A safetensors file as a value; of its header only the length is looked at.

    Raises:
        CheckpointError: the file cannot be read, or is too short for the header it announces.
    """
    with reading(where) as data:
        return data.identified((0, _read_raw_header(data)))


def _read_raw_header(data: OpenBytes) -> bytes:
    if data.size < 8:
        raise CheckpointError(f"{data.name} has {data.size} bytes, a safetensors file at least 8; {_AGAIN}.")
    prefix = data.pread(0, 8)
    (header_bytes,) = struct.unpack("<Q", prefix)
    refuse_pointer(data.name, prefix)
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{data.name} announces a header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES} (100,000 "
            f"tensors need 12,000,000); this is not a safetensors file, or a damaged one: {_AGAIN}."
        )
    if 8 + header_bytes > data.size:
        raise CheckpointError(
            f"{data.name} announces a header of {header_bytes} bytes but has {data.size} bytes in all; {_AGAIN}."
        )
    header = prefix + data.pread(8, header_bytes)
    if header[8:9] != b"{":
        raise CheckpointError(f"{data.name}: the header begins with {header[8:9]!r}, expected b'{{'; {_AGAIN}.")
    return header


# The JSON, a member at a time: a name, and an object without others in it, which ends where its brace is closed.

_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_MEMBER = re.compile(
    _SPACE + b"(?P<name>" + _STRING + b")" + _SPACE + b":" + _SPACE
    + b"(?:(?P<object>" + rb'\{(?:[^{}"]++|' + _STRING + rb")*+\})|(?P<other>" + _STRING + rb'|[^,{}\[\]\s"]++|[{\[]))'
    + _SPACE + b"(?P<next>[,}])?+",
    re.DOTALL,
)  # fmt: skip
_NOTHING = re.compile(_SPACE + rb"\}")
_REST = re.compile(_SPACE)


def _members(raw: bytes, file: str) -> Iterator[tuple[str, Any]]:
    """The members of the header's object, in its order; names may repeat."""
    at = 9
    if nothing := _NOTHING.match(raw, at):
        at = nothing.end()
    for count in range(0 if nothing else MAX_TENSORS + 2):  # with __metadata__, and one too many
        member = _MEMBER.match(raw, at)
        if member is None:
            raise _invalid(file, at)
        if count > MAX_TENSORS:
            raise CheckpointError(f"{file} describes more than {MAX_TENSORS} tensors; no checkpoint has as many.")
        yield _parse_member(raw, member, file)
        at = member.end()
        if member["next"] == b"}":
            break
        if member["next"] is None:
            raise _invalid(file, at)
    rest = _REST.match(raw, at)
    if rest is None or rest.end() != len(raw):
        raise _invalid(file, at)


def _parse_member(raw: bytes, member: re.Match[bytes], file: str) -> tuple[str, Any]:
    name = _parse(raw, *member.span("name"), file)
    start, stop = member.span("object" if member["other"] is None else "other")
    if name == _METADATA and member["other"] in (b"{", b"["):
        raise CheckpointError(f"{file}: {_METADATA} must map strings to strings.")
    if name == _METADATA:
        metadata = b'{"%b":%b}' % (_METADATA.encode(), raw[start:stop])
        return name, parse_json_object(metadata, f"{file}: the header", limit=_MAX_METADATA_MEMORY)[_METADATA]
    if member["other"] in (b"{", b"["):
        text = f"is not described by an object of a dtype, a shape and data_offsets; {_AGAIN}."
        raise CheckpointError(f"{file}: tensor {_short(name)} {text}")
    if stop - start > _MAX_ENTRY_BYTES:
        text = f"is described by {stop - start} bytes, the limit is {_MAX_ENTRY_BYTES}."
        raise CheckpointError(f"{file}: tensor {_short(name)} {text}")
    return name, _parse(raw, start, stop, file)


def _parse(raw: bytes, start: int, stop: int, file: str) -> Any:
    """A name or a tensor's entry; no longer than the entries of a checkpoint are."""
    try:
        text = raw[start:stop].decode()
        value, end = _DECODER.raw_decode(text)
        if end != len(text):
            raise ValueError(f"{len(text) - end} characters too many")
        if type(value) is str and not value.isascii():
            value.encode()  # an escaped half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON at byte {start - 8}: {error}; {_AGAIN}.") from None
    return value


def _invalid(file: str, at: int) -> CheckpointError:
    return CheckpointError(f"{file}: the header is not valid JSON at byte {at - 8}; {_AGAIN}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _constant(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


# What it says.


def _parse_metadata(metadata: Any, file: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: {_METADATA} must map strings to strings.")
    return metadata


def _read_entry(name: str, entry: Any, source: ByteSource, data_start: int) -> View:
    try:
        return _parse_entry(entry, source, data_start)
    except ValueError as error:
        raise CheckpointError(f"{source}: tensor {_short(name)}{error}.") from None


def _parse_entry(entry: Any, source: ByteSource, data_start: int) -> View:
    """The window that an entry describes; ValueError says what else it does."""
    if not isinstance(entry, dict):
        raise ValueError(f" is described by a JSON {type(entry).__name__}, expected an object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f" has dtype {_short(code)}; known are {', '.join(BY_CODE)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f" has shape {_short(shape)}, expected at most {MAX_DIMENSIONS} sizes >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f" has data_offsets {_short(offsets)}, expected [start, stop]")
    if dtype.packed > 1 and (not shape or shape[-1] % dtype.packed):
        raise ValueError(
            f" has shape {_short(shape)} of {code}, of which {dtype.packed} share {dtype.itemsize} "
            f"byte{'s' * (dtype.itemsize > 1)}; rows that end inside of one cannot be read"
        )
    start, stop = offsets
    items = [*shape[:-1], shape[-1] // dtype.packed] if dtype.packed > 1 else shape
    expected = math.prod(items) * dtype.itemsize
    if stop - start != expected:
        raise ValueError(
            f": data_offsets {offsets} span {stop - start} bytes, shape {shape} of {code} needs {expected}"
        )
    return View.contiguous(source, data_start + start, items, dtype)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) or len(value) <= 100 else repr(value[:97])
    return text if len(text) <= 102 else text[:97] + "..."


def _check_tiling(spans: list[tuple[int, int, str]], file: str, data_start: int, file_bytes: int) -> None:
    position = data_start
    for start, stop, name in spans:
        if start < position:
            raise CheckpointError(
                f"{file}: tensor {_short(name)} starts at byte {start}, inside the tensor before it, which ends at "
                f"{position}; {_AGAIN}."
            )
        if start > position:
            raise CheckpointError(
                f"{file}: bytes {position} to {start}, before tensor {_short(name)}, belong to no tensor; {_AGAIN}."
            )
        position = stop
    if position != file_bytes:
        fault = "is truncated" if position > file_bytes else "has trailing bytes"
        raise CheckpointError(f"{file} {fault}: {file_bytes} bytes, its header describes {position}; {_AGAIN}.")
