# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fixtures of the model's tests: one tokenizer, and one saved model with it, for the whole session."""

import pytest
import torch

from tests.fixtures.tiny import tiny_model, tiny_tokenizer

# The models are tiny: on a busy machine a second thread makes every product wait for its turn, a thousand times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory, tokenizer):
    """What `save_pretrained` of model and tokenizer writes. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-teleflm"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
