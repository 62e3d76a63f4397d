# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Classes that users derive from ours: a configuration with a field more, and a model that reads it."""

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_teleflm import (
    TeleFLMConfig,
    TeleFLMForCausalLM,
    TeleFLMForQuestionAnswering,
    TeleFLMForSequenceClassification,
    TeleFLMForTokenClassification,
    TeleFLMModel,
)
from tests.fixtures.tiny import tiny_config, tiny_model

IDS = torch.arange(3, 23)[None]
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS += ("vocab_size", "use_mup", "input_mult", "output_mult", "mup_scale_factor", "rms_norm_eps")


class PlainSubclass(TeleFLMConfig):
    """A subclass in two lines, of the same model_type."""

    temper: float = 2.0


@strict
class StrictSubclass(TeleFLMConfig):
    """As transformers' own configurations are written, of a model_type of its own."""

    model_type = "my-flm"
    temper: float = 2.0


class MyModel(TeleFLMModel):
    """A decoder of the user's own."""

    config_class = StrictSubclass


class MyForCausalLM(TeleFLMForCausalLM):
    """A head that reads the field."""

    config_class = StrictSubclass

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits / self.config.temper
        return outputs


def config_of(config_class, **fields):
    return config_class(**{name: getattr(tiny_config(), name) for name in FIELDS}, **fields)


HEADS = (TeleFLMForSequenceClassification, TeleFLMForTokenClassification, TeleFLMForQuestionAnswering)


@pytest.mark.parametrize("config_class", [PlainSubclass, StrictSubclass])
@pytest.mark.parametrize("model_class", [TeleFLMModel, TeleFLMForCausalLM, *HEADS])
def test_every_class_takes_a_configuration_that_derives_from_ours(model_class, config_class, tmp_path):
    config = config_of(config_class, temper=4.0, pad_token_id=0)
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path, config=config_class.from_pretrained(tmp_path)).eval()
    assert type(again.config) is config_class
    assert again.config.temper == 4.0
    assert torch.equal(again(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("config_class", [PlainSubclass, StrictSubclass])
def test_it_computes_what_ours_computes(config_class):
    ours = tiny_model()
    theirs = TeleFLMForCausalLM(config_of(config_class)).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)


@pytest.fixture
def own_registers(monkeypatch):
    """What a test registers with the Auto classes goes with it."""
    for register in (CONFIG_MAPPING, AutoModel._model_mapping, AutoModelForCausalLM._model_mapping):
        monkeypatch.setattr(register, "_extra_content", dict(register._extra_content))


def test_a_model_of_ones_own_is_found_by_the_auto_classes(own_registers, tmp_path):
    AutoConfig.register("my-flm", StrictSubclass)
    AutoModelForCausalLM.register(StrictSubclass, MyForCausalLM)
    plain = tiny_model()
    model = MyForCausalLM(config_of(StrictSubclass, temper=4.0)).eval()
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is MyForCausalLM
    torch.testing.assert_close(again(IDS).logits * 4, plain(IDS).logits)


def test_a_decoder_of_ones_own_is_not_replaced(own_registers):
    """The heads make it through AutoModel, where what the user registered stays."""
    AutoModel.register(StrictSubclass, MyModel, exist_ok=True)
    assert type(TeleFLMForSequenceClassification(config_of(StrictSubclass, pad_token_id=0)).model) is MyModel
    assert type(TeleFLMForSequenceClassification(tiny_config(pad_token_id=0)).model) is TeleFLMModel
