# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The plan algebra: where every byte of a checkpoint comes from, stated before any byte is written.

A `CheckpointPlan` is a list of `TensorPlan`s; each is a list of pieces, and each piece fills one box of the tensor:

    Copy     a window of a source file, times a factor, plus an offset
    Fill     one constant
    Normal   draws from a normal distribution, from a stream of the tensor's own
    RowMean  the mean of some source rows, repeated
    RowQuantised, RowScales, Dequantised    8-bit floats, and the scales of their rows
    BlockQuantised   blocks of a source's values that share a scale

Boxes are rectangular in the tensor's `layout`, a factorisation of its shape: with the rows of a query projection laid
out as (kv head, query of its group, head_dim), a permutation of heads is one box and one strided window, never a piece
a row. `TensorPlan.check` proves that the boxes tile the tensor exactly once.

Planners (growth, conversion) only build these objects; `execute.py` only runs them.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from .bytes import ByteSource
from .dtypes import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, Q8_0, DType

Shape: TypeAlias = tuple[int, ...]


class PlanError(ValueError):
    """A plan does not describe its output: the message names the tensor and the numbers that disagree."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular block of an n-dimensional array: its first index and its size along each dimension."""

    start: Shape
    size: Shape

    @property
    def stop(self) -> Shape:
        """One past the last index, along each dimension."""
        return tuple(a + n for a, n in zip(self.start, self.size, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    def intersect(self, other: "Box") -> "Box | None":
        """The block both share, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Index of this block inside an array that holds `outer`."""
        return tuple(slice(a - o, a - o + n) for a, o, n in zip(self.start, outer.start, self.size, strict=True))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """The block that is all of `shape`."""
        return cls((0,) * len(shape), tuple(shape))


def complement(shape: Sequence[int], taken: Iterable[Box]) -> list[Box]:
    """Disjoint boxes that cover exactly what `taken` leaves of an array of this shape, in index order."""
    rest = [Box.whole(shape)]
    for box in taken:
        rest = [part for old in rest for part in _subtract(old, box)]
    return sorted(rest, key=lambda box: box.start)


def _subtract(box: Box, hole: Box) -> Iterator[Box]:
    overlap = box.intersect(hole)
    if overlap is None:
        yield box
        return
    start, stop = list(box.start), list(box.stop)
    for axis in range(len(start)):  # cut off what lies before and after the hole, one axis at a time
        for a, b in ((start[axis], overlap.start[axis]), (overlap.stop[axis], stop[axis])):
            if a < b:
                lower, upper = [*start[:axis], a, *start[axis + 1 :]], [*stop[:axis], b, *stop[axis + 1 :]]
                yield Box(tuple(lower), tuple(u - v for u, v in zip(upper, lower, strict=True)))
        start[axis], stop[axis] = overlap.start[axis], overlap.stop[axis]


@dataclass(frozen=True, slots=True)
class View:
    """A strided window of a file: an array that is not loaded.

    Args:
        file: the file that holds the bytes.
        offset: position of the first element in the file, in bytes.
        shape: sizes, as of an array.
        strides: distance between neighbours along each dimension, in elements; 0 repeats.
        dtype: the element type; little-endian.
    """

    file: ByteSource
    offset: int
    shape: Shape
    strides: Shape
    dtype: DType

    @classmethod
    def contiguous(cls, file: ByteSource, offset: int, shape: Sequence[int], dtype: DType) -> "View":
        """The window of a whole row-major tensor stored at `offset`."""
        return cls(file, offset, tuple(shape), row_major_strides(shape), dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements seen (each repeat counted)."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the file in row-major order without gaps."""
        normal = row_major_strides(self.shape)
        return all(n == 1 or s == r for n, s, r in zip(self.shape, self.strides, normal, strict=True))

    @property
    def span(self) -> tuple[int, int]:
        """First byte and one past the last byte of the file that the window touches."""
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + (reach + 1) * self.dtype.itemsize if self.numel else self.offset

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "View":
        """A smaller window: one slice per leading dimension, with non-negative bounds and a positive step."""
        slices = index if isinstance(index, tuple) else (index,)
        offset, shape, strides = self.offset, list(self.shape), list(self.strides)
        for axis, part in enumerate(slices):
            indices = range(self.shape[axis])[part]
            offset += indices.start * self.strides[axis] * self.dtype.itemsize if len(indices) else 0
            shape[axis], strides[axis] = len(indices), self.strides[axis] * indices.step
        return View(self.file, offset, tuple(shape), tuple(strides), self.dtype)

    def window(self, box: Box) -> "View":
        """The part of this window that `box` selects."""
        return self[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]

    def unflatten(self, axis: int, sizes: Sequence[int]) -> "View":
        """Split one dimension into several, the last of which runs fastest."""
        if math.prod(sizes) != self.shape[axis]:
            raise PlanError(f"cannot lay out {self.shape[axis]} as {tuple(sizes)}: the product is {math.prod(sizes)}.")
        inner = tuple(self.strides[axis] * stride for stride in row_major_strides(sizes))
        shape = (*self.shape[:axis], *sizes, *self.shape[axis + 1 :])
        strides = (*self.strides[:axis], *inner, *self.strides[axis + 1 :])
        return View(self.file, self.offset, shape, strides, self.dtype)

    def permute(self, *axes: int) -> "View":
        """Reorder the dimensions."""
        shape, strides = tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes)
        return View(self.file, self.offset, shape, strides, self.dtype)


def row_major_strides(shape: Sequence[int]) -> Shape:
    """Strides, in elements, of a row-major array."""
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number that needs data: the mean or standard deviation of a source tensor, times a factor.

    A dry run prints it as a symbol; the executor resolves it in a short prepass and records it in the manifest.
    """

    kind: Literal["mean", "std"]
    tensor: str
    view: View
    factor: float = 1.0

    def __mul__(self, factor: float) -> "Statistic":
        return Statistic(self.kind, self.tensor, self.view, self.factor * factor)

    def __str__(self) -> str:
        symbol = f"{self.kind}({self.tensor})"
        return symbol if self.factor == 1.0 else f"{symbol} x {self.factor:.6g}"


@dataclass(frozen=True, slots=True)
class Noise:
    """Normal draws on top of a copy: each source element's own, times a weight that each copy has for itself.

    Copies of one block whose weights add up to zero differ from each other and still add up to what they would without.

    Args:
        std: standard deviation of the draws.
        weight: this copy's factor on them.
        stream: name of the random stream; copies that share draws share it.
        origin: position in the file of the element whose draw is the stream's first, in bytes.
    """

    std: float | Statistic
    weight: float
    stream: str
    origin: int


@dataclass(frozen=True, slots=True)
class Copy:
    """`source * scale + offset + noise`, rounded once to the tensor's dtype; the bytes as they are if none changes."""

    box: Box
    source: View
    scale: float = 1.0
    offset: float = 0.0
    noise: Noise | None = None

    def describe(self) -> str:
        """One phrase for a dry run."""
        factor = "" if self.scale == 1.0 else f" x {self.scale:.6g}"
        offset = "" if self.offset == 0.0 else f" + {self.offset:.6g}"
        return "copy" + factor + offset + ("" if self.noise is None else f" + noise, std {self.noise.std}")


@dataclass(frozen=True, slots=True)
class Fill:
    """One constant."""

    box: Box
    value: float | Statistic = 0.0

    def describe(self) -> str:
        """One phrase for a dry run."""
        return "zeros" if self.value == 0.0 else str(self.value)


@dataclass(frozen=True, slots=True)
class Normal:
    """Draws from N(0, std), each a function of (seed, tensor name, position) alone."""

    box: Box
    std: float | Statistic

    def describe(self) -> str:
        """One phrase for a dry run."""
        return f"normal, {self.std}" if isinstance(self.std, Statistic) else f"normal, std {self.std:.6g}"


@dataclass(frozen=True, slots=True)
class RowMean:
    """The mean over the rows of `source` [rows, n], times a factor, repeated in every row [n] of the box."""

    box: Box
    source: View
    scale: float = 1.0

    def describe(self) -> str:
        """One phrase for a dry run."""
        return f"mean of {self.source.shape[0]} rows" + ("" if self.scale == 1.0 else f" x {self.scale:.6g}")


@dataclass(frozen=True, slots=True)
class RowQuantised:
    """All of a [rows, n] tensor as 8-bit floats: each row of `values`, over the row's scale; see `row_quant.py`.

    The pieces of `values` may cut a row anywhere: its scale is that of the row which they make.
    """

    box: Box
    values: "TensorPlan"

    def describe(self) -> str:
        """One phrase for a dry run."""
        of = ", ".join(dict.fromkeys(piece.describe() for piece in self.values.pieces))
        return f"{of}, as {self.values.dtype}, / scale of its row"


@dataclass(frozen=True, slots=True)
class RowScales:
    """All of a [rows, 1] tensor: the scales of the rows of `values`, in their dtype."""

    box: Box
    values: "TensorPlan"

    def describe(self) -> str:
        """One phrase for a dry run."""
        return f"largest of each row, as {self.values.dtype}, / 448"


@dataclass(frozen=True, slots=True)
class Dequantised:
    """8-bit floats times their scales, rounded once.

    Args:
        box: what it fills.
        source: the 8-bit floats.
        scales: of each of them, by strides of 0 where several share one.
    """

    box: Box
    source: View
    scales: View

    def describe(self) -> str:
        """One phrase for a dry run."""
        return f"{self.source.dtype} x scale"


@dataclass(frozen=True, slots=True)
class BlockQuantised:
    """Blocks of values that share a scale, see `block_quant.py`: an element of the tensor is a block of the source.

    Args:
        box: what it fills, in blocks.
        source: their values: of the box's shape, with the values of a block as one dimension more.
    """

    box: Box
    source: View

    def describe(self) -> str:
        """One phrase for a dry run."""
        return f"quantised by {self.source.shape[-1]}"


Piece: TypeAlias = Copy | Fill | Normal | RowMean | RowQuantised | RowScales | Dequantised | BlockQuantised


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: its name, shape and dtype, and the pieces that tile it.

    Args:
        name: the tensor's name in the checkpoint.
        shape: its shape.
        dtype: its element type.
        pieces: what fills it; their boxes are indices into `layout`.
        layout: a factorisation of `shape` in row-major order; `shape` itself unless given ((1,) for a scalar).
        nonnegative: whether a value below zero is refused, as of second moments. It decides no byte of the output.
    """

    name: str
    shape: Shape
    dtype: DType
    pieces: tuple[Piece, ...]
    layout: Shape = ()
    nonnegative: bool = False

    def __post_init__(self) -> None:
        if not self.layout:
            object.__setattr__(self, "layout", self.shape or (1,))

    @classmethod
    def copy_of(cls, name: str, source: View, dtype: DType | None = None) -> "TensorPlan":
        """The plan that copies a whole source tensor, cast to `dtype` if given."""
        flat = View(source.file, source.offset, source.shape or (1,), source.strides or (1,), source.dtype)
        pieces = (Copy(Box.whole(flat.shape), flat),) if source.numel else ()
        return cls(name, source.shape, dtype or source.dtype, pieces)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the output, in bytes."""
        return self.numel * self.dtype.itemsize

    def pieces_in(self, box: Box) -> Iterator[tuple[Piece, Box]]:
        """The pieces that fill some of a box, each with what it fills of it."""
        axis, starts, reaches, pieces = self._by_start
        first = bisect.bisect_right(reaches, box.start[axis])
        last = bisect.bisect_left(starts, box.start[axis] + box.size[axis])
        for piece in pieces[first:last]:
            shared = piece.box.intersect(box)
            if shared is not None:
                yield piece, shared

    @cached_property
    def _by_start(self) -> tuple[int, list[int], list[int], list[Piece]]:
        """The pieces sorted along the axis that tells them apart best: the axis, their starts, how far they reach.

        A tensor from a thousand ranks has a thousand pieces, and each of its blocks meets a few.
        """
        axis = _busiest_axis(self.pieces)
        pieces = sorted(self.pieces, key=lambda piece: piece.box.start[axis])
        reaches = list(itertools.accumulate((piece.box.stop[axis] for piece in pieces), max))
        return axis, [piece.box.start[axis] for piece in pieces], reaches, pieces

    def check(self) -> None:
        """Prove that the pieces tile the tensor exactly once.

        Disjoint boxes inside the tensor whose sizes add up to its size leave no element out and fill none twice.

        Raises:
            PlanError: they do not; the message names the tensor and the pieces.
        """
        if math.prod(self.layout) != self.numel:
            raise PlanError(
                f"{self.name}: layout {self.layout} does not have the {self.numel} elements of {self.shape}."
            )
        for piece in self.pieces:
            self._check_piece(piece)
        overlapping = first_overlap(self.pieces)
        if overlapping:
            a, b = overlapping
            raise PlanError(f"{self.name}: {a.describe()} {a.box} and {b.describe()} {b.box} overlap.")
        filled = sum(piece.box.numel for piece in self.pieces)
        if filled != self.numel:
            raise PlanError(f"{self.name}: the pieces fill {filled} of {self.numel} elements.")

    def _check_piece(self, piece: Piece) -> None:
        where = f"{self.name}: {piece.describe()} {piece.box}"
        if len(piece.box.start) != len(self.layout) or len(piece.box.size) != len(self.layout):
            raise PlanError(f"{where} is not a box of layout {self.layout}.")
        if any(
            a < 0 or n < 1 or a + n > m for a, n, m in zip(piece.box.start, piece.box.size, self.layout, strict=True)
        ):
            raise PlanError(f"{where} reaches outside layout {self.layout}.")
        if isinstance(piece, Copy) and piece.source.shape != piece.box.size:
            raise PlanError(f"{where} takes a source of shape {piece.source.shape}.")
        if isinstance(piece, RowQuantised | RowScales):
            self._check_rows(piece, where)
            return
        if isinstance(piece, Dequantised):
            self._check_dequantised(piece, where)
            return
        if isinstance(piece, RowMean) and (len(piece.source.shape) != 2 or piece.source.shape[1] != piece.box.size[-1]):
            raise PlanError(f"{where} averages a source of shape {piece.source.shape}.")
        if isinstance(piece, BlockQuantised):
            expected = (*piece.box.size, self.dtype.packed)
            if piece.source.shape != expected:
                raise PlanError(f"{where} takes a source of shape {piece.source.shape}, expected {expected}.")
            if self.dtype != Q8_0 or not piece.source.dtype.is_floating:
                raise PlanError(f"{where}: {self.dtype} cannot be made of blocks of {piece.source.dtype}.")
            return
        changes = not isinstance(piece, Copy) or not is_byte_copy(piece, self.dtype)
        dtypes = [self.dtype] + ([piece.source.dtype] if isinstance(piece, Copy | RowMean) else [])
        if changes and not all(dtype.is_floating for dtype in dtypes):
            raise PlanError(f"{where}: {' from '.join(map(str, dtypes))} can only be copied byte by byte.")

    def _check_rows(self, piece: "RowQuantised | RowScales", where: str) -> None:
        values = piece.values
        expected = values.shape if isinstance(piece, RowQuantised) else (*values.shape[:1], 1)
        if len(values.shape) != 2 or not self.layout == self.shape == piece.box.size == expected:
            raise PlanError(f"{where}: {self.shape} in layout {self.layout} is not {expected}, of {values.shape}.")
        dtype = FLOAT8 if isinstance(piece, RowQuantised) else values.dtype
        if self.dtype != dtype or values.dtype not in (BFLOAT16, FLOAT16, FLOAT32):
            raise PlanError(f"{where}: {self.dtype} cannot be made of rows of {values.dtype}.")
        odd = next((part for part in values.pieces if not _is_plain(part)), None)
        if odd:
            raise PlanError(f"{where}: rows are quantised where they are copies and constants, not {odd.describe()}.")
        values.check()

    def _check_dequantised(self, piece: "Dequantised", where: str) -> None:
        if not piece.source.shape == piece.scales.shape == piece.box.size:
            raise PlanError(f"{where} takes {piece.source.shape} with scales of {piece.scales.shape}.")
        is_scale = piece.scales.dtype in (BFLOAT16, FLOAT16, FLOAT32)
        if piece.source.dtype != FLOAT8 or not (is_scale and self.dtype.is_floating):
            raise PlanError(f"{where}: {self.dtype} cannot be {piece.source.dtype} x {piece.scales.dtype}.")


def _is_plain(piece: Piece) -> bool:
    """Whether a piece needs no random words, and no data but what it copies."""
    match piece:
        case Copy(noise=None):
            return True
        case Fill(value=value):
            return not isinstance(value, Statistic)
    return False


def first_overlap(pieces: Sequence[Piece]) -> tuple[Piece, Piece] | None:
    """Two pieces whose boxes share an element, or None.

    Pieces that some axis keeps apart need no comparison, which leaves those of a tensor cut into a grid of a thousand
    shards each alone after a thousand steps an axis; what no axis separates is swept along one.
    """
    groups = [list(pieces)]
    while groups:
        group = groups.pop()
        if len(group) < 2:
            continue
        axes = range(len(group[0].box.start))
        parts = next((parts for axis in axes if len(parts := _apart(group, axis)) > 1), None)
        if parts:
            groups += parts
        elif found := _sweep(group):
            return found
    return None


def _apart(pieces: Sequence[Piece], axis: int) -> list[list[Piece]]:
    """Groups of pieces that share no index along an axis, each held together by those in it that do."""
    groups: list[list[Piece]] = []
    reach = -1
    for piece in sorted(pieces, key=lambda piece: piece.box.start[axis]):
        start = piece.box.start[axis]
        if start >= reach:
            groups.append([])
        groups[-1].append(piece)
        reach = max(reach, start + piece.box.size[axis])
    return groups


def _sweep(pieces: Sequence[Piece]) -> tuple[Piece, Piece] | None:
    """The same, comparing whatever is at one place of the axis with the most distinct starts."""
    axis = _busiest_axis(pieces)
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.box.start[axis]):
        active = [other for other in active if other.box.stop[axis] > piece.box.start[axis]]
        for other in active:
            if other.box.intersect(piece.box):
                return other, piece
        active.append(piece)
    return None


def _busiest_axis(pieces: Sequence[Piece]) -> int:
    """The axis along which boxes have the most distinct starts."""
    axes = range(len(pieces[0].box.start)) if len(pieces) > 1 else range(1)
    return max(axes, key=lambda axis: len({piece.box.start[axis] for piece in pieces}))


def is_byte_copy(piece: Copy, dtype: DType) -> bool:
    """Whether a copy changes no value, so that bytes can be moved without looking at them."""
    return piece.scale == 1.0 and piece.offset == 0.0 and piece.noise is None and piece.source.dtype == dtype


@dataclass(frozen=True)
class CheckpointPlan:
    """A whole output checkpoint.

    Args:
        tensors: the tensors, in the order in which they are written.
        config: the content of config.json.
        sidecars: other files of the folder: name -> path of the file to copy, or its content.
        lineage: what is made from what, for the manifest; JSON, without any local path.
        seed: seed of the `Normal` pieces.
    """

    tensors: tuple[TensorPlan, ...]
    config: dict[str, Any]
    sidecars: dict[str, str | bytes] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sources(self) -> set[ByteSource]:
        """The files the pieces read, as they were when their headers were read."""
        return {view.file for tensor in self.tensors for view in source_views(tensor)}

    def check(self) -> None:
        """Check every tensor (see `TensorPlan.check`) and that no name occurs twice.

        Raises:
            PlanError: something does not add up.
        """
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.name in seen:
                raise PlanError(f"{tensor.name} is planned twice.")
            seen.add(tensor.name)
            tensor.check()

    def fingerprint(self) -> str:
        """A digest of everything that decides the output's bytes; the directory the sources lie in does not."""
        digest = hashlib.sha256()
        files = {source.name for source in self.sources}
        folder = os.path.commonpath(list(map(os.path.dirname, files))) if files else ""
        names = {file: os.path.relpath(file, folder) for file in files}
        for tensor in self.tensors:
            digest.update(repr((tensor.name, tensor.shape, tensor.dtype.name, tensor.layout)).encode())
            for piece in tensor.pieces:
                digest.update(_portable_repr(piece, names).encode())
        digest.update(json.dumps([self.config, self.lineage, self.seed], sort_keys=True).encode())
        return digest.hexdigest()


def source_views(tensor: TensorPlan) -> Iterator[View]:
    """Every window of a source file a tensor depends on, statistics included."""
    for piece in tensor.pieces:
        if isinstance(piece, Copy | RowMean | Dequantised | BlockQuantised):
            yield piece.source
        if isinstance(piece, Dequantised):
            yield piece.scales
        if isinstance(piece, RowQuantised | RowScales):
            yield from source_views(piece.values)
        number = piece_number(piece)
        if isinstance(number, Statistic):
            yield number.view


def piece_number(piece: Piece) -> float | Statistic | None:
    """The one number of a constant, random or noisy piece."""
    match piece:
        case Fill():
            return piece.value
        case Normal():
            return piece.std
        case Copy(noise=Noise(std=std)):
            return std
    return None


def _portable_repr(piece: Piece, names: Mapping[str, str]) -> str:
    """A text that two plans share iff the piece is the same, wherever the source folder lies."""

    def window(view: View) -> tuple[Any, ...]:
        return names[view.file.name], view.offset, view.shape, view.strides, view.dtype.name

    def number(value: float | Statistic) -> Any:
        return (value.kind, window(value.view), value.factor) if isinstance(value, Statistic) else float(value)

    box = (piece.box.start, piece.box.size)
    match piece:
        case Copy():
            noise = piece.noise and (
                number(piece.noise.std),
                piece.noise.weight,
                piece.noise.stream,
                piece.noise.origin,
            )
            return repr(("copy", box, window(piece.source), piece.scale, piece.offset, noise))
        case Fill():
            return repr(("fill", box, number(piece.value)))
        case Normal():
            return repr(("normal", box, number(piece.std)))
        case RowMean():
            return repr(("row mean", box, window(piece.source), piece.scale))
        case RowQuantised() | RowScales():
            kind = "row quantised" if isinstance(piece, RowQuantised) else "row scales"
            parts = [_portable_repr(part, names) for part in piece.values.pieces]
            return repr((kind, box, piece.values.dtype.name, piece.values.layout, parts))
        case Dequantised():
            return repr(("dequantised", box, window(piece.source), window(piece.scales)))
        case BlockQuantised():
            return repr(("block quantised", box, window(piece.source)))
