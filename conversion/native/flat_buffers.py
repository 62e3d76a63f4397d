# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How Megatron's distributed optimizer lays the parameters of a rank into flat buffers, and cuts these into buckets.

A buffer holds the parameters of one dtype of one virtual stage, last parameter first. Each begins at a multiple of 64
elements of its bucket. A bucket ends with the parameter that fills it, and an embedding that two stages share has one
of its own. Checkpoints leave out what pads a bucket to the number of data-parallel ranks, but not what lies inside it.

The rule is that of megatron-core's _ParamAndGradBuffer (0.16), and of its optimizer's param_layout since.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

_ALIGNMENT = 64  # elements: 128 bytes of 16-bit weights


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter of a buffer lies.

    Args:
        places: of each parameter, in the buffer's order: its bucket, its first element there, and one past its last.
        buckets: elements of each bucket, without what pads its end.
    """

    places: tuple[tuple[int, int, int], ...]
    buckets: tuple[int, ...]

    def ranges(self) -> list[tuple[int, int]]:
        """First element of each parameter, and one past its last, where the buckets follow each other."""
        starts = [sum(self.buckets[:bucket]) for bucket in range(len(self.buckets))]
        return [(starts[bucket] + start, starts[bucket] + end) for bucket, start, end in self.places]


def lay_out(sizes: Sequence[int], *, alone: Collection[int] = (), bucket_size: int | None = None) -> FlatLayout:
    """The layout of parameters of these sizes.

    Args:
        sizes: elements of each parameter, in the buffer's order.
        alone: numbers of those that have a bucket of their own.
        bucket_size: elements after which a bucket is full; all parameters are in one unless given.
    """
    return _lay_out(sizes, alone, lambda _, end: bucket_size is not None and end >= bucket_size)


def lay_out_in(sizes: Sequence[int], buckets: Sequence[int], *, alone: Collection[int] = ()) -> FlatLayout | None:
    """The layout of parameters of these sizes in buckets of known sizes; None if they do not fill them exactly."""
    layout = _lay_out(sizes, alone, lambda bucket, end: bucket < len(buckets) and end == buckets[bucket])
    return layout if layout.buckets == tuple(buckets) else None


def _lay_out(sizes: Sequence[int], alone: Collection[int], is_full: Callable[[int, int], bool]) -> FlatLayout:
    places: list[tuple[int, int, int]] = []
    buckets: list[int] = []
    at, is_empty = 0, True
    for number, size in enumerate(sizes):
        start = -(-at // _ALIGNMENT) * _ALIGNMENT
        if number in alone and not is_empty:
            buckets.append(start)
            start = 0
        end = start + size
        places.append((len(buckets), start, end))
        at, is_empty = end, False
        if number in alone or is_full(len(buckets), end):
            buckets.append(end)
            at, is_empty = 0, True
    if not is_empty:
        buckets.append(at)
    return FlatLayout(tuple(places), tuple(buckets))
