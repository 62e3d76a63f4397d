# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a run reports to: which package each tracker needs, told before anything is loaded."""

from collections.abc import Sequence

from transformers.integrations import INTEGRATION_TO_CALLBACK

from conversion.checkpoint.errors import one_line
from sft.training.recipe import RecipeError

# Those that are extras of this package, by the same name.
EXTRAS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")


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
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # a package that is there and broken fails in its own way
            way_out = f'; pip install "teleflm[{name}]"' if name in EXTRAS else ""
            raise RecipeError(f"report_to is {name}: {one_line(error).rstrip('.')}{way_out}.") from error


__all__ = ["EXTRAS", "check_trackers"]
