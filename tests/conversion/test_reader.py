# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading windows of files: the elements of numpy's own slices, and no more bytes than they are worth."""

import numpy as np
import pytest

from conversion.checkpoint.bytes import OpenFile, identify
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader

ARRAY = np.arange(24 * 512 * 64, dtype="<f4").reshape(24, 512, 64)  # 128 KiB for each of the first dimension
EVERYTHING = slice(None)


@pytest.mark.parametrize(
    ("index", "calls", "waste"),
    [
        ((EVERYTHING,), 1, 1.0),
        ((slice(0, None, 2),), 12, 1.0),  # long runs: each by itself
        ((slice(0, None, 3), slice(0, 256)), 8, 1.0),
        ((EVERYTHING, slice(0, None, 2)), 3, 2.0),  # short ones, as many: what lies between, too, 1 MiB at a time
        ((EVERYTHING, EVERYTHING, slice(0, 40)), 3, 1.6),
        ((slice(0, 4), slice(0, None, 16)), 4 * 32, 1.0),  # short ones, far apart
    ],
    ids=str,
)
@pytest.mark.parametrize("scattered", [False, True])
def test_windows(index, calls, waste, scattered, tmp_path, monkeypatch):
    ARRAY.tofile(tmp_path / "file")
    view = View.contiguous(identify(tmp_path / "file"), 0, ARRAY.shape, FLOAT32)[index]
    expected = ARRAY[index]
    read = []
    real = OpenFile.read_into
    monkeypatch.setattr(
        OpenFile, "read_into", lambda file, target, at: (read.append(len(target)), real(file, target, at))[1]
    )
    out = np.zeros((*expected.shape[:-1], 2 * expected.shape[-1] if scattered else expected.shape[-1]), "<f4")
    out = out[..., ::2] if scattered else out
    with FileReader() as reader:
        reader.read_into(view, out)
    np.testing.assert_array_equal(out, expected)
    assert len(read) == (3 if scattered and index == (EVERYTHING,) else calls)  # which goes through 1 MiB of memory
    assert sum(read) <= waste * expected.nbytes
