# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tensors in pieces do what numpy's arrays do, however they are cut."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion.checkpoint.bytes import identify
from conversion.checkpoint.dtypes import FLOAT32, FLOAT64
from conversion.checkpoint.plan import Box, PlanError, View
from conversion.checkpoint.sharded import ShardedTensor
from tests.fixtures.sharded_tensors import materialise

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def cut(data, box: Box) -> list[Box]:
    """A box in random pieces: cut at random places, up to a few times."""
    pieces = [box]
    for _ in range(data.draw(st.integers(0, 5))):
        old = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        axis = data.draw(st.integers(0, len(old.size) - 1))
        at = data.draw(st.integers(1, old.size[axis]))
        first, second = list(old.size), list(old.size)
        start = list(old.start)
        first[axis], second[axis], start[axis] = at, old.size[axis] - at, old.start[axis] + at
        pieces.append(Box(old.start, tuple(first)))
        if second[axis]:
            pieces.append(Box(tuple(start), tuple(second)))
    return pieces


class Store:
    """Arrays, each in a file of its own."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.folder.mkdir(exist_ok=True)
        self.count = 0

    def add(self, array: np.ndarray) -> View:
        path = self.folder / f"{self.count}"
        path.write_bytes(b"header" + np.ascontiguousarray(array).tobytes())
        self.count += 1
        return View.contiguous(identify(path), 6, array.shape, FLOAT32)

    def shard(self, array: np.ndarray, boxes: list[Box]) -> ShardedTensor:
        """The array in those boxes, of which one in three is a hole of zeros."""
        chunks = []
        for number, box in enumerate(boxes):
            part = array[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
            if number % 3 == 2:
                part[...] = 0
            chunks.append((box, None if number % 3 == 2 else self.add(part)))
        return ShardedTensor(array.shape, FLOAT32, tuple(chunks))


def draw_slice(data, tensor: ShardedTensor, array: np.ndarray):
    index = tuple(
        slice(start := data.draw(st.integers(0, n)), data.draw(st.integers(start, n)))
        for n in array.shape[: data.draw(st.integers(1, array.ndim))]
    )
    return tensor[index], array[index]


def draw_unflatten(data, tensor: ShardedTensor, array: np.ndarray):
    axis = data.draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    inner = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0] or [1]))
    sizes = data.draw(st.permutations((size // inner, inner)))
    return tensor.unflatten(axis, sizes), array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])


def draw_permute(data, tensor: ShardedTensor, array: np.ndarray):
    axes = data.draw(st.permutations(range(array.ndim)))
    return tensor.permute(*axes), array.transpose(axes)


def draw_concatenate(data, tensor: ShardedTensor, array: np.ndarray):
    axis = data.draw(st.integers(0, array.ndim - 1))
    return ShardedTensor.concatenate([tensor, tensor], axis), np.concatenate([array, array], axis)


def draw_unbind(data, tensor: ShardedTensor, array: np.ndarray):
    axis = data.draw(st.integers(0, array.ndim - 1))
    parts = tensor.unbind(axis)
    assert len(parts) == array.shape[axis]
    if array.ndim == 1 or not parts:
        return tensor, array
    at = data.draw(st.integers(0, len(parts) - 1))
    return parts[at], array.take(at, axis)


def draw_split(data, tensor: ShardedTensor, array: np.ndarray):
    axis = data.draw(st.integers(0, array.ndim - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, array.shape[axis]), max_size=4)))
    sizes = np.diff([0, *cuts, array.shape[axis]]).tolist()
    parts = tensor.split(sizes, axis)
    at = data.draw(st.integers(0, len(sizes) - 1))
    return parts[at], np.split(array, cuts, axis)[at]


OPERATIONS = (draw_slice, draw_split, draw_unflatten, draw_permute, draw_concatenate, draw_unbind)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), shape=SIZES)
def test_any_operations_on_any_cut_give_what_numpy_gives(data, shape, tmp_path):
    array = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    tensor = Store(tmp_path / "storage").shard(array, cut(data, Box.whole(shape)))
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=5)):
        tensor, array = operation(data, tensor, array)
        assert tensor.shape == array.shape
        assert tensor.numel == array.size
    assert np.array_equal(materialise(tensor), array)


def test_a_cut_inside_a_new_row_cuts_the_chunk_there(tmp_path):
    array = np.arange(12, dtype=np.float32)
    tensor = Store(tmp_path / "storage").shard(array, [Box((0,), (7,)), Box((7,), (5,))]).unflatten(0, (3, 4))
    assert [box.size for box, _ in tensor.chunks] == [(1, 4), (1, 3), (1, 1), (1, 4)]
    assert np.array_equal(materialise(tensor), array.reshape(3, 4))


def test_a_stack_of_scalars_and_one_scalar(tmp_path):
    store = Store(tmp_path / "storage")
    array = np.array([3, 5], np.float32)
    first, second = store.shard(array, [Box((0,), (2,))]).unbind(0)
    assert (first.shape, materialise(first), materialise(second)) == ((), 3, 5)
    assert materialise(ShardedTensor.of(store.add(np.array(7, np.float32)))) == 7
    assert materialise(ShardedTensor.zeros((), FLOAT32)) == 0


def test_nothing_at_all():
    empty = ShardedTensor.zeros((2, 0), FLOAT32)
    assert materialise(empty).shape == (2, 0)
    assert [part.shape for part in empty.unbind(0)] == [(0,), (0,)]
    assert empty.unbind(1) == ()


@pytest.mark.parametrize(
    ("shapes", "axis", "message"),
    [
        ([(2, 3), (2, 4)], 0, r"cannot concatenate \(2, 3\) and \(2, 4\) along dimension 0"),
        ([(2, 3), (2, 3, 1)], 1, r"cannot concatenate \(2, 3\) and \(2, 3, 1\) along dimension 1"),
    ],
)
def test_what_does_not_fit_together(shapes, axis, message):
    with pytest.raises(PlanError, match=message):
        ShardedTensor.concatenate([ShardedTensor.zeros(shape, FLOAT32) for shape in shapes], axis)


def test_other_refusals():
    with pytest.raises(PlanError, match="cannot concatenate float32 and float64"):
        ShardedTensor.concatenate([ShardedTensor.zeros((2,), dtype) for dtype in (FLOAT32, FLOAT64)], 0)
    with pytest.raises(PlanError, match=r"cannot lay out 6 as \(2, 4\): the product is 8"):
        ShardedTensor.zeros((6,), FLOAT32).unflatten(0, (2, 4))
    with pytest.raises(PlanError, match="cannot split 6 into 2 parts of 5 in all"):
        ShardedTensor.zeros((6,), FLOAT32).split((2, 3), 0)
