# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The optimizer.pt beside a model's weights: Adam's moments, as transformers' Trainer and torch.load have them.

Parameters are numbered, group after group, and `param_names` of each group says which is which: so a run with other
groups, and growth, can use the state too. It is written as weights are: streamed, resumable, a digest of every tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .architecture import Architecture
from .checkpoint.containers import Shard
from .checkpoint.dtypes import FLOAT32
from .checkpoint.errors import CheckpointError, printable
from .checkpoint.numbers import read_number, shown
from .checkpoint.plan import Box, Fill, TensorPlan
from .checkpoint.torch_zip import torch_shard
from .mapping import weights

OPTIMIZER_FILE = "optimizer.pt"  # beside the weights: where transformers' Trainer has it, and training looks for it
MOMENTS = ("exp_avg", "exp_avg_sq")
DECOUPLED = "decoupled_weight_decay"  # of a group: whether its decay leaves the gradients, and so the moments, alone
MAX_STEPS = 2**24  # torch's counter is a float32, which cannot count on from there

_NAMES = ("params", "param_names")

Group = tuple[Mapping[str, Any], Sequence[str]]
"""A parameter group: its settings, without `params`, and the names of its parameters."""


def parameter_names(architecture: Architecture) -> list[str]:
    """The parameters in the order in which the model, and so every optimizer, lists them: norms end their layer."""
    places = {name: (layer, place) for place, (name, _, layer) in enumerate(weights(architecture))}

    def order(name: str) -> tuple[bool, int, bool, int]:
        layer, place = places[name]
        outside = (place > 0, architecture.num_hidden_layers) if layer is None else (True, layer)
        return (*outside, "layernorm" in name, place)

    return sorted(places, key=order)


def plain_settings(group: Mapping[Any, Any]) -> dict[str, Any]:
    """What a saved parameter group says beside its parameters, as far as it is plain values."""
    return {
        key: value for key, value in group.items() if isinstance(key, str) and key not in _NAMES and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    return all(item is None or isinstance(item, bool | int | float | str) for item in values)


# What torch's Adam takes: it refuses anything else when it is made, and nothing at all when it loads a state. And what
# megatron-core has in a group beside it.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "lr_mult", "pre_lr_mult")
_DECAYS = ("weight_decay", "initial_weight_decay", "start_wd", "end_wd", "wd_mult", "pre_wd_mult")
_NOT_NEGATIVE = frozenset((*_RATES, *_DECAYS, "eps"))
_SWITCHES = ("amsgrad", "maximize")  # what they are decides every update
_NEEDED = ("lr", "betas", "eps", "weight_decay")  # by every step of torch's Adam


def check_settings(settings: Mapping[Any, Any], where: str, *, others: bool = False) -> None:
    """Check what a parameter group says beside its parameters: rates, decays, betas, eps.

    Args:
        settings: the group, without the parameters; tensors of one element as numbers.
        where: which it is, for the message: file and group.
        others: whether it may be of another optimizer than Adam, with objects in it.

    Raises:
        CheckpointError: a value is of another type, out of its range, NaN or infinite.
    """
    for key, value in settings.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where} has a setting called {shown(key)}, expected a text.")
        place = f"{where}: {printable(key[:80])}"
        values = value if isinstance(value, tuple | list) else (value,)
        if not _is_plain(value):
            if others and key not in _NOT_NEGATIVE and key != "betas":
                continue
            raise CheckpointError(f"{place} is {shown(value)}, expected numbers.")
        if key in _NOT_NEGATIVE:
            read_number(value, place, least=0.0)
        elif key == "betas":
            if len(values) < 2:
                raise CheckpointError(f"{place} is {shown(value)}, expected two numbers.")
            for beta in values:
                read_number(beta, place, least=0.0, below=1.0)
        elif key in _SWITCHES and value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{place} is {shown(value)}, expected true or false.")
        else:
            for item in values:
                if isinstance(item, int | float) and not isinstance(item, bool):
                    read_number(item, place)


def check_is_adam(settings: Mapping[Any, Any], where: str) -> None:
    """Check that a group whose state has two moments is of torch's Adam or AdamW, without amsgrad.

    Args:
        settings: the group, without the parameters.
        where: which it is, for the message: file and group.

    Raises:
        CheckpointError: it is of RAdam, or of an Adam whose third moment is missing.
    """
    if "foreach" in settings and "amsgrad" not in settings:  # of torch's optimizers RAdam alone has Adam's moments
        raise CheckpointError(
            f"{where} has foreach and no amsgrad, which torch's RAdam leaves and its Adam and AdamW do not; only these "
            "can be converted, grow, and be exported."
        )
    if settings.get("amsgrad"):
        raise CheckpointError(
            f"{where}: amsgrad is True, and the state has no max_exp_avg_sq for it; only Adam and AdamW without it can "
            "be converted, grow, and be exported."
        )


def unsaid_notes(groups: Sequence[Group]) -> list[str]:
    """A note on what the groups of a run do not say, without which torch's AdamW loads the state and makes no step."""
    lacking = {
        key: [str(number) for number, (settings, _) in enumerate(groups) if key not in settings] for key in _NEEDED
    }
    unsaid = [f"{key} of group {', '.join(numbers)}" for key, numbers in lacking.items() if numbers]
    if not unsaid:
        return []
    return [
        f"{OPTIMIZER_FILE} has no {', no '.join(unsaid)}, as the run does not say them: `teleflm grow` and `teleflm "
        "train` take its moments, and a Trainer cannot go on from it."
    ]


def adam_shard(
    groups: Sequence[Group], moments: Mapping[str, Mapping[str, TensorPlan]], steps: Mapping[str, float]
) -> Shard:
    """The file that holds Adam's state, as `torch.optim.AdamW.load_state_dict` takes it.

    Args:
        groups: the parameter groups.
        moments: name of a parameter -> the plans of its `exp_avg` and `exp_avg_sq`, whatever they are called.
        steps: name of a parameter -> updates done.
    """
    state: dict[int, dict[str, TensorPlan]] = {}
    saved = []
    for settings, names in groups:
        indices = list(range(len(state), len(state) + len(names)))
        for index, name in zip(indices, names, strict=True):
            where = f"{OPTIMIZER_FILE}/state.{index}"
            step = TensorPlan(f"{where}.step", (), FLOAT32, (Fill(Box((0,), (1,)), float(steps[name])),))
            plans = {
                key: replace(moments[name][key], name=f"{where}.{key}", nonnegative=key == MOMENTS[1])
                for key in MOMENTS
            }
            state[index] = {"step": step, **plans}
        saved.append({**settings, "params": indices, "param_names": list(names)})
    return torch_shard(OPTIMIZER_FILE, {"state": state, "param_groups": saved}, state=True)
