# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A grown model in a runtime that shares no code with transformers: CTranslate2, in C++, as a plain Llama."""

import numpy as np
import pytest
import torch

from conversion.exports.export import export_checkpoint
from growth import grow_checkpoint
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external


def test_a_grown_model_answers_as_its_source(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    source = tiny_model(tiny_config())
    source.save_pretrained(tmp_path / "source")
    tiny_tokenizer(tmp_path / "source").save_pretrained(tmp_path / "source")
    target = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 160, "num_hidden_layers": 5}
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", target)
    export_checkpoint(tmp_path / "grown", tmp_path / "llama", to="llama")
    TransformersConverter(str(tmp_path / "llama"), trust_remote_code=True).convert(str(tmp_path / "converted"))

    ids = torch.randint(0, 600, (4, 64), generator=torch.Generator().manual_seed(0))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), compute_type="float32", inter_threads=1)
    found = np.array(generator.forward_batch(ids.tolist()))
    with torch.no_grad():
        expected = source(ids).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
