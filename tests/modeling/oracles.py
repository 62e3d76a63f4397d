# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Two independent oracles, and the ways of calling a model in which TeleFLM has to agree with them."""

import torch
from transformers import (
    DynamicCache,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from modeling_teleflm import TeleFLMForCausalLM

_OURS_ALONE = ("model_type", "architectures", "transformers_version", "use_mup", "input_mult", "output_mult")


class LlamaByHand:
    """Stock Llama with the same weights; the two multipliers are applied outside of it."""

    def __init__(self, model: TeleFLMForCausalLM):
        self.llama = _same_weights(LlamaForCausalLM, LlamaConfig(**_shared_fields(model)), model)
        self.config = self.llama.config
        self.embedding_scale = model.config.input_mult
        self.logit_scale = model.config.output_mult / model.config.mup_scale_factor

    def __call__(self, input_ids: torch.Tensor, **kwargs):
        embeddings = self.llama.get_input_embeddings()(input_ids)
        output = self.llama(inputs_embeds=embeddings * self.embedding_scale, **kwargs)
        output.logits = output.logits * self.logit_scale
        return output


def granite(model: TeleFLMForCausalLM) -> GraniteForCausalLM:
    """Stock Granite with the same weights: it has both multipliers, under other names."""
    config = GraniteConfig(
        **_shared_fields(model),
        embedding_multiplier=model.config.input_mult,
        logits_scaling=model.config.mup_scale_factor / model.config.output_mult,
        residual_multiplier=1.0,
        attention_multiplier=model.config.head_dim**-0.5,
    )
    return _same_weights(GraniteForCausalLM, config, model)


def _shared_fields(model: TeleFLMForCausalLM) -> dict:
    return {key: value for key, value in model.config.to_dict().items() if key not in _OURS_ALONE}


def _same_weights(cls: type[PreTrainedModel], config, model: TeleFLMForCausalLM) -> PreTrainedModel:
    attention = model.config._attn_implementation
    oracle = cls._from_config(config, dtype=model.dtype, attn_implementation=attention).eval()
    oracle.load_state_dict(model.state_dict())
    return oracle


# Each case takes a model and ids [batch, length], calls it in one way and returns logits [batch, length, vocab]; those
# of padding are set to 0.


def plain(model, ids):
    return model(input_ids=ids).logits


def left_padded(model, ids):
    return _padded(model, ids, pads=slice(None, 3))


def right_padded(model, ids):
    return _padded(model, ids, pads=slice(-3, None))


def _padded(model, ids, pads):
    mask = torch.ones_like(ids)
    mask[0, pads] = 0
    return model(input_ids=ids, attention_mask=mask).logits * mask[..., None]


def packed(model, ids):
    """Every row of the batch in one, told apart by where its positions start again (transformers: without a cache)."""
    positions = torch.arange(ids.shape[1]).repeat(ids.shape[0])[None]
    logits = model(input_ids=ids.reshape(1, -1), position_ids=positions, use_cache=False).logits
    return logits.reshape(*ids.shape, -1)


def dynamic_cache(model, ids):
    return _in_steps(model, ids, DynamicCache(config=model.config))


def static_cache(model, ids):
    return _in_steps(model, ids, StaticCache(config=model.config, max_cache_len=ids.shape[1] + 5))


def _in_steps(model, ids, cache):
    chunks = torch.split(ids, [ids.shape[1] - 3, 1, 1, 1], dim=1)
    return torch.cat([model(input_ids=chunk, past_key_values=cache).logits for chunk in chunks], dim=1)


CASES = [plain, left_padded, right_padded, packed, dynamic_cache, static_cache]
ATTENTIONS = ["eager", "sdpa", "flex_attention"]


def assert_same_logits(model, oracle, case):
    """Equal to the bit: it is the same arithmetic in the same order."""
    ids = torch.randint(3, 600, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling flex attention takes 20 s
        actual, expected = case(model, ids), case(oracle, ids)
    assert expected.std() > 0.01, "the oracle's logits are too flat to tell models apart"
    assert torch.equal(actual, expected), f"logits differ by up to {(actual - expected).abs().max():.3g}"
