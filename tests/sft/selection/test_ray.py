# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The same kernels on Ray Data: the same rows, bit for bit."""

from pathlib import Path

import pytest

from sft.data.formats import DataError
from sft.selection import SelectionSettings, select_conversations

from .conftest import write_rows

pytestmark = pytest.mark.external
ROOT = Path(__file__).parents[3]


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield
    ray.shutdown()


def test_ray_selects_the_same_rows(cluster, corpus, tmp_path):
    files = [write_rows(tmp_path / f"{number}.jsonl", corpus[number::3]) for number in range(3)]
    settings = SelectionSettings(count=100)
    outs = tmp_path / "ray", tmp_path / "here"
    select_conversations(files, outs[0], settings, use_ray=True)
    select_conversations(files, outs[1], settings)
    for made in sorted(outs[1].rglob("*.parquet")):
        assert (outs[0] / made.relative_to(outs[1])).read_bytes() == made.read_bytes()
    with pytest.raises(DataError, match=r"^/nowhere.jsonl: No such file"):
        select_conversations([*files, "/nowhere.jsonl"], tmp_path / "third", settings, use_ray=True)
    assert (outs[0] / "selected.jsonl").read_bytes() == (outs[1] / "selected.jsonl").read_bytes()
