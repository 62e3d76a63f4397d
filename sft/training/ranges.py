# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which values of TRL's settings are values, where TRL finds out amid the first step, or never.

TRL's own documentation is the authority, and its code where that says nothing. What is not here and still cannot be is
told of the first step, see [`sft.training.train`].
"""

import functools
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub.dataclasses import type_validator
from transformers import GenerationConfig, PreTrainedTokenizerBase

CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {
        "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        # A bool is another way to say the first and the last, which TRL turns into them.
        "scale_rewards": ("group", "batch", "none"),
    },
    "dpo": {
        "loss_type": (
            *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
            *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        ),
        "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    },
}
"""By trainer and key. A list has at least one, and nothing else."""


class _Range(NamedTuple):
    least: float
    most: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in it; none that is not finite is."""
        low = value > self.least if self.above else value >= self.least
        return math.isfinite(value) and low and value <= self.most

    def __str__(self) -> str:
        low = f"above {self.least:g}" if self.above else f"from {self.least:g}"
        return f"a number {low}" + (f", at most {self.most:g}" if self.most < math.inf else "")


RANGES: dict[str, _Range] = {
    **dict.fromkeys(
        (
            *("num_iterations", "steps_per_generation", "generation_batch_size", "num_generations_eval"),
            *("max_completion_length", "ref_model_sync_steps", "pad_to_multiple_of", "precompute_ref_batch_size"),
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("max_length", "num_completions_to_print"),
        ),
        _Range(1),
    ),
    "num_generations": _Range(2),
    # Logits are divided by it in float32.
    "temperature": _Range(1e-6),
    "top_p": _Range(0, 1, above=True),
    **dict.fromkeys(("min_p", "top_entropy_quantile", "ld_alpha", "ref_model_mixup_alpha"), _Range(0, 1)),
    "label_smoothing": _Range(0, 1),
    **dict.fromkeys(("top_k", "epsilon", "epsilon_high", "beta", "desirable_weight", "undesirable_weight"), _Range(0)),
    **dict.fromkeys(
        (
            *("repetition_penalty", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "discopop_tau"),
            *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
        ),
        _Range(0, above=True),
    ),
}
"""Of the numbers that a key may have, in whatever trainer."""

# Settings of generation that say which tokens may be sampled, and how likely; none of them is a key of its own.
_SAMPLING: dict[str, Any] = {
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size"), int),
    **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff"), float),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), list[int]),
    "bad_words_ids": list[list[int]],
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "use_cache"), bool),
}
_OWN_KEYS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")},
    **dict.fromkeys(("max_new_tokens", "max_length"), "max_completion_length"),
    "num_return_sequences": "num_generations",
}


def find_fault(trainer: str, key: str, value: Any) -> str | None:
    """Why a value of the right type is none that a key may have, if so: what follows `KEY is VALUE; ` in a sentence.

    Args:
        trainer: of the recipe.
        key: a field of TRL's configuration.
        value: as the recipe has it.
    """
    if value is None or isinstance(value, bool):
        return None
    if key == "generation_kwargs":
        return _generation_fault(value)
    if key == "chat_template_kwargs":
        return _template_fault(value)
    if choices := CHOICES.get(trainer, {}).get(key):
        values = value if isinstance(value, list) else [value]
        return None if values and all(one in choices for one in values) else f"expected one of {', '.join(choices)}"
    if key == "pad_to_multiple_of" and isinstance(value, str):
        return None if value == "auto" else "expected auto, or a number from 1"
    if key not in RANGES or not isinstance(value, int | float):
        return None
    return None if _in_float(value) and RANGES[key].holds(value) else f"expected {RANGES[key]}"


def _in_float(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _mapping(value: Any) -> Mapping[str, Any]:
    """What TRL makes of a value that may be JSON text; nothing of what it will refuse itself."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def _generation_fault(value: Any) -> str | None:
    for name, given in _mapping(value).items():
        if name in _OWN_KEYS:
            return f"{name} has a key of its own: write {_OWN_KEYS[name]}"
        if name not in _SAMPLING:
            is_known = name in GenerationConfig().to_dict()
            why = "would change more than which tokens are sampled" if is_known else "is no field of GenerationConfig"
            return f"{name} {why}; expected some of {', '.join(_SAMPLING)}"
        if not _is_of(given, _SAMPLING[name]):
            hint = _SAMPLING[name]
            return f"{name} is {given!r:.80}; expected {hint.__name__ if isinstance(hint, type) else hint}"
        if isinstance(given, int | float) and not (_in_float(given) and given >= 0):
            return f"{name} is {given!r:.80}; expected {_Range(0)}"
    return None


def _is_of(value: Any, hint: Any) -> bool:
    if hint is float and type(value) is int:
        return True
    try:
        type_validator("value", value, hint)
    except TypeError:
        return False
    return True


def _template_fault(value: Any) -> str | None:
    taken = [name for name in _mapping(value) if name in _arguments_of_apply_chat_template()]
    return f"{taken[0]} is an argument of TRL's own, not a variable of the template; remove it" if taken else None


@functools.cache
def _arguments_of_apply_chat_template() -> Sequence[str]:
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


__all__ = ["CHOICES", "RANGES", "find_fault"]
