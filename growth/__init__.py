# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Function-preserving growth of Tele-FLM checkpoints, and the judge of it.

Names are imported at their first use: whoever verifies a growth loads nothing of what grew.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fold import fold_masks
    from .grow import GrowthResult, grow_checkpoint, plan_growth
    from .method import Mask, Method, Random, Rms, Tile, Zero
    from .spec import Growth
    from .upcycle import Upcycling, upcycle_checkpoint
    from .verification.verify import Verification, verify_checkpoints

__all__ = [
    "Growth",
    "GrowthResult",
    "Mask",
    "Method",
    "Random",
    "Rms",
    "Tile",
    "Upcycling",
    "Verification",
    "Zero",
    "fold_masks",
    "grow_checkpoint",
    "plan_growth",
    "upcycle_checkpoint",
    "verify_checkpoints",
]

_MODULES = {
    "Growth": "spec",
    "GrowthResult": "grow",
    "Mask": "method",
    "Method": "method",
    "Random": "method",
    "Rms": "method",
    "Tile": "method",
    "Upcycling": "upcycle",
    "Verification": "verification.verify",
    "Zero": "method",
    "fold_masks": "fold",
    "grow_checkpoint": "grow",
    "plan_growth": "grow",
    "upcycle_checkpoint": "upcycle",
    "verify_checkpoints": "verification.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
