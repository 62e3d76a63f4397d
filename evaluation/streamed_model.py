# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The forward pass of a Tele-FLM, a Llama or a GraniteMoE in numpy, its weights read from the files row block by block.

A layer of the 1T is 15.4 GB in bfloat16; here no more than a few blocks of it are in memory at a time, beside the
activations. Written from the definition of the architecture (Llama, with a factor on the embeddings and one on the
logits), not from any implementation, so that it can judge both. Shapes: T tokens of one sequence, or of several, one
after another without padding; a layer is told their lengths.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from conversion.architecture import Architecture, rope_parameters, trained_length
from conversion.checkpoint.dtypes import FLOAT32, FLOAT64, DType
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.kernel_copy import available_memory as machine_memory
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.row_quant import dequantise
from conversion.checkpoint.sources import Source
from conversion.compressed_tensors import is_float8, read_float8, scale_name
from conversion.experts import (
    INPUT_LINEAR,
    OUTPUT_LINEAR,
    ROUTER,
    Experts,
    check_expert_tensors,
    has_experts,
    read_experts,
)
from conversion.mapping import EMBED_TOKENS, LM_HEAD, NORM, check_tensors
from conversion.model_identity import TensorDigest

from .rotary import KINDS, OF_TRAINED_LENGTH, rotary_frequencies

BLOCK = 1 << 22  # elements of a weight in memory at a time, twice: one multiplies while the next is read

ACTIVATIONS_KEPT = (
    "The model is quantised: what was computed with are its weights times their scales; activations were not rounded "
    "to 8 bits, as an engine may do."
)


def block_rows(columns: int) -> int:
    """How many rows of a weight are in memory at a time."""
    return max(1, BLOCK // columns)


class Precision:
    """What is computed in: float64, float32, or bfloat16, which is float32 with every result rounded to bfloat16."""

    def __init__(self, dtype: DType):
        self.dtype = dtype
        self.compute = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)

    def round(self, values: np.ndarray) -> np.ndarray:
        """A result as the dtype would hold it."""
        if self.dtype.itemsize >= 4:
            return values.astype(self.compute, copy=False)
        return values.astype(self.dtype.numpy).astype(self.compute)


# One function a formula.


def rms_norm(hidden: np.ndarray, weight: np.ndarray, eps: float, precision: Precision) -> np.ndarray:
    """hidden / sqrt(mean(hidden^2) + eps) * weight, for hidden [T, d] and weight [d]."""
    mean_square = np.square(hidden).mean(-1, keepdims=True)
    return precision.round(precision.round(hidden / np.sqrt(mean_square + hidden.dtype.type(eps))) * weight)


def rotate(heads: np.ndarray, angles: np.ndarray, scale: float, precision: Precision) -> np.ndarray:
    """Turn the pairs (x_i, x_{i + head_dim/2}) of heads [n, T, head_dim] by their angles, and multiply by scale."""
    cos, sin = (precision.round((scale * table(angles)).astype(precision.compute)) for table in (np.cos, np.sin))
    x, y = np.split(heads, 2, axis=-1)
    along = precision.round(heads * np.concatenate([cos, cos], -1))
    across = precision.round(np.concatenate([-y, x], -1) * np.concatenate([sin, sin], -1))
    return precision.round(along + across)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, precision: Precision) -> np.ndarray:
    """Causal softmax attention: query [N, T, head_dim], key and value [K, T, head_dim] to [T, N * head_dim].

    Query head n attends through key/value head floor(n * K / N); one such group at a time is in memory.
    """
    (heads, length, dim), group = query.shape, query.shape[0] // key.shape[0]
    future = np.triu(np.ones((length, length), bool), 1)
    output = np.empty((length, heads, dim), query.dtype)
    for head in range(heads):
        scores = precision.round(precision.round(query[head] @ key[head // group].T) * dim**-0.5)
        scores[future] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = precision.round(weights / weights.sum(-1, keepdims=True))
        output[:, head] = precision.round(weights @ value[head // group])
    return output.reshape(length, heads * dim)


def swiglu(gate: np.ndarray, up: np.ndarray, precision: Precision) -> np.ndarray:
    """gate * sigmoid(gate) * up."""
    with np.errstate(over="ignore"):  # exp(-gate) = inf is a sigmoid of 0
        activated = precision.round(gate / (1 + np.exp(-gate)))
    return precision.round(activated * up)


def route(logits: np.ndarray, top: int, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Of router logits [T, N] the experts [T, top] with the largest ones, and their gates: the softmax over these."""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :top]
    largest = np.take_along_axis(logits, chosen, axis=-1)
    weights = np.exp(largest - largest[:, :1])
    return chosen, precision.round(weights / weights.sum(-1, keepdims=True))


def _matrix(stack: View, index: int) -> View:
    """One matrix [rows, columns] of a stack [matrices, rows, columns]."""
    part = stack[index : index + 1]
    return replace(part, shape=part.shape[1:], strides=part.strides[1:])


def _read_experts(config: Mapping[str, Any], where: str) -> Experts:
    """The numbers of a GraniteMoE, if it adds up and weighs scores as a Llama does, and has no biases."""
    experts = read_experts(config, where)
    expected = {"attention_multiplier": experts.dense.head_dim**-0.5, "residual_multiplier": 1.0}
    for name, number in {**expected, "attention_bias": False}.items():
        found = config.get(name, number if name == "attention_bias" else 1.0)
        if not isinstance(found, int | float) or not math.isclose(found, number, rel_tol=1e-12):
            raise CheckpointError(
                f"{where}: {name} is {str(found)[:80]}; the streamed forward pass computes a GraniteMoE with {number} "
                "alone."
            )
    return experts


class StreamedModel:
    """A checkpoint that computes without being loaded.

    Args:
        checkpoint: the checkpoint, open.
        dtype: what to compute in.
        reader: reads its files.
        pool: threads that read ahead.

    Raises:
        CheckpointError: its weights are not those of its configuration, or it uses what is not written here.
    """

    def __init__(
        self,
        checkpoint: Source,
        dtype: DType,
        reader: FileReader,
        pool: ThreadPoolExecutor,
    ):
        config: dict[str, Any] = checkpoint.config or {}
        where = f"{checkpoint.folder}/config.json"
        self.experts = _read_experts(config, where) if has_experts(config) else None
        self.architecture = self.experts.dense if self.experts else Architecture.from_config(config, where)
        float8 = read_float8(checkpoint) if is_float8(config) else None
        tensors = float8.tensors if float8 else checkpoint.tensors
        if self.experts:
            check_expert_tensors(tensors, self.experts, checkpoint.folder)
        else:
            check_tensors(tensors, self.architecture, checkpoint.folder)
        rope, activation = rope_parameters(config), config.get("hidden_act") or "silu"
        if rope["rope_type"] not in KINDS or activation != "silu":
            raise CheckpointError(
                f"{where}: rope_type is {rope['rope_type']} and hidden_act {activation}; the streamed forward pass "
                f"computes {', '.join(KINDS)} and silu alone."
                + ("" if self.experts else " Use a machine with the memory to load the model.")
            )
        length = trained_length(config, where) if rope["rope_type"] in OF_TRAINED_LENGTH else 0
        try:
            self._frequencies, self._scale = rotary_frequencies(rope, self.architecture.head_dim, length)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        self._tensors, self._reader, self._pool = tensors, reader, pool
        self._scales = {name: checkpoint.tensors[scale_name(name)] for name in (float8.scales if float8 else ())}
        self.progress: Callable[[int], None] = lambda nbytes: None  # called with the bytes just read
        self._digests: dict[str, str] = {}
        self.precision = Precision(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a pass reads, the embedding's few rows left out."""
        embedding = 0 if self.architecture.tie_word_embeddings else self._tensors[EMBED_TOKENS.name].nbytes
        return sum(view.nbytes for view in self._tensors.values()) - embedding

    @property
    def layer_nbytes(self) -> int:
        """Bytes of weights that one layer reads."""
        return sum(view.nbytes for name, view in self._tensors.items() if name.startswith("model.layers.0."))

    @property
    def head_nbytes(self) -> int:
        """Bytes of weights that the logits read."""
        return self._tensors[self._head].nbytes + self._tensors[NORM.name].nbytes

    @property
    def embedding_nbytes(self) -> int:
        """Bytes of the embedding."""
        return self._tensors[EMBED_TOKENS.name].nbytes

    @property
    def _head(self) -> str:
        return EMBED_TOKENS.name if self.architecture.tie_word_embeddings else LM_HEAD.name

    def take_digests(self) -> dict[str, str]:
        """Digests of the weights that were read from end to end since this was last asked, by name.

        They are taken of the very values that were computed with; see `conversion.model_identity.TensorDigest`.
        """
        taken, self._digests = self._digests, {}
        return taken

    def hidden_states(self, input_ids: np.ndarray) -> Iterator[np.ndarray]:
        """The residual stream [T, hidden_size]: after the embedding, then after each layer, as it is computed."""
        hidden = self.embed(input_ids)
        yield hidden
        for layer in range(self.architecture.num_hidden_layers):
            hidden = self.layer(layer, hidden, [len(input_ids)])
            yield hidden

    def embed(self, input_ids: np.ndarray, *, whole: bool = False) -> np.ndarray:
        """The residual stream [T, hidden_size] that the first layer reads, of token ids [T].

        Args:
            input_ids: the ids.
            whole: read all of the embedding, for its digest, and not only the rows of these tokens.
        """
        table = self._tensors[EMBED_TOKENS.name]
        tokens, places = np.unique(input_ids, return_inverse=True)
        if whole:
            rows, start = np.empty((len(tokens), table.shape[1]), self.precision.compute), 0
            for block in self._blocks(EMBED_TOKENS.name):
                here = slice(*np.searchsorted(tokens, (start, start + len(block))))
                rows[here] = block[tokens[here] - start]
                start += len(block)
        else:
            read = [self._reader.read(table[token : token + 1]) for token in map(int, tokens)]
            rows = self.precision.round(np.concatenate(read))
        return self.precision.round(rows * self.architecture.embedding_scale)[places]

    def layer(self, number: int, hidden: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """The residual stream [T, hidden_size] after a layer; of sequences of these lengths, whose sum is T."""
        name = f"model.layers.{number}"
        angles = np.outer(np.concatenate([np.arange(n) for n in lengths]), self._frequencies)
        normed = self._norm(hidden, f"{name}.input_layernorm.weight")
        query, key, value = (self._heads(normed, f"{name}.self_attn.{kind}_proj.weight") for kind in "qkv")
        query, key = (rotate(heads, angles, self._scale, self.precision) for heads in (query, key))
        attended = np.empty((len(hidden), query.shape[0] * query.shape[2]), query.dtype)
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            one = slice(end - length, end)
            attended[one] = attention(query[:, one], key[:, one], value[:, one], self.precision)
        del normed, query, key, value
        hidden = self.precision.round(hidden + self._linear(attended, f"{name}.self_attn.o_proj.weight"))
        del attended

        normed = self._norm(hidden, f"{name}.post_attention_layernorm.weight")
        if self.experts:
            return self.precision.round(hidden + self._mixture(normed, number, self.experts))
        gate, up = (self._linear(normed, f"{name}.mlp.{kind}_proj.weight") for kind in ("gate", "up"))
        inner = swiglu(gate, up, self.precision)
        del gate, up
        return self.precision.round(hidden + self._linear(inner, f"{name}.mlp.down_proj.weight"))

    def _mixture(self, normed: np.ndarray, layer: int, experts: Experts) -> np.ndarray:
        """What the experts of a layer make of [T, hidden_size], one expert after the other."""
        inputs, outputs = (self._tensors[name.format(layer)] for name in (INPUT_LINEAR, OUTPUT_LINEAR))
        chosen, gates = route(self._linear(normed, ROUTER.format(layer)), experts.num_experts_per_tok, self.precision)
        mixed = np.zeros_like(normed)
        for expert in range(experts.num_local_experts):
            tokens, place = np.nonzero(chosen == expert)
            if not len(tokens):
                self.progress((inputs.nbytes + outputs.nbytes) // experts.num_local_experts)
                continue
            gate, up = np.split(self._product(normed[tokens], _matrix(inputs, expert)), 2, axis=-1)
            computed = self._product(swiglu(gate, up, self.precision), _matrix(outputs, expert))
            mixed[tokens] += self.precision.round(computed * gates[tokens, place, None])
        return self.precision.round(mixed)

    def logits(self, hidden: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """The logits [T, rows] of the last hidden state, block by block of that many vocabulary rows."""
        hidden = self._norm(hidden, NORM.name)
        for block in self._blocks(self._head, rows):
            yield self.precision.round(self.precision.round(hidden @ block.T) * self.architecture.logit_scale)

    def seconds_a_byte(self, tokens: int) -> float:
        """Measured on one block of the first layer: reading it, and multiplying it with that many tokens."""
        view = self._tensors["model.layers.0.self_attn.q_proj.weight"]
        view = view[: block_rows(view.shape[1])]
        hidden = np.ones((tokens, view.shape[1]), self.precision.compute)
        begin = time.perf_counter()
        self.precision.round(hidden @ self.precision.round(self._reader.read(view)).T)
        return (time.perf_counter() - begin) / view.nbytes

    def _norm(self, hidden: np.ndarray, name: str) -> np.ndarray:
        (weight,) = self._blocks(name)
        return rms_norm(hidden, weight, self.architecture.rms_norm_eps, self.precision)

    def _heads(self, hidden: np.ndarray, name: str) -> np.ndarray:
        """A projection of [T, hidden_size] as [heads, T, head_dim]."""
        projected = self._linear(hidden, name).reshape(len(hidden), -1, self.architecture.head_dim)
        return np.ascontiguousarray(projected.transpose(1, 0, 2))

    def _linear(self, values: np.ndarray, name: str) -> np.ndarray:
        """values [T, in] times the transpose of a weight [out, in]."""
        return self._product(values, self._tensors[name], self._blocks(name))

    def _product(self, values: np.ndarray, view: View, blocks: Iterator[np.ndarray] | None = None) -> np.ndarray:
        """values [T, in] times the transpose of a matrix [out, in]; its `blocks` of rows, where they are hashed too."""
        output, start = np.empty((len(values), view.shape[0]), self.precision.compute), 0
        for block in blocks or (rounded for _, rounded in self._ahead(view, block_rows(view.shape[1]))):
            output[:, start : start + len(block)] = values @ block.T
            start += len(block)
        return self.precision.round(output)

    def _blocks(self, name: str, rows: int = 0) -> Iterator[np.ndarray]:
        """A weight's rows in blocks, the next one being read while one is used; all of them, for its digest."""
        view = self._tensors[name]
        rows = rows or (block_rows(view.shape[1]) if len(view.shape) > 1 else view.shape[0])
        digest = TensorDigest()
        for values, rounded in self._ahead(view, rows, self._read_scales(name)):
            digest.update(values)
            yield rounded
        self._digests[name] = digest.hexdigest()

    def _ahead(
        self, view: View, rows: int, scales: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows of a matrix in blocks, as `_read` gives them, the next one being read while one is used."""
        ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for start in range(0, view.shape[0], rows):
            stop = min(start + rows, view.shape[0])
            ahead.append(
                self._pool.submit(self._read, view[start:stop], scales if scales is None else scales[start:stop])
            )
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _read_scales(self, name: str) -> np.ndarray | None:
        """The scales [rows, 1] of a weight in 8-bit floats; None if it is in none."""
        if name not in self._scales:
            return None
        scales, digest = self._reader.read(self._scales[name]), TensorDigest()
        digest.update(scales)
        self._digests[scale_name(name)] = digest.hexdigest()
        return np.broadcast_to(scales.reshape(-1, 1), (self._tensors[name].shape[0], 1))

    def _read(self, view: View, scales: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values of a weight: as the file has them, and as they are computed with."""
        values = self._reader.read(view)
        self.progress(values.nbytes)
        if scales is None:
            return values, self.precision.round(values)
        products = np.empty(values.shape, self.precision.compute)
        dtype = FLOAT64 if self.precision.compute.itemsize == 8 else FLOAT32
        for row, codes in enumerate(values.view(np.uint8)):  # each with little beside it
            dequantise(codes, scales[row], dtype, products[row])
        return values, self.precision.round(products)


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return machine_memory() // 2
