# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Log-likelihoods by a model that is larger than memory: all passages through one layer, then through the next.

No layer is loaded either: its weights go by in blocks of rows (`streamed_model.py`), once for each group of passages,
and between two layers the groups are on disk (`hidden_states.py`). What is in memory is one group and a few blocks.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from conversion.architecture import Architecture, rope_parameters, trained_length
from conversion.checkpoint.dtypes import parse_dtype
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.manifest import package_version
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sizes import format_bytes
from conversion.checkpoint.sources import Source

from .held_files import HeldFiles, require_digests
from .hidden_states import HiddenStates, check_space
from .passages import Passage, digest_of, pack
from .rotary import OF_TRAINED_LENGTH
from .streamed_model import BLOCK, StreamedModel, block_rows

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def score_streamed(
    checkpoint: Source,
    passages: Sequence[Passage],
    *,
    dtype: str = "float32",
    memory: int = 4 * 10**9,
    work: Path | None = None,
    workers: int = default_workers(),
    digests: dict[str, str] | None = None,
    keep: Callable[[list[np.ndarray]], None] = lambda scores: None,
    progress: Progress,
    notify: Callable[[str], None] = lambda note: None,
) -> list[np.ndarray]:
    """Log-likelihoods of the predicted tokens of passages, layer by layer from the files.

    A run that was killed goes on where it was, by the same call. Of all weights that are read the digests are kept with
    the states; those of layers that an earlier run computed are compared with the files before anything goes on. So
    all numbers are of one model, or there are none.

    Args:
        checkpoint: the model, open.
        passages: with ids of its vocabulary.
        dtype: what is computed in: `float64`, `float32`, or `bfloat16` (float32 with results rounded to it).
        memory: bytes that the computation may take, see `memory_need`.
        work: folder for what lies between two layers; one of the user's cache that is this computation's own unless
            given. It goes when all is computed.
        workers: threads that read ahead.
        digests: is given the digest of every tensor that was computed with, by its name, see
            `conversion.model_identity.TensorDigest`.
        keep: called with the result, before the states are removed; they stay if it raises anything.
        progress: makes a progress display, see `teleflm.terminal.byte_progress`.
        notify: told what will be read, and where a run goes on.

    Returns:
        Natural logarithms, float64 [scored] for each passage.

    Raises:
        CheckpointError: the memory is too little for a passage, the disk for the states; or the weights are not those
            of the configuration, or give no finite number.
        CorruptData: the weights were changed meanwhile, or since the run that is gone on with.
    """
    held = HeldFiles.of(checkpoint)
    architecture = Architecture.from_config(checkpoint.config or {}, f"{checkpoint.folder}/config.json")
    longest = max(len(passage.inputs) for passage in passages)
    groups = pack(passages, group_tokens(architecture, longest, dtype, memory))
    job = _job(checkpoint, architecture, passages, groups, dtype)
    folder = work or default_work(job)
    precision = np.dtype(np.float64 if dtype == "float64" else np.float32)
    row = architecture.hidden_size * precision.itemsize
    sizes = [row * sum(len(passages[number].inputs) for number in group) for group in groups]
    score_sizes = [8 * sum(passages[number].scored for number in group) for group in groups]
    layers = architecture.num_hidden_layers
    disk = min(layers - 1, 2) * sum(sizes) + sum(score_sizes)
    check_space(folder, disk)
    with (
        FileReader() as reader,
        ThreadPoolExecutor(workers) as pool,
        HiddenStates(folder, job, sizes, score_sizes, layers) as states,
    ):
        model = StreamedModel(checkpoint, parse_dtype(dtype), reader, pool)
        total, done = _bytes_to_read(model, states, len(groups))
        tokens = sum(len(passage.inputs) for passage in passages)
        need = memory_need(architecture, tokens, longest, dtype, memory)
        goes_on = f", from layer {states.next_layer + 1} on, where it was interrupted" if done else ""
        times = f"{len(groups)} group{'s' * (len(groups) > 1)}"
        notify(
            f"{tokens:,} tokens in {dtype}, layer by layer of {layers}{goes_on}: {format_bytes(total - done)} to read "
            f"in {times}, {format_bytes(need)} of memory, {format_bytes(disk)} of disk in {folder}."
        )
        if states.next_layer:
            since = f"since these were computed. Remove {folder}, and run this again"
            with progress("comparing the weights of the layers that are done") as advance:
                require_digests(checkpoint, _digests(states), since, advance)
        with progress("computing") as advance:
            model.progress = lambda nbytes: advance(nbytes, total - done)
            _run(model, states, passages, groups)
        read = _digests(states)
        with progress("comparing the weights") as advance:
            held.require_same(read, advance)
        if digests is not None:
            digests |= read
        of_groups = [states.read(layers, number, np.dtype(np.float64)) for number in range(len(groups))]
        scores = _by_passage(of_groups, passages, groups)
        keep(scores)
        states.remove()
    return scores


def memory_need(architecture: Architecture, tokens: int, longest: int, dtype: str, memory: int) -> int:
    """Bytes that a computation takes at most, beside the program itself, which has some 100 MB.

    Args:
        architecture: of the model.
        tokens: of all passages.
        longest: passage.
        dtype: what is computed in.
        memory: that it may take.
    """
    fixed, token = _costs(architecture, longest, dtype)
    return fixed + token * max(longest, min(tokens, (memory - fixed) // token))


def group_tokens(architecture: Architecture, longest: int, dtype: str, memory: int) -> int:
    """How many tokens are computed at a time.

    Raises:
        CheckpointError: the memory is too little for the longest passage.
    """
    fixed, token = _costs(architecture, longest, dtype)
    if fixed + token * longest > memory:
        raise CheckpointError(
            f"--memory is {format_bytes(memory)}, and one passage of {longest} tokens takes "
            f"{format_bytes(fixed + token * longest)} in {dtype}; give that, or a shorter --window."
        )
    return (memory - fixed) // token


def _costs(architecture: Architecture, longest: int, dtype: str) -> tuple[int, int]:
    """Bytes that it takes whatever is computed, and for each token that is computed at a time.

    The largest that is there at one moment, counted in the code of `streamed_model.py` and measured.
    """
    number = 8 if dtype == "float64" else 4
    rounded = 3 if dtype == "bfloat16" else 2  # halves: what is rounded is there twice for a moment
    row = max(architecture.hidden_size, architecture.intermediate_size)
    blocks = 3 * max(BLOCK, row) * (number + 4)  # one is used, two are read
    attention = 2 * rounded * longest**2 * number + longest**2
    head = 3 * 8 * BLOCK
    query = architecture.num_attention_heads * architecture.head_dim
    key = architecture.num_key_value_heads * architecture.head_dim
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    token = max(4 * hidden + 4 * inner, 2 * hidden + 6 * query + 2 * key) * number * rounded // 2
    return blocks + max(attention, head), token


def default_work(job: dict[str, Any]) -> Path:
    """A folder of the user's cache that is this computation's own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "teleflm" / f"eval-{job['passages'][:8]}-{job['digest'][:16]}"


def _job(
    checkpoint: Source, architecture: Architecture, passages: Sequence[Passage], groups: Sequence[range], dtype: str
) -> dict[str, Any]:
    config = checkpoint.config or {}
    rope = rope_parameters(config)
    if rope["rope_type"] in OF_TRAINED_LENGTH:  # which may be a field beside it
        rope["trained_length"] = trained_length(config)
    job = {
        "weights": sorted([os.path.basename(file.name), file.identity] for file in checkpoint.files),
        "architecture": {**asdict(architecture), "rope_parameters": rope},
        "dtype": dtype,
        "passages": digest_of(passages),
        "groups": len(groups),
        "version": package_version(),
    }
    return {**job, "digest": hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()}


def _bytes_to_read(model: StreamedModel, states: HiddenStates, groups: int) -> tuple[int, int]:
    """Bytes of weights that all of it reads, and those of what is done."""
    layers = states.layers
    done = sum(
        model.layer_nbytes
        + (model.embedding_nbytes if layer == 0 else 0)
        + (model.head_nbytes if layer == layers - 1 else 0)
        for layer in range(layers)
        for group in range(groups)
        if layer < states.next_layer or states.has(layer + 1, group)
    )
    return groups * (model.embedding_nbytes + layers * model.layer_nbytes + model.head_nbytes), done


def _digests(states: HiddenStates) -> dict[str, str]:
    """Of the weights of all states that are whole, by their names."""
    found: dict[str, str] = {}
    for state in range(1, states.next_layer + 1):
        for name, digest in states.weights.get(state, {}).items():
            if found.setdefault(name, digest) != digest:  # the embedding, where it is the head too
                raise CorruptData(
                    f"{name} has other values than when it was read first: the model was changed meanwhile. Remove "
                    f"{states.folder}, and run this again."
                )
    return found


def _run(model: StreamedModel, states: HiddenStates, passages: Sequence[Passage], groups: Sequence[range]) -> None:
    width = model.architecture.hidden_size
    for layer in range(states.next_layer, states.layers):
        for number, group in enumerate(groups):
            if states.has(layer + 1, number):
                continue
            members = [passages[index] for index in group]
            if layer == 0:
                hidden = model.embed(np.concatenate([passage.inputs for passage in members]), whole=True)
            else:
                hidden = states.read(layer, number, model.precision.compute).reshape(-1, width)
            hidden = model.layer(layer, hidden, [len(passage.inputs) for passage in members])
            made = _scores(model, hidden, members) if layer == states.layers - 1 else hidden
            states.write(layer + 1, number, made, model.take_digests())


def _scores(model: StreamedModel, hidden: np.ndarray, members: Sequence[Passage]) -> np.ndarray:
    """Log-likelihoods [predicted tokens of all members], float64, from the last hidden states of all their inputs."""
    ends = np.cumsum([len(passage.inputs) for passage in members])
    rows = np.concatenate([np.arange(end - p.scored, end) for end, p in zip(ends, members, strict=True)])
    targets = np.concatenate([passage.targets for passage in members])
    step = min(block_rows(model.architecture.hidden_size), max(1, BLOCK // len(targets)))
    # Of the logits seen so far: the largest, the sum of exp(logit - largest), and that of the target.
    largest, total, picked = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.full(len(rows), np.nan)
    for number, block in enumerate(model.logits(hidden[rows], step)):
        logits = block.astype(np.float64)
        before, largest = largest, np.maximum(largest, logits.max(1))
        here = np.flatnonzero((targets >= number * step) & (targets < number * step + logits.shape[1]))
        picked[here] = logits[here, targets[here] - number * step]
        logits -= largest[:, None]
        total = total * np.exp(before - largest) + np.exp(logits, out=logits).sum(1)
    return require_finite(picked - largest - np.log(total))


def require_finite(scores: np.ndarray) -> np.ndarray:
    """Log-likelihoods, if all are finite.

    Raises:
        CheckpointError: one is not.
    """
    if not np.isfinite(scores).all():
        raise CheckpointError(
            "the model gives a token no finite log-likelihood: its weights hold NaN or infinity, or the --dtype has "
            "too small a range; teleflm inspect --check looks at the weights."
        )
    return scores


def _by_passage(scores: Sequence[np.ndarray], passages: Sequence[Passage], groups: Sequence[range]) -> list[np.ndarray]:
    result = []
    for values, group in zip(scores, groups, strict=True):
        result += np.split(values, np.cumsum([passages[index].scored for index in group])[:-1])
    return result


__all__ = ["Progress", "default_work", "group_tokens", "memory_need", "require_finite", "score_streamed"]
