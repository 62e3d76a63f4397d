# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of torch.distributed.checkpoint (DCP) folders: sharded tensors as boxes of windows; nothing is executed.

A folder is a pickled `.metadata` and `__<rank>_<n>.distcp` files. The metadata gives each tensor's shape and chunks,
and for each chunk a byte range of a file that is a complete torch.save zip of its own. Chunks may be any boxes;
duplicates were removed on saving, so together they must tile the tensor, and a lost rank's file shows here.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import inert_pickle
from .dtypes import DType
from .errors import CheckpointError
from .inert_pickle import MAX_OPERATIONS, Inert, Record
from .plan import Box, PlanError, Shape, View
from .sharded import ShardedTensor
from .torch_file import TORCH_GLOBALS, read_torch_file

METADATA = ".metadata"
# A trillion parameters and their optimizer from 2,048 ranks: 43 MB, or 105 MB where megatron-core adds its plans.
_MAX_METADATA_BYTES = 128 * 2**20
_MAX_FRONT_BYTES = 64 * 1024  # before the elements of a chunk
_LOST = "copy the folder again, with every rank's files"


@dataclass(frozen=True)
class DistributedCheckpoint:
    """A DCP folder that is open for planning.

    Args:
        folder: its absolute path.
        tensors: every tensor that was asked for, by name.
        objects: every other entry by name: file, first byte and length of the torch.save zip that holds it.
    """

    folder: str
    tensors: dict[str, ShardedTensor]
    objects: dict[str, tuple[str, int, int]]


def read_distributed_checkpoint(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> DistributedCheckpoint:
    """Open a DCP folder; no tensor is loaded.

    Args:
        path: the folder with the `.metadata` file.
        wanted: whether an entry of that name is; of the others, which may be most of the folder, nothing is read.

    Raises:
        CheckpointError: the metadata is damaged, a chunk or a file is missing, or chunks do not tile their tensor.
    """
    folder = Path(os.path.abspath(path))
    where = str(folder / METADATA)
    entries, places = _read_metadata(folder, where, wanted)
    views = _read_chunks(places[name, start] for name, start in places if start is not None)
    tensors: dict[str, ShardedTensor] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    for name, entry in entries.items():
        if entry.name == "BytesStorageMetadata":
            objects[name] = _place(places, name, None, where)
        else:
            tensors[name] = _read_tensor(name, entry, places, views, where)
    return DistributedCheckpoint(str(folder), tensors, objects)


_Place = tuple[str, int, int]  # file, first byte, length
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


def _read_metadata(folder: Path, where: str, wanted: Callable[[str], bool]) -> tuple[dict[str, Inert], _Places]:
    """The entries that are wanted, by name, and where each of their chunks lies."""
    metadata = _load(folder / METADATA)
    entries: dict[str, Inert] = {}
    for name, entry in _dict(metadata, "state_dict_metadata", where).items():
        if not isinstance(name, str) or not isinstance(entry, Inert):
            raise CheckpointError(f"{where}: entry {str(name)[:80]!r} of state_dict_metadata is no tensor or object.")
        if wanted(name):
            entries[name] = entry
    return entries, _places(_dict(metadata, "storage_data", where), entries, folder, where)


def _load(path: Path) -> Inert:
    try:
        size = path.stat().st_size
        if size > _MAX_METADATA_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, the limit is {_MAX_METADATA_BYTES}.")
        tree = inert_pickle.load(path.read_bytes(), str(path), _GLOBALS, max_operations=max(MAX_OPERATIONS, size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(tree, Inert) or tree.name != "Metadata":
        raise CheckpointError(f"{path} is not the metadata of torch.distributed.checkpoint.")
    return tree


def _places(storage_data: dict[Any, Any], wanted: Mapping[str, Any], folder: Path, where: str) -> _Places:
    places: _Places = {}
    files: dict[str, tuple[str, int]] = {}  # by name: path and size
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
            if file != os.path.basename(file) or file in ("", ".", ".."):
                raise CheckpointError(f"{where}: {name} lies in {file!r}, which is not a file of the folder.")
            files[file] = str(folder / file), _file_size(folder / file, name)
        path, size = files[file]
        if start < 0 or length < 0 or start + length > size:
            raise CheckpointError(
                f"{path} has {size} bytes, {METADATA} puts {name} at {start} to {start + length}; {_LOST}."
            )
        places[name, offset if type(offset) is tuple else None] = (path, start, length)
    return places


def _file_size(path: Path, name: str) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise CheckpointError(f"{path} is missing; {METADATA} puts {name} there; {_LOST}.") from None


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


def _read_chunks(places: Iterable[_Place]) -> dict[_Place, Any]:
    """The tensor in each window, file by file in the files' order.

    torch writes chunks of one shape and type alike up to their first element, so the front of the first such zip tells
    where the elements of the others begin: what is compared is all that decides it, and nothing is assumed.
    """
    views: dict[_Place, Any] = {}
    fronts: dict[tuple[bytes, int], View] = {}
    lengths: dict[int, int] = {}
    descriptor, opened = -1, ""
    try:
        for place in sorted(places):
            file, start, length = place
            if file != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor, opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC), file
            front = os.pread(descriptor, lengths.get(length, 0), start)
            known = fronts.get((front, length))
            if known is not None:
                views[place] = replace(known, file=file, offset=start + len(front))
                continue
            view = views[place] = read_torch_file(file, start=start, length=length)
            if isinstance(view, View) and view.offset - start <= _MAX_FRONT_BYTES:
                lengths[length] = view.offset - start
                fronts[os.pread(descriptor, view.offset - start, start), length] = view
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return views


def _dict(metadata: Inert, name: str, where: str) -> dict[Any, Any]:
    value = vars(metadata).get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: has no {name}.")
    return value


def _are_sizes(value: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in value)
