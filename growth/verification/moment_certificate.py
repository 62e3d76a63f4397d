# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The certificate of grown moments: B's optimizer.pt held against the state of A, in one streaming pass.

What a moment has to be follows from the function staying the same. Let an entry w of A have n copies in B, each c w, to
which noise that cancels may be added. With whatever w, B computes A's function of it, so their losses have the same
derivative: c (g'_1 + ... + g'_n) = g, and the mean of the copies' gradients is g' = g / (c n). Copies that are
interchangeable have it each; those that are not (noise, a key/value head repeated for a group of queries that was
split) are given it as their even share. The first moment is linear in gradients and the second one quadratic, so

    m' = m / (c n)        v' = v / (c n)^2

The factor c that the weights have to have, and where the copies are, is taken from `conditions.py`; a masked norm
counts the features that are heard, so its weights have none. A new entry has seen no gradient: its m is 0, and its v is
the mean of A's v over its tensor, times the same factor squared. That mean is taken over all elements, of a tensor of
more than 4,194,304 over 64 windows of 65,536, evenly spread from its first element to its last.

Nothing here imports what grows: a mistake there must not repeat itself here.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np

from conversion.adam_state import AdamState, check_gradients_alone, read_adam_state, read_grown_state
from conversion.architecture import Architecture
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.errors import CheckpointError, printable
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader, boxes_of_range
from conversion.checkpoint.sources import Source, open_checkpoint
from conversion.mapping import EMBED_TOKENS, Axis, Weight, axis_size, weights
from conversion.masked import is_masked, split_masked_config
from conversion.optimizer_state import MOMENTS, OPTIMIZER_FILE

from .certificate import last_place, row_ranges
from .conditions import (
    METHODS,
    AxisMap,
    Run,
    Step,
    axis_over_steps,
    check_layers,
    covered,
    growth_steps,
    segments,
    size_conditions,
    weight_factor,
)

# The order in which a Llama registers the parameters of a layer, and so in which every optimizer lists them.
_LAYER_ORDER = (
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)
_WHOLE_MEAN, _WINDOW = 1 << 22, 1 << 16  # elements: see above
_SLACK = 4e-12  # relative: a factor is known to that, as numbers of a configuration agree to 1e-12


# What has to hold.


@dataclass(frozen=True)
class MomentBlock:
    """A block of a parameter: rows and columns, first and one past the last, and where it starts in A's.

    `source` is the first row and column in A, None for a block that is new. A vector is one row.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    source: tuple[int, int] | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class MomentConditions:
    """What the moments of a parameter of B have to be.

    Args:
        name: of the parameter.
        source: of the parameter of A that it comes from.
        factor: gradient of an old entry in units of A's: on the first moment; its square is on the second.
        reason: where the factor comes from.
        blocks: tile it, in bands from left to right.
        new: why a block is new.
    """

    name: str
    source: str
    factor: float
    reason: str
    blocks: tuple[MomentBlock, ...]
    new: str


def state_moment_conditions(
    source: Architecture, target: Architecture, steps: Sequence[Step]
) -> tuple[MomentConditions, ...]:
    """State what the moments of B have to be, of every parameter in data-flow order.

    Args:
        source: of A.
        target: of B.
        steps: the growths that lead from A to B, see `conditions.growth_steps`.

    Raises:
        CheckpointError: they are several, or not of a kind that says what the moments are; or sizes do not allow it.
    """
    step = _single_growth(steps)
    for condition in size_conditions(source, target):
        if not condition.holds:
            raise CheckpointError(str(condition))
    if source.tie_word_embeddings != target.tie_word_embeddings:
        raise CheckpointError(
            f"config.json: tie_word_embeddings is {target.tie_word_embeddings} in B and {source.tie_word_embeddings} "
            "in A: the moments of a matrix that is head and embedding belong to no other."
        )
    check_layers(step.layers, source, target)
    maps: dict[Axis, AxisMap] = {axis: axis_over_steps(axis, source, target, steps) for axis in get_args(Axis)}
    live = target.hidden_size if step.method == "mask" else covered(maps["hidden"])
    found = []
    for name, weight, layer in weights(target):
        origin = step.layers[layer] if layer is not None else None
        factor, reason = _gradient_factor(weight, source, target, live, maps)
        shape = weight.shape(target)
        rows, columns = (shape[0] if len(shape) > 1 else 1), shape[-1]
        if origin is not None and origin.is_copy:
            new = f"this layer is an additional copy of layer {origin.layer}, and new"
            blocks: tuple[MomentBlock, ...] = (MomentBlock((0, rows), (0, columns), None),)
        else:
            new = "a new entry has seen no gradient"
            row_map = maps[weight.axes[0]] if len(shape) > 1 else (Run(0, 0, 1),)
            blocks = tuple(_blocks(rows, columns, row_map, maps[weight.axes[-1]]))
        source_name = weight.name.format(origin.layer if origin else None)
        found.append(MomentConditions(name, source_name, factor, reason, blocks, new))
    return tuple(found)


def _single_growth(steps: Sequence[Step]) -> Step:
    """The one growth from A to B, if it is one whose moments follow from it."""
    if len(steps) > 1:
        raise CheckpointError(
            f"B is {len(steps)} growths away from A: what is new in it has means of moments that A does not have; "
            "certify each growth's optimizer.pt beside the model and the state that it started from."
        )
    (step,) = steps
    if step.departure:
        raise CheckpointError(
            f"the lineage has growth by {step.departure}, which does not preserve the function, so what its gradients, "
            "and with them its moments, have to be does not follow from A's; leave --optimizer out."
        )
    if step.method not in METHODS:
        raise CheckpointError(
            f"the lineage has growth by {step.method}; moments can be certified for {', '.join(METHODS)} alone: leave "
            "--optimizer out."
        )
    if step.alpha is not None:
        raise CheckpointError(
            f"the masks of B are folded into its weights (alpha {step.alpha:g}), whose moments are not those that were "
            "grown; certify the optimizer.pt of the masked checkpoint, as growth wrote it."
        )
    return step


def _gradient_factor(
    weight: Weight, source: Architecture, target: Architecture, live: int, maps: Mapping[Axis, AxisMap]
) -> tuple[float, str]:
    """1 / (c n) of a weight, and why."""
    scale, reason = weight_factor(weight, source, target, live)
    copies = [covered(maps[axis]) // axis_size(axis, source) for axis in weight.axes]
    reads = len(weight.axes) > 1 and weight is not EMBED_TOKENS  # it shares its value out over the copies it reads
    value = scale / copies[-1] if reads else scale
    number = math.prod(copies)
    if value == 1.0 and number == 1:
        return 1.0, "an old entry keeps its gradient"
    factor = 1.0 / (value * number) if value else math.inf
    if not 0.0 < factor * factor < math.inf:
        raise CheckpointError(
            f"config.json: {weight.name.format('*')} has to be multiplied by {value:g} ({reason}), so its second "
            "moment by a number that there is none for; restore the multipliers."
        )
    return factor, (
        f"its gradient is A's / ({value:.6g} x {number}), of {number} {'copies' if number > 1 else 'copy'} of "
        f"{value:.6g} times the weight ({reason})"
    )


def _blocks(rows: int, columns: int, row_map: AxisMap, column_map: AxisMap) -> Iterator[MomentBlock]:
    for start, stop, source_row in segments(rows, row_map):
        if source_row is None:
            yield MomentBlock((start, stop), (0, columns), None)
            continue
        for left, right, source_column in segments(columns, column_map):
            source = None if source_column is None else (source_row, source_column)
            yield MomentBlock((start, stop), (left, right), source)


def model_order(architecture: Architecture) -> list[str]:
    """The parameters in the order in which the model lists them."""
    layers = range(architecture.num_hidden_layers)
    return [
        "model.embed_tokens.weight",
        *(f"model.layers.{layer}.{part}.weight" for layer in layers for part in _LAYER_ORDER),
        "model.norm.weight",
        *([] if architecture.tie_word_embeddings else ["lm_head.weight"]),
    ]


# What was found.


@dataclass(frozen=True)
class MomentFault:
    """The first element of a moment that is not what it has to be.

    Args:
        moment: `exp_avg` or `exp_avg_sq`.
        parameter: its name in B.
        place: row and column, or the index into a vector; empty if it is not about one element.
        found: what B has, as text.
        expected: what it has to be, as text.
        reason: why.
        count: elements of the moment that are not what they have to be.
    """

    moment: str
    parameter: str
    place: tuple[int, ...]
    found: str
    expected: str
    reason: str
    count: int = 1

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.place))}]" if self.place else ""
        more = f" (and {self.count - 1:,} more of its elements)" if self.count > 1 else ""
        return (
            f"{OPTIMIZER_FILE}: {self.moment} of {self.parameter}{place} is {self.found}, expected {self.expected}: "
            f"{self.reason}{more}."
        )


@dataclass(frozen=True)
class MomentResult:
    """What was found in one moment of one parameter.

    Args:
        conditions: what had to hold.
        moment: `exp_avg` or `exp_avg_sq`.
        worst_ulp: largest distance of an old element from A's times the factor, in units in the last place of float32.
        violations: elements that are not what they have to be.
        fault: the first of them.
        nonfinite: elements that are NaN or infinite as A's are, and so what they have to be.
    """

    conditions: MomentConditions
    moment: str
    worst_ulp: float = 0.0
    violations: int = 0
    fault: MomentFault | None = None
    nonfinite: int = 0

    @property
    def factor(self) -> float:
        """What an old element of A's is multiplied by."""
        return self.conditions.factor ** (1 if self.moment == MOMENTS[0] else 2)


@dataclass(frozen=True)
class MomentCertificate:
    """What the bytes of B's optimizer.pt prove.

    Args:
        source: the file of A's state.
        file: B's.
        moments: what was found in each, in data-flow order, the first moment of a parameter before the second.
        state_faults: what is wrong beside the moments: steps, groups, settings, the order of the names.
        is_sampled: whether a mean of A's was taken over some elements of a tensor.
        identity: of the file of A's state, as the record of what was grown from it has it.
    """

    source: str
    file: str
    moments: tuple[MomentResult, ...]
    state_faults: tuple[str, ...] = ()
    is_sampled: bool = False
    identity: str = ""

    @property
    def faults(self) -> list[str]:
        """What does not hold, a line each: of every moment the first element."""
        return [*self.state_faults, *(str(result.fault) for result in self.moments if result.fault)]

    @property
    def holds(self) -> bool:
        """Whether B's optimizer.pt is A's state, grown."""
        return not self.faults

    @property
    def worst_ulp(self) -> float:
        """Largest distance of an old moment from its exact value, in units in the last place of float32."""
        return max((result.worst_ulp for result in self.moments), default=0.0)

    @property
    def nonfinite(self) -> int:
        """How many elements are NaN or infinite because A's are."""
        return sum(result.nonfinite for result in self.moments)

    @property
    def elements(self) -> dict[str, int]:
        """How many elements were looked at, of both moments together: `old` and `new` ones."""
        counts = {"old": 0, "new": 0}
        for result in self.moments:
            for block in result.conditions.blocks:
                counts["new" if block.source is None else "old"] += block.numel
        return counts

    @property
    def sentence(self) -> str:
        """What was found, no stronger than it is."""
        if self.holds:
            worst = self.worst_ulp
            precision = f" (to within {worst:.3g} units in the last place of float32)" if worst else ""
            new = ", every new first moment is 0, and every new second one the mean of A's tensor times that square"
            sampled = f" (of {_WHOLE_MEAN:,} elements of it, where it has more)" if self.is_sampled else ""
            return (
                "B's optimizer.pt is the state that was given as A's, grown: steps, groups and settings are that "
                "state's, every old first moment is its own times the factor of the gradient, every old second one "
                f"times the square of it{precision}{new + sampled if self.elements['new'] else ''}.{self._lost}"
            )
        more = f" {len(self.faults) - 1} more are broken." if len(self.faults) > 1 else ""
        return f"B's optimizer.pt is not the state that was given as A's, grown. {self.faults[0]}{more}{self._lost}"

    @property
    def _lost(self) -> str:
        """That A's state is one that no training goes on from, if it is."""
        count = self.nonfinite
        return f" {count:,} of the elements are NaN or infinite as A's are: no optimizer goes on from these." * (
            count > 0
        )


# The check.


def certify_moments(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    optimizer: str | os.PathLike[str],
    *,
    workers: int = default_workers(),
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> MomentCertificate:
    """Prove from the bytes that the optimizer.pt of B is the state of A grown with the weights, or name what is not.

    Old moments must be A's times the factor of the gradient, correctly rounded to float32; those of new entries 0 and
    the mean of A's, within the rounding of both to float32. What is NaN or infinite in A has to be that in B. B's state
    is read once, A's as often as it was copied and once for its means; memory is a few megabytes a worker.

    Args:
        a: folder of the source; of it, config.json is read.
        b: folder of the grown model, masked ones included as long as their masks were not raised.
        optimizer: a checkpoint of transformers' Trainer, or its optimizer.pt: the state of A.
        workers: threads.
        progress: called, from any thread, with the bytes of B's state just read and those in all.

    Raises:
        CheckpointError: a state cannot be read, is of another model, or what it has to be does not follow.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    source, target = _architecture(first), _architecture(second)
    manifest = read_manifest(Path(second.folder))
    steps = growth_steps(source, target, manifest["lineage"] if manifest else None)
    conditions = state_moment_conditions(source, target, steps)
    if not (Path(b) / OPTIMIZER_FILE).is_file():
        raise CheckpointError(
            f"{b}: holds no {OPTIMIZER_FILE} to certify; grow with --optimizer, or leave --optimizer out here."
        )
    before = read_adam_state(optimizer, source)
    check_gradients_alone(before)
    shapes = {name: weight.shape(target) for name, weight, _ in weights(target)}
    after = read_grown_state(Path(b) / OPTIMIZER_FILE, shapes, as_recorded=False)  # the bytes decide
    total = sum(view.nbytes for views in after.moments.values() for view in views)
    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        results = pool.map(
            lambda wanted: check_moments(before, after, wanted, reader, lambda nbytes: progress(nbytes, total)),
            conditions,
        )
        found = tuple(result for pair in results for result in pair)
    faults = tuple(_state_faults(before, after, conditions, model_order(target)))
    grown = {wanted.source for wanted in conditions if any(block.source is None for block in wanted.blocks)}
    is_sampled = any(before.moments[name][1].numel > _WHOLE_MEAN for name in grown)
    identity = next(iter(before.moments.values()))[0].file.identity
    return MomentCertificate(before.file, after.file, found, faults, is_sampled, identity)


def why_not_certified(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> str | None:
    """Why [`certify_moments`] would refuse B's optimizer.pt, whatever state is given as A's; None: it would not.

    Args:
        a: folder of the source.
        b: folder of the grown model.
    """
    try:
        first, second = open_checkpoint(a), open_checkpoint(b)
        manifest = read_manifest(Path(second.folder))
        source, target = _architecture(first), _architecture(second)
        state_moment_conditions(source, target, growth_steps(source, target, manifest["lineage"] if manifest else None))
    except CheckpointError as error:
        return str(error).partition("; ")[0].rstrip(".")
    return None


def _architecture(checkpoint: Source) -> Architecture:
    where = f"{checkpoint.folder}/config.json"
    config = checkpoint.config
    if config is None:
        raise CheckpointError(f"{where}: no such file; what the moments have to be follows from it.")
    if is_masked(config):
        config, state = split_masked_config(config, where)
        if state["step"]:
            raise CheckpointError(
                f"{where}: growth_state.step is {state['step']}: it was trained on since it was grown, and its moments "
                "are its own; certify what growth wrote, at step 0."
            )
    return Architecture.from_config(config, where)


def _state_faults(
    before: AdamState, after: AdamState, conditions: Sequence[MomentConditions], order: Sequence[str]
) -> Iterator[str]:
    """What is wrong with steps, groups, settings and names."""
    source_of = {wanted.name: wanted.source for wanted in conditions}
    for name in order:
        found, expected = after.steps[name], before.steps[source_of[name]]
        if found != expected:
            line = (
                f"{OPTIMIZER_FILE}: step of {name} is {found:g}, expected {expected:g}, that of {source_of[name]} of A."
            )
            yield line
    if len(after.groups) != len(before.groups):
        found_groups, groups = len(after.groups), len(before.groups)
        yield f"{OPTIMIZER_FILE}: has {found_groups} parameter groups, expected the {groups} of A's state."
        return
    for number, ((settings, names), (wanted, members)) in enumerate(zip(after.groups, before.groups, strict=True)):
        place = f"{OPTIMIZER_FILE}: parameter group {number}"
        expected_names = [name for name in order if source_of[name] in set(members)]
        for name in order:
            if (name in names) != (name in expected_names):
                verb, fact = ("has", "not in") if name in names else ("lacks", "in")
                yield f"{place} {verb} {name}, and {source_of[name]} is {fact} that group of A's state."
                break
        else:
            odd = [pair for pair in zip(names, expected_names, strict=True) if pair[0] != pair[1]]
            if odd:
                yield f"{place} lists {odd[0][0]} where the order of the model's parameters has {odd[0][1]}."
        for key in sorted(settings.keys() | wanted.keys(), key=str):
            old, new = (_plain(side.get(key, "absent")) for side in (wanted, settings))
            if old != new:
                yield f"{place} has {_show(key)} {_show(new)}, expected {_show(old)}, as in A's state."
    yield from _shared_faults(after)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _show(value: Any) -> str:
    return printable(str(value)[:80])


def _shared_faults(state: AdamState) -> Iterator[str]:
    """Moments that lie in bytes of another: a step of the optimizer would change one with the other."""
    places = sorted(
        (str(view.file), *view.span, f"{key} of {name}")
        for name, views in state.moments.items()
        for key, view in zip(MOMENTS, views, strict=True)
        if view.numel
    )
    for (file, _, end, one), (other_file, begin, _, other) in pairwise(places):
        if file == other_file and begin < end:
            yield f"{OPTIMIZER_FILE}: {one} and {other} share storage, expected each to have its own."


def check_moments(
    before: AdamState,
    after: AdamState,
    conditions: MomentConditions,
    reader: FileReader,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[MomentResult, MomentResult]:
    """Hold both moments of a parameter against their conditions.

    Args:
        before: the state of A.
        after: that of B.
        conditions: what B's has to be.
        reader: reads both.
        progress: called with the bytes of B's just read.
    """
    olds, news = before.moments[conditions.source], after.moments[conditions.name]
    has_new = any(block.source is None for block in conditions.blocks)
    mean = _mean(olds[1], reader) if has_new else 0.0
    factor = conditions.factor
    first = _check(olds[0], news[0], MOMENTS[0], factor, None, conditions, reader, progress)
    second = _check(olds[1], news[1], MOMENTS[1], factor**2, mean, conditions, reader, progress)
    return first, second


def _check(
    a: View,
    b: View,
    moment: str,
    factor: float,
    mean: float | None,
    conditions: MomentConditions,
    reader: FileReader,
    progress: Callable[[int], None],
) -> MomentResult:
    """One moment; `mean` is that of A's, times `factor` what new elements have to be; None where they have to be 0."""
    if b.dtype != FLOAT32:
        reason = "growth writes moments of that type"
        return MomentResult(
            conditions,
            moment,
            0.0,
            b.numel,
            MomentFault(moment, conditions.name, (), f"of dtype {b.dtype}", "float32", reason),
        )
    is_vector, is_plain = len(b.shape) == 1, factor == 1.0 and a.dtype == FLOAT32
    a, b = (view.unflatten(0, (1, view.numel)) if is_vector else view for view in (a, b))
    new_values = _mean_range(mean, factor) if mean is not None else (0.0, 0.0)
    worst, violations, nonfinite, faults = 0.0, 0, 0, []
    for (start, stop), band in groupby(conditions.blocks, key=lambda block: block.rows):
        blocks = list(band)
        for low, high in row_ranges(start, stop, b.shape[1]):
            values = reader.read(b[low:high])
            progress(values.nbytes)
            for block in blocks:
                found = values[:, slice(*block.columns)]
                with np.errstate(all="ignore"):  # what no number can be is named as what it is
                    if block.source is None:
                        exact = None
                        broken = _outside(found, *new_values)
                        lost = _same_nonfinite(found, np.float64(mean * factor if mean is not None else 0.0))
                    else:
                        row, column = block.source[0] + low - start, block.source[1]
                        original = reader.read(a[row : row + high - low, column : column + found.shape[1]])
                        broken, exact, distance = _check_old(found, original, factor, is_plain=is_plain)
                        lost = _same_nonfinite(found, exact) & ~np.isfinite(original)
                        worst = max(worst, distance)
                broken &= ~lost
                nonfinite += int(np.count_nonzero(lost))
                count = int(np.count_nonzero(broken))
                violations += count
                if count:
                    at = tuple(map(int, np.unravel_index(int(np.argmax(broken)), broken.shape)))
                    place = (low + at[0], block.columns[0] + at[1])
                    expected = None if exact is None else float(exact[at])
                    faults.append((place, float(found[at]), expected, block))
    if not faults:
        return MomentResult(conditions, moment, worst, nonfinite=nonfinite)
    fault = _name_fault(moment, conditions, min(faults, key=lambda fault: fault[0]), factor, mean, is_vector=is_vector)
    named = MomentFault(*fault, count=violations)
    return MomentResult(conditions, moment, worst, violations, named, nonfinite)


def _name_fault(
    moment: str,
    conditions: MomentConditions,
    fault: tuple[tuple[int, int], float, float | None, MomentBlock],
    factor: float,
    mean: float | None,
    *,
    is_vector: bool,
) -> tuple[str, str, tuple[int, ...], str, str, str]:
    place, found, exact, block = fault
    shown = place[1:] if is_vector else place
    if block.source is not None:
        at = (block.source[0] + place[0] - block.rows[0], block.source[1] + place[1] - block.columns[0])
        where = ", ".join(map(str, at[1:] if is_vector else at))
        expected, reason = f"{exact!r} from {moment} of {conditions.source}[{where}] of A", conditions.reason
    elif mean is None:
        expected, reason = "0", conditions.new
    else:
        expected = f"{mean * factor!r}, the mean of {moment} of {conditions.source} of A times {factor:.6g}"
        reason = conditions.new
    return moment, conditions.name, shown, repr(found), expected, reason


def _check_old(
    found: np.ndarray, original: np.ndarray, factor: float, *, is_plain: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Which elements are not the original times the factor rounded to float32, what that is, the largest distance."""
    exact = original.astype(np.float64)
    if is_plain:  # nothing to round
        return ~((found == original) & np.isfinite(found)), exact, 0.0
    exact *= factor
    ends = [(exact * (1.0 + slack)).astype(np.float32) for slack in (-_SLACK, _SLACK)]
    broken = _outside(found, np.minimum(*ends), np.maximum(*ends))
    ulps = np.abs(exact - found) / last_place(exact, FLOAT32)
    return broken, exact, float(np.max(ulps, where=~broken, initial=0.0))


def _same_nonfinite(found: np.ndarray, exact: np.ndarray | np.float64) -> np.ndarray:
    """Which elements are NaN or infinite as they have to be; of NaN there is only one."""
    return ~np.isfinite(exact) & ((found == exact) | (np.isnan(found) & np.isnan(exact)))


def _outside(found: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    return ~((found >= low) & (found <= high) & np.isfinite(found))


@np.errstate(all="ignore")  # beyond float32 it is infinite, which nothing may be
def _mean_range(mean: float, factor: float) -> tuple[float, float]:
    """The least and the largest float32 that a mean times a factor is, the mean rounded to float32 before, or not."""
    ends = [
        float(np.float32(value * factor * (1.0 + slack)))
        for slack in (-_SLACK, _SLACK)
        for value in (mean * (1.0 + slack), float(np.float32(mean * (1.0 + slack))))
    ]
    return min(ends), max(ends)


def _mean(view: View, reader: FileReader) -> float:
    """The mean of a tensor in float64: of all of it, or of evenly spread windows if it is large."""
    if view.numel <= _WHOLE_MEAN:
        starts = list(range(0, view.numel, _WINDOW))
    else:
        last = _WHOLE_MEAN // _WINDOW - 1
        starts = [(view.numel - _WINDOW) * index // last for index in range(last + 1)]
    total, count = 0.0, 0
    with np.errstate(all="ignore"):  # a mean that is no number is what nothing equals
        for start in starts:
            for box in boxes_of_range(view.shape, start, min(start + _WINDOW, view.numel)):
                values = reader.read(view.window(box))
                total += float(values.astype(np.float64).sum())
                count += values.size
    return total / count


__all__ = ["MomentCertificate", "certify_moments", "model_order", "state_moment_conditions", "why_not_certified"]
