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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.inert_pickle import Inert
from ..checkpoint.plan import View
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.torch_file import UnreadableTensor, read_torch_file
from .checkpoint import NativeCheckpoint
from .megatron_optimizer import MASTER, named_copies, read_adam_parts, with_adam
from .model_parallel import LOST, Chunk, Rank, assemble, layer_offsets, shift_layer
from .table import MEGATRON, NativeWeight, RowOrder, megatron_name
from .training_args import plain_args

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
_MODEL_KEY = re.compile(r"model(\d*)")
# State that is no weight: Transformer Engine's FP8 scales, and what every runtime computes itself.
_NO_WEIGHT = re.compile(r"(?:^|\.)_extra_state$|rotary_(?:pos_)?emb\.inv_freq$")
_LEGACY_QKV = re.compile(r"\bquery_key_value\.")
_TIED_HEAD = "word_embeddings_for_head.weight"


def is_megatron(folder: Path) -> bool:
    """Whether a folder is one iteration of the `torch` format."""
    return any(_model_file(entry) for entry in folder.glob("mp_rank_*") if entry.is_dir())


def read_megatron(
    folder: Path,
    iteration: int | None = None,
    table: Sequence[NativeWeight] | None = None,
    *,
    fp32_master: bool = False,
    optimizer: bool = False,
) -> NativeCheckpoint:
    """Open one iteration of a Megatron-LM run in `torch` format; no tensor is loaded.

    Args:
        folder: the one with the `mp_rank_*` folders.
        iteration: its number, if the folder's name says.
        table: what its tensors are called, for a fork; Megatron's own names, of any age, unless given.
        fp32_master: take the optimizer's float32 weights.
        optimizer: read Adam's moments too.

    Raises:
        CheckpointError: a rank's file is missing, damaged or left over from another run; ranks disagree; or a tensor
            is none that the table knows; the optimizer is asked for and not there, not Adam's, or does not fit.
    """
    ranks = _read_ranks(folder)
    args = plain_args(ranks[0].content.get("args"))
    size, stages = 1 + max(rank.tensor for rank in ranks), 1 + max(rank.pipeline for rank in ranks)
    _check_grid(folder, ranks, args)
    _same("iteration", ranks, [rank.content.get("iteration") for rank in ranks])
    chunks = [_read_chunks(rank, renamed=table is None) for rank in ranks]
    virtual = _same("number of virtual stages", ranks, [len(parts) for parts in chunks])
    offsets = layer_offsets(folder, ranks, chunks)
    tensors, replicas = assemble(ranks, chunks, offsets, table or MEGATRON)
    parallel = f"tensor parallel {size} x pipeline parallel {stages}" + (
        f" x {virtual} virtual stages" if virtual > 1 else ""
    )
    run = NativeCheckpoint(
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
    if not (fp32_master or optimizer):
        return run
    return _with_optimizer(run, ranks, chunks, offsets, fp32_master=fp32_master, optimizer=optimizer)


def _with_optimizer(
    run: NativeCheckpoint,
    ranks: Sequence[Rank],
    chunks: Sequence[Sequence[Chunk]],
    offsets: Mapping[tuple[int, int], int],
    *,
    fp32_master: bool,
    optimizer: bool,
) -> NativeCheckpoint:
    """The run with what its optimizer holds, put together as the weights are."""
    table = run.table or MEGATRON
    state = read_adam_parts(ranks, chunks, run.args, table)
    whole: dict[str, dict[str, ShardedTensor]] = {}
    replicas = []
    for key, parts in state.parts.items():
        whole[key], found = assemble(ranks, parts, offsets, table)
        replicas += named_copies(key, found)
    masters = whole.pop(MASTER, None)
    return with_adam(
        run,
        whole,
        masters,
        step=state.step,
        settings=state.groups,
        members=_name_groups(state.members, offsets),
        replicas=replicas,
        notes=state.notes,
        fp32_master=fp32_master,
        adam=optimizer,
    )


def _name_groups(
    members: Sequence[Mapping[tuple[int, int], Sequence[str]]] | None, offsets: Mapping[tuple[int, int], int]
) -> list[list[str]] | None:
    """The weights of each group by their names in the whole model, where the files say which they are."""
    if members is None:
        return None
    return [
        [shift_layer(name, offsets[place]) for place, names in group.items() for name in names] for group in members
    ]


# The files.


def _read_ranks(folder: Path) -> list[Rank]:
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
            raise CheckpointError(f"{entry}: holds neither {' nor '.join(_MODEL_FILES)}; {LOST}.")
        place = int(match[1]), int(match[2] or 0)
        if place in found:
            raise CheckpointError(
                f"{folder}: {Path(found[place]).parent.name} and {entry.name} are the same rank, of two runs; "
                "move one run's files away."
            )
        found[place] = str(file)
    return [Rank(*place, file, _read_file(file)) for place, file in sorted(found.items())]


def _model_file(folder: Path) -> Path | None:
    return next((folder / name for name in _MODEL_FILES if (folder / name).is_file()), None)


def _read_file(file: str) -> Mapping[str, Any]:
    content = read_torch_file(file)
    if not isinstance(content, dict) or not any(_MODEL_KEY.fullmatch(str(key)) for key in content):
        listed = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: holds {listed}, expected Megatron's `model`.")
    return content


def _check_grid(folder: Path, ranks: Sequence[Rank], args: Mapping[str, Any]) -> None:
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
        raise CheckpointError(f"{about}, {_rank_names(expected - present, in_stages)} missing; {LOST}.")
    if present - expected:
        raise CheckpointError(
            f"{about}, but {_rank_names(present - expected, in_stages)} there too, of another run; move the rest away."
        )


def _rank_names(places: set[tuple[int, int]], in_stages: bool) -> str:
    names = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if in_stages else "") for t, p in sorted(places)]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") + (" is" if len(names) == 1 else " are")


def _same(what: str, ranks: Sequence[Rank], values: Sequence[Any]) -> Any:
    """A value on which all ranks agree."""
    for rank, value in zip(ranks, values, strict=True):
        if value != values[0]:
            raise CheckpointError(
                f"{rank.file}: {what} is {value}, in {ranks[0].file} it is {values[0]}; the files are of two runs."
            )
    return values[0]


def _qkv_version(rank: Rank, table: Sequence[NativeWeight] | None) -> int:
    """Megatron's checkpoint_version, which counts for the names of its old model only; absent is its first, 0."""
    names = [name for chunk in _model_keys(rank) for name in _flatten(rank.content[chunk])]
    if table is not None or not any(_LEGACY_QKV.search(name) for name in names):
        return 3
    version = rank.content.get("checkpoint_version", 0)
    if isinstance(version, bool) or not isinstance(version, int | float) or not 0 <= version < 4:
        raise CheckpointError(f"{rank.file}: checkpoint_version is {version!r}, expected 0 to 3.")
    return int(version)


# The tensors of a file.


def _model_keys(rank: Rank) -> list[str]:
    """`model`, or `model0`, `model1`, ... in order."""
    keys = [str(key) for key in rank.content if _MODEL_KEY.fullmatch(str(key))]
    keys.sort(key=lambda key: int(key.removeprefix("model") or 0))
    if keys != ["model"] and keys != [f"model{number}" for number in range(len(keys))]:
        raise CheckpointError(f"{rank.file}: holds {', '.join(keys)}, expected model, or model0 and so on.")
    return keys


def _read_chunks(rank: Rank, *, renamed: bool) -> list[Chunk]:
    """The weights of each virtual stage, by name with the layer's number in the stage."""
    return [_read_weights(rank, rank.content[key], renamed) for key in _model_keys(rank)]


def _read_weights(rank: Rank, model: Any, renamed: bool) -> Chunk:
    tensors: dict[str, ShardedTensor] = {}
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
        tensors[name] = ShardedTensor.of(value)
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
