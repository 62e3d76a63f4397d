# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What every test of fine-tuning starts from: a saved tiny model, a file of real conversations, a way to train."""

import json
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from sft.training.recipe import Recipe
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

STRICT = {"use_cpu": True, "seed": 0, "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no"}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Matrices this small are slower on several threads, and much slower on cores that others use too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A Hub folder: two layers, the 52B's multipliers, tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config(num_hidden_layers=2, output_mult=0.5, mup_scale_factor=16.0)).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations() -> list[dict]:
    """48 conversations about Python, of two and of five messages, answered by the standard library's documentation."""
    rows = []
    for index, (topic, text) in enumerate(list(topics.topics.items())[:48]):
        first, second, *_ = [" ".join(part.split())[:90] for part in text.split("\n\n") if len(part.split()) > 3] * 2
        turns = [("user", f"What is {topic}?"), ("assistant", first)]
        if index % 3 == 0:
            turns = [("system", "Be brief.\n"), *turns, ("user", "And  then?"), ("assistant", second)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


@pytest.fixture(scope="session")
def data_file(conversations, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations))
    return path


@pytest.fixture
def make_recipe(model_dir, data_file, tmp_path):
    """Build a checked recipe for the tiny model; keys given win."""

    def build(**keys) -> Recipe:
        defaults = {
            "model_name_or_path": str(model_dir),
            "data_files": str(data_file),
            "output_dir": str(tmp_path / "out"),
        }
        return Recipe.from_dict({**STRICT, **defaults, **keys})

    return build
