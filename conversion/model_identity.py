# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What tells the model that was measured from any other: digests of its weights, its numbers, its tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .architecture import MODEL_TYPE, Architecture, rope_parameters
from .checkpoint.assemble import BLOCK
from .checkpoint.limits import default_workers
from .checkpoint.manifest import block_digest, tensor_digest
from .checkpoint.plan import View
from .checkpoint.reader import FileReader
from .checkpoint.sources import Source
from .family import is_llama

_SPREAD = "spread:"  # before a digest of rows all over each tensor; older ones are of the first row alone
_ROWS = 16
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_WORDS = {"weights": "other weights", "config": "another config.json", "tokenizer": "another tokenizer"}
# Of a config.json that is not a Tele-FLM's, what decides nothing of what is computed.
_NAMES = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")


@dataclass(frozen=True)
class ModelIdentity:
    """Digests, sha256, of all that decides what a model says of a text.

    Args:
        weights: of names, dtypes, shapes and values of all tensors, however they are spread over files.
        config: of the numbers of the configuration.
        tokenizer: of the tokenizer's file; None if there is none.
    """

    weights: str
    config: str
    tokenizer: str | None

    def difference(self, other: "ModelIdentity") -> str | None:
        """What of another model is not as it is here, in words; None if nothing is."""
        mine, others = asdict(self), asdict(other)
        return next((_WORDS[name] for name in mine if mine[name] != others[name]), None)


def model_identity(
    source: Source,
    *,
    record: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
    workers: int = default_workers(),
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> ModelIdentity:
    """The identity of a checkpoint, of which every tensor is read.

    Args:
        source: the checkpoint, open.
        record: of its folder, whose digests are taken where it has some for all tensors, and nothing is read. That they
            are those of the weights is for the caller to know.
        known: digests of tensors by name, as `TensorDigest` takes them, that the caller has read; these are not read.
        workers: threads.
        progress: called with the bytes just read and those in all.

    Raises:
        CheckpointError: it cannot be read.
    """
    digests = _recorded(source, record or {}) or dict(known or {})
    unknown = {name: view for name, view in source.tensors.items() if name not in digests}
    digests |= tensor_digests(unknown, workers=workers, progress=progress)
    digest = hashlib.sha256()
    for name, view in sorted(source.tensors.items()):
        digest.update(json.dumps([name, view.dtype.name, list(view.shape), digests[name]]).encode() + b"\n")
    tokenizer = _tokenizer_digest(source.folder, _TOKENIZERS[::-1] if is_llama(source.config) else _TOKENIZERS)
    return ModelIdentity(digest.hexdigest(), _config_digest(source.config or {}), tokenizer)


def tensor_digests(
    tensors: Mapping[str, View],
    *,
    workers: int = default_workers(),
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> dict[str, str]:
    """The digest of each of some tensors, all of which are read.

    Args:
        tensors: windows of files, by name.
        workers: threads.
        progress: called with the bytes just read and those in all.

    Raises:
        CheckpointError: one cannot be read.
    """
    total = sum(view.nbytes for view in tensors.values())
    with FileReader() as reader, ThreadPoolExecutor(workers) as pool:
        hashed = pool.map(
            lambda view: tensor_digest(_blocks(view, reader, lambda nbytes: progress(nbytes, total))), tensors.values()
        )
        return dict(zip(tensors, hashed, strict=True))


class TensorDigest:
    """The digest of a tensor whose values come in order, in parts of any size, as somebody reads them.

    It is that of `tensor_digests`, and of the records: blocks of `BLOCK` elements, each with a digest.
    """

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._hash, self._size = xxhash.xxh3_128(), 0  # of the block that is not whole yet

    def update(self, values: np.ndarray) -> None:
        """Take the next values, in the dtype of the file; they are hashed, and kept no longer than this call."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        block = BLOCK * values.dtype.itemsize
        while flat.size:
            part = flat[: block - self._size]
            self._hash.update(part.data)
            self._size += part.size
            flat = flat[part.size :]
            if self._size == block:
                self._end_block()

    def hexdigest(self) -> str:
        """The digest of all values, of which the last have come."""
        if self._size:
            self._end_block()
        return tensor_digest(self._blocks)

    def _end_block(self) -> None:
        self._blocks.append(self._hash.digest())
        self._hash, self._size = xxhash.xxh3_128(), 0


def base_digest(base: Source) -> str:
    """A digest that tells one base model from another, at the cost of 16 rows of each tensor, spread evenly over it.

    It cannot see a change of other rows alone. Values count as bfloat16, so that a base is the same in every dtype and
    container that holds these.
    """
    return _SPREAD + _digest_rows(base, _ROWS)


def is_base(base: Source, recorded: str) -> bool:
    """Whether a base model is the one that a record names by its digest, of this version or of an older one."""
    return recorded == (base_digest(base) if recorded.startswith(_SPREAD) else _digest_rows(base, 1))


def _digest_rows(base: Source, most: int) -> str:
    import ml_dtypes

    digest = xxhash.xxh3_128()
    with FileReader() as reader:
        for name, view in sorted(base.tensors.items()):
            digest.update(f"{name} {list(view.shape)}".encode())
            for row in _rows(view, most):
                digest.update(reader.read(row).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _rows(view: View, most: int) -> Iterator[View]:
    """Windows of a tensor: evenly spread rows, the first and the last among them, if there may be more than one."""
    count = view.shape[0] if view.shape else 1
    places = sorted({index * (count - 1) // max(1, most - 1) for index in range(min(most, count))})
    if not view.shape:
        yield view
        return
    yield from (view[place : place + 1] for place in places)


def _recorded(source: Source, record: Mapping[str, Any]) -> dict[str, str] | None:
    how, listed = record.get("digest"), record.get("tensors")
    if not isinstance(how, Mapping) or how.get("block_elements") != BLOCK or not isinstance(listed, Mapping):
        return None
    found = {
        name: entry["digest"]
        for name, entry in listed.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("digest"), str)
    }
    return found if found.keys() >= source.tensors.keys() else None


def _blocks(view: View, reader: FileReader, progress: Callable[[int], None]) -> Iterator[bytes]:
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, BLOCK):
        block = flat[start : start + BLOCK]
        yield block_digest(reader.chunks(block))
        progress(block.nbytes)


def _config_digest(config: Mapping[str, Any]) -> str:
    numbers: dict[str, Any]
    if config.get("model_type") == MODEL_TYPE:
        activation = config.get("hidden_act") or "silu"
        numbers = {**asdict(Architecture.from_config(config, with_biases=True)), "hidden_act": activation}
        numbers["rope_parameters"] = rope_parameters(config)
    else:
        numbers = {name: value for name, value in config.items() if name not in _NAMES}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(folder: str, names: Sequence[str]) -> str | None:
    """Of the first that there is: the one that `evaluation.vocabulary` opens."""
    for name in names:
        if (path := Path(folder) / name).is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None


__all__ = ["ModelIdentity", "TensorDigest", "base_digest", "is_base", "model_identity", "tensor_digests"]
