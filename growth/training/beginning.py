# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the records say of the model that a run begins with: the steps that made it, the last one first.

A run that is resumed began with the model that its checkpoint's record names as the parent, whatever
`model_name_or_path` is by now.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.checkpoint.manifest import read_manifest

Step = Mapping[str, Any]
"""A step of a lineage, see `conversion.checkpoint.parent`; it was in a file that may come from anyone."""


def steps_before(folder: Path, checkpoint: str | None = None) -> list[Step]:
    """The steps that made the model with which a run begins, the last one first; none without a record.

    Args:
        folder: of the model.
        checkpoint: the one that the run resumes.

    Raises:
        CheckpointError: a record cannot be read.
    """
    resumed = _lineage(Path(checkpoint)) if checkpoint else None
    if resumed and resumed.get("operation") == "train":
        return list(_back(_parent(resumed)))
    return list(_back(_lineage(folder)))


def keeps_entries(step: Step) -> bool:
    """Whether a step only writes a model in another way: rewritten as safetensors, or with its masks folded.

    A conversion of a training checkpoint is none: what was trained there is in no record.
    """
    return step.get("operation") == "fold" or (step.get("operation") == "convert" and "parallel" not in step)


def _lineage(folder: Path) -> Step | None:
    record = read_manifest(folder)
    lineage = record.get("lineage") if record else None
    return lineage if isinstance(lineage, Mapping) else None


def _parent(step: Step) -> Step | None:
    link = step.get("parent")
    lineage = link.get("lineage") if isinstance(link, Mapping) else None
    return lineage if isinstance(lineage, Mapping) else None


def _back(step: Step | None) -> Iterator[Step]:
    while step:
        yield step
        step = _parent(step)


__all__ = ["Step", "keeps_entries", "steps_before"]
