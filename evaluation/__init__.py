# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a model computes: logits, likelihoods of texts and choices, answers; streamed if it is larger than memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversation import Conversation, open_conversation
    from .measure import Evaluation, evaluate

__all__ = ["Conversation", "Evaluation", "evaluate", "open_conversation"]

# Imported when first asked for: what streams needs nothing of what loads.
_MODULES = {
    "Conversation": "conversation",
    "open_conversation": "conversation",
    "Evaluation": "measure",
    "evaluate": "measure",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
