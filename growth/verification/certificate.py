# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The certificate of a growth: every byte of the grown model held against the conditions, in one streaming pass.

What a condition allows is worked out here from A's bytes, so that the certificate depends on nothing that the growth
did or recorded, except for its method and the map of its layers.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion.architecture import Architecture
from conversion.checkpoint.dtypes import BY_NAME, DType
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import Source, open_checkpoint
from conversion.mapping import check_tensors

from .conditions import (
    Block,
    Conditions,
    FieldCondition,
    TensorConditions,
    Window,
    expert_departure,
    growth_steps,
    not_preserved,
    state_conditions,
)
from .expert_conditions import EXPERTS_TYPE, state_expert_conditions

_MASKED = "TeleFLMMasked"
_LARGEST_COPY = 16.0  # of copies that add up, in units of the largest value of A among them
_BLOCK = 1 << 18  # elements looked at together, but at least one row: with temporaries about ten megabytes


@dataclass(frozen=True)
class Violation:
    """The first element of a tensor that breaks a condition.

    Args:
        tensor: its name in B.
        row: its row; None in a vector.
        column: its column, or its index in a vector.
        found: what B holds; where copies have to add up to a value, what they do.
        expected: what it has to be, as text.
        count: elements of the tensor that break a condition.
        reason: where the condition comes from.
        others: columns of the further copies that have to add up with this one.
        index: of the matrix, in a stack of them.
    """

    tensor: str
    row: int | None
    column: int
    found: float
    expected: str
    count: int
    reason: str
    others: tuple[int, ...] = ()
    index: int | None = None

    def __str__(self) -> str:
        before = "".join(f"{index}, " for index in (self.index, self.row) if index is not None)
        place = " + ".join(f"[{before}{column}]" for column in (self.column, *self.others))
        more = f" (and {self.count - 1:,} more of its elements)" if self.count > 1 else ""
        return f"{self.tensor}{place} is {self.found!r}, expected {self.expected}: {self.reason}{more}."


@dataclass(frozen=True)
class Fault:
    """An element that breaks a condition: where it is, what it is, and what a copy, a sum or a zero has to be."""

    row: int
    column: int
    found: float
    expected: float


@dataclass(frozen=True)
class BlockResult:
    """What was found in one block: violations, and for copies how far the worst is from the exact value.

    Args:
        block: the condition.
        worst_ulp: largest distance from A's value times the factor, in units in the last place of B's dtype: of that
            value, and where copies add up to it, of the largest of them.
        violations: elements that break the condition.
        first: the first of them.
        all_zero: whether the block is nothing but zeros.
    """

    block: Block
    worst_ulp: float = 0.0
    violations: int = 0
    first: Fault | None = None
    all_zero: bool = True

    def __add__(self, other: "BlockResult") -> "BlockResult":
        """Both parts of the same block, this one first."""
        return BlockResult(
            self.block,
            max(self.worst_ulp, other.worst_ulp),
            self.violations + other.violations,
            self.first or other.first,
            self.all_zero and other.all_zero,
        )


@dataclass(frozen=True)
class TensorResult:
    """What was found in one tensor."""

    conditions: TensorConditions
    dtype: DType
    shape: tuple[int, ...]
    blocks: tuple[BlockResult, ...]

    @property
    def worst_ulp(self) -> float:
        """Largest distance of a copy from its exact value, in units in the last place."""
        return max(block.worst_ulp for block in self.blocks)

    @property
    def violation(self) -> Violation | None:
        """The first element, row by row, that breaks a condition."""
        faults = [(result.block, result.first) for result in self.blocks if result.first]
        if not faults:
            return None
        block, fault = min(faults, key=lambda found: (found[1].row, found[1].column))
        window = self.conditions.window
        return Violation(
            tensor=self.conditions.name,
            row=fault.row + (window.first if window else 0) if len(self.shape) > 1 else None,
            column=fault.column,
            found=fault.found,
            expected=self._expected(block, fault),
            count=sum(result.violations for result in self.blocks),
            reason=block.reason,
            others=tuple(start + fault.column - block.columns[0] for start in block.others),
            index=window.index if window else None,
        )

    def _expected(self, block: Block, fault: Fault) -> str:
        if block.rule not in ("copy", "sum"):
            bounded = "" if block.largest == math.inf else f" of at most {block.largest:g}"
            return {"zero": "0", "free": f"a finite number{bounded}"}[block.rule]
        row, column = (
            source + index - first
            for source, index, first in zip(
                block.source, (fault.row, fault.column), (block.rows[0], block.columns[0]), strict=True
            )
        )
        place = f"[{row}, {column}]" if len(self.shape) > 1 else f"[{column}]"
        return f"{fault.expected!r} from {self.conditions.source}{place} of A"

    @property
    def is_dead(self) -> bool:
        """Whether its new entries are free but all zero, so that training may never move them."""
        free = [block for block in self.blocks if block.block.rule == "free"]
        return bool(free) and all(block.all_zero for block in free)


@dataclass(frozen=True)
class Certificate:
    """What the bytes of B prove.

    Args:
        conditions: what had to hold.
        tensors: what was found, in data-flow order; empty if the configurations are not comparable.
        byte_copies: whether every copy was compared byte by byte: no factor, no sum, and A's dtype.
        asked: the dtype that A's config.json asks loaders for, and B's; None where it asks for none.
        stored: the dtypes of A's weights, and of B's.
    """

    conditions: Conditions
    tensors: tuple[TensorResult, ...]
    byte_copies: bool = False
    asked: tuple[str | None, str | None] = (None, None)
    stored: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def holds(self) -> bool:
        """Whether B computes A's function."""
        return not self.broken_fields and not self.violations

    @property
    def is_identity(self) -> bool:
        """Whether B's weights are A's, byte for byte, none added and none changed."""
        blocks = [block.block for tensor in self.tensors for block in tensor.blocks]
        return self.holds and self.byte_copies and all(block.rule == "copy" for block in blocks)

    @property
    def is_exact(self) -> bool:
        """Whether no copy and no number was rounded: B computes A's function in exact arithmetic, and not nearly so."""
        blocks = [block.block for tensor in self.tensors for block in tensor.blocks]
        return (
            self.conditions.exact
            and all(block.rule != "sum" for block in blocks)
            and all(tensor.worst_ulp == 0 for tensor in self.tensors)
        )

    @property
    def has_new_rows(self) -> bool:
        """Whether B has more vocabulary than A: its old logits may be A's, its probabilities are not."""
        rows = [field for field in self.conditions.fields if field.field == "vocab_size"]
        return bool(rows) and rows[0].expected != f"{rows[0].found} or more"

    @property
    def loading(self) -> str:
        """What becomes of stored weights where a loader follows config.json, a sentence; empty if they stay the same.

        Transformers does, unless it is told a dtype.
        """
        rounded = [
            f"{model}'s config.json asks loaders for {asked}, and its weights are {' and '.join(stored)}"
            for model, asked, stored in zip("AB", self.asked, self.stored, strict=True)
            if asked is not None and not all(_holds(asked, name) for name in stored)
        ]
        if rounded:
            return f"That is said of weights as they are stored: {'; '.join(rounded)}, which that rounds."
        first, second = (asked or " and ".join(stored) for asked, stored in zip(self.asked, self.stored, strict=True))
        if self.is_identity and first != second:
            return f"Loaders that follow config.json compute A in {first} and B in {second}, which round otherwise."
        return ""

    @property
    def precision(self) -> str:
        """How near what was copied is to A's, a phrase."""
        if self.byte_copies:
            return "what was copied is A's byte for byte"
        worst = max((tensor.worst_ulp for tensor in self.tensors), default=0.0)
        if self.is_exact:
            return "what was copied is A's times its factor, exactly"
        return f"what was copied is A's times its factor to within {worst:.3g} units in the last place"

    @property
    def broken_fields(self) -> list[FieldCondition]:
        """Fields of B's configuration that break a condition."""
        return [condition for condition in self.conditions.fields if not condition.holds]

    @property
    def violations(self) -> list[Violation]:
        """The first violation of each tensor that has one, in data-flow order."""
        return [tensor.violation for tensor in self.tensors if tensor.violation]

    @property
    def notes(self) -> list[str]:
        """What holds or does not, beyond yes and no."""
        notes = [*self.conditions.notes] if self.holds else []
        if self.conditions.growths > 1:
            notes.append(f"B is {self.conditions.growths} growths away from A; their layer maps were composed.")
        dead = [tensor.conditions.name for tensor in self.tensors if tensor.is_dead]
        if dead:
            some = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
            notes.append(f"New entries of {len(dead)} tensors are all zero and may never learn: {some}.")
        if self.holds and self.has_new_rows:
            notes.append("Old logits are kept; the new vocabulary rows take part in the softmax beside them.")
        return notes


def certify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    workers: int = default_workers(),
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> Certificate:
    """Prove from the bytes of two checkpoints that B computes A's function, or name what breaks it.

    Copied blocks must be A's times their factor, correctly rounded to B's dtype (byte by byte where the factor is 1 and
    the dtype A's), copies that are read together add up to that within the rounding of each, blocks that must be zero
    zero, and everything finite. B is read once, A as often as it was copied;
    memory is a few megabytes a worker, whatever the model.

    Args:
        a: folder of the source.
        b: folder of the grown model; its record says by which method, and which layers are copies.
        workers: threads.
        progress: called, from any thread, with the bytes just read and those in all.

    Raises:
        CheckpointError: a checkpoint cannot be read, or B's record does not lead back to A.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    is_stack = _config(second).get("model_type") == EXPERTS_TYPE
    conditions = (_expert_conditions if is_stack else _growth_conditions)(first, second)
    results = tuple(_check_all(first, second, conditions, workers, progress))
    return Certificate(
        conditions,
        results,
        bool(results) and all(_is_byte_copy(first, result) for result in results),
        (_asked(_config(first)), _asked(_config(second))),
        (_stored(first), _stored(second)),
    )


def _growth_conditions(a: Source, b: Source) -> Conditions:
    """What B, a larger model of A's kind, has to be."""
    source, target = (
        Architecture.from_config(_config(checkpoint), f"{checkpoint.folder}/config.json") for checkpoint in (a, b)
    )
    check_tensors(a.tensors, source, a.folder)
    check_tensors(b.tensors, target, b.folder)
    manifest = read_manifest(Path(b.folder))
    steps = growth_steps(source, target, manifest["lineage"] if manifest else None)
    return state_conditions(_config(a), _config(b), steps)


def _expert_conditions(a: Source, b: Source) -> Conditions:
    """What B, a GraniteMoE, has to be."""
    source = Architecture.from_config(_config(a), f"{a.folder}/config.json", with_biases=True)
    check_tensors(a.tensors, source, a.folder)
    manifest = read_manifest(Path(b.folder))
    if departure := expert_departure(manifest["lineage"] if manifest else None):
        raise CheckpointError(not_preserved(departure))
    return state_expert_conditions(_config(a), _config(b), b.tensors, b.folder)


def _asked(config: Mapping[str, object]) -> str | None:
    """The dtype that a configuration asks loaders for, in either spelling; None if none."""
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, "auto"):
            return str(config[key])[:40].removeprefix("torch.")
    return None


def _stored(source: Source) -> tuple[str, ...]:
    return tuple(sorted({view.dtype.name for view in source.tensors.values()}))


def _holds(asked: str, stored: str) -> bool:
    """Whether a floating-point type holds every value of another one."""
    if not all(name in BY_NAME and BY_NAME[name].is_floating for name in (asked, stored)):
        return False
    return BY_NAME[asked].holds(BY_NAME[stored])


def _is_byte_copy(a: Source, result: TensorResult) -> bool:
    """Whether what a tensor has of A's was compared byte by byte."""
    rules, source = {block.block.rule for block in result.blocks}, result.conditions.source
    plain = result.conditions.factor == 1.0 and source is not None and result.dtype == a.tensors[source].dtype
    return "sum" not in rules and (plain or "copy" not in rules)


def _config(checkpoint: Source) -> dict[str, object]:
    if checkpoint.config is None:
        raise CheckpointError(f"{checkpoint.folder}/config.json: no such file; the conditions follow from it.")
    if checkpoint.config.get("model_type") == _MASKED:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: model_type is {_MASKED!r}, whose function is not that of its weights "
            "alone; certify the plain model that `teleflm fold --alpha 0` writes."
        )
    return checkpoint.config


def _check_all(
    a: Source, b: Source, conditions: Conditions, workers: int, progress: Callable[[int, int], None]
) -> Iterator[TensorResult]:
    total = sum(_window(b.tensors[tensor.name], tensor.window).nbytes for tensor in conditions.tensors)
    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        # A tensor is a task: a thousand of them, in the order in which the first fault is to be named.
        yield from pool.map(
            lambda tensor: check_tensor(
                a.tensors[tensor.source] if tensor.source is not None else None,
                _window(b.tensors[tensor.name], tensor.window),
                tensor,
                reader,
                roundings=conditions.roundings,
                progress=lambda nbytes: progress(nbytes, total),
            ),
            conditions.tensors,
        )


def _window(view: View, window: Window | None) -> View:
    """The rows [rows, columns] of one matrix of a stack; of no stack, all of it."""
    if window is None:
        return view
    part = view[window.index : window.index + 1, window.first : window.first + window.rows]
    return replace(part, shape=part.shape[1:], strides=part.strides[1:])


def check_tensor(
    a: View | None,
    b: View,
    conditions: TensorConditions,
    reader: FileReader,
    *,
    roundings: int = 1,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> TensorResult:
    """Hold one tensor against its conditions.

    Args:
        a: the source's tensor, [rows, columns] or [n]; None if nothing is copied.
        b: the grown model's.
        conditions: what B's has to be.
        reader: reads both.
        roundings: how often the tensor was rounded between them.
        progress: called with the bytes of B just read.

    Raises:
        CheckpointError: a tensor is not floating-point.
    """
    for view in filter(None, (a, b)):
        if not view.dtype.is_floating:
            raise CheckpointError(f"{view.file}: {conditions.name} has dtype {view.dtype}, expected a floating one.")
    shape, rounding = b.shape, _Rounding(conditions.factor, (a or b).dtype, b.dtype, roundings)
    a, b = _as_matrix(a or b), _as_matrix(b)
    results: list[BlockResult] = []
    for (start, stop), band in groupby(conditions.blocks, key=lambda block: block.rows):
        blocks = list(band)
        found = [BlockResult(block) for block in blocks]
        for low, high in row_ranges(start, stop, b.shape[1]):
            values = reader.read(b[low:high])
            progress(values.nbytes)
            copied = [block for block in blocks if block.rule in ("copy", "sum")]
            originals = reader.read(a[_source_rows(copied[0], low, high)]) if copied else None
            with np.errstate(all="ignore"):  # what no number can be is named as what it is
                found = [
                    before + _check_block(block, low, values, originals, rounding)
                    for before, block in zip(found, blocks, strict=True)
                ]
        results += found
    return TensorResult(conditions, b.dtype, shape, tuple(results))


def _as_matrix(view: View) -> View:
    return view if len(view.shape) > 1 else view.unflatten(0, (1, view.numel))


def row_ranges(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows that are looked at together: first, and one past the last."""
    step = max(1, _BLOCK // columns)
    return ((low, min(low + step, stop)) for low in range(start, stop, step))


def _source_rows(block: Block, low: int, high: int) -> slice:
    first = block.source[0] + low - block.rows[0]
    return slice(first, first + high - low)


@dataclass(frozen=True)
class _Rounding:
    """How the copies of a tensor came to be: `source` elements times a factor, rounded to `dtype`, maybe repeatedly."""

    factor: float
    source: DType
    dtype: DType
    times: int

    @property
    def is_byte_copy(self) -> bool:
        return self.factor == 1.0 and self.source == self.dtype

    @property
    def is_lost(self) -> bool:
        """Whether the factor is so near 1 that every product rounds back to the value it was made from.

        What is off by less than half a unit in the same direction everywhere is another function, not rounding.
        """
        nearest = 2.0 ** -(ml_dtypes.finfo(self.dtype.numpy).nmant + 2)
        return self.factor != 1.0 and self.source == self.dtype and abs(self.factor - 1.0) < nearest

    @property
    def allowed_ulps(self) -> float:
        """How far a correctly rounded copy may be from the exact product, in units in the last place.

        Half a unit for the last rounding, and one for each before it: half a unit of a value just below a power of two
        is a whole one above. A hundredth covers an intermediate result in float32. In float64 the factor itself is
        rounded too. Nothing is near enough to a factor that the dtype cannot express.
        """
        if self.is_lost:
            return -1.0
        return 2.0 * self.times if self.dtype.itemsize == 8 else self.times - 0.5 + 0.01

    def allowed_ulps_of_sum(self, copies: int) -> float:
        """The same for a sum, in units of the largest copy: as much for each of them.

        In float64 the additions here round as well, each by half a unit of a partial sum, which is at most `copies`
        times the largest.
        """
        additions = copies * copies / 2 if self.dtype.itemsize == 8 else 0.0
        return copies * self.allowed_ulps + additions


def _check_block(
    block: Block, low: int, values: np.ndarray, originals: np.ndarray | None, rounding: _Rounding
) -> BlockResult:
    """The rows of a block that start at `low`; `values` [rows, all columns] of B, `originals` the same rows of A."""
    found = values[:, slice(*block.columns)]
    worst, original = 0.0, None
    if originals is not None and block.rule in ("copy", "sum"):
        original = originals[:, block.source[1] : block.source[1] + found.shape[1]]
    if original is None:
        broken = _is_nonzero(found) if block.rule == "zero" else _is_not_finite(found)
        if block.largest != math.inf:
            broken |= np.abs(found.astype(np.float64)) > block.largest
    elif block.rule == "sum":
        copies = [values[:, start : start + found.shape[1]] for start in (block.columns[0], *block.others)]
        found, broken, worst = _check_sum(copies, original, rounding)
    else:
        broken, worst = _check_copy(found, original, rounding)
    all_zero = block.rule == "free" and not _is_nonzero(found).any()
    result = BlockResult(block, worst, int(np.count_nonzero(broken)), None, all_zero)
    if not result.violations:
        return result
    at = np.unravel_index(int(np.argmax(broken)), broken.shape)
    expected = 0.0 if original is None else float(original[at]) * rounding.factor
    fault = Fault(low + int(at[0]), block.columns[0] + int(at[1]), float(found[at]), expected)
    return replace(result, first=fault)


def _check_copy(found: np.ndarray, original: np.ndarray, rounding: _Rounding) -> tuple[np.ndarray, float]:
    """Which elements are not the original times the factor, and the largest distance in units in the last place."""
    unusable = _is_not_finite(found)
    if rounding.is_byte_copy:
        differs = _bits(found) != _bits(original)
        ulps = _ulps(found, original, rounding) if differs.any() else np.zeros(1)
        broken = unusable | differs
    else:
        ulps = _ulps(found, original, rounding)
        broken = unusable | ~(ulps <= rounding.allowed_ulps) | _is_other_scale(found, original, rounding)
    return broken, float(np.max(ulps, where=np.isfinite(ulps), initial=0.0))


def _is_other_scale(found: np.ndarray, original: np.ndarray, rounding: _Rounding) -> np.ndarray:
    """Whether elements that are each correctly rounded are, together, not A's times the factor: all of them, or none.

    Below the smallest normal number a correct rounding may be anything, zero included; and where the factor is nearly
    1, values that lie on the dtype's own grid all round back to what they were.
    """
    nothing, everything = np.zeros(found.shape, bool), np.ones(found.shape, bool)
    values, exact = found.astype(np.float64), original.astype(np.float64) * rounding.factor
    energy = float(np.square(exact).sum())
    if not np.isfinite(energy) or not np.isfinite(values).all() or energy == 0.0:
        return nothing  # named elsewhere, or zero as it has to be
    unit = 2.0 ** -ml_dtypes.finfo(rounding.dtype.numpy).nmant
    error = float(np.square(values - exact).sum())
    if error > 1.1 * energy * (max(rounding.allowed_ulps, 0.5) * unit) ** 2:
        return everything
    if rounding.factor != 1.0 and abs(rounding.factor - 1.0) < unit / 4:
        gain = float((values * exact).sum()) / energy * rounding.factor
        return everything if abs(gain - 1.0) <= abs(gain - rounding.factor) else nothing
    return nothing


def _check_sum(
    copies: list[np.ndarray], original: np.ndarray, rounding: _Rounding
) -> tuple[np.ndarray, np.ndarray, float]:
    """What the copies add up to, where that is not the original times the factor, and the largest distance.

    Each copy was rounded to within half a unit in its last place, whatever else it holds, so the sum is within as many
    halves as there are copies, of units of the largest.
    """
    total, largest = np.zeros(original.shape), np.zeros(original.shape)
    for copy in copies:
        wide = copy.astype(np.float64)
        total += wide
        np.maximum(largest, np.abs(wide, out=wide), out=largest)
    distance = np.abs(original.astype(np.float64) * rounding.factor - total)
    ulps = distance / last_place(largest, rounding.dtype)
    broken = ~(ulps <= rounding.allowed_ulps_of_sum(len(copies)))
    # Large copies that cancel would make anything rounding. Noise is less than seven spreads of the weight's own.
    limit = _LARGEST_COPY * float(np.abs(original.astype(np.float64)).max(initial=0.0)) * abs(rounding.factor)
    if limit:
        broken |= largest > limit
    return total, broken, float(np.max(ulps, where=np.isfinite(ulps), initial=0.0))


def _ulps(found: np.ndarray, original: np.ndarray, rounding: _Rounding) -> np.ndarray:
    """Distance of each element from the original times the factor, in units in the last place of that product."""
    exact = original.astype(np.float64)
    exact *= rounding.factor
    units = last_place(exact, rounding.dtype)
    exact -= found.astype(np.float64)
    return np.divide(np.abs(exact, out=exact), units, out=exact)


def last_place(values: np.ndarray, dtype: DType) -> np.ndarray:
    """The unit in the last place of each value, as the dtype has it."""
    limits = ml_dtypes.finfo(dtype.numpy)
    return np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1, limits.minexp) - limits.nmant)


# On the bits, because bfloat16 arithmetic in numpy is far slower than integers.


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _is_nonzero(values: np.ndarray) -> np.ndarray:
    bits = _bits(values)
    return (bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)) != 0


def _is_not_finite(values: np.ndarray) -> np.ndarray:
    limits, bits = ml_dtypes.finfo(values.dtype), _bits(values)
    exponent = bits.dtype.type(((1 << limits.nexp) - 1) << limits.nmant)
    return (bits & exponent) == exponent
