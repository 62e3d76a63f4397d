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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import inert_pickle
from .dtypes import DType
from .errors import CheckpointError
from .inert_pickle import Inert
from .plan import Box, PlanError, Shape, View
from .sharded import ShardedTensor
from .torch_file import MAX_PICKLE_BYTES, TORCH_GLOBALS, read_torch_file

METADATA = ".metadata"
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
        wanted: whether a tensor of that name is; of the others, which may be most of the folder, nothing is read.

    Raises:
        CheckpointError: the metadata is damaged, a chunk or a file is missing, or chunks do not tile their tensor.
    """
    folder = Path(os.path.abspath(path))
    metadata = _read_metadata(folder / METADATA)
    where = str(folder / METADATA)
    places = _places(metadata, folder, where)
    tensors: dict[str, ShardedTensor] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    for name, entry in _dict(metadata, "state_dict_metadata", where).items():
        if not isinstance(name, str) or not isinstance(entry, Inert):
            raise CheckpointError(f"{where}: entry {str(name)[:80]!r} of state_dict_metadata is no tensor or object.")
        if entry.name == "BytesStorageMetadata":
            objects[name] = _place(places, name, None, where)
        elif wanted(name):
            tensors[name] = _read_tensor(name, entry, places, where)
    return DistributedCheckpoint(str(folder), tensors, objects)


def _read_metadata(path: Path) -> Inert:
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, the limit is {MAX_PICKLE_BYTES}.")
        tree = inert_pickle.load(path.read_bytes(), str(path), TORCH_GLOBALS)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(tree, Inert) or tree.name != "Metadata":
        raise CheckpointError(f"{path} is not the metadata of torch.distributed.checkpoint.")
    return tree


_Places = dict[tuple[str, Shape | None], tuple[str, int, int]]


def _places(metadata: Inert, folder: Path, where: str) -> _Places:
    """Where each chunk (by name and offset) and object (by name) lies: file, first byte, length."""
    places: _Places = {}
    sizes: dict[str, int] = {}
    for index, info in _dict(metadata, "storage_data", where).items():
        match vars(index) if isinstance(index, Inert) else None, vars(info) if isinstance(info, Inert) else None:
            case (
                {"fqn": str() as name, **rest},
                {"relative_path": str() as file, "offset": int() as start, "length": int() as length, **more},
            ):
                pass
            case _:
                raise CheckpointError(f"{where}: an entry of storage_data has no name, file, offset and length.")
        if more.get("transform_descriptors"):
            raise CheckpointError(f"{where}: {name} is stored transformed (compressed?); save it without extensions.")
        if file != os.path.basename(file) or file in ("", ".", ".."):
            raise CheckpointError(f"{where}: {name} lies in {file!r}, which is not a file of the folder.")
        if file not in sizes:
            sizes[file] = _file_size(folder / file, name)
        if start < 0 or length < 0 or start + length > sizes[file]:
            raise CheckpointError(
                f"{folder / file} has {sizes[file]} bytes, {METADATA} puts {name} at {start} to {start + length}; "
                f"{_LOST}."
            )
        offset = rest.get("offset")
        places[name, offset if type(offset) is tuple else None] = (str(folder / file), start, length)
    return places


def _file_size(path: Path, name: str) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise CheckpointError(f"{path} is missing; {METADATA} puts {name} there; {_LOST}.") from None


def _place(places: _Places, name: str, offset: Shape | None, where: str) -> tuple[str, int, int]:
    if (name, offset) not in places:
        at = f" at {offset}" if offset is not None else ""
        raise CheckpointError(f"{where}: {name} has a chunk{at} that storage_data does not place; {_LOST}.")
    return places[name, offset]


def _read_tensor(name: str, entry: Inert, places: _Places, where: str) -> ShardedTensor:
    match vars(entry):
        case {"size": tuple() as shape, "chunks": list() as chunks} if _are_sizes(shape):
            pass
        case _:
            raise CheckpointError(f"{where}: {name} has no size and chunks.")
    boxes = [_box(chunk, len(shape), name, where) for chunk in chunks]
    read = tuple(_read_chunk(name, box, _place(places, name, box.start, where), where) for box in boxes if box.numel)
    dtypes = {view.dtype for _, view in read} or _declared_dtype(entry)
    if len(dtypes) != 1:
        listed = ", ".join(sorted(map(str, dtypes))) or "none"
        raise CheckpointError(f"{where}: {name} has chunks of dtypes {listed}, expected one.")
    tensor = ShardedTensor(shape, dtypes.pop(), read)
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
    match vars(chunk) if isinstance(chunk, Inert) else None:
        case {"offsets": tuple() as start, "sizes": tuple() as size} if _are_sizes(start) and _are_sizes(size):
            if len(start) == len(size) == dimensions:
                return Box(start, size)
    raise CheckpointError(f"{where}: a chunk of {name} has no offsets and sizes in {dimensions} dimensions.")


def _read_chunk(name: str, box: Box, place: tuple[str, int, int], where: str) -> tuple[Box, View]:
    file, start, length = place
    view = read_torch_file(file, start=start, length=length)
    if not isinstance(view, View):
        kind = getattr(view, "reason", type(view).__name__)
        raise CheckpointError(f"{file}: {name} at {box.start} is {kind}, expected a plain tensor.")
    if view.shape != box.size:
        raise CheckpointError(f"{file}: {name} at {box.start} has shape {view.shape}, {METADATA} says {box.size}.")
    if not box.size:  # a plan lays a scalar out as one element
        return Box((0,), (1,)), View(view.file, view.offset, (1,), (1,), view.dtype)
    return box, view


def _dict(metadata: Inert, name: str, where: str) -> dict[Any, Any]:
    value = vars(metadata).get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: has no {name}.")
    return value


def _are_sizes(value: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in value)
