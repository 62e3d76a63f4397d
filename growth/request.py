# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is asked of a growth, held against what growth can do: nothing that was asked for is dropped without a word."""

import difflib
import math
import sys
from collections.abc import Mapping
from typing import Any

from conversion.architecture import MODEL_TYPE, Architecture, rope_parameters
from conversion.checkpoint.errors import CheckpointError
from conversion.family import MULTIPLIERS, TELEFLM, Family, find_family

GROWN = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
# They decide what the model computes; each with its value in a config.json that does not say.
_KEPT: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "model_type": MODEL_TYPE,
}
# About files, training or generation: the grown model has the source's.
_HARMLESS = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_DTYPE = ("dtype", "torch_dtype")  # two spellings of one field
_WHY_NOT = {
    "rms_norm_eps": "it follows from the widths",
    "dtype": "--dtype does",
    "torch_dtype": "--dtype does",
    "max_position_embeddings": "the positions that the source was trained on stay",
}
_MOST_LAYERS = 10_000
_KNOWN = (*GROWN, *MULTIPLIERS, "head_dim", "rms_norm_eps", *_ROPE, *_KEPT, *_HARMLESS)


def check_request(
    source: Mapping[str, Any], target: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Check that every field that is asked for is one that growth grows, or keeps at the value asked for.

    Args:
        source: content of the source's config.json.
        target: the configuration to grow into, complete (a preset, a config.json) or some fields. Fields in it that do
            not change what the model computes may differ: they are kept as the source has them, which is noted.
        overrides: fields on top of it, each of which is meant.

    Returns:
        The fields that are asked for, and notes on those that are not taken over.

    Raises:
        CheckpointError: a field is unknown, or growth cannot give it the value; the message names both values.
    """
    family = find_family(source) or TELEFLM
    for given in (target, overrides):
        for key in given:
            if key not in _KNOWN and key not in source:
                raise CheckpointError(_unknown(key, family))
    for key, value in overrides.items():
        if value is None:
            raise CheckpointError(f"{key} is null, expected a value; leave it out to keep the source's.")
        if key not in (*GROWN, *MULTIPLIERS, "head_dim", *_ROPE, *_KEPT):
            reason = _WHY_NOT.get(key, "change it in the config.json of OUT afterwards")
            raise CheckpointError(f"{key} is no field that growth sets: {reason}; leave it out.")
    requested = {key: value for key, value in {**target, **overrides}.items() if value is not None}
    _check_family(source, requested, family)
    epsilon = requested.get("rms_norm_eps", 1.0)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= sys.float_info.max:
        raise CheckpointError(f"rms_norm_eps is {epsilon!r}, expected a number above 0.")
    for key in (*GROWN, "head_dim"):
        value = requested.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{key} is {value!r}, expected an integer.")
    if requested.get("num_hidden_layers", 1) > _MOST_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers is {requested['num_hidden_layers']}, expected at most {_MOST_LAYERS}."
        )
    _check_kept(source, requested)
    _check_rope(source, target, overrides)
    return requested, _differing(source, target)


def check_honoured(
    source: Architecture, target: Architecture, given: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[str]:
    """Check that the numbers that were asked for are those that came out, and that anything changes at all.

    Args:
        source, target: what grows into what, worked out.
        given: see `check_request`, as `target`.
        overrides: see `check_request`.

    Returns:
        Notes on numbers of `given` that are not taken over.

    Raises:
        CheckpointError: an override is not taken over, or nothing grows.
    """
    notes = []
    for field in (*MULTIPLIERS, "rms_norm_eps"):
        asked, found = overrides.get(field, given.get(field)), getattr(target, field)
        if asked is None or _equal(asked, found):
            continue
        if field in overrides:
            raise CheckpointError(_not_honoured(field, asked, source, target))
        notes.append(f"{field} is {_text(found)}, not the target's {_text(asked)}: it follows from the source's.")
    if target == source:
        raise CheckpointError(
            "nothing would grow: every size and multiplier asked for is the source's; `teleflm convert` copies a model."
        )
    return notes


def _not_honoured(field: str, asked: Any, source: Architecture, target: Architecture) -> str:
    found = _text(getattr(target, field))
    if source.tie_word_embeddings:
        reason = "embeddings are tied, and one matrix cannot make up for another factor as embedding or as head alone"
        return f"{field} is asked to be {asked}, but has to be {found}: {reason}; leave it out."
    if field == "input_mult":
        return (
            f"input_mult is asked to be {asked}: growth keeps the source's, {source.embedding_scale:g}, where that is "
            f"asked for, and else multiplies embed_tokens by it, which leaves {found}; ask for one of these."
        )
    return (
        f"{field} is asked to be {asked}, but has to be {found} while lm_head stays as it is: use --multipliers "
        "target, or leave it out."
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _unknown(key: str, family: Family) -> str:
    near = difflib.get_close_matches(key, _KNOWN, 1, 0.6)
    settable = (*GROWN, *MULTIPLIERS) if family.has_multipliers else GROWN
    hint = f"did you mean {near[0]}?" if near else f"growth sets {', '.join(settable)}."
    return f"{key} is no field of a {family.name}'s configuration; {hint}"


def _check_family(source: Mapping[str, Any], requested: Mapping[str, Any], family: Family) -> None:
    """A model stays of its family, and one without multipliers gets none."""
    kind = requested.get("model_type", family.model_type)
    if kind != family.model_type:
        raise CheckpointError(
            f"model_type would change from {family.model_type} to {str(kind)[:80]}; growth keeps it: name the sizes "
            "alone, with --set."
        )
    if family.has_multipliers:
        return
    for key in MULTIPLIERS:
        if key in requested and requested[key] != source.get(key):
            raise CheckpointError(f"{key} is asked to be {requested[key]!r}: a {family.name} has no multipliers.")


def _check_kept(source: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    values = {key: default if source.get(key) is None else source[key] for key, default in _KEPT.items()}
    pairs = [(key, old, requested.get(key)) for key, old in values.items()]
    own = {key for key in source if key not in _KNOWN}
    pairs += [(key, source[key], requested.get(key)) for key in sorted(own)]
    for key, old, new in pairs:
        if new is not None and old != new:
            raise CheckpointError(f"{key} would change from {str(old)[:80]} to {str(new)[:80]}; growth keeps it.")


def _check_rope(source: Mapping[str, Any], target: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Each that asks for a rotary embedding has to ask for the source's, as a whole."""
    for where, given in (("the target", target), ("--set", overrides)):
        if all(given.get(key) is None for key in _ROPE):
            continue
        old, new = rope_parameters(source, "the source's config.json"), rope_parameters(given, where)
        if old != new:
            raise CheckpointError(f"rope_parameters would change from {old} to {new}; growth keeps it.")


def _differing(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    own = {**source, **{key: _dtype(source) for key in _DTYPE}}
    names = [key for key in _HARMLESS if target.get(key) is not None and _plain(key, target[key]) != own.get(key)]
    return [f"Not taken from the target, which differs in them: {', '.join(names)}."] if names else []


def _dtype(source: Mapping[str, Any]) -> Any:
    found = next((source[key] for key in _DTYPE if source.get(key) is not None), None)
    return _plain("dtype", found)


def _plain(key: str, value: Any) -> Any:
    return value.removeprefix("torch.") if key in _DTYPE and isinstance(value, str) else value


def _equal(asked: Any, found: Any) -> bool:
    if isinstance(asked, bool) or isinstance(found, bool):
        return asked is found
    return math.isclose(asked, found, rel_tol=1e-12)
