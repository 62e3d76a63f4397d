# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The configuration: published files, presets, and every mistake that has to be refused with a clear line."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_teleflm import TeleFLMConfig
from tests.fixtures.tiny import tiny_config

# The published config.json files, as transformers 4.40 wrote them. What all of them share:
PUBLISHED = {
    "architectures": ["TeleFLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_teleflm.TeleFLMConfig",
        "AutoModel": "modeling_teleflm.TeleFLMModel",
        "AutoModelForCausalLM": "modeling_teleflm.TeleFLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "input_mult": 1.0,
    "intermediate_size": 21824,
    "max_position_embeddings": 4096,
    "model_type": "TeleFLM",
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 64,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "use_mup": True,
}
# preset: (what differs, number of parameters, factor on the logits)
FAMILY = {
    "tele-flm-52b": (
        {"vocab_size": 80384, "mup_scale_factor": 16.0, "output_mult": 0.5, "transformers_version": "4.40.0"},
        52_824_121_344,
        1 / 32,
    ),
    "flm-2-52b-instruct-2407": (
        {
            "architectures": ["TeleFLMModel", "TeleFLMForCausalLM"],
            "vocab_size": 80896,
            "max_position_embeddings": 2048,
            "mup_scale_factor": 32.0,
            "output_mult": 1.0,
        },
        52_832_509_952,
        1 / 32,
    ),
    "tele-flm-1t": (
        {
            "vocab_size": 81920,
            "hidden_size": 20480,
            "intermediate_size": 98304,
            "num_hidden_layers": 140,
            "num_attention_heads": 160,
            "num_key_value_heads": 160,
            "mup_scale_factor": 80.0,
            "output_mult": 2.0,
        },
        1_083_813_908_480,
        1 / 40,
    ),
}


@pytest.fixture(params=FAMILY)
def member(request, tmp_path):
    """(preset, configuration read from the published file, number of parameters, factor on the logits)."""
    fields, parameters, logit_scale = FAMILY[request.param]
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    return request.param, AutoConfig.from_pretrained(tmp_path), parameters, logit_scale


def test_published_configurations_load_with_their_meaning(member):
    _, config, parameters, logit_scale = member
    assert type(config) is TeleFLMConfig
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters == {"rope_theta": 10000, "rope_type": "default"}
    assert (config.embedding_scale, config.logit_scale) == (1.0, logit_scale)
    assert config.head_dim == 128
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_presets_are_the_published_configurations(member):
    preset, published, _, _ = member
    not_of_the_model = ("architectures", "auto_map", "_name_or_path", "transformers_version")
    fields, expected = TeleFLMConfig.from_preset(preset).to_dict(), published.to_dict()
    for key in not_of_the_model:
        fields.pop(key, None), expected.pop(key, None)
    assert fields == expected


def test_the_unpublished_102b_has_the_familys_proportions():
    config = TeleFLMConfig.from_preset("tele-flm-102b")
    reference = TeleFLMConfig.from_preset("tele-flm-52b")
    assert config.logit_scale == reference.logit_scale
    assert config.mup_scale_factor / config.hidden_size == reference.mup_scale_factor / reference.hidden_size
    assert config.head_dim == reference.head_dim
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    v, h, f, layers = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    expected = 2 * v * h + layers * (4 * h * h + 3 * h * f + 2 * h) + h
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_presets_take_overrides():
    config = TeleFLMConfig.from_preset("tele-flm-52b", hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (64, 16, 80384)


def test_defaults_are_neutral():
    config = TeleFLMConfig()
    assert (config.use_mup, config.embedding_scale, config.logit_scale) == (False, 1.0, 1.0)
    # Multipliers without use_mup are kept and have no effect.
    config = TeleFLMConfig(input_mult=3.0, output_mult=0.5, mup_scale_factor=16.0)
    assert (config.embedding_scale, config.logit_scale) == (1.0, 1.0)


def test_logit_scale_is_derived_and_stays_out_of_the_file(tmp_path):
    config = tiny_config()
    assert config.logit_scale == 0.125
    with pytest.raises(AttributeError, match="logit_scale"):
        config.logit_scale = 1.0
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"logit_scale", "embedding_scale"} & written.keys()
    assert {"use_mup", "input_mult", "output_mult", "mup_scale_factor"} <= written.keys()
    assert AutoConfig.from_pretrained(tmp_path).logit_scale == 0.125


def test_multipliers_may_be_written_as_json_integers(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mup_scale_factor": 4, "input_mult": 2}))
    assert '"mup_scale_factor": 4,' in file.read_text()
    assert AutoConfig.from_pretrained(tmp_path).logit_scale == 0.125


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1; it must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size is 0; it must be at least 1"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "head_dim is 1; rotary"),
        ({"head_dim": 7}, "head_dim is 7; rotary position embeddings need an even one"),
        ({"mup_scale_factor": 0}, "mup_scale_factor is 0; a multiplier must be a finite number above 0"),
        ({"mup_scale_factor": 0.0, "use_mup": False}, "mup_scale_factor is 0.0"),
        ({"input_mult": -1.0}, "input_mult is -1.0; a multiplier must be a finite number above 0"),
        ({"output_mult": -0.5}, "output_mult is -0.5"),
        ({"output_mult": float("nan")}, "output_mult is nan"),
        ({"mup_scale_factor": float("inf")}, "mup_scale_factor is inf"),
        ({"input_mult": "1.0"}, "'input_mult' with value '1.0'"),
        ({"hidden_size": 32.0}, "'hidden_size' expected int, got float (value: 32.0)"),
        ({"use_mup": 1}, "'use_mup' expected bool, got int (value: 1)"),
        ({"logit_scale": 1.0}, "'logit_scale'"),
    ],
    ids=str,
)
def test_mistakes_are_refused_by_name_and_value(mistake, message):
    with pytest.raises((StrictDataclassError, ValueError, AttributeError), match=re.escape(message)):
        tiny_config(**mistake)


def test_an_unknown_preset_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no preset 'tele-flm-7b'") as error:
        TeleFLMConfig.from_preset("tele-flm-7b")
    assert str(error.value).endswith(": flm-2-52b-instruct-2407, tele-flm-102b, tele-flm-1t, tele-flm-52b.")
