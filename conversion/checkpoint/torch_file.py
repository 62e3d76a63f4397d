# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of torch.save files (`.bin`, `.pt`): tensors become windows of the file; nothing is loaded or executed.

The file is a zip of uncompressed members: `<root>/data.pkl`, the pickled object, and `<root>/data/<key>`, the bytes of
one storage each. In the pickle a tensor is a storage, an offset, sizes and strides, all in elements, so that tensors
which share a storage, as the parameters of one flat buffer do, stay windows of the same bytes.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import inert_pickle
from .bytes import ByteSource, OpenBytes, Where, reading, refuse_pointer
from .dtypes import DTYPES, DType
from .errors import CheckpointError
from .inert_pickle import Inert, Rebuild
from .plan import View
from .zip_directory import LOCAL_BYTES, Directory, Member, content_start, read_directory

# A torch.save file with 50,000 tensors stays below.
MAX_PICKLE_BYTES = 24 * 2**20
# numpy's bound; it keeps the product of a hostile shape cheap.
MAX_DIMENSIONS = 64

_AGAIN = "copy or download the file again"
_SAVE_AGAIN = "load it with torch.load(..., weights_only=True) in an isolated environment and torch.save it again"
# The first pickle of a file by torch.save before torch 1.6: the number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_BYTE_ORDER = b"little"


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes of one storage in a file.

    Args:
        file: the file.
        offset: position of its first byte.
        nbytes: its size in bytes.
        dtype: the type of its elements; None where its class is unknown to this package or says nothing (untyped).
        name: its class and key in the archive, for messages.
    """

    file: ByteSource
    offset: int
    nbytes: int
    dtype: DType | None
    name: str


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor in a file that is no plain array of a known element type, and why."""

    reason: str


def read_torch_file(where: Where, *, start: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote, with a `View` for each tensor and parameter.

    Other objects than plain data are `Inert`; tensors that no `View` can describe (quantised, sparse, nested, on the
    meta device, of a subclass, of a dtype unknown to this package) are `UnreadableTensor`, so that one of them does not
    block the rest. dtypes are `DType`, sizes are tuples, an OrderedDict is a dict.

    Args:
        where: the file.
        start: position in the file where the zip begins, in bytes, as in a `.distcp` file.
        length: its length, in bytes; to the end of the file unless given.

    Raises:
        CheckpointError: the file is no zip by torch.save, is damaged, or its pickle is.
    """
    return _read(where, start, length)[1]


def _read(where: Where, start: int = 0, length: int | None = None) -> tuple[ByteSource, Any]:
    """A file, or a part of one, and the object in it."""
    with reading(where) as data:
        is_part = start != 0 or length is not None
        archive = _read_archive(data, start, data.size - start if length is None else length)
        source = data.identified() if is_part else data.identified(*archive.header)
    return source, archive.load(source)


def read_torch_part(data: OpenBytes, source: ByteSource, start: int, length: int) -> Any:
    """The object in a zip that is a part of an open file; see `read_torch_file`.

    Args:
        data: the file.
        source: the same as a value.
        start, length: of the zip in it, in bytes.
    """
    return _read_archive(data, start, length).load(source)


def identify(where: Where) -> ByteSource:
    """A torch.save file as a value, or any other file: it is then known by its data alone.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(where) as data:
        try:
            return data.identified(*_read_archive(data, 0, data.size).header)
        except CheckpointError:  # a .distcp file, for one, is many zips in a row
            return data.identified()


def read_torch_tensors(where: Where) -> dict[str, View]:
    """The tensors of a torch.save file that holds a flat state dict, in its order; none is loaded.

    Raises:
        CheckpointError: see `read_state_dict`.
    """
    return read_state_dict(where)[1]


def tensors_within(content: Any, path: str) -> dict[str, View]:
    """Every tensor of an object that was saved, by `path` and the keys that lead to it, joined by dots."""
    if isinstance(content, View):
        return {path: content}
    if isinstance(content, dict):
        items: Any = content.items()
    else:
        items = enumerate(content) if isinstance(content, list | tuple) else ()
    lead = path if path.endswith("/") else f"{path}."
    return {name: view for key, item in items for name, view in tensors_within(item, f"{lead}{key}").items()}


def read_state_dict(where: Where) -> tuple[ByteSource, dict[str, View]]:
    """A torch.save file that holds a flat state dict, and its tensors, in its order; none is loaded.

    Raises:
        CheckpointError: see `read_torch_file`; or the file holds something else, or a tensor no `View` can describe.
    """
    file, tree = _read(where)
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
    return file, tree


def _class_name(value: Any) -> str:
    return value.qualified_name if isinstance(value, Inert) else type(value).__name__


# The zip.


@dataclass(frozen=True)
class _Archive:
    """A zip by torch.save.

    Args:
        file: name of the file.
        header: where its directory and its pickle are, and their bytes: what tells it from another one.
        pickled: content of data.pkl.
        storages: key -> position in the file and size, in bytes.
    """

    file: str
    header: tuple[tuple[int, bytes], ...]
    pickled: bytes
    storages: dict[str, tuple[int, int]]

    def load(self, source: ByteSource) -> Any:
        """The object, with windows of the source."""

        def storage(persistent_id: Any) -> Storage:
            return self._storage(persistent_id, source)

        return inert_pickle.load(self.pickled, f"{self.file}: data.pkl", TORCH_GLOBALS, storage)

    def _storage(self, persistent_id: Any, source: ByteSource) -> Storage:
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
            return Storage(source, offset, nbytes, None, name)
        if nbytes != numel * kind.itemsize:
            raise ValueError(f"storage data/{key} has {nbytes} bytes, expected {numel} x {kind.itemsize}")
        return Storage(source, offset, nbytes, kind.dtype, name)


def _read_archive(data: OpenBytes, start: int, length: int) -> _Archive:
    end = start + length
    if start < 0 or length < 0 or end > data.size:
        raise CheckpointError(
            f"{data.name} has {data.size} bytes, expected a torch.save zip at bytes {start} to {end}; {_AGAIN}."
        )
    _refuse_other_formats(data.pread(start, min(512, length)), data.name)
    try:
        return _parse_archive(data, read_directory(data, start, end))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{data.name} is truncated, damaged or no zip by torch.save: {error}; {_AGAIN}."
        ) from None


def _refuse_other_formats(head: bytes, file: str) -> None:
    if head.startswith(b"PK"):
        return
    refuse_pointer(file, head)
    if _LEGACY_MAGIC in head[:64]:
        raise CheckpointError(f"{file} was saved by torch before 1.6, not as a zip; {_SAVE_AGAIN}.")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{file} is a tar archive, as torch before 0.1.10 saved; {_SAVE_AGAIN}.")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise CheckpointError(f"{file} is a bare pickle, expected a torch.save zip; {_SAVE_AGAIN}.")
    raise CheckpointError(f"{file} begins with {head[:8]!r}, expected a torch.save zip (b'PK'); {_AGAIN}.")


def _parse_archive(data: OpenBytes, directory: Directory) -> _Archive:
    start, members = directory.start, directory.members
    root = _find_root(members)
    places = locate_members(data, directory)
    byteorder = places.get(f"{root}/byteorder")
    if byteorder and byteorder[1] > 0:
        order = data.pread(start + byteorder[0], min(byteorder[1], len(_BYTE_ORDER) + 1))
        if order != _BYTE_ORDER:
            raise ValueError(f"its byteorder is {order!r}, expected {_BYTE_ORDER!r}")
    offset, size = places[f"{root}/data.pkl"]
    pickled = data.read(start + offset, size, limit=MAX_PICKLE_BYTES, what="data.pkl")
    expected = members[f"{root}/data.pkl"].crc
    if expected and expected != zlib.crc32(pickled):  # torch writes 0 where it was told to skip checksums
        raise ValueError(f"data.pkl has checksum {zlib.crc32(pickled):08x}, the directory says {expected:08x}")
    prefix = f"{root}/data/"
    storages = {
        name.removeprefix(prefix): (start + at, nbytes)
        for name, (at, nbytes) in places.items()
        if name.startswith(prefix)
    }
    header = ((start + directory.position, directory.raw), (start + offset, pickled))
    return _Archive(data.name, header, pickled, storages)


def locate_members(data: OpenBytes, directory: Directory) -> dict[str, tuple[int, int]]:
    """Position in the zip and size, in bytes, of each member's content.

    Raises:
        ValueError: members overlap, or a header is not where the directory says.
    """
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for name, member in directory.members.items():
        if member.header < position or (position == 0 and member.header > 0):
            raise ValueError(f"member {name!r} begins at byte {member.header}, the one before it ends at {position}")
        local = data.pread(directory.start + member.header, min(LOCAL_BYTES, directory.position - member.header))
        offset = content_start(local, member.header, name)
        position = offset + member.size
        if position > directory.position:
            raise ValueError(
                f"member {name!r} has {member.size} bytes from byte {offset} on, the directory begins at "
                f"{directory.position}"
            )
        places[name] = (offset, member.size)
    return places


def _find_root(members: dict[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} members named <root>/data.pkl, expected 1")
    if f"{roots[0]}/constants.pkl" in members:
        raise ValueError("it is a TorchScript program; save the state_dict() of the model instead")
    return roots[0]


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
    **{
        ("torch", dtype.storage): _StorageClass(dtype.storage, dtype, dtype.itemsize)
        for dtype in DTYPES
        if dtype.storage
    },
    ("torch", "UntypedStorage"): _UNTYPED,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("torch.storage", "_UntypedStorage"): _UNTYPED,
    ("torch", "Size"): Rebuild(_size, nbytes=0),
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
