# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growth, one rule a weight: what is copied where, and what fills the rest.

`zero`. The residual stream gets new features that stay zero: H = [h; 0]. So everything that *writes* the stream
(embed_tokens, o_proj, down_proj) has zeros in its new entries, and the new entries of everything that *reads* it meet
zeros, or feed zeros, and are free: they are drawn at random with the standard deviation of their own tensor, because a
weight that starts at zero on both sides of a product never gets a gradient. Norms take the factor s and eps' of
`Growth`.

`tile`. Features, heads and neurons are repeated as a whole: H = [h; h; ...]. A weight that reads k copies takes 1/k of
its value from each; norms stay as they are. Copies would stay equal for ever, so each takes noise of its own that adds
up to zero over the copies that are read together. An axis that is no multiple of its old size, other than the hidden
one, grows as in `zero`.

`mask`. Old entries are copied as they are and new ones drawn at random, those that write the stream and the outputs of
additional layers included. What keeps the function is not in the weights: the masks of `modeling_teleflm`'s
`TeleFLMMaskedForCausalLM` silence what is new, and raise it over the first steps of training.

`random`, `rms`. As `mask`, but with nothing that silences what is new. `rms` multiplies a matrix whose input axis grows
from n to N entries by sqrt(n / N), so that what it computes keeps its root mean square. Neither preserves the function.

Derivations: Net2Net (arXiv 1511.05641), MSG (arXiv 2305.02869); the RMSNorm factor is worked out in spec.py.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from conversion.checkpoint.dtypes import DType
from conversion.checkpoint.plan import (
    Box,
    Copy,
    Fill,
    Noise,
    Normal,
    Piece,
    RowMean,
    Shape,
    Statistic,
    TensorPlan,
    View,
    complement,
)
from conversion.mapping import EMBED_TOKENS, LM_HEAD, Axis, Weight, axis_size

from .method import Mask, Tile, Zero
from .spec import Growth, key_value_copies

_WRITERS = ("embed_tokens", "o_proj", "down_proj")  # they write the residual stream
_OUTPUTS = ("o_proj", "down_proj")  # what a layer adds to it
_MEAN_ROWS = 4096  # rows that a mean row looks at, at most


@dataclass(frozen=True)
class Part:
    """A block that is copied: its start in the target's layout, its window of the source, and which copy it is."""

    start: Shape
    window: Box
    copy: int = 0


@dataclass(frozen=True)
class AxisGrowth:
    """How one dimension grows.

    Args:
        source: the factors its old size is laid out in.
        target: the factors its new size is laid out in.
        parts: the blocks that are copied.
        copies: how many copies of each entry there are, if all have as many, so that a reader may share among them.
    """

    source: Shape
    target: Shape
    parts: tuple[Part, ...]
    copies: int = 1


def grow_axis(axis: Axis, growth: Growth) -> AxisGrowth:
    """The growth of one kind of dimension: old entries first, new ones after; heads stay in their groups."""
    old, new = axis_size(axis, growth.source), axis_size(axis, growth.target)
    if isinstance(growth.method, Tile) and _repeats(axis, growth):
        copies = new // old
        parts = tuple(Part((t, 0), Box((0, 0), (1, old)), t) for t in range(copies))
        return AxisGrowth((1, old), (copies, old), parts, copies)
    if axis in ("query", "key_value"):
        return _grow_heads(axis, growth)
    return AxisGrowth((old,), (new,), (Part((0,), Box.whole((old,))),))


def _repeats(axis: Axis, growth: Growth) -> bool:
    """Whether `tile` repeats a kind of dimension: by a whole number of times, and heads only in groups as before."""
    source, target = growth.source, growth.target
    if axis in ("query", "key_value") and source.group_size != target.group_size:
        return False
    return axis != "vocab" and axis_size(axis, target) % axis_size(axis, source) == 0


def _grow_heads(axis: Axis, growth: Growth) -> AxisGrowth:
    """Query head (j, r) of the source must land in a group whose key/value head is a copy of j.

    Groups that do not get smaller keep their one key/value head, and the new queries come after the old ones of each
    group. Smaller groups need c copies of it: copy t of head j becomes head j*c + t and serves the old group's queries
    from t*g' on, so the order of the old heads stays as it is.
    """
    source, target, dim = growth.source, growth.target, growth.source.head_dim
    kv_heads, new_kv_heads = source.num_key_value_heads, target.num_key_value_heads
    group, new_group = source.group_size, target.group_size
    copies = key_value_copies(source, target)
    # A run of heads that stay neighbours is one block: all of them, or with copies each (such models have few).
    runs = [(0, kv_heads)] if copies == 1 else [(j, 1) for j in range(kv_heads)]
    places = [(j * copies + t, j, count, t) for j, count in runs for t in range(copies)]
    if axis == "key_value":
        return AxisGrowth(
            source=(kv_heads, dim),
            target=(new_kv_heads, dim),
            parts=tuple(Part((place, 0), Box((j, 0), (count, dim))) for place, j, count, _ in places),
        )
    return AxisGrowth(
        source=(kv_heads, group, dim),
        target=(new_kv_heads, new_group, dim),
        parts=tuple(
            Part((place, 0, 0), Box((j, t * new_group, 0), (count, min(new_group, group - t * new_group), dim)))
            for place, j, count, t in places
        ),
    )


def grow_weight(
    name: str, weight: Weight, source_name: str, view: View, growth: Growth, *, is_copy: bool, dtype: DType
) -> TensorPlan:
    """Plan one weight of the target.

    Args:
        name: its name in the target.
        weight: its line in the table.
        source_name: name of the source's tensor it comes from.
        view: that tensor.
        growth: what grows into what.
        is_copy: whether it belongs to an additional layer, which adds nothing unless the growth has it heard.
        dtype: of the output.
    """
    shape = weight.shape(growth.target)
    kind = weight.name.split(".")[-2]
    # What writes the stream is zero where it is new; masks, or nothing at all, let it be as random as the rest.
    writes_zeros = isinstance(growth.method, Zero | Tile)
    if is_copy and growth.new_layers == "random":
        scale = _scale(weight, kind, growth) * rms_scale(weight, growth)
        return TensorPlan(name, shape, dtype, (_fill_rest(Box.whole(shape), source_name, "", view, scale),))
    if is_copy and kind in _OUTPUTS and growth.new_layers == "silent" and not isinstance(growth.method, Mask):
        return TensorPlan(name, shape, dtype, (Fill(Box.whole(shape)),))

    axes = [grow_axis(axis, growth) for axis in weight.axes]
    layout = tuple(size for axis in axes for size in axis.target)
    shared = axes[-1].copies if len(axes) == 2 and kind != "embed_tokens" else 1  # the input axis of a matrix
    scale = _scale(weight, kind, growth) * rms_scale(weight, growth) / shared
    laid_out = _unflatten(view, axes)
    pieces: list[Piece] = []
    for parts in itertools.product(*(axis.parts for axis in axes)):
        window = Box(_join(part.window.start for part in parts), _join(part.window.size for part in parts))
        box = Box(_join(part.start for part in parts), window.size)
        noise = None
        if shared > 1 and growth.noise:
            std = Statistic("std", source_name, view, scale * growth.noise)
            noise = Noise(std, _balanced_weight(parts[-1].copy, shared), f"{name}/{parts[0].copy}", view.offset)
        pieces.append(Copy(box, laid_out.window(window), scale, noise=noise))
    pieces += _new_vocabulary(weight, view, growth, axes[-1].target, scale)
    rest = complement(layout, [piece.box for piece in pieces])
    pieces += [_fill_rest(box, source_name, kind if writes_zeros else "", view, scale) for box in rest]
    return TensorPlan(name, shape, dtype, tuple(pieces), layout)


def _scale(weight: Weight, kind: str, growth: Growth) -> float:
    if weight.axes == ("hidden",):
        return growth.norm_scale
    return {"embed_tokens": growth.embedding_scale, "lm_head": growth.head_scale}.get(kind, 1.0)


def rms_scale(weight: Weight, growth: Growth) -> float:
    """The factor of `rms` on a weight: sqrt(n / N) for a matrix whose inputs grow from n to N, else 1."""
    if not growth.keeps_rms or len(weight.axes) != 2 or weight is EMBED_TOKENS:
        return 1.0
    inputs = weight.axes[-1]
    return math.sqrt(axis_size(inputs, growth.source) / axis_size(inputs, growth.target))


def _balanced_weight(copy: int, copies: int) -> float:
    """Weights that add up to zero over the copies, all different, with a mean square of 1."""
    return (copy - (copies - 1) / 2) / math.sqrt((copies**2 - 1) / 12)


def _new_vocabulary(weight: Weight, view: View, growth: Growth, hidden: Shape, scale: float) -> list[Piece]:
    """New vocabulary rows.

    In the head they repeat the mean of the rows that no training target ever used: those are very negative, so the new
    logits hardly touch the probabilities. Without such rows, and in the embedding, they are the mean of all.
    """
    old, new = growth.source.vocab_size, growth.target.vocab_size
    if weight not in (EMBED_TOKENS, LM_HEAD) or old == new:
        return []
    scores = weight is LM_HEAD or growth.source.tie_word_embeddings
    first = growth.unused_rows if scores and growth.unused_rows is not None and growth.unused_rows < old else 0
    rows = view[first : old : max(1, (old - first) // _MEAN_ROWS)]
    size = (new - old, *hidden[:-1], view.shape[1])  # every copy of the old features
    return [RowMean(Box((old, *(0 for _ in hidden)), size), rows, scale)]


def _fill_rest(box: Box, source_name: str, kind: str, view: View, scale: float) -> Piece:
    if kind in _WRITERS:
        return Fill(box)
    if len(view.shape) == 1:
        return Fill(box, Statistic("mean", source_name, view, scale))
    return Normal(box, Statistic("std", source_name, view, scale))


def _unflatten(view: View, axes: list[AxisGrowth]) -> View:
    for position in reversed(range(len(axes))):
        view = view.unflatten(position, axes[position].source)
    return view


def _join(parts: Iterable[Shape]) -> Shape:
    return tuple(itertools.chain.from_iterable(parts))
