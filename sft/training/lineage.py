# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the record of a fine-tuned model says of the one that it was made from."""

from collections.abc import Iterator
from typing import Any

import xxhash

from conversion.checkpoint.parent import parent_of
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import Source

_SPREAD = "spread:"  # before a digest of rows all over each tensor; older ones are of the first row alone
_ROWS = 16


def base_digest(base: Source) -> str:
    """A digest that tells one base model from another, at the cost of 16 rows of each tensor, spread evenly over it.

    It cannot see a change of other rows alone. Values count as bfloat16, so that a base is the same in every dtype and
    container that holds these.
    """
    return _SPREAD + _digest_rows(base, _ROWS)


def is_base(base: Source, recorded: str) -> bool:
    """Whether a base model is the one that a record names by its digest, of this version or of an older one."""
    return recorded == (base_digest(base) if recorded.startswith(_SPREAD) else _digest_rows(base, 1))


def _digest_rows(base: Source, most: int) -> str:
    import ml_dtypes

    digest = xxhash.xxh3_128()
    with FileReader() as reader:
        for name, view in sorted(base.tensors.items()):
            digest.update(f"{name} {list(view.shape)}".encode())
            for row in _rows(view, most):
                digest.update(reader.read(row).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _rows(view: View, most: int) -> Iterator[View]:
    """Windows of a tensor: evenly spread rows, the first and the last among them, if there may be more than one."""
    count = view.shape[0] if view.shape else 1
    places = sorted({index * (count - 1) // max(1, most - 1) for index in range(min(most, count))})
    if not view.shape:
        yield view
        return
    yield from (view[place : place + 1] for place in places)


def describe_base(base: Source) -> dict[str, Any]:
    """What the lineage of a fine-tuned model says of the one it was made from: its digest, and its own lineage."""
    return {"base": base_digest(base), "parent": parent_of(base)}


__all__ = ["base_digest", "describe_base", "is_base"]
