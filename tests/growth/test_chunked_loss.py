# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The loss in chunks is transformers' own, and so is every gradient."""

import copy

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from growth.training import chunked_loss
from growth.training.chunked_loss import causal_lm_loss, chunk_loss
from tests.fixtures.tiny import tiny_config, tiny_model


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    """Of five tokens each, with a rest."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 5 * 640)


def batch(ignored=True):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 600, (2, 23), generator=generator)
    labels = ids.clone()
    if ignored:
        labels[0, :7] = -100
        labels[1, -4:] = -100
    return {"input_ids": ids, "labels": labels}


def losses_and_gradients(model, **kwargs):
    model.zero_grad()
    loss = model(**kwargs).loss
    (3 * loss).backward()  # as where a step is of several parts
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def both(model, **kwargs):
    chunked = copy.deepcopy(model)
    chunk_loss(chunked)
    return losses_and_gradients(model, **kwargs), losses_and_gradients(chunked, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(29)])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_model(dtype, ignored, items, tied):
    model = tiny_model(tiny_config(tie_word_embeddings=tied)).to(dtype).train()
    count = {} if items is None else {"num_items_in_batch": items}
    (loss, gradients), (found, own) = both(model, **batch(ignored), **count)
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    # transformers rounds float64 logits to float32 before its loss.
    tolerance = 1e-6 if dtype == torch.float64 else exact
    torch.testing.assert_close(found, loss.to(found.dtype), rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert (own[name] - gradient).abs().max() <= 2e-6 * scale, name


def test_float64_is_exact():
    """Against the formula itself, by autograd over all logits."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 23, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(640, 32, dtype=torch.float64, requires_grad=True)
    labels = batch()["labels"]
    expected = torch.nn.functional.cross_entropy(
        (0.3 * hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    truth = torch.autograd.grad(expected, (hidden, weight))
    found = causal_lm_loss(hidden, weight, labels, 0.3)
    own = torch.autograd.grad(found, (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    for ours, theirs in zip(own, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-16)


def test_a_missing_factor_is_seen():
    model = tiny_model().train()
    hidden = model.model(batch()["input_ids"]).last_hidden_state
    expected = model(**batch()).loss
    right, wrong = (causal_lm_loss(hidden, model.lm_head.weight, batch()["labels"], s) for s in (0.125, 1.0))
    assert abs(right - expected) < 1e-6
    assert abs(wrong - expected) > 1e-2


def test_bfloat16_is_as_near_to_the_truth_as_the_model(monkeypatch):
    model = tiny_model(dtype=torch.bfloat16).train()
    truth = losses_and_gradients(tiny_model().train(), **batch())[1]["lm_head.weight"]
    (_, theirs), (_, ours) = both(model, **batch())
    name = "lm_head.weight"
    errors = [(gradient[name].float() - truth).norm() for gradient in (theirs, ours)]
    assert errors[1] <= 1.05 * errors[0]


def test_autocast():
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, theirs), (found, ours) = both(model, **batch())
    torch.testing.assert_close(found, loss, rtol=2e-3, atol=0)
    for name, gradient in theirs.items():
        assert ours[name].dtype == gradient.dtype == torch.float32
        assert (ours[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_nothing_to_learn_is_nan_as_theirs_is():
    labels = torch.full((1, 9), -100)
    model = tiny_model()
    hidden = model.model(torch.arange(9)[None]).last_hidden_state
    theirs = ForCausalLMLoss(model(torch.arange(9)[None]).logits, labels, 640)
    assert theirs.isnan()
    assert causal_lm_loss(hidden, model.lm_head.weight, labels, 0.125).isnan()


def test_without_labels_the_model_is_as_it_was():
    model = tiny_model()
    logits = model(batch()["input_ids"]).logits
    chunk_loss(model)
    assert torch.equal(model(batch()["input_ids"]).logits, logits)
    generated = model.generate(batch()["input_ids"][:, :5], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 8)
    with torch.no_grad():
        assert model(**batch()).logits is None


def test_no_array_is_as_large_as_the_logits(monkeypatch):
    """By torch's own account of what is allocated."""
    from torch.profiler import profile

    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 32 * 8192)
    hidden = torch.randn(1, 2049, 16, requires_grad=True)
    weight = torch.randn(8192, 16, requires_grad=True)
    labels = torch.randint(0, 8192, (1, 2049))
    with profile(profile_memory=True) as seen:
        causal_lm_loss(hidden, weight, labels, 0.5).backward()
    largest = max(abs(event.self_cpu_memory_usage) for event in seen.events() if event.self_cpu_memory_usage > 0)
    assert largest < 2048 * 8192 * 4 / 8


@pytest.mark.parametrize("step", [0, 4, 10])
def test_masked_models(step, tmp_path):
    """A model that grows by masks is trained with it too."""
    from growth import grow_checkpoint
    from growth.method import Mask
    from growth.training.loading import load_model

    tiny_model().save_pretrained(tmp_path / "small")
    target = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 96, "num_hidden_layers": 4}
    grow_checkpoint(tmp_path / "small", tmp_path / "masked", target, method=Mask(10))
    model = load_model(tmp_path / "masked", dtype="float32").train()
    model.set_mask_step(step)
    (loss, theirs), (found, ours) = both(model, **batch())
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max() + 1e-12, name
