# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Adam's state in Megatron's `torch` format: float32 weights and moments of each tensor- and pipeline-parallel rank.

    model_optim_rng.pt   `optimizer`: torch's state, parameters numbered; with float32 weights beside it where the
                         model is of 16 bits. With a distributed optimizer only the settings of its groups
    distrib_optim.pt     what the distributed optimizer keeps: flat buffers over all data-parallel ranks

Neither names a parameter. The order in which a file lists its model's weights is that of the model's parameters, from
which Megatron makes groups and buffers (`flat_buffers`); shapes and sizes have to fit, and the float32 weights have to
be those that the model's were rounded from (`masters`).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.dtypes import FLOAT32, DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.numbers import plain_value, read_count
from ..checkpoint.plan import Shape, View
from ..checkpoint.reader import FileReader
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.torch_file import read_torch_file
from ..mapping import EMBED_TOKENS, LM_HEAD
from ..optimizer_state import DECOUPLED, MAX_STEPS, MOMENTS, plain_settings
from .checkpoint import AdamMoments, NativeCheckpoint, Replica
from .flat_buffers import FlatLayout, lay_out
from .model_parallel import LAYER, LOST, Chunk, Rank
from .table import MEGATRON, NativeWeight

MASTER = "param"  # what the distributed optimizer calls its float32 weights
LEAVE_OUT = "leave --optimizer and --fp32-master out"
_DISTRIBUTED_FILE = "distrib_optim.pt"
_STATE_KEYS = {*MOMENTS, "step", "master_param"}
_ADAM = ("adam", "adamw")
# What a run keeps beside its weights and its optimizer, and what it is in words.
LEFT_OUT = {
    "opt_param_scheduler": "learning-rate scheduler",
    "lr_scheduler": "learning-rate scheduler",
    "rng_state": "random states",
    "rerun_state_machine": "rerun state",
}


@dataclass(frozen=True)
class AdamParts:
    """Adam's state as ranks hold it.

    Args:
        parts: `exp_avg`, `exp_avg_sq` and, if the optimizer has weights of its own, `MASTER` -> chunks of every rank.
        groups: settings of the parameter groups, and the names of their weights with the layer's number in the stage,
            by place (stage, virtual stage), if the file says which they are.
        step: updates done.
        notes: what a user should know.
    """

    parts: Mapping[str, Sequence[Sequence[Chunk]]]
    groups: Sequence[Mapping[str, Any]]
    members: Sequence[Mapping[tuple[int, int], Sequence[str]]] | None
    step: float
    notes: Sequence[str]


# What both of Megatron's formats have in common.


def refuse_other_optimizers(args: Mapping[str, Any], where: str) -> None:
    """Stop at a run whose arguments name another optimizer than Adam.

    Raises:
        CheckpointError: they do.
    """
    name = args.get("optimizer")
    if isinstance(name, str) and name.lower() not in _ADAM:
        raise CheckpointError(
            f"{where}: the run's optimizer is {name!r}; only the state of Adam and AdamW is converted; {LEAVE_OUT}."
        )


def refuse_state_keys(keys: Iterable[str], where: str) -> None:
    """Stop at a state that is not Adam's: a moment too few, or something that Adam does not keep.

    Raises:
        CheckpointError: it is not.
    """
    found = set(keys)
    if not set(MOMENTS) <= found <= _STATE_KEYS:
        listed = ", ".join(sorted(found)[:8])[:200] or "empty"
        raise CheckpointError(
            f"{where}: the optimizer's state is {listed}; only that of Adam and AdamW, exp_avg and exp_avg_sq, is "
            f"converted; {LEAVE_OUT}."
        )


def no_optimizer(where: str) -> CheckpointError:
    """What to raise where there is no optimizer at all."""
    return CheckpointError(f"{where}: holds no optimizer (saved with --no-save-optim, or converted); {LEAVE_OUT}.")


def chained(count: int, where: str) -> CheckpointError:
    """What to raise where several optimizers share the weights."""
    return CheckpointError(
        f"{where}: holds {count} optimizers in a chain (Muon beside Adam, or "
        f"--overlap-param-gather-with-optimizer-step); only one Adam for all weights is converted; {LEAVE_OUT}."
    )


def left_out(content: Mapping[str, Any], optimizer: Any, args: Mapping[str, Any]) -> list[str]:
    """Notes on what a run keeps for training on and what an optimizer.pt has no place for."""
    keys = {str(key).split("/")[0] for key in content}
    found = dict.fromkeys(words for key, words in LEFT_OUT.items() if key in keys and not _is_unused(content.get(key)))
    if isinstance(optimizer, Mapping) and "grad_scaler" in optimizer:
        found["loss scale"] = None
    notes = []
    if found:
        notes.append(f"Of the run's state for training on, these were not converted: {', '.join(found)}.")
    if args.get(DECOUPLED) is False:
        notes.append(
            "The run's Adam added weight decay to the gradients (no decoupled_weight_decay): its moments hold it too."
        )
    return notes


def _is_unused(schedule: Any) -> bool:
    """Whether it is a schedule that has seen no step, as that in whose place a run lays out its own."""
    return isinstance(schedule, Mapping) and type(schedule.get("num_steps")) is int and schedule["num_steps"] == 0


def _read_step(value: Any, where: str) -> float:
    """A number of updates, or a tensor of one."""
    with FileReader() as reader:
        return float(read_count(plain_value(value, reader), f"{where}: step", most=MAX_STEPS, way_out=LEAVE_OUT))


def one_step(found: Iterable[Any], where: str) -> float:
    """The number of updates, which is one for all weights.

    Raises:
        CheckpointError: they differ, there is none, or one is no number of updates.
    """
    steps = {_read_step(value, where) for value in found}
    if len(steps) != 1:
        listed = ", ".join(f"{step:g}" for step in sorted(steps)) or "none"
        raise CheckpointError(f"{where}: the optimizer's steps are {listed}, expected one number; {LEAVE_OUT}.")
    return steps.pop()


def is_outer(line: NativeWeight) -> bool:
    """Whether a weight is the embedding or the head, which may have a learning rate of their own."""
    return line.hub[0] in (EMBED_TOKENS.name, LM_HEAD.name)


def settings_of(groups: Any, where: str) -> list[dict[str, Any]]:
    """The plain settings of each parameter group, without its step.

    Raises:
        CheckpointError: there are no groups.
    """
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{where}: the optimizer has no param_groups; {LOST}.")
    return [{key: value for key, value in plain_settings(group).items() if key != "step"} for group in groups]


def with_decay(groups: Iterable[Mapping[str, Any]], args: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of groups, with how the run's arguments say that it decays; a group's own word goes first.

    Transformer Engine's and Apex's groups do not say it, and what reads the state would take it for AdamW's.
    """
    said = args.get(DECOUPLED)
    return [{DECOUPLED: said, **group} if isinstance(said, bool) else group for group in groups]


def group_by_rule(
    settings: Sequence[Mapping[str, Any]], kinds: Mapping[str, tuple[bool, bool]]
) -> list[list[str]] | None:
    """Which weights each parameter group has, where a file says it of none.

    Megatron decays matrices and not vectors, and may give the embedding and the head a learning rate of their own.

    Args:
        settings: of each group.
        kinds: of each weight, whether it is a vector, and whether it is the embedding or the head.

    Returns:
        The names of each group; None if the settings do not say it.
    """
    members: list[list[str]] = [[] for _ in settings]
    for name, (is_vector, is_outer_weight) in kinds.items():
        fits = [number for number, group in enumerate(settings) if _is_undecayed(group) == is_vector]
        if len(settings) == 1:
            fits = [0]
        elif len(fits) > 1:
            fits = [number for number in fits if _is_decoupled(settings[number]) == is_outer_weight]
        if len(fits) != 1:
            return None
        members[fits[0]].append(name)
    return members


def _is_undecayed(group: Mapping[str, Any]) -> bool:
    factor = group.get("wd_mult", group.get("pre_wd_mult"))
    return bool((group.get("weight_decay") if factor is None else factor) == 0)


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("is_decoupled_lr")) or group.get("default_config") is False


def with_adam(
    run: NativeCheckpoint,
    moments: Mapping[str, Mapping[str, ShardedTensor]],
    masters: Mapping[str, ShardedTensor] | None,
    *,
    step: float,
    settings: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[str]] | None,
    replicas: Sequence[Replica],
    notes: Sequence[str],
    fp32_master: bool,
    adam: bool,
) -> NativeCheckpoint:
    """A run with the state of its optimizer, all of it by the native names of whole tensors.

    Args:
        run: the run.
        moments: `exp_avg` and `exp_avg_sq` -> by name.
        masters: the optimizer's weights, if it has its own.
        step: updates done.
        settings: of each parameter group.
        members: the weights of each group; by the rule that Megatron has unless given.
        replicas: copies of all these that ranks kept.
        notes: what a user should know.
        fp32_master: take the optimizer's weights.
        adam: take the moments.

    Raises:
        CheckpointError: a weight lacks something, or something has another shape; or there are no float32 weights.
    """
    table = run.table or MEGATRON
    check_all_there({**moments, **({MASTER: masters} if masters else {})}, run.tensors, run.folder)
    taken = run.tensors
    if fp32_master and masters:
        taken = {name: masters[name] for name in run.tensors}
    narrow = next((name for name, tensor in taken.items() if tensor.dtype != FLOAT32), None)
    if fp32_master and narrow:
        raise CheckpointError(
            f"{run.folder}: the optimizer has no float32 weights: what there is of {narrow} is {taken[narrow].dtype}; "
            "leave --fp32-master out."
        )
    state: AdamMoments | None = None
    more: list[str] = []
    if adam:
        groups, more = _groups(settings, members, run.tensors, table)
        state, more = _adam_moments(moments, step, groups, table), [*more, *notes]
    return replace(
        run,
        tensors=taken,
        dtype=FLOAT32 if fp32_master else run.dtype,
        replicas=[*run.replicas, *replicas],
        notes=[*run.notes, *more],
        adam=state,
        masters={name: (masters[name], weight) for name, weight in run.tensors.items()} if masters else {},
    )


def named_copies(key: str, found: Iterable[Replica]) -> list[Replica]:
    """Copies of one kind of state, for messages called after it."""
    return [replace(copy, name=f"{_in_words(key)} of {copy.name}") for copy in found]


def _in_words(key: str) -> str:
    return "the float32 weight" if key == MASTER else key


def _groups(
    settings: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[str]] | None,
    weights: Mapping[str, ShardedTensor],
    table: Sequence[NativeWeight],
) -> tuple[list[tuple[Mapping[str, Any], Sequence[str]]], list[str]]:
    """The parameter groups, and a note where which weights are in which is not known."""
    lines = {line.name: line for line in table}
    if members is None:
        known = {name: lines.get(LAYER.sub("{}", name)) for name in weights}  # what is in no table is refused later
        kinds = {
            name: (len(weights[name].shape) == 1, is_outer(line)) for name, line in known.items() if line is not None
        }
        members = group_by_rule(settings, kinds)
    if members is None:
        note = (
            f"The settings of the {len(settings)} parameter groups (learning rate, weight decay, ...) were left out: "
            "they do not say which weights are in which."
        )
        penalised = any(group.get(DECOUPLED) is False and group.get("weight_decay") for group in settings)
        return [({DECOUPLED: False} if penalised else {}, list(weights))], [note]
    return [(own, group) for own, group in zip(settings, members, strict=True) if group], []


def _adam_moments(
    moments: Mapping[str, Mapping[str, ShardedTensor]],
    step: float,
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
    table: Sequence[NativeWeight],
) -> AdamMoments:
    """What the plan of an optimizer.pt takes: groups and steps by the Hub's names."""
    lines = {line.name: line for line in table}
    named = [(settings, [hub for name in names for hub in _hub_names(name, lines)]) for settings, names in groups]
    steps = {hub: step for name in moments[MOMENTS[0]] for hub in _hub_names(name, lines)}
    return AdamMoments(moments, steps, named)


def _hub_names(name: str, lines: Mapping[str, NativeWeight]) -> list[str]:
    """The Hub tensors that a native one holds; with biases on q, k and v also o's, which Megatron has not."""
    layer, line = LAYER.search(name), lines.get(LAYER.sub("{}", name))
    names = [hub.format(layer and layer[0]) for hub in line.hub] if line else []
    return names + [hub.replace("q_proj.bias", "o_proj.bias") for hub in names if hub.endswith("q_proj.bias")]


def check_all_there(found: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Any], where: str) -> None:
    """Every weight has every moment, and its float32 weight if any has, in its shape.

    Raises:
        CheckpointError: one has not; names both.
    """
    for key, tensors in found.items():
        for name, weight in weights.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{where}: the optimizer has no {_in_words(key).removeprefix('the ')} of {name}: it was not "
                    f"trained, or is lost; {LEAVE_OUT}."
                )
            if tensors[name].shape != weight.shape:
                raise CheckpointError(
                    f"{where}: {_in_words(key)} of {name} has shape {tensors[name].shape}, the weight {weight.shape}; "
                    "the optimizer is of another run."
                )


# The files of the `torch` format.

_Key = tuple[int, str]  # of a parameter of a rank: its virtual stage, and its name there


def read_adam_parts(
    ranks: Sequence[Rank],
    chunks: Sequence[Sequence[Chunk]],
    args: Mapping[str, Any],
    table: Sequence[NativeWeight],
) -> AdamParts:
    """Adam's state of every rank of a run in `torch` format; no tensor is loaded.

    Args:
        ranks: of the run.
        chunks: the weights of each, in the files' order.
        args: the run's arguments.
        table: what the names of weights mean.

    Raises:
        CheckpointError: there is none, it is not Adam's, or it does not fit the weights.
    """
    refuse_other_optimizers(args, ranks[0].file)
    lines = {line.name: line for line in table}
    read = [
        _read_rank(rank, own, args, lines, 1 + max(r.pipeline for r in ranks))
        for rank, own in zip(ranks, chunks, strict=True)
    ]
    for rank, found in zip(ranks, read, strict=True):
        if found.step != read[0].step:
            raise CheckpointError(
                f"{rank.file}: the optimizer's step is {found.step:g}, in {ranks[0].file} it is {read[0].step:g}; the "
                "files are of two runs."
            )
        if found.parts.keys() != read[0].parts.keys():
            raise CheckpointError(
                f"{rank.file}: the optimizer holds {', '.join(found.parts)}, in {ranks[0].file} it holds "
                f"{', '.join(read[0].parts)}; the files are of two runs."
            )
    groups, members = _merge_groups(ranks, read)
    return AdamParts(
        parts={key: [found.parts[key] for found in read] for key in read[0].parts},
        groups=with_decay(groups, args),
        members=members,
        step=read[0].step,
        notes=left_out(ranks[0].content, ranks[0].content["optimizer"], args),
    )


@dataclass(frozen=True)
class _RankState:
    """One rank's state: parts by moment, chunk by chunk; the settings of its groups, and what is in each."""

    parts: Mapping[str, Sequence[Chunk]]
    settings: Sequence[Mapping[str, Any]]
    members: Sequence[Sequence[_Key]] | None
    step: float


def _merge_groups(
    ranks: Sequence[Rank], read: Sequence[_RankState]
) -> tuple[list[Mapping[str, Any]], list[dict[tuple[int, int], list[str]]] | None]:
    """The groups of all ranks: those of equal settings are one."""
    settings: list[Mapping[str, Any]] = []
    members: list[dict[tuple[int, int], list[str]]] = []
    for rank, found in zip(ranks, read, strict=True):
        for number, own in enumerate(found.settings):
            if own not in settings:
                settings.append(own)
                members.append({})
            if found.members is not None and rank.tensor == 0:
                for virtual, name in found.members[number]:
                    members[settings.index(own)].setdefault((rank.pipeline, virtual), []).append(name)
    return settings, members if all(found.members is not None for found in read) else None


def _read_rank(
    rank: Rank, chunks: Sequence[Chunk], args: Mapping[str, Any], lines: Mapping[str, NativeWeight], stages: int
) -> _RankState:
    saved = rank.content.get("optimizer")
    if saved is None:
        raise no_optimizer(rank.file)
    if isinstance(saved, list):
        raise chained(len(saved), rank.file)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{rank.file}: optimizer is a {type(saved).__name__}, expected a dict; {LEAVE_OUT}.")
    found = saved.get("optimizer", saved.get("optimizer_state_dict", saved))
    inner: dict[str, Any] = found if isinstance(found, dict) else {}
    groups: Any = inner.get("param_groups")
    settings = settings_of(groups, rank.file)
    if "state" in inner:
        return _read_numbered(rank, chunks, lines, saved, inner, settings)
    parts = _read_distributed(rank, chunks, args, lines, stages)
    steps = [group["step"] for group in groups if group.get("step") is not None]
    return _RankState(parts, settings, None, one_step(steps, rank.file))


# Without a distributed optimizer: torch's own state.


def _read_numbered(
    rank: Rank,
    chunks: Sequence[Chunk],
    lines: Mapping[str, NativeWeight],
    saved: Mapping[str, Any],
    inner: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
) -> _RankState:
    state, groups = inner["state"], inner["param_groups"]
    where = rank.file
    numbers = [group.get("params") for group in groups]
    if not isinstance(state, dict) or not all(
        isinstance(own, list) and all(type(number) is int for number in own) for own in numbers
    ):
        raise CheckpointError(f"{where}: the optimizer has no state by number, or groups without params; {LEAVE_OUT}.")
    for entry in state.values():
        refuse_state_keys(map(str, entry) if isinstance(entry, dict) else (), where)
    members = _match_groups(rank, numbers, state, chunks, lines)
    weights = {(virtual, name): weight for virtual, chunk in enumerate(chunks) for name, weight in chunk.items()}
    parts: dict[str, list[dict[str, ShardedTensor]]] = {key: [{} for _ in chunks] for key in MOMENTS}
    for own, keys in zip(numbers, members, strict=True):
        for number, (virtual, name) in zip(own, keys, strict=True):
            if number not in state:
                raise CheckpointError(
                    f"{where}: the optimizer has no moments of {name}: it was not trained; {LEAVE_OUT}."
                )
            for key in MOMENTS:
                parts[key][virtual][name] = _plain(state[number][key], weights[virtual, name].shape, where, key, name)
    masters = saved.get("fp32_from_fp16_params", saved.get("fp32_from_fp16"))
    if masters is not None:
        counts = [len(own) if isinstance(own, list) else None for own in masters] if isinstance(masters, list) else None
        if counts != [len(own) for own in numbers]:
            raise CheckpointError(
                f"{where}: the optimizer has float32 copies of {counts} weights in its groups, which have "
                f"{[len(own) for own in numbers]}: some weights are of 16 bits and some not; {LEAVE_OUT}."
            )
        parts[MASTER] = [{} for _ in chunks]
        for own, keys in zip(masters, members, strict=True):
            for value, (virtual, name) in zip(own, keys, strict=True):
                shape = weights[virtual, name].shape
                parts[MASTER][virtual][name] = _plain(value, shape, where, "float32 weight", name)
    steps = [entry["step"] for entry in state.values() if "step" in entry]
    steps = steps or [group["step"] for group in groups if group.get("step") is not None]
    return _RankState(parts, settings, members, one_step(steps, where))


def _plain(value: Any, shape: Shape, where: str, key: str, name: str) -> ShardedTensor:
    if not isinstance(value, View):
        raise CheckpointError(f"{where}: {key} of {name} is a {type(value).__name__}, expected a plain tensor.")
    if value.shape != shape:
        raise CheckpointError(f"{where}: {key} of {name} has shape {value.shape}, the weight {shape}; {LEAVE_OUT}.")
    return ShardedTensor.of(value)


def _match_groups(
    rank: Rank,
    numbers: Sequence[Sequence[int]],
    state: Mapping[int, Any],
    chunks: Sequence[Chunk],
    lines: Mapping[str, NativeWeight],
) -> list[list[_Key]]:
    """Which weight each numbered parameter is.

    Megatron makes groups of vectors and matrices, of the embedding and the head and what is inside, and keeps the
    model's order in each. Of the ways to put these kinds into the groups that are there, one has to fit all shapes.
    """
    weights = [((virtual, name), weight) for virtual, chunk in enumerate(chunks) for name, weight in chunk.items()]
    counted = sum(map(len, numbers))
    if counted != len(weights):
        raise CheckpointError(
            f"{rank.file}: the optimizer has {counted} parameters, the model {len(weights)} weights: some were not "
            f"trained; {LEAVE_OUT}."
        )
    kinds = {key: (len(weight.shape) == 1, is_outer(lines[LAYER.sub("{}", key[1])])) for key, weight in weights}
    shapes = [[_shape(state.get(number)) for number in own] for own in numbers]
    of, present = dict(weights), sorted(set(kinds.values()))
    filled = [number for number, own in enumerate(numbers) if own]
    found: list[list[list[_Key]]] = []
    # Each kind goes into one group, so that there are no more groups than kinds, of which there are four.
    for choice in itertools.product(filled if len(filled) <= len(present) else (), repeat=len(present)):
        to = dict(zip(present, choice, strict=True))
        members: list[list[_Key]] = [[] for _ in numbers]
        for key in of:
            members[to[kinds[key]]].append(key)
        if all(
            len(keys) == len(own) and all(shape in (None, of[key].shape) for key, shape in zip(keys, own, strict=True))
            for keys, own in zip(members, shapes, strict=True)
        ):
            found.append(members)
    if len(found) != 1:
        sizes = [len(own) for own in numbers]
        raise CheckpointError(
            f"{rank.file}: {'no way' if not found else 'more than one way'} of sorting the {len(weights)} weights into "
            f"the optimizer's groups of {sizes} fits the shapes of their moments; {LEAVE_OUT}."
        )
    return found[0]


def _shape(entry: Any) -> Shape | None:
    view = entry.get(MOMENTS[0]) if isinstance(entry, dict) else None
    return view.shape if isinstance(view, View) else None


# With one: flat buffers.


@dataclass(frozen=True)
class FlatRank:
    """What decides how a rank's distributed optimizer lays out its buffers.

    Args:
        pipeline: its stage.
        stages: number of stages.
        chunks: its weights, virtual stage by virtual stage, in the order of the model's parameters.
        args: the run's arguments.
        lines: the table, by name.
        where: what to call its buffers in errors.
    """

    pipeline: int
    stages: int
    chunks: Sequence[Chunk]
    args: Mapping[str, Any]
    lines: Mapping[str, NativeWeight]
    where: str

    def alone(self, names: Sequence[str]) -> set[int]:
        """Numbers of the weights that two stages of a tied model share, which have buckets of their own."""
        if self.stages == 1 or self.args.get("untie_embeddings_and_output_weights") is not False:
            return set()
        return {number for number, name in enumerate(names) if is_outer(self.lines[LAYER.sub("{}", name)])}


def _read_distributed(
    rank: Rank, chunks: Sequence[Chunk], args: Mapping[str, Any], lines: Mapping[str, NativeWeight], stages: int
) -> dict[str, list[Chunk]]:
    path = Path(rank.file).with_name(_DISTRIBUTED_FILE)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: is missing, and {Path(rank.file).name} has only the settings of its distributed optimizer; "
            f"{LOST}, or {LEAVE_OUT}."
        )
    content = read_torch_file(path)
    if isinstance(content, list):
        raise chained(len(content), str(path))
    return read_coalesced(content, FlatRank(rank.pipeline, stages, chunks, args, lines, str(path)))


def read_coalesced(content: Any, flat: FlatRank) -> dict[str, list[Chunk]]:
    """The parts of each weight in the buffers that a rank's distributed optimizer was gathered into.

    Args:
        content: of `distrib_optim.pt`.
        flat: the rank.

    Raises:
        CheckpointError: it is not what megatron-core writes today, or does not fit the weights.
    """
    if not isinstance(content, dict) or content.get("buckets_coalesced") is not True:
        raise CheckpointError(
            f"{flat.where}: holds no coalesced buffers, as megatron-core writes them today; load it with a newer "
            f"Megatron and save it again, or {LEAVE_OUT}."
        )
    refuse_precision_aware(flat.args, flat.where)
    buffers = [content[key] for key in sorted(key for key in content if type(key) is int)]
    expected = [
        (virtual, dtype)
        for virtual, chunk in enumerate(flat.chunks)
        for dtype in dict.fromkeys(weight.dtype for weight in chunk.values())
    ]
    if len(buffers) != len(expected):
        raise CheckpointError(
            f"{flat.where}: has {len(buffers)} buffers, the model's {len(flat.chunks)} virtual stages make "
            f"{len(expected)}; {LEAVE_OUT}."
        )
    parts: dict[str, list[dict[str, ShardedTensor]]] = {key: [{} for _ in flat.chunks] for key in (*MOMENTS, MASTER)}
    for buffer, (virtual, dtype) in zip(buffers, expected, strict=True):
        tensors = _buffer(buffer, dtype, flat.where)
        weights = {name: weight for name, weight in flat.chunks[virtual].items() if weight.dtype == dtype}
        names = list(reversed(weights))
        layout = _fit([weights[name].numel for name in names], names, tensors[MASTER].numel, virtual, flat)
        for key, view in tensors.items():
            for name, (start, end) in zip(names, layout.ranges(), strict=True):
                parts[key][virtual][name] = shaped(ShardedTensor.of(view)[start:end], weights[name].shape)
    return {key: list(own) for key, own in parts.items()}


def refuse_precision_aware(args: Mapping[str, Any], where: str) -> None:
    """Stop where flat buffers cannot be checked against the weights.

    Raises:
        CheckpointError: the run kept its float32 weights otherwise.
    """
    if args.get("use_precision_aware_optimizer"):
        raise CheckpointError(
            f"{where}: the run's --use-precision-aware-optimizer keeps float32 weights in parts, so that nothing "
            f"proves which weight lies where in its buffers; save with --dist-ckpt-optim-fully-reshardable, or "
            f"{LEAVE_OUT}."
        )


def shaped(flat: ShardedTensor, shape: Shape) -> ShardedTensor:
    """A flat tensor in the shape of a weight."""
    return flat.unflatten(0, shape) if len(shape) != 1 else flat


def _buffer(buffer: Any, dtype: DType, where: str) -> dict[str, View]:
    """The flat tensors of a buffer: moments and weights, of one length."""
    kinds = list(buffer) if isinstance(buffer, dict) else []
    if len(kinds) != 1 or not isinstance(kinds[0], tuple) or kinds[0][:1] != (dtype,):
        raise CheckpointError(
            f"{where}: a buffer is of {', '.join(map(str, kinds)) or 'nothing'}, expected one of {dtype} weights."
        )
    tensors = buffer[kinds[0]]
    keys = (
        {str(key) for key in tensors if key not in ("numel_unpadded", MASTER)} if isinstance(tensors, dict) else set()
    )
    refuse_state_keys(keys, where)
    flat = {key: tensors.get(key) for key in (*MOMENTS, MASTER)}
    for key, view in flat.items():
        if not isinstance(view, View) or not view.is_contiguous or view.shape != (tensors.get("numel_unpadded"),):
            found = view.shape if isinstance(view, View) else type(view).__name__
            raise CheckpointError(
                f"{where}: {key} is {found}, expected a flat tensor of {tensors.get('numel_unpadded')} elements; "
                f"{LOST}."
            )
    return {key: view for key, view in flat.items() if isinstance(view, View)}


def _fit(sizes: Sequence[int], names: Sequence[str], numel: int, virtual: int, flat: FlatRank) -> FlatLayout:
    """The layout of a buffer of that length, with the run's buckets or with one."""
    total = sum(weight.numel for chunk in flat.chunks for weight in chunk.values())
    bucket_size = None if virtual or flat.pipeline else bucket_elements(flat.args, total)
    alone = flat.alone(names)
    layouts = [lay_out(sizes, alone=alone, bucket_size=size) for size in dict.fromkeys((bucket_size, None))]
    for layout in layouts:
        if sum(layout.buckets) == numel:
            return layout
    raise CheckpointError(
        f"{flat.where}: a buffer has {numel} elements, the {len(sizes)} weights that lie in it and what pads them make "
        f"{sum(layouts[0].buckets)}; the file is of another run."
    )


def bucket_elements(args: Mapping[str, Any], parameters: int) -> int | None:
    """Elements after which a bucket of the first stage is full, by the run's arguments; None if there is only one.

    Args:
        args: of the run.
        parameters: elements of all weights of the rank.
    """
    if not args.get("overlap_grad_reduce") or args.get("overlap_param_gather_with_optimizer_step"):
        return None
    count, size = args.get("ddp_num_buckets"), args.get("ddp_bucket_size")
    if isinstance(count, int) and count > 0:
        return parameters // count
    if isinstance(size, int) and size > 0:
        return size
    model_parallel = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = math.prod(args.get(name) or 1 for name in model_parallel)
    world = args.get("world_size")
    data_parallel = args.get("data_parallel_size") or (world // ranks if isinstance(world, int) else 1)
    return max(40_000_000, 1_000_000 * data_parallel)
