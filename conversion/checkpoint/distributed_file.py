# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of torch.distributed.checkpoint (DCP) folders: sharded tensors as boxes of windows; nothing is executed.

A folder is a pickled `.metadata` and `__<rank>_<n>.distcp` files. The metadata gives each tensor's shape and chunks,
and for each chunk a byte range of a file that is a complete torch.save zip of its own. Chunks may be any boxes;
duplicates were removed on saving, so together they must tile the tensor, and a lost rank's file shows here.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import inert_pickle
from .bytes import ByteSource, OpenBytes, Where, full_name, reading
from .dtypes import DType
from .errors import CheckpointError
from .inert_pickle import MAX_MEMORY, MAX_OPERATIONS, Inert, Record
from .plan import Box, PlanError, Shape, View
from .sharded import ShardedTensor
from .torch_file import TORCH_GLOBALS, read_torch_part

METADATA = ".metadata"
# A trillion parameters and their optimizer from 2,048 ranks: 43 MB, or 105 MB where megatron-core adds its plans.
_MAX_METADATA_BYTES = 128 * 2**20
# What torch writes takes 4.5 opcodes in 10 bytes, and makes 12 bytes of each, a third of which stays.
_OPERATIONS_PER_10_BYTES, _MEMORY_PER_BYTE = 6, 14
_MAX_FRONT_BYTES = 64 * 1024  # before the elements of a chunk
_LOST = "copy the folder again, with every rank's files"


@dataclass(frozen=True)
class DistributedCheckpoint:
    """A DCP folder that is open for planning.

    Args:
        folder: its absolute path, or its URL.
        tensors: every tensor that was asked for, by name.
        objects: every other entry by name: file, first byte and length of the torch.save zip that holds it.
    """

    folder: str
    tensors: dict[str, ShardedTensor]
    objects: dict[str, tuple[str, int, int]]


def read_distributed_checkpoint(
    path: Where, wanted: Callable[[str], bool] = lambda name: True
) -> DistributedCheckpoint:
    """Open a DCP folder; no tensor is loaded.

    Args:
        path: the folder with the `.metadata` file.
        wanted: whether an entry of that name is; of the others, which may be most of the folder, nothing is read.

    Raises:
        CheckpointError: the metadata is damaged, a chunk or a file is missing, or chunks do not tile their tensor.
    """
    folder = full_name(path)
    where = f"{folder}/{METADATA}"
    entries, places = _read_metadata(where, wanted)
    views = _read_chunks(folder, places)
    tensors: dict[str, ShardedTensor] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    for name, entry in entries.items():
        if entry.name == "BytesStorageMetadata":
            file, start, length = _place(places, name, None, where)
            objects[name] = (f"{folder}/{file}", start, length)
        else:
            tensors[name] = _read_tensor(name, entry, places, views, where)
    return DistributedCheckpoint(folder, tensors, objects)


def chunk_name(file: str, entry: str, box: tuple[Shape, Shape] | None) -> str:
    """What a chunk is called in a plan and its record.

    Args:
        file: path of its file below the output folder.
        entry: name of its tensor.
        box: where it begins in the tensor and its shape; None where it is all of it.
    """
    part = ",".join(f"{start}:{start + size}" for start, size in zip(*box, strict=True)) if box else ""
    return f"{file}/{entry}" + (f"[{part}]" if box else "")


def read_chunks_by_name(folder: Path, place: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, View]:
    """Every chunk of a DCP folder that we wrote, by the name in its record; none is loaded.

    Args:
        folder: the one with the record.
        place: path of the DCP folder in it.
        wanted: see `read_distributed_checkpoint`.

    Raises:
        CheckpointError: see `read_distributed_checkpoint`.
    """
    chunks: dict[tuple[str, int], tuple[str, View]] = {}
    for entry, tensor in read_distributed_checkpoint(folder / place, wanted).tensors.items():
        for box, view in tensor.chunks:
            if view is None:
                continue
            whole = view.numel == tensor.numel
            shaped = replace(view, shape=(), strides=()) if not tensor.shape else view
            file = f"{place}/{os.path.basename(view.file.name)}"
            name = chunk_name(file, entry, None if whole else (box.start, box.size))
            chunks.setdefault((view.file.name, view.offset), (name, shaped))  # an entry may be the same as another
    return dict(chunks.values())


_Place = tuple[str, int, int]  # name of the file in the folder, first byte, length
_Places = dict[tuple[str, Shape | None], _Place]  # of each chunk, by name and offset, and each object, by name


# Of these there is one for each chunk of each tensor; the fields are what torch calls them.


@dataclass(slots=True, eq=False)
class _Chunk:
    offsets: Any = None
    sizes: Any = None


@dataclass(slots=True, eq=False)
class _Index:
    fqn: Any = None
    offset: Any = None


@dataclass(slots=True, eq=False)
class _Storage:
    relative_path: Any = None
    offset: Any = None
    length: Any = None
    transform_descriptors: Any = None


@dataclass(slots=True, eq=False)
class _Ignored:
    """Of the plans of every rank, which megatron-core keeps."""


_GLOBALS = {
    **TORCH_GLOBALS,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): Record(_Chunk),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): Record(_Index),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Record(_Storage),
    ("torch.distributed.checkpoint.planner", "WriteItem"): Record(_Ignored),
}


def _read_metadata(where: str, wanted: Callable[[str], bool]) -> tuple[dict[str, Inert], _Places]:
    """The entries that are wanted, by name, and where each of their chunks lies."""
    metadata = _load(where)
    entries: dict[str, Inert] = {}
    for name, entry in _dict(metadata, "state_dict_metadata", where).items():
        if not isinstance(name, str) or not isinstance(entry, Inert):
            raise CheckpointError(f"{where}: entry {str(name)[:80]!r} of state_dict_metadata is no tensor or object.")
        if wanted(name):
            entries[name] = entry
    return entries, _places(_dict(metadata, "storage_data", where), entries, where)


def _load(where: str) -> Inert:
    with reading(where) as data:
        pickled = data.read(0, data.size, limit=_MAX_METADATA_BYTES, what="the metadata")
    tree = inert_pickle.load(
        pickled,
        where,
        _GLOBALS,
        max_operations=max(MAX_OPERATIONS, len(pickled) * _OPERATIONS_PER_10_BYTES // 10),
        max_memory=max(MAX_MEMORY, len(pickled) * _MEMORY_PER_BYTE),
    )
    if not isinstance(tree, Inert) or tree.name != "Metadata":
        raise CheckpointError(f"{where} is not the metadata of torch.distributed.checkpoint.")
    return tree


def _places(storage_data: dict[Any, Any], wanted: Mapping[str, Any], where: str) -> _Places:
    places: _Places = {}
    files: dict[str, str] = {}  # one text a name, of which there are as many as chunks
    for index, info in storage_data.items():
        match index, info:
            case (
                _Index(fqn=str() as name, offset=offset),
                _Storage(relative_path=str() as file, offset=int() as start, length=int() as length),
            ):
                pass
            case _:
                raise CheckpointError(f"{where}: an entry of storage_data has no name, file, offset and length.")
        if name not in wanted:
            continue
        if info.transform_descriptors:
            raise CheckpointError(f"{where}: {name} is stored transformed (compressed?); save it without extensions.")
        if file not in files:
            if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file:
                raise CheckpointError(f"{where}: {name} lies in {file!r}, which is not a file of the folder.")
            files[file] = file
        if start < 0 or length < 0:
            raise CheckpointError(f"{where}: puts {name} at {start} to {start + length} of {file}; {_LOST}.")
        places[name, offset if type(offset) is tuple else None] = (files[file], start, length)
    return places


def _place(places: _Places, name: str, offset: Shape | None, where: str) -> _Place:
    if (name, offset) not in places:
        at = f" at {offset}" if offset is not None else ""
        raise CheckpointError(f"{where}: {name} has a chunk{at} that storage_data does not place; {_LOST}.")
    return places[name, offset]


def _read_tensor(name: str, entry: Inert, places: _Places, views: Mapping[_Place, Any], where: str) -> ShardedTensor:
    match vars(entry):
        case {"size": tuple() as shape, "chunks": list() as chunks} if _are_sizes(shape):
            pass
        case _:
            raise CheckpointError(f"{where}: {name} has no size and chunks.")
    boxes = [_box(chunk, len(shape), name, where) for chunk in chunks]
    read = []
    for box in boxes:
        if box.numel:
            place = _place(places, name, box.start, where)
            read.append(_check_chunk(name, box, views[place], place[0]))
    dtypes = {view.dtype for _, view in read} or _declared_dtype(entry)
    if len(dtypes) != 1:
        listed = ", ".join(sorted(map(str, dtypes))) or "none"
        raise CheckpointError(f"{where}: {name} has chunks of dtypes {listed}, expected one.")
    tensor = ShardedTensor(shape, dtypes.pop(), tuple(read))
    try:
        tensor.plan(name).check()
    except PlanError as error:
        raise CheckpointError(f"{where}: the chunks do not make up {error} {_LOST.capitalize()}.") from None
    return tensor


def _declared_dtype(entry: Inert) -> set[DType]:
    """The dtype of a tensor without elements, which no chunk tells."""
    match getattr(entry, "properties", None):
        case Inert(state=(DType() as dtype, *_)):
            return {dtype}
    return set()


def _box(chunk: Any, dimensions: int, name: str, where: str) -> Box:
    match chunk:
        case _Chunk(offsets=tuple() as start, sizes=tuple() as size) if _are_sizes(start) and _are_sizes(size):
            if len(start) == len(size) == dimensions:
                return Box(start, size)
    raise CheckpointError(f"{where}: a chunk of {name} has no offsets and sizes in {dimensions} dimensions.")


def _check_chunk(name: str, box: Box, view: Any, file: str) -> tuple[Box, View]:
    if not isinstance(view, View):
        kind = getattr(view, "reason", type(view).__name__)
        raise CheckpointError(f"{file}: {name} at {box.start} is {kind}, expected a plain tensor.")
    if view.shape != box.size:
        raise CheckpointError(f"{file}: {name} at {box.start} has shape {view.shape}, {METADATA} says {box.size}.")
    if not box.size:  # a plan lays a scalar out as one element
        return Box((0,), (1,)), View(view.file, view.offset, (1,), (1,), view.dtype)
    return box, view


# The chunks: each is a zip of its own, of which there may be a hundred thousand.


def _read_chunks(folder: str, places: _Places) -> dict[_Place, Any]:
    """The tensor in each window, file by file in the files' order.

    torch writes chunks of one shape and type alike up to their first element, so the front of the first such zip tells
    where the elements of the others begin: what is compared is all that decides it, and nothing is assumed.
    """
    views: dict[_Place, Any] = {}
    fronts = _Fronts()
    named = {place: name for (name, _), place in places.items()}
    chunks = {place for (_, offset), place in places.items() if offset is not None}
    for file, group in itertools.groupby(sorted(named), key=lambda place: place[0]):
        inside = list(group)
        with reading(f"{folder}/{file}", missing=f"{METADATA} puts {named[inside[0]]} there; {_LOST}") as data:
            source = data.identified()
            for place in inside:
                _, start, length = place
                if start + length > data.size:
                    raise CheckpointError(
                        f"{data.name} has {data.size} bytes, {METADATA} puts {named[place]} at {start} to "
                        f"{start + length}; {_LOST}."
                    )
                if place in chunks:
                    views[place] = fronts.read(data, source, start, length)
    return views


class _Fronts:
    """What was found before the elements of chunks, so that of those alike only the first is taken apart."""

    def __init__(self) -> None:
        self._views: dict[tuple[bytes, int], View] = {}
        self._sizes: dict[int, int] = {}  # of the front of the last chunk of a length

    def read(self, data: OpenBytes, source: ByteSource, start: int, length: int) -> Any:
        """The tensor in the zip at a place of an open file."""
        front = data.pread(start, min(self._sizes.get(length, 0), length))
        known = self._views.get((front, length))
        if known is not None:
            return replace(known, file=source, offset=start + len(front))
        view = read_torch_part(data, source, start, length)
        if isinstance(view, View) and 0 <= view.offset - start <= _MAX_FRONT_BYTES:
            self._sizes[length] = view.offset - start
            self._views[data.pread(start, view.offset - start), length] = view
        return view


def _dict(metadata: Inert, name: str, where: str) -> dict[Any, Any]:
    value = vars(metadata).get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: has no {name}.")
    return value


def _are_sizes(value: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in value)
