# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The numbers: logits, generation, loss and gradients against stock Llama and stock Granite."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from modeling_teleflm import TeleFLMConfig
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.modeling.oracles import ATTENTIONS, CASES, LlamaByHand, assert_same_logits, dynamic_cache, granite, plain


def ids_of(*shape):
    return torch.randint(3, 600, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("oracle", [LlamaByHand, granite])
def test_logits_are_those_of_the_oracle(oracle, case, attention, dtype):
    model = tiny_model(dtype=dtype)
    model.set_attn_implementation(attention)
    assert_same_logits(model, oracle(model), case)


@pytest.mark.parametrize("case", CASES[1:])
def test_every_way_of_calling_gives_the_same_logits(case):
    """The oracles cannot show this: a mask that transformers built wrongly would be wrong in both."""
    model, ids = tiny_model(dtype=torch.float64), ids_of(2, 11)
    with torch.no_grad():
        expected, actual = plain(model, ids), case(model, ids)
    comparable = actual.abs().sum(-1) > 0
    if case.__name__ == "left_padded":
        comparable[0] = False  # what is left of a row cut at its start is another row
    assert comparable.sum() >= 11
    torch.testing.assert_close(actual[comparable], expected[comparable], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 2},
        {"head_dim": 12},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"output_mult": 2.0, "mup_scale_factor": 80.0, "input_mult": 10},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_llamas_other_fields_keep_their_meaning(overrides):
    model = tiny_model(tiny_config(**overrides))
    assert_same_logits(model, LlamaByHand(model), dynamic_cache)


def test_without_mup_it_is_llama():
    model = tiny_model(tiny_config(use_mup=False))
    stock = LlamaByHand(model).llama
    assert model.config.logit_scale == model.config.embedding_scale == 1.0
    assert_same_logits(model, stock, plain)


@pytest.mark.parametrize("fields", [(0.5, 16.0), (1.0, 32.0), (0.625, 20.0), (2, 64)])
def test_only_the_ratio_of_the_output_multipliers_counts(fields):
    output_mult, mup_scale_factor = fields
    config = tiny_config(output_mult=output_mult, mup_scale_factor=mup_scale_factor)
    assert config.logit_scale == 1 / 32
    assert_same_logits(tiny_model(config), tiny_model(tiny_config(output_mult=1.0, mup_scale_factor=32.0)), plain)


def test_embeddings_given_by_the_caller_are_scaled_too():
    model, ids = tiny_model(), ids_of(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits)
    first_hidden_state = model(input_ids=ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(first_hidden_state, embeddings * 2.5)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(keep):
    model, ids = tiny_model(), ids_of(2, 5)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    logits = model(ids, logits_to_keep=keep).logits
    assert torch.equal(logits, granite(model)(ids, logits_to_keep=keep).logits)
    torch.testing.assert_close(logits, model(ids).logits[:, kept])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "strategy", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "beam", "sample"]
)
def test_generation_is_that_of_granite(strategy, cache):
    model = tiny_model()
    ids = ids_of(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = GenerationConfig(
        max_new_tokens=6,
        cache_implementation=cache,
        pad_token_id=0,
        eos_token_id=None,
        disable_compile=True,
        **strategy,
    )
    outputs = []
    for each in (model, granite(model)):
        torch.manual_seed(0)
        outputs.append(
            each.generate(
                ids,
                attention_mask=mask,
                generation_config=options,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    assert outputs[0].sequences.shape == (2, 12)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(torch.equal(*step) for step in zip(outputs[0].logits, outputs[1].logits, strict=True))


def test_loss_is_the_mean_over_the_labels_and_counts_what_the_trainer_counts():
    model, ids = tiny_model(), ids_of(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    logits = LlamaByHand(model)(ids).logits
    summed = cross_entropy(logits[:, :-1].reshape(-1, 640), labels[:, 1:].reshape(-1), reduction="sum")
    trained = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels).loss, summed / trained)
    # Under gradient accumulation the Trainer divides by the count of the whole batch instead.
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=40).loss, summed / 40)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
            model.enable_input_require_grads()
        model(ids_of(2, 9), labels=ids_of(2, 9)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, name
        assert torch.equal(gradients[1][name], expected), name


def test_gradients_are_those_of_granite():
    model = tiny_model()
    oracle = granite(model)
    for each in (model, oracle):
        each(ids_of(2, 9), labels=ids_of(2, 9)).loss.backward()
    expected = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name


# The checks above, shown to see the bugs they are there for.


def test_a_forgotten_embedding_multiplier_is_caught(monkeypatch):
    monkeypatch.setattr(TeleFLMConfig, "embedding_scale", 1.0)
    model = tiny_model()
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(model, granite(model), plain)


def test_a_logit_scale_dropped_when_there_is_a_cache_is_caught(monkeypatch):
    model = tiny_model()
    correct = model.forward

    def forward(*args, past_key_values=None, **kwargs):
        output = correct(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits / model.config.logit_scale
        return output

    monkeypatch.setattr(model, "forward", forward)
    assert_same_logits(model, granite(model), plain)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(model, granite(model), dynamic_cache)
