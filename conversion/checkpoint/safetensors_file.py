# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The safetensors reader: a header of JSON becomes windows of the file; no tensor is loaded.

    8 bytes      n, little-endian
    n bytes      {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest     the tensors, back to back; offsets count from here

Every byte after the header must belong to exactly one tensor, as the reference library demands.
"""

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, TypeGuard

from .dtypes import BY_CODE
from .errors import CheckpointError
from .plan import View
from .strict_json import parse_json_object

# The reference library's limit: a header length beyond it is taken for damage, not for a need of memory.
MAX_HEADER_BYTES = 100_000_000
# numpy's bound; it keeps the product of a hostile shape cheap.
MAX_DIMENSIONS = 64

_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says of itself: its tensors in the order of their bytes, and its `__metadata__`."""

    tensors: dict[str, View]
    metadata: dict[str, str]


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, View]:
    """The tensors of a safetensors file, in the order of their bytes; none is loaded.

    Raises:
        CheckpointError: see `read_header`.
    """
    return read_header(path).tensors


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is truncated or too long, its header is no valid description of
            tensors, or tensors overlap or leave bytes out.
    """
    file = os.path.abspath(path)
    raw, file_bytes = _read_raw_header(file)
    fields = parse_json_object(raw[8:], f"{file}: the header")
    metadata = _parse_metadata(fields.pop("__metadata__", None), file)
    entries = [_parse_entry(name, entry, file, len(raw)) for name, entry in fields.items()]
    tensors = dict(sorted(entries, key=lambda entry: entry[1].span))
    _check_tiling(tensors, file, len(raw), file_bytes)
    return SafetensorsHeader(tensors, metadata)


def read_header_bytes(path: str | os.PathLike[str]) -> bytes:
    """The length field and the JSON of the header, as they lie in the file: what identifies it short of its tensors.

    Raises:
        CheckpointError: the file is too short for the header it announces.
    """
    return _read_raw_header(os.path.abspath(path))[0]


def _read_raw_header(file: str) -> tuple[bytes, int]:
    try:
        with open(file, "rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file} has {file_bytes} bytes, a safetensors file at least 8; {_AGAIN}.")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} announces a header of {header_bytes} bytes, the format allows {MAX_HEADER_BYTES}; "
                    f"this is not a safetensors file, or a damaged one: {_AGAIN}."
                )
            if 8 + header_bytes > file_bytes:
                raise CheckpointError(
                    f"{file} announces a header of {header_bytes} bytes but has {file_bytes} bytes in all; {_AGAIN}."
                )
            header = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    if header[:1] != b"{":
        raise CheckpointError(f"{file}: the header begins with {header[:1]!r}, expected b'{{'; {_AGAIN}.")
    return prefix + header, file_bytes


def _parse_metadata(metadata: Any, file: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings.")
    return metadata


def _parse_entry(name: str, entry: Any, file: str, data_start: int) -> tuple[str, View]:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by a JSON {type(entry).__name__}, expected an object.")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in BY_CODE:
        raise CheckpointError(f"{where} has dtype {code!r}; known are {', '.join(BY_CODE)}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has shape {_short(shape)}, expected at most {MAX_DIMENSIONS} sizes >= 0.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {_short(offsets)}, expected [start, stop].")
    start, stop = offsets
    expected = math.prod(shape) * BY_CODE[code].itemsize
    if stop - start != expected:
        raise CheckpointError(
            f"{where}: data_offsets {offsets} span {stop - start} bytes, shape {shape} of {code} needs {expected}."
        )
    return name, View.contiguous(file, data_start + start, shape, BY_CODE[code])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _check_tiling(tensors: dict[str, View], file: str, data_start: int, file_bytes: int) -> None:
    position = data_start
    for name, view in tensors.items():
        start, stop = view.span
        if start < position:
            raise CheckpointError(
                f"{file}: tensor {name!r} starts at byte {start}, inside the tensor before it, which ends at "
                f"{position}; {_AGAIN}."
            )
        if start > position:
            raise CheckpointError(
                f"{file}: bytes {position} to {start}, before tensor {name!r}, belong to no tensor; {_AGAIN}."
            )
        position = stop
    if position != file_bytes:
        fault = "is truncated" if position > file_bytes else "has trailing bytes"
        raise CheckpointError(f"{file} {fault}: {file_bytes} bytes, its header describes {position}; {_AGAIN}.")
