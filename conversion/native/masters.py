# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Whether the float32 weights of an optimizer are those that the model was saved with, before they were rounded.

Flat buffers name no parameters, and a file of the optimizer names no iteration. But the model's weights are the
optimizer's, rounded once: what was read from another place, or at another time, is other numbers.
"""

from collections.abc import Iterator

import numpy as np

from ..checkpoint.errors import CheckpointError
from ..checkpoint.plan import Box
from ..checkpoint.reader import FileReader
from ..checkpoint.sharded import ShardedTensor
from .checkpoint import NativeCheckpoint

_SAMPLED = 4096  # elements at either end of each piece


def check_masters(run: NativeCheckpoint) -> None:
    """Compare both ends of every piece of the optimizer's weights with the model's.

    Raises:
        CheckpointError: a weight is another; names it, the place and both values.
    """
    with FileReader() as reader:
        for name, (master, weight) in run.masters.items():
            for box, _ in master.chunks:
                for ends in _ends(box):
                    _compare(run, name, ends, _values(master, ends, reader), _values(weight, ends, reader), weight)


def _compare(
    run: NativeCheckpoint, name: str, box: Box, masters: np.ndarray, weights: np.ndarray, weight: ShardedTensor
) -> None:
    with np.errstate(over="ignore"):  # an infinity then differs
        rounded = masters.astype(weight.dtype.numpy).astype(np.float64)  # to nearest even, as torch does
    found = weights.astype(np.float64)
    odd = np.argwhere((rounded != found) & ~(np.isnan(rounded) & np.isnan(found)))
    if len(odd):
        at = tuple(int(index) for index in odd[0])
        place = [start + index for start, index in zip(box.start, at, strict=True)]
        raise CheckpointError(
            f"{run.folder}: {name} is {float(found[at]):.6g} at {place}, but {float(masters[at]):.6g} in the "
            "optimizer, where it was rounded from: the optimizer's files are of another iteration, laid out in a way "
            "that is not known here, or spoilt when they were saved; leave --optimizer and --fp32-master out."
        )


def _ends(box: Box) -> Iterator[Box]:
    """The first elements of a box in its first row, and the last in its last."""
    count = min(box.size[-1], _SAMPLED)
    first = Box(box.start, (*(1 for _ in box.size[:-1]), count))
    last = Box((*(stop - 1 for stop in box.stop[:-1]), box.stop[-1] - count), first.size)
    yield first
    if last != first:
        yield last


def _values(tensor: ShardedTensor, box: Box, reader: FileReader) -> np.ndarray:
    part = tensor[tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))]
    values = np.zeros(box.size, tensor.dtype.numpy)
    for inner, view in part.chunks:
        if view is not None:
            values[tuple(slice(a, b) for a, b in zip(inner.start, inner.stop, strict=True))] = reader.read(view)
    return values
