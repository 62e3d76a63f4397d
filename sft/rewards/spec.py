# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From the key `reward_funcs` of a recipe to reward functions.

    reward_funcs:
      - exact_match: {column: answer}
      - regex: {pattern: '<answer>.*</answer>'}
      - python_tests: {column: tests, seconds: 10}
      - rewards.py:brevity

One that needs no settings may stand as its name alone, and a list of one without its brackets. A file is code that is
run: the one place where a recipe names any.
"""

import functools
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import xxhash
import yaml

from sft.rewards.builtin import ExactMatch, PythonTests, Regex
from sft.rewards.reward import FileReward, Reward, RewardError, what_failed
from sft.yaml_text import load_yaml

BUILTIN: dict[str, type[Reward]] = {"exact_match": ExactMatch, "regex": Regex, "python_tests": PythonTests}


class RewardSpec(NamedTuple):
    """A reward function as a recipe names it: a name of [`BUILTIN`] or `FILE.py:function`, and its settings."""

    name: str
    settings: Mapping[str, Any]


def read_rewards(text: str) -> list[RewardSpec]:
    """Read the value of the key `reward_funcs` from YAML.

    Raises:
        RewardError: it is no YAML; or see [`parse_rewards`].
    """
    try:
        return parse_rewards(load_yaml(text))
    except yaml.YAMLError as error:
        raise RewardError(f"reward_funcs is not valid YAML: {' '.join(str(error).split())}") from error


def parse_rewards(value: Any) -> list[RewardSpec]:
    """Read the value of the key `reward_funcs`.

    Raises:
        RewardError: it is no name, mapping or list of these, or a name is unknown.
    """
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise RewardError("reward_funcs is empty; name at least one reward function.")
    return [_parse(entry) for entry in entries]


def _parse(entry: Any) -> RewardSpec:
    if isinstance(entry, dict) and len(entry) == 1:
        name, settings = next(iter(entry.items()))
        settings = {} if settings is None else settings
    else:
        name, settings = entry, {}
    if not isinstance(name, str) or not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise RewardError(f"reward_funcs holds {entry!r:.80}; expected a name, or one name: {{settings}}.")
    if name not in BUILTIN and not name.rpartition(":")[0].endswith(".py"):
        raise RewardError(f"reward_funcs holds {name!r:.80}; expected {', '.join(BUILTIN)}, or FILE.py:function.")
    if name not in BUILTIN and settings:
        raise RewardError(f"reward_funcs: {name} is a function of a file, which takes no settings.")
    return RewardSpec(name, settings)


def load_rewards(specs: list[RewardSpec]) -> list[Reward]:
    """Make reward functions; code of the user's is loaded, once.

    Raises:
        RewardError: a setting is wrong, or a file cannot be loaded or has no such function.
    """
    rewards: list[Reward] = []
    for spec in specs:
        reward = _load_builtin(spec, rewards) if spec.name in BUILTIN else _load_function(spec.name)
        # TRL's metrics go by this name, and would become those of two functions together.
        taken = {other.__name__ for other in rewards}
        numbered = (f"{reward.__name__}_{number}" for number in itertools.count(2))
        if reward.__name__ in taken:
            reward.__name__ = next(name for name in numbered if name not in taken)
        rewards.append(reward)
    return rewards


def _load_builtin(spec: RewardSpec, before: list[Reward]) -> Reward:
    again = sum(isinstance(reward, BUILTIN[spec.name]) for reward in before)
    name = f"{spec.name}_{again + 1}" if again else spec.name
    _check_settings(name, BUILTIN[spec.name], spec.settings)
    return BUILTIN[spec.name](name, **spec.settings)


def _check_settings(name: str, kind: type[Reward], settings: Mapping[str, Any]) -> None:
    """Refuse settings that a kind of reward function does not have, or of the wrong type."""
    parameters = {key: each for key, each in inspect.signature(kind).parameters.items() if key != "name"}
    named = {key: each.annotation for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    for key, value in settings.items():
        if key not in named:
            if len(named) < len(parameters):  # its class knows the others
                continue
            raise RewardError(f"reward function {name} has no setting {key}; it has {', '.join(named)}.")
        of_type = isinstance(value, named[key]) or (named[key] is float and isinstance(value, int))
        if not of_type or (isinstance(value, bool) and named[key] is not bool):
            raise RewardError(f"reward function {name}: {key} is {value!r:.80}, of type {type(value).__name__}.")


def _load_function(name: str) -> FileReward:
    path, _, function = name.rpartition(":")
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise RewardError(f"reward_funcs: {path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    digest = xxhash.xxh3_128_hexdigest(content)
    found = vars(_load_module(Path(path).resolve(), digest)).get(function)
    if not callable(found):
        raise RewardError(f"reward_funcs: {path} has no function {function}.")
    return FileReward(name, found, digest)


@functools.cache
def _load_module(path: Path, digest: str) -> ModuleType:
    """Run a file of the user's, once for what it holds."""
    spec = importlib.util.spec_from_file_location(
        f"teleflm_rewards_{xxhash.xxh3_64_hexdigest(os.fsencode(path))}_{digest}", path
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses, type hints and pickle look for what it defines
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[spec.name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RewardError(f"reward_funcs: {path} cannot be loaded: {what_failed(error)}") from error
    return module


__all__ = ["BUILTIN", "RewardSpec", "load_rewards", "parse_rewards", "read_rewards"]
