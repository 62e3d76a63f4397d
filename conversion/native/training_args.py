# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From the arguments of a training run to a Hub configuration: what they say, and what they must not say."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.inert_pickle import Inert

# Field of config.json -> the arguments of Megatron that say it, newest first.
_FIELDS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_layers", "encoder_num_layers"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("ffn_hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "initializer_range": ("init_method_std",),
    "attention_bias": ("add_qkv_bias",),
    # muP: as Tele-FLM's own configuration calls it, and as megatron-core does.
    "input_mult": ("input_mult", "mup_embedding_mult"),
    "output_mult": ("output_mult", "mup_output_mult"),
    "mup_scale_factor": ("mup_scale_factor",),
}
MULTIPLIERS = frozenset(("input_mult", "output_mult", "mup_scale_factor"))
# Names of arguments that may be multipliers of a fork's, and those of Megatron that are not or have been read.
_LIKE_A_MULTIPLIER = re.compile(r"mup|mult(?!i(?!plier))|scale|scaling|alpha", re.IGNORECASE)
_NO_MULTIPLIER = re.compile(
    r"(initial_|min_|max_)?loss_scale(_window)?|.*lr_mult|.*multiple.*|.*multiprocess.*|apply_query_key_layer_scaling"
    r"|use_rope_scaling|(rope|rotary)_scaling_factor|mscale(_all_dim)?|.*(aux_)?loss_(coeff|scaling_factor)|moe_.*"
    r"|muon_.*|lora_.*|mup_(base_.*|width_mult|attn_scale_power)|fp(4|8)_.*|.*_scale_(mode|gradient)|softmax_scale"
    r"|rotary_seq_len_interpolation_factor|dist_ckpt_.*|rampup_.*"
)
# Arguments that make a model no Tele-FLM unless they have this value; absent ones are of a Megatron that lacks them.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "disable_bias_linear": (True,),
    "position_embedding_type": ("rope",),
    "use_rotary_position_embeddings": (True,),
    "rotary_percent": (1, 1.0),
    "rotary_seq_len_interpolation_factor": (None, 1, 1.0),
    "use_rope_scaling": (False, None),
    "qk_layernorm": (False, None),
    "multi_latent_attention": (False, None),
    "num_experts": (None, 0),
    "apply_residual_connection_post_layernorm": (False, None),
    "softmax_scale": (None,),
    "window_size": (None,),
}
# Newer arguments replace these; where both are there, only the newer counts.
_SUPERSEDED = {"disable_bias_linear": "add_bias_linear", "use_rotary_position_embeddings": "position_embedding_type"}


def plain_args(value: Any) -> dict[str, Any]:
    """The arguments in a checkpoint as a dict: numbers, texts and lists as they are, any other object as a text."""
    if isinstance(value, Inert):
        value = vars(value)
    if not isinstance(value, Mapping):
        return {}
    return {str(name): _plain(item) for name, item in value.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.qualified_name if isinstance(value, Inert) else str(value)[:200]


def config_from_args(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of config.json that the arguments of a Megatron run decide.

    Args:
        args: plain arguments; empty if the checkpoint has none.
        where: what to call the checkpoint in errors.

    Raises:
        CheckpointError: an argument describes a model that is no Tele-FLM; the message names it and its value.
    """
    for name, accepted in _REQUIRED.items():
        newer = _SUPERSEDED.get(name)
        if name in args and (newer is None or newer not in args) and args[name] not in accepted:
            raise CheckpointError(
                f"{where}: the run's {name} is {args[name]!r}, a Tele-FLM model has {accepted[0]!r}; its function "
                "would be another."
            )
    fields = {
        field: next(args[name] for name in names if args.get(name) is not None)
        for field, names in _FIELDS.items()
        if any(args.get(name) is not None for name in names)
    }
    if args.get("num_attention_heads") is not None:
        grouped = args.get("group_query_attention") and args.get("num_query_groups")
        fields["num_key_value_heads"] = args["num_query_groups"] if grouped else args["num_attention_heads"]
    if args.get("untie_embeddings_and_output_weights") is not None:
        fields["tie_word_embeddings"] = not args["untie_embeddings_and_output_weights"]
    if args.get("use_mup") is False:  # no effect then, and no word against what --config says
        fields = {field: value for field, value in fields.items() if field not in MULTIPLIERS}
    elif MULTIPLIERS & fields.keys():
        fields["use_mup"] = True
    _check_attention_scale(args, where)
    return fields


def unread_multipliers(args: Mapping[str, Any]) -> dict[str, float]:
    """Arguments of a run that have the name and the value of a multiplier, and that nothing here reads.

    A factor of 1 or 0 is none.
    """
    read = {name for names in _FIELDS.values() for name in names} | {"use_mup"}
    return {
        name: value
        for name, value in args.items()
        if name not in read
        and _LIKE_A_MULTIPLIER.search(name)
        and not _NO_MULTIPLIER.fullmatch(name)
        and isinstance(value, int | float)
        and value not in (0, 1)
    }


def states_multipliers(args: Mapping[str, Any]) -> bool:
    """Whether the arguments of a run say its multipliers, or that it has none: both factors, or that muP is off.

    That muP is off says nothing in a run that has unread ones: the trainer has a way of its own then.
    """
    fields = {field for field in MULTIPLIERS if any(args.get(name) is not None for name in _FIELDS[field])}
    if args.get("use_mup") is False:
        return not unread_multipliers(args)
    return {"input_mult", "output_mult"} <= fields


def parse_multipliers(text: str) -> dict[str, Any]:
    """Read what a user says of multipliers: `none`, or `input_mult=16,output_mult=0.5,mup_scale_factor=16`.

    Returns:
        Fields of config.json.

    Raises:
        CheckpointError: it is neither.
    """
    if text.strip() == "none":
        return {"use_mup": False, **dict.fromkeys(sorted(MULTIPLIERS), 1.0)}
    parts = [part.partition("=") for part in text.split(",")]
    try:
        values = {name.strip(): float(value) for name, equals, value in parts}
    except ValueError:
        values = {}
    if (
        not {"input_mult", "output_mult"} <= values.keys() <= MULTIPLIERS
        or len(values) != len(parts)
        or not all(value > 0 and math.isfinite(value) for value in values.values())
    ):
        raise CheckpointError(
            f"--multipliers is {text!r}, expected none, or input_mult=NUMBER,output_mult=NUMBER and, if it is not 1, "
            "mup_scale_factor=NUMBER."
        )
    return {"use_mup": True, "mup_scale_factor": 1.0, **values}


def _check_attention_scale(args: Mapping[str, Any], where: str) -> None:
    """megatron-core's muP may scale attention by sqrt(base_head_dim) / head_dim^power; the Hub's model has d^-1/2."""
    base, power, dim = (args.get(name) for name in ("mup_base_head_dim", "mup_attn_scale_power", "kv_channels"))
    if not (args.get("use_mup") and base and power is not None and dim):
        return
    scale, expected = math.sqrt(base) / dim**power, dim**-0.5
    if not math.isclose(scale, expected, rel_tol=1e-6):
        raise CheckpointError(
            f"{where}: the run scales attention by {scale:.6g} (mup_base_head_dim {base}, mup_attn_scale_power {power})"
            f", a Tele-FLM model by {expected:.6g}; scale q_proj by the ratio in the trainer and save again."
        )
