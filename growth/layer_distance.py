# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How far each layer moves its input, measured on text: the layers that move it least are the ones to copy.

The weights are streamed row block by row block, so a model that does not fit in memory is measured as well.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import Source
from evaluation.streamed_model import StreamedModel
from evaluation.text import encode_beginning
from evaluation.vocabulary import open_vocabulary

MAX_TOKENS = 1024
_MIN_TOKENS = 16


@dataclass(frozen=True)
class LayerDistance:
    """How far a layer moves its input, on average over the tokens.

    Args:
        layer: its number.
        cosine: 1 - cos(input, output): 0 if the direction stays.
        relative: |output - input| / |input|: 0 if nothing is added.
    """

    layer: int
    cosine: float
    relative: float


def read_calibration(path: str | Path, folder: str | Path, max_tokens: int = MAX_TOKENS) -> np.ndarray:
    """The first tokens of a text file, by the tokenizer of a checkpoint's folder.

    Returns:
        Token ids [tokens], at most `max_tokens`.

    Raises:
        CheckpointError: the file or the tokenizer cannot be read, or the text is too short to say anything.
    """
    ids = encode_beginning(open_vocabulary(Path(folder)), Path(path), max_tokens)
    if len(ids) < _MIN_TOKENS:
        raise CheckpointError(f"{path}: calibration text has {len(ids)} tokens, at least {_MIN_TOKENS} are needed.")
    return np.array(ids)


def measure_layer_distances(checkpoint: Source, input_ids: np.ndarray, workers: int = 2) -> list[LayerDistance]:
    """Run a checkpoint on one sequence in float32 and measure each of its layers.

    Args:
        checkpoint: the checkpoint, open.
        input_ids: token ids [tokens].
        workers: threads that read ahead.

    Raises:
        CheckpointError: the checkpoint cannot be computed.
    """
    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        states = StreamedModel(checkpoint, FLOAT32, reader, pool).hidden_states(input_ids)
        return [_distance(layer, before, after) for layer, (before, after) in enumerate(pairwise(states))]


def _distance(layer: int, before: np.ndarray, after: np.ndarray) -> LayerDistance:
    x, y = before.astype(np.float64), after.astype(np.float64)
    sizes = np.linalg.norm(x, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (x * y).sum(-1) / (sizes * np.linalg.norm(y, axis=-1))
        moved = np.linalg.norm(y - x, axis=-1) / sizes
    if not (np.isfinite(cosines).all() and np.isfinite(moved).all()):
        raise CheckpointError(f"layer {layer}: its input or output is zero or not finite on the calibration text.")
    return LayerDistance(layer, float(1 - cosines.mean()), float(moved.mean()))


def nearest_layers(distances: Sequence[LayerDistance], count: int) -> list[int]:
    """The `count` layers to copy: those that turn their input least, and none a second time before all were taken."""
    ranked = sorted(distances, key=lambda distance: (distance.cosine, distance.layer))
    return sorted(ranked[i % len(ranked)].layer for i in range(count))
