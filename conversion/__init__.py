# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints to checkpoints: the engine, the formats, the Hub. Imports no torch and no transformers."""

from .checkpoint.execute import CheckpointResult, WriteOptions
from .convert import convert_checkpoint
from .exports.export import export_checkpoint
from .inspect import Inspection, inspect_checkpoint

__all__ = [
    "CheckpointResult",
    "Inspection",
    "WriteOptions",
    "convert_checkpoint",
    "export_checkpoint",
    "inspect_checkpoint",
]
