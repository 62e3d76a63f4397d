# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A model in a folder, and texts, for all tests of what models compute."""

from pathlib import Path

import pytest
import torch

from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
SENTENCE = "The value of a subscription is the item that the key selects. 天地玄黄, café.\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three layers, window 256, tokenizer and chat template. Copy it before changing anything."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config()).save_pretrained(path)
    tiny_tokenizer(path).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    """A document of several windows."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 24)
    return path
