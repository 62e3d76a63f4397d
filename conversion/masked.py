# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The configuration of a masked checkpoint, in the middle of its growth, and of the plain model of the same tensors.

The two differ in a `growth_state`, in their model_type, and in `rms_norm_eps`, which is null in a masked one, so that a
runtime that knows no masks refuses it. What masks compute is in `modeling_teleflm.masked_teleflm`.
"""

from collections.abc import Mapping
from typing import Any

from .architecture import MODEL_TYPE, model_code_constant
from .checkpoint.errors import CheckpointError

MASKED_MODEL_TYPE = f"{MODEL_TYPE}Masked"
MASKED_CODE = "masked_teleflm.py"


def is_masked(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json is that of a masked checkpoint."""
    return (config or {}).get("model_type") == MASKED_MODEL_TYPE


def masked_config(plain: Mapping[str, Any], growth_state: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a masked checkpoint, from that of the plain model of the same tensors.

    Args:
        plain: that one.
        growth_state: what is new, and how far the masks have gone.
    """
    own = {
        "architectures": ["TeleFLMMaskedForCausalLM"],
        "auto_map": model_code_constant(MASKED_CODE, "AUTO_MAP"),
        "growth_state": dict(growth_state),
        "model_type": MASKED_MODEL_TYPE,
        "rms_norm_eps": None,
    }
    return dict(sorted({**plain, **own}.items()))


def split_masked_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of the plain model of the same tensors, with the masked norm's epsilon; and the growth_state.

    Args:
        config: of a masked checkpoint.
        where: what to call it in errors.

    Raises:
        CheckpointError: growth_state does not say at which step of how many the masks are, or which epsilon it is.
    """
    state = config.get("growth_state")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where}: growth_state is {str(state)[:40]}, expected an object.")
    for name, least in (("step", 0), ("total_steps", 1)):
        if type(state.get(name)) is not int or state[name] < least:
            raise CheckpointError(
                f"{where}: growth_state.{name} is {str(state.get(name))[:40]}, expected an integer from {least} on."
            )
    epsilon = state.get("rms_norm_eps")
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon > 0:
        raise CheckpointError(f"{where}: growth_state.rms_norm_eps is {str(epsilon)[:40]}, expected a number above 0.")
    kept = {name: value for name, value in config.items() if name != "growth_state"}
    return {**kept, "model_type": MODEL_TYPE, "rms_norm_eps": epsilon}, dict(state)


__all__ = ["MASKED_CODE", "MASKED_MODEL_TYPE", "is_masked", "masked_config", "split_masked_config"]
