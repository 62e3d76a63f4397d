# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the record of a fine-tuned model says of the one that it was made from."""

from typing import Any

import xxhash

from conversion.checkpoint.parent import parent_of
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import Source


def base_digest(base: Source) -> str:
    """A digest that tells one base model from another, at the cost of the first row of each of its tensors.

    Values count as bfloat16, so that a base is the same in every dtype and container that holds these.
    """
    import ml_dtypes

    digest = xxhash.xxh3_128()
    with FileReader() as reader:
        for name, view in sorted(base.tensors.items()):
            digest.update(f"{name} {list(view.shape)}".encode())
            row = reader.read(view[:1] if view.shape else view)
            digest.update(row.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def describe_base(base: Source) -> dict[str, Any]:
    """What the lineage of a fine-tuned model says of the one it was made from: its digest, and its own lineage."""
    return {"base": base_digest(base), "parent": parent_of(base)}


__all__ = ["base_digest", "describe_base"]
