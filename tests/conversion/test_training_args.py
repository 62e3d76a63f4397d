# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From the arguments of a Megatron run to a configuration: what they say, and what makes a model no Tele-FLM."""

import pytest

from conversion.checkpoint.errors import CheckpointError
from conversion.native.training_args import config_from_args

TODAY = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "norm_epsilon": 1e-5,
    "rotary_base": 500000,
    "rotary_percent": 1.0,
    "max_position_embeddings": 4096,
    "init_method_std": 0.004,
    "untie_embeddings_and_output_weights": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": False,
    "qk_layernorm": False,
    "num_experts": None,
}
OLD = {
    "encoder_num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-6,
    "disable_bias_linear": True,
    "use_rotary_position_embeddings": True,
    "untie_embeddings_and_output_weights": False,
}
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "max_position_embeddings": 4096,
    "initializer_range": 0.004,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (TODAY, SIZES),
        # Without grouped attention, num_query_groups is a default that means nothing.
        ({**TODAY, "group_query_attention": False, "num_query_groups": 1}, {**SIZES, "num_key_value_heads": 8}),
        ({**TODAY, "add_qkv_bias": True}, {**SIZES, "attention_bias": True}),
        (
            {**TODAY, "input_mult": 2.0, "output_mult": 0.5, "mup_scale_factor": 16.0},
            {**SIZES, "use_mup": True, "input_mult": 2.0, "output_mult": 0.5, "mup_scale_factor": 16.0},
        ),
        (
            {**TODAY, "use_mup": True, "mup_embedding_mult": 3.0, "mup_output_mult": 0.25},
            {**SIZES, "use_mup": True, "input_mult": 3.0, "output_mult": 0.25},
        ),
        (
            OLD,
            {
                "num_hidden_layers": 4,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "head_dim": 8,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
            },
        ),
        ({}, {}),
    ],
)
def test_what_the_arguments_say(args, expected):
    assert config_from_args(args, "run") == expected


@pytest.mark.parametrize(
    "args",
    [
        {"swiglu": False},
        {"normalization": "LayerNorm"},
        {"add_bias_linear": True},
        {"position_embedding_type": "learned_absolute"},
        {"rotary_percent": 0.5},
        {"use_rope_scaling": True},
        {"rotary_seq_len_interpolation_factor": 4},
        {"qk_layernorm": True},
        {"num_experts": 8},
        {"multi_latent_attention": True},
    ],
    ids=str,
)
def test_no_tele_flm(args):
    (name, value), *_ = args.items()
    with pytest.raises(CheckpointError, match=f"the run's {name} is {value!r}, a Tele-FLM model has "):
        config_from_args({**TODAY, **args}, "run")


def test_an_older_argument_does_not_overrule_a_newer_one():
    assert config_from_args({**TODAY, "disable_bias_linear": False}, "run") == SIZES
    with pytest.raises(CheckpointError, match="disable_bias_linear is False"):
        config_from_args({**OLD, "disable_bias_linear": False}, "run")


@pytest.mark.parametrize(("power", "refused"), [(0.5, False), (1.0, True)])
def test_the_scale_of_attention(power, refused):
    """megatron-core's muP: sqrt(base_head_dim) / head_dim^power; with power 1 that is 1/sqrt(d) for the base only."""
    args = {**TODAY, "use_mup": True, "mup_base_head_dim": 1 if power == 0.5 else 16, "mup_attn_scale_power": power}
    if not refused:
        assert config_from_args(args, "run") == SIZES
        return
    with pytest.raises(CheckpointError, match=r"scales attention by 0\.5 .* by 0\.353553"):
        config_from_args(args, "run")
