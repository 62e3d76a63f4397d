# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints to checkpoints: the engine, the formats, the Hub. Imports no torch and no transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.execute import CheckpointResult, WriteOptions
    from .convert import convert_checkpoint, convert_to_hub
    from .exports.export import export_checkpoint
    from .inspect import Inspection, inspect_checkpoint

__all__ = [
    "CheckpointResult",
    "Inspection",
    "WriteOptions",
    "convert_checkpoint",
    "convert_to_hub",
    "export_checkpoint",
    "inspect_checkpoint",
]

# Imported when first asked for: a command that converts needs no exports, and `--help` none of all this.
_MODULES = {
    "CheckpointResult": "checkpoint.execute",
    "WriteOptions": "checkpoint.execute",
    "convert_checkpoint": "convert",
    "convert_to_hub": "convert",
    "export_checkpoint": "exports.export",
    "Inspection": "inspect",
    "inspect_checkpoint": "inspect",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
