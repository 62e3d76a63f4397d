# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a run reports to: which package each tracker needs, told before anything is loaded."""

from collections.abc import Sequence

from transformers.integrations import INTEGRATION_TO_CALLBACK, integration_utils

from conversion.checkpoint.errors import one_line
from sft.training.recipe import RecipeError


def check_trackers(reporters: str | Sequence[str] | None) -> None:
    """Check that all trackers of `report_to` can be used.

    Raises:
        RecipeError: there is no such tracker, or its package is missing: how to install it.
    """
    names = [reporters] if isinstance(reporters, str) else list(reporters or ())
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RecipeError(f"report_to is {name}, which transformers does not know; it knows {known}, none.")
        # Asked first: some of transformers' callbacks leave a traceback behind where their package is missing.
        is_there = getattr(integration_utils, f"is_{name}_available", None)
        if is_there is not None and not is_there():
            raise RecipeError(f"report_to is {name}, whose package is not installed: pip install {name}.")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # a package that is there and broken fails in its own way
            raise RecipeError(f"report_to is {name}: {one_line(error).rstrip('.')}.") from error


__all__ = ["check_trackers"]
