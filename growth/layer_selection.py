# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which layers of the source the layers of a deeper target come from.

A layer of the target is an original, or an additional one. What an additional layer starts as is a choice of its own
(`NEW_LAYERS`): `silent`, a copy whose attention and MLP outputs are zero, so that it adds nothing at first, which
preserves the function wherever it stands; `active`, a whole copy, as when models are stacked (G_stack, arXiv
2405.15319); `random`, drawn anew. The latter two are heard at once and do not preserve it. From one layer to many, both
are what arXiv 2511.04981 starts with.

Where they go is a training decision. Measured by others: repeating the middle of a model (arXiv 2512.08819), and
inserting nearer to the top, whose backward passes are shorter while only new layers train (arXiv 2508.08011).
"""

from dataclasses import dataclass

from conversion.checkpoint.errors import CheckpointError

NAMED = ("interleave", "stack", "top", "middle", "upper")
NEW_LAYERS = ("silent", "active", "random")


@dataclass(frozen=True)
class LayerOrigin:
    """Where a layer of the target comes from: the source's layer, and whether this is an additional one, after it."""

    source: int
    is_copy: bool


def select_layers(choice: str, source_layers: int, target_layers: int) -> tuple[LayerOrigin, ...]:
    """The origin of each target layer.

    Args:
        choice: `interleave` (copies spread evenly, each after its source), `stack` (copies of the layers from the
            bottom, above all originals), `top` (copies of the last layers, above all originals), `middle` (copies of
            a run of layers in the middle, right after that run), `upper` (copies spread evenly over the upper half,
            each after its source), or a comma-separated list of source layers, each copied once, right after its
            source.
        source_layers: number of layers of the source.
        target_layers: number of layers of the target, at least as many.

    Raises:
        CheckpointError: unknown choice, or a list that does not fit the two numbers.
    """
    extra = target_layers - source_layers
    match choice:
        case "interleave":
            copies = [(i + 1) * extra // source_layers - i * extra // source_layers for i in range(source_layers)]
        case "stack":
            return _originals(source_layers) + tuple(LayerOrigin(i % source_layers, True) for i in range(extra))
        case "top":
            first = -extra % source_layers
            chosen = tuple(LayerOrigin((first + i) % source_layers, True) for i in range(extra))
            return _originals(source_layers) + chosen
        case "middle":
            run = min(extra, source_layers)
            first = (source_layers - run) // 2
            middle = tuple(LayerOrigin(first + i % run, True) for i in range(extra))
            return (*_originals(first + run), *middle, *_originals(source_layers)[first + run :])
        case "upper":
            half = source_layers // 2
            upper = source_layers - half
            copies = [0] * half + [(i + 1) * extra // upper - i * extra // upper for i in range(upper)]
        case _:
            listed = _parse_list(choice, source_layers, extra)
            copies = [listed.count(i) for i in range(source_layers)]
    return tuple(
        origin for i, count in enumerate(copies) for origin in (LayerOrigin(i, False), *(LayerOrigin(i, True),) * count)
    )


def _originals(count: int) -> tuple[LayerOrigin, ...]:
    return tuple(LayerOrigin(i, False) for i in range(count))


def _parse_list(choice: str, source_layers: int, extra: int) -> list[int]:
    try:
        listed = [int(part) for part in choice.split(",")]
    except ValueError:
        known = ", ".join(NAMED)
        raise CheckpointError(f"layers {choice!r} is neither one of {known} nor a list such as 3,7,11.") from None
    if len(listed) != extra:
        raise CheckpointError(f"layers lists {len(listed)} copies, the target has {extra} layers more than the source.")
    outside = [layer for layer in listed if not 0 <= layer < source_layers]
    if outside:
        raise CheckpointError(f"layers lists {outside[0]}, the source has layers 0 to {source_layers - 1}.")
    return listed
