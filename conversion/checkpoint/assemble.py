# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Making the elements of an output tensor from its plan, one block at a time."""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from .block_quant import BLOCK_QUANTISING_BYTES, quantise_q8_0
from .bytes import ByteSource
from .dtypes import FLOAT64, DType
from .errors import ImpossibleState, NotFinite, Overflow
from .normal_stream import GRID, KEPT_CELLS, draw_words, look_up, normal_table
from .plan import (
    BlockQuantised,
    Box,
    Copy,
    Dequantised,
    Fill,
    Noise,
    Normal,
    Piece,
    RowMean,
    RowQuantised,
    RowScales,
    Shape,
    Statistic,
    TensorPlan,
    View,
    is_byte_copy,
    piece_number,
    row_major_strides,
)
from .reader import CHUNK, MAX_SPAN, FileReader, boxes_of_range
from .rounding import first_overflow, largest, round_once, scale_and_shift, scaled_table, widens
from .row_quant import QUANTISING_BYTES, FoundScales, dequantise, stream_codes, stream_scales
from .scratch import scratch

BLOCK = 4 * GRID  # elements of a unit of work, with a digest of its own: 8 MiB of bfloat16
_SAMPLE = 1 << 22  # a statistic looks at this many elements at most,
_WINDOW = 1 << 16  # in windows of this many, evenly spread
PREPASS_BYTES = 3 * 8 * _WINDOW + MAX_SPAN  # of arrays a thread takes for that
_SHORT_RUN = 256 * 1024  # bytes worth a system call of their own
_CHUNK = 1 << 17  # elements that are read, computed and rounded at a time
_EXACT = 1 << 14  # elements that are computed in float64 at a time: they stay in a core's cache
_ZEROS = memoryview(bytes(CHUNK))


@dataclass(frozen=True)
class Resolved:
    """What the prepass found: the numbers behind the plan's symbols, and the mean rows; and scales, found since."""

    numbers: dict[Statistic, float]
    rows: dict[View, np.ndarray]
    scales: FoundScales = field(default_factory=FoundScales)

    def number(self, value: float | Statistic) -> float:
        """The value itself, or the one behind the symbol."""
        return self.numbers[value] if isinstance(value, Statistic) else value

    def named(self, tensors: Iterable[TensorPlan]) -> dict[str, float]:
        """The numbers behind the symbols that these tensors use, by the symbol's text."""
        used = (piece_number(piece) for tensor in tensors for piece in tensor.pieces)
        return {str(value): self.numbers[value] for value in used if isinstance(value, Statistic)}


def resolve(
    tensors: Iterable[TensorPlan], reader: FileReader, workers: int, *, allow_nonfinite: bool = False
) -> Resolved:
    """Read what the symbols of some plans stand for: a short pass over bounded samples of the sources.

    Args:
        tensors: checked plans.
        reader: reads their sources.
        workers: threads, each of which takes up to `PREPASS_BYTES`.
        allow_nonfinite: take numbers that are NaN or infinite as they are.

    Raises:
        NotFinite, ImpossibleState: one is, of weights, or of an optimizer's state.
    """
    tensors = list(tensors)
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    values = map(piece_number, pieces)
    statistics = list(dict.fromkeys(value for value in values if isinstance(value, Statistic)))
    row_means = list(dict.fromkeys(piece.source for piece in pieces if isinstance(piece, RowMean)))
    with ThreadPoolExecutor(workers) as pool:
        numbers = dict(zip(statistics, pool.map(lambda one: measure(one, reader), statistics), strict=True))
        rows = dict(zip(row_means, pool.map(lambda view: row_mean(view, reader), row_means), strict=True))
    of_state = {piece_number(piece) for tensor in tensors if tensor.nonnegative for piece in tensor.pieces}
    for statistic, number in numbers.items():
        if statistic in of_state and not 0.0 <= number < math.inf:
            raise ImpossibleState(
                f"{statistic} is {number}: what no optimizer goes on from, and --allow-nonfinite is for weights; leave "
                "--optimizer out."
            )
        if not allow_nonfinite and not math.isfinite(number):
            raise NotFinite(
                f"{statistic} is {number}, so no new weights can be drawn like it: the tensor holds a NaN, an infinity "
                "or numbers too large to square; repair it, or --allow-nonfinite takes it as it is."
            )
    return Resolved(numbers, rows)


@np.errstate(over="ignore", invalid="ignore")  # what is no finite number is told where it is written
def measure(statistic: Statistic, reader: FileReader) -> float:
    """The mean or standard deviation of a window, over at most 4 Mi evenly spread elements.

    Computed in float64 and rounded to float32, so that the order in which values are added does not show.
    """
    count, mean, squares = 0, 0.0, 0.0  # of those seen: how many, their mean, the squares of their distances from it
    for part in _sample(statistic.view, reader):
        values = scratch("exact", part.size, np.dtype(np.float64))
        values[:] = part.reshape(-1)
        part_mean = float(values.mean())
        values -= part_mean
        np.square(values, out=values)
        distance = part_mean - mean
        squares += float(values.sum()) + distance**2 * count * values.size / (count + values.size)
        mean += distance * values.size / (count + values.size)
        count += values.size
    return float(np.float32(mean if statistic.kind == "mean" else math.sqrt(squares / count))) * statistic.factor


def _sample(view: View, reader: FileReader) -> Iterator[np.ndarray]:
    """Windows of a window, of at most `_WINDOW` elements: all there are, or evenly spread ones. Each is overwritten."""
    if view.numel <= _SAMPLE:
        starts = [*range(0, view.numel, _WINDOW)]
    else:
        count = _SAMPLE // _WINDOW
        starts = [index * (view.numel - _WINDOW) // (count - 1) for index in range(count)]
    for start in starts:
        for box in boxes_of_range(view.shape, start, min(start + _WINDOW, view.numel)):
            yield _read(view.window(box), reader)


def _read(view: View, reader: FileReader) -> np.ndarray:
    """A window's elements, which the thread's next call takes away."""
    values = scratch("source", view.shape, view.dtype.numpy)
    reader.read_into(view, values)
    return values


def row_mean(view: View, reader: FileReader) -> np.ndarray:
    """The float64 mean over the rows of a [rows, n] window: [n]. The rows are added in order."""
    rows, width = view.shape
    step = max(1, _WINDOW // width)
    total = np.zeros(width)
    for start in range(0, rows, step):
        for row in _read(view[start : start + step], reader):
            total += row
    return total / rows


@dataclass(frozen=True)
class Needs:
    """What of a tensor's plan decides how much memory a thread takes to make its blocks.

    Args:
        itemsize: bytes of an element of the output.
        numel: elements, up to a grid cell of them.
        is_made: whether anything can be more than runs of bytes that stay as they are.
        source: bytes of an element of the widest source that is changed on its way; 0 if none is.
        cells: grid cells of random words that are held at a time.
        is_exact: whether any is computed in float64.
        looks_up: whether any value comes from a table.
        quantises: whether rows become codes and scales, or the other way.
        packed: values of an element, where elements are blocks.
        block_values: bytes of a value of the widest source that becomes blocks; 0 if none does.
    """

    itemsize: int
    numel: int
    is_made: bool
    source: int
    cells: int
    is_exact: bool
    looks_up: bool
    quantises: bool = False
    packed: int = 1
    block_values: int = 0

    @classmethod
    def of(cls, tensor: TensorPlan) -> "Needs":
        """Those of a tensor."""
        if values := row_values(tensor):
            return replace(cls.of(values), is_made=True, quantises=True)
        copies = [piece for piece in tensor.pieces if isinstance(piece, Copy)]
        ways = {_way(piece, tensor.dtype) for piece in copies}
        changed = [piece for piece in copies if not is_byte_copy(piece, tensor.dtype)]
        is_noisy = any(piece.noise is not None for piece in changed)
        is_random = any(isinstance(piece, Normal) for piece in tensor.pieces)
        return cls(
            tensor.dtype.itemsize,
            min(tensor.numel, GRID),
            bool(tensor.pieces) and not _stays(tensor),
            max((piece.source.dtype.itemsize for piece in changed), default=0),
            KEPT_CELLS if is_noisy or is_random else 0,
            "exact" in ways,
            is_random or is_noisy or "table" in ways,
            any(isinstance(piece, Dequantised) for piece in tensor.pieces),
            tensor.dtype.packed,
            max((p.source.dtype.itemsize for p in tensor.pieces if isinstance(p, BlockQuantised)), default=0),
        )

    def nbytes(self, stretch: int) -> int:
        """The most bytes of arrays a thread holds that makes so many elements at a time: those of `stream`, added up.

        Args:
            stretch: how many.
        """
        moved = 3 * CHUNK  # read, copied, looked at
        if not self.is_made:
            return moved
        made = min(_stretch(stretch, self.packed), self.numel)
        span = min(MAX_SPAN, 2 * made * max(self.itemsize, self.source, self.packed * self.block_values) + CHUNK)
        changed = min(_CHUNK, made) * (self.source + 2 * self.itemsize) if self.source else 0  # and the result's bits
        exact = _EXACT * 128 if self.is_exact else 0  # values, draws, bits, float32; what rounding took
        words = self.cells * GRID * 2 + min(_CHUNK, made) * 2 * (3 if self.cells else 0)
        looked_up = made * self.itemsize + 2 * CHUNK if self.looks_up else 0
        quantised = QUANTISING_BYTES + made if self.quantises else 0
        if self.block_values:
            quantised += min(_CHUNK, made * self.packed) * self.block_values + BLOCK_QUANTISING_BYTES
            quantised += min(_CHUNK // self.packed, made) * self.itemsize
        return moved + made * self.itemsize + span + changed + exact + words + looked_up + quantised


def _stretch(stretch: int, packed: int) -> int:
    """How many elements are made at a time, of which each is so many values."""
    return max(1, stretch // packed)


def row_values(tensor: TensorPlan) -> TensorPlan | None:
    """The tensor whose rows a tensor has the codes or the scales of; None if it is no such."""
    match tensor.pieces:
        case (RowQuantised(values=values) | RowScales(values=values),):
            return values
    return None


def _stays(tensor: TensorPlan) -> bool:
    """Whether a tensor is one run of bytes, or nothing but zeros."""
    match tensor.pieces:
        case (Copy() as piece,):
            return is_byte_copy(piece, tensor.dtype) and piece.source.is_contiguous
        case (Fill(value=0.0),):
            return True
    return False


def _way(piece: Copy, dtype: DType) -> Literal["bytes", "cast", "table", "exact"]:
    """How a copy is made: moved as it is, cast, looked up by its 16 bits, or computed in float64."""
    source = piece.source.dtype
    if is_byte_copy(piece, dtype):
        return "bytes"
    if piece.noise is None and piece.scale == 1.0 and piece.offset == 0.0 and source != FLOAT64:
        return "cast"
    return "table" if piece.noise is None and source.itemsize == 2 else "exact"


def blocks(numel: int) -> Iterator[tuple[int, int]]:
    """The fixed grid a tensor is made on: flat element ranges."""
    return ((start, min(start + BLOCK, numel)) for start in range(0, numel, BLOCK))


def is_zero(tensor: TensorPlan, start: int, stop: int) -> bool:
    """Whether a flat range is all zeros by plan, so that it needs no writing to a preallocated file."""
    return all(isinstance(piece, Fill) and piece.value == 0.0 for piece, *_ in _overlaps(tensor, start, stop))


def copy_runs(tensor: TensorPlan, start: int, stop: int) -> list[tuple[View, int]] | None:
    """A flat range as runs of source bytes that stay as they are, if it is nothing but that and zeros.

    Returns:
        Contiguous windows in order, each with its first element's place in the range; None if anything has to be made,
        or the runs are so short that gathering them in memory is faster.
    """
    runs = []
    for piece, box, at, whole in _overlaps(tensor, start, stop):
        if isinstance(piece, Fill) and piece.value == 0.0:
            continue
        if not isinstance(piece, Copy) or not is_byte_copy(piece, tensor.dtype):
            return None
        view = _source_window(piece, box)
        if not view.is_contiguous or not _is_contiguous(box, whole) or view.nbytes < _SHORT_RUN < tensor.nbytes:
            return None
        strides = row_major_strides(whole.size)
        first = sum((a - b) * stride for a, b, stride in zip(box.start, whole.start, strides, strict=True))
        runs.append((view, at + first))
    return sorted(runs, key=lambda run: run[1])


def source_spans(tensor: TensorPlan, start: int, stop: int) -> Iterator[tuple[ByteSource, int, int]]:
    """What making a flat range reads, as far as it lies together: a file, first byte, one past the last.

    What a statistic or a mean reads is not here, nor windows whose elements lie far apart: their span is others'.
    """
    for piece, box, *_ in _overlaps(tensor, start, stop):
        if isinstance(piece, RowQuantised):  # elements are at the same places in it
            yield from source_spans(piece.values, start, stop)
        if isinstance(piece, Copy | Dequantised | BlockQuantised):
            view = _source_window(piece, box)
            first, last = view.span
            if view.numel and last - first <= 2 * view.nbytes:
                yield view.file, first, last


def _is_contiguous(box: Box, whole: Box) -> bool:
    """Whether a box is one run of a row-major block: a dimension it does not fill has only ones before it."""
    partial = [axis for axis, (n, m) in enumerate(zip(box.size, whole.size, strict=True)) if n != m]
    return not partial or all(n == 1 for n in box.size[: partial[-1]])


def stream(
    tensor: TensorPlan,
    start: int,
    stop: int,
    *,
    reader: FileReader,
    resolved: Resolved,
    seed: int,
    stretch: int = GRID,
    allow_nonfinite: bool = False,
) -> Iterator[memoryview]:
    """The bytes of the elements `start .. stop` of a planned tensor in order, in chunks; each may overwrite the last.

    The arguments are those of `assemble`; `stretch` is how many elements are made at a time, see `working_bytes`.
    """
    values = row_values(tensor)
    if values is not None:
        yield from _stream_rows(tensor, values, start, stop, reader, resolved, stretch, allow_nonfinite)
        return
    runs = copy_runs(tensor, start, stop)
    if runs is None:
        stretch = _stretch(stretch, tensor.dtype.packed)
        for first in range(start, stop, stretch):
            last = min(first + stretch, stop)
            block = scratch("block", last - first, tensor.dtype.numpy)
            assemble(
                tensor,
                first,
                last,
                block,
                reader=reader,
                resolved=resolved,
                seed=seed,
                allow_nonfinite=allow_nonfinite,
            )
            yield block.view(np.uint8).data
        return
    at = 0
    for view, first in runs:
        yield from zeros((first - at) * tensor.dtype.itemsize)
        yield from reader.chunks(view)
        at = first + view.numel
    yield from zeros((stop - start - at) * tensor.dtype.itemsize)


def _stream_rows(
    tensor: TensorPlan,
    values: TensorPlan,
    start: int,
    stop: int,
    reader: FileReader,
    resolved: Resolved,
    stretch: int,
    allow_nonfinite: bool,
) -> Iterator[memoryview]:
    """The codes or the scales of a tensor's rows."""

    def make(first: int, last: int) -> np.ndarray:
        rows = scratch("rows", last - first, values.dtype.numpy)
        assemble(values, first, last, rows, reader=reader, resolved=resolved, seed=0, allow_nonfinite=allow_nonfinite)
        return rows

    way = stream_codes if isinstance(tensor.pieces[0], RowQuantised) else stream_scales
    return way(values, start, stop, stretch, make, resolved.scales)


def zeros(nbytes: int) -> Iterator[memoryview]:
    """So many bytes of zeros, in chunks."""
    return (_ZEROS[: min(CHUNK, nbytes - at)] for at in range(0, nbytes, CHUNK))


def assemble(
    tensor: TensorPlan,
    start: int,
    stop: int,
    block: np.ndarray,
    *,
    reader: FileReader,
    resolved: Resolved,
    seed: int,
    allow_nonfinite: bool = False,
) -> None:
    """Make the elements `start .. stop` of a planned tensor.

    Args:
        tensor: a checked plan.
        start: first element.
        stop: one past the last element.
        block: where to put them: array [stop - start] of the tensor's dtype.
        reader: reads the sources.
        resolved: the numbers behind the plan's symbols.
        seed: seed of the random pieces.
        allow_nonfinite: let what is too large for the tensor's dtype be infinite.

    Raises:
        Overflow: a finite value is too large for the tensor's dtype.
    """
    words: np.ndarray | None = None  # drawn once, if any piece of the block is random
    for piece, box, at, whole in _overlaps(tensor, start, stop):
        here = slice(at, at + whole.numel)
        inside = box.slices_in(whole)
        target = block[here].reshape(whole.size)[inside]
        match piece:
            case Copy():
                _copy(piece, box, target, tensor, reader, resolved, seed, allow_nonfinite)
                words = words if piece.noise is None else None  # noise was drawn over them
            case BlockQuantised():
                _quantise(piece, box, target, tensor, reader)
            case Fill():
                values = np.full(1, resolved.number(piece.value), np.float64)
                target[...] = _rounded(values, values, box, tensor, allow_nonfinite)
            case RowMean():
                first = box.start[-1] - piece.box.start[-1]
                row = resolved.rows[piece.source][first : first + box.size[-1]]
                values = np.empty_like(row)
                scale_and_shift(row, piece.scale, 0.0, tensor.dtype, values)
                target[...] = _rounded(row, values, box, tensor, allow_nonfinite)
            case Normal():
                words = draw_words(seed, tensor.name, start, stop - start) if words is None else words
                table = normal_table(resolved.number(piece.std), tensor.dtype)
                _check_draws(table, resolved.number(piece.std), tensor, allow_nonfinite)
                chosen = words[here].reshape(whole.size)[inside]
                if target.flags.c_contiguous:
                    look_up(table, chosen, target)
                else:
                    target[...] = look_up(table, chosen)
            case Dequantised():
                _dequantise(piece, box, target, tensor, reader, allow_nonfinite)


def _rounded(source: np.ndarray, values: np.ndarray, box: Box, tensor: TensorPlan, allow_nonfinite: bool) -> np.ndarray:
    """A row of float64 values, which repeats in a box, in the tensor's dtype."""
    result = np.empty(values.shape, tensor.dtype.numpy)
    round_once(values, tensor.dtype, result)
    at = None if allow_nonfinite else first_overflow(source, result)
    if at is not None:
        place = (*box.start[:-1], box.start[-1] + at)
        raise _overflow(tensor, place, float(values[at]))
    return result


def _check_draws(table: np.ndarray, std: float, tensor: TensorPlan, allow_nonfinite: bool) -> None:
    if not allow_nonfinite and math.isfinite(std) and not np.isfinite(table[-1].astype(np.float64)):
        raise Overflow(
            f"{tensor.name}: draws with a standard deviation of {std:.6g} are larger than the largest {tensor.dtype}, "
            f"{largest(tensor.dtype):.6g}; a wider --dtype holds them."
        )


def _overflow(tensor: TensorPlan, place: Sequence[int], value: float) -> Overflow:
    """The error for a value at an index into a tensor's layout."""
    flat = sum(index * stride for index, stride in zip(place, row_major_strides(tensor.layout), strict=True))
    index = [*map(int, np.unravel_index(flat, tensor.shape or (1,)))]
    return Overflow(
        f"{tensor.name}{index} is {value:.9g}, the largest {tensor.dtype} is {largest(tensor.dtype):.9g}: a wider "
        "--dtype holds it, --allow-nonfinite makes it infinite."
    )


def _overlaps(tensor: TensorPlan, start: int, stop: int) -> Iterator[tuple[Piece, Box, int, Box]]:
    """Where pieces meet a flat range: piece, shared box, offset in the range, and the contiguous box around it."""
    at = 0
    for whole in boxes_of_range(tensor.layout, start, stop):
        for piece, box in tensor.pieces_in(whole):
            yield piece, box, at, whole
        at += whole.numel


def _source_window(piece: Copy | Dequantised | BlockQuantised, box: Box) -> View:
    """The part of a piece's source that lands in `box`."""
    inside = piece.source.shape[len(box.size) :]  # of a block
    start = tuple(part.start for part in box.slices_in(piece.box))
    return piece.source.window(Box((*start, *(0 for _ in inside)), (*box.size, *inside)))


def _copy(
    piece: Copy,
    box: Box,
    target: np.ndarray,
    tensor: TensorPlan,
    reader: FileReader,
    resolved: Resolved,
    seed: int,
    allow_nonfinite: bool,
) -> None:
    view = _source_window(piece, box)
    if _way(piece, tensor.dtype) == "bytes":
        reader.read_into(view, target)
        return
    changes = piece.scale != 1.0 or piece.offset != 0.0 or piece.noise is not None
    look = not allow_nonfinite and (changes or not widens(view.dtype, tensor.dtype))
    step = _whole_rows(view.shape)
    for start in range(0, view.numel, step):
        for part in boxes_of_range(view.shape, start, min(start + step, view.numel)):
            window = view.window(part)
            source = _read(window, reader)
            here = target[part.slices_in(Box.whole(view.shape))]
            result = here if here.flags.c_contiguous else scratch("result", here.shape, here.dtype)
            _convert(piece, window, source, result, tensor.dtype, resolved, seed)
            at = first_overflow(source, result) if look else None
            if at is not None:
                inside = np.unravel_index(at, window.shape)
                place = [a + b + int(c) for a, b, c in zip(box.start, part.start, inside, strict=True)]
                value = float(source.reshape(-1)[at]) * piece.scale + piece.offset
                raise _overflow(tensor, place, value)
            if result is not here:
                here[...] = result


def _quantise(piece: BlockQuantised, box: Box, target: np.ndarray, tensor: TensorPlan, reader: FileReader) -> None:
    view = _source_window(piece, box)
    values, blocks = view.shape[-1], view.shape[:-1]
    step = _whole_rows(view.shape) // values
    for start in range(0, box.numel, step):
        for part in boxes_of_range(blocks, start, min(start + step, box.numel)):
            source = _read(view.window(Box((*part.start, 0), (*part.size, values))), reader).reshape(-1, values)
            here = target[part.slices_in(Box.whole(blocks))]
            result = scratch("quantised", here.shape, here.dtype)
            block = quantise_q8_0(source, result.reshape(-1))
            if block is not None:
                inside = np.unravel_index(block, part.size)
                place = [a + b + int(c) for a, b, c in zip(box.start, part.start, inside, strict=True)]
                raise _no_scale(tensor, place, source[block])
            here[...] = result


def _no_scale(tensor: TensorPlan, place: Sequence[int], values: np.ndarray) -> NotFinite | Overflow:
    """The error for a block, at an index into a tensor's layout, that no scale is large enough for."""
    exact: np.ndarray = values.astype(np.float64)
    at = int(np.argmax(np.where(np.isfinite(exact), np.abs(exact), np.inf)))
    flat = sum(index * stride for index, stride in zip(place, row_major_strides(tensor.layout), strict=True))
    *rows, block = map(int, np.unravel_index(flat, tensor.shape))
    where = f"{tensor.name}{[*rows, block * len(values) + at]}"
    if not np.isfinite(exact[at]):
        return NotFinite(f"{where} is NaN or infinite, for which {tensor.dtype} has no number; repair it.")
    return Overflow(
        f"{where} is {exact[at]:.9g}, more than 127 times the largest scale of {tensor.dtype}, a float16; a wider type "
        "holds it."
    )


def _dequantise(
    piece: Dequantised, box: Box, target: np.ndarray, tensor: TensorPlan, reader: FileReader, allow_nonfinite: bool
) -> None:
    codes = _source_window(piece, box)
    scales = piece.scales.window(Box(tuple(part.start for part in box.slices_in(piece.box)), box.size))
    step = _whole_rows(codes.shape)
    for start in range(0, codes.numel, step):
        for part in boxes_of_range(codes.shape, start, min(start + step, codes.numel)):
            source = _read(codes.window(part), reader)
            shared = tuple(slice(None) if stride else slice(0, 1) for stride in scales.strides)
            factors = reader.read(scales.window(part)[shared])  # what is repeated, once
            here = target[part.slices_in(Box.whole(codes.shape))]
            products = dequantise(source.view(np.uint8), factors, tensor.dtype, here)
            at = None if allow_nonfinite else first_overflow(products, np.ascontiguousarray(here))
            if at is not None:
                inside = np.unravel_index(at, part.size)
                place = [a + b + int(c) for a, b, c in zip(box.start, part.start, inside, strict=True)]
                raise _overflow(tensor, place, float(products.reshape(-1)[at]))


def _whole_rows(shape: Shape) -> int:
    """About `_CHUNK` elements: as many whole rows of the innermost dimensions as that holds."""
    row = 1
    for size in reversed(shape):
        if row * size > _CHUNK:
            break
        row *= size
    return row * (_CHUNK // row)


def _convert(
    piece: Copy,
    window: View,
    source: np.ndarray,
    result: np.ndarray,
    dtype: DType,
    resolved: Resolved,
    seed: int,
) -> None:
    """What a copy makes of some of its source's elements, in the tensor's dtype: rounded once."""
    way = _way(piece, dtype)
    if way == "table":
        table = scaled_table(window.dtype, piece.scale, piece.offset, dtype)
        look_up(table, source.view("<u2"), result)
        return
    with np.errstate(all="ignore"):  # infinities are for the caller to find
        if way == "cast":
            result[...] = source
            return
        flat, out = source.reshape(-1), result.reshape(-1)
        words = None if piece.noise is None else _words_of(window, piece.noise, seed).reshape(-1)
        for start in range(0, flat.size, _EXACT):
            part = slice(start, start + _EXACT)
            values = scratch("exact", flat[part].size, np.dtype(np.float64))
            scale_and_shift(flat[part], piece.scale, piece.offset, dtype, values)
            if piece.noise is not None and words is not None:
                amplitude = piece.noise.weight * resolved.number(piece.noise.std)
                values += look_up(normal_table(amplitude, FLOAT64), words[part])
            round_once(values, dtype, out[part])


def _words_of(view: View, noise: Noise, seed: int) -> np.ndarray:
    """The random word of each element of a source window, by the element's place in its tensor."""
    if view.is_contiguous:
        begin = (view.offset - noise.origin) // view.dtype.itemsize
        return draw_words(seed, noise.stream, begin, view.numel).reshape(view.shape)
    words = scratch("noise", view.shape, np.dtype("<u2"))
    _gather_words(view, noise, seed, words)
    return words


def _gather_words(view: View, noise: Noise, seed: int, out: np.ndarray) -> None:
    """The same in `out`, part by part where the elements lie far apart, so that few words are drawn for nothing."""
    begin, end = ((position - noise.origin) // view.dtype.itemsize for position in view.span)
    if end - begin <= 2 * view.numel:
        words = draw_words(seed, noise.stream, begin, end - begin)
        strides = tuple(stride * words.itemsize for stride in view.strides)
        out[...] = np.lib.stride_tricks.as_strided(words, view.shape, strides, writeable=False)
        return
    axis = max(range(len(view.shape)), key=lambda axis: view.strides[axis] if view.shape[axis] > 1 else -1)
    for index in range(view.shape[axis]):
        part = (*(slice(None),) * axis, slice(index, index + 1))
        _gather_words(view[part], noise, seed, out[part])
