# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Embeddings by a causal language model, against one text at a time and a mean by numpy."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft.selection import SelectionError, embed, rds
from sft.selection.rds import HiddenStateEncoder, weighted_means

TEXTS = ["What is a cat?\nAn animal.", "", "a", "words and more words " * 60, "猫是什么？", "long " * 300, "Hi\nHello"]


@pytest.fixture(scope="module")
def llama_dir(model_dir, tmp_path_factory):
    """A stock Llama with random weights, and a tokenizer that is there already."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def one_by_one(folder, longest: int) -> np.ndarray:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = []
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:longest]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double().numpy()
        mean = np.average(states, axis=0, weights=np.arange(1, len(ids) + 1))
        expected.append(mean / np.linalg.norm(mean))
    return np.stack(expected)


@pytest.mark.parametrize("batch", [1, 300, 8192])
@pytest.mark.parametrize("kind", ["llama", "teleflm"])
def test_vectors_by_their_definition(kind, batch, model_dir, llama_dir, monkeypatch):
    monkeypatch.setattr(rds, "BATCH_TOKENS", batch)
    monkeypatch.setattr(rds, "MAX_TOKENS", 100)
    folder = llama_dir if kind == "llama" else model_dir
    expected = one_by_one(folder, 100)
    np.testing.assert_allclose(HiddenStateEncoder(str(folder))(TEXTS), expected, atol=2e-6)


def test_padding_does_not_count(llama_dir):
    model = AutoModelForCausalLM.from_pretrained(llama_dir).base_model.eval()
    short, long = [5, 6, 7], list(range(3, 60))
    together, alone = weighted_means(model, [short, long]), weighted_means(model, [short])
    np.testing.assert_allclose(together[0], alone[0], atol=2e-6)
    assert not np.allclose(weighted_means(model, [[*short, 0, 0]])[0], alone[0], atol=1e-3), "as text, zeros do"


def test_no_texts(llama_dir):
    assert HiddenStateEncoder(str(llama_dir))([]).shape == (0, 32)


def test_it_travels_without_the_model(llama_dir):
    encoder = HiddenStateEncoder(str(llama_dir))
    sent = pickle.dumps(encoder)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent)(TEXTS[:2]), encoder(TEXTS[:2]))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "{empty}"])
def test_a_model_that_cannot_be_loaded(model, tmp_path):
    name = model.format(empty=tmp_path)
    with pytest.raises(SelectionError, match=r"^--embedder rds:.*: ") as error:
        HiddenStateEncoder(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_damaged_model(llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path)
    with pytest.raises(SelectionError, match="its hidden states are not finite"):
        HiddenStateEncoder(str(tmp_path))(TEXTS)


def test_weights_that_are_missing_are_not_made_up(llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path)
    weights = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={key: weights[key] for key in weights if "layers.1.mlp" not in key})
    with pytest.raises(SelectionError, match=r"has no weights for model\.layers\.1\.mlp\..* and 2 more") as error:
        HiddenStateEncoder(str(tmp_path))
    assert str(error.value).startswith(f"--embedder rds:{tmp_path}: ")
    model.save_pretrained(tmp_path, state_dict={key: weights[key] for key in weights if key != "lm_head.weight"})
    found, expected = (HiddenStateEncoder(str(folder))(TEXTS) for folder in (tmp_path, llama_dir))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_tokenizer_of_another_model(llama_dir, tmp_path):
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=550, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    expected = "its tokenizer has 600 ids, its weights 550 rows, none of them for id 599; give"
    with pytest.raises(SelectionError, match=expected) as error:
        HiddenStateEncoder(str(tmp_path))
    assert str(error.value).startswith(f"--embedder rds:{tmp_path}: ")
    with pytest.raises(SelectionError, match=expected):
        embed.fit(TEXTS, str(tmp_path), 0)


def test_ids_with_gaps_may_be_fewer_than_the_rows_and_beyond_them(tmp_path):
    words = {"[UNK]": 0, "cat": 1, "dog": 700}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]"))).save_pretrained(tmp_path)
    save_file({"model.embed_tokens.weight": torch.ones(16, 8)}, tmp_path / "model.safetensors", {"format": "pt"})
    LlamaConfig(vocab_size=16, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(SelectionError, match="has 3 ids, its weights 16 rows, none of them for id 700"):
        embed.fit(["cat dog"], str(tmp_path), 0)
