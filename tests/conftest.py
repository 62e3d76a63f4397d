# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Settings of the whole suite."""

import os
import sys

import pytest
from hypothesis import settings

from tests.fixtures.no_power_cut import keep_files_in_memory

# Before torch is imported, here or in a child: models this small lose by a second thread, a thousandfold where the
# processors are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests write many thousands of small files, each of which a slow disk would be waited for.
keep_files_in_memory()

# Shared machines stall at any moment, so the time of an example says nothing; and a suite that gates rolls no dice.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """What runs tokenize is kept with the tests, not in the user's cache; processes that they start have it too."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        if "datasets" in sys.modules:  # which has read the variable
            patch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder)
        yield folder
