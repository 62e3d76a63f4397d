# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Writing a checkpoint as Tele-FLM's are published: bfloat16 `.bin` shards and the config.json of transformers 4.40."""

import json
from pathlib import Path
from typing import Any

import torch

from modeling_teleflm import TeleFLMForCausalLM

SHARDS = 3


def save_as_published(model: TeleFLMForCausalLM, folder: Path) -> None:
    """Write the weights and configuration of a model. The published code is not written: the package replaces it.

    Args:
        model: its weights are rounded to bfloat16.
        folder: exists, or is made.
    """
    folder.mkdir(exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.bin"
        names = list(weights)[shard::SHARDS]
        torch.save({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(weight.nbytes for weight in weights.values())
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_json(folder / "config.json", _published_config(model))


def _published_config(model: TeleFLMForCausalLM) -> dict[str, Any]:
    """The fields, and their spelling, of the published 52B; the values of this model."""
    config = model.config
    return {
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
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "input_mult": config.input_mult,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "TeleFLM",
        "mup_scale_factor": config.mup_scale_factor,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "output_mult": config.output_mult,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "use_mup": True,
        "vocab_size": config.vocab_size,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
