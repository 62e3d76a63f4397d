# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The conditions under which a grown model computes its source's function, stated without the code that grew it.

From the two configurations and the map of the layers follows what every block of every tensor has to be: the source's
block times a factor, copies that add up to it, zero, or free. A model that meets these conditions computes the same
function, whoever wrote it and however; the argument needs no input and no tolerance beyond the rounding of what is
stored. `certificate.py` holds the bytes against them.

Nothing here imports the operators or the specification of growth: a mistake there must not repeat itself here.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

from conversion.architecture import Architecture, rope_parameters
from conversion.checkpoint.errors import CheckpointError
from conversion.mapping import EMBED_TOKENS, LM_HEAD, Axis, Weight, axis_size, weights

Rule: TypeAlias = Literal["copy", "sum", "zero", "free"]

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# Of a configuration: what `Architecture` has, each with a condition of its own; and what decides no logit.
_NUMBERS = tuple(field.name for field in fields(Architecture))
_NO_FUNCTION = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
METHODS = ("zero", "tile", "mask")
_NOT_PRESERVING = ("random", "rms")
_MOST_GROWTHS = 4  # each may round every weight once more; beyond these, too much would pass for rounding
_WRITERS = ("embed_tokens", "o_proj", "down_proj")  # they add to the residual stream; everything else reads it
_EXACT = 1e-12  # two numbers of a configuration agree: JSON has them as decimals of 15 digits or more


@dataclass(frozen=True)
class Run:
    """Indices `target .. target + size` along an axis of B hold what `source .. source + size` hold in A."""

    target: int
    source: int
    size: int


AxisMap: TypeAlias = tuple[Run, ...]
"""Where the old entries of an axis are in B, in B's order, maybe several times; what no run covers is new."""


@dataclass(frozen=True)
class LayerSource:
    """The layer of A that a layer of B comes from, and whether it is an additional copy of it."""

    layer: int
    is_copy: bool


@dataclass(frozen=True)
class MeasuredLayer:
    """How far a layer of A moves its input, by which it was or was not chosen to be copied.

    Args:
        layer: its number.
        cosine: 1 - cos(input, output), on average over the tokens of the calibration text.
        relative: |output - input| / |input|, likewise.
        copies: additional layers of B that come from it.
    """

    layer: int
    cosine: float
    relative: float
    copies: int


@dataclass(frozen=True)
class Step:
    """One growth of a lineage.

    Args:
        source: the numbers it started from.
        target: the numbers it led to.
        layers: where each layer comes from.
        method: `zero`, `tile`, `mask`; or `random` or `rms`, which do not preserve the function.
        noise: of `tile`: whether the copies of a weight differ, so that only their sum is A's.
        new_layers: what additional layers started as: `silent`, `active` or `random`.
        alpha: of `mask`: the volume of what is new, at which its masks were folded into the weights; None if they
            were not.
    """

    source: Architecture
    target: Architecture
    layers: tuple[LayerSource, ...]
    method: str = "zero"
    noise: bool = False
    new_layers: str = "silent"
    alpha: float | None = None

    @property
    def departure(self) -> str:
        """By which choice it does not preserve the function; an empty text if it does."""
        if self.method in _NOT_PRESERVING:
            return f"method {self.method}"
        if self.new_layers != "silent" and any(origin.is_copy for origin in self.layers):
            return f"new_layers {self.new_layers}"
        return ""


@dataclass(frozen=True)
class FieldCondition:
    """What a field of B's configuration has to be."""

    field: str
    found: Any
    expected: Any
    holds: bool
    reason: str

    def __str__(self) -> str:
        return f"config.json: {self.field} is {self.found}, expected {self.expected}: {self.reason}."


@dataclass(frozen=True)
class Block:
    """What one block of a tensor has to be.

    Args:
        rule: `copy` of A times the tensor's factor; `sum`: copies side by side add up to that; `zero`; or `free`: any
            finite numbers.
        rows: first row and one past the last; a vector is one row.
        columns: first column and one past the last.
        reason: why.
        source: first row and column of the block in A's tensor, for a copy or a sum.
        others: first columns of the further copies, for a sum.
        largest: of a free block: the largest magnitude there may be.
    """

    rule: Rule
    rows: tuple[int, int]
    columns: tuple[int, int]
    reason: str
    source: tuple[int, int] = (0, 0)
    others: tuple[int, ...] = ()
    largest: float = math.inf

    @property
    def numel(self) -> int:
        """Number of elements, those of all copies."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0]) * (1 + len(self.others))


@dataclass(frozen=True)
class Window:
    """Some rows of one matrix of a stack [matrices, rows, columns].

    Args:
        index: of the matrix.
        first: row.
        rows: how many.
    """

    index: int
    first: int
    rows: int


@dataclass(frozen=True)
class TensorConditions:
    """What a tensor of B has to be.

    Args:
        name: its name.
        source: name of A's tensor that its copies come from; None if it has none.
        factor: on the copies, or on what they add up to.
        blocks: tile the tensor, in bands: blocks of the same rows are neighbours, from left to right.
        window: of a tensor that is a stack, the part that is meant: its rows are those of the blocks.
    """

    name: str
    source: str | None
    factor: float
    blocks: tuple[Block, ...]
    window: Window | None = None


@dataclass(frozen=True)
class Conditions:
    """All that has to hold for B to compute A's function.

    Args:
        growths: number of growths between A and B.
        roundings: how often the weights were written between A and B, rounded each time.
        fields: conditions on config.json, checked: they need no data.
        tensors: conditions on the weights, in data-flow order; none if the configurations are not comparable.
        exact: whether every number and factor that they ask for is one that binary numbers hold: where they are,
            weights that equal what is asked for compute A's function in exact arithmetic.
        notes: why they suffice, a sentence each, said where they hold.
    """

    growths: int
    roundings: int
    fields: tuple[FieldCondition, ...]
    tensors: tuple[TensorConditions, ...]
    exact: bool = False
    notes: tuple[str, ...] = ()


def state_conditions(a: Mapping[str, Any], b: Mapping[str, Any], steps: Sequence[Step]) -> Conditions:
    """State what B has to be to compute A's function.

    Args:
        a: content of the source's config.json.
        b: content of the grown model's config.json.
        steps: the growths that lead from A to B, oldest first; see `growth_steps`.

    Raises:
        CheckpointError: a configuration is unusable, the map does not fit it, the method is unknown, or B has masks
            that do not silence what is new.
    """
    source, target = Architecture.from_config(a, "A's config.json"), Architecture.from_config(b, "B's config.json")
    for step in steps:
        _check_method(step)
    _check_growths(steps)
    _check_noise(source, steps)
    layers = compose_layers([step.layers for step in steps])
    check_layers(layers, source, target)
    roundings = len(steps) + sum(step.alpha is not None for step in steps)
    sizes = tuple(size_conditions(source, target))
    if source.tie_word_embeddings != target.tie_word_embeddings:
        tied = source.tie_word_embeddings
        reason = "the head has weights of its own, or it has not"
        sizes = (*sizes, FieldCondition("tie_word_embeddings", not tied, tied, False, reason))
    if not all(condition.holds for condition in sizes):
        return Conditions(len(steps), roundings, sizes, ())
    maps = {axis: axis_over_steps(axis, source, target, steps) for axis in get_args(Axis)}
    differ = any(step.noise for step in steps)
    fields = (*sizes, *_function_conditions(a, b, source, target, covered(maps["hidden"])))
    tensors = tuple(_weight_conditions(source, target, layers, maps, differ))
    exact = _is_exact(source, target, tensors, covered(maps["hidden"]))
    return Conditions(len(steps), roundings, fields, tensors, exact)


def _check_method(step: Step) -> None:
    if step.departure:
        raise CheckpointError(not_preserved(step.departure))
    if step.method not in METHODS:
        raise CheckpointError(
            f"the lineage has growth by {step.method}; a certificate can be stated for {', '.join(METHODS)} alone: "
            "compare logits instead, with --text FILE."
        )
    if step.method == "mask" and step.alpha != 0:
        state = "not folded into the weights" if step.alpha is None else f"folded at alpha {step.alpha:g}"
        raise CheckpointError(
            f"the masks of B are {state}; only at alpha 0 does it compute A's function: write that with `teleflm fold "
            "--alpha 0`, from the masked checkpoint."
        )


def not_preserved(departure: str) -> str:
    """Why there is nothing to certify: by which choice a growth did not preserve the function."""
    return (
        f"the lineage has growth by {departure}, which does not preserve the function, so there is nothing to "
        "certify, of its function or of moments; how far B is from A is measured on a text: --text FILE, without "
        "--optimizer."
    )


def _check_growths(steps: Sequence[Step]) -> None:
    """Refuse a record by which too much would be rounding: what it says of its steps is not believed."""
    for number, step in enumerate(steps):
        if len(steps) > 1 and step.source == step.target:
            raise CheckpointError(f"growth {number + 1} of the lineage grows nothing; restore B's record.")
    if len(steps) > _MOST_GROWTHS:
        raise CheckpointError(
            f"the lineage has {len(steps)} growths between A and B, a certificate allows for the rounding of "
            f"{_MOST_GROWTHS}; certify each beside the model it started from."
        )


def _check_noise(source: Architecture, steps: Sequence[Step]) -> None:
    """Refuse noise on what earlier growths left silent: its copies cancel, but it is no longer zero."""
    for number, step in enumerate(steps):
        axes: tuple[Axis, ...] = ("hidden", "query", "ffn") if step.noise and number else ()
        for axis in axes:
            old = covered(axis_over_steps(axis, source, step.source, steps[:number]))
            if old < axis_size(axis, step.source):
                raise CheckpointError(
                    f"growth {number + 1} of the lineage repeated, with noise, what earlier ones had added to the "
                    f"{axis} axis; certify each growth beside the model it started from."
                )


# The configuration.


def size_conditions(source: Architecture, target: Architecture) -> Iterator[FieldCondition]:
    """Sizes may only grow, heads keep their size, and every query group must find its key/value head."""
    for field in _SIZES:
        old, new = getattr(source, field), getattr(target, field)
        yield FieldCondition(field, new, f"{old} or more", new >= old, "growth only adds")
    old, new = source.head_dim, target.head_dim
    reason = "rotary frequencies and the softmax scale depend on it"
    yield FieldCondition("head_dim", new, old, new == old, reason)
    need = source.num_key_value_heads * _key_value_copies(source, target)
    found = target.num_key_value_heads
    reason = "each group of queries needs a copy of its key/value head"
    yield FieldCondition("num_key_value_heads", found, f"{need} or more", found >= need, reason)


def _function_conditions(
    a: Mapping[str, Any], b: Mapping[str, Any], source: Architecture, target: Architecture, live: int
) -> Iterator[FieldCondition]:
    """Everything beside the sizes that decides what a model computes; `live` features of B's stream are A's."""
    known = {
        "hidden_act": (a.get("hidden_act", "silu"), b.get("hidden_act", "silu")),
        "rope_parameters": (rope_parameters(a, "A's config.json"), rope_parameters(b, "B's config.json")),
        "tie_word_embeddings": (source.tie_word_embeddings, target.tie_word_embeddings),
    }
    if any(rope_parameters(config)["rope_type"] != "default" for config in (a, b)):
        known["max_position_embeddings"] = (a.get("max_position_embeddings"), b.get("max_position_embeddings"))
    for field, (old, new) in known.items():
        yield FieldCondition(field, new, old, new == old, "another value is another function")
    yield from is_another_function(a, b, known)
    d, width = source.hidden_size, target.hidden_size
    eps, found = source.rms_norm_eps * live / width, target.rms_norm_eps
    holds = math.isclose(found, eps, rel_tol=_EXACT)
    reason = f"{source.rms_norm_eps:g} x {live} / {width}, the share of features that are not zero"
    yield FieldCondition("rms_norm_eps", found, float(f"{eps:.15g}"), holds, reason)
    if source.tie_word_embeddings:
        ratio = _ratio(source.embedding_scale, target.embedding_scale)
        # As a head, a matrix that is copied as it is adds up its copies.
        found = _ratio(source.logit_scale, target.logit_scale) * d / live
        holds = math.isclose(found, ratio, rel_tol=_EXACT)
        reason = "tied, one matrix is embedding and head, and can make up for one factor only"
        yield FieldCondition("output_mult", f"to be made up by x {found:g}", f"x {ratio:g}", holds, reason)


def is_another_function(a: Mapping[str, Any], b: Mapping[str, Any], known: Iterable[str]) -> Iterator[FieldCondition]:
    """Fields with different values of which nothing is known, beside those that are `known` or decide no logit."""
    for field in sorted((a.keys() | b.keys()) - {*known, *_NUMBERS, *_NO_FUNCTION, "rope_theta", "rope_scaling"}):
        if a.get(field) != b.get(field):
            reason = "nothing is known of it that would make another value the same function"
            yield FieldCondition(field, b.get(field), a.get(field), False, reason)


def _is_exact(source: Architecture, target: Architecture, tensors: Sequence[TensorConditions], live: int) -> bool:
    """Whether nothing in the conditions was rounded; in fractions, as JSON's decimals are binary numbers once read.

    The factor on a weight is exact if it is a power of two, and so is what the configurations say it makes up for.
    """
    width = target.hidden_size
    if Fraction(target.rms_norm_eps) * width != Fraction(source.rms_norm_eps) * live:
        return False
    made_up = [
        _embedding_fraction(source) / _embedding_fraction(target),
        _logit_fraction(source) / _logit_fraction(target),
    ]
    share = Fraction(live, width)
    root = Fraction(math.isqrt(share.numerator), math.isqrt(share.denominator))
    if not all(0 < tensor.factor < math.inf for tensor in tensors):
        return False
    factors = [Fraction(tensor.factor) for tensor in tensors]
    return root**2 == share and all(map(_is_power_of_two, [root, *made_up, *factors]))


def _embedding_fraction(architecture: Architecture) -> Fraction:
    return Fraction(architecture.input_mult) if architecture.use_mup else Fraction(1)


def _logit_fraction(architecture: Architecture) -> Fraction:
    if not architecture.use_mup:
        return Fraction(1)
    return Fraction(architecture.output_mult) / Fraction(architecture.mup_scale_factor)


def _is_power_of_two(value: Fraction) -> bool:
    return all(part > 0 and part & (part - 1) == 0 for part in (value.numerator, value.denominator))


# Where the old entries of each axis are.


def axis_map(axis: Axis, source: Architecture, target: Architecture, method: str = "zero") -> AxisMap:
    """Where one growth puts the old entries of an axis.

    `tile` repeats features, heads and neurons as a whole, where the new size is a multiple; heads only if the groups
    stay as large, so that copy t of a query finds copy t of its keys. Otherwise, and by the other methods,
    old features, neurons and vocabulary rows come first. A query head must stay with its keys and values: with g
    queries a key/value head in A and g' in B, each key/value head j is there c = ceil(g / g') times, as heads j*c and
    following, and query r of its group is query r mod g' of the copy j*c + floor(r / g').
    """
    if method == "tile" and _is_repeated(axis, source, target):
        size = axis_size(axis, source)
        return tuple(Run(start, 0, size) for start in range(0, axis_size(axis, target), size))
    if axis not in ("query", "key_value"):
        return (Run(0, 0, axis_size(axis, source)),)
    group, new_group = _group(source), _group(target)
    copies = _key_value_copies(source, target)
    places = {
        "query": [
            ((head // group * copies + head % group // new_group) * new_group + head % group % new_group, head)
            for head in range(source.num_attention_heads)
        ],
        "key_value": [
            (head * copies + copy, head) for head in range(source.num_key_value_heads) for copy in range(copies)
        ],
    }[axis]
    dim = source.head_dim
    return _join(Run(new * dim, old * dim, dim) for new, old in places)


def _is_repeated(axis: Axis, source: Architecture, target: Architecture) -> bool:
    if axis in ("query", "key_value") and _group(source) != _group(target):
        return False
    return axis != "vocab" and axis_size(axis, target) % axis_size(axis, source) == 0


def compose(first: AxisMap, second: AxisMap) -> AxisMap:
    """Where old entries are after two growths."""
    return _join(
        Run(later.target + start - later.source, earlier.source + start - earlier.target, stop - start)
        for later in second
        for earlier in first
        for start in [max(later.source, earlier.target)]
        for stop in [min(later.source + later.size, earlier.target + earlier.size)]
        if start < stop
    )


def compose_layers(maps: Sequence[Sequence[LayerSource]]) -> tuple[LayerSource, ...]:
    """Where layers come from after several growths; a copy of a copy, or the successor of one, is a copy."""
    result = tuple(maps[0])
    for later in maps[1:]:
        outside = [origin.layer for origin in later if origin.layer >= len(result)]
        if outside:
            raise CheckpointError(f"the lineage names layer {outside[0]} of a model with {len(result)} layers.")
        result = tuple(
            LayerSource(result[origin.layer].layer, origin.is_copy or result[origin.layer].is_copy) for origin in later
        )
    return result


def _join(runs: Iterable[Run]) -> AxisMap:
    """Runs in B's order, neighbours in both models made one."""
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: run.target):
        last = joined[-1] if joined else None
        if last and (last.target + last.size, last.source + last.size) == (run.target, run.source):
            joined[-1] = Run(last.target, last.source, last.size + run.size)
        else:
            joined.append(run)
    return tuple(joined)


def _key_value_copies(source: Architecture, target: Architecture) -> int:
    return math.ceil(_group(source) / _group(target))


def _group(architecture: Architecture) -> int:
    return architecture.num_attention_heads // architecture.num_key_value_heads


def covered(axis: AxisMap) -> int:
    """How many entries of B are old ones."""
    return sum(run.size for run in axis)


def check_layers(layers: Sequence[LayerSource], source: Architecture, target: Architecture) -> None:
    """Every layer of A has to run once, in order; copies may stand anywhere."""
    if len(layers) != target.num_hidden_layers:
        raise CheckpointError(
            f"the layer map has {len(layers)} layers, B's config.json says num_hidden_layers "
            f"{target.num_hidden_layers}; restore B's teleflm_manifest.json."
        )
    originals = [origin.layer for origin in layers if not origin.is_copy]
    if originals != list(range(source.num_hidden_layers)):
        raise CheckpointError(
            f"the layer map keeps layers {originals}, expected all {source.num_hidden_layers} of A in order; "
            "A is not what B was grown from."
        )
    outside = [origin.layer for origin in layers if not 0 <= origin.layer < source.num_hidden_layers]
    if outside:
        raise CheckpointError(f"the layer map names layer {outside[0]}, A has {source.num_hidden_layers}.")


# The weights.


def _weight_conditions(
    source: Architecture,
    target: Architecture,
    layers: Sequence[LayerSource],
    maps: Mapping[Axis, AxisMap],
    differ: bool,
) -> Iterator[TensorConditions]:
    """What every weight has to be, so that the stream of B stays H = [h; ...; h; 0], copies of A's before zeros.

    Nothing may write to the features that are zero, so the new entries of what writes are zero; what reads them is
    free. RMSNorm divides by sqrt(n/D) times what it divided by in A if n of the D features are not zero, given eps x
    n/D, and its weights make up for it. What reads k copies of each input adds up k entries, which together must be
    A's one, in every copy of the output. If the copies `differ`, that is all that can be said of them; otherwise each
    is 1/k of it. A layer that is a copy writes nothing at all.
    """
    for name, weight, layer in weights(target):
        origin = layers[layer] if layer is not None else None
        kind = weight.name.split(".")[-2]
        shape = weight.shape(target)
        rows, columns = (shape[0] if len(shape) > 1 else 1), shape[-1]
        source_name = weight.name.format(origin.layer if origin else None)
        if origin is not None and origin.is_copy and kind in _WRITERS:
            reason = f"this layer is an additional copy of layer {origin.layer}, and adds nothing"
            yield TensorConditions(name, source_name, 1.0, (Block("zero", (0, rows), (0, columns), reason),))
            continue
        row_map = maps[weight.axes[0]] if len(shape) > 1 else (Run(0, 0, 1),)
        column_map = maps[weight.axes[-1]]
        is_reader = len(shape) > 1 and weight is not EMBED_TOKENS
        copies = covered(column_map) // axis_size(weight.axes[-1], source) if is_reader else 1
        factor, reason = weight_factor(weight, source, target, covered(maps["hidden"]))
        if copies > 1:
            reason = f"{copies} copies of each input are read together; {reason}"
        is_sum = differ and copies > 1
        blocks = _blocks(rows, columns, row_map, column_map, kind, reason, is_sum)
        yield TensorConditions(name, source_name, factor if is_sum else factor / copies, tuple(blocks))


def axis_over_steps(axis: Axis, source: Architecture, target: Architecture, steps: Sequence[Step]) -> AxisMap:
    """An axis from A to B. The ends are what their config.json says, the record is asked for what lies between."""
    stations = [source, *(step.target for step in steps[:-1]), target]
    maps = (axis_map(axis, *ends, method=step.method) for ends, step in zip(pairwise(stations), steps, strict=True))
    return reduce(compose, maps)


def weight_factor(weight: Weight, source: Architecture, target: Architecture, live: int) -> tuple[float, str]:
    """The factor on a weight's old entries, and why; `live` features of B's stream are A's."""
    width = target.hidden_size
    if weight.axes == ("hidden",) and live != width:
        return math.sqrt(live / width), f"sqrt({live} / {width}), because {width - live} of {width} features are zero"
    if weight is EMBED_TOKENS and source.embedding_scale != target.embedding_scale:
        old, new = source.embedding_scale, target.embedding_scale
        return _ratio(old, new), f"the model multiplies embeddings by {old:g} in A and by {new:g} in B"
    if weight is LM_HEAD and source.logit_scale != target.logit_scale:
        old, new = source.logit_scale, target.logit_scale
        return _ratio(old, new), f"the model multiplies logits by {old:g} in A and by {new:g} in B"
    return 1.0, "old entries stay as they are"


def _ratio(old: float, new: float) -> float:
    """old / new; 1 where they differ by no more than a division that was undone."""
    return 1.0 if math.isclose(old, new, rel_tol=_EXACT) else old / new


def _blocks(
    rows: int, columns: int, row_map: AxisMap, column_map: AxisMap, kind: str, reason: str, is_sum: bool
) -> Iterator[Block]:
    """The blocks of a matrix, band by band: old rows cut at the old columns, new rows in one piece."""
    new: tuple[Rule, str] = ("free", "new entries may be any finite numbers")
    silent: tuple[Rule, str] = ("zero", "new features stay zero, and new heads and neurons add nothing to the old ones")
    rest = silent if kind in _WRITERS else new
    # A new token is no input of A: its embedding is free, in all features.
    new_rows = new if kind == "embed_tokens" else rest
    for start, stop, source_row in segments(rows, row_map):
        if source_row is None:
            yield Block(new_rows[0], (start, stop), (0, columns), new_rows[1])
            continue
        if is_sum:
            yield from _sums((start, stop), source_row, column_map, reason)
        for left, right, source_column in segments(columns, column_map):
            if source_column is None:
                yield Block(rest[0], (start, stop), (left, right), rest[1])
            elif not is_sum:
                yield Block("copy", (start, stop), (left, right), reason, (source_row, source_column))


def _sums(rows: tuple[int, int], source_row: int, column_map: AxisMap, reason: str) -> Iterator[Block]:
    """One block for each run of A's columns whose copies are whole in B, all of them in it."""
    edges = {edge for run in column_map for edge in (run.source, run.source + run.size)}
    for left, right in pairwise(sorted(edges)):
        first, *others = (
            run.target + left - run.source for run in column_map if run.source <= left < run.source + run.size
        )
        yield Block("sum", rows, (first, first + right - left), reason, (source_row, left), tuple(others))


def segments(size: int, runs: AxisMap) -> Iterator[tuple[int, int, int | None]]:
    """An axis of B cut into old and new: start, stop, and where it starts in A (None if new)."""
    at = 0
    for run in runs:
        if at < run.target:
            yield at, run.target, None
        yield run.target, run.target + run.size, run.source
        at = run.target + run.size
    if at < size:
        yield at, size, None


# The record.


def growth_steps(a: Architecture, b: Architecture, lineage: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """The growths that lead from A to B, oldest first, from the lineage in B's manifest.

    Two models of the same sizes need no record: every layer comes from its namesake.

    Raises:
        CheckpointError: the lineage does not lead back to a model of A's sizes, or is not readable.
    """
    if _sizes(a) == _sizes(b):
        return (Step(a, b, tuple(LayerSource(i, False) for i in range(b.num_hidden_layers))),)
    steps: list[Step] = []
    record, alpha = lineage, None
    while isinstance(record, Mapping) and record:
        if record.get("operation") == "fold":
            alpha = _read_alpha(record)
        if record.get("operation") == "grow":
            steps.insert(0, replace(_read_step(record), alpha=alpha))
            alpha = None
            if _sizes(steps[0].source) == _sizes(a):
                return tuple(steps)
        parent = record.get("parent")
        record = parent.get("lineage") if isinstance(parent, Mapping) else None
    if not steps:
        if b.num_hidden_layers < a.num_hidden_layers:
            raise CheckpointError(
                f"B has {b.num_hidden_layers} layers and A has {a.num_hidden_layers}: growth only adds; give the "
                "smaller model first."
            )
        if a.num_hidden_layers != b.num_hidden_layers:
            raise CheckpointError(
                f"B has no record of a growth (teleflm_manifest.json), and {b.num_hidden_layers} layers where A has "
                f"{a.num_hidden_layers}: which are copies is unknown; compare logits instead, with --text FILE."
            )
        return (Step(a, b, tuple(LayerSource(i, False) for i in range(b.num_hidden_layers))),)
    oldest = steps[0].source
    differ = next(field for field in _SIZES if getattr(oldest, field) != getattr(a, field))
    raise CheckpointError(
        f"B was grown from a model with {differ} {getattr(oldest, differ)}, A has {getattr(a, differ)}; "
        "give the model that B's teleflm_manifest.json names."
    )


def expert_departure(lineage: Mapping[str, Any] | None) -> str:
    """By which choice the experts that a lineage ends with are not those of its source; an empty text if they are.

    Raises:
        CheckpointError: the record is not readable.
    """
    record: Any = lineage
    while isinstance(record, Mapping) and record.get("operation") != "upcycle":
        parent = record.get("parent")
        record = parent.get("lineage") if isinstance(parent, Mapping) else None
    noise = record.get("noise", 0) if isinstance(record, Mapping) else 0
    if isinstance(noise, bool) or not isinstance(noise, int | float):
        raise CheckpointError(f"teleflm_manifest.json: noise of experts in the lineage is {noise!r}; restore the file.")
    return f"experts with noise {noise:g}" if noise else ""


def _sizes(architecture: Architecture) -> tuple[int, ...]:
    return tuple(getattr(architecture, field) for field in _SIZES)


def _read_step(record: Mapping[str, Any]) -> Step:
    try:
        layers = tuple(_read_layer(layer) for layer in record["layers"])
        source, target = (
            Architecture.from_config({**record[end], "model_type": "TeleFLM"}, f"teleflm_manifest.json: lineage.{end}")
            for end in ("source", "target")
        )
        noise = record.get("noise", 0)
        if isinstance(noise, bool) or not isinstance(noise, int | float):
            raise TypeError(f"noise ({noise!r})")
        new_layers = str(record.get("new_layers", "silent"))
        return Step(source, target, layers, str(record["method"]), noise=noise != 0, new_layers=new_layers)
    except (KeyError, TypeError) as error:
        text = f"teleflm_manifest.json: the lineage's growth has no usable {error}; restore the file."
        raise CheckpointError(text) from None


def _read_layer(layer: Mapping[str, Any]) -> LayerSource:
    source, is_copy = layer["source"], layer["copy"]
    if type(source) is not int or source < 0 or type(is_copy) is not bool:
        raise CheckpointError(f"teleflm_manifest.json: a layer of the lineage is {dict(layer)}; restore the file.")
    return LayerSource(source, is_copy)


def _read_alpha(record: Mapping[str, Any]) -> float:
    alpha = record.get("alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"teleflm_manifest.json: alpha of a fold in the lineage is {alpha!r}; restore the file.")
    return float(alpha)


def measured_layers(lineage: Mapping[str, Any] | None) -> tuple[MeasuredLayer, ...]:
    """What the last growth of a lineage measured to choose the layers that it copied; empty if it did not.

    Raises:
        CheckpointError: the record is not readable.
    """
    record = lineage
    while record and record.get("operation") != "grow":
        parent = record.get("parent")
        record = parent.get("lineage") if isinstance(parent, Mapping) else None
    distances = (record or {}).get("layer_distances") or ()
    if not isinstance(distances, list | tuple):
        raise CheckpointError(f"manifest.json: layer_distances is {distances!r}, expected a list; restore the file.")
    if not record or not distances:
        return ()
    copied = [origin.layer for origin in _read_step(record).layers if origin.is_copy]
    return tuple(_read_distance(entry, copied) for entry in distances)


def _read_distance(entry: Any, copied: Sequence[int]) -> MeasuredLayer:
    match entry:
        case {"layer": int(layer), "cosine": int() | float() as cosine, "relative": int() | float() as relative}:
            return MeasuredLayer(layer, cosine, relative, copied.count(layer))
    raise CheckpointError(f"teleflm_manifest.json: an entry of layer_distances is {entry!r}; restore the file.")
