# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The table between Megatron and the Hub: names of every age, row orders against formulas, and tables of forks."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from conversion.architecture import Architecture
from conversion.checkpoint.bytes import identify
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sharded import ShardedTensor
from conversion.mapping import Weight, weights
from conversion.native.table import (
    MEGATRON,
    NativeWeight,
    RowOrder,
    hub_name,
    join,
    megatron_name,
    native_tensors,
    read_table,
    split,
)

ARCHITECTURE = Architecture(
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=30,
    rms_norm_eps=1e-5,
)
MULTI_HEAD = ARCHITECTURE.evolve(num_key_value_heads=6)
LINES = {line.name: line for line in MEGATRON}
QKV, FC1 = LINES["decoder.layers.{}.self_attention.linear_qkv.weight"], LINES["decoder.layers.{}.mlp.linear_fc1.weight"]


@pytest.fixture
def stored(tmp_path):
    """Puts an array into a file and gives its window."""
    numbers = itertools.count()

    def store(array: np.ndarray) -> ShardedTensor:
        path = tmp_path / f"{next(numbers)}.bin"
        array.astype("<f4").tofile(path)
        return ShardedTensor.of(View.contiguous(identify(path), 0, array.shape, FLOAT32))

    return store


def values(tensor: ShardedTensor, columns: int) -> np.ndarray:
    """The elements of a tensor, as rows."""
    out = np.full(tensor.shape, np.nan, np.float32)
    with FileReader() as reader:
        for box, view in tensor.chunks:
            out[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = reader.read(view)
    return out.reshape(-1, columns)


def held_by(line: NativeWeight, a: Architecture) -> list[tuple[str, Weight]]:
    """The Hub tensors of a line in layer 0."""
    hub = {name: weight for name, weight, _ in weights(a)}
    return [(name.format(0), hub[name.format(0)]) for name in line.hub]


def row(kind: str, head: int, feature: int, a: Architecture, order: RowOrder) -> int:
    """Where Megatron keeps one row of q, k or v: the head's, and the feature's in it."""
    h, g, d, t = a.num_attention_heads, a.num_key_value_heads, a.head_dim, order.tensor_parallel
    if order.rotary_interleaved and kind != "v":
        feature = 2 * feature if feature < d // 2 else 2 * (feature - d // 2) + 1
    which = "qkv".index(kind)
    if order.qkv_version == 0:  # on every rank: [3, heads, features]
        rank, local = divmod(head, h // t)
        return ((rank * 3 + which) * (h // t) + local) * d + feature
    if order.qkv_version == 1:  # [heads, features, 3]
        return (head * d + feature) * 3 + which
    group, query = divmod(head, h // g) if kind == "q" else (head, {"k": h // g, "v": h // g + 1}[kind])
    return (group * (h // g + 2) + query) * d + feature


@pytest.mark.parametrize(
    ("architecture", "order"),
    [
        (ARCHITECTURE, RowOrder()),
        (ARCHITECTURE, RowOrder(rotary_interleaved=True)),
        (MULTI_HEAD, RowOrder()),
        (MULTI_HEAD, RowOrder(qkv_version=2)),
        (MULTI_HEAD, RowOrder(qkv_version=1)),
        (MULTI_HEAD, RowOrder(qkv_version=0)),
        (MULTI_HEAD, RowOrder(qkv_version=0, tensor_parallel=2)),
    ],
    ids=str,
)
def test_attention_rows(architecture, order, stored):
    a = architecture
    rows = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    native = np.arange(rows * a.hidden_size).reshape(rows, a.hidden_size)
    held = held_by(QKV, a)
    parts = split(stored(native), QKV, held, a, order)
    for (name, part), kind in zip(parts.items(), "qkv", strict=True):
        heads = a.num_attention_heads if kind == "q" else a.num_key_value_heads
        places = [row(kind, head, feature, a, order) for head in range(heads) for feature in range(a.head_dim)]
        np.testing.assert_array_equal(values(part, a.hidden_size), native[places], err_msg=name)
    if not order.rotary_interleaved:
        back = join([stored(values(part, a.hidden_size)) for part in parts.values()], QKV, a, order)
        np.testing.assert_array_equal(values(back, a.hidden_size), native)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_gated_rows(ranks, stored):
    """On each rank its part of the gate, then its part of the other."""
    a = ARCHITECTURE
    gate, up = (np.random.default_rng(i).integers(99, size=(a.intermediate_size, a.hidden_size)) for i in range(2))
    native = np.concatenate([np.split(x, ranks)[rank] for rank in range(ranks) for x in (gate, up)])
    order = RowOrder(gated_blocks=ranks)
    held = [
        (name, line)
        for name, line, layer in weights(a)
        if layer == 0 and name.split(".")[-2] in ("gate_proj", "up_proj")
    ]
    parts = split(stored(native), FC1, held, a, order)
    for part, expected in zip(parts.values(), (gate, up), strict=True):
        np.testing.assert_array_equal(values(part, a.hidden_size), expected)
    np.testing.assert_array_equal(values(join([stored(gate), stored(up)], FC1, a, order), a.hidden_size), native)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_every_weight_has_a_line(tied, biased):
    a = ARCHITECTURE.evolve(tie_word_embeddings=tied, attention_bias=biased)
    held = [name for _, _, hub in native_tensors(MEGATRON, a) for name, _ in hub]
    missing = [name for name, *_ in weights(a) if name not in held]
    assert len(held) == len(set(held))
    # Megatron has no bias on the output of attention beside those on q, k and v.
    assert missing == ([f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(2)] if biased else [])


LAYER = "decoder.layers.7."
LEGACY = "language_model.encoder.layers.7."


@pytest.mark.parametrize(
    ("name", "today"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("language_model.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("module.module.decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("language_model.encoder.final_norm.weight", "decoder.final_layernorm.weight"),
        ("language_model.transformer.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("language_model.output_layer.weight", "output_layer.weight"),
        (LAYER + "input_layernorm.weight", LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        (LEGACY + "input_norm.weight", LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        (LAYER + "pre_mlp_layernorm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (LEGACY + "post_attention_norm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (LEGACY + "post_attention_layernorm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (LEGACY + "self_attention.query_key_value.weight", LAYER + "self_attention.linear_qkv.weight"),
        (LEGACY + "attention.query_key_value.bias", LAYER + "self_attention.linear_qkv.bias"),
        (LEGACY + "self_attention.dense.weight", LAYER + "self_attention.linear_proj.weight"),
        (LEGACY + "mlp.dense_h_to_4h.weight", LAYER + "mlp.linear_fc1.weight"),
        (LEGACY + "mlp.dense_4h_to_h.weight", LAYER + "mlp.linear_fc2.weight"),
    ],
)
def test_names_of_every_age(name, today):
    assert megatron_name(name) == today
    assert megatron_name(today) == today


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "_orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_names_of_wrapped_models(prefix, name):
    assert hub_name(prefix + name) == name


YAML = """\
- {native: tok.weight, hub: model.embed_tokens.weight, parallel: column}
- native: blocks.{}.attn.qkv.weight
  hub:
  - model.layers.{}.self_attn.q_proj.weight
  - model.layers.{}.self_attn.k_proj.weight
  - model.layers.{}.self_attn.v_proj.weight
  parallel: column
  rows: qkv
"""


def test_a_table_from_a_file(tmp_path):
    (tmp_path / "fork.yaml").write_text(YAML)
    assert [(line.name, line.hub, line.parallel, line.rows) for line in read_table(tmp_path / "fork.yaml")] == [
        ("tok.weight", ("model.embed_tokens.weight",), "column", "plain"),
        ("blocks.{}.attn.qkv.weight", QKV.hub, "column", "qkv"),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("native: x", "holds a dict, expected a list"),
        ("- [", "cannot be read as YAML"),
        ("- {native: x, hub: lm_head.weight}", "entry 1: lacks native, hub or parallel"),
        ("- {native: x, hub: lm_head.weight, parallel: column, row: qkv}", "entry 1: row is unknown"),
        ("- {native: x, hub: lm_head.weight, parallel: diagonal}", "parallel is 'diagonal'"),
        ("- {native: x, hub: lm_head, parallel: column}", r"hub is \['lm_head'\], expected 1 of"),
        ("- {native: x, hub: lm_head.weight, parallel: column, rows: gated}", "expected 2 of"),
        (YAML.replace("blocks.{}.", "blocks."), "entry 2: .* do not both have one {}"),
    ],
)
def test_a_table_that_is_none(text, complaint, tmp_path):
    path: Path = tmp_path / "fork.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        read_table(path)
