# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The `run_config.yaml` of Megatron-Bridge: which model a torch_dist checkpoint is of, and what beside it was saved.

Megatron-Bridge makes the model of the section `model`, an object by its class and fields, and asks `checkpoint` whether
an optimizer and random states are there. Of a checkpoint without the file it reads Megatron-LM's arguments, of which
it needs many more than those that say what the model is.
"""

from collections.abc import Mapping
from typing import Any

RUN_CONFIG = "run_config.yaml"
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
# Field of the provider -> Megatron-LM's argument. Fields of the same name are below.
_RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "gated_linear_unit": "swiglu",
}
_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "init_method_std",
    "normalization",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "add_bias_linear",
    "add_qkv_bias",
    "apply_query_key_layer_scaling",
    "attention_dropout",
    "hidden_dropout",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "bf16",
    "fp16",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)


def run_config(arguments: Mapping[str, Any], *, optimizer: bool) -> bytes:
    """What Megatron-Bridge reads of a checkpoint without multipliers.

    Args:
        arguments: Megatron-LM's of a run with the model, as `training_args` has them.
        optimizer: whether Adam's moments are there.
    """
    import yaml

    dtype = {"_target_": f"torch.{arguments['params_dtype'].name}", "_call_": False}
    fields = {field: arguments[name] for field, name in (*((name, name) for name in _SAME), *_RENAMED.items())}
    model = {
        "_target_": _PROVIDER,
        "_call_": True,
        **{field: value for field, value in fields.items() if value is not None},
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "share_embeddings_and_output_weights": not arguments["untie_embeddings_and_output_weights"],
        "should_pad_vocab": True,
        "params_dtype": dtype,
        "pipeline_dtype": dict(dtype),
    }
    checkpoint = {"save_optim": optimizer, "save_rng": False, "fully_parallel_save": True}
    return yaml.safe_dump({"model": model, "checkpoint": checkpoint}, sort_keys=False).encode()
