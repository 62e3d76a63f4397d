# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""GraniteMoE of transformers: Granite's decoder with several feed-forward layers, the experts, in place of each one.

Beside Granite's multipliers its config.json has two numbers, num_local_experts (N) and num_experts_per_tok (K). In
place of a layer's three feed-forward matrices there are three tensors, stacked over experts. A token's K largest router
logits choose its experts, and the softmax over these K alone are their gates: they add up to 1 whatever the router is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import MODEL_TYPE, Architecture
from .checkpoint.errors import CheckpointError
from .checkpoint.plan import Shape, View
from .mapping import is_derived, weights

GRANITEMOE = "granitemoe"
GRANITEMOE_CLASS = "GraniteMoeForCausalLM"
# What stands in place of mlp.gate_proj, mlp.up_proj and mlp.down_proj, with `{}` for the layer's number.
ROUTER = "model.layers.{}.block_sparse_moe.router.layer.weight"  # [N, hidden]
INPUT_LINEAR = "model.layers.{}.block_sparse_moe.input_linear.weight"  # [N, 2 ffn, hidden]: gates above, ups below
OUTPUT_LINEAR = "model.layers.{}.block_sparse_moe.output_linear.weight"  # [N, hidden, ffn]

# transformers' GraniteMoeConfig, as of 5.23, where a config.json does not say.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Experts:
    """Sizes and multipliers of a GraniteMoE.

    Args:
        dense: those of the model each of whose feed-forward layers is one expert.
        num_local_experts: experts in each layer.
        num_experts_per_tok: experts that compute a token.
    """

    dense: Architecture
    num_local_experts: int
    num_experts_per_tok: int

    @property
    def num_parameters(self) -> int:
        """Number of weights, those of all experts and of the routers."""
        return self._count(self.num_local_experts)

    @property
    def num_active_parameters(self) -> int:
        """Number of weights that compute a token: all but those of the experts that are not chosen."""
        return self._count(self.num_experts_per_tok)

    def _count(self, experts: int) -> int:
        hidden, expert = self.dense.hidden_size, 3 * self.dense.hidden_size * self.dense.intermediate_size
        layer = (experts - 1) * expert + self.num_local_experts * hidden
        return self.dense.num_parameters + self.dense.num_hidden_layers * layer


def has_experts(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json says that its model is a GraniteMoE."""
    return (config or {}).get("model_type") == GRANITEMOE


def read_experts(config: Mapping[str, Any], where: str = "config.json") -> Experts:
    """The numbers of a GraniteMoE's config.json.

    Args:
        config: its content.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field has the wrong type, or contradicts another.
    """
    said = {**_DEFAULTS, **config}
    numbers = [said["num_local_experts"], said["num_experts_per_tok"]]
    for name, value in zip(("num_local_experts", "num_experts_per_tok"), numbers, strict=True):
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {name} is {str(value)[:80]}, expected an integer above 0.")
    if numbers[1] > numbers[0]:
        raise CheckpointError(f"{where}: num_experts_per_tok is {numbers[1]}, above num_local_experts {numbers[0]}.")
    return Experts(dense_architecture(config, where), *numbers)


def dense_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The numbers of the model each of whose feed-forward layers is one expert of a GraniteMoE.

    Args:
        config: content of the GraniteMoE's config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field has the wrong type, or contradicts another.
    """
    said = {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    factors = {"use_mup": True, "input_mult": said["embedding_multiplier"], "output_mult": 1.0}
    factors["mup_scale_factor"] = said["logits_scaling"]
    return Architecture.from_config({**said, **factors, "model_type": MODEL_TYPE}, where, with_biases=True)


def decoder_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The numbers of a decoder that computes logits here: of a Tele-FLM, a Llama, or of a GraniteMoE the dense one.

    Raises:
        CheckpointError: it is none of these, or a field is wrong.
    """
    return dense_architecture(config, where) if has_experts(config) else Architecture.from_config(config, where)


def expert_weights(experts: Experts) -> Iterator[tuple[str, Shape]]:
    """Every weight of a GraniteMoE in data-flow order: its name and its shape."""
    a, count = experts.dense, experts.num_local_experts
    for name, weight, layer in weights(a):
        kind = name.split(".")[-2]
        if kind == "gate_proj":
            yield ROUTER.format(layer), (count, a.hidden_size)
            yield INPUT_LINEAR.format(layer), (count, 2 * a.intermediate_size, a.hidden_size)
        elif kind == "down_proj":
            yield OUTPUT_LINEAR.format(layer), (count, a.hidden_size, a.intermediate_size)
        elif kind != "up_proj":
            yield name, weight.shape(a)


def check_expert_tensors(tensors: Mapping[str, View], experts: Experts, where: str) -> None:
    """Check that a checkpoint holds exactly the weights of a GraniteMoE.

    Raises:
        CheckpointError: a weight is missing, unknown, or has another shape; the message names it.
    """
    expected = dict(expert_weights(experts))
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: {name} is missing; config.json describes {len(expected)} weights.")
    for name, view in tensors.items():
        if is_derived(name):
            continue
        if name not in expected:
            raise CheckpointError(f"{where}: {name} is not a weight that config.json describes; it would be lost.")
        if view.shape != expected[name]:
            raise CheckpointError(f"{where}: {name} has shape {view.shape}, config.json says {expected[name]}.")


__all__ = [
    "GRANITEMOE",
    "GRANITEMOE_CLASS",
    "INPUT_LINEAR",
    "OUTPUT_LINEAR",
    "ROUTER",
    "Experts",
    "check_expert_tensors",
    "decoder_architecture",
    "dense_architecture",
    "expert_weights",
    "has_experts",
    "read_experts",
]
