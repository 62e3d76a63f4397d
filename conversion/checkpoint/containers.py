# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How output tensors become files: shards, what they hold beside tensors, and the file that makes the folder loadable.

A `Layout` is data: a container is a function that makes one. `safetensors_layout` is the Hub's; `torch_zip.py` makes
the shards of torch.save folders, `gguf_layout.py` llama.cpp's files.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import CheckpointError
from .plan import PlanError, RowQuantised, RowScales, TensorPlan
from .safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS

_METADATA = "__metadata__"


@dataclass(frozen=True)
class Shard:
    """One output file: where each tensor starts in it, and what stands between them.

    Args:
        filename: its path in the output folder, with forward slashes.
        fixed: bytes that are no tensor's (headers, directories), each run with its position in the file.
        tensors: each tensor with the position of its first byte. Together with `fixed` they tile the file.
        twin: path of a file that already holds these very bytes and is to be linked to rather than written.
        state: whether it holds no weights but what training loads with them, as an optimizer's moments. Its tensors
            are named `filename/` and the keys that lead to them in what the file holds, joined by dots.
    """

    filename: str
    fixed: tuple[tuple[int, bytes], ...]
    tensors: tuple[tuple[TensorPlan, int], ...]
    twin: str | None = None
    state: bool = False

    @property
    def header(self) -> bytes:
        """What stands before the tensors."""
        return self.fixed[0][1]

    @cached_property
    def nbytes(self) -> int:
        """Size of the file, in bytes."""
        return sum(len(content) for _, content in self.fixed) + sum(tensor.nbytes for tensor, _ in self.tensors)

    @property
    def disk_bytes(self) -> int:
        """Room that it takes on the disk, in bytes: none where it is a link."""
        return 0 if self.twin else self.nbytes


@dataclass(frozen=True)
class Layout:
    """The files of an output folder that hold its tensors.

    Args:
        shards: the weight files, and files of state after them.
        index: name and content of the file that is written last and makes the folder loadable; None where the first
            shard does.
    """

    shards: tuple[Shard, ...]
    index: tuple[str, bytes] | None = None

    @property
    def loadable_file(self) -> str:
        """Name of the file whose presence makes the folder loadable."""
        return self.index[0] if self.index else self.shards[0].filename

    def check(self, tensors: Iterable[TensorPlan]) -> None:
        """Check that the files hold exactly these tensors, and nothing twice.

        Raises:
            PlanError: they do not, or the parts of a file do not tile it.
        """
        placed = sorted(tensor.name for shard in self.shards for tensor, _ in shard.tensors)
        planned = sorted(tensor.name for tensor in tensors)
        if placed != planned:
            raise PlanError(f"the files hold {len(placed)} tensors, the plan has {len(planned)} and not the same.")
        for shard in self.shards:
            parts = [(at, len(content)) for at, content in shard.fixed]
            end = 0
            for at, nbytes in sorted(parts + [(at, tensor.nbytes) for tensor, at in shard.tensors]):
                if at != end:
                    raise PlanError(f"{shard.filename}: a part begins at byte {at}, the one before ends at {end}.")
                end += nbytes

    def fingerprint(self) -> str:
        """A digest of everything but the tensors."""
        digest = hashlib.sha256(b"([")
        for number, shard in enumerate(self.shards):  # one after the other: of a few files it is a text of their size
            state = ("state",) if shard.state else ()
            file = (shard.filename, shard.fixed, bool(shard.twin), *state)
            digest.update(f"{', ' if number else ''}{file!r}".encode())
        digest.update(f"], {self.index!r})".encode())
        return digest.hexdigest()


def safetensors_layout(tensors: Sequence[TensorPlan], max_shard_size: int) -> Layout:
    """A Hub folder: the shards of `safetensors_shards`, and an index if there are several."""
    return indexed_layout(safetensors_shards(tensors, max_shard_size))


def indexed_layout(shards: Sequence[Shard]) -> Layout:
    """A Hub folder of these safetensors files, with an index if there are several."""
    index = ("model.safetensors.index.json", safetensors_index(shards)) if len(shards) > 1 else None
    return Layout(tuple(shards), index)


def safetensors_shards(tensors: Sequence[TensorPlan], max_shard_size: int) -> list[Shard]:
    """Lay tensors out in safetensors files of at most `max_shard_size` bytes of tensors each.

    A tensor is never split, so one that is larger has a file to itself; nor are rows and their scales, which whoever
    makes a file finds in one pass. The split follows the order of the tensors and depends on nothing else. Names are
    transformers': `model.safetensors`, or `model-00001-of-000NN.safetensors`.
    """
    groups = tensor_groups(tensors, max_shard_size)
    return [_safetensors_shard(_shard_name(i, len(groups)), group) for i, group in enumerate(groups)]


def tensor_groups(tensors: Sequence[TensorPlan], max_shard_size: int) -> list[list[TensorPlan]]:
    """Tensors in groups of at most so many bytes, one at least; a larger tensor is a group of its own."""
    groups: list[list[TensorPlan]] = [[]]
    room = max_shard_size
    for together in _together(tensors):
        nbytes = sum(tensor.nbytes for tensor in together)
        if groups[-1] and nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1] += together
        room -= nbytes
    return groups


def _together(tensors: Sequence[TensorPlan]) -> list[list[TensorPlan]]:
    """The tensors in order, those that share a file in one list: rows, and their scales after them."""
    groups: list[list[TensorPlan]] = []
    for tensor in tensors:
        match tensor.pieces, groups[-1][0].pieces if groups else ():
            case (RowScales(values=values),), (RowQuantised(values=other),) if values == other:
                groups[-1].append(tensor)
            case _:
                groups.append([tensor])
    return groups


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _safetensors_shard(filename: str, tensors: list[TensorPlan]) -> Shard:
    if any(tensor.name == _METADATA for tensor in tensors):
        raise CheckpointError(f"a tensor is called {_METADATA}, a name that safetensors keeps for itself; rename it.")
    # Wide types first, so that each tensor is aligned to its own element size, as the reference library has it.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    begin = 0
    starts = []
    for tensor in ordered:
        starts.append(begin)
        end = begin + tensor.nbytes
        if not tensor.dtype.code:
            raise CheckpointError(
                f"{tensor.name} is {tensor.dtype}, which safetensors has no name for; leave it out of the source, or "
                "store it as another type."
            )
        shape = [*tensor.shape[:-1], tensor.shape[-1] * tensor.dtype.packed] if tensor.shape else []
        entries[tensor.name] = {"dtype": tensor.dtype.code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(tensors) > MAX_TENSORS:
        raise CheckpointError(
            f"{filename}: {len(tensors)} tensors make a header of {len(text)} bytes; readers accept {MAX_TENSORS} and "
            f"{MAX_HEADER_BYTES}: lower --max-shard-size."
        )
    header = len(text).to_bytes(8, "little") + text
    placed = tuple((tensor, len(header) + at) for tensor, at in zip(ordered, starts, strict=True))
    return Shard(filename, ((0, header),), placed)


def safetensors_index(shards: Sequence[Shard]) -> bytes:
    """Content of `model.safetensors.index.json`."""
    total = sum(tensor.nbytes for shard in shards for tensor, _ in shard.tensors)
    weight_map = {tensor.name: shard.filename for shard in shards for tensor, _ in shard.tensors}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()
