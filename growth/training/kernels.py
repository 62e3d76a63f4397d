# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fused kernels in training: those of the Hub if they are really used, Liger's not.

transformers falls back to its own layers without a word, where a kernel cannot be had, and patches nothing in an
architecture that Liger Kernel does not know. A run that was told to use kernels and does not is refused here.
"""

from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_kernels_available
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

from .errors import RunError

WHY_NOT_LIGER = (
    "Liger Kernel knows no Tele-FLM, and its fused cross-entropy would leave out the factor on the logits; "
    "write use_kernels: true for the kernels of the Hub"
)


def check_kernels(args: TrainingArguments, use_kernels: bool) -> None:
    """Check, before a model is loaded, that the kernels that a run asks for can be had.

    Raises:
        RunError: Liger's are asked for; or the Hub's, on a CPU or without the package that fetches them.
    """
    for key in ("use_liger_kernel", "liger_kernel_config"):
        if getattr(args, key):
            raise RunError(f"{key} has no effect here; {WHY_NOT_LIGER}.")
    if use_kernels and args.device.type == "cpu":
        raise RunError("use_kernels is true, but this run is on CPUs, for which no layer of the model has a kernel.")
    if use_kernels and not is_kernels_available():
        raise RunError(
            "use_kernels is true, but the package kernels is not there in a version that transformers takes: pip "
            f"install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}'."
        )


def check_kernels_are_used(model: nn.Module) -> None:
    """Check, once a model is loaded with `use_kernels`, that some of its layers have one.

    Raises:
        RunError: none has: they could not be fetched, or there are none for this machine.
    """
    # A kernel takes the place of the forward of a module, not of its class.
    if not any("forward" in vars(module) for module in model.modules()):
        raise RunError(
            "use_kernels is true, but no layer has a kernel: the Hub was not reached, has none for this machine, or "
            "USE_HUB_KERNELS is off."
        )


__all__ = ["WHY_NOT_LIGER", "check_kernels", "check_kernels_are_used"]
