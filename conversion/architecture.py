# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The few numbers of a configuration that checkpoints depend on, read from config.json without torch."""

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
from .family import LLAMA, MULTIPLIERS, TELEFLM, find_family, require_family

MODEL_TYPE = TELEFLM.model_type
_DEFAULT_POSITIONS = 2048  # of transformers' LlamaConfig
_LARGEST = sys.float_info.max  # an integer of JSON may be larger than any float
# Of any size, and of layers, which are gone through one by one: ten times what the deepest model that was trained has.
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000


@dataclass(frozen=True)
class Architecture:
    """Sizes and multipliers of a model; the fields are config.json's. Of a family without multipliers, these are 1."""

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
            CheckpointError: a field is missing, has the wrong type, contradicts another, or is none of the family's.
        """
        family = require_family(config, where)
        family.require_plain(config, where)
        for biases in ("mlp_bias",) if with_biases else ("attention_bias", "mlp_bias"):
            if config.get(biases):
                raise CheckpointError(f"{where}: {biases} is true; biases are not supported here.")
        read = [field.name for field in fields(cls) if family.has_multipliers or field.name not in MULTIPLIERS]
        values = {**family.defaults, **{name: config[name] for name in read if config.get(name) is not None}}
        heads, hidden = _number(values, "num_attention_heads", where), _number(values, "hidden_size", where)
        if hidden % heads:
            raise CheckpointError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", hidden // heads)
        for field in fields(cls):
            values[field.name] = _value(values, field.name, field.type, where)
        if heads % values["num_key_value_heads"]:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{values['num_key_value_heads']}."
            )
        architecture = cls(**values)
        if family is LLAMA:
            rope = rope_parameters(config, where)
            said = config.get("rope_scaling") or config.get("rope_parameters") or {}
            if "rope_theta" in config and config["rope_theta"] is None and "rope_theta" not in said:
                rope["rope_theta"] = None  # transformers puts its default where nothing is said, not where null is
            _check_rope(rope, where)
        if not 0 < architecture.logit_scale < math.inf:
            raise CheckpointError(
                f"{where}: output_mult {architecture.output_mult} / mup_scale_factor {architecture.mup_scale_factor} "
                f"is {architecture.logit_scale}; the factor on the logits must be finite and above 0."
            )
        return architecture

    def to_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`base` with this architecture's numbers; everything else as it is there. It is a Tele-FLM's unless it says.

        Of a family without multipliers none are written: what they make up for has to be in the weights.
        """
        family = find_family(base) or TELEFLM
        numbers = {name: v for name, v in asdict(self).items() if family.has_multipliers or name not in MULTIPLIERS}
        return {**base, **numbers, "model_type": family.model_type}

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


def trained_length(config: Mapping[str, Any], where: str = "config.json") -> int:
    """The positions that a model was trained on before its rotary embedding was scaled, as transformers reads it.

    Args:
        config: content of a config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: it is no number of positions.
    """
    name = "original_max_position_embeddings"
    places = (config, rope_parameters(config, where))
    length = next((place[name] for place in places if place.get(name) is not None), None)
    if length is None:
        name, length = "max_position_embeddings", config.get("max_position_embeddings")
    length = _DEFAULT_POSITIONS if length is None else length
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= _LARGEST:
        raise CheckpointError(f"{where}: {name} is {_shown(length)}, expected an integer above 0.")
    return length


# What each kind of rotary embedding that transformers' Llama has needs beside rope_theta: numbers, or lists of them.
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": (),
}
_ROPE_LISTS: dict[str, tuple[str, ...]] = {"longrope": ("short_factor", "long_factor")}


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    """Refuse a rotary embedding that transformers' Llama does not have, or that lacks what decides its angles."""
    kind = rope["rope_type"]
    if kind not in _ROPE_NUMBERS:
        raise CheckpointError(f"{where}: rope_type is {_shown(kind)}, expected one of {', '.join(_ROPE_NUMBERS)}.")
    for name, value in rope.items():
        if isinstance(value, Mapping):
            raise CheckpointError(
                f"{where}: rope_parameters has {name}, an object: a Llama's are the same in all layers."
            )
    if rope.get("partial_rotary_factor") not in (None, 1):
        found = _shown(rope["partial_rotary_factor"])
        raise CheckpointError(f"{where}: partial_rotary_factor is {found}; a Llama turns all of each head.")
    for name in ("rope_theta", *_ROPE_NUMBERS[kind]):
        if not _is_finite(rope.get(name)):
            raise CheckpointError(
                f"{where}: {name} of rope_type {kind} is {_shown(rope.get(name))}, expected a number."
            )
    for name in _ROPE_LISTS.get(kind, ()):
        values = rope.get(name)
        if not isinstance(values, list) or not values or not all(map(_is_finite, values)):
            raise CheckpointError(
                f"{where}: {name} of rope_type {kind} is {_shown(values)}, expected a list of numbers."
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST


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
