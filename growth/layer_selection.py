# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which layers of the source the layers of a deeper target come from.

A layer of the target is an original, or a copy whose attention and MLP outputs start at zero, so that it adds nothing
at first. Preservation holds for any choice; where the copies go is a training decision.
"""

from dataclasses import dataclass

from conversion.checkpoint.errors import CheckpointError

NAMED = ("interleave", "stack", "top")


@dataclass(frozen=True)
class LayerOrigin:
    """Where a layer of the target comes from: the source's layer, and whether this is an additional copy of it."""

    source: int
    is_copy: bool


def select_layers(choice: str, source_layers: int, target_layers: int) -> tuple[LayerOrigin, ...]:
    """The origin of each target layer.

    Args:
        choice: `interleave` (copies spread evenly, each after its source), `stack` (copies of the layers from the
            bottom, above all originals), `top` (copies of the last layers, above all originals), or a comma-separated
            list of source layers, each copied once, right after its source.
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
