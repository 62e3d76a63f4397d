# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Proof from numbers: the logits of two checkpoints beside each other, and beside what rounding alone does."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from conversion.checkpoint.dtypes import DType, parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sizes import format_bytes
from conversion.checkpoint.sources import Source
from conversion.compressed_tensors import is_float8
from conversion.experts import decoder_architecture, has_experts
from evaluation.logit_comparison import LogitComparer, LogitComparison
from evaluation.streamed_model import StreamedModel, available_memory, block_rows

from .conditions import LayerSource, compose_layers, growth_steps

Forward: TypeAlias = Literal["auto", "loaded", "streamed"]
Progress: TypeAlias = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
COMPUTE_DTYPES = ("float64", "float32", "bfloat16")

_EXACT = 1e-12  # of the largest logit: what is left in float64, where nothing is rounded but the sums
_RMS_FLOORS, _MAX_FLOORS = 2.0, 4.0  # two independent roundings give sqrt(2); the largest of many varies more
_MEMORY_SHARE = 0.8  # of what is free may be taken


@dataclass(frozen=True)
class LayerDrift:
    """A layer of B beside the layer of A that it comes from; everything relative to A's residual stream.

    Args:
        layer: its number in B.
        source: the layer of A.
        is_copy: whether it is an additional copy, which is to move nothing.
        difference: root mean square difference between the streams after it, on A's features.
        floor: the same between A and A in the coarser arithmetic.
        distance: 1 - cos between A's stream before and after the layer, mean over tokens; None for a copy.
    """

    layer: int
    source: int
    is_copy: bool
    difference: float
    floor: float
    distance: float | None


@dataclass(frozen=True)
class Numbers:
    """What two models compute on the same tokens.

    Args:
        forward: `loaded` (transformers' Llama) or `streamed` (from the files, block by block).
        dtype: what was computed in.
        seconds: that it took.
        difference: B's logits beside A's.
        floor: A's own logits in `floor_dtypes[0]` beside those in `floor_dtypes[1]`: what rounding alone does.
        floor_dtypes: the coarser and the finer arithmetic of the floor.
        exact: whether weights and arithmetic are float64, so that only the order of sums may differ.
        layers: the streams after each layer; empty unless streamed, and B's layers are known to be A's.
    """

    forward: str
    dtype: str
    seconds: float
    difference: LogitComparison
    floor: LogitComparison
    floor_dtypes: tuple[str, str]
    exact: bool
    layers: tuple[LayerDrift, ...] = ()

    @property
    def within_rounding(self) -> bool:
        """Whether rounding explains the difference: twice that of A's in the mean, four times at the largest."""
        if self.exact:
            return self.difference.relative <= _EXACT
        return self.rms_ratio <= _RMS_FLOORS and self.max_ratio <= _MAX_FLOORS

    @property
    def rms_ratio(self) -> float:
        """Root mean square difference in units of the floor's."""
        return _ratio(self.difference.rms_difference, self.floor.rms_difference)

    @property
    def max_ratio(self) -> float:
        """Largest difference in units of the floor's."""
        return _ratio(self.difference.max_difference, self.floor.max_difference)

    @property
    def rounding(self) -> str:
        """The coarsest arithmetic that was in play, of the weights or of the computation."""
        return "float64" if self.exact else self.floor_dtypes[0]

    @property
    def blind_to(self) -> float:
        """Errors of the logits up to this root mean square cannot be told from rounding on these tokens."""
        return _EXACT * self.difference.max_logit if self.exact else _RMS_FLOORS * self.floor.rms_difference

    @property
    def reason(self) -> str:
        """What `within_rounding` rests on, a sentence."""
        if self.exact:
            limit = f"weights and arithmetic are float64, which allows {_EXACT:g}"
            return f"The largest difference is {self.difference.relative:.2g} of the largest logit; {limit}."
        return (
            f"The difference's root mean square is {self.rms_ratio:.3g} times that of rounding A to "
            f"{self.floor_dtypes[0]} (at most {_RMS_FLOORS:g}), its largest {self.max_ratio:.3g} times "
            f"(at most {_MAX_FLOORS:g})."
        )

    @property
    def distance(self) -> str:
        """How far B is from A on these tokens, a sentence."""
        apart, losses = self.difference, self.difference.losses
        told = f", and B's loss {losses[1]:.4g} where A's is {losses[0]:.4g}" if losses else ""
        return (
            f"On {apart.tokens} tokens B's distribution is {apart.divergence:.3g} nats a token from A's (KL "
            f"divergence), its first choice A's at {apart.same_argmax:.1%}{told}."
        )


def _ratio(value: float, floor: float) -> float:
    return value / floor if floor else 0.0 if value == 0 else float("inf")


def no_progress(what: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress display that shows nothing."""
    return nullcontext(lambda nbytes, total: None)


def compare_numbers(
    a: Source,
    b: Source,
    input_ids: np.ndarray,
    *,
    dtype: str = "float64",
    forward: Forward = "auto",
    workers: int = default_workers(),
    progress: Progress = no_progress,
    notify: Callable[[str], None] = lambda note: None,
) -> Numbers:
    """Compare the logits of two checkpoints, and those of the first in two precisions.

    Args:
        a: the source, open.
        b: what was made from it.
        input_ids: token ids [T].
        dtype, forward, workers, progress, notify: as of `verify_checkpoints`.
    """
    coarse, fine, exact = _floor(dtype, [view.dtype for source in (a, b) for view in source.tensors.values()])
    need = _memory_need(a, b, len(input_ids), "float64" if "float64" in (dtype, fine) else "float32")
    free = available_memory()
    if any(is_float8(source.config) for source in (a, b)):  # transformers would need another package for it
        if forward == "loaded":
            raise CheckpointError("--forward loaded takes no quantised model; streamed multiplies weights by scales.")
        forward = "streamed"
    if any(has_experts(source.config) for source in (a, b)):  # transformers rounds gates to float32 in float64 too
        if forward == "loaded":
            raise CheckpointError("--forward loaded takes no experts; streamed computes them one after the other.")
        forward = "streamed"
    if forward == "auto":
        forward = "loaded" if need <= _MEMORY_SHARE * free and find_spec("torch") else "streamed"
    begin = time.perf_counter()
    if forward == "loaded":
        note = f"{len(input_ids)} tokens in {dtype}, models loaded one after the other"
        notify(f"{note}: {format_bytes(need)} of memory, {format_bytes(free)} free.")
        results = _compare_loaded(a, b, input_ids, dtype, (coarse, fine))
    else:
        results = _compare_streamed(a, b, input_ids, dtype, (coarse, fine), workers, progress, notify)
    difference, floor, layers = results
    return Numbers(forward, dtype, time.perf_counter() - begin, difference, floor, (coarse, fine), exact, layers)


def _floor(dtype: str, stored: Sequence[DType]) -> tuple[str, str, bool]:
    """The two precisions whose difference is the rounding to expect, and whether none is to be expected.

    The coarser is that of the arithmetic or of the weights, whatever rounds more: bfloat16 weights that a growth
    multiplied are rounded, however finely one computes with them.
    """
    # float16 has the range of none of the others: activations that fit those may overflow it.
    names = {dtype, *("bfloat16" if kind.itemsize <= 2 else kind.name for kind in stored)}
    coarse = max((name for name in names if name in COMPUTE_DTYPES), key=COMPUTE_DTYPES.index)
    if coarse == "float64":
        return "float32", "float64", True
    return coarse, "float64" if dtype == coarse else dtype, False


def _compare_loaded(
    a: Source, b: Source, input_ids: np.ndarray, dtype: str, floor: tuple[str, str]
) -> tuple[LogitComparison, LogitComparison, tuple[LayerDrift, ...]]:
    from evaluation.logits import checkpoint_logits

    logits = {name: checkpoint_logits(a, input_ids, name) for name in {dtype, *floor}}
    pairs = ((logits[dtype], checkpoint_logits(b, input_ids, dtype)), (logits[floor[1]], logits[floor[0]]))
    results = []
    for first, second in pairs:
        comparer, width = LogitComparer(len(input_ids), input_ids[1:]), min(first.shape[1], second.shape[1])
        comparer.add(0, first[:, :width], second[:, :width])
        results.append(comparer.result())
    return results[0], results[1], ()


def _compare_streamed(
    a: Source,
    b: Source,
    input_ids: np.ndarray,
    dtype: str,
    floor: tuple[str, str],
    workers: int,
    progress: Progress,
    notify: Callable[[str], None],
) -> tuple[LogitComparison, LogitComparison, tuple[LayerDrift, ...]]:
    """Run A, B, and A in another precision side by side."""
    other = floor[1] if dtype == floor[0] else floor[0]
    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        models = [
            StreamedModel(source, parse_dtype(name), reader, pool)
            for source, name in ((a, dtype), (b, dtype), (a, other))
        ]
        total = sum(model.nbytes for model in models)
        duration = _duration(models[1].seconds_a_byte(len(input_ids)) * total)
        notify(f"{len(input_ids)} tokens in {dtype}, layer by layer: {format_bytes(total)} to read, about {duration}.")
        with progress("computing") as advance:
            for model in models:
                model.progress = lambda nbytes: advance(nbytes, total)
            states, layers = _run_layers(models, input_ids, _layer_map(a, b))
            difference, rounding = _compare_heads(models, states, input_ids[1:], other_is_coarser=other == floor[0])
    return difference, rounding, layers


def _run_layers(
    models: Sequence[StreamedModel], input_ids: np.ndarray, layer_map: Sequence[LayerSource] | None
) -> tuple[list[np.ndarray], tuple[LayerDrift, ...]]:
    """The last hidden states of A, B and A; while B runs a copy of a layer, A waits."""
    streams = [model.hidden_states(input_ids) for model in models]
    if layer_map is None:
        return [_last(stream) for stream in streams], ()
    states, layers = [next(stream) for stream in streams], []
    for layer, origin in enumerate(layer_map):
        before = states[0]
        runs = (not origin.is_copy, True, not origin.is_copy)
        states = [next(stream) if run else state for run, stream, state in zip(runs, streams, states, strict=True)]
        layers.append(_drift(layer, origin, before, *states))
    return states, tuple(layers)


def _compare_heads(
    models: Sequence[StreamedModel], states: Sequence[np.ndarray], targets: np.ndarray, *, other_is_coarser: bool
) -> tuple[LogitComparison, LogitComparison]:
    """B's logits beside A's, and A's in the coarser precision beside those in the finer."""
    tokens, rows = len(states[0]), min(block_rows(model.architecture.hidden_size) for model in models)
    difference, rounding = LogitComparer(tokens, targets), LogitComparer(tokens, targets)
    blocks = [model.logits(state, rows) for model, state in zip(models, states, strict=True)]
    for block, (first, second, other) in enumerate(zip(*blocks, strict=False)):
        width = min(first.shape[1], second.shape[1])
        difference.add(block * rows, first[:, :width], second[:, :width])
        rounding.add(block * rows, *((first, other) if other_is_coarser else (other, first)))
    return difference.result(), rounding.result()


def _drift(
    layer: int, origin: LayerSource, before: np.ndarray, after: np.ndarray, grown: np.ndarray, rounded: np.ndarray
) -> LayerDrift:
    scale = np.sqrt(np.square(after, dtype=np.float64).mean())
    difference, floor = (
        float(np.sqrt(np.square(stream[:, : after.shape[1]].astype(np.float64) - after).mean()) / scale)
        for stream in (grown, rounded)
    )
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    distance = None if origin.is_copy else float(1 - ((before * after).sum(1) / norms).mean())
    return LayerDrift(layer, origin.layer, origin.is_copy, difference, floor, distance)


def _last(states: Iterator[np.ndarray]) -> np.ndarray:
    for state in states:
        last = state
    return last


def _layer_map(a: Source, b: Source) -> tuple[LayerSource, ...] | None:
    """Where B's layers come from, None if that is not known: the logits can be compared all the same."""
    manifest = read_manifest(Path(b.folder))
    source, target = (decoder_architecture(checkpoint.config or {}) for checkpoint in (a, b))
    if target.hidden_size < source.hidden_size:
        return None
    try:
        steps = growth_steps(source, target, manifest["lineage"] if manifest else None)
        return compose_layers([step.layers for step in steps])
    except CheckpointError:
        return None


def _memory_need(a: Source, b: Source, tokens: int, dtype: str) -> int:
    """Bytes to load the larger model in a dtype, and to hold the logits of all runs."""
    elements = [sum(view.numel for view in source.tensors.values()) for source in (a, b)]
    vocabulary = max(int((source.config or {}).get("vocab_size", 0)) for source in (a, b))
    return max(elements) * parse_dtype(dtype).itemsize + 6 * 8 * tokens * vocabulary


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
