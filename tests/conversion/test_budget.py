# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Memory is a budget: what a process really takes, with many threads, against what was allowed and what was said."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conversion.checkpoint import normal_stream, scratch
from conversion.checkpoint.assemble import BLOCK, PREPASS_BYTES, Needs, blocks, resolve, stream
from conversion.checkpoint.budget import THREAD_BYTES, reading_threads, share_out
from conversion.checkpoint.bytes import identify
from conversion.checkpoint.containers import Layout
from conversion.checkpoint.dtypes import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, FLOAT64, Q8_0, DType
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import WriteOptions, execute, write_checkpoint
from conversion.checkpoint.gguf_layout import gguf_layout
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.normal_stream import GRID
from conversion.checkpoint.plan import (
    BlockQuantised,
    Box,
    CheckpointPlan,
    Copy,
    Dequantised,
    Fill,
    Noise,
    Normal,
    RowMean,
    RowQuantised,
    RowScales,
    Statistic,
    TensorPlan,
    View,
)
from conversion.checkpoint.reader import FileReader

pytestmark = pytest.mark.slow

MIB = 1 << 20
ROWS, WIDTH = 1024, 1536  # of a source; no power of two, so that rows lie across grid cells

SMALL_BLOCK = 1 << 17  # so that there is work for many threads; what they make at a time is less


def plans(
    folder: Path, rows: int = ROWS, width: int = WIDTH, values: np.ndarray | None = None
) -> dict[str, CheckpointPlan]:
    """What takes memory, each in several tensors, of sources that are holes unless given: reading them is quick."""
    source = folder / "source"
    with source.open("wb") as file:
        file.write(b"" if values is None else values.tobytes())
        file.truncate(rows * width * 8)
    shape = (rows, width)

    def view(dtype=BFLOAT16) -> View:
        return View.contiguous(identify(source), 0, shape, dtype)

    def plan(*tensors: TensorPlan) -> CheckpointPlan:
        named = tuple(replace(t, name=f"{k}-{n}") for k in range(3) for n, t in enumerate(tensors))
        return CheckpointPlan(named, {}, seed=1)

    def of(dtype, *pieces, layout=shape) -> TensorPlan:
        return TensorPlan("w", layout, dtype, pieces)

    box, half = Box.whole(shape), width // 2
    left, right = Box((0, 0), (rows, half)), Box((0, half), (rows, half))
    noises = [Noise(0.1, weight, "noise", 0) for weight in (1.0, -1.0)]
    halves = [Copy(at, view()[:, :half], 0.5, noise=noise) for at, noise in zip((left, right), noises, strict=True)]
    drawn = of(
        FLOAT32,
        Copy(left, view(FLOAT32)[:, :half]),
        Normal(right, Statistic("std", "source", view(FLOAT32), 0.0) * 0.0),
    )
    woven = [Copy(Box((0, half * n), (rows, half)), view()[:, n::2]) for n in (0, 1)]
    means = of(
        BFLOAT16,
        Copy(Box((0, 0), (rows // 2, width)), view(FLOAT32)[: rows // 2]),
        RowMean(Box((rows // 2, 0), (rows // 2, width)), view(FLOAT32)),
    )

    def quantised(dtype) -> TensorPlan:
        blocks = view(dtype)[:, : width // 32 * 32].unflatten(1, (width // 32, 32))
        return of(Q8_0, BlockQuantised(Box.whole(blocks.shape[:2]), blocks), layout=blocks.shape[:2])

    return {
        "casts": plan(of(FLOAT32, Copy(box, view())), of(BFLOAT16, Copy(box, view(FLOAT64)))),
        "factors": plan(of(FLOAT64, Copy(box, view(FLOAT32), 0.7)), of(FLOAT32, Copy(box, view(), 0.7))),
        "gathers": plan(of(BFLOAT16, *woven)),
        "transposed": plan(TensorPlan.copy_of("t", view().unflatten(0, (rows // 4, 4)).permute(1, 0, 2))),
        "draws": plan(of(FLOAT32, Normal(box, 0.02)), drawn),
        "noise": plan(of(FLOAT32, *halves), of(BFLOAT16, Normal(left, 0.5), halves[1])),
        "means": plan(means),
        "zeros": plan(of(FLOAT64, Fill(box))),
        "blocks": plan(*map(quantised, (BFLOAT16, FLOAT32, FLOAT64))),
        "quantises": plan(*_quantised(shape, view)),
    }


def files(name: str, plan: CheckpointPlan) -> Layout | None:
    """What the plan is written as: safetensors but for blocks, which it does not have."""
    return gguf_layout("model", {}, plan.tensors, 10**12) if name == "blocks" else None


def _quantised(shape: tuple[int, int], view: Callable[[DType], View]) -> list[TensorPlan]:
    """Rows of several dtypes as 8-bit floats, their scales, and 8-bit floats as numbers."""
    (rows, _), tensors = shape, []
    for dtype in (BFLOAT16, FLOAT32, FLOAT16):
        values = TensorPlan(f"of {dtype}", shape, dtype, (Copy(Box.whole(shape), view(FLOAT32), 0.5),))
        tensors.append(TensorPlan("w", shape, FLOAT8, (RowQuantised(Box.whole(shape), values),)))
        tensors.append(TensorPlan("w", (rows, 1), dtype, (RowScales(Box.whole((rows, 1)), values),)))
    source, scale = view(FLOAT8), view(FLOAT32)[:, :1]
    scale = View(scale.file, scale.offset, shape, (scale.strides[0], 0), FLOAT32)
    return [*tensors, TensorPlan("w", shape, BFLOAT16, (Dequantised(Box.whole(shape), source, scale),))]


def measure(name: str, folder: Path, workers: int, memory: str) -> dict[str, int]:
    """Write a plan in a process of its own: how large that was before and at most, and what it said of itself."""
    script = f"""if True:
        import json
        from pathlib import Path
        from conversion.checkpoint.execute import WriteOptions, peak_memory, write_checkpoint
        from conversion.checkpoint.limits import high_water
        from conversion.checkpoint import assemble
        from tests.conversion.test_budget import files, plans
        assemble.BLOCK = {SMALL_BLOCK if workers > 2 else BLOCK}
        plan = plans(Path({str(folder)!r}))[{name!r}]
        options = WriteOptions(workers={workers}, memory={memory!r}, finite=True)
        said, before = peak_memory(plan, options), high_water()
        write_checkpoint(plan, Path({str(folder)!r}) / "out", options, files({name!r}, plan))
        print(json.dumps(dict(before=before, peak=high_water(), said=said)))
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PLANS = ["casts", "factors", "gathers", "transposed", "draws", "noise", "means", "zeros", "quantises", "blocks"]


@pytest.mark.parametrize(("workers", "memory"), [(2, "256MB"), (32, "64MB"), (128, "64MB")])
@pytest.mark.parametrize(
    "name", ["casts", "factors", "gathers", "transposed", "draws", "noise", "means", "zeros", "quantises", "blocks"]
)
def test_a_process_stays_within_its_budget(name, workers, memory, tmp_path):
    found = measure(name, tmp_path, workers, memory)
    assert found["peak"] <= found["said"]
    assert found["peak"] <= found["before"] + int(memory.removesuffix("MB")) * 10**6


@pytest.mark.parametrize("name", ["casts", "factors", "gathers", "draws", "noise", "means", "quantises", "blocks"])
def test_a_budget_does_not_change_a_byte(name, tmp_path):
    values = np.random.default_rng(0).standard_normal(1100 * 1030 * 2).astype("<f4")
    plan = plans(tmp_path, 1100, 1030, values)[name]
    if name == "blocks":  # these values as bfloat16 are anything
        plan = replace(plan, tensors=tuple(t for t in plan.tensors if t.pieces[0].source.dtype == FLOAT32))
    digests = []
    for memory, workers in (("1GB", 1), ("1GB", 7), ("64MB", 40)):
        out = tmp_path / f"{memory}-{workers}"
        options = WriteOptions(workers=workers, memory=memory, allow_nonfinite=True)
        write_checkpoint(plan, out, options, files(name, plan))
        digests.append(json.loads((out / MANIFEST).read_bytes())["tensors"])
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("stretch", [1 << 16, 1 << 18, GRID])
@pytest.mark.parametrize("name", [name for name in PLANS if name != "zeros"])
def test_what_a_thread_holds_is_what_it_was_charged_for(name, stretch, tmp_path):
    """Array by array, each tensor in a thread of its own."""
    plan = plans(tmp_path)[name]

    def hold(tensor: TensorPlan) -> int:
        for start, stop in blocks(tensor.numel):
            for _ in stream(tensor, start, stop, reader=reader, resolved=resolved, seed=1, stretch=stretch):
                pass
        kept = sum(array.nbytes for array in vars(scratch._arrays).values())
        return kept + len(vars(normal_stream._kept).get("cells", ())) * GRID * 2

    with FileReader() as reader:
        for tensor in plan.tensors[: len(plan.tensors) // 3]:
            resolved = resolve([tensor], reader, 1)  # of scales, none were found with their rows
            with ThreadPoolExecutor(1) as pool:
                held = pool.submit(hold, tensor).result()
            assert 0 < held <= Needs.of(tensor).nbytes(stretch)


def test_less_at_a_time_before_fewer_threads():
    tensor = TensorPlan("w", (1 << 16, 1 << 14), BFLOAT16, (Normal(Box.whole((1 << 16, 1 << 14)), 1.0),))
    shares = [share_out([tensor], workers, 256 * 10**6) for workers in (1, 16, 32, 128, 1000)]
    assert [share.workers for share in shares[:2]] == [1, 16]
    assert shares[0].stretch == GRID
    assert shares[-1].stretch == 1 << 16
    assert shares[-1].workers == shares[-2].workers < 128
    assert all(share.nbytes <= 256 * 10**6 for share in shares)


def test_no_more_threads_than_blocks():
    tensor = TensorPlan("w", (2 * BLOCK + 1,), BFLOAT16, (Fill(Box((0,), (2 * BLOCK + 1,))),))
    assert share_out([tensor], 128, 256 * 10**6).workers == 3
    assert share_out([], 128, 256 * 10**6).workers == 1


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("name", ["casts", "means"])
def test_too_small_a_budget(name, dry_run, tmp_path):
    """Refused with the least that works, which works."""
    plan = plans(tmp_path, 64, 64)[name]
    refusal = r"^--memory is 2 MB, less than one thread takes here; the least that works is \d+MB\.$"
    with pytest.raises(CheckpointError, match=refusal) as error:
        execute(plan, tmp_path / "out", WriteOptions(memory="2MB"), dry_run=dry_run)
    assert not (tmp_path / "out").exists()
    least = str(error.value).split()[-1].rstrip(".")
    execute(plan, tmp_path / "out", WriteOptions(memory=least))
    with pytest.raises(CheckpointError, match="the least that works"):
        share_out(plan.tensors, 1, int(least.removesuffix("MB")) * 10**6 - 10**6)


@pytest.mark.parametrize("memory", ["", "-1GB", "lots", 0])
def test_no_size(memory, tmp_path):
    with pytest.raises(ValueError, match="not a positive number of bytes"):
        write_checkpoint(plans(tmp_path, 4, 4)["zeros"], tmp_path / "out", WriteOptions(memory=memory))


def test_reading():
    assert reading_threads(128, 256 * 10**6) == 128
    assert reading_threads(128, 10**7) == 10**7 // (THREAD_BYTES + MIB // 2)
    with pytest.raises(CheckpointError, match="the least that works is 2MB"):
        reading_threads(1, 10**6)
    assert PREPASS_BYTES < 4 * MIB
