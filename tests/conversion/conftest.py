# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Hub on this machine for the tests that need one."""

import huggingface_hub.utils._http as http
import pytest
from huggingface_hub import constants

from conversion.checkpoint import mirror
from tests.fixtures.hub import running_hub


@pytest.fixture
def hub():
    with running_hub() as running:
        running.lfs_threshold = 20_000
        yield running


@pytest.fixture
def here(hub, monkeypatch):
    """The client of this process speaks to the Hub, and does not wait between its tries."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(mirror, "_mirrors", {})
    return hub
