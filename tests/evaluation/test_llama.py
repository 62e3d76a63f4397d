# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A plain Llama is measured as a Tele-FLM is: its rotary embeddings and its tokenizer, against stock transformers."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conversion.architecture import rope_parameters, trained_length
from conversion.checkpoint.errors import CheckpointError
from evaluation.measure import evaluate
from evaluation.rotary import rotary_frequencies
from tests.fixtures.llama import edit_config, llama_fields, save_llama, stock_logits

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 16.0}
TEXT = "To grow is to keep what one has been, café. "


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        ({}, {"rope_theta": 5e5}),
        ({"type": "linear", "factor": 3.0}, {}),
        ({**LLAMA3, "original_max_position_embeddings": 8192}, {"rope_theta": 5e5, "max_position_embeddings": 131072}),
        (LLAMA3, {"max_position_embeddings": 2048}),
        ({**LLAMA3, "original_max_position_embeddings": 64}, {"original_max_position_embeddings": 4096}),
        ({**YARN, "original_max_position_embeddings": 4096}, {"max_position_embeddings": 65536}),
        ({**YARN, "beta_fast": 8.0, "beta_slow": 2.0}, {"max_position_embeddings": 512}),
        ({**YARN, "truncate": False}, {"max_position_embeddings": 3000}),
        ({**YARN, "attention_factor": 0.7}, {}),
        ({**YARN, "mscale": 0.5, "mscale_all_dim": 0.8}, {}),
        ({**YARN, "mscale": 0.5}, {}),
        ({**YARN, "factor": 1.0}, {}),
    ],
)
def test_frequencies_are_those_of_transformers(rope, fields):
    config = {**llama_fields(hidden_size=512, head_dim=128), "model_type": "llama", **fields}
    config |= {"rope_scaling": rope} if rope else {}
    stock = LlamaRotaryEmbedding(LlamaConfig.from_dict(dict(config)))
    found, scale = rotary_frequencies(rope_parameters(config), 128, trained_length(config))
    np.testing.assert_allclose(found, stock.inv_freq.numpy(), rtol=3e-6)
    assert scale == pytest.approx(stock.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 100.0},
        {"rope_theta": 200.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
        {"rope_theta": 100.0, "rope_scaling": {**YARN, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
    ids=["plain", "llama3", "yarn", "linear"],
)
@pytest.mark.parametrize("loaded", [False, True], ids=["streamed", "loaded"])
def test_bits_per_byte(rope, loaded, tmp_path):
    """The formula, with ids by transformers' tokenizer and logits by its Llama: nothing here is ours."""
    folder = save_llama(tmp_path / "model", torch.float32, max_position_embeddings=256)
    edit_config(folder, lambda config: [config.pop("rope_parameters"), config.update(rope)])
    (tmp_path / "text.txt").write_text(TEXT)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    logits = stock_logits(folder, ids)[0].log_softmax(-1)
    nats = -sum(logits[place, token].item() for place, token in enumerate(ids[0, 1:].tolist()))
    (result,) = evaluate(folder, texts=[tmp_path / "text.txt"], dtype="float64", loaded=loaded).texts
    assert result.tokens == ids.shape[1] - 1
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type is dynamic and hidden_act silu; the streamed",
        ),
        ({"hidden_act": "gelu"}, "hidden_act gelu; the streamed forward pass computes default, linear, llama3, yarn"),
        ({"rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast of rope_type yarn is 0, expected a number above 0"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": "64"}, "original_max_position_embeddings is '64'"),
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'TeleFLM' or 'llama'; --loaded takes what"),
    ],
)
def test_what_is_not_computed_is_said(change, message, tmp_path):
    folder = save_llama(tmp_path / "model", torch.float32)
    edit_config(folder, lambda config: config.update(change))
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(CheckpointError, match=message):
        evaluate(folder, texts=[tmp_path / "text.txt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds neither tokenizer.model nor tokenizer.json; put the model's tokenizer there"),
        ("{}", r"tokenizer\.json: is no tokenizer \("),
        ("\0", r"tokenizer\.json: is no tokenizer \("),
    ],
)
def test_a_tokenizer_that_is_none(content, message, tmp_path):
    folder = save_llama(tmp_path / "model", torch.float32)
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(CheckpointError, match=message):
        evaluate(folder, texts=[tmp_path / "text.txt"])
