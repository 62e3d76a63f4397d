# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The frequencies of rotary position embeddings, kind by kind: position t turns pair i of a head by t * f_i.

Those whose frequencies depend on the length of a text (`dynamic`, `longrope`) are not here: a token's likelihood would
depend on what else is computed with it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from conversion.checkpoint.errors import CheckpointError

KINDS = ("default", "linear", "llama3", "yarn")
OF_TRAINED_LENGTH = ("llama3", "yarn")
"""Those whose frequencies follow from the positions that the model was trained on before."""


def rotary_frequencies(rope: Mapping[str, Any], head_dim: int, trained_length: int) -> tuple[np.ndarray, float]:
    """The frequencies of a model's rotary embedding, in radians a position.

    Args:
        rope: as `conversion.architecture.rope_parameters` reads it, with what its kind needs.
        head_dim: of the model.
        trained_length: positions that it was trained on before its rotary embedding was scaled; of no matter to those
            that are not `OF_TRAINED_LENGTH`.

    Returns:
        Frequencies [head_dim / 2], and the factor on the rotated queries and keys; float64.

    Raises:
        CheckpointError: the kind is none of `KINDS`, or a number is missing or none.
    """
    kind, theta = rope["rope_type"], _number(rope, "rope_theta")
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    match kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / _number(rope, "factor"), 1.0
        case "llama3":
            return _llama3(plain, rope, trained_length), 1.0
        case "yarn":
            return _yarn(plain, theta, rope, head_dim, trained_length)
    raise CheckpointError(f"rope_type is {kind!r}, expected one of {', '.join(KINDS)}.")


def _llama3(plain: np.ndarray, rope: Mapping[str, Any], trained_length: int) -> np.ndarray:
    """Llama 3.1: what turns more than `high` times over the trained length stays, less than `low` times is divided.

    Between the two, the share that stays grows linearly with the number of turns.
    """
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if not low < high:
        raise CheckpointError(f"high_freq_factor is {high:g}, expected more than low_freq_factor, {low:g}.")
    turns = trained_length * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / _number(rope, "factor"))


def _yarn(
    plain: np.ndarray, theta: float, rope: Mapping[str, Any], head_dim: int, trained_length: int
) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): pairs that turn more than `beta_fast` times stay, less than `beta_slow` are divided.

    Between the two, the share that is divided grows linearly with the pair's number.
    """
    factor = _number(rope, "factor")
    if theta <= 1:
        raise CheckpointError(f"rope_theta of rope_type yarn is {theta:g}, expected a number above 1.")

    def pair(turns: float) -> float:
        """The pair, not in whole numbers, that turns so often over the trained length."""
        return head_dim * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(_number(rope, "beta_fast", 32)), pair(_number(rope, "beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    divided = np.clip((np.arange(head_dim // 2) - first) / ((last - first) or 0.001), 0, 1)
    return plain * (1 - divided + divided / factor), _yarn_scale(rope, factor)


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    weights = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    if factor <= 1:
        return 1.0
    if not all(weights):
        return 0.1 * math.log(factor) + 1
    over, under = (0.1 * _number(rope, name) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
    return over / under


def _number(rope: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = rope.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{name} of rope_type {rope['rope_type']} is {str(value)[:40]}, expected a number above 0."
        )
    return float(value)


__all__ = ["KINDS", "OF_TRAINED_LENGTH", "rotary_frequencies"]
