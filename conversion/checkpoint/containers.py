# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How output tensors become files: shards, their headers, and the file that makes the folder loadable."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import CheckpointError
from .plan import TensorPlan

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MAX_HEADER = 100_000_000  # the safetensors library refuses longer ones


@dataclass(frozen=True)
class Shard:
    """One output file: what stands before the tensors, and where each tensor starts."""

    filename: str
    header: bytes
    tensors: tuple[tuple[TensorPlan, int], ...]
    """Each tensor with the position of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Size of the file, in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor, _ in self.tensors)


def safetensors_shards(tensors: Sequence[TensorPlan], max_shard_size: int) -> list[Shard]:
    """Lay tensors out in safetensors files of at most `max_shard_size` bytes of tensors each.

    A tensor is never split, so one that is larger has a file to itself. The split follows the order of the tensors
    and depends on nothing else. Names are transformers': `model.safetensors`, or `model-00001-of-000NN.safetensors`.
    """
    groups: list[list[TensorPlan]] = [[]]
    room = max_shard_size
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return [_safetensors_shard(_shard_name(i, len(groups)), group) for i, group in enumerate(groups)]


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _safetensors_shard(filename: str, tensors: list[TensorPlan]) -> Shard:
    # Wide types first, so that each tensor is aligned to its own element size, as the reference library has it.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    starts = []
    for tensor in ordered:
        starts.append(begin)
        end = begin + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype.code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(
            f"{filename}: a header of {len(text)} bytes is over the {_MAX_HEADER} that safetensors readers accept; "
            "lower --max-shard-size."
        )
    header = len(text).to_bytes(8, "little") + text
    return Shard(filename, header, tuple((t, len(header) + at) for t, at in zip(ordered, starts, strict=True)))


def loadable_file(shards: Sequence[Shard]) -> str:
    """Name of the file whose presence makes the folder loadable: the index, or the single weights file."""
    return shards[0].filename if len(shards) == 1 else "model.safetensors.index.json"


def safetensors_index(shards: Sequence[Shard]) -> bytes:
    """Content of `model.safetensors.index.json`."""
    total = sum(tensor.nbytes for shard in shards for tensor, _ in shard.tensors)
    weight_map = {tensor.name: shard.filename for shard in shards for tensor, _ in shard.tensors}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def parse_size(text: str | int) -> int:
    """Read a size as users write it (`5GB`, `500MB`, `2GiB`, or bytes) into bytes.

    Raises:
        ValueError: it is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(text).upper())
    if match is None or (match[2] or "") not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"size {text!r} is not a positive number of bytes with an optional unit such as MB or GiB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])
