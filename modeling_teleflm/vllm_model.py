# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tele-FLM in vLLM: its Llama with a multiplier on the embeddings and one on the logits. This file is the difference.

Only vLLM imports it, see `vllm_plugin.py`.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class TeleFLMModel(LlamaModel):
    """vLLM's Llama decoder, whose first stage scales what it is given: token ids, or embeddings as they are stored."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Arguments and outputs are those of vLLM's `LlamaModel`."""
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                inputs_embeds = self.embed_input_ids(input_ids)
            inputs_embeds = inputs_embeds * self.config.embedding_scale  # main diff with Llama
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


class TeleFLMForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with a Tele-FLM's decoder and the scale of its logits."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        scale = self.config.logit_scale  # main diff with Llama
        self.logits_processor = LogitsProcessor(self.config.vocab_size, scale=scale)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = LlamaDecoderLayer
    ) -> LlamaModel:
        return TeleFLMModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


__all__ = ["TeleFLMForCausalLM", "TeleFLMModel"]
