# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which entries of a grown model's tensors are new: those that its source had no counterpart of.

An entry is old if the growth copied it from the source, times a factor and with `tile`'s noise or not; all copies of
an entry are old. All of an additional layer is new, as its moments are (`growth.moments`), although it began as a copy.
Rows and columns grow independently (`growth.operators.grow_axis`), so what is old of a matrix is some rows times some
columns, and the rest is a few boxes.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from conversion.architecture import MODEL_TYPE, Architecture
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.plan import Box
from conversion.mapping import Weight, weights
from conversion.optimizer_state import parameter_names

from .layer_selection import LayerOrigin
from .method import make_method
from .operators import grow_axis
from .request import GROWN
from .spec import Growth

Run = tuple[int, int]
"""Neighbours along a dimension: the first, and how many."""


def read_growth(lineage: Mapping[str, Any], where: str) -> Growth:
    """What grew into what, of the record of a growth.

    Args:
        lineage: of the record, with the operation `grow`; it may come from anyone.
        where: what to call it in errors.

    Raises:
        CheckpointError: it does not say, or contradicts itself.
    """
    sizes = []
    for side in ("source", "target"):
        said = lineage.get(side)
        if not isinstance(said, Mapping):
            raise CheckpointError(f"{where}: the record of the growth has no {side}.")
        sizes.append(Architecture.from_config({**said, "model_type": MODEL_TYPE}, f"{where}: {side} of the growth"))
    source, target = sizes
    for name in (*GROWN, "head_dim"):
        old, new = getattr(source, name), getattr(target, name)
        if new < old or (name == "head_dim" and new != old):
            raise CheckpointError(
                f"{where}: by the record of the growth {name} became {new} of {old}; growth only adds."
            )
    method = make_method(str(lineage.get("method"))[:40])
    origins = []
    listed = lineage.get("layers")
    for entry in listed if isinstance(listed, list) else []:
        number, is_copy = (entry.get("source"), entry.get("copy")) if isinstance(entry, Mapping) else (None, None)
        if type(number) is not int or not 0 <= number < source.num_hidden_layers or type(is_copy) is not bool:
            raise CheckpointError(f"{where}: the record of the growth lists a layer {str(entry)[:80]}.")
        origins.append(LayerOrigin(number, is_copy))
    originals = [origin.source for origin in origins if not origin.is_copy]
    if len(origins) != target.num_hidden_layers or sorted(originals) != list(range(source.num_hidden_layers)):
        raise CheckpointError(
            f"{where}: the record of the growth lists {len(origins)} layers, {len(originals)} of them originals, "
            f"expected {target.num_hidden_layers} and each of the {source.num_hidden_layers} of the source once."
        )
    return Growth(source, target, tuple(origins), method=method)


def new_entries(growth: Growth) -> dict[str, tuple[Box, ...]]:
    """The new entries of each parameter of the target, as boxes of its shape that share no entry; none: nothing is.

    Args:
        growth: what grew into what.
    """
    lines = {name: (weight, layer) for name, weight, layer in weights(growth.target)}
    boxes: dict[str, tuple[Box, ...]] = {}
    for name in parameter_names(growth.target):
        weight, layer = lines[name]
        if layer is not None and growth.layers[layer].is_copy:
            boxes[name] = (Box.whole(weight.shape(growth.target)),)
        else:
            boxes[name] = tuple(_new_boxes(weight, growth))
    return boxes


def _new_boxes(weight: Weight, growth: Growth) -> list[Box]:
    """New rows as a whole; of the old rows, the new columns."""
    old = [_is_old(weight, position, growth) for position in range(len(weight.axes))]
    shape = weight.shape(growth.target)
    new_rows = [Box((first, *(0 for _ in shape[1:])), (count, *shape[1:])) for first, count in _runs(~old[0])]
    if len(shape) == 1:
        return new_rows
    corners = product(_runs(old[0]), _runs(~old[1]))
    return new_rows + [Box((row, column), (height, width)) for (row, height), (column, width) in corners]


def _is_old(weight: Weight, position: int, growth: Growth) -> npt.NDArray[np.bool_]:
    """Along one dimension, which indices the growth copied."""
    axis = grow_axis(weight.axes[position], growth)
    old = np.zeros(axis.target, dtype=bool)
    for part in axis.parts:
        old[Box(part.start, part.window.size).slices_in(Box.whole(axis.target))] = True
    return old.reshape(-1)


def _runs(chosen: npt.NDArray[np.bool_]) -> Sequence[Run]:
    """Neighbours that are chosen, as (first, count)."""
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(last - first)) for first, last in edges.reshape(-1, 2)]


__all__ = ["new_entries", "read_growth"]
