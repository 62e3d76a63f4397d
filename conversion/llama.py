# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folders of a Llama: which are read as a Tele-FLM is, and which are no more than copied."""

from .architecture import Architecture
from .checkpoint.errors import CheckpointError
from .checkpoint.sources import Source
from .family import is_llama
from .mapping import check_tensors, weights
from .quantisation import quantisation


def why_only_copied(source: Source) -> str | None:
    """Why a Llama is copied without a look at its tensors, and neither grown nor exported.

    Args:
        source: a checkpoint, open.

    Returns:
        The reason, in words; None if there is none, or the model is no Llama at all.
    """
    if not is_llama(source.config):
        return None
    if how := quantisation(source.config, source.tensors):
        return f"it is quantised ({how})"
    try:
        Architecture.from_config(source.config or {}, with_biases=True)
    except CheckpointError as error:
        return str(error).rstrip(".")
    return None


def check_complete(source: Source) -> None:
    """Check that a Llama that is read has every weight of its configuration; others may lie beside them.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    architecture = Architecture.from_config(source.config or {}, f"{source.folder}/config.json", with_biases=True)
    expected = {name for name, *_ in weights(architecture)}
    found = {name: view for name, view in source.tensors.items() if name in expected}
    check_tensors(found, architecture, source.folder)


__all__ = ["check_complete", "why_only_copied"]
