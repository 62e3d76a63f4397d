# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Memory as a budget: how many threads run, and how much each makes at a time, so that all stay within it."""

from collections.abc import Iterable
from dataclasses import dataclass

from . import assemble
from .assemble import PREPASS_BYTES, Needs
from .errors import CheckpointError
from .normal_stream import GRID, TABLE_BYTES
from .plan import RowMean, Statistic, TensorPlan, piece_number, source_views
from .reader import CHUNK
from .rounding import KEPT_TABLES
from .row_quant import KEPT_SCALES_BYTES
from .sizes import format_bytes

# A thread's stack, and the heap that the C library gives it for what is not an array: measured, with room.
THREAD_BYTES = 512 * 1024
# What the program itself comes to hold while its threads run: records of blocks, the manifest, a progress bar.
_PROGRAM_BYTES = 16 * 1024 * 1024
_SMALLEST_STRETCH = 1 << 16  # elements; below, the interpreter takes longer than the arithmetic


@dataclass(frozen=True)
class Share:
    """What a run makes of its budget.

    Args:
        workers: threads that run at once: at most those asked for, and no more than there are blocks.
        stretch: elements that each makes at a time.
        prepass: threads that read samples for the plan's statistics before; 0 if it has none.
        nbytes: the most that all of them hold together, beside the program itself.
    """

    workers: int
    stretch: int
    prepass: int
    nbytes: int


def share_out(tensors: Iterable[TensorPlan], workers: int, memory: int) -> Share:
    """Divide a budget among threads: each makes less at a time before fewer run.

    Args:
        tensors: what is to be made.
        workers: threads that are asked for.
        memory: bytes for all together.

    Raises:
        CheckpointError: it is too small for one thread.
    """
    tensors = list(tensors)
    window = max((view.file.window for tensor in tensors for view in source_views(tensor)), default=0)
    needs = {Needs.of(tensor) for tensor in tensors}
    shared = _PROGRAM_BYTES + (KEPT_SCALES_BYTES if any(need.quantises for need in needs) else 0)
    shared += 2 * KEPT_TABLES * TABLE_BYTES if any(need.looks_up for need in needs) else 0
    asked = min(workers, max(1, sum(-(-tensor.numel // assemble.BLOCK) for tensor in tensors)))

    def each(stretch: int) -> int:
        return THREAD_BYTES + window + max((need.nbytes(stretch) for need in needs), default=0)

    stretch = GRID
    while asked * each(stretch) > memory - shared and stretch > _SMALLEST_STRETCH:
        stretch //= 2
    samples = sum(map(_samples, tensors))
    sampling = THREAD_BYTES + window + PREPASS_BYTES if samples else 0
    least = max(shared + each(stretch), _PROGRAM_BYTES + sampling)
    if memory < least:
        raise CheckpointError(_too_small(memory, least))
    threads = min(asked, (memory - shared) // each(stretch))
    prepass = min(workers, samples, (memory - _PROGRAM_BYTES) // sampling) if samples else 0
    nbytes = max(shared + threads * each(stretch), _PROGRAM_BYTES + prepass * sampling)
    return Share(threads, stretch, prepass, nbytes)


def reading_threads(workers: int, memory: int) -> int:
    """How many of the threads asked for may read at once within a budget, chunk by chunk.

    Raises:
        CheckpointError: it is too small for one.
    """
    each = THREAD_BYTES + 2 * CHUNK
    if memory < each:
        raise CheckpointError(_too_small(memory, each))
    return min(workers, memory // each)


def _samples(tensor: TensorPlan) -> int:
    """How many numbers of a plan need data."""
    return sum(isinstance(piece, RowMean) or isinstance(piece_number(piece), Statistic) for piece in tensor.pieces)


def _too_small(memory: int, least: int) -> str:
    return (
        f"--memory is {format_bytes(memory)}, less than one thread takes here; the least that works is "
        f"{-(-least // 1_000_000)}MB."
    )
