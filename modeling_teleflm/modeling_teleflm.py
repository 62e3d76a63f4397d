# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tele-FLM: Llama with a multiplier on the embeddings and one on the logits (muP). This file is the difference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_teleflm import TeleFLMConfig

# What a folder written by `save_pretrained` loads as where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_teleflm.TeleFLMConfig",
    "AutoModel": "modeling_teleflm.TeleFLMModel",
    "AutoModelForCausalLM": "modeling_teleflm.TeleFLMForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_teleflm.TeleFLMForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_teleflm.TeleFLMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_teleflm.TeleFLMForTokenClassification",
}


class TeleFLMPreTrainedModel(LlamaPreTrainedModel):
    config: TeleFLMConfig
    config_class = TeleFLMConfig

    def __init__(self, config: TeleFLMConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # The generic heads make their decoder through AutoModel. Loaded from a Hub folder, this file is alone to know
        # it, and the configuration's class is another copy than the one imported above; or it derives from it, which
        # AutoModel.register refuses.
        decoders: Any = AutoModel._model_mapping
        if type(config) not in decoders:
            decoders.register(type(config), TeleFLMModel)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # Left to itself, transformers lists the class it saves and no other, although the file it copies has them all.
        self.config.auto_map = dict(AUTO_MAP)
        with unwrapped_class(self):
            super().save_pretrained(*args, **kwargs)


@contextmanager
def unwrapped_class(model: PreTrainedModel) -> Iterator[None]:
    """Let a model be of the class that it was made as: FSDP2 derives another from it, in a file of torch's own, which
    `save_pretrained` would copy and name in the auto_map.
    """
    wrapped = type(model)
    model.__class__ = next(base for base in wrapped.__mro__ if not base.__module__.startswith("torch."))
    try:
        yield
    finally:
        model.__class__ = wrapped


class TeleFLMModel(TeleFLMPreTrainedModel, LlamaModel):
    """The decoder without its head. Arguments and outputs are those of [`LlamaModel`]."""

    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of input_ids and inputs_embeds.")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1:  # main diff with Llama; 1 in all published models
            inputs_embeds = inputs_embeds * self.config.embedding_scale

        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class TeleFLMForCausalLM(TeleFLMPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head. Arguments and outputs are those of [`LlamaForCausalLM`]."""

    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys
    _tp_plan = LlamaForCausalLM._tp_plan
    _pp_plan = LlamaForCausalLM._pp_plan
    _fsdp_plan = getattr(LlamaForCausalLM, "_fsdp_plan", None)  # since transformers 5.15

    # Not LlamaForCausalLM's: it would build a LlamaModel first, whose post_init consumes settings meant for ours.
    def __init__(self, config: TeleFLMConfig):
        super().__init__(config)
        self.model = TeleFLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs = LlamaForCausalLM.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if self.config.logit_scale != 1:  # main diff with Llama
            outputs.logits = outputs.logits * self.config.logit_scale  # the unscaled ones are freed before the loss
        logits = outputs.logits

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TeleFLMForSequenceClassification(GenericForSequenceClassification, TeleFLMPreTrainedModel): ...


class TeleFLMForTokenClassification(GenericForTokenClassification, TeleFLMPreTrainedModel): ...


class TeleFLMForQuestionAnswering(GenericForQuestionAnswering, TeleFLMPreTrainedModel): ...


__all__ = [
    "TeleFLMForCausalLM",
    "TeleFLMForQuestionAnswering",
    "TeleFLMForSequenceClassification",
    "TeleFLMForTokenClassification",
    "TeleFLMModel",
    "TeleFLMPreTrainedModel",
]
