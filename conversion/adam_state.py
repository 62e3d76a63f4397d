# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of Adam's state as torch.save keeps it, the counterpart of `optimizer_state.py`; nothing is executed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .architecture import Architecture
from .checkpoint.errors import CheckpointError
from .checkpoint.plan import View
from .checkpoint.reader import FileReader
from .checkpoint.torch_file import read_torch_file
from .mapping import weights
from .optimizer_state import MOMENTS, OPTIMIZER_FILE, parameter_names
from .parameter_kinds import group_names

_LAYOUT = {"state": dict, "param_groups": list}
# What other savers leave in a checkpoint instead, for the message.
_SHARDED = {
    "optimizer_0": "FSDP's sharded state",
    "optimizer.bin": "FSDP's gathered state",
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


def read_adam_state(path: str | os.PathLike[str], architecture: Architecture) -> AdamState:
    """Read the Adam or AdamW state that transformers' Trainer or torch.save wrote; nothing in it is executed.

    Such a file numbers the parameters. Which is which follows from the order of the model's parameters and from its
    groups: Trainer's (with and without weight decay), those of `growth.training.mup`, or one; every shape is checked.

    Args:
        path: the file, or the folder that holds it as optimizer.pt.
        architecture: of the model it belongs to.

    Raises:
        CheckpointError: there is no such file, or it is not the state of Adam for that architecture.
    """
    sizes = {name: weight.shape(architecture) for name, weight, _ in weights(architecture)}
    shapes = {name: sizes[name] for name in parameter_names(architecture)}
    return _read(_find_file(Path(path)), shapes, whose="config.json says", must_name=False)


def read_grown_state(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> AdamState:
    """Read a state that names its parameters, as `write_adam_state` writes it; nothing in it is executed.

    Args:
        path: the file.
        shapes: of the parameters of the model it is for, by name.

    Raises:
        CheckpointError: there is no such file, it does not name its parameters, or they are another model's.
    """
    return _read(_find_file(Path(path)), shapes, whose="the model has", must_name=True)


def _read(file: str, shapes: Mapping[str, tuple[int, ...]], *, whose: str, must_name: bool) -> AdamState:
    """Read a state of parameters with these shapes, in the order in which the model lists them."""
    saved = read_torch_file(file)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in _LAYOUT.items()):
        raise CheckpointError(f"{file} is no optimizer state: expected a dict with state and param_groups.")
    groups = _name_groups(file, saved["param_groups"], list(shapes), must_name=must_name)

    steps: dict[str, float] = {}
    moments: dict[str, tuple[View, View]] = {}
    with FileReader() as reader:
        for (_, names), group in zip(groups, saved["param_groups"], strict=True):
            for name, index in zip(names, group["params"], strict=True):
                entry = saved["state"].get(index)
                moments[name] = _moments(file, name, entry, shapes[name], whose)
                steps[name] = _number(entry["step"], reader)
        settled = tuple(
            ({key: _setting(file, key, value, reader) for key, value in settings.items()}, names)
            for settings, names in groups
        )
    return AdamState(file, settled, steps, moments)


def _find_file(path: Path) -> str:
    if path.is_file():
        return str(path)
    if (path / OPTIMIZER_FILE).is_file():
        return str(path / OPTIMIZER_FILE)
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
    file: str, saved: list[Any], names: list[str], *, must_name: bool
) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The settings of each saved group, and the names of its parameters."""
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in saved):
        raise CheckpointError(f"{file}: param_groups is no list of groups with params.")
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
    extra = ("params", "param_names")
    settings = [{key: value for key, value in group.items() if key not in extra} for group in saved]
    return [(own, tuple(members)) for own, members in zip(settings, found, strict=True)]


def _known_groups(names: list[str]) -> list[list[list[str]]]:
    """The groups that a file without names may have: one, Trainer's (with and without weight decay), and muP's."""
    biases = [name for name in names if name.endswith(".bias")]
    kinds = group_names(name for name in names if name not in biases)
    undecayed = {*kinds["norm"], *biases}
    trainers = [[name for name in names if name not in undecayed], [name for name in names if name in undecayed]]
    return [[names], trainers, *([] if biases else [list(kinds.values())])]


def _moments(file: str, name: str, entry: Any, shape: tuple[int, ...], whose: str) -> tuple[View, View]:
    keys = sorted(entry) if isinstance(entry, dict) else None
    if keys != sorted((*MOMENTS, "step")):
        raise CheckpointError(
            f"{file}: the state of {name} is {keys}, expected exp_avg, exp_avg_sq, step; only Adam and AdamW can grow."
        )
    step = entry["step"]
    if not isinstance(step, int | float) and not (isinstance(step, View) and step.numel == 1):
        raise CheckpointError(f"{file}: step of {name} is a {type(step).__name__}, expected a number.")
    for key in MOMENTS:
        view = entry[key]
        if not isinstance(view, View) or not view.dtype.is_floating:
            raise CheckpointError(f"{file}: {key} of {name} is no tensor of floating-point numbers.")
        if view.shape != shape:
            raise CheckpointError(f"{file}: {key} of {name} has shape {view.shape}, {whose} {shape}.")
    return entry["exp_avg"], entry["exp_avg_sq"]


def _setting(file: str, key: str, value: Any, reader: FileReader) -> Any:
    if isinstance(value, View) and value.numel == 1:
        return _number(value, reader)
    plain = value if isinstance(value, tuple | list) else (value,)
    if not all(item is None or isinstance(item, bool | int | float | str) for item in plain):
        raise CheckpointError(f"{file}: {key} of a parameter group is a {type(value).__name__}, expected numbers.")
    return value


def _number(value: Any, reader: FileReader) -> float:
    return float(reader.read(value).reshape(-1)[0]) if isinstance(value, View) else float(value)


__all__ = ["AdamState", "read_adam_state", "read_grown_state"]
