# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reproducible normal draws, at the speed of a table lookup.

Element `i` of a tensor depends on (seed, tensor name, i) and on nothing else: not on workers, block or shard size,
ranks or interruptions. The tensor's flat index range is cut into a fixed grid; each grid cell has a bit stream of its
own, whose 16-bit words index the quantiles of the normal distribution at 65,536 equal probabilities. That is a normal
distribution truncated at 4.32 standard deviations, with variance 0.99998 and kurtosis 2.999.
"""

import threading
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import xxhash

from .dtypes import DType
from .rounding import KEPT_TABLES, round_once
from .scratch import anonymous_memory, scratch

GRID = 1 << 20  # elements per independent stream
_LEVELS = 1 << 16  # one table entry per 16-bit word
# As many at a time as stay in a core's cache, indices widened to 64 bits included: the interpreter, which one thread
# has at a time, comes between any two.
_DRAWN, _LOOKED_UP = 1 << 16, 1 << 15
_WORD = np.dtype("<u2")
KEPT_CELLS = 2  # of each thread
TABLE_BYTES = _LEVELS * 8  # at most

_kept = threading.local()
_making_tables = threading.Lock()


def draw_words(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """The random 16-bit words of elements `start .. start + count` of a tensor.

    Args:
        seed: the plan's seed, non-negative.
        name: the tensor's name.
        start: first element.
        count: how many.

    Returns:
        uint16 array [count], not to be written to, which the thread's next calls take away.
    """
    stop = start + count
    if start // GRID == (stop - 1) // GRID:
        return _cell(seed, name, start // GRID).words(start % GRID, start % GRID + count)
    words = scratch("words", count, _WORD)
    for begin in range(start - start % GRID, stop, GRID):
        first, last = max(start, begin), min(stop, begin + GRID)
        words[first - start : last - start] = _cell(seed, name, begin // GRID).words(first - begin, last - begin)
    return words


class _Cell:
    """The words of one grid cell, drawn as far as they were asked for.

    A tensor that is made in stretches smaller than a cell asks for them one after the other, and for some of them
    again, where several of its pieces take the same.
    """

    def __init__(self) -> None:
        self.key: tuple[int, str, int] | None = None
        self._words = np.frombuffer(anonymous_memory(GRID * _WORD.itemsize), _WORD)

    def move(self, seed: int, name: str, index: int) -> None:
        """Be another cell from now on."""
        self.key = (seed, name, index)
        entropy = [seed, xxhash.xxh3_128_intdigest(name.encode()), index]
        self._stream = np.random.SFC64(np.random.SeedSequence(entropy))
        self._drawn = 0

    def words(self, start: int, stop: int) -> np.ndarray:
        """Some of its words."""
        while self._drawn < stop:
            part = self._words[self._drawn : self._drawn + _DRAWN]
            part[:] = self._stream.random_raw(_DRAWN // 4).astype("<u8", copy=False).view(_WORD)
            self._drawn += _DRAWN
        return self._words[start:stop]


def _cell(seed: int, name: str, index: int) -> _Cell:
    """A cell, one of the two that the thread used last if it is: a block may have draws of its own and noise."""
    cells: list[_Cell] = _kept.__dict__.setdefault("cells", [])
    place = next((place for place, cell in enumerate(cells) if cell.key == (seed, name, index)), None)
    if place is not None:
        cell = cells.pop(place)
    else:
        cell = cells.pop() if len(cells) == KEPT_CELLS else _Cell()
        cell.move(seed, name, index)
    cells.insert(0, cell)
    return cell


def look_up(table: np.ndarray, words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The table's value for each word, in the words' shape.

    Args:
        table: 65,536 values.
        words: uint16 array.
        out: where to put them, contiguous; else the thread's next call takes them away.
    """
    flat = words.reshape(-1)
    values = scratch("values", flat.size, table.dtype) if out is None else out.reshape(-1)
    for start in range(0, flat.size, _LOOKED_UP):
        chunk = slice(start, start + _LOOKED_UP)
        # Every word is an index, and `wrap` is the mode that writes to `out` without a copy of it.
        table.take(flat[chunk], out=values[chunk], mode="wrap")
    return values.reshape(words.shape)


def normal_table(std: float, dtype: DType) -> np.ndarray:
    """The 65,536 values a word stands for: normal quantiles times `std`, rounded once to `dtype`."""
    with _making_tables:  # one thread makes it, where all would at the first block of a tensor
        return _normal_table(std, dtype)


@lru_cache(maxsize=KEPT_TABLES)
def _normal_table(std: float, dtype: DType) -> np.ndarray:
    table = np.empty(_LEVELS, dtype.numpy)
    round_once(_standard_quantiles() * std, dtype, table)
    table.setflags(write=False)
    return table


@lru_cache(maxsize=1)
def _standard_quantiles() -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS)])
