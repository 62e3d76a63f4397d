# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The conditions under which a GraniteMoE computes what a dense model does, stated without the code that made it.

Transformers' GraniteMoE computes, in place of a layer's E(x), the sum of g_k E_k(x) over the K experts whose router
logits are largest, with gates g that are the softmax over these K logits: whatever the router, they add up to 1. So if
each E_k is E, the sum is E(x). That needs every expert's three matrices to be A's, everything else to be A's, and
multipliers that come to A's; of the router, that its logits are numbers.

Nothing here imports what makes experts, nor the names and shapes that it plans with: a mistake there must not repeat
itself here.
"""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes

from conversion.architecture import Architecture, rope_parameters
from conversion.checkpoint.dtypes import BY_NAME
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.plan import Shape, View
from conversion.mapping import is_derived, weights

from .conditions import Block, Conditions, FieldCondition, TensorConditions, Window, is_another_function

EXPERTS_TYPE, _CLASS = "granitemoe", "GraniteMoeForCausalLM"
_EXACT = 1e-12  # two numbers of a configuration agree: JSON has them as decimals of 15 digits or more
_LARGEST = 2.0**20  # of a router's entries: more is no router's, though float32 and bfloat16 hold its logits
_LARGEST_NORM = 16.0  # of the norm weights for which a router's logits are sure to be held by a smaller dtype
# What GraniteMoeConfig has where a config.json does not say.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
_STACKED = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")  # which the tensors' shapes say too
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
# Of a GraniteMoE's configuration, beside what has a condition here: the loss and what it is made of, and nothing.
_NO_FUNCTION = ("output_router_logits", "router_aux_loss_coef", "mlp_bias")


def state_expert_conditions(
    a: Mapping[str, Any], b: Mapping[str, Any], tensors: Mapping[str, View], where: str = "B"
) -> Conditions:
    """State what a GraniteMoE has to be to compute a dense model's function.

    Args:
        a: content of the dense model's config.json.
        b: content of the GraniteMoE's config.json.
        tensors: those of the GraniteMoE, by name.
        where: the GraniteMoE's folder, for messages.

    Raises:
        CheckpointError: a configuration or the tensors are unusable, or B's experts are of a model of other sizes.
    """
    source = Architecture.from_config(a, "A's config.json", with_biases=True)
    said = {**_DEFAULTS, **b}  # null is nothing that the class would replace: it is refused, or no number
    for name in _STACKED:
        if said[name] != (size := getattr(source, name)):
            raise CheckpointError(
                f"B's experts are of a model with {name} {str(said[name])[:80]}, A has {size}: give the model that B's "
                "teleflm_manifest.json names as its source. A growth before it is certified on its own."
            )
    experts, top = said["num_local_experts"], said["num_experts_per_tok"]
    for name, value in (("num_local_experts", experts), ("num_experts_per_tok", top)):
        if type(value) is not int:
            raise CheckpointError(f"B's config.json: {name} is {str(value)[:80]}, expected an integer.")
    _check_shapes(tensors, dict(_shapes(source, experts)), where)
    fields = tuple(_fields(a, b, said, source))
    conditions = tuple(_tensor_conditions(source, experts, _largest_entry(source, b, tensors)))
    gates = (
        "the gate of the one that computes a token is 1, whatever the router"
        if top == 1
        else f"the gates of the {top} that compute a token add up to 1, whatever the router; computed, they are rounded"
    )
    note = f"All {experts} experts of a layer are A's feed-forward layer, and in GraniteMoE {gates}."
    return Conditions(1, 1, fields, conditions, _is_exact(said, source), (note,))


# The configuration.


def _fields(
    a: Mapping[str, Any], b: Mapping[str, Any], said: Mapping[str, Any], source: Architecture
) -> Iterator[FieldCondition]:
    classes = b.get("architectures", [_CLASS])
    yield FieldCondition("architectures", classes, [_CLASS], classes == [_CLASS], "another class may compute otherwise")
    code = b.get("auto_map")
    yield FieldCondition("auto_map", code, None, not code, "code of the folder may compute otherwise")
    experts, top = said["num_local_experts"], said["num_experts_per_tok"]
    yield FieldCondition("num_local_experts", experts, "1 or more", experts >= 1, "one at least computes each token")
    holds, reason = 1 <= top <= experts, "gates of so many add up to 1, of none to nothing"
    yield FieldCondition("num_experts_per_tok", top, f"1 to {experts}", holds, reason)
    same, heads = "it is no size that experts change", said["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": _quotient(source.hidden_size, heads)}
    for name in _HEADS:
        found, expected = defaults.get(name) if said.get(name) is None else said[name], getattr(source, name)
        yield FieldCondition(name, found, expected, _is_same(found, expected), same)
    multipliers = {
        "embedding_multiplier": (source.embedding_scale, "A multiplies embeddings by it"),
        "logits_scaling": (1 / source.logit_scale, f"A multiplies logits by {source.logit_scale:g}, B divides them"),
        "attention_multiplier": (source.head_dim**-0.5, f"A multiplies scores by 1 / sqrt({source.head_dim})"),
        "residual_multiplier": (1.0, "A adds up what its layers compute as it is"),
    }
    for name, (number, reason) in multipliers.items():
        yield FieldCondition(name, said[name], number, _is_close(said[name], number), reason)
    eps = said["rms_norm_eps"]
    yield FieldCondition("rms_norm_eps", eps, source.rms_norm_eps, _is_close(eps, source.rms_norm_eps), same)
    old, new = rope_parameters(a, "A's config.json"), rope_parameters(b, "B's config.json")
    others = {
        "hidden_act": (a.get("hidden_act") or "silu", said["hidden_act"]),
        "tie_word_embeddings": (source.tie_word_embeddings, said["tie_word_embeddings"]),
        "attention_bias": (source.attention_bias, said["attention_bias"]),
        "rope_parameters": (old, new),
    }
    if any(rope["rope_type"] != "default" for rope in (old, new)):
        others["max_position_embeddings"] = (a.get("max_position_embeddings"), b.get("max_position_embeddings"))
    for name, (expected, found) in others.items():
        holds = type(found) is type(expected) and found == expected  # 0 is not false to the class, which refuses it
        yield FieldCondition(name, found, expected, holds, "another value is another function")
    known = {*_STACKED, *_HEADS, *multipliers, *others, *_NO_FUNCTION, "num_local_experts", "num_experts_per_tok"}
    yield from is_another_function(a, b, {*known, "rms_norm_eps"})
    if b.get("mlp_bias"):
        yield FieldCondition("mlp_bias", b["mlp_bias"], False, False, "A's feed-forward layers have no biases")


def _quotient(size: int, parts: Any) -> int | None:
    return size // parts if type(parts) is int and parts > 0 else None


def _is_same(found: Any, expected: int) -> bool:
    return type(found) is int and found == expected


def _is_close(found: Any, expected: float) -> bool:
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return is_number and math.isfinite(found) and math.isclose(found, expected, rel_tol=_EXACT)


def _is_exact(said: Mapping[str, Any], source: Architecture) -> bool:
    """Whether no multiplier was rounded; in fractions, as JSON's decimals are binary numbers once read."""
    factors = [Fraction(source.input_mult), Fraction(source.output_mult) / Fraction(source.mup_scale_factor)]
    embedding, logit = factors if source.use_mup else [Fraction(1), Fraction(1)]
    try:
        return (
            Fraction(said["embedding_multiplier"]) == embedding
            and Fraction(said["logits_scaling"]) * logit == 1
            and said["attention_multiplier"] == source.head_dim**-0.5
            and said["rms_norm_eps"] == source.rms_norm_eps
        )
    except (TypeError, ValueError, OverflowError):
        return False


# The weights.


def _names(layer: int) -> tuple[str, str, str]:
    """Of a layer, what GraniteMoE calls its router, its experts' inputs and its experts' outputs."""
    moe = f"model.layers.{layer}.block_sparse_moe"
    return f"{moe}.router.layer.weight", f"{moe}.input_linear.weight", f"{moe}.output_linear.weight"


def _shapes(source: Architecture, experts: int) -> Iterator[tuple[str, Shape]]:
    """The weights that B has to have: A's, with three stacked tensors for each feed-forward layer."""
    hidden, inner = source.hidden_size, source.intermediate_size
    for name, weight, _ in weights(source):
        if ".mlp." not in name:
            yield name, weight.shape(source)
    for layer in range(source.num_hidden_layers):
        router, inputs, outputs = _names(layer)
        yield router, (experts, hidden)
        yield inputs, (experts, 2 * inner, hidden)
        yield outputs, (experts, hidden, inner)


def _check_shapes(tensors: Mapping[str, View], expected: Mapping[str, Shape], where: str) -> None:
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: {name} is missing; its config.json describes {len(expected)} weights.")
    for name, view in tensors.items():
        if is_derived(name):
            continue
        if name not in expected:
            raise CheckpointError(f"{where}: {name} is not a weight that its config.json describes.")
        if view.shape != expected[name]:
            raise CheckpointError(f"{where}: {name} has shape {view.shape}, its config.json says {expected[name]}.")


def _largest_entry(source: Architecture, b: Mapping[str, Any], tensors: Mapping[str, View]) -> float:
    """The largest magnitude of a router's entries with which no router logit is infinite, as their softmax is NaN then.

    GraniteMoE computes router logits in the dtype of the model, which is that of the weights or the one that
    config.json asks for. Of a normalised x with `hidden` features, the magnitudes add up to `hidden` times the largest
    norm weight at most.
    """
    asked = [str(b.get(key)).removeprefix("torch.") for key in ("dtype", "torch_dtype")]
    stored = [view.dtype.name for view in tensors.values()]
    dtypes = [BY_NAME[name] for name in {*asked, *stored} if name in BY_NAME and BY_NAME[name].is_floating]
    logit = min((float(ml_dtypes.finfo(dtype.numpy).max) for dtype in dtypes), default=math.inf)
    return min(_LARGEST, logit / (source.hidden_size * _LARGEST_NORM))


def _tensor_conditions(source: Architecture, experts: int, largest: float) -> Iterator[TensorConditions]:
    """What every weight has to be, in data-flow order: A's, in each expert, and routers of finite numbers.

    Args:
        source: the dense model's numbers.
        experts: how many there are.
        largest: of a router's entries.
    """
    for name, weight, layer in weights(source):
        shape = weight.shape(source)
        rows, columns = (shape[0] if len(shape) > 1 else 1), shape[-1]
        if layer is None or ".mlp." not in name:
            yield TensorConditions(name, name, 1.0, (_copy(rows, columns, "it is no part of an expert"),))
            continue
        router, inputs, outputs = _names(layer)
        if name.endswith(".gate_proj.weight"):
            free = Block("free", (0, experts), (0, columns), "router logits have to be numbers", largest=largest)
            yield TensorConditions(router, None, 1.0, (free,))
        # The activation is on the upper half of what input_linear computes, as chunk(2) has it.
        place = {"gate_proj": (inputs, 0), "up_proj": (inputs, rows), "down_proj": (outputs, 0)}
        stacked, first = place[name.split(".")[-2]]
        block = _copy(rows, columns, "every expert has to be A's feed-forward layer")
        for expert in range(experts):
            yield TensorConditions(stacked, name, 1.0, (block,), Window(expert, first, rows))


def _copy(rows: int, columns: int, reason: str) -> Block:
    return Block("copy", (0, rows), (0, columns), reason)


__all__ = ["EXPERTS_TYPE", "state_expert_conditions"]
