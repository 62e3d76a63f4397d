# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The plan algebra: views index like numpy, boxes tile exactly once or the plan is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.checkpoint.bytes import LocalFile, identify
from conversion.checkpoint.dtypes import BFLOAT16, BY_NAME, FLOAT32
from conversion.checkpoint.plan import (
    Box,
    CheckpointPlan,
    Copy,
    Fill,
    Normal,
    PlanError,
    RowMean,
    Statistic,
    TensorPlan,
    View,
    complement,
    first_overlap,
)
from conversion.checkpoint.reader import FileReader, boxes_of_range
from tests.fixtures.yardstick import TWO_SECONDS, counted

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def boxes(draw, shape):
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(start, tuple(draw(st.integers(1, n - a)) for a, n in zip(start, shape, strict=True)))


def mark(shape, parts):
    """How often each element is covered: the oracle for everything about boxes."""
    count = np.zeros(shape, int)
    for box in parts:
        count[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] += 1
    return count


@given(st.data(), shapes)
def test_complement_covers_exactly_the_rest(data, shape):
    taken = data.draw(st.lists(boxes(shape), max_size=3))
    rest = complement(shape, taken)
    np.testing.assert_array_equal(mark(shape, rest), mark(shape, taken) == 0)


@given(st.data(), shapes)
def test_boxes_of_range_are_contiguous_and_in_order(data, shape):
    flat = np.arange(np.prod(shape)).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, flat.size)] * 2)))
    parts = [
        flat[tuple(slice(a, b) for a, b in zip(x.start, x.stop, strict=True))]
        for x in boxes_of_range(shape, start, stop)
    ]
    seen = np.concatenate([part.ravel() for part in parts]) if parts else np.arange(0)
    np.testing.assert_array_equal(seen, np.arange(start, stop))
    assert len(parts) <= 2 * len(shape) - 1


@settings(max_examples=60)
@given(data=st.data())
def test_views_index_like_numpy(data, tmp_path_factory):
    shape = data.draw(shapes)
    array = np.random.default_rng(0).standard_normal(shape).astype("<f4")
    path = tmp_path_factory.mktemp("view") / "data"
    path.write_bytes(b"head" + array.tobytes())
    view = View.contiguous(identify(path), 4, shape, FLOAT32)
    for _ in range(data.draw(st.integers(0, 3))):
        match data.draw(st.sampled_from(["slice", "permute", "unflatten"])):
            case "slice":
                index = tuple(
                    slice(data.draw(st.integers(0, n)), data.draw(st.integers(0, n)), data.draw(st.integers(1, 3)))
                    for n in view.shape
                )
                view, array = view[index], array[index]
            case "permute":
                axes = data.draw(st.permutations(range(len(view.shape))))
                view, array = view.permute(*axes), array.transpose(axes)
            case "unflatten":
                axis = data.draw(st.integers(0, len(view.shape) - 1))
                size = view.shape[axis]
                inner = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0] or [1]))
                if size:
                    view = view.unflatten(axis, (size // inner, inner))
                    array = array.reshape(*array.shape[:axis], size // inner, inner, *array.shape[axis + 1 :])
    with FileReader() as reader:
        np.testing.assert_array_equal(reader.read(view), array)


def test_reader_takes_sparse_windows_run_by_run_and_repeats(tmp_path):
    array = np.arange(300 * 1000, dtype="<f4").reshape(300, 1000)
    (tmp_path / "data").write_bytes(array.tobytes())
    view = View.contiguous(identify(tmp_path / "data"), 0, array.shape, FLOAT32)
    with FileReader() as reader:
        np.testing.assert_array_equal(reader.read(view[:, 3:20]), array[:, 3:20])
        np.testing.assert_array_equal(reader.read(view[::7, ::250]), array[::7, ::250])
        repeated = View(view.file, 0, (5, 1000), (0, 1), FLOAT32)
        np.testing.assert_array_equal(reader.read(repeated), np.broadcast_to(array[0], (5, 1000)))


SOURCE = View.contiguous(LocalFile("source", 0, ""), 0, (4, 6), FLOAT32)
INTEGERS = View.contiguous(LocalFile("source", 0, ""), 0, (4, 6), BY_NAME["int64"])
WHOLE = Box((0, 0), (4, 6))
LEFT, RIGHT = Box((0, 0), (4, 3)), Box((0, 3), (4, 3))


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ((Copy(WHOLE, SOURCE),), None),
        ((Copy(LEFT, SOURCE[:, :3]), Fill(RIGHT)), None),
        ((Fill(LEFT), Fill(WHOLE)), "overlap"),
        ((Fill(LEFT), Fill(Box((0, 2), (4, 4)))), "overlap"),
        ((Fill(LEFT), Fill(Box((0, 3), (3, 3)))), "fill 21 of 24"),
        ((), "fill 0 of 24"),
        ((Fill(Box((0, 0), (4, 7))),), "outside"),
        ((Fill(Box((-1, 0), (4, 6))),), "outside"),
        ((Fill(Box((0, 0), (4, 0))), Fill(WHOLE)), "outside"),
        ((Fill(Box((0,), (24,))),), "not a box"),
        ((Copy(LEFT, SOURCE), Fill(RIGHT)), r"source of shape \(4, 6\)"),
        ((RowMean(WHOLE, SOURCE[:, :5]),), r"averages a source of shape \(4, 5\)"),
        ((Copy(WHOLE, INTEGERS),), "byte by byte"),
    ],
)
def test_tiling_proof(pieces, complaint):
    plan = CheckpointPlan((TensorPlan("weight", (4, 6), FLOAT32, pieces),), {})
    if complaint is None:
        plan.check()
    else:
        with pytest.raises(PlanError, match=f"weight.*{complaint}"):
            plan.check()


def test_layout_must_factor_the_shape():
    with pytest.raises(PlanError, match=r"layout \(2, 3, 5\).*24 elements"):
        TensorPlan("weight", (4, 6), FLOAT32, (Fill(Box.whole((2, 3, 5))),), layout=(2, 3, 5)).check()


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes(shape), max_size=8))))
def test_an_overlap_is_found_wherever_there_is_one(case):
    shape, parts = case
    found = first_overlap([Fill(box) for box in parts])
    assert (found is not None) == bool((mark(shape, parts) > 1).any())
    assert found is None or found[0].box.intersect(found[1].box)


def test_a_grid_of_shards_and_one_too_many():
    """A stack of layers, each in a grid of ranks: as many pieces as the 1T has, in no order."""
    grid = [Fill(Box((layer, 2 * row, 0), (1, 2, 4))) for row in range(64) for layer in range(140)]
    with counted() as taken:
        assert first_overlap(grid) is None
    assert taken.yardsticks < TWO_SECONDS
    extra = Fill(Box((70, 5, 3), (1, 1, 1)))
    assert {piece.box.start for piece in first_overlap([*grid, extra])} == {(70, 4, 0), (70, 5, 3)}


def test_names_are_unique():
    tensor = TensorPlan("weight", (4, 6), FLOAT32, (Fill(WHOLE),))
    with pytest.raises(PlanError, match="weight is planned twice"):
        CheckpointPlan((tensor, tensor), {}).check()


def test_fingerprint_follows_every_decision_but_not_the_folder():
    def plan(folder="/a", std=0.5, scale=1.0, dtype=BFLOAT16, seed=0, config=None):
        view = View.contiguous(LocalFile(f"{folder}/model.safetensors", 0, ""), 8, (4, 6), FLOAT32)
        pieces = (Copy(LEFT, view[:, :3], scale), Normal(RIGHT, Statistic("std", "weight", view) * std))
        return CheckpointPlan((TensorPlan("weight", (4, 6), dtype, pieces),), config or {}, seed=seed).fingerprint()

    assert plan() == plan(folder="/b")
    changed = [plan(std=0.25), plan(scale=2.0), plan(dtype=FLOAT32), plan(seed=1), plan(config={"a": 1})]
    assert len({plan(), *changed}) == 6


def test_fingerprint_tells_ranks_files_of_one_name_apart():
    """Native checkpoints repeat a file name in a folder a rank; two plans that swap them are two plans."""

    def plan(*files):
        sources = [LocalFile(f"/native/{file}/model_optim_rng.pt", 0, "") for file in files]
        views = [View.contiguous(source, 8, (4, 3), FLOAT32) for source in sources]
        pieces = (Copy(LEFT, views[0]), Copy(RIGHT, views[1]))
        return CheckpointPlan((TensorPlan("weight", (4, 6), FLOAT32, pieces),), {}).fingerprint()

    assert plan("mp_rank_00", "mp_rank_01") != plan("mp_rank_01", "mp_rank_00")
