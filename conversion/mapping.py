# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The name and layout table of a checkpoint in Hub format, Tele-FLM or Llama: one line a weight, in data-flow order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .architecture import Architecture
from .checkpoint.errors import CheckpointError
from .checkpoint.plan import Shape, View

Axis: TypeAlias = Literal["vocab", "hidden", "query", "key_value", "ffn"]
"""What a dimension of a weight counts: `query` is heads x head_dim, `key_value` is kv heads x head_dim."""


@dataclass(frozen=True)
class Weight:
    """One weight: its name, with `{}` for the layer's number, and what its dimensions count."""

    name: str
    axes: tuple[Axis, ...]

    def shape(self, architecture: Architecture) -> Shape:
        """Its shape in a model of that architecture."""
        return tuple(axis_size(axis, architecture) for axis in self.axes)


EMBED_TOKENS = Weight("model.embed_tokens.weight", ("vocab", "hidden"))
LAYER = (
    Weight("model.layers.{}.input_layernorm.weight", ("hidden",)),
    Weight("model.layers.{}.self_attn.q_proj.weight", ("query", "hidden")),
    Weight("model.layers.{}.self_attn.k_proj.weight", ("key_value", "hidden")),
    Weight("model.layers.{}.self_attn.v_proj.weight", ("key_value", "hidden")),
    Weight("model.layers.{}.self_attn.o_proj.weight", ("hidden", "query")),
    Weight("model.layers.{}.post_attention_layernorm.weight", ("hidden",)),
    Weight("model.layers.{}.mlp.gate_proj.weight", ("ffn", "hidden")),
    Weight("model.layers.{}.mlp.up_proj.weight", ("ffn", "hidden")),
    Weight("model.layers.{}.mlp.down_proj.weight", ("hidden", "ffn")),
)
# Where there are biases (attention_bias), each follows its weight.
_BIASES: dict[str, Weight] = {
    "model.layers.{}.self_attn.q_proj.weight": Weight("model.layers.{}.self_attn.q_proj.bias", ("query",)),
    "model.layers.{}.self_attn.k_proj.weight": Weight("model.layers.{}.self_attn.k_proj.bias", ("key_value",)),
    "model.layers.{}.self_attn.v_proj.weight": Weight("model.layers.{}.self_attn.v_proj.bias", ("key_value",)),
    "model.layers.{}.self_attn.o_proj.weight": Weight("model.layers.{}.self_attn.o_proj.bias", ("hidden",)),
}
NORM = Weight("model.norm.weight", ("hidden",))
LM_HEAD = Weight("lm_head.weight", ("vocab", "hidden"))

# Buffers that old checkpoints carry and every runtime computes.
_DERIVED = "rotary_emb.inv_freq"


def axis_size(axis: Axis, architecture: Architecture) -> int:
    """Size of a dimension of that kind."""
    return {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "query": architecture.num_attention_heads * architecture.head_dim,
        "key_value": architecture.num_key_value_heads * architecture.head_dim,
        "ffn": architecture.intermediate_size,
    }[axis]


def weight_table(architecture: Architecture) -> tuple[Weight, ...]:
    """The lines of the table that a model has, in data-flow order."""
    biases = _BIASES if architecture.attention_bias else {}
    layer = [line for weight in LAYER for line in (weight, biases.get(weight.name)) if line]
    return (EMBED_TOKENS, *layer, NORM, *([] if architecture.tie_word_embeddings else [LM_HEAD]))


def weights(architecture: Architecture) -> Iterator[tuple[str, Weight, int | None]]:
    """Every weight of a model in data-flow order: its full name, its line in the table, its layer if it has one."""
    table = weight_table(architecture)
    in_layers = [weight for weight in table if "{}" in weight.name]
    for weight in table:
        if weight not in in_layers:
            yield weight.name, weight, None
        elif weight is in_layers[0]:
            layers = range(architecture.num_hidden_layers)
            yield from ((inner.name.format(layer), inner, layer) for layer in layers for inner in in_layers)


def is_derived(name: str) -> bool:
    """Whether a tensor is a buffer that runtimes compute themselves."""
    return name.endswith(_DERIVED)


def _is_tied_copy(name: str, tensors: Mapping[str, View], architecture: Architecture) -> bool:
    """Whether a tensor is the head of a tied model, stored as the very bytes of the embedding."""
    return name == LM_HEAD.name and architecture.tie_word_embeddings and tensors[name] == tensors.get(EMBED_TOKENS.name)


def check_tensors(tensors: Mapping[str, View], architecture: Architecture, where: str) -> None:
    """Check that a checkpoint holds exactly the weights of its architecture.

    Raises:
        CheckpointError: a weight is missing, unknown, or has another shape; the message names it.
    """
    expected = {name: weight.shape(architecture) for name, weight, _ in weights(architecture)}
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: {name} is missing; config.json describes {len(expected)} weights.")
    for name, view in tensors.items():
        if is_derived(name) or _is_tied_copy(name, tensors, architecture):
            continue
        if name.endswith(".weight_scale") and name.removesuffix("_scale") in expected:
            raise CheckpointError(
                f"{where}: is quantised (it holds {name}), and this takes weights that need no scales. Take the "
                "original, or dequantise it first: `teleflm convert --dtype bfloat16` does so of compressed-tensors' "
                "8-bit floats with a scale a tensor or a row, where config.json says that they are."
            )
        if name not in expected:
            tied = name == LM_HEAD.name and architecture.tie_word_embeddings
            way_out = " Remove it, or set tie_word_embeddings to false." if tied else ""
            raise CheckpointError(
                f"{where}: {name} is not a weight that config.json describes; it would be lost.{way_out}"
            )
        if view.shape != expected[name]:
            raise CheckpointError(f"{where}: {name} has shape {view.shape}, config.json says {expected[name]}.")
