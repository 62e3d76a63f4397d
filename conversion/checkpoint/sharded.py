# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tensors in pieces: what a parallel training run leaves on the disk, cut and reordered without reading it.

A `ShardedTensor` is to many windows what a `View` is to one: it can be sliced, laid out anew, permuted, concatenated,
and in the end planned. Where a cut falls inside a block of the new layout, the chunk is cut there too.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .dtypes import DType
from .plan import Box, Copy, Fill, Piece, PlanError, Shape, TensorPlan, View
from .reader import boxes_of_range


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor in pieces: which box of it each window of a file holds.

    Args:
        shape: of the whole tensor.
        dtype: of its elements.
        chunks: disjoint boxes with the window that fills each; None stands for zeros. A scalar's box has one dimension.
    """

    shape: Shape
    dtype: DType
    chunks: tuple[tuple[Box, View | None], ...]

    @classmethod
    def of(cls, view: View) -> "ShardedTensor":
        """A tensor that lies in one piece."""
        return cls(view.shape, view.dtype, (_chunk(Box.whole(view.shape), view),) if view.numel else ())

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: DType) -> "ShardedTensor":
        """A tensor of zeros, which no file holds."""
        return cls(tuple(shape), dtype, (_chunk(Box.whole(shape), None),) if math.prod(shape) else ())

    @classmethod
    def concatenate(cls, tensors: Sequence["ShardedTensor"], axis: int) -> "ShardedTensor":
        """Tensors one after the other along a dimension.

        Raises:
            PlanError: they differ in dtype, or along another dimension.
        """
        first = tensors[0]
        chunks: list[tuple[Box, View | None]] = []
        at = 0
        for tensor in tensors:
            if tensor.dtype != first.dtype:
                raise PlanError(f"cannot concatenate {first.dtype} and {tensor.dtype}.")
            if _without(tensor.shape, axis) != _without(first.shape, axis):
                raise PlanError(f"cannot concatenate {first.shape} and {tensor.shape} along dimension {axis}.")
            chunks += [(_moved(box, axis, at), view) for box, view in tensor.chunks]
            at += tensor.shape[axis]
        return cls((*first.shape[:axis], at, *first.shape[axis + 1 :]), first.dtype, tuple(chunks))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "ShardedTensor":
        """A part of the tensor: one slice per leading dimension, without a step."""
        slices = index if isinstance(index, tuple) else (index,)
        ranges = [range(n)[part] for n, part in zip(self.shape, slices, strict=False)]
        ranges += [range(n) for n in self.shape[len(slices) :]]
        part = Box(tuple(r.start for r in ranges), tuple(map(len, ranges)))
        chunks = []
        for box, view in self.chunks:
            shared = box.intersect(part)
            if shared is not None:
                window = view[shared.slices_in(box)] if view is not None else None
                chunks.append((Box(tuple(s.start for s in shared.slices_in(part)), shared.size), window))
        return ShardedTensor(part.size, self.dtype, tuple(chunks))

    def split(self, sizes: Sequence[int], axis: int) -> tuple["ShardedTensor", ...]:
        """Parts of those sizes one after the other along a dimension; each chunk is looked at once.

        Raises:
            PlanError: the sizes do not add up to the dimension's.
        """
        starts = list(itertools.accumulate(sizes, initial=0))
        if starts[-1] != self.shape[axis]:
            raise PlanError(f"cannot split {self.shape[axis]} into {len(sizes)} parts of {starts[-1]} in all.")
        parts: list[list[tuple[Box, View | None]]] = [[] for _ in sizes]
        for box, view in self.chunks:
            begin, end = box.start[axis], box.stop[axis]
            for number in range(bisect.bisect_right(starts, begin) - 1, bisect.bisect_left(starts, end)):
                inner = slice(max(starts[number] - begin, 0), min(starts[number + 1], end) - begin)
                cut = Box(_replaced(box.start, axis, 0), _replaced(box.size, axis, inner.stop - inner.start))
                window = view and view[(*(slice(None),) * axis, inner)]
                parts[number].append((_moved(cut, axis, max(begin - starts[number], 0)), window))
        shapes = (_replaced(self.shape, axis, size) for size in sizes)
        return tuple(ShardedTensor(shape, self.dtype, tuple(part)) for shape, part in zip(shapes, parts, strict=True))

    def unflatten(self, axis: int, sizes: Sequence[int]) -> "ShardedTensor":
        """Split one dimension into several, the last of which runs fastest.

        Raises:
            PlanError: the sizes do not multiply to the dimension's.
        """
        if math.prod(sizes) != self.shape[axis]:
            raise PlanError(f"cannot lay out {self.shape[axis]} as {tuple(sizes)}: the product is {math.prod(sizes)}.")
        shape = (*self.shape[:axis], *sizes, *self.shape[axis + 1 :])
        chunks = [part for box, view in self.chunks for part in _unflatten_chunk(box, view, axis, tuple(sizes))]
        return ShardedTensor(shape, self.dtype, tuple(chunks))

    def unbind(self, axis: int) -> tuple["ShardedTensor", ...]:
        """The slices along a dimension, without it: of a stack of layers, the layers.

        Each chunk is looked at once, where a slice a layer would look at all of them for every layer.
        """
        slices: list[list[tuple[Box, View | None]]] = [[] for _ in range(self.shape[axis])]
        for box, view in self.chunks:
            rest = Box(_without(box.start, axis), _without(box.size, axis))
            for index in range(box.size[axis]):
                window = view and _select(view, axis, index)
                slices[box.start[axis] + index].append(_chunk(rest, window))
        shape = _without(self.shape, axis)
        return tuple(ShardedTensor(shape, self.dtype, tuple(chunks)) for chunks in slices)

    def permute(self, *axes: int) -> "ShardedTensor":
        """Reorder the dimensions."""
        chunks = tuple((_permuted(box, axes), view and view.permute(*axes)) for box, view in self.chunks)
        return ShardedTensor(tuple(self.shape[axis] for axis in axes), self.dtype, chunks)

    def plan(
        self,
        name: str,
        shape: Sequence[int] | None = None,
        *,
        dtype: DType | None = None,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> TensorPlan:
        """The plan that puts the pieces together.

        Args:
            name: of the output tensor.
            shape: of the output tensor, of which this one's is then a factorisation; this one's unless given.
            dtype: of the output tensor; this one's unless given.
            scale: factor on every element.
            offset: added to every element after that.
        """
        pieces: list[Piece] = [
            Fill(box, offset) if view is None else Copy(box, view, scale, offset) for box, view in self.chunks
        ]
        return TensorPlan(
            name, tuple(self.shape if shape is None else shape), dtype or self.dtype, tuple(pieces), self.shape
        )


def _unflatten_chunk(box: Box, view: View | None, axis: int, sizes: Shape) -> Iterator[tuple[Box, View | None]]:
    """A chunk in the new layout: as one box, or cut where its edges fall inside of the new dimensions."""
    first, size = box.start[axis], box.size[axis]
    before, after = slice(0, axis), slice(axis + 1, None)
    at = 0
    for inner in boxes_of_range(sizes, first, first + size):
        part = Box(
            (*box.start[before], *inner.start, *box.start[after]), (*box.size[before], *inner.size, *box.size[after])
        )
        window = None
        if view is not None:
            window = view[(*(slice(None),) * axis, slice(at, at + inner.numel))].unflatten(axis, inner.size)
        yield part, window
        at += inner.numel


def _select(view: View, axis: int, index: int) -> View:
    """One slice of a window along a dimension, without it."""
    part = view[(*(slice(None),) * axis, slice(index, index + 1))]
    return View(part.file, part.offset, _without(part.shape, axis), _without(part.strides, axis), part.dtype)


def _chunk(box: Box, view: View | None) -> tuple[Box, View | None]:
    """A chunk; that of a scalar, which has no dimensions, with one."""
    if box.size:
        return box, view
    return Box((0,), (1,)), view and View(view.file, view.offset, (1,), (1,), view.dtype)


def _permuted(box: Box, axes: Sequence[int]) -> Box:
    return Box(tuple(box.start[axis] for axis in axes), tuple(box.size[axis] for axis in axes))


def _moved(box: Box, axis: int, distance: int) -> Box:
    return Box((*box.start[:axis], box.start[axis] + distance, *box.start[axis + 1 :]), box.size)


def _replaced(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])
