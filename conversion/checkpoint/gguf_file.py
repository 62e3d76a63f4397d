# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The GGUF reader: the header of a file of llama.cpp's becomes windows of it; no tensor is loaded.

    "GGUF", u32 version (3), u64 tensors, u64 settings            all little-endian
    each setting      name, u32 type, value; a text is u64 bytes and UTF-8, an array u32 type, u64 count and the values
    each tensor       name, u32 dimensions, u64 each (the one that runs fastest first), u32 type, u64 offset
    zeros up to a multiple of `general.alignment` (32), from where offsets count
    the tensors, each followed by zeros up to such a multiple

A model in several files has all settings but `split.*` in the first one. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .bytes import ByteSource, OpenBytes, Where, reading
from .dtypes import BY_NAME, Q8_0, DType
from .errors import CheckpointError
from .folder_formats import FolderFormat, register
from .plan import View

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_NAME_BYTES = 63  # of a tensor, as ggml keeps it
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

Value: TypeAlias = "bool | str | np.generic | np.ndarray | list[str]"
"""Of a setting: a numpy scalar or a one-dimensional array where the format has a number of that type, or several."""

NUMBERS: dict[int, np.dtype] = {
    number: np.dtype(name)
    for number, name in enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "", "", "", "<u8", "<i8", "<f8"))
    if name
}
BOOL, TEXT, ARRAY = 7, 8, 9

# Every type of ggml's that a model on a disk may have: values and bytes of its blocks.
_BLOCKS: dict[int, tuple[str, int, int]] = {
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    10: ("q2_K", 256, 84),
    11: ("q3_K", 256, 110),
    12: ("q4_K", 256, 144),
    13: ("q5_K", 256, 176),
    14: ("q6_K", 256, 210),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    29: ("iq1_m", 256, 56),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}
TYPES: dict[int, DType] = {
    0: BY_NAME["float32"],
    1: BY_NAME["float16"],
    8: Q8_0,
    24: BY_NAME["int8"],
    25: BY_NAME["int16"],
    26: BY_NAME["int32"],
    27: BY_NAME["int64"],
    28: BY_NAME["float64"],
    30: BY_NAME["bfloat16"],
    **{n: DType(name, "", "", np.dtype(f"V{size}"), packed=values) for n, (name, values, size) in _BLOCKS.items()},
}

# A vocabulary of 262,000 pieces and its merges make 17 MB, and 850,000 texts, which are walked through one by one.
_MAX_HEADER_BYTES = 24 * 2**20
_MAX_TEXTS = 1 << 20
_MAX_SETTINGS, _MAX_TENSORS, _MAX_DIMENSIONS = 65_536, 100_000, 4
_MAX_ALIGNMENT = 1 << 20
_UNUSED = 5  # type of a token
_PART = 1 << 18  # bytes read at a time
_AGAIN = "copy or download the file again"

# Names are the user's own, and a loader is told which; so none is loaded because it lies there, and no other
# checkpoint of a folder is in its way.
GGUF = register(FolderFormat("GGUF", loadable=(), weights=re.compile(r"(?!)")))


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Args:
        source: the file.
        settings: its key-value pairs. Of an array of texts there is only how many it has: `{"texts": n}`.
        tensors: in the order of their bytes, row-major as everywhere here; of blocks, a shape counts these.
    """

    source: ByteSource
    settings: dict[str, Any]
    tensors: dict[str, View]


@dataclass(frozen=True)
class GGUFModel:
    """A model of GGUF files, open for looking at it.

    Args:
        folder: where it lies.
        settings: of its first file.
        tensors: of all its files, by name.
        files: those.
    """

    folder: str
    settings: dict[str, Any]
    tensors: dict[str, View]
    files: tuple[ByteSource, ...]


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder, one for each model: of a model in several files the first."""
    found = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    return [path for path in found if (split := SPLIT.fullmatch(path.name)) is None or int(split["number"]) == 1]


def open_gguf(path: Path) -> GGUFModel:
    """Open a model: its file, its first one of several, or the folder that it lies in alone.

    Raises:
        CheckpointError: there is none, or several; a file is missing or damaged, or is not of this model.
    """
    first = _first_file(path)
    head = read_gguf(first)
    split = SPLIT.fullmatch(first.name)
    count = int(head.settings.get("split.count", 0)) if _is_number(head.settings.get("split.count", 0)) else 0
    if (count > 1) != bool(split) or (split and int(split["count"]) != count):
        raise CheckpointError(f"{first}: says that it is one of {max(count, 1)} files, its name says otherwise.")
    names = [f"{split['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(2, count + 1)] if split else []
    missing = [name for name in names if not (first.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{first}: is the first of {count} files, {missing[0]} is missing; {_AGAIN}.")
    headers = [head, *(read_gguf(first.parent / name) for name in names)]
    tensors: dict[str, View] = {}
    for number, header in enumerate(headers):
        if count > 1 and header.settings.get("split.no") != number:
            raise CheckpointError(
                f"{header.source}: says that it is file {header.settings.get('split.no')!r} of its model."
            )
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CheckpointError(f"{header.source}: has {min(twice)!r}, as another file of this model has; {_AGAIN}.")
        tensors |= header.tensors
    said = head.settings.get("split.tensors.count")
    if count > 1 and said != len(tensors):
        raise CheckpointError(f"{first}: announces {said} tensors, its {count} files have {len(tensors)}; {_AGAIN}.")
    return GGUFModel(str(first.parent), head.settings, tensors, tuple(header.source for header in headers))


def _first_file(path: Path) -> Path:
    path = path.absolute()
    if path.is_file():
        split = SPLIT.fullmatch(path.name)
        return path if split is None else path.with_name(f"{split['stem']}-00001-of-{split['count']}.gguf")
    found = gguf_files(path)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{path}: GGUF models there: {names}; give the path of one file.")
    return found[0]


def read_gguf(where: Where) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: the file cannot be read, is none, of another version, or damaged; or its header is larger than
            that of any model.
    """
    with reading(where) as data:
        head = _Head(data)
        if data.size < 24 or head.take(4) != MAGIC:
            raise CheckpointError(f"{data.name}: is no GGUF file.")
        version = head.number("<I")
        if version != VERSION:
            raise CheckpointError(f"{data.name}: is GGUF of version {version}, expected {VERSION}; convert it again.")
        tensors, settings = head.count(_MAX_TENSORS, "tensors"), head.count(_MAX_SETTINGS, "settings")
        found: dict[str, Any] = {}
        for _ in range(settings):
            name = head.text()
            if name in found:
                raise head.fault(f"{name!r} is set twice")
            found[name] = _value(head, head.number("<I"))
        entries = [_tensor(head) for _ in range(tensors)]
        source = data.identified((0, head.raw))
        alignment = found.get("general.alignment", ALIGNMENT)
        if not _is_number(alignment) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise head.fault(f"general.alignment is {alignment}, expected a power of two")
    begin = -(-len(head.raw) // int(alignment)) * int(alignment)
    return GGUFHeader(source, found, _windows(source, entries, begin, int(alignment)))


class _Head:
    """The head of a file, read as far as it is asked for."""

    def __init__(self, data: OpenBytes) -> None:
        self._data, self._read, self._at, self._texts = data, bytearray(), 0, 0

    @property
    def raw(self) -> bytes:
        """What was taken."""
        return bytes(memoryview(self._read)[: self._at])

    def fault(self, text: str) -> CheckpointError:
        """An error about what was just read."""
        return CheckpointError(f"{self._data.name}: {text}, at byte {self._at}; {_AGAIN}.")

    def _require(self, end: int) -> None:
        """Read up to a byte."""
        if end > min(self._data.size, _MAX_HEADER_BYTES):
            limit = "the file" if end > self._data.size else f"the {_MAX_HEADER_BYTES} bytes that a header may have"
            raise self.fault(f"the header goes on to byte {end}, past the end of {limit}")
        while len(self._read) < end:
            missing = min(max(_PART, end - len(self._read)), self._data.size - len(self._read))
            self._read += self._data.pread(len(self._read), missing)

    def take(self, size: int) -> bytes:
        """The next bytes."""
        begin, end = self._at, self._at + size
        self._require(end)
        self._at = end
        return bytes(memoryview(self._read)[begin:end])

    def number(self, format: str) -> Any:
        """The next number, as `struct` calls its type."""
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def count(self, most: int, what: str) -> int:
        """The next number, of things that follow."""
        count = self.number("<Q")
        if count > most:
            raise self.fault(f"announces {count} {what}, more than {most}")
        return int(count)

    def text(self) -> str:
        """The next text."""
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise self.fault("a text is not UTF-8") from None

    def skip_texts(self, count: int) -> None:
        """Pass over some texts."""
        self._texts += count
        if self._texts > _MAX_TEXTS:
            raise self.fault(f"has {self._texts} texts in arrays, more than {_MAX_TEXTS}")
        unpack, at = struct.Struct("<Q").unpack_from, self._at
        for _ in range(count):
            if at + 8 > len(self._read):
                self._require(at + 8)
            at += 8 + unpack(self._read, at)[0]
        self._require(at)
        self._at = at


def _value(head: _Head, kind: int) -> Any:
    if kind in NUMBERS:
        return np.frombuffer(head.take(NUMBERS[kind].itemsize), NUMBERS[kind])[0]
    if kind == BOOL:
        return head.take(1) != b"\0"
    if kind == TEXT:
        return head.text()
    if kind != ARRAY:
        raise head.fault(f"a setting has type {kind}, which GGUF does not have")
    inner = head.number("<I")
    count = head.count(_MAX_HEADER_BYTES, "values")
    if inner == TEXT:
        head.skip_texts(count)
        return {"texts": count}
    if inner == BOOL:
        return np.frombuffer(head.take(count), np.uint8) != 0
    if inner not in NUMBERS:
        raise head.fault(f"an array has values of type {inner}, which llama.cpp does not have")
    return np.frombuffer(head.take(count * NUMBERS[inner].itemsize), NUMBERS[inner])


def _tensor(head: _Head) -> tuple[str, list[int], int, int]:
    """Name, dimensions in the file's order, type and offset of a tensor."""
    name, dimensions = head.text(), head.number("<I")
    if dimensions > _MAX_DIMENSIONS:
        raise head.fault(f"tensor {name[:64]!r} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
    sizes = [head.number("<Q") for _ in range(dimensions)]
    return name, sizes, head.number("<I"), head.number("<Q")


def _windows(
    source: ByteSource, entries: list[tuple[str, list[int], int, int]], begin: int, alignment: int
) -> dict[str, View]:
    tensors: dict[str, View] = {}
    for name, sizes, kind, offset in entries:
        where = f"{source}: tensor {name[:64]!r}"
        if name in tensors:
            raise CheckpointError(f"{where} is there twice; {_AGAIN}.")
        dtype = TYPES.get(kind)
        if dtype is None:
            raise CheckpointError(
                f"{where} is of ggml's type {kind}, which this version does not know; update teleflm."
            )
        fast = sizes[0] if sizes else 1
        if fast % dtype.packed or math.prod(sizes) >= 2**62:
            raise CheckpointError(f"{where} has rows of {fast}, which no blocks of {dtype.packed} make; {_AGAIN}.")
        shape = (*reversed(sizes[1:]), fast // dtype.packed) if sizes else ()
        view = View.contiguous(source, begin + offset, shape, dtype)
        if offset % alignment or view.offset + view.nbytes > source.size:
            raise CheckpointError(
                f"{where} has {view.nbytes} bytes from {view.offset} on, the file {source.size} in all, in steps of "
                f"{alignment}; {_AGAIN}."
            )
        tensors[name] = view
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
    end = 0
    for name, view in ordered.items():
        if view.offset < end:
            raise CheckpointError(f"{source}: tensor {name[:64]!r} lies in the one before it; {_AGAIN}.")
        end = view.offset + view.nbytes
    return ordered


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)


def vocabulary(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of the vocabulary that a model's settings describe, and how many of these are pieces: the first ones."""
    kinds = settings.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray):
        return 0, 0
    used = np.nonzero(kinds != _UNUSED)[0]
    return len(kinds), int(used[-1]) + 1 if used.size else 0
