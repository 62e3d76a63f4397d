# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The few numbers of a Tele-FLM configuration that checkpoints depend on, read from config.json without torch."""

import ast
import copy
import importlib.util
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from .checkpoint.errors import CheckpointError
from .checkpoint.strict_json import read_json_object

MODEL_TYPE = "TeleFLM"
_LARGEST = sys.float_info.max  # an integer of JSON may be larger than any float
# Of any size, and of layers, which are gone through one by one: ten times what the deepest model that was trained has.
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000


@dataclass(frozen=True)
class Architecture:
    """Sizes and multipliers of a Tele-FLM model; the fields are config.json's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_mup: bool = False
    input_mult: float = 1.0
    output_mult: float = 1.0
    mup_scale_factor: float = 1.0

    @property
    def group_size(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def embedding_scale(self) -> float:
        """Factor on the token embeddings."""
        return self.input_mult if self.use_mup else 1.0

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""
        return self.output_mult / self.mup_scale_factor if self.use_mup else 1.0

    @property
    def num_parameters(self) -> int:
        """Number of weights, padding rows of the vocabulary included."""
        h, hd = self.hidden_size, self.head_dim
        attention = 2 * h * hd * (self.num_attention_heads + self.num_key_value_heads)
        biases = h + hd * (self.num_attention_heads + 2 * self.num_key_value_heads) if self.attention_bias else 0
        layer = attention + biases + 3 * h * self.intermediate_size + 2 * h
        return self.vocab_size * h * (1 if self.tie_word_embeddings else 2) + self.num_hidden_layers * layer + h

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], where: str = "config.json", *, with_biases: bool = False
    ) -> "Architecture":
        """Read and check a configuration.

        Args:
            config: content of a config.json.
            where: what to call it in errors.
            with_biases: whether the caller can deal with biases in attention, which no published Tele-FLM has.

        Raises:
            CheckpointError: a field is missing, has the wrong type, or contradicts another.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(f"{where}: model_type is {config.get('model_type')!r}, expected {MODEL_TYPE!r}.")
        for biases in ("mlp_bias",) if with_biases else ("attention_bias", "mlp_bias"):
            if config.get(biases):
                raise CheckpointError(f"{where}: {biases} is true; biases are not supported here.")
        values = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        heads, hidden = _number(values, "num_attention_heads", where), _number(values, "hidden_size", where)
        if hidden % heads:
            raise CheckpointError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", hidden // heads)
        values.setdefault("rms_norm_eps", 1e-6)  # transformers' default for Llama
        for field in fields(cls):
            values[field.name] = _value(values, field.name, field.type, where)
        if heads % values["num_key_value_heads"]:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{values['num_key_value_heads']}."
            )
        architecture = cls(**values)
        if not 0 < architecture.logit_scale < math.inf:
            raise CheckpointError(
                f"{where}: output_mult {architecture.output_mult} / mup_scale_factor {architecture.mup_scale_factor} "
                f"is {architecture.logit_scale}; the factor on the logits must be finite and above 0."
            )
        return architecture

    def to_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`base` with this architecture's numbers; everything else as it is there."""
        return {**base, **asdict(self), "model_type": MODEL_TYPE}

    def evolve(self, **changes: Any) -> "Architecture":
        """A copy with some fields changed."""
        return replace(self, **changes)


def _number(values: Mapping[str, Any], name: str, where: str) -> int:
    return _value(values, name, int, where)


def _value(values: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    """One field, of its declared type; sizes and multipliers must be above zero."""
    if name not in values:
        default = {field.name: field.default for field in fields(Architecture)}[name]
        if isinstance(default, bool | float):
            return default
        raise CheckpointError(f"{where}: {name} is missing.")
    value = values[name]
    if kind is bool:
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} is {_shown(value)}, expected true or false.")
        return value
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        expected = "an integer" if kind is int else "a number"
        raise CheckpointError(f"{where}: {name} is {_shown(value)}, expected {expected}.")
    if not 0 < value <= _LARGEST:
        raise CheckpointError(f"{where}: {name} is {_shown(value)}; it must be finite and above 0.")
    most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
    if kind is int and value > most:
        raise CheckpointError(f"{where}: {name} is {_shown(value)}, expected at most {most:,}.")
    return kind(value)


def rope_parameters(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The rotary embedding of a configuration as transformers reads it, in today's spelling.

    Where both spellings are there, the older one counts: transformers has it so.

    Args:
        config: content of a config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field has the wrong type.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), Mapping | None):
            raise CheckpointError(f"{where}: {name} is {_shown(config[name])}, expected an object or null.")
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if not isinstance(rope["rope_type"], str):
        raise CheckpointError(f"{where}: rope_type is {_shown(rope['rope_type'])}, expected a name such as 'default'.")
    for values in (config, rope):
        if values.get("rope_theta") is not None:
            _rope_theta(values["rope_theta"], where)
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", 10000.0 if theta is None else float(theta))
    return rope


def _rope_theta(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{where}: rope_theta is {_shown(value)}, expected a number.")
    if not 0 < value <= _LARGEST:
        raise CheckpointError(f"{where}: rope_theta is {_shown(value)}; it must be finite and above 0.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def package_folder() -> Path:
    """Folder of `modeling_teleflm`, found without importing it (that would import torch)."""
    spec = importlib.util.find_spec("modeling_teleflm")
    if spec is None or spec.origin is None:
        raise CheckpointError("modeling_teleflm is not installed; reinstall the teleflm package.")
    return Path(spec.origin).parent


_PARSING = threading.Lock()


def model_code_constant(file: str, name: str) -> Any:
    """A constant of our model code, read from its text: importing it would import torch.

    Args:
        file: of `modeling_teleflm`, for example `modeling_teleflm.py`.
        name: of the constant, which is a literal.
    """
    with _PARSING:  # in Python 3.11, two threads that build syntax trees at once can both fail, with a SystemError
        return copy.deepcopy(_literal(package_folder() / file, name))


@cache
def _literal(path: Path, name: str) -> Any:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return ast.literal_eval(value)
    raise LookupError(f"{path.name} has no constant {name}")


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in (package_folder() / "presets").glob("*.json"))


def load_preset(name: str) -> dict[str, Any]:
    """A preset's configuration.

    Raises:
        CheckpointError: there is none of that name; the message lists those there are.
    """
    if name not in preset_names():
        raise CheckpointError(f"there is no preset {name!r}; known presets: {', '.join(preset_names())}.")
    return load_config(package_folder() / "presets" / f"{name}.json")


def load_config(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        CheckpointError: the file is missing, not a JSON object, or larger than any configuration.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.")
    return read_json_object(path, infinite=True)
