# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of Adam's state as torch.save keeps it, the counterpart of `optimizer_state.py`; nothing is executed."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .architecture import Architecture
from .checkpoint.errors import CheckpointError
from .checkpoint.manifest import read_manifest, sample_digest
from .checkpoint.numbers import plain_value, read_count, shown
from .checkpoint.plan import View
from .checkpoint.reader import FileReader
from .checkpoint.strict_json import read_json_object
from .checkpoint.torch_file import read_torch_file
from .mapping import weights
from .masked import is_masked, split_masked_config
from .optimizer_state import MAX_STEPS, MOMENTS, OPTIMIZER_FILE, check_is_adam, check_settings, parameter_names
from .parameter_kinds import group_names
from .saved_files import check_saved_files

TRAINER_STATE = "trainer_state.json"  # what transformers' Trainer leaves in a checkpoint beside the rest
# What torch's AdamW of today has in a group beside rate, betas, eps and decay, with the values of a state that does not
# say it: a loader asks for each by name.
ADAMW_UNSAID = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_CONFIG = "config.json"
_FACTORS = {
    "embedding_scale": "the factor on the embeddings",
    "logit_scale": "the factor on the logits",
    "rms_norm_eps": "rms_norm_eps",
}
_LAYOUT = {"state": dict, "param_groups": list}
_NAMES = ("params", "param_names")
_DAMAGED = "the file is damaged, or of another optimizer"
# What other savers leave in a checkpoint instead, for the message.
_SHARDED = {
    "optimizer_0": "FSDP's sharded state",
    "latest": "DeepSpeed's state",
    "distrib_optim.pt": "Megatron's distributed state",
}


@dataclass(frozen=True)
class AdamState:
    """Adam's state in a file, by the names of the parameters; the moments are not loaded.

    Args:
        file: its path.
        groups: the parameter groups: their settings, without `params`, and the names of their parameters.
        steps: name -> updates done.
        moments: name -> (first moment, second moment).
    """

    file: str
    groups: tuple[tuple[dict[str, Any], tuple[str, ...]], ...]
    steps: dict[str, float]
    moments: dict[str, tuple[View, View]]


def read_adam_state(path: str | os.PathLike[str], architecture: Architecture, *, as_recorded: bool = True) -> AdamState:
    """Read the Adam or AdamW state that transformers' Trainer or torch.save wrote; nothing in it is executed.

    Such a file numbers the parameters. Which is which follows from the order of the model's parameters and from its
    groups: Trainer's (with and without weight decay), those of `growth.training.mup`, or one; every shape is checked.

    Args:
        path: the file, or the folder that holds it as optimizer.pt.
        architecture: of the model it belongs to.
        as_recorded: whether it has to be what the record in its folder knows.

    Raises:
        CheckpointError: there is no such file, it is not the state of Adam for that architecture, it is not the one
            that the record knows, or it lies beside a model with other multipliers, or with masks that still rise.
    """
    sizes = {name: weight.shape(architecture) for name, weight, _ in weights(architecture)}
    shapes = {name: sizes[name] for name in parameter_names(architecture)}
    file = _find_file(Path(path))
    state = _read(file, shapes, whose="config.json says", must_name=False)
    if as_recorded:
        check_recorded_state(file)
    _check_model_beside(file, architecture)
    return state


def _check_model_beside(file: str, architecture: Architecture) -> None:
    """Check that the model beside a state, if one is there, has the weights that the state is to be of.

    Sizes do not tell: multipliers that were folded into weights, and masks that were, change the weights alone.

    Raises:
        CheckpointError: it computes with other factors, or its masks still rise.
    """
    path = Path(file).parent / _CONFIG
    config: dict[str, Any] = {}
    with suppress(CheckpointError):  # of a folder that is no model's, nothing is known
        config = read_json_object(path, nan=True)
    where, way_out = f"{file}: {_CONFIG} beside it", "grow the model that is there, or leave --optimizer out."
    if is_masked(config):
        config, masks = split_masked_config(config, str(path))
        if masks["step"] < masks["total_steps"]:
            raise CheckpointError(
                f"{where} is of masks at step {masks['step']} of {masks['total_steps']}, which `teleflm fold` "
                "multiplied into the weights, and its moments are of those from before; raise the masks to the end and "
                "fold again, or leave --optimizer out."
            )
    try:
        beside = Architecture.from_config(config, str(path), with_biases=True)
    except CheckpointError:
        return
    for name in ("embedding_scale", "logit_scale", "rms_norm_eps"):
        own, other = getattr(architecture, name), getattr(beside, name)
        if not math.isclose(own, other, rel_tol=1e-12):
            raise CheckpointError(
                f"{where} has {_FACTORS[name]} {other:.12g}, and the model {own:.12g}, so its moments are of other "
                f"weights; {way_out}"
            )


def read_grown_state(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]], *, as_recorded: bool = True
) -> AdamState:
    """Read a state that names its parameters, as `write_adam_state` writes it; nothing in it is executed.

    Args:
        path: the file.
        shapes: of the parameters of the model it is for, by name.
        as_recorded: whether it has to be what the record in its folder knows.

    Raises:
        CheckpointError: there is no such file, it does not name its parameters, they are another model's, or it is not
            the one that the record knows.
    """
    file = _find_file(Path(path))
    state = _read(file, shapes, whose="the model has", must_name=True)
    if as_recorded:
        check_recorded_state(file)
    return state


def check_recorded_state(file: str | os.PathLike[str]) -> None:
    """Check that a state is the one that the record in its folder knows, if that knows one.

    Of a folder that the engine wrote that is its record; of a checkpoint that a run of ours saved, what the run noted
    (`saved_files`).

    Raises:
        CheckpointError: it was exchanged, or edited, since the record was written.
    """
    path = Path(file)
    check_saved_files(path.parent)
    record = read_manifest(path.parent)
    files = (record or {}).get("files")
    entry = files.get(path.name) if isinstance(files, dict) else None
    if not isinstance(entry, dict) or "samples" not in entry:
        return
    size = path.stat().st_size
    if size == entry.get("bytes") and sample_digest(path) == entry["samples"]:
        return
    how = f"{size} bytes, expected {entry.get('bytes')}" if size != entry.get("bytes") else "other content"
    raise CheckpointError(
        f"{path}: has {how}, so it is not what the record says was written with the weights; restore it, or leave "
        "it out."
    )


def check_trainer_step(folder: Path, where: str, steps: Mapping[str, float]) -> int:
    """The step of a Trainer's checkpoint, checked against that of the optimizer beside it.

    Args:
        folder: of the checkpoint.
        where: the state, for errors.
        steps: name of a parameter -> updates that the optimizer says it had.

    Raises:
        CheckpointError: the two are not of one step.
    """
    path = folder / TRAINER_STATE
    state = read_json_object(path, nan=True)
    again = "copy the checkpoint again"
    step = read_count(state.get("global_step"), f"{path}: global_step", way_out=again)
    first = read_count(_first_step(state.get("stateful_callbacks")), f"{path}: first_step of AdamStart", way_out=again)
    expected = step + first
    found = set(steps.values())
    # In float16 a step whose gradients overflow leaves the weights and the optimizer as they are.
    fits = found == {expected} or ((folder / "scaler.pt").is_file() and max(found) <= expected)
    if not fits:
        raise CheckpointError(
            f"{where}: Adam is at step {' to '.join(f'{value:g}' for value in sorted({min(found), max(found)}))}, "
            f"{path} says {expected:g}, so the two are of different checkpoints; put back the optimizer of this one."
        )
    return step


def _first_step(callbacks: Any) -> Any:
    """At which of its steps Adam was when the run began, as `teleflm train` records it; else 0."""
    match callbacks:
        case {"AdamStart": {"attributes": {"first_step": first}}} if first is not None:
            return first
    return 0


def check_gradients_alone(state: AdamState) -> None:
    """Check that moments are of gradients alone, which is what follows the weights when these are scaled.

    Adam with a penalty adds `weight_decay` times the weight to the gradient, which grows by another factor; the sum of
    the two by none.

    Raises:
        CheckpointError: a group says that its decay is not decoupled, and not that it has none; the message names it.
    """
    for number, (settings, _) in enumerate(state.groups):
        decay = settings.get("weight_decay")
        if settings.get("decoupled_weight_decay") is False and decay != 0:
            said = "no weight_decay" if decay is None else f"weight_decay {decay:g}"
            raise CheckpointError(
                f"{state.file}: parameter group {number} has decoupled_weight_decay False and {said}: Adam then adds "
                "the decay to the gradients, and its moments hold both, which no factor grows; leave --optimizer out "
                "and warm up."
            )


def decay_notes(state: AdamState) -> list[str]:
    """A note on the groups that decay and do not say how, which an export writes as AdamW's (`ADAMW_UNSAID`)."""
    silent = [
        str(number)
        for number, (settings, _) in enumerate(state.groups)
        if "decoupled_weight_decay" not in settings and settings.get("weight_decay")
    ]
    if not silent:
        return []
    return [
        f"{OPTIMIZER_FILE} does not say whether the weight decay of group {', '.join(silent)} is decoupled; it was "
        "taken for AdamW's, decoupled_weight_decay True. Of a plain Adam, whose decay goes into the gradients, it is "
        "False."
    ]


def check_resumed_state(file: str | os.PathLike[str]) -> None:
    """Check the numbers of a state that a Trainer is to load, if it is Adam's: its settings, and its steps.

    Of other optimizers, whose settings may be anything, the groups alone are looked at.

    Raises:
        CheckpointError: it cannot be read, or has a number that no Adam has; the message names it.
    """
    path = str(file)
    saved = _read_file(path)
    groups, entries = _groups_of(path, saved), saved["state"]
    if not any(isinstance(entry, dict) and entry.keys() >= {*MOMENTS, "step"} for entry in entries.values()):
        return
    with FileReader() as reader:
        for number, group in enumerate(groups):
            plain = {key: value for key, value in group.items() if key not in _NAMES}
            check_settings(_plain_settings(plain, reader), f"{path}: parameter group {number}", others=True)
        for index, entry in entries.items():
            if isinstance(entry, dict) and "step" in entry:
                _read_step(entry["step"], f"{path}: step of parameter {shown(index)}", reader)


def _read(file: str, shapes: Mapping[str, tuple[int, ...]], *, whose: str, must_name: bool) -> AdamState:
    """Read a state of parameters with these shapes, in the order in which the model lists them."""
    saved = _read_file(file)
    groups = _name_groups(file, _groups_of(file, saved), list(shapes), must_name=must_name)

    steps: dict[str, float] = {}
    moments: dict[str, tuple[View, View]] = {}
    with FileReader() as reader:
        for (_, names), group in zip(groups, saved["param_groups"], strict=True):
            for name, index in zip(names, group["params"], strict=True):
                entry = saved["state"].get(index)
                moments[name] = _moments(file, name, entry, shapes[name], whose)
                steps[name] = _read_step(entry["step"], f"{file}: step of {name}", reader)
        settled = tuple((_plain_settings(settings, reader), names) for settings, names in groups)
    for number, (settings, _) in enumerate(settled):
        check_settings(settings, f"{file}: parameter group {number}")
        check_is_adam(settings, f"{file}: parameter group {number}")
    return AdamState(file, settled, steps, moments)


def _read_file(file: str) -> dict[str, Any]:
    saved = read_torch_file(file)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in _LAYOUT.items()):
        raise CheckpointError(f"{file} is no optimizer state: expected a dict with state and param_groups.")
    return saved


def _groups_of(file: str, saved: Mapping[str, Any]) -> list[dict[Any, Any]]:
    """The parameter groups: each has a list of the numbers, or names, of its parameters."""
    groups: list[Any] = saved["param_groups"]
    for number, group in enumerate(groups):
        members = group.get("params") if isinstance(group, dict) else None
        if not isinstance(members, list):
            raise CheckpointError(f"{file}: param_groups is no list of groups with params.")
        for name in _NAMES:
            listed = group.get(name, members)
            odd = [item for item in listed if type(item) not in (int, str)] if isinstance(listed, list) else [listed]
            if odd:
                raise CheckpointError(
                    f"{file}: {name} of parameter group {number} {'holds' if isinstance(listed, list) else 'is'} "
                    f"{shown(odd[0])}, expected a list of numbers or names."
                )
    return groups


def _find_file(path: Path) -> str:
    if path.is_file():
        return str(path)
    if (path / OPTIMIZER_FILE).is_file():
        return str(path / OPTIMIZER_FILE)
    if (path / "optimizer.bin").exists():
        raise CheckpointError(
            f"{path}: optimizer.bin is FSDP's gathered state; only an unsharded {OPTIMIZER_FILE} can grow. Load it in "
            "a run that is not sharded and save that checkpoint, or save with SHARDED_STATE_DICT, of which `teleflm "
            f"convert --optimizer` makes an {OPTIMIZER_FILE}."
        )
    for name, what in _SHARDED.items():
        if (path / name).exists():
            raise CheckpointError(
                f"{path}: {name} is {what}; only an unsharded {OPTIMIZER_FILE} can grow. `teleflm convert --optimizer` "
                "makes one of FSDP2's, DeepSpeed's and Megatron's."
            )
    raise CheckpointError(
        f"{path}: holds no {OPTIMIZER_FILE}; name a checkpoint of transformers' Trainer, or the file."
    )


def _name_groups(
    file: str, saved: list[dict[Any, Any]], names: list[str], *, must_name: bool
) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The settings of each saved group, and the names of its parameters."""
    sizes = [len(group["params"]) for group in saved]
    if all("param_names" in group for group in saved):
        found = [list(group["param_names"]) for group in saved]
        named = sorted(map(str, chain.from_iterable(found)))
        if named != sorted(names) or sizes != list(map(len, found)):
            odd = sorted(set(named) ^ set(names))
            example = f": {odd[0]} is in one of the two alone" if odd else ""
            raise CheckpointError(f"{file}: param_names are not the {len(names)} parameters of the model{example}.")
    elif must_name:
        raise CheckpointError(
            f"{file} does not name its parameters: it did not grow with the model. `teleflm grow --optimizer` writes "
            "one that does; or set fresh_optimizer: true and warm up."
        )
    else:
        known = _known_groups(names)
        found = next((groups for groups in known if list(map(len, groups)) == sizes), [])
        if not found:
            expected = " or ".join(str([len(group) for group in groups]) for groups in known)
            raise CheckpointError(f"{file}: param_groups have {sizes} parameters, the model has {expected}.")
    settings = [{key: value for key, value in group.items() if key not in _NAMES} for group in saved]
    return [(own, tuple(members)) for own, members in zip(settings, found, strict=True)]


def _known_groups(names: list[str]) -> list[list[list[str]]]:
    """The groups that a file without names may have: one, Trainer's (with and without weight decay), and muP's."""
    biases = [name for name in names if name.endswith(".bias")]
    kinds = group_names(name for name in names if name not in biases)
    undecayed = {*kinds["norm"], *biases}
    trainers = [[name for name in names if name not in undecayed], [name for name in names if name in undecayed]]
    return [[names], trainers, *([] if biases else [list(kinds.values())])]


def _moments(file: str, name: str, entry: Any, shape: tuple[int, ...], whose: str) -> tuple[View, View]:
    keys = sorted(map(str, entry)) if isinstance(entry, dict) else None
    if keys == sorted((*MOMENTS, "step", "max_exp_avg_sq")):
        raise CheckpointError(
            f"{file}: the state of {name} has max_exp_avg_sq, so it is of an Adam with amsgrad; only Adam and AdamW "
            "without it can grow, and be exported."
        )
    if keys != sorted((*MOMENTS, "step")):
        raise CheckpointError(
            f"{file}: the state of {name} is {keys}, expected exp_avg, exp_avg_sq, step; only Adam and AdamW can grow."
        )
    for key in MOMENTS:
        view = entry[key]
        if not isinstance(view, View) or not view.dtype.is_floating:
            raise CheckpointError(f"{file}: {key} of {name} is no tensor of floating-point numbers.")
        if view.shape != shape:
            raise CheckpointError(f"{file}: {key} of {name} has shape {view.shape}, {whose} {shape}.")
    return entry["exp_avg"], entry["exp_avg_sq"]


def _read_step(value: Any, where: str, reader: FileReader) -> float:
    """A number of updates: torch counts them in float32, which ends at 2^24."""
    return float(read_count(plain_value(value, reader), where, most=MAX_STEPS, way_out=_DAMAGED))


def _plain_settings(settings: Mapping[Any, Any], reader: FileReader) -> dict[Any, Any]:
    """The settings of a group, with the number in place of a tensor of one."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(plain_value(item, reader) for item in value)
        return plain_value(value, reader)

    return {key: plain(value) for key, value in settings.items()}


__all__ = [
    "AdamState",
    "check_gradients_alone",
    "check_recorded_state",
    "check_resumed_state",
    "check_trainer_step",
    "decay_notes",
    "read_adam_state",
    "read_grown_state",
]
