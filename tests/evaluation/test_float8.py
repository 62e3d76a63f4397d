# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""8-bit floats, computed from the files as their products with their scales."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import convert_checkpoint
from conversion.checkpoint.dtypes import parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import open_checkpoint
from conversion.model_identity import tensor_digests
from evaluation import streamed_model
from evaluation.logits import checkpoint_logits
from evaluation.measure import evaluate
from evaluation.streamed_model import ACTIVATIONS_KEPT, StreamedModel
from growth.verification.verify import verify_checkpoints
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

IDS = np.random.default_rng(0).integers(0, 600, 50)


@pytest.fixture(scope="module", params=["rows", "tensors"])
def folders(request, tmp_path_factory):
    """A model, itself in 8-bit floats, and the products of these, which float32 holds."""
    place = tmp_path_factory.mktemp("models")
    tiny_model(dtype=torch.bfloat16).save_pretrained(place / "model")
    tiny_tokenizer(place / "model").save_pretrained(place / "model")
    convert_checkpoint(place / "model", place / "fp8", quantize="fp8")
    if request.param == "tensors":
        tensors = load_file(place / "fp8/model.safetensors")
        tensors = {name: t.max().reshape(1) if name.endswith("_scale") else t for name, t in tensors.items()}
        save_file(tensors, place / "fp8/model.safetensors", {"format": "pt"})
    convert_checkpoint(place / "fp8", place / "products", dtype="float32")
    return place


def logits(folder, dtype):
    source = open_checkpoint(folder)
    with FileReader() as reader, ThreadPoolExecutor(2) as pool:
        model = StreamedModel(source, parse_dtype(dtype), reader, pool)
        *_, hidden = model.hidden_states(IDS)
        found = np.concatenate([*model.logits(hidden, 100)], 1)
        digests = model.take_digests()
    return found, digests, source


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_products_are_what_is_computed_with(dtype, folders, monkeypatch):
    monkeypatch.setattr(streamed_model, "BLOCK", 300)  # a few rows at a time
    found, digests, source = logits(folders / "fp8", dtype)
    expected, _, _ = logits(folders / "products", dtype)
    np.testing.assert_array_equal(found, expected)
    if dtype == "float64":  # stock transformers, of the same weights; its rotary angles are float32
        stock = checkpoint_logits(open_checkpoint(folders / "products"), IDS, dtype)
        np.testing.assert_allclose(found, stock, rtol=0, atol=1e-7)
    # Weights and scales, from end to end; of the embedding, rows alone.
    known = tensor_digests({name: view for name, view in source.tensors.items() if name in digests})
    assert digests == known
    assert source.tensors.keys() - digests.keys() == {"model.embed_tokens.weight"}


def test_what_is_said(folders, tmp_path):
    text = tmp_path / "text"
    text.write_text("A decorator is a function that returns another function. " * 20)
    evaluation = evaluate(folders / "fp8", texts=[text])
    assert ACTIVATIONS_KEPT in evaluation.notes
    assert ACTIVATIONS_KEPT not in evaluate(folders / "products", texts=[text]).notes
    verification = verify_checkpoints(folders / "model", folders / "fp8", text=text)
    assert verification.numbers.forward == "streamed"
    assert ACTIVATIONS_KEPT in verification.notes
    assert any("KL divergence" in note for note in verification.notes)
    with pytest.raises(CheckpointError, match="--forward loaded takes no quantised model"):
        verify_checkpoints(folders / "model", folders / "fp8", text=text, forward="loaded")
    with pytest.raises(CheckpointError, match=r"is quantised \(it holds .*weight_scale\).*--dtype bfloat16"):
        verify_checkpoints(folders / "model", folders / "fp8")
