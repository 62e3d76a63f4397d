# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The packages that only an extra installs, and the line that says how to get one that is not here.

Without extras the package converts, grows, verifies and publishes checkpoints, and has no torch.
"""

from collections.abc import Iterator
from types import TracebackType

# Modules that the package itself does not bring, and the least extra that does; setup.cfg says with which versions.
EXTRA_OF = {
    "matplotlib": "report",
    "torch": "model",
    "transformers": "model",
    "safetensors": "model",
    "accelerate": "model",
    "peft": "train",
    "datasets": "train",
    "pyarrow": "train",
    "trl": "sft",
    "regex": "sft",
    "rensa": "sft",
    "scipy": "sft",
    "sklearn": "sft",
    "lm_eval": "eval",
}
# What these do needs all of their extra: whoever lacks one package of it would be told of the next one otherwise.
_EXTRA_OF_CODE = {"sft": "sft", "teleflm.commands.sft": "sft", "growth.training": "train"}


def install_line(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "teleflm[{extra}]"'


def needs(what: str, package: str, extra: str) -> str:
    """What to say of a package that is not here.

    Args:
        what: what needs it.
        package: its name.
        extra: the extra that brings it.
    """
    return f"{what} needs {package}, which is not installed; {install_line(extra)}."


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to say of an import that failed; None where no extra brings that module, so that it is no user's error."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return None
    asked = {
        extra
        for importer in _importers(error.__traceback__)
        for code, extra in _EXTRA_OF_CODE.items()
        if f"{importer}.".startswith(f"{code}.")
    }
    return needs("this", module, next((extra for extra in ("sft", "train") if extra in asked), EXTRA_OF[module]))


def _importers(trace: TracebackType | None) -> Iterator[str]:
    """The modules through which an error came."""
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next


__all__ = ["EXTRA_OF", "install_line", "missing_package", "needs"]
