# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of Megatron-LM's `torch` format: a file for each tensor- and pipeline-parallel rank.

    iter_0000100/mp_rank_{tensor:02d}[_{pipeline:03d}]/model_optim_rng.pt

Each file holds one stage's layers, numbered from 0: once (`model`), or once for each virtual stage (`model0`, ...).
Which global layers these are is read off the files: chunks follow each other over the stages, then over the virtual
stages, as Megatron's interleaved schedule has it, and each brings as many layers as it holds. So every split that
Megatron knows (even, uneven, with stages that only embed) is the same to this reader.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.inert_pickle import Inert
from ..checkpoint.plan import View
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.torch_file import UnreadableTensor, read_torch_file
from .checkpoint import NativeCheckpoint, Replica
from .table import MEGATRON, NativeWeight, RowOrder, megatron_name
from .training_args import plain_args

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
_MODEL_KEY = re.compile(r"model(\d*)")
_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
# State that is no weight: Transformer Engine's FP8 scales, and what every runtime computes itself.
_NO_WEIGHT = re.compile(r"(?:^|\.)_extra_state$|rotary_(?:pos_)?emb\.inv_freq$")
_LEGACY_QKV = re.compile(r"\bquery_key_value\.")
_TIED_HEAD = "word_embeddings_for_head.weight"
_LOST = "copy the folder again, with every rank's file"


@dataclass(frozen=True)
class _Rank:
    """One rank's file: where it stands, what it holds."""

    tensor: int
    pipeline: int
    file: str
    content: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"tensor rank {self.tensor}, stage {self.pipeline}"


def is_megatron(folder: Path) -> bool:
    """Whether a folder is one iteration of the `torch` format."""
    return any(_model_file(entry) for entry in folder.glob("mp_rank_*") if entry.is_dir())


def read_megatron(
    folder: Path, iteration: int | None = None, table: Sequence[NativeWeight] | None = None
) -> NativeCheckpoint:
    """Open one iteration of a Megatron-LM run in `torch` format; no tensor is loaded.

    Args:
        folder: the one with the `mp_rank_*` folders.
        iteration: its number, if the folder's name says.
        table: what its tensors are called, for a fork; Megatron's own names, of any age, unless given.

    Raises:
        CheckpointError: a rank's file is missing, damaged or left over from another run; ranks disagree; or a tensor
            is none that the table knows.
    """
    ranks = _read_ranks(folder)
    args = plain_args(ranks[0].content.get("args"))
    size, stages = 1 + max(rank.tensor for rank in ranks), 1 + max(rank.pipeline for rank in ranks)
    _check_grid(folder, ranks, args)
    _same("iteration", ranks, [rank.content.get("iteration") for rank in ranks])
    chunks = [_read_chunks(rank, renamed=table is None) for rank in ranks]
    virtual = _same("number of virtual stages", ranks, [len(parts) for parts in chunks])
    offsets = _layer_offsets(folder, ranks, chunks)
    tensors, replicas = _assemble(ranks, chunks, offsets, table or MEGATRON)
    parallel = f"tensor parallel {size} x pipeline parallel {stages}" + (
        f" x {virtual} virtual stages" if virtual > 1 else ""
    )
    return NativeCheckpoint(
        folder=str(folder),
        format="megatron",
        parallel=parallel,
        iteration=ranks[0].content.get("iteration", iteration),
        args=args,
        tensors=tensors,
        table=table or MEGATRON,
        order=RowOrder(
            gated_blocks=size,
            qkv_version=_qkv_version(ranks[0], table),
            tensor_parallel=size,
            rotary_interleaved=bool(args.get("rotary_interleaved")),
            zero_centered_gamma=bool(args.get("apply_layernorm_1p") or args.get("layernorm_zero_centered_gamma")),
        ),
        replicas=replicas,
    )


# The files.


def _read_ranks(folder: Path) -> list[_Rank]:
    """Every rank's file, by tensor rank, then stage."""
    found: dict[tuple[int, int], str] = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK_FOLDER.fullmatch(entry.name)
        if not match or not entry.is_dir():
            continue
        if match[3] and int(match[3]):
            raise CheckpointError(f"{entry}: is of an expert-parallel rank; Tele-FLM models are dense.")
        file = _model_file(entry)
        if file is None:
            raise CheckpointError(f"{entry}: holds neither {' nor '.join(_MODEL_FILES)}; {_LOST}.")
        place = int(match[1]), int(match[2] or 0)
        if place in found:
            raise CheckpointError(
                f"{folder}: {Path(found[place]).parent.name} and {entry.name} are the same rank, of two runs; "
                "move one run's files away."
            )
        found[place] = str(file)
    return [_Rank(*place, file, _read_file(file)) for place, file in sorted(found.items())]


def _model_file(folder: Path) -> Path | None:
    return next((folder / name for name in _MODEL_FILES if (folder / name).is_file()), None)


def _read_file(file: str) -> Mapping[str, Any]:
    content = read_torch_file(file)
    if not isinstance(content, dict) or not any(_MODEL_KEY.fullmatch(str(key)) for key in content):
        listed = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: holds {listed}, expected Megatron's `model`.")
    return content


def _check_grid(folder: Path, ranks: Sequence[_Rank], args: Mapping[str, Any]) -> None:
    """Every rank of the run is there, and none of another."""
    size = args.get("tensor_model_parallel_size") or args.get("model_parallel_size")
    stages = args.get("pipeline_model_parallel_size")
    size = size or 1 + max(rank.tensor for rank in ranks)
    stages = stages or 1 + max(rank.pipeline for rank in ranks)
    expected = {(t, p) for t in range(size) for p in range(stages)}
    present = {(rank.tensor, rank.pipeline) for rank in ranks}
    about = f"{folder}: tensor parallel {size} x pipeline parallel {stages} makes {len(expected)} ranks"
    in_stages = stages > 1 or any(rank.pipeline for rank in ranks)
    if expected - present:
        raise CheckpointError(f"{about}, {_rank_names(expected - present, in_stages)} missing; {_LOST}.")
    if present - expected:
        raise CheckpointError(
            f"{about}, but {_rank_names(present - expected, in_stages)} there too, of another run; move the rest away."
        )


def _rank_names(places: set[tuple[int, int]], in_stages: bool) -> str:
    names = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if in_stages else "") for t, p in sorted(places)]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") + (" is" if len(names) == 1 else " are")


def _same(what: str, ranks: Sequence[_Rank], values: Sequence[Any]) -> Any:
    """A value on which all ranks agree."""
    for rank, value in zip(ranks, values, strict=True):
        if value != values[0]:
            raise CheckpointError(
                f"{rank.file}: {what} is {value}, in {ranks[0].file} it is {values[0]}; the files are of two runs."
            )
    return values[0]


def _qkv_version(rank: _Rank, table: Sequence[NativeWeight] | None) -> int:
    """Megatron's checkpoint_version, which counts for the names of its old model only; absent is its first, 0."""
    names = [name for chunk in _model_keys(rank) for name in _flatten(rank.content[chunk])]
    if table is not None or not any(_LEGACY_QKV.search(name) for name in names):
        return 3
    version = rank.content.get("checkpoint_version", 0)
    if isinstance(version, bool) or not isinstance(version, int | float) or not 0 <= version < 4:
        raise CheckpointError(f"{rank.file}: checkpoint_version is {version!r}, expected 0 to 3.")
    return int(version)


# The tensors of a file.

_Chunk = Mapping[str, View]


def _model_keys(rank: _Rank) -> list[str]:
    """`model`, or `model0`, `model1`, ... in order."""
    keys = [str(key) for key in rank.content if _MODEL_KEY.fullmatch(str(key))]
    keys.sort(key=lambda key: int(key.removeprefix("model") or 0))
    if keys != ["model"] and keys != [f"model{number}" for number in range(len(keys))]:
        raise CheckpointError(f"{rank.file}: holds {', '.join(keys)}, expected model, or model0 and so on.")
    return keys


def _read_chunks(rank: _Rank, *, renamed: bool) -> list[_Chunk]:
    """The weights of each virtual stage, by name with the layer's number in the stage."""
    return [_read_weights(rank, rank.content[key], renamed) for key in _model_keys(rank)]


def _read_weights(rank: _Rank, model: Any, renamed: bool) -> _Chunk:
    tensors: dict[str, View] = {}
    for own_name, value in _flatten(model).items():
        name = megatron_name(own_name) if renamed else own_name
        name = "output_layer.weight" if name == _TIED_HEAD else name
        if _NO_WEIGHT.search(name) or value is None:
            continue
        if not isinstance(value, View):
            raise CheckpointError(
                f"{rank.file}: {own_name} is {_describe(value)}, expected a plain tensor; save it in bfloat16."
            )
        if name in tensors:
            raise CheckpointError(f"{rank.file}: {own_name} is there under another name too.")
        tensors[name] = value
    return tensors


def _describe(value: Any) -> str:
    if isinstance(value, UnreadableTensor):
        return value.reason
    return f"a {value.qualified_name if isinstance(value, Inert) else type(value).__name__}"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state dict as one, with dots between the keys."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}


# The whole model.


def _layer_offsets(
    folder: Path, ranks: Sequence[_Rank], chunks: Sequence[Sequence[_Chunk]]
) -> dict[tuple[int, int], int]:
    """The global number of the first layer of each (stage, virtual stage)."""
    counts: dict[tuple[int, int], int] = {}
    for rank, parts in zip(ranks, chunks, strict=True):
        for virtual, chunk in enumerate(parts):
            count = _count_layers(rank, chunk)
            if counts.setdefault((rank.pipeline, virtual), count) != count:
                raise CheckpointError(
                    f"{rank.file}: has {count} layers, tensor rank 0 of the same stage has "
                    f"{counts[rank.pipeline, virtual]}; {_LOST}."
                )
    offsets = {}
    total = 0
    for place in sorted(counts, key=lambda place: (place[1], place[0])):  # virtual stage by virtual stage
        offsets[place] = total
        total += counts[place]
    if not total:
        raise CheckpointError(f"{folder}: no file holds a layer; expected names such as decoder.layers.0.")
    return offsets


def _count_layers(rank: _Rank, chunk: _Chunk) -> int:
    numbers = sorted({int(match[0]) for name in chunk if (match := _LAYER.search(name))})
    if numbers != list(range(len(numbers))):
        raise CheckpointError(f"{rank.file}: layers are numbered {numbers}, expected 0 to {len(numbers) - 1}.")
    return len(numbers)


def _assemble(
    ranks: Sequence[_Rank],
    chunks: Sequence[Sequence[_Chunk]],
    offsets: Mapping[tuple[int, int], int],
    table: Sequence[NativeWeight],
) -> tuple[dict[str, ShardedTensor], list[Replica]]:
    """Whole tensors under global names, and the copies that have to be equal."""
    lines = {line.name: line for line in table}
    size = 1 + max(rank.tensor for rank in ranks)
    shards: dict[str, list[tuple[_Rank, View]]] = {}
    replicas: list[Replica] = []
    for rank, name, view in _globally_named(ranks, chunks, offsets):
        before = shards.setdefault(name, [])
        twin = next(((other, held) for other, held in before if other.tensor == rank.tensor), None)
        if twin:  # a stage that needs another's tensor keeps a copy
            _check_same_kind(name, twin, (rank, view))
            replicas.append(Replica(name, twin[1], view, (twin[0].place, rank.place)))
        else:
            before.append((rank, view))
    tensors = {}
    for name, parts in shards.items():
        line = lines.get(_LAYER.sub("{}", name))
        if line is None:
            raise CheckpointError(
                f"{parts[0][0].file}: {name} is not a weight of a Tele-FLM model; it would be lost. "
                "A fork with other names needs --mapping."
            )
        _check_alike(name, parts, size)
        if line.parallel == "replicated":
            (first, view), *others = parts
            replicas += [Replica(name, view, other, (first.place, rank.place)) for rank, other in others]
            parts = parts[:1]
        views = [ShardedTensor.of(view) for _, view in parts]
        tensors[name] = ShardedTensor.concatenate(views, line.parallel == "row")
    return tensors, replicas


def _globally_named(
    ranks: Sequence[_Rank], chunks: Sequence[Sequence[_Chunk]], offsets: Mapping[tuple[int, int], int]
) -> Iterator[tuple[_Rank, str, View]]:
    for rank, parts in zip(ranks, chunks, strict=True):
        for virtual, chunk in enumerate(parts):
            offset = offsets[rank.pipeline, virtual]
            for name, view in chunk.items():
                yield rank, _shift_layer(name, offset), view


def _shift_layer(name: str, offset: int) -> str:
    return _LAYER.sub(lambda match: str(int(match[0]) + offset), name)


def _check_alike(name: str, parts: Sequence[tuple[_Rank, View]], size: int) -> None:
    """Every tensor-parallel rank has its part of a tensor, all of one kind."""
    missing = set(range(size)) - {rank.tensor for rank, _ in parts}
    if missing:
        first, _ = parts[0]
        raise CheckpointError(f"{first.file}: has {name}, tensor rank {min(missing)} of {size} has none; {_LOST}.")
    for part in parts[1:]:
        _check_same_kind(name, parts[0], part)


def _check_same_kind(name: str, first: tuple[_Rank, View], second: tuple[_Rank, View]) -> None:
    """Two ranks' parts of a tensor have the same shape and dtype."""
    (one, view), (rank, other) = first, second
    if (other.shape, other.dtype) != (view.shape, view.dtype):
        raise CheckpointError(
            f"{rank.file}: {name} is {other.dtype} {other.shape}, in {one.file} it is {view.dtype} {view.shape}; "
            "the files are of two runs."
        )
