# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of DeepSpeed's checkpoints: ZeRO 1 to 3, and universal ones.

    ROOT/latest                                        the tag of the last checkpoint: global_step100
    TAG/mp_rank_00_model_states.pt                     ZeRO 1 and 2: the weights as they were trained
    TAG/zero_pp_rank_{rank}_mp_rank_00_model_states.pt ZeRO 3: no weights, only their shapes
    TAG/[bf16_]zero_pp_rank_{rank}_mp_rank_00_optim_states.pt
    TAG/zero/{weight}/fp32.pt                          universal

The optimizer of every rank holds its part of the float32 weights in flat tensors without names; the shapes in the model
states say what lies in them. In ZeRO 1 and 2 the weights of a parameter group follow each other, and the whole is cut
into as many equal parts as there are ranks; in ZeRO 3 every weight is cut by itself, padded to equal parts, and each
rank has its parts one after the other.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..checkpoint.bytes import read_start
from ..checkpoint.dtypes import FLOAT32, DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.inert_pickle import Inert
from ..checkpoint.numbers import plain_value, read_count
from ..checkpoint.plan import Shape, View
from ..checkpoint.reader import FileReader
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.torch_file import UnreadableTensor, read_torch_file
from ..optimizer_state import MAX_STEPS, MOMENTS, plain_settings
from .checkpoint import AdamMoments, NativeCheckpoint
from .table import hub_name

_TRACKERS = ("latest", "latest_universal")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_UNIVERSAL = "zero"
_MASTER = "fp32.pt"
_FLAT_GROUPS = {False: "single_partition_of_fp32_groups", True: "fp32_flat_groups"}  # by: is it ZeRO 3?
_LOST = "copy the folder again, with every rank's files"
_UNIVERSAL_FIRST = "make it universal with DeepSpeed's ds_to_universal.py, then convert that"


@dataclass(frozen=True)
class _Files:
    """The files of one tag, by rank.

    Args:
        folder: where they are.
        models: of the model states; of one rank alone in ZeRO 1 and 2.
        optimizers: of the optimizer states.
        is_zero3: whether the model states hold no weights.
        is_universal: whether each float32 weight has a file.
        tensor_parallel: number of tensor-parallel ranks.
    """

    folder: Path
    models: Mapping[int, Path]
    optimizers: Mapping[int, Path]
    is_zero3: bool
    is_universal: bool
    tensor_parallel: int


@dataclass(frozen=True)
class _Model:
    """The model states of one rank.

    Args:
        file: where they are.
        module: the tensors of the model; in ZeRO 3 without elements.
        groups: name and shape of every weight that is trained, for each of the optimizer's groups.
        frozen: name and shape of every weight that is not.
        fragments: this rank's part of each of those.
        ties: name of a weight that is stored under another's name -> that name.
        step: number of the training step.
    """

    file: str
    module: Mapping[str, View]
    groups: Sequence[Mapping[str, Shape]]
    frozen: Mapping[str, Shape]
    fragments: Mapping[str, View]
    ties: Mapping[str, str]
    step: int | None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every weight that is trained."""
        return {name: shape for group in self.groups for name, shape in group.items()}


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is a DeepSpeed checkpoint, or one of its tags."""
    return _has_states(folder) or any(
        _has_states(folder / tag) for tracker in _TRACKERS if (tag := _read_tracker(folder / tracker))
    )


def read_deepspeed(
    folder: str | os.PathLike[str], *, fp32_master: bool = False, optimizer: bool = False
) -> NativeCheckpoint:
    """Open a DeepSpeed checkpoint; no tensor is loaded.

    Args:
        folder: the one with `latest`, or that of one tag.
        fp32_master: take the optimizer's float32 weights, also where the run's own are there.
        optimizer: read Adam's moments too.

    Raises:
        CheckpointError: a rank's file is missing, damaged or left over from another run; a weight is missing; or the
            model was split by tensor or pipeline parallelism; the optimizer is not Adam.
    """
    files = _find_files(_tag_folder(Path(os.path.abspath(folder))))
    model = _read_model(files.models[min(files.models)])
    has_weights = not files.is_zero3 and files.tensor_parallel == 1
    named = {name: ShardedTensor.of(view) for name, view in _stored_whole(model, has_weights)}
    if not has_weights or fp32_master:
        named |= _frozen(files, model) | _masters(files, model)
    named |= {alias: named[name] for alias, name in model.ties.items() if name in named}
    return NativeCheckpoint(
        folder=str(files.folder),
        format="deepspeed",
        parallel=_describe(files),
        iteration=model.step,
        args={},
        tensors=_hub_names(named, model.file),
        table=None,
        dtype=FLOAT32 if fp32_master else None if has_weights else _trained_dtype(model),
        adam=_adam(files, model) if optimizer else None,
    )


def _hub_names(named: Mapping[str, ShardedTensor], where: str) -> dict[str, ShardedTensor]:
    tensors: dict[str, ShardedTensor] = {}
    for own_name, tensor in named.items():
        name = hub_name(own_name)
        if name in tensors:
            raise CheckpointError(f"{where}: {own_name} is there under another name too, as {name}.")
        tensors[name] = tensor
    return tensors


def _describe(files: _Files) -> str:
    stage = "universal" if files.is_universal else "ZeRO 3" if files.is_zero3 else "ZeRO 1 or 2"
    ranks = len(files.optimizers)
    return stage + (f", {ranks} ranks" if ranks else "")


# The files.


def _read_tracker(path: Path) -> str | None:
    """The tag that `latest` names; None if there is no such file, or what it says is no tag."""
    if not path.is_file():
        return None
    tag = read_start(path, 200).decode(errors="replace").strip()
    return tag if tag == os.path.basename(tag) and tag not in ("", ".", "..") and "\0" not in tag else None


def _has_states(folder: Path) -> bool:
    return any(_MODEL_FILE.fullmatch(path.name) for path in folder.glob("*_model_states.pt"))


def _tag_folder(root: Path) -> Path:
    if _has_states(root):
        return root
    for tracker in _TRACKERS:
        if (root / tracker).is_file():
            tag = _read_tracker(root / tracker)
            if tag is None or not (root / tag).is_dir():
                raise CheckpointError(
                    f"{root / tracker}: says {tag}, but there is no such folder; give a tag's folder."
                )
            return root / tag
    raise CheckpointError(f"{root}: holds neither *_model_states.pt nor a `latest` that names a folder with them.")


def _find_files(folder: Path) -> _Files:
    models: dict[tuple[int, int], Path] = {}
    optimizers: dict[tuple[int, int], Path] = {}
    is_zero3 = False
    for path in sorted(folder.iterdir()):
        if match := _MODEL_FILE.fullmatch(path.name):
            models[int(match[2]), int(match[1] or 0)] = path
            is_zero3 = is_zero3 or match[1] is not None
        elif match := _OPTIMIZER_FILE.fullmatch(path.name):
            optimizers[int(match[2]), int(match[1])] = path
        elif path.name.endswith("model_states.pt"):
            raise CheckpointError(
                f"{path}: is of pipeline parallelism or of experts, which are not joined here; {_UNIVERSAL_FIRST}."
            )
    is_universal = (folder / _UNIVERSAL).is_dir()
    if not models:
        raise CheckpointError(f"{folder}: holds no *_model_states.pt; {_LOST}.")
    tensor_parallel = 1 + max(rank for rank, _ in models)
    if tensor_parallel > 1 and not is_universal:
        raise CheckpointError(
            f"{folder}: is of {tensor_parallel} tensor- or pipeline-parallel ranks, and does not say how they cut; "
            f"{_UNIVERSAL_FIRST}."
        )
    first_models, first_optimizers = (
        {rank: path for (tensor_rank, rank), path in found.items() if tensor_rank == 0}
        for found in (models, optimizers)
    )
    if not first_models:
        raise CheckpointError(f"{folder}: the model states of mp_rank_00 are missing; {_LOST}.")
    return _Files(folder, first_models, first_optimizers, is_zero3, is_universal, tensor_parallel)


def _check_ranks(files: Mapping[int, Path], count: int, said_by: str) -> None:
    """Every rank's file is there, and none of another run."""
    some = next(iter(files.values()))
    about = f"{some.parent}: {said_by} makes it {count} ranks"
    missing, extra = sorted(set(range(count)) - files.keys()), sorted(files.keys() - set(range(count)))
    if missing:
        raise CheckpointError(f"{about}, {_names(missing, some)} missing; {_LOST}.")
    if extra:
        raise CheckpointError(f"{about}, but {_names(extra, some)} there too, of another run; move the rest away.")


def _names(ranks: Sequence[int], some: Path) -> str:
    names = [re.sub(r"(?<=pp_rank_)\d+", str(rank), some.name) for rank in ranks]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") + (" is" if len(names) == 1 else " are")


# The model states.


def _read_model(path: Path) -> _Model:
    content = _read_dict(path)
    groups = content.get("param_shapes") or []
    groups = groups if isinstance(groups, list) else [groups]
    return _Model(
        file=str(path),
        module=_tensors(content.get("module"), path, "module"),
        groups=[_shapes(group, path, "param_shapes") for group in groups],
        frozen=_shapes(content.get("frozen_param_shapes") or {}, path, "frozen_param_shapes"),
        fragments=_tensors(content.get("frozen_param_fragments") or {}, path, "frozen_param_fragments"),
        ties=_ties(content.get("shared_params") or {}, path),
        step=step if type(step := content.get("global_steps")) is int else None,
    )


def _read_dict(path: Path) -> Mapping[str, Any]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected DeepSpeed's dict of states.")
    return content


def _tensors(value: Any, path: Path, field: str) -> dict[str, View]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {field} is a {type(value).__name__}, expected tensors by name.")
    for name, tensor in value.items():
        if not isinstance(tensor, View) or not isinstance(name, str):
            what = tensor.reason if isinstance(tensor, UnreadableTensor) else f"a {type(tensor).__name__}"
            raise CheckpointError(f"{path}: {str(name)[:80]} of {field} is {what}, expected a plain tensor.")
    return value


def _shapes(value: Any, path: Path, field: str) -> dict[str, Shape]:
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        for name, shape in value.items()
    ):
        raise CheckpointError(f"{path}: {field} is no dict of shapes by name; the file is damaged or of another tool.")
    return value


def _ties(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise CheckpointError(f"{path}: shared_params is no dict of names; the file is damaged or of another tool.")
    return value


def _stored_whole(model: _Model, has_weights: bool) -> Iterator[tuple[str, View]]:
    """What the model states hold: everything, or, where the optimizer has the weights, the buffers."""
    elsewhere = {} if has_weights else {**model.shapes, **model.frozen, **model.ties}
    return ((name, view) for name, view in model.module.items() if name not in elsewhere)


def _trained_dtype(model: _Model) -> DType | None:
    """The dtype the run computed in, which the emptied weights of ZeRO 3 keep."""
    dtypes = {model.module[name].dtype for name in model.shapes if name in model.module}
    return dtypes.pop() if len(dtypes) == 1 else None


# Weights that are not trained, which no optimizer holds.


def _frozen(files: _Files, model: _Model) -> dict[str, ShardedTensor]:
    if not files.is_zero3:
        return {name: ShardedTensor.of(model.fragments[name]) for name in model.frozen if name in model.fragments}
    if not model.frozen:
        return {}
    count = 1 + max(files.models)
    _check_ranks(files.models, count, f"{files.models[count - 1].name}")
    models = [_read_model(files.models[rank]) for rank in range(count)]
    tensors = {}
    for name, shape in model.frozen.items():
        for other in models:
            if name not in other.fragments:
                raise CheckpointError(f"{other.file}: {name} of frozen_param_fragments is missing; {_LOST}.")
        flat = ShardedTensor.concatenate([_flat(other.fragments[name], other.file) for other in models], 0)
        tensors[name] = _shaped(flat, name, shape, model.file)
    return tensors


# The float32 weights.


def _masters(files: _Files, model: _Model) -> dict[str, ShardedTensor]:
    if not model.shapes:
        raise CheckpointError(f"{model.file}: has no param_shapes, so that nothing says what the optimizer holds.")
    if files.is_universal:
        return _universal_masters(files, model)
    if not files.optimizers:
        raise CheckpointError(f"{files.folder}: holds no *_optim_states.pt, where the weights are; {_LOST}.")
    ranks = _read_partitions(files, _read_partition)
    return _zero3_masters(ranks, model) if files.is_zero3 else _zero12_masters(ranks, model)


@dataclass(frozen=True)
class _Partition:
    """One rank's part of the float32 weights, or of something as large: a flat tensor for each group."""

    file: str
    groups: Sequence[ShardedTensor]


def _read_partitions(files: _Files, read: Callable[[Path, bool], _Partition]) -> list[_Partition]:
    first = min(files.optimizers)
    states = {first: _optimizer_state(files.optimizers[first])}
    count = states[first].get("partition_count")
    count = max(count) if isinstance(count, list) and count and all(type(n) is int for n in count) else count
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{files.optimizers[first]}: partition_count is {count!r}, expected a number of ranks.")
    _check_ranks(files.optimizers, count, f"partition_count of {files.optimizers[first].name}")
    partitions = [read(files.optimizers[rank], files.is_zero3) for rank in range(count)]
    for partition in partitions:
        if len(partition.groups) != len(partitions[0].groups):
            raise CheckpointError(
                f"{partition.file}: has {len(partition.groups)} groups of weights, {partitions[0].file} has "
                f"{len(partitions[0].groups)}; the files are of two runs."
            )
    return partitions


def _optimizer_state(path: Path) -> Mapping[str, Any]:
    state = _read_dict(path).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: has no optimizer_state_dict; {_LOST}.")
    return state


def _read_partition(path: Path, is_zero3: bool) -> _Partition:
    state, field = _optimizer_state(path), _FLAT_GROUPS[is_zero3]
    groups = state.get(field)
    stage = _stage(state.get("zero_stage"))
    if not isinstance(groups, list) or not groups or (stage is not None and (stage == 3) != is_zero3):
        raise CheckpointError(
            f"{path}: is of ZeRO stage {stage} and {'has' if groups else 'lacks'} {field}; the model "
            f"states are of stage {'3' if is_zero3 else '1 or 2'}; the files are of two runs."
        )
    return _Partition(str(path), [_flat(group, str(path)) for group in groups])


def _stage(value: Any) -> int | None:
    """The stage, which is a number or a member of DeepSpeed's enum."""
    match value:
        case Inert(args=(int() as stage,)) | (int() as stage):
            return stage
    return None


def _flat(value: Any, file: str) -> ShardedTensor:
    """A tensor's elements one after the other."""
    if not isinstance(value, View) or not value.is_contiguous:
        raise CheckpointError(f"{file}: a part of a weight is a {type(value).__name__}, expected a plain flat tensor.")
    return ShardedTensor.of(View.contiguous(value.file, value.offset, (value.numel,), value.dtype))


def _shaped(flat: ShardedTensor, name: str, shape: Shape, file: str) -> ShardedTensor:
    """The elements at the front of a flat tensor, as a weight."""
    numel = math.prod(shape)
    if flat.numel < numel:
        raise CheckpointError(f"{file}: {name} has shape {shape}, but the ranks hold {flat.numel} elements of it.")
    return flat[:numel].unflatten(0, shape) if len(shape) != 1 else flat[:numel]


def _zero12_masters(ranks: Sequence[_Partition], model: _Model) -> dict[str, ShardedTensor]:
    """A group's weights one after the other, over the ranks' parts one after the other."""
    if len(ranks[0].groups) != len(model.groups):
        raise CheckpointError(
            f"{ranks[0].file}: has {len(ranks[0].groups)} groups of weights, param_shapes of {model.file} has "
            f"{len(model.groups)}; the files are of two runs."
        )
    tensors = {}
    for number, shapes in enumerate(model.groups):
        flat = ShardedTensor.concatenate([rank.groups[number] for rank in ranks], 0)
        need = sum(map(math.prod, shapes.values()))
        # DeepSpeed pads a group to a multiple of twice the ranks, and strips the padding in most of its versions.
        if not need <= flat.numel < need + 2 * len(ranks):
            raise CheckpointError(
                f"{model.file}: param_shapes has {need} elements in group {number}, the {len(ranks)} ranks hold "
                f"{flat.numel}; the files are of two runs, or a rank's weights were kept on NVMe."
            )
        sizes = [*map(math.prod, shapes.values()), flat.numel - need]
        for (name, shape), part in zip(shapes.items(), flat.split(sizes, 0), strict=False):
            tensors[name] = _shaped(part, name, shape, model.file)
    return tensors


def _zero3_masters(ranks: Sequence[_Partition], model: _Model) -> dict[str, ShardedTensor]:
    """Every weight by itself cut into as many parts as there are ranks."""
    shapes = model.shapes
    sizes = [-(-math.prod(shape) // len(ranks)) for shape in shapes.values()]
    parts = [ShardedTensor.concatenate(rank.groups, 0) for rank in ranks]
    for rank, flat in zip(ranks, parts, strict=True):
        if flat.numel != sum(sizes):
            raise CheckpointError(
                f"{rank.file}: holds {flat.numel} elements, its part of the weights in param_shapes of {model.file} is "
                f"{sum(sizes)}; the files are of two runs, or its weights were kept on NVMe."
            )
    of_ranks = zip(*(part.split(sizes, 0) for part in parts), strict=True)
    return {
        name: _shaped(ShardedTensor.concatenate(of_weight, 0), name, shape, model.file)
        for (name, shape), of_weight in zip(shapes.items(), of_ranks, strict=True)
    }


def _universal_masters(files: _Files, model: _Model) -> dict[str, ShardedTensor]:
    """A file for each weight, which ZeRO 3 leaves flat."""
    folder = files.folder / _UNIVERSAL
    known = {*model.shapes, *model.module}  # newer versions also write what no optimizer holds, from the model states
    unknown = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in known)
    if unknown:
        raise CheckpointError(f"{folder / unknown[0]}: is no weight of {model.file}; it would be lost.")
    return _universal_tensors(files, model, _MASTER)


def _universal_tensors(files: _Files, model: _Model, file: str) -> dict[str, ShardedTensor]:
    """What the files of one name hold, in each weight's folder."""
    tensors = {}
    for name, shape in model.shapes.items():
        if name != os.path.basename(name):
            raise CheckpointError(f"{model.file}: {name!r} of param_shapes is no name of a folder.")
        path = files.folder / _UNIVERSAL / name / file
        content = read_torch_file(path)
        if isinstance(content, dict):
            tensors[name] = ShardedTensor.of(_tensors({name: content.get("param")}, path, "param")[name])
        else:
            tensors[name] = _shaped(_flat(content, str(path)), name, shape, str(path))
    return tensors


# Adam's moments, which lie as the float32 weights do.


_BASE_STATE = {False: "base_optimizer_state", True: "optimizer_state_dict"}  # by: is it ZeRO 3?


def _adam(files: _Files, model: _Model) -> AdamMoments:
    if not model.shapes:
        raise CheckpointError(f"{model.file}: has no param_shapes, so that nothing says what the optimizer holds.")
    if not files.is_universal and not files.optimizers:
        raise CheckpointError(f"{files.folder}: holds no *_optim_states.pt, where the moments are; {_LOST}.")
    if files.is_universal:
        moments = {key: _universal_tensors(files, model, f"{key}.pt") for key in MOMENTS}
        steps = _universal_steps(files, model)
        settings: list[dict[str, Any]] = []
    else:
        layout = _zero3_masters if files.is_zero3 else _zero12_masters
        moments = {key: layout(_read_partitions(files, _moment_reader(key)), model) for key in MOMENTS}
        first = files.optimizers[min(files.optimizers)]
        steps = dict.fromkeys(model.shapes, _common_step(first, files.is_zero3))
        settings = _settings(first, files.is_zero3)
    if len(settings) != len(model.groups):
        settings = [{} for _ in model.groups]
    own = {name: hub_name(name) for name in model.shapes}
    return AdamMoments(
        moments={key: {own[name]: tensor for name, tensor in found.items()} for key, found in moments.items()},
        steps={own[name]: step for name, step in steps.items()},
        groups=[
            (group_settings, [own[name] for name in group])
            for group_settings, group in zip(settings, model.groups, strict=True)
        ],
    )


def _universal_steps(files: _Files, model: _Model) -> dict[str, float]:
    """The updates of each weight, in a file beside its moments; after ZeRO 3 of all in one."""
    folder = files.folder / _UNIVERSAL
    if all((folder / name / "step.pt").is_file() for name in model.shapes):
        paths = {name: folder / name / "step.pt" for name in model.shapes}
        return {name: _number(read_torch_file(path), path) for name, path in paths.items()}
    path = folder / "optimizer_state.pt"
    base = _read_dict(path).get(_BASE_STATE[True])
    states = base.get("state") if isinstance(base, dict) else None
    found = [entry.get("step") for entry in states.values() if isinstance(entry, dict)] if _are_numbered(states) else []
    if not isinstance(states, dict) or not found:
        raise CheckpointError(f"{path}: does not say how many steps the optimizer has made; {_LOST}.")
    return dict.fromkeys(model.shapes, _one_step((_number(step, path) for step in found), path))


def _adam_entries(path: Path, is_zero3: bool) -> list[Mapping[str, Any]]:
    """What Adam keeps of each of a rank's flat tensors, in their order."""
    base = _optimizer_state(path).get(_BASE_STATE[is_zero3])
    entries: Any = base  # a list of them where ZeRO was told to be elastic
    if isinstance(base, dict):
        states = base.get("state")
        entries = [states[index] for index in sorted(states)] if _are_numbered(states) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: has no {_BASE_STATE[is_zero3]} with a state for each group; {_LOST}.")
    odd = next((sorted(map(str, entry)) for entry in entries if not set(MOMENTS) <= entry.keys()), None)
    if odd is not None:
        raise CheckpointError(
            f"{path}: the optimizer's state is {', '.join(odd)}; only that of Adam and AdamW, exp_avg and exp_avg_sq, "
            "is converted."
        )
    return entries


def _are_numbered(states: Any) -> TypeGuard[dict[int, Any]]:
    return isinstance(states, dict) and all(type(index) is int for index in states)


def _moment_reader(key: str) -> Callable[[Path, bool], _Partition]:
    def read(path: Path, is_zero3: bool) -> _Partition:
        return _Partition(str(path), [_flat(entry[key], str(path)) for entry in _adam_entries(path, is_zero3)])

    return read


def _common_step(path: Path, is_zero3: bool) -> float:
    """The number of updates, which is one for all weights."""
    state, base = _optimizer_state(path), _optimizer_state(path).get(_BASE_STATE[is_zero3])
    groups = base.get("param_groups") if isinstance(base, dict) else None
    entries = _adam_entries(path, is_zero3)
    found = [entry["step"] for entry in entries if "step" in entry]
    # Fused optimizers keep it with the group, and elastic ZeRO beside both.
    found = found or [group["step"] for group in groups or () if isinstance(group, dict) and "step" in group]
    found = found or [state[key] for key in ("base_optimizer_state_step",) if key in state]
    return _one_step((_number(step, path) for step in found), path)


def _one_step(found: Iterable[float], path: Path) -> float:
    steps = set(found)
    if len(steps) != 1:
        raise CheckpointError(f"{path}: the optimizer's steps are {sorted(steps)}, expected one number.")
    return steps.pop()


def _number(value: Any, path: Path) -> float:
    """A number of updates, or a tensor of one."""
    if isinstance(value, dict):
        value = value.get("param")
    with FileReader() as reader:
        return float(read_count(plain_value(value, reader), f"{path}: step", most=MAX_STEPS, way_out=_LOST))


def _settings(path: Path, is_zero3: bool) -> list[dict[str, Any]]:
    """The plain settings of each group of the optimizer, if it says them."""
    base = _optimizer_state(path).get(_BASE_STATE[is_zero3])
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return []
    return [plain_settings(group) for group in groups]
