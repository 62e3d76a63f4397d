# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the record of a fine-tuned model says of the one that it was made from."""

from typing import Any

from conversion.checkpoint.parent import parent_of
from conversion.checkpoint.sources import Source
from conversion.model_identity import base_digest


def describe_base(base: Source) -> dict[str, Any]:
    """What the lineage of a fine-tuned model says of the one it was made from: its digest, and its own lineage."""
    return {"base": base_digest(base), "parent": parent_of(base)}


__all__ = ["describe_base"]
