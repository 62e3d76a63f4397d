# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a model needs on each GPU that serves it: weights, and keys and values of the tokens it has in mind.

Bytes follow from sizes. With h features, f feed-forward features, a heads and k key/value heads of d features, L
layers, a vocabulary of V rows, and T x P GPUs (each of P stages has some layers, each matrix of them is cut in T):

| what | bytes on the fullest GPU |
|---|---|
| matrices of the layers | ceil(L / P) x (2 h d (a + k) + 3 h f) / T x bytes of a weight |
| their scales, in fp8 | ceil(L / P) x rows of these matrices x 4: one float a row, at most all of them on each GPU |
| norms | (2 ceil(L / P) + 1) x h x bytes of an unquantised weight, the same on each GPU |
| embedding, and head unless it is tied | V h / T each; with P = 1 both are on each GPU, else one at most |
| keys and values of a token | ceil(L / P) x 2 x max(k / T, 1) x d x bytes of one |

That is how vLLM 0.32 and SGLang 0.5.23 cut a model, by their code. Activations, buffers of communication, graphs and
fragmentation are not in it; `reserve` stands for them, and is an assumption.
"""

import math
from dataclasses import dataclass

from .architecture import Architecture
from .checkpoint.errors import CheckpointError

# Weight format -> bytes of a weight of a layer's matrix, of any other weight, and of a scale for each row.
_FORMATS = {"float32": (4, 4, 0), "bfloat16": (2, 2, 0), "float16": (2, 2, 0), "fp8": (1, 2, 4)}

UTILISATION = 0.9
RESERVE = 2 << 30


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on the fullest GPU.

    Args:
        weights: of its part of the model.
        per_token: keys and values of one token of one sequence.
    """

    weights: int
    per_token: int

    def tokens(self, gpu_memory: int, *, utilisation: float = UTILISATION, reserve: int = RESERVE) -> int:
        """How many tokens, of all sequences together, find room beside the weights; 0 if the weights do not.

        Args:
            gpu_memory: bytes of each GPU.
            utilisation: the share of it that the engine takes.
            reserve: bytes for what is not modelled.
        """
        return max(0, int((gpu_memory * utilisation - reserve - self.weights) // self.per_token))


def serving_memory(
    model: Architecture,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    weights: str = "bfloat16",
    cache_bytes: int = 2,
) -> ServingMemory:
    """What the fullest of the GPUs that serve a model holds.

    Args:
        model: its sizes.
        tensor_parallel: GPUs over which each matrix is cut.
        pipeline_parallel: stages over which the layers are spread.
        weights: `bfloat16`, `float16`, `float32`, or `fp8`: matrices of the layers in 8 bits, the rest in 16.
        cache_bytes: of one number in the cache of keys and values: 2, or 1 in fp8.

    Raises:
        CheckpointError: the format is unknown, or the model cannot be cut so.
    """
    if weights not in _FORMATS:
        raise CheckpointError(f"weights is {weights!r}, expected one of {', '.join(_FORMATS)}.")
    _check_cut(model, tensor_parallel, pipeline_parallel)
    matrix, other, scale = _FORMATS[weights]
    layers = math.ceil(model.num_hidden_layers / pipeline_parallel)
    h, d, f = model.hidden_size, model.head_dim, model.intermediate_size
    key_value = max(model.num_key_value_heads, tensor_parallel)  # fewer heads than GPUs are repeated
    heads = model.num_attention_heads
    elements = 2 * h * d * (heads + key_value) + 3 * h * f
    rows = d * (heads + 2 * key_value) + h + 2 * f + h  # of q, k, v, o, gate, up, down
    biases = d * (heads + 2 * key_value) + h if model.attention_bias else 0
    vocabularies = 1 if model.tie_word_embeddings or pipeline_parallel > 1 else 2
    held = layers * math.ceil(elements / tensor_parallel) * matrix
    held += layers * rows * scale
    held += (layers * (2 * h + biases) + h) * other
    held += vocabularies * math.ceil(model.vocab_size / tensor_parallel) * h * other
    return ServingMemory(held, layers * 2 * (key_value // tensor_parallel) * d * cache_bytes)


def _check_cut(model: Architecture, tensor_parallel: int, pipeline_parallel: int) -> None:
    for name, value in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if value < 1:
            raise CheckpointError(f"{name} is {value}; it must be at least 1.")
    if pipeline_parallel > model.num_hidden_layers:
        raise CheckpointError(
            f"pipeline_parallel is {pipeline_parallel}, the model has {model.num_hidden_layers} layers; take fewer."
        )
    for name, size in (("attention heads", model.num_attention_heads), ("feed-forward", model.intermediate_size)):
        if size % tensor_parallel:
            raise CheckpointError(f"tensor_parallel is {tensor_parallel}, which does not divide {size} ({name}).")
    larger, smaller = sorted((model.num_key_value_heads, tensor_parallel), reverse=True)
    if larger % smaller:
        raise CheckpointError(
            f"tensor_parallel is {tensor_parallel} and num_key_value_heads {model.num_key_value_heads}: one has to be "
            "a multiple of the other."
        )


__all__ = ["RESERVE", "UTILISATION", "ServingMemory", "serving_memory"]
