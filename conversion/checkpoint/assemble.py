# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Making the elements of an output tensor from its plan, one block at a time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .dtypes import DType
from .normal_stream import GRID, draw_words, look_up, normal_table, standard_normal_table
from .plan import (
    Box,
    Copy,
    Fill,
    Noise,
    Normal,
    Piece,
    RowMean,
    Statistic,
    TensorPlan,
    View,
    is_byte_copy,
    piece_number,
    row_major_strides,
)
from .reader import CHUNK, FileReader, boxes_of_range
from .scratch import scratch

BLOCK = 4 * GRID  # elements of a unit of work, with a digest of its own: 8 MiB of bfloat16
_SAMPLE = 1 << 22  # a statistic looks at this many elements at most,
_WINDOW = 1 << 16  # in windows of this many, evenly spread
_SHORT_RUN = 256 * 1024  # bytes worth a system call of their own
_CHUNK = 1 << 17  # arithmetic runs over pieces that stay in the cache


@dataclass(frozen=True)
class Resolved:
    """What the prepass found: the numbers behind the plan's symbols, and the mean rows."""

    numbers: dict[Statistic, float]
    rows: dict[View, np.ndarray]

    def number(self, value: float | Statistic) -> float:
        """The value itself, or the one behind the symbol."""
        return self.numbers[value] if isinstance(value, Statistic) else value

    def named(self, tensors: Iterable[TensorPlan]) -> dict[str, float]:
        """The numbers behind the symbols that these tensors use, by the symbol's text."""
        used = (piece_number(piece) for tensor in tensors for piece in tensor.pieces)
        return {str(value): self.numbers[value] for value in used if isinstance(value, Statistic)}


def resolve(tensors: Iterable[TensorPlan], reader: FileReader, workers: int) -> Resolved:
    """Read what the symbols of some plans stand for: a short pass over bounded samples of the sources.

    Args:
        tensors: checked plans.
        reader: reads their sources.
        workers: threads.
    """
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    values = map(piece_number, pieces)
    statistics = list(dict.fromkeys(value for value in values if isinstance(value, Statistic)))
    row_means = list(dict.fromkeys(piece.source for piece in pieces if isinstance(piece, RowMean)))
    with ThreadPoolExecutor(workers) as pool:
        numbers = pool.map(lambda statistic: measure(statistic, reader), statistics)
        rows = pool.map(lambda view: row_mean(view, reader), row_means)
        return Resolved(dict(zip(statistics, numbers, strict=True)), dict(zip(row_means, rows, strict=True)))


def measure(statistic: Statistic, reader: FileReader) -> float:
    """The mean or standard deviation of a window, over at most 4 Mi evenly spread elements.

    Computed in float64 and rounded to float32, so that the order in which a numpy version adds does not show.
    """
    values = np.concatenate([part.astype(np.float64).ravel() for part in _sample(statistic.view, reader)])
    return float(np.float32(values.mean() if statistic.kind == "mean" else values.std())) * statistic.factor


def _sample(view: View, reader: FileReader) -> Iterator[np.ndarray]:
    windows = 1 if view.numel <= _SAMPLE else _SAMPLE // _WINDOW
    size = view.numel if windows == 1 else _WINDOW
    for index in range(windows):
        start = index * (view.numel - size) // max(windows - 1, 1)
        for box in boxes_of_range(view.shape, start, start + size):
            yield reader.read(view.window(box))


def row_mean(view: View, reader: FileReader) -> np.ndarray:
    """The float64 mean over the rows of a [rows, n] window: [n]."""
    rows, width = view.shape
    step = max(1, BLOCK // width)
    total = np.zeros(width)
    for start in range(0, rows, step):
        total += reader.read(view[start : start + step]).astype(np.float64).sum(axis=0)
    return total / rows


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


def _is_contiguous(box: Box, whole: Box) -> bool:
    """Whether a box is one run of a row-major block: a dimension it does not fill has only ones before it."""
    partial = [axis for axis, (n, m) in enumerate(zip(box.size, whole.size, strict=True)) if n != m]
    return not partial or all(n == 1 for n in box.size[: partial[-1]])


def stream(
    tensor: TensorPlan, start: int, stop: int, *, reader: FileReader, resolved: Resolved, seed: int
) -> Iterator[memoryview]:
    """The bytes of the elements `start .. stop` of a planned tensor in order, in chunks; each may overwrite the last.

    The arguments are those of `assemble`.
    """
    runs = copy_runs(tensor, start, stop)
    if runs is None:
        for first in range(start, stop, GRID):
            last = min(first + GRID, stop)
            block = scratch("block", last - first, tensor.dtype.numpy)
            assemble(tensor, first, last, block, reader=reader, resolved=resolved, seed=seed)
            yield block.view(np.uint8).data
        return
    at = 0
    for view, first in runs:
        yield from _zeros((first - at) * tensor.dtype.itemsize)
        yield from reader.chunks(view)
        at = first + view.numel
    yield from _zeros((stop - start - at) * tensor.dtype.itemsize)


def _zeros(nbytes: int) -> Iterator[memoryview]:
    return (memoryview(bytes(min(CHUNK, nbytes - at))) for at in range(0, nbytes, CHUNK))


def assemble(
    tensor: TensorPlan,
    start: int,
    stop: int,
    block: np.ndarray,
    *,
    reader: FileReader,
    resolved: Resolved,
    seed: int,
) -> None:
    """Make the elements `start .. stop` of a planned tensor.

    Args:
        tensor: a checked plan.
        start: first element, on the grid of `blocks`.
        stop: one past the last element.
        block: where to put them: array [stop - start] of the tensor's dtype.
        reader: reads the sources.
        resolved: the numbers behind the plan's symbols.
        seed: seed of the random pieces.
    """
    words: np.ndarray | None = None  # drawn once, if any piece of the block is random
    for piece, box, at, whole in _overlaps(tensor, start, stop):
        here = slice(at, at + whole.numel)
        inside = box.slices_in(whole)
        target = block[here].reshape(whole.size)[inside]
        match piece:
            case Copy():
                _copy(piece, box, target, tensor.dtype, reader, resolved, seed)
                words = words if piece.noise is None else None  # noise was drawn over them
            case Fill():
                target[...] = resolved.number(piece.value)
            case RowMean():
                first = box.start[-1] - piece.box.start[-1]
                target[...] = resolved.rows[piece.source][first : first + box.size[-1]] * piece.scale
            case Normal():
                words = draw_words(seed, tensor.name, start, stop - start) if words is None else words
                table = normal_table(resolved.number(piece.std), tensor.dtype)
                chosen = words[here].reshape(whole.size)[inside]
                if target.flags.c_contiguous:
                    look_up(table, chosen, target)
                else:
                    target[...] = look_up(table, chosen)


def _overlaps(tensor: TensorPlan, start: int, stop: int) -> Iterator[tuple[Piece, Box, int, Box]]:
    """Where pieces meet a flat range: piece, shared box, offset in the range, and the contiguous box around it."""
    at = 0
    for whole in boxes_of_range(tensor.layout, start, stop):
        for piece, box in tensor.pieces_in(whole):
            yield piece, box, at, whole
        at += whole.numel


def _source_window(piece: Copy, box: Box) -> View:
    """The part of a copy's source that lands in `box`."""
    return piece.source.window(Box(tuple(part.start for part in box.slices_in(piece.box)), box.size))


def _copy(
    piece: Copy, box: Box, target: np.ndarray, dtype: DType, reader: FileReader, resolved: Resolved, seed: int
) -> None:
    view = _source_window(piece, box)
    if is_byte_copy(piece, dtype):
        reader.read_into(view, target)
        return
    source = scratch("source", view.shape, view.dtype.numpy)
    reader.read_into(view, source)
    source = source.reshape(-1)
    words = None if piece.noise is None else _words_of(view, piece.noise, seed).reshape(-1)
    compute = np.promote_types(dtype.compute, view.dtype.compute)
    result = scratch("result", source.size, dtype.numpy)
    for start in range(0, source.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        values = source[chunk].astype(compute) * piece.scale + piece.offset
        if piece.noise is not None and words is not None:
            amplitude = piece.noise.weight * resolved.number(piece.noise.std)
            values += look_up(standard_normal_table(compute), words[chunk]) * amplitude
        with np.errstate(over="ignore"):  # an infinity is in the output for the check on finite values to find
            result[chunk] = values
    target[...] = result.reshape(target.shape)


def _words_of(view: View, noise: Noise, seed: int) -> np.ndarray:
    """The random word of each element of a source window, by the element's place in its tensor."""
    begin, end = ((position - noise.origin) // view.dtype.itemsize for position in view.span)
    start = begin // GRID * GRID
    words = draw_words(seed, noise.stream, start, end - start)
    strides = tuple(stride * words.itemsize for stride in view.strides)
    return np.lib.stride_tricks.as_strided(words[begin - start :], view.shape, strides, writeable=False)
