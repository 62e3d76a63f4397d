# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Whole tensors from what the tensor- and pipeline-parallel ranks of a Megatron run hold: weights, or moments of them.

Each rank holds one stage's layers, numbered from 0: once, or once for each virtual stage. Chunks follow each other over
the stages, then over the virtual stages, as Megatron's interleaved schedule has it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..checkpoint.errors import CheckpointError
from ..checkpoint.sharded import ShardedTensor
from .checkpoint import Replica
from .table import NativeWeight

LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
LOST = "copy the folder again, with every rank's file"
Chunk: TypeAlias = Mapping[str, ShardedTensor]
"""One virtual stage of a rank: its part of each tensor, by name with the layer's number in the stage."""


@dataclass(frozen=True)
class Rank:
    """One rank: where it stands, what its file holds.

    Args:
        tensor: its tensor-parallel rank.
        pipeline: its stage.
        file: where it was read from, for messages.
        content: of that file.
    """

    tensor: int
    pipeline: int
    file: str
    content: Mapping[str, Any]

    @property
    def place(self) -> str:
        """For people."""
        return f"tensor rank {self.tensor}, stage {self.pipeline}"


def layer_offsets(
    folder: object, ranks: Sequence[Rank], chunks: Sequence[Sequence[Chunk]]
) -> dict[tuple[int, int], int]:
    """The global number of the first layer of each (stage, virtual stage).

    Args:
        folder: what to call the checkpoint in errors.
        ranks: all of them, those of the first tensor-parallel rank first.
        chunks: of each rank.

    Raises:
        CheckpointError: ranks of one stage differ in their layers, or there are none.
    """
    counts: dict[tuple[int, int], int] = {}
    for rank, parts in zip(ranks, chunks, strict=True):
        for virtual, chunk in enumerate(parts):
            count = _count_layers(rank, chunk)
            if counts.setdefault((rank.pipeline, virtual), count) != count:
                raise CheckpointError(
                    f"{rank.file}: has {count} layers, tensor rank 0 of the same stage has "
                    f"{counts[rank.pipeline, virtual]}; {LOST}."
                )
    offsets = {}
    total = 0
    for place in sorted(counts, key=lambda place: (place[1], place[0])):  # virtual stage by virtual stage
        offsets[place] = total
        total += counts[place]
    if not total:
        raise CheckpointError(f"{folder}: no file holds a layer; expected names such as decoder.layers.0.")
    return offsets


def _count_layers(rank: Rank, chunk: Chunk) -> int:
    numbers = sorted({int(match[0]) for name in chunk if (match := LAYER.search(name))})
    if numbers != list(range(len(numbers))):
        raise CheckpointError(f"{rank.file}: layers are numbered {numbers}, expected 0 to {len(numbers) - 1}.")
    return len(numbers)


def assemble(
    ranks: Sequence[Rank],
    chunks: Sequence[Sequence[Chunk]],
    offsets: Mapping[tuple[int, int], int],
    table: Sequence[NativeWeight],
) -> tuple[dict[str, ShardedTensor], list[Replica]]:
    """Whole tensors under global names, and the copies that have to be equal.

    Args:
        ranks: all of them, by tensor-parallel rank, then stage.
        chunks: of each rank.
        offsets: see `layer_offsets`.
        table: what the names mean, and how tensor parallelism cuts each.

    Raises:
        CheckpointError: a name is not in the table; ranks lack a part, or have another shape or dtype of it.
    """
    lines = {line.name: line for line in table}
    size = 1 + max(rank.tensor for rank in ranks)
    shards: dict[str, list[tuple[Rank, ShardedTensor]]] = {}
    replicas: list[Replica] = []
    for rank, name, part in _globally_named(ranks, chunks, offsets):
        before = shards.setdefault(name, [])
        twin = next(((other, held) for other, held in before if other.tensor == rank.tensor), None)
        if twin:  # a stage that needs another's tensor keeps a copy
            _check_same_kind(name, twin, (rank, part))
            replicas += copies(name, twin[1], part, (twin[0].place, rank.place))
        else:
            before.append((rank, part))
    tensors = {}
    for name, parts in shards.items():
        line = lines.get(LAYER.sub("{}", name))
        if line is None:
            raise CheckpointError(
                f"{parts[0][0].file}: {name} is not a weight of a Tele-FLM model; it would be lost. "
                "A fork with other names needs --mapping."
            )
        _check_alike(name, parts, size)
        if line.parallel == "replicated":
            (first, part), *others = parts
            for rank, other in others:
                replicas += copies(name, part, other, (first.place, rank.place))
            parts = parts[:1]
        tensors[name] = ShardedTensor.concatenate([part for _, part in parts], line.parallel == "row")
    return tensors, replicas


def copies(name: str, first: ShardedTensor, second: ShardedTensor, places: tuple[str, str]) -> Iterator[Replica]:
    """Two copies of a tensor as pairs of windows, wherever each is cut."""
    for box, view in first.chunks:
        for other_box, other in second.chunks:
            shared = box.intersect(other_box)
            if shared is not None and view is not None and other is not None:
                yield Replica(name, view[shared.slices_in(box)], other[shared.slices_in(other_box)], places)


def _globally_named(
    ranks: Sequence[Rank], chunks: Sequence[Sequence[Chunk]], offsets: Mapping[tuple[int, int], int]
) -> Iterator[tuple[Rank, str, ShardedTensor]]:
    for rank, parts in zip(ranks, chunks, strict=True):
        for virtual, chunk in enumerate(parts):
            offset = offsets[rank.pipeline, virtual]
            for name, part in chunk.items():
                yield rank, shift_layer(name, offset), part


def shift_layer(name: str, offset: int) -> str:
    """The name of a tensor whose layer's number begins to count elsewhere."""
    return LAYER.sub(lambda match: str(int(match[0]) + offset), name)


def _check_alike(name: str, parts: Sequence[tuple[Rank, ShardedTensor]], size: int) -> None:
    """Every tensor-parallel rank has its part of a tensor, all of one kind."""
    missing = set(range(size)) - {rank.tensor for rank, _ in parts}
    if missing:
        first, _ = parts[0]
        raise CheckpointError(f"{first.file}: has {name}, tensor rank {min(missing)} of {size} has none; {LOST}.")
    for part in parts[1:]:
        _check_same_kind(name, parts[0], part)


def _check_same_kind(name: str, first: tuple[Rank, ShardedTensor], second: tuple[Rank, ShardedTensor]) -> None:
    """Two ranks' parts of a tensor have the same shape and dtype."""
    (one, part), (rank, other) = first, second
    if (other.shape, other.dtype) != (part.shape, part.dtype):
        raise CheckpointError(
            f"{rank.file}: {name} is {other.dtype} {other.shape}, in {one.file} it is {part.dtype} {part.shape}; "
            "the files are of two runs."
        )
