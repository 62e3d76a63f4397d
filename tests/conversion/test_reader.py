# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading windows of files: the elements of numpy's own slices, and no more bytes than they are worth."""

import os

import numpy as np
import pytest

import conversion.checkpoint.assemble as assembling
import conversion.checkpoint.execute as executing
from conversion.checkpoint.bytes import OpenFile, identify
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.plan import CheckpointPlan, TensorPlan, View
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


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_read_was_announced_before(workers, tmp_path, monkeypatch):
    """And no more than some blocks ahead: what is fetched too early is gone from the cache when its turn comes."""
    ARRAY.tofile(tmp_path / "file")
    monkeypatch.setattr(assembling, "BLOCK", 20_000)
    view = View.contiguous(identify(tmp_path / "file"), 0, ARRAY.shape, FLOAT32)
    announced, ahead, real_read, real_advise = np.zeros(ARRAY.nbytes, bool), [], OpenFile.read_into, os.posix_fadvise
    reads = np.zeros(ARRAY.nbytes, bool)

    def advise(descriptor, offset, count, advice):
        if advice == os.POSIX_FADV_WILLNEED:
            announced[offset : offset + count] = True
        real_advise(descriptor, offset, count, advice)

    def read_into(file, target, at):
        assert announced[at : at + len(target)].all()
        reads[at : at + len(target)] = True
        ahead.append(int(announced.sum() - reads.sum()))
        real_read(file, target, at)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(OpenFile, "read_into", read_into)
    plan = CheckpointPlan((TensorPlan.copy_of("tensor", view),), {"model_type": "other"})
    executing.write_checkpoint(plan, tmp_path / "out", executing.WriteOptions(workers=workers))
    assert announced.all()
    assert max(ahead) <= (executing._AHEAD + 1) * 2 * workers * 20_000 * 4
