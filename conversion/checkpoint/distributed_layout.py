# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The layout of a torch.distributed.checkpoint (DCP) folder, the counterpart of `distributed_file.py`, without torch.

Every tensor is cut into chunks, each a torch.save zip of its own; the zips follow each other in `__<n>_0.distcp` files,
and the pickled `.metadata` says which box of which tensor each of them is. A rank that loads the folder reads each
chunk that it needs some of, whole: so the size of a chunk bounds what a rank holds beside its own part, and how much is
read more than once.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from .containers import Shard
from .distributed_file import chunk_name
from .dtypes import DType
from .plan import Shape, TensorPlan
from .sharded import ShardedTensor
from .torch_zip import opcodes, torch_shard

_CHUNK_BYTES = 64 * 2**20
_MOST_CHUNKS = 2**15

KeyPath: TypeAlias = tuple[str | int, ...]
"""The keys that lead to an entry in the nested dict that torch loads; joined by dots they are the entry's name."""


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor of a folder.

    Args:
        shape: of all of it.
        dtype: of its elements.
        chunks: where each chunk begins in it, and the chunk's plan; together they tile it. The plans' names are not
            looked at.
    """

    shape: Shape
    dtype: DType
    chunks: tuple[tuple[Shape, TensorPlan], ...]

    @classmethod
    def whole(cls, plan: TensorPlan) -> "ChunkedTensor":
        """A tensor in one chunk."""
        return cls(plan.shape, plan.dtype, (((0,) * len(plan.shape), plan),))

    @classmethod
    def in_rows(cls, tensor: ShardedTensor, dtype: DType | None, most: int) -> "ChunkedTensor":
        """A tensor in chunks of whole rows, as equal as can be.

        Args:
            tensor: the tensor.
            dtype: of the output; the tensor's own unless given.
            most: bytes of a chunk, unless one row has more.
        """
        out = dtype or tensor.dtype
        rows = tensor.shape[0] if tensor.shape else 1
        count = min(-(-tensor.numel * out.itemsize // most), rows)
        if count <= 1:
            return cls.whole(tensor.plan("", dtype=out))
        size, extra = divmod(rows, count)
        sizes = [size + (number < extra) for number in range(count)]
        parts = zip(itertools.accumulate(sizes, initial=0), tensor.split(sizes, 0), strict=False)
        rest = (0,) * (len(tensor.shape) - 1)
        return cls(tensor.shape, out, tuple(((start, *rest), part.plan("", dtype=out)) for start, part in parts))

    def nonnegative(self) -> "ChunkedTensor":
        """The same, in which no value may be below zero, see `TensorPlan`."""
        return replace(self, chunks=tuple((start, replace(plan, nonnegative=True)) for start, plan in self.chunks))


@dataclass(frozen=True)
class SameAs:
    """An entry that is another one's very bytes, as the head of tied embeddings is.

    Args:
        path: of the other, a tensor that comes before it.
    """

    path: KeyPath


Entry: TypeAlias = ChunkedTensor | SameAs | Any
"""What an entry is: a tensor, the same as another entry, or a plain object that torch.save would pickle."""


def chunk_bytes(nbytes: int, shard_bytes: int) -> int:
    """Most bytes of a chunk: 64 MiB, or more where a folder would have more chunks than can be planned in no time.

    Args:
        nbytes: of all tensors of the folder.
        shard_bytes: most bytes of a file.
    """
    return min(max(_CHUNK_BYTES, -(-nbytes // _MOST_CHUNKS)), shard_bytes)


def distributed_shards(
    folder: str,
    entries: Mapping[KeyPath, Entry],
    shard_bytes: int,
    *,
    states: Mapping[KeyPath, Entry] | None = None,
    has_paths: bool = True,
) -> tuple[list[Shard], bytes]:
    """The files of a DCP folder, and the content of its `.metadata`.

    Args:
        folder: path of the folder below the output folder.
        entries: the weights, by the keys that lead there.
        shard_bytes: most bytes of tensors in a file, unless one chunk has more.
        states: what is no weights, in files of its own; see `Shard`.
        has_paths: whether the metadata keeps the keys, as torch's planner does of a nested dict; else entries are in
            one flat dict by name.
    """
    files = _Files(folder, shard_bytes)
    placed: dict[str, tuple[ChunkedTensor | None, list[_Place]]] = {}
    for part, is_state in ((entries, False), (states or {}, True)):
        files.begin(is_state=is_state)
        for path, entry in part.items():
            name = entry_name(path)
            if isinstance(entry, SameAs):
                placed[name] = placed[entry_name(entry.path)]
            elif isinstance(entry, ChunkedTensor):
                placed[name] = (entry, [files.add_chunk(name, entry, start, plan) for start, plan in entry.chunks])
            else:
                placed[name] = (None, [files.add_object(entry)])
    files.close()
    paths = {entry_name(path): path for path in (*entries, *(states or ()))} if has_paths else None
    return files.shards, _metadata(placed, paths)


def entry_name(path: KeyPath) -> str:
    """The name of an entry: its keys, joined by dots."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class _Place:
    """Where the zip of a chunk or an object is: the file's name in its folder, first byte, length."""

    file: str
    start: int
    length: int


class _Files:
    """The `.distcp` files of a folder, filled one after another."""

    def __init__(self, folder: str, shard_bytes: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._shard_bytes, self._is_state = folder, shard_bytes, False
        self._fixed: list[tuple[int, bytes]] = []
        self._tensors: list[tuple[TensorPlan, int]] = []
        self._end = self._filled = 0

    def begin(self, *, is_state: bool) -> None:
        """Begin a new file; what follows is state, or is not."""
        self.close()
        self._is_state = is_state

    def add_chunk(self, name: str, tensor: ChunkedTensor, start: Shape, plan: TensorPlan) -> _Place:
        """Put a chunk of a tensor at the end of the last file, or into a new one."""
        if self._tensors and self._filled + plan.nbytes > self._shard_bytes:
            self.close()
        box = None if plan.shape == tensor.shape else (start, plan.shape)
        named = replace(plan, name=chunk_name(f"{self._folder}/{self._file}", name, box))
        zipped = _chunk_zip(plan.shape, plan.dtype)
        self._fixed += [(self._end + at, content) for at, content in zipped.fixed]
        self._tensors.append((named, self._end + zipped.tensors[0][1]))
        self._filled += plan.nbytes
        return self._place(zipped.nbytes)

    def add_object(self, content: Any) -> _Place:
        """Put a plain object at the end of the last file."""
        zipped = torch_shard("archive", content)
        self._fixed.append((self._end, b"".join(part for _, part in sorted(zipped.fixed))))
        return self._place(zipped.nbytes)

    @property
    def _file(self) -> str:
        return f"__{len(self.shards)}_0.distcp"

    def _place(self, nbytes: int) -> _Place:
        place = _Place(self._file, self._end, nbytes)
        self._end += nbytes
        return place

    def close(self) -> None:
        """Finish the file that is being filled, if there is one."""
        if self._end:
            path = f"{self._folder}/{self._file}"
            self.shards.append(Shard(path, tuple(self._fixed), tuple(self._tensors), state=self._is_state))
        self._fixed, self._tensors, self._end, self._filled = [], [], 0, 0


@lru_cache(maxsize=1024)
def _chunk_zip(shape: Shape, dtype: DType) -> Shard:
    """What torch.save writes of a tensor: of those alike, of which there are as many as layers, the same but the data.

    The name is that which torch.save gives a zip whose file has none.
    """
    return torch_shard("archive", TensorPlan("", shape, dtype, ()))


# The metadata.

_METADATA = "torch.distributed.checkpoint.metadata"


def _metadata(
    placed: Mapping[str, tuple[ChunkedTensor | None, list[_Place]]], paths: Mapping[str, KeyPath] | None
) -> bytes:
    """The pickle of torch's `Metadata`; its state is made as it is written, as it has an object for each chunk."""
    fields = {
        "state_dict_metadata": _Pairs((name, _stored(entry)) for name, (entry, _) in placed.items()),
        "planner_data": None if paths is None else dict(paths),
        "storage_data": _Pairs(
            (_index(name, start, number), _storage(place))
            for name, (entry, places) in placed.items()
            for number, (start, place) in enumerate(zip(_starts(entry), places, strict=True))
        ),
        "storage_meta": None,
    }
    return _pickled(_Object(_METADATA, "Metadata", fields))


def _stored(entry: ChunkedTensor | None) -> "_Object":
    if entry is None:
        return _Object(_METADATA, "BytesStorageMetadata", {})
    chunks = [
        _Object(_METADATA, "ChunkStorageMetadata", {"offsets": _size(start), "sizes": _size(plan.shape)})
        for start, plan in entry.chunks
    ]
    fields = {"properties": _properties(entry.dtype), "size": _size(entry.shape), "chunks": chunks}
    return _Object(_METADATA, "TensorStorageMetadata", fields)


def _starts(entry: ChunkedTensor | None) -> Sequence[Shape | None]:
    return [None] if entry is None else [start for start, _ in entry.chunks]


def _properties(dtype: DType) -> "_Object":
    """dtype, layout, requires_grad, memory format, pin_memory."""
    layout = _Call("torch.serialization", "_get_layout", "torch.strided")
    contiguous = _Call(_METADATA, "_MEM_FORMAT_ENCODING", 0)
    return _Object(_METADATA, "TensorProperties", (dtype, layout, False, contiguous, False))


def _index(name: str, start: Shape | None, number: int) -> "_Object":
    of_chunk = {"index": None} if start is None else {"index": number, "offset": _size(start)}
    return _Object(_METADATA, "MetadataIndex", {"fqn": name, **of_chunk})


def _storage(place: _Place) -> "_Object":
    fields = {"relative_path": place.file, "offset": place.start, "length": place.length}
    return _Object("torch.distributed.checkpoint.filesystem", "_StorageInfo", fields)


def _size(shape: Shape) -> "_Call":
    return _Call("torch", "Size", shape)


# A pickle of protocol 2, written by hand because a pickler imports what it names, and that would be torch.


class _Object(NamedTuple):
    """An instance, made without its constructor, and its state."""

    module: str
    name: str
    state: Any


class _Call(NamedTuple):
    """What a class or function returns for one argument."""

    module: str
    name: str
    argument: Any


@dataclass(frozen=True)
class _Pairs:
    """A dict, whose keys cannot be hashed here."""

    items: Iterable[tuple[Any, Any]]


def _pickled(value: Any) -> bytes:
    parts = [b"\x80\x02"]
    _put(value, {}, parts.append)
    return b"".join((*parts, b"."))


def _put(value: Any, known: dict[Any, int], write: Callable[[bytes], None]) -> None:
    """Write the opcodes that make a value: a plain one, a dtype, or one of the three kinds above.

    Args:
        value: the value.
        known: the texts, classes and results of calls that were written before, each with its number: there are as many
            as chunks of them, and few that differ.
        write: takes the next bytes.
    """
    kind = type(value)
    if kind is _Object:
        _put_remembered((value.module, value.name), known, write)
        write(b")\x81")
        _put(value.state, known, write)
        write(b"b")
    elif kind is _Call or kind is str or kind is DType:
        _put_remembered(value, known, write)
    elif kind is dict or kind is _Pairs:
        write(b"}(")
        for key, item in value.items() if kind is dict else value.items:
            _put(key, known, write)
            _put(item, known, write)
        write(b"u")
    elif kind is tuple or kind is list:
        write(b"(" if kind is tuple else b"](")
        for item in value:
            _put(item, known, write)
        write(b"t" if kind is tuple else b"e")
    else:
        for part in opcodes(value, {}):
            write(part)


def _put_remembered(value: Any, known: dict[Any, int], write: Callable[[bytes], None]) -> None:
    number = known.get(value)
    if number is not None:
        write(b"h" + bytes((number,)) if number < 256 else b"j" + number.to_bytes(4, "little"))
        return
    if type(value) is _Call:
        _put_remembered((value.module, value.name), known, write)
        _put(value.argument, known, write)
        write(b"\x85R")
    elif type(value) is tuple:
        write(f"c{value[0]}\n{value[1]}\n".encode())
    else:
        for part in opcodes(value, {}):
            write(part)
    number = known[value] = len(known)
    write(b"q" + bytes((number,)) if number < 256 else b"r" + number.to_bytes(4, "little"))


__all__ = ["ChunkedTensor", "Entry", "KeyPath", "SameAs", "chunk_bytes", "distributed_shards", "entry_name"]
