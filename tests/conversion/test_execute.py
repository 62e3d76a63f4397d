# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The executor against a dense oracle: every piece in numpy, on arrays that fit."""

import gc
import itertools
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from conversion.checkpoint import assemble as assemble_module
from conversion.checkpoint import execute
from conversion.checkpoint.assemble import measure
from conversion.checkpoint.bytes import identify
from conversion.checkpoint.containers import safetensors_shards
from conversion.checkpoint.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, FLOAT64
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.execute import WriteOptions, foresee, make_job, write_checkpoint
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.normal_stream import GRID, draw_words, normal_table
from conversion.checkpoint.numbers import parse_size
from conversion.checkpoint.plan import (
    Box,
    CheckpointPlan,
    Copy,
    Fill,
    Noise,
    Normal,
    PlanError,
    RowMean,
    Statistic,
    TensorPlan,
    View,
    complement,
)
from conversion.checkpoint.reader import FileReader
from tests.fixtures.exact_rounding import round_array


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few elements, so that small tensors have many. The stream's grid stays: one draw serves them all."""
    monkeypatch.setattr(assemble_module, "BLOCK", 7)
    monkeypatch.setattr(
        assemble_module, "draw_words", lambda seed, name, start, count: draw_words(seed, name, 0, start + count)[start:]
    )


def store(path: Path, array: np.ndarray, dtype) -> View:
    path.write_bytes(b"x" * 16 + array.astype(dtype.numpy).tobytes())
    return View.contiguous(identify(path), 16, array.shape, dtype)


def load(folder: Path) -> dict[str, np.ndarray]:
    """Read a written folder with the safetensors library."""
    arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            arrays |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return arrays


def dense(tensor: TensorPlan, arrays: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """The tensor by the definition of its pieces, with arrays instead of files."""
    out = np.full(tensor.layout, np.nan)
    for piece in tensor.pieces:
        at = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
        if isinstance(piece, Copy):
            source = np.lib.stride_tricks.as_strided(
                arrays[piece.source.file].ravel()[(piece.source.offset - 16) // piece.source.dtype.itemsize :],
                piece.source.shape,
                [s * arrays[piece.source.file].itemsize for s in piece.source.strides],
            )
            scale, offset = Fraction(piece.scale), Fraction(piece.offset)
            if piece.offset:
                source, scale = source * np.float64(piece.scale), Fraction(1)
            out[at] = round_array(lambda value: value * scale + offset, source, tensor.dtype.name)  # noqa: B023
        elif isinstance(piece, Fill):
            out[at] = piece.value
        elif isinstance(piece, Normal):
            quantiles = normal_table(piece.std, tensor.dtype).astype(np.float64)
            out[at] = quantiles[draw_words(seed, tensor.name, 0, tensor.numel)].reshape(tensor.layout)[at]
        else:
            out[at] = arrays[piece.source.file].mean(axis=0) * piece.scale
    return out.astype(tensor.dtype.numpy).reshape(tensor.shape)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
def test_random_plans(dtype, data, small_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    source = rng.standard_normal((4, 6, 5)).astype(dtype.numpy).astype(np.float64)
    view = store(folder / "source", source, dtype)
    layout = (data.draw(st.integers(4, 6)), data.draw(st.integers(6, 8)), 5)
    scale = data.draw(st.sampled_from([1.0, 0.5, 0.9]))
    start = tuple(data.draw(st.integers(0, n - m)) for n, m in zip(layout, (4, 6, 5), strict=True))
    copy = Copy(Box(start, (4, 6, 5)), view, scale, data.draw(st.sampled_from([0.0, 1.0])))
    fills = [
        data.draw(st.sampled_from([Fill(box), Fill(box, 0.25), Normal(box, 0.5)]))
        for box in complement(layout, [copy.box])
    ]
    shape = (layout[0] * layout[1], 5)
    tensor = TensorPlan("weight", shape, dtype, (copy, *fills), layout)
    write_checkpoint(CheckpointPlan((tensor,), {}, seed=3), folder / "out", WriteOptions(workers=2))
    expected = dense(tensor, {view.file: source.astype(dtype.numpy).astype(np.float64)}, seed=3)
    found = load(folder / "out")["weight"]
    np.testing.assert_array_equal(found.astype(float), expected.astype(float))


def mixed_plan(folder: Path) -> CheckpointPlan:
    """Every kind of piece and several dtypes."""
    rng = np.random.default_rng(0)
    weight = store(folder / "weight", rng.standard_normal((40, 30)), FLOAT32)
    norm = store(folder / "norm", rng.standard_normal(30) + 5, FLOAT32)
    ids = store(folder / "ids", np.arange(12).reshape(3, 4), BY_NAME["int64"])
    grown = (
        Copy(Box((0, 0), (40, 30)), weight),
        RowMean(Box((40, 0), (8, 30)), weight, 0.5),
        Normal(Box((0, 30), (48, 10)), Statistic("std", "weight", weight) * 0.5),
    )
    widened = (Copy(Box((0,), (30,)), norm, 0.75), Fill(Box((30,), (10,)), Statistic("mean", "norm", norm, 0.75)))
    tensors = (
        TensorPlan("grown", (48, 40), BFLOAT16, grown),
        TensorPlan("widened", (40,), FLOAT32, widened),
        TensorPlan.copy_of("ids", ids),
        TensorPlan.copy_of("transposed", weight.permute(1, 0)),
        TensorPlan.copy_of("scalar", View(norm.file, norm.offset, (), (), FLOAT32)),
        TensorPlan("empty", (0, 4), FLOAT32, ()),
        TensorPlan("zeros", (33, 5), FLOAT32, (Fill(Box.whole((33, 5))),)),
    )
    return CheckpointPlan(tensors, {"model_type": "TeleFLM"}, {"note.txt": b"hello"}, {"operation": "test"}, seed=7)


def test_every_kind_of_piece(tmp_path):
    plan = mixed_plan(tmp_path)
    write_checkpoint(plan, tmp_path / "out", WriteOptions())
    found = load(tmp_path / "out")
    weight = np.fromfile(tmp_path / "weight", "<f4", offset=16).reshape(40, 30)
    norm = np.fromfile(tmp_path / "norm", "<f4", offset=16)
    grown = found["grown"].astype(np.float64)
    np.testing.assert_array_equal(found["grown"][:40, :30], weight.astype(ml_dtypes.bfloat16))
    row = (weight.astype(np.float64).mean(axis=0) * 0.5).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["grown"][40:, :30], np.broadcast_to(row, (8, 30)))
    assert grown[:, 30:].std() == pytest.approx(weight.std() * 0.5, rel=0.1)
    np.testing.assert_allclose(found["widened"][:30], norm * 0.75, rtol=1e-7)
    np.testing.assert_allclose(found["widened"][30:], norm.astype(np.float64).mean() * 0.75, rtol=1e-7)
    np.testing.assert_array_equal(found["ids"], np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(found["transposed"], weight.T)
    assert found["scalar"] == norm[0]
    assert found["empty"].shape == (0, 4)
    assert not found["zeros"].any()
    assert (tmp_path / "out/note.txt").read_bytes() == b"hello"
    assert json.loads((tmp_path / "out/config.json").read_bytes()) == {"model_type": "TeleFLM"}


def digest_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 5}])
def test_workers_do_not_change_a_byte(options, small_blocks, tmp_path):
    plan = mixed_plan(tmp_path)
    write_checkpoint(plan, tmp_path / "a", WriteOptions(workers=2))
    write_checkpoint(plan, tmp_path / "b", WriteOptions(**options))
    assert digest_of_files(tmp_path / "a") == digest_of_files(tmp_path / "b")


def test_neither_block_nor_shard_size_changes_a_tensor(tmp_path, monkeypatch):
    plan = mixed_plan(tmp_path)
    write_checkpoint(plan, tmp_path / "one", WriteOptions())
    write_checkpoint(plan, tmp_path / "many", WriteOptions(max_shard_size="1KB"))
    monkeypatch.setattr(assemble_module, "BLOCK", GRID)
    write_checkpoint(plan, tmp_path / "blocks", WriteOptions())
    one, many, blocks = (load(tmp_path / name) for name in ("one", "many", "blocks"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for name, array in one.items():
        assert many[name].tobytes() == array.tobytes() == blocks[name].tobytes()
    digests = [json.loads((tmp_path / name / MANIFEST).read_bytes())["tensors"] for name in ("one", "many")]
    assert {n: e["digest"] for n, e in digests[0].items()} == {n: e["digest"] for n, e in digests[1].items()}


def test_large_tensor_has_the_same_draws_whatever_surrounds_it(tmp_path):
    """Over several blocks and grid cells, part by part: positions decide, nothing else."""
    numel = 2 * assemble_module.BLOCK + 12345
    whole = TensorPlan("w", (numel,), BFLOAT16, (Normal(Box((0,), (numel,)), 1.0),))
    cut = 5 * GRID + 17
    halves = TensorPlan("w", (numel,), BFLOAT16, (Fill(Box((0,), (cut,))), Normal(Box((cut,), (numel - cut,)), 1.0)))
    write_checkpoint(CheckpointPlan((whole,), {}), tmp_path / "whole", WriteOptions(digest=False))
    write_checkpoint(CheckpointPlan((halves,), {}), tmp_path / "halves", WriteOptions(digest=False))
    a, b = load(tmp_path / "whole")["w"], load(tmp_path / "halves")["w"]
    assert not b[:cut].any()
    np.testing.assert_array_equal(a[cut:], b[cut:])


def test_normal_draws_are_normal_and_independent():
    words = draw_words(0, "model.layers.0.mlp.up_proj.weight", 0, 4 * GRID)
    values = normal_table(1.0, FLOAT64)[words]
    n = values.size
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert values.var() == pytest.approx(0.99998, abs=6 * math.sqrt(2 / n))
    assert (values**4).mean() / values.var() ** 2 == pytest.approx(2.999, abs=6 * math.sqrt(24 / n))
    lags = [np.dot(values[:-lag], values[lag:]) / n for lag in (1, 2, 3, 4, 5, 8, 64, 1000, GRID)]
    others = [
        normal_table(1.0, FLOAT64)[draw_words(seed, name, 0, n)]
        for seed, name in [(1, "model.layers.0.mlp.up_proj.weight"), (0, "b")]
    ]
    assert max(map(abs, [*lags, *(np.dot(values, other) / n for other in others)])) < 5 / math.sqrt(n)


def test_draws_and_noise_in_one_block(tmp_path):
    """Each piece of a block is what it would be without the others, in any order."""
    (tmp_path / "in").mkdir()
    source = store(tmp_path / "in" / "a", np.ones((8, 8)), FLOAT32)[::2]  # noise is drawn for the rows between, too
    noise = Noise(0.5, 1.0, "shared", source.offset)
    pieces = [
        Normal(Box((0, 0), (2, 8)), 1.0),
        Copy(Box((2, 0), (4, 8)), source, noise=noise),
        Normal(Box((6, 0), (2, 8)), 2.0),
    ]
    found = []
    for number, order in enumerate(itertools.permutations(pieces)):
        plan = CheckpointPlan((TensorPlan("w", (8, 8), FLOAT32, order),), {})
        write_checkpoint(plan, tmp_path / str(number), WriteOptions())
        found.append(load(tmp_path / str(number))["w"])
    words = draw_words(0, "w", 0, 64).reshape(8, 8)
    np.testing.assert_array_equal(found[0][6:], normal_table(2.0, FLOAT32)[words[6:]])
    assert all(np.array_equal(other, found[0]) for other in found)


def test_draws_are_pinned():
    """The stream is a promise across versions of Python, numpy and this package."""
    assert draw_words(0, "weight", GRID, 6).tolist() == [42390, 15720, 33470, 15769, 57254, 19737]
    assert normal_table(0.02, BFLOAT16).view(np.uint16)[[0, 1, 1000, 32768, 65535]].tolist() == [
        48561,
        48551,
        48433,
        13517,
        15793,
    ]


def test_statistics_of_large_tensors_are_sampled_evenly(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5000, 1000)) * np.linspace(0.5, 1.5, 5000)[:, None]
    array = rows.astype(np.float32)
    view = store(tmp_path / "source", array, FLOAT32)
    with FileReader() as reader:
        assert measure(Statistic("std", "w", view, 2.0), reader) == pytest.approx(2 * array.std(), rel=3e-3)
        assert measure(Statistic("mean", "w", view[:100]), reader) == pytest.approx(
            array[:100].mean(dtype=np.float64), rel=1e-6
        )


def test_second_call_is_already_done_and_another_plan_is_refused(tmp_path):
    plan, out = mixed_plan(tmp_path), tmp_path / "out"
    assert not write_checkpoint(plan, out, WriteOptions()).already_done
    before = digest_of_files(out)
    assert write_checkpoint(plan, out, WriteOptions()).already_done
    other = CheckpointPlan(plan.tensors, plan.config, seed=8)
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors"):
        write_checkpoint(other, out, WriteOptions())
    assert digest_of_files(out) == before
    assert not write_checkpoint(other, out, WriteOptions(overwrite=True, max_shard_size="1KB")).already_done
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_garbage_collector_is_as_it_was(frozen, tmp_path, monkeypatch):
    """Also of somebody who has frozen something himself, and after an error."""
    plan, seen = mixed_plan(tmp_path), []
    options = WriteOptions(progress=lambda nbytes, total: seen.append(gc.get_freeze_count()))
    if frozen:
        gc.freeze()
    try:
        write_checkpoint(plan, tmp_path / "out", options)
        assert bool(gc.get_freeze_count()) == frozen  # some of what is frozen may have gone since
        monkeypatch.setattr(execute, "_written", lambda block, data: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_checkpoint(plan, tmp_path / "failed", WriteOptions())
        assert bool(gc.get_freeze_count()) == frozen
    finally:
        gc.unfreeze()
    assert max(seen) > 1000


def test_bad_plan_touches_nothing(tmp_path):
    plan = CheckpointPlan((TensorPlan("w", (4,), FLOAT32, ()),), {})
    with pytest.raises(PlanError):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard_size", ["5GB", "1KB"])
def test_failure_leaves_nothing_loadable(shard_size, tmp_path):
    plan = mixed_plan(tmp_path)
    os.truncate(tmp_path / "weight", 3000)
    with pytest.raises(CorruptData, match=r"weight: had 4816 bytes of .*, has 3000 of"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions(max_shard_size=shard_size))
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".safetensors", ".json")]


def test_source_folder_is_not_an_output(tmp_path):
    with pytest.raises(CheckpointError, match="is the source too"):
        write_checkpoint(mixed_plan(tmp_path), tmp_path, WriteOptions())


def test_two_runs_on_one_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    script = """if True:
        import fcntl, os, sys
        fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
        print("held", flush=True)
        input()
    """
    holder = subprocess.Popen([sys.executable, "-c", script, out], stdin=-1, stdout=-1, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="another run"):
        write_checkpoint(mixed_plan(tmp_path), out, WriteOptions())
    holder.communicate("\n")
    write_checkpoint(mixed_plan(tmp_path), out, WriteOptions())


def test_no_space_is_found_before_work(tmp_path):
    numel = 1 << 50
    plan = CheckpointPlan((TensorPlan("w", (numel,), FLOAT32, (Fill(Box((0,), (numel,))),)),), {})
    with pytest.raises(OSError, match=r"needs 4503599\.\d+ GB.*are free"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())


def test_shards_never_split_a_tensor_and_keep_their_order():
    tensors = [TensorPlan(f"t{i}", (n,), FLOAT32, (Fill(Box((0,), (n,))),)) for i, n in enumerate([10, 100, 10, 10, 5])]
    shards = safetensors_shards(tensors, 100)
    assert [[t.name for t, _ in shard.tensors] for shard in shards] == [["t0"], ["t1"], ["t2", "t3", "t4"]]
    assert [shard.filename for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), (1000, 1000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0", "GB"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="not a positive number of bytes"):
        parse_size(text)


def test_a_dry_run_foresees(tmp_path):
    """What would be met, without touching anything."""

    def told(plan: CheckpointPlan, out: Path, **options) -> str:
        written = WriteOptions(**options)
        return " ".join(foresee(make_job(plan, written), out, written).notes)

    plan, out = mixed_plan(tmp_path), tmp_path / "out"
    other = CheckpointPlan(plan.tensors, plan.config, seed=8)
    assert told(plan, out) == ""
    assert not out.exists()
    assert "is the source too" in told(plan, tmp_path)
    write_checkpoint(plan, out, WriteOptions())
    before = digest_of_files(out)
    assert "already done" in told(plan, out)
    assert "would be refused" in told(other, out)
    assert "would be removed" in told(other, out, overwrite=True)
    assert digest_of_files(out) == before
    large = CheckpointPlan((TensorPlan("w", (1 << 50,), FLOAT32, (Fill(Box((0,), (1 << 50,))),)),), {})
    assert "4,503,599.6 GB are needed" in told(large, tmp_path / "large")


def test_an_interrupted_run_is_foreseen(tmp_path):
    plan, out = mixed_plan(tmp_path), tmp_path / "out"
    data = (tmp_path / "weight").read_bytes()
    os.truncate(tmp_path / "weight", 3000)
    with pytest.raises(CorruptData):
        write_checkpoint(plan, out, WriteOptions())
    assert "would be resumed" in " ".join(foresee(make_job(plan, WriteOptions()), out, WriteOptions()).notes)
    (tmp_path / "weight").write_bytes(data)
    job = make_job(mixed_plan(tmp_path), WriteOptions())
    assert "has changed since" in " ".join(foresee(job, out, WriteOptions()).notes)


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32, FLOAT64], ids=str)
def test_what_is_not_finite_is_found(dtype, value, digest, small_blocks, tmp_path):
    largest = ml_dtypes.finfo(dtype.numpy).max
    array = np.full((5, 4), -largest, dtype.numpy)
    (tmp_path / "in").mkdir()
    options = WriteOptions(digest=digest, finite=True)
    plan = CheckpointPlan((TensorPlan.copy_of("fine", store(tmp_path / "in" / "a", array, dtype)),), {})
    write_checkpoint(plan, tmp_path / "fine", options)
    array[3, 2] = value
    plan = CheckpointPlan((TensorPlan.copy_of("broken", store(tmp_path / "in" / "b", array, dtype)),), {})
    with pytest.raises(CorruptData, match=rf"broken\[3, 2\] is NaN or infinite as {dtype}"):
        write_checkpoint(plan, tmp_path / "broken", options)
    assert load(tmp_path / "broken") == {}
    write_checkpoint(plan, tmp_path / "broken", WriteOptions(digest=digest))
    np.testing.assert_array_equal(load(tmp_path / "broken")["broken"].view("u1"), array.view("u1"))
