# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the records say of the model that a run begins with: the steps that made it, the last one first.

A run that is resumed began with the model that its checkpoint's record names as the parent, whatever
`model_name_or_path` is by now.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.parent import parent_of
from conversion.checkpoint.sources import open_checkpoint

from .errors import RunError


@dataclass(frozen=True)
class Step:
    """A step that made the model with which a run begins, or made what that was made from.

    Args:
        lineage: what its record says of it; it was in a file that may come from anyone.
        problem: why that may not be true of what came of it; None: nothing is known against it.
    """

    lineage: Mapping[str, Any]
    problem: str | None

    @property
    def operation(self) -> str:
        """In a word."""
        return str(self.lineage.get("operation"))[:40]

    @property
    def keeps_entries(self) -> bool:
        """Whether it only writes a model in another way: rewritten as safetensors, or with its masks folded.

        A conversion of a training checkpoint is none: what was trained there is in no record.
        """
        return self.operation == "fold" or (self.operation == "convert" and "parallel" not in self.lineage)


def steps_before(folder: Path, checkpoint: str | None = None) -> list[Step]:
    """The steps that made the model with which a run begins, the last one first; none without a record.

    Args:
        folder: of the model.
        checkpoint: the one that the run resumes.

    Raises:
        CheckpointError: a record cannot be read.
    """
    record = read_manifest(Path(checkpoint)) if checkpoint else None
    resumed = record.get("lineage") if record else None
    if isinstance(resumed, Mapping) and resumed.get("operation") == "train":
        return list(_back(resumed.get("parent")))
    return list(_back(parent_of(open_checkpoint(folder))))


def check_step(step: Step, folder: Path, key: str) -> None:
    """Check that nothing is known against what a step's record says.

    Args:
        step: the one that counts.
        folder: of the model.
        key: of the run, that needs it.

    Raises:
        RunError: something is.
    """
    if step.problem:
        raise RunError(
            f"{folder}: {key} needs what the record of the step {step.operation!r} says, but {step.problem}; leave "
            "that key out, or restore the folder."
        )


def _back(link: Any) -> Iterator[Step]:
    while isinstance(link, Mapping) and isinstance(lineage := link.get("lineage"), Mapping):
        yield Step(lineage, _problem(link))
        link = lineage.get("parent")


def _problem(link: Mapping[str, Any]) -> str | None:
    """What the step after one found to be wrong with its record; see `conversion.checkpoint.parent`."""
    if link.get("matches") is False:
        return f"the weights are not those of that record any more: {str(link.get('mismatch'))[:200]}"
    return "that record was edited, its checksum is not that of the rest" if link.get("edited") is True else None


__all__ = ["Step", "check_step", "steps_before"]
