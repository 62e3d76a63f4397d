# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of torch.save files (`.bin`, `.pt`): tensors become windows of the file; nothing is loaded or executed.

The file is a zip of uncompressed members: `<root>/data.pkl`, the pickled object, and `<root>/data/<key>`, the bytes of
one storage each. In the pickle a tensor is a storage, an offset, sizes and strides, all in elements, so that tensors
which share a storage, as the parameters of one flat buffer do, stay windows of the same bytes.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from . import inert_pickle
from .dtypes import DTYPES, DType
from .errors import CheckpointError
from .inert_pickle import Inert, Rebuild
from .plan import View

# A torch.save file with 100,000 tensors stays well below both.
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_PICKLE_BYTES = 64 * 2**20
# numpy's bound; it keeps the product of a hostile shape cheap.
MAX_DIMENSIONS = 64

_AGAIN = "copy or download the file again"
_SAVE_AGAIN = "load it with torch.load(..., weights_only=True) in an isolated environment and torch.save it again"
# The first pickle of a file by torch.save before torch 1.6: the number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes of one storage in a file.

    Args:
        file: path of the file.
        offset: position of its first byte.
        nbytes: its size in bytes.
        dtype: the type of its elements; None where its class is unknown to this package or says nothing (untyped).
        name: its class and key in the archive, for messages.
    """

    file: str
    offset: int
    nbytes: int
    dtype: DType | None
    name: str


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor in a file that is no plain array of a known element type, and why."""

    reason: str


def read_torch_file(path: str | os.PathLike[str], *, start: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote, with a `View` for each tensor and parameter.

    Other objects than plain data are `Inert`; tensors that no `View` can describe (quantised, sparse, nested, on the
    meta device, of a subclass, complex) are `UnreadableTensor`, so that one of them does not block the rest. dtypes
    are `DType`, sizes are tuples, an OrderedDict is a dict.

    Args:
        path: the file.
        start: position in the file where the zip begins, in bytes, as in a `.distcp` file.
        length: its length, in bytes; to the end of the file unless given.

    Raises:
        CheckpointError: the file is no zip by torch.save, is damaged, or its pickle is.
    """
    archive = _open_archive(path, start, length)
    return inert_pickle.load(archive.pickled, f"{archive.file}: data.pkl", TORCH_GLOBALS, archive.storage)


def read_torch_tensors(path: str | os.PathLike[str]) -> dict[str, View]:
    """The tensors of a torch.save file that holds a flat state dict, in its order; none is loaded.

    Raises:
        CheckpointError: see `read_torch_file`; or the file holds something else, or a tensor no `View` can describe.
    """
    file = os.path.abspath(path)
    tree = read_torch_file(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} holds a {_class_name(tree)}, expected a state dict: tensors by name.")
    for name, value in tree.items():
        if isinstance(value, UnreadableTensor):
            raise CheckpointError(f"{file}: {name!r} is {value.reason}; save it as a plain tensor.")
        if not isinstance(name, str) or not isinstance(value, View):
            listed = ", ".join(repr(key)[:40] for key in list(tree)[:8]) + (", ..." if len(tree) > 8 else "")
            raise CheckpointError(
                f"{file} is not a flat state dict: entry {repr(name)[:80]} is a {_class_name(value)}, expected a "
                f"tensor; it holds {listed}."
            )
    return tree


def read_directory_bytes(path: str | os.PathLike[str]) -> bytes:
    """The zip directory and data.pkl as they lie in the file: what identifies it short of its tensors.

    Raises:
        CheckpointError: the file is no zip by torch.save.
    """
    archive = _open_archive(path, 0, None)
    return archive.directory + archive.pickled


def _class_name(value: Any) -> str:
    return value.qualified_name if isinstance(value, Inert) else type(value).__name__


# The zip.


@dataclass(frozen=True)
class _Archive:
    file: str
    directory: bytes
    pickled: bytes
    storages: dict[str, tuple[int, int]]  # key -> position in the file and size, in bytes

    def storage(self, persistent_id: Any) -> Storage:
        """The storage that a persistent id of torch.save refers to; ValueError for any other id."""
        match persistent_id:
            case ("storage", (_StorageClass() | Inert()) as kind, str() as key, _, int() as numel):
                pass
            case _:
                raise ValueError("it refers to something that is not a storage of the file")
        if key not in self.storages:
            raise ValueError(f"it refers to storage data/{key[:80]}, which the file lacks")
        offset, nbytes = self.storages[key]
        name = f"{kind.name[:80]} data/{key}"
        if isinstance(kind, Inert):
            return Storage(self.file, offset, nbytes, None, name)
        if nbytes != numel * kind.itemsize:
            raise ValueError(f"storage data/{key} has {nbytes} bytes, expected {numel} x {kind.itemsize}")
        return Storage(self.file, offset, nbytes, kind.dtype, name)


def _open_archive(path: str | os.PathLike[str], start: int, length: int | None) -> _Archive:
    file = os.path.abspath(path)
    try:
        with open(file, "rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            window = _Window(stream, start, file_bytes - start if length is None else length)
            if start < 0 or window.length < 0 or start + window.length > file_bytes:
                raise CheckpointError(
                    f"{file} has {file_bytes} bytes, expected a torch.save zip at bytes {start} to "
                    f"{start + window.length}; {_AGAIN}."
                )
            _refuse_other_formats(window, file)
            return _parse_archive(window, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None


class _Window(io.RawIOBase):
    """A part of a file as a stream of its own, for zipfile; refuses reads that no directory of a checkpoint needs."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream = stream
        self.start = start
        self.length = length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if position < 0:
            raise OSError("seek before the start")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self.length - self._position, 0)
        count = rest if size is None or size < 0 else min(size, rest)
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError(f"the zip directory has {count} bytes, the limit is {MAX_DIRECTORY_BYTES}")
        data = self.read_at(self._position, count)
        self._position += len(data)
        return data

    def read_at(self, position: int, size: int) -> bytes:
        """`size` bytes from `position` on, fewer at the end; the position of the stream stays."""
        return os.pread(self._stream.fileno(), max(min(size, self.length - position), 0), self.start + position)


def _refuse_other_formats(window: _Window, file: str) -> None:
    head = window.read_at(0, 512)
    if head.startswith(b"PK"):
        return
    if _LEGACY_MAGIC in head[:64]:
        raise CheckpointError(f"{file} was saved by torch before 1.6, not as a zip; {_SAVE_AGAIN}.")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{file} is a tar archive, as torch before 0.1.10 saved; {_SAVE_AGAIN}.")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise CheckpointError(f"{file} is a bare pickle, expected a torch.save zip; {_SAVE_AGAIN}.")
    raise CheckpointError(f"{file} begins with {head[:8]!r}, expected a torch.save zip (b'PK'); {_AGAIN}.")


def _parse_archive(window: _Window, file: str) -> _Archive:
    try:
        with zipfile.ZipFile(window) as archive:  # reads the directory and nothing else
            entries, directory_start = archive.infolist(), archive.start_dir
        members = _locate_members(window, entries, directory_start)
        root = _find_root(members)
        byteorder = members.get(f"{root}/byteorder")
        if byteorder and (order := window.read_at(*byteorder)) != b"little":
            raise ValueError(f"its byteorder is {order[:10]!r}, expected b'little'")
        pickled = _read_pickle(window, members[f"{root}/data.pkl"], entries, root)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{file} is truncated, damaged or no zip by torch.save: {error}; {_AGAIN}.") from None
    prefix = f"{root}/data/"
    storages = {
        name.removeprefix(prefix): (window.start + offset, size)
        for name, (offset, size) in members.items()
        if name.startswith(prefix)
    }
    directory = window.read_at(directory_start, window.length - directory_start)
    return _Archive(file, directory, pickled, storages)


def _locate_members(
    window: _Window, entries: list[zipfile.ZipInfo], directory_start: int
) -> dict[str, tuple[int, int]]:
    """Position and size, in bytes, of each member's content; ValueError where the two directories disagree."""
    members: dict[str, tuple[int, int]] = {}
    position = 0
    entries = sorted(entries, key=lambda entry: entry.header_offset)
    if entries and entries[0].header_offset != 0:
        raise ValueError(f"its first member begins at byte {entries[0].header_offset}, expected 0")
    for entry in entries:
        name = entry.filename
        if name in members:
            raise ValueError(f"member {name!r} occurs twice")
        if entry.flag_bits & _ENCRYPTED or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"member {name!r} is compressed or encrypted, torch.save stores; {_SAVE_AGAIN}")
        if entry.header_offset < position:
            raise ValueError(f"member {name!r} begins at byte {entry.header_offset}, inside the one before it")
        header = window.read_at(entry.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"member {name!r} has no header at byte {entry.header_offset}")
        # The extra field that aligns the content differs from the one in the directory.
        name_bytes, extra_bytes = struct.unpack("<26xHH", header)
        offset = entry.header_offset + 30 + name_bytes + extra_bytes
        position = offset + entry.file_size
        if entry.compress_size != entry.file_size or position > directory_start:
            raise ValueError(
                f"member {name!r} has {entry.file_size} bytes from byte {offset} on, the directory begins at "
                f"{directory_start}"
            )
        members[name] = (offset, entry.file_size)
    return members


def _find_root(members: dict[str, tuple[int, int]]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} members named <root>/data.pkl, expected 1")
    if f"{roots[0]}/constants.pkl" in members:
        raise ValueError("it is a TorchScript program; save the state_dict() of the model instead")
    return roots[0]


def _read_pickle(window: _Window, member: tuple[int, int], entries: list[zipfile.ZipInfo], root: str) -> bytes:
    offset, size = member
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {size} bytes, the limit is {MAX_PICKLE_BYTES}")
    pickled = window.read_at(offset, size)
    expected = next(entry.CRC for entry in entries if entry.filename == f"{root}/data.pkl")
    if expected and expected != zlib.crc32(pickled):  # torch writes 0 where it was told to skip checksums
        raise ValueError(f"data.pkl has checksum {zlib.crc32(pickled):08x}, the directory says {expected:08x}")
    return pickled


# The pickle: what its global names mean.


@dataclass(frozen=True, slots=True)
class _StorageClass:
    name: str
    dtype: DType | None
    itemsize: int


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    match args:
        case (sizes,) if _are_sizes(sizes):
            return sizes
        case _:
            raise ValueError("a torch.Size is made from something else than integers")


def _tensor(args: tuple[Any, ...]) -> View | UnreadableTensor:
    match args:
        case (Storage() as storage, offset, sizes, strides):
            return _view(storage, storage.dtype, offset, sizes, strides, None)
        case (Storage() as storage, offset, sizes, strides, _, _, *metadata):
            return _view(storage, storage.dtype, offset, sizes, strides, *metadata[:1] or [None])
        case _:
            raise ValueError("a tensor is made from something else than a storage, offset, sizes and strides")


def _tensor_with_dtype(args: tuple[Any, ...]) -> View | UnreadableTensor:
    match args:
        case (Storage(dtype=None) as storage, offset, sizes, strides, _, _, DType() as dtype, *metadata):
            return _view(storage, dtype, offset, sizes, strides, *metadata[:1] or [None])
        case (Storage(), _, _, _, _, _, Inert(module="torch", args=None) as dtype, *_):
            return UnreadableTensor(f"a tensor of dtype {dtype.qualified_name}, unknown to this package")
        case _:
            raise ValueError("a tensor is made from something else than a storage, offset, sizes, strides and dtype")


def _view(
    storage: Storage, dtype: DType | None, offset: Any, sizes: Any, strides: Any, metadata: Any
) -> View | UnreadableTensor:
    if dtype is None:
        return UnreadableTensor(f"a tensor on a {storage.name.partition(' ')[0]}, unknown to this package")
    if metadata:  # torch's lazy negation and conjugation: the bytes are not the values
        return UnreadableTensor("a lazily negated or conjugated tensor")
    if not (_are_sizes(sizes) and _are_sizes(strides) and _are_sizes((offset,)) and len(sizes) == len(strides)):
        raise ValueError(f"a tensor on {storage.name} has no valid offset, sizes and strides")
    view = View(storage.file, storage.offset + offset * dtype.itemsize, sizes, strides, dtype)
    if view.nbytes >= 2**63:
        raise ValueError(f"a tensor of shape {sizes} on {storage.name} has 2^63 bytes or more")
    excess = max(view.span) - (storage.offset + storage.nbytes)
    if excess > 0:
        raise ValueError(
            f"a tensor of shape {sizes} with strides {strides} and offset {offset} reaches {excess} bytes past its "
            f"storage, {storage.name} of {storage.nbytes} bytes"
        )
    return view


def _are_sizes(value: Any) -> bool:
    return (
        type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _parameter(args: tuple[Any, ...]) -> View | UnreadableTensor:
    match args:
        case (View() | UnreadableTensor() as data, *_):
            return data
        case _:
            raise ValueError("a parameter is made from something else than a tensor")


def _tensor_of_type(args: tuple[Any, ...]) -> View | UnreadableTensor:
    match args:
        case (Rebuild(function=rebuild), Inert(args=None) as kind, tuple() as inner, *_) if rebuild in _REBUILDERS:
            tensor = rebuild(inner)
            return tensor if kind.qualified_name in _PLAIN_TYPES else _of_subclass(kind)
        case (_, Inert() as kind, *_):
            return _of_subclass(kind)
        case _:
            raise ValueError("a tensor with a type is made from something else than a function, a type and arguments")


def _of_subclass(kind: Inert) -> UnreadableTensor:
    return UnreadableTensor(f"a tensor of class {kind.qualified_name[:100]}")


def _unreadable(reason: str) -> Rebuild:
    return Rebuild(lambda args: UnreadableTensor(reason))


_REBUILDERS: tuple[Callable[[tuple[Any, ...]], View | UnreadableTensor], ...] = (
    _tensor,
    _tensor_with_dtype,
    _parameter,
)
_PLAIN_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_UNTYPED = _StorageClass("UntypedStorage", None, 1)

# Also what the metadata of torch.distributed.checkpoint is read with.
TORCH_GLOBALS: dict[tuple[str, str], Any] = {
    **{("torch", dtype.name): dtype for dtype in DTYPES},
    **{("torch", dtype.storage): _StorageClass(dtype.storage, dtype, dtype.itemsize) for dtype in DTYPES},
    ("torch", "UntypedStorage"): _UNTYPED,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("torch.storage", "_UntypedStorage"): _UNTYPED,
    ("torch", "Size"): Rebuild(_size),
    ("torch._utils", "_rebuild_tensor"): Rebuild(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Rebuild(_tensor_with_dtype),
    ("torch._utils", "_rebuild_parameter"): Rebuild(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Rebuild(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Rebuild(_tensor_of_type),
    ("torch._utils", "_rebuild_qtensor"): _unreadable("a quantised tensor"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("a nested tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("a tensor on the meta device, without values"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unreadable("a tensor of a subclass without storage"),
}
