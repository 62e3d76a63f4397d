# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Copies that ranks kept of one tensor, wherever each is cut."""

import numpy as np

from conversion.checkpoint.bytes import identify
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sharded import ShardedTensor
from conversion.native.model_parallel import copies


def test_copies_that_are_cut_differently_are_compared_where_they_meet(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.arange(24, dtype="<f4").tobytes())
    whole = ShardedTensor.of(View.contiguous(identify(path), 0, (6, 4), FLOAT32))
    rows = ShardedTensor.concatenate(whole.split([1, 5], 0), 0)
    columns = ShardedTensor.concatenate(whole.split([3, 1], 1), 1)
    pairs = [*copies("it", rows, columns, ("one", "other"))]
    assert sorted(pair.first.shape for pair in pairs) == [(1, 1), (1, 3), (5, 1), (5, 3)]
    with FileReader() as reader:
        for pair in pairs:
            assert np.array_equal(reader.read(pair.first), reader.read(pair.second))
