# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Recipes: one flat YAML file that says everything about a fine-tuning run.

A key of a recipe is a field of one of three dataclasses:

- [`DataArguments`], ours: which files, what is trained on;
- [`trl.ModelConfig`]: which model, and LoRA (`use_peft`, `lora_r`, ...);
- [`trl.SFTConfig`], which is transformers' `TrainingArguments` plus TRL's own fields: everything else.

So whoever knows TRL knows the keys. Unlike TRL, an unknown key, a value of the wrong type and a key given twice are
errors, and so is a key that would be ignored here.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, SFTConfig

from sft import SFTError


class RecipeError(SFTError):
    """A recipe, or an override of one, is wrong. The message names the key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What is trained on.

    `assistant_only_loss` and `chat_template_path` mean what they mean in TRL; they are here because the conversations
    are tokenized before TRL sees them (see [`sft.data`]).

    Args:
        data_files: files of conversations: `.jsonl`, `.json` (a list) or `.parquet`; the first two also as `.gz`.
        eval_data_files: likewise, evaluated on when `eval_strategy` says so.
        assistant_only_loss: train on what the assistant says, end-of-turn token included; `False`: on every token.
        chat_template_path: a Jinja file that replaces the tokenizer's chat template.
        allow_rejects: train on the valid rows of a file that has invalid ones. Without it one invalid row is an error.
        resume_from_checkpoint: a `checkpoint-N` folder, or `True` for the last one in `output_dir`.
    """

    data_files: str | list[str]
    eval_data_files: str | list[str] | None = None
    assistant_only_loss: bool = True
    chat_template_path: str | None = None
    allow_rejects: bool = False
    resume_from_checkpoint: str | bool | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. Build one with [`read_recipe`] or [`Recipe.from_dict`]."""

    data: DataArguments
    model: ModelConfig
    training: SFTConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "the recipe") -> "Recipe":
        """Check a flat mapping of keys and build the recipe.

        Args:
            values: keys and values as in a recipe file.
            origin: where they come from, for error messages.

        Raises:
            RecipeError: a key is unknown, missing or refused; a value is of the wrong type or none of the choices.
        """
        for key, value in values.items():
            _check(key, value, origin)
        missing = [key for key in _REQUIRED if values.get(key) is None]
        if missing:
            raise RecipeError(f"{origin} does not set {', '.join(missing)}; add it, or pass --{missing[0]} VALUE.")

        data, model, training = (
            {key: value for key, value in values.items() if key in fields}
            for fields in (_DATA_FIELDS, _MODEL_FIELDS, _TRAINING_FIELDS)
        )
        try:
            return cls(
                DataArguments(**data),
                ModelConfig(**{**_MODEL_DEFAULTS, **model}),
                SFTConfig(**{**_machine_defaults(training), **training}),
            )
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"{origin}: {' '.join(str(error).split())}") from error


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, one mapping. Scalars are read by the rules of YAML 1.2: `1e-9` is a number and `no` a string.
        overrides: keys that win over the file's; see [`parse_overrides`].

    Raises:
        RecipeError: the file is missing or no mapping, or as [`Recipe.from_dict`] says.
    """
    overrides = overrides or {}
    for key, value in overrides.items():
        _check(key, value, origin="the command line")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
    values = _load_yaml(text, origin=str(path))
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path} holds a {type(values).__name__}; a recipe is one flat mapping of `key: value` lines."
        )
    return Recipe.from_dict({**values, **overrides}, origin=str(path))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--key value`, `--key=value`, `--key a b` (a list) and `--flag` (true) into keys and values.

    Values are YAML, as in the file: `--lr_scheduler_kwargs '{lr_end: 1e-9}'`. Dashes in a key may be underscores.

    Raises:
        RecipeError: an argument belongs to no key, a key is given twice, or a value is no YAML.
    """
    words: dict[str, list[str]] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            key = name.replace("-", "_")
            if key in words:
                raise RecipeError(f"--{name} is given twice.")
            words[key] = [value] if equals else []
        elif key is None:
            raise RecipeError(f"{argument!r} belongs to no key; overrides are written --key value.")
        else:
            words[key].append(argument)

    values = {key: [_load_yaml(word, origin=f"--{key}") for word in group] for key, group in words.items()}
    return {key: True if not group else group[0] if len(group) == 1 else group for key, group in values.items()}


# --- checks of one key ------------------------------------------------------------------------------------------------

# Quantization is left out of ModelConfig's fields: a run that ignored `load_in_4bit` would not fit in memory.
_HONOURED = [
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
]

# Fields of SFTConfig that would have no effect, because we build the model, the tokenizer and the token ids ourselves.
_REFUSED = {
    "model_init_kwargs": "use dtype, attn_implementation and model_revision",
    "trust_remote_code": "no code of a checkpoint is ever executed; delete the key",
    "eos_token": "set it in the tokenizer's own files",
    "pad_token": "set it in the tokenizer's own files",
    "dataset_text_field": "training is on conversations; give rows a `messages` column",
    "dataset_kwargs": "conversations are always prepared; delete the key",
    "completion_only_loss": "use assistant_only_loss",
    "truncation_mode": "long conversations keep their start; delete the key",
    "router_aux_loss_coef": "Tele-FLM is dense; delete the key",
    "parallelism_config": "set it in the file of `accelerate launch --config_file`",
    "do_train": "delete the key",
    "do_eval": "use eval_strategy",
    "do_predict": "delete the key",
    "local_rank": "the launcher sets it; delete the key",
}


def _hints(cls: type, names: Sequence[str] | None = None, without: Sequence[str] = ()) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if (names is None or field.name in names) and field.name not in without
    }


_DATA_FIELDS = _hints(DataArguments)
# "all-linear" and a regular expression are strings; TRL's own parser reaches them through a list of one.
_MODEL_FIELDS = _hints(ModelConfig, names=_HONOURED) | {"lora_target_modules": str | list[str] | None}
_TRAINING_FIELDS = _hints(SFTConfig, without=[*_DATA_FIELDS, *_REFUSED])
_FIELDS = {**_DATA_FIELDS, **_MODEL_FIELDS, **_TRAINING_FIELDS}
_CHOICES = {
    field.name: list(field.metadata["choices"])
    for cls in (ModelConfig, SFTConfig)
    for field in dataclasses.fields(cls)
    if field.metadata.get("choices")
}
_REQUIRED = ("model_name_or_path", "data_files", "output_dir")
# PEFT knows no default targets for this architecture; all-linear leaves lm_head out, as TRL's fused head requires.
_MODEL_DEFAULTS = {"lora_target_modules": "all-linear"}


def _machine_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that depend on the machine, where TRL's would fail or warn without an accelerator."""
    bf16 = is_torch_bf16_gpu_available() and not training.get("use_cpu") and not training.get("fp16")
    return {"bf16": bf16}


def _check(key: str, value: Any, origin: str) -> None:
    if key in _REFUSED:
        raise RecipeError(f"{origin}: {key} has no effect here; {_REFUSED[key]}.")
    if key not in _FIELDS:
        nearest = difflib.get_close_matches(str(key), _FIELDS, n=1)
        way_out = (
            f"did you mean {nearest[0]}?" if nearest else "keys are those of DataArguments, ModelConfig, SFTConfig."
        )
        raise RecipeError(f"{origin}: unknown key {key}; {way_out}")
    if not _is_a(value, _FIELDS[key]):
        expected = _spell(_FIELDS[key])
        raise RecipeError(f"{origin}: {key} is {value!r}, of type {type(value).__name__}; expected {expected}.")
    if value is not None and key in _CHOICES and value not in _CHOICES[key]:
        raise RecipeError(f"{origin}: {key} is {value!r}; expected one of {', '.join(_CHOICES[key])}.")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; an `int` is also a `float`, as in type hints, and a `bool` is neither."""
    candidates = [value, float(value)] if type(value) is int else [value]
    for candidate in candidates:
        try:
            type_validator("value", candidate, hint)
            return True
        except TypeError:
            continue
    return False


def _spell(hint: Any) -> str:
    """A type as a user of YAML would say it: `float or null`."""
    members = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    # Enum types are dropped: their values are written as strings, and `str` is in the same union.
    names = [
        "null" if member is type(None) else str(member) if typing.get_args(member) else member.__name__
        for member in members
        if not (isinstance(member, type) and issubclass(member, str) and member is not str)
    ]
    return " or ".join(names)


# --- YAML -------------------------------------------------------------------------------------------------------------

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 scalars, no key twice. PyYAML is 1.1: it reads `1e-9` as a string, `save_strategy: no` as False."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key_node, deep=True) for key_node, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _load_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error


__all__ = ["DataArguments", "Recipe", "RecipeError", "parse_overrides", "read_recipe"]
